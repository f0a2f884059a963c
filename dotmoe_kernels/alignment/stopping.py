"""A training that is asked to stop finishes the step under way and writes a checkpoint first; work of another kind is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Stopped(BaseException):
    """The work has stopped because it was asked to. Like KeyboardInterrupt no Exception: what catches those must not go on."""


class Stop:
    """Asks a training to stop: from the handler of a signal, which may call ``ask``, or by ``asked`` from anywhere.

    Attributes:
        asked: whether it has been; a loop looks once a step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._loops = 0

    def ask(self) -> None:
        """Once more changes nothing: a launcher and the shell may both send the signal.

        Raises:
            Stopped: no loop is running that would look."""
        again, self.asked = self.asked, True
        if not self._loops and not again:
            raise Stopped("stopped before the next step")

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Inside is a loop that finishes its step."""
        self._loops += 1
        try:
            yield
        finally:
            self._loops -= 1
        if self.asked:  # after its last look
            raise Stopped("stopped between two stages")


def stopped(label: str, step: int, steps: int, checkpoint: Path | str | None) -> Stopped:
    """The exception after ``step`` of ``steps``. ``checkpoint``: where its state is; None: nowhere."""
    kept = "nothing is kept, there being no folder" if checkpoint is None else f"checkpoint {checkpoint}"
    return Stopped(f"{label} stopped after step {step} of {steps}, as asked; {kept}")
