"""The state of a run on disk: one file a checkpoint, whole or absent, from which the run continues bit for bit. That of several
ranks is a folder (``distributed``); any number of them goes on from either."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from .._files import write_file
from .distributed import Blank, is_shards, map_tensors, read_shards, write_shards
from .ranks import Ranks
from .sharding import whole

_KEEP = 2  # the newest checkpoints that are kept
_CHUNK = 1 << 17  # token ids at a time: the rest of a corpus may lie on disk


def weights_checksum(weights: Iterable[Tensor]) -> int:
    """Of the bits of all of them, whatever the order of the sum: marks the model that a run was started from."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(int(w.detach().view(bits[w.element_size()]).sum()) for w in weights)


def tokens_checksum(tokens: Tensor) -> int:
    """Of token ids and their places: marks the text of a run."""
    flat, total = tokens.flatten(), torch.zeros((), dtype=torch.int64)
    for first in range(0, flat.numel(), _CHUNK):
        part = flat[first : first + _CHUNK].long()
        total += (part * (torch.arange(first, first + len(part)) % 1009 + 1)).sum()
    return int(total)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}.pt"


class _Writer:
    """Keeps the OSError of a full disk, which torch.save hides behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:  # torch closes its archive after a failure, and would fail once more
            return len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        if self.error is None:
            self.file.flush()


def _write_state(state: dict[str, Any], file: BinaryIO) -> None:
    """Streams it tensor by tensor: nothing is held twice.

    Raises:
        OSError: the disk is full or not writable.
    """
    writer = _Writer(file)
    try:
        torch.save(state, cast(BinaryIO, writer))
    except Exception as error:
        raise (writer.error or error) from None


def _drop(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], ranks: Ranks | None = None) -> Path:
    """Writes the state after ``step`` steps and drops all but the newest checkpoints, those of an abandoned run that got further
    first.

    Raises:
        OSError: it cannot be written, the disk being full, say; the checkpoints before it are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, alone = checkpoint_path(folder, step), ranks is None or ranks.count == 1
    path = path if alone else path.with_suffix("")
    try:
        if alone:
            write_file(path, lambda file: _write_state(map_tensors(state, whole), file))  # divided by one rank
        else:
            write_shards(path, state, ranks)  # type: ignore[arg-type]
    except OSError as error:
        last = last_checkpoint(folder)
        kept = "there is none before it" if last is None else f"the last one is {last}, which is whole"
        raise OSError(error.errno, f"{error.strerror}: no checkpoint after step {step}; {kept}") from error
    if alone or ranks.first:  # type: ignore[union-attr]
        others = [old for old in checkpoints_in(folder) if old.stem != path.stem]
        older = [old for old in others if old.stem < path.stem]
        held = (path, *older[max(len(older) - _KEEP + 1, 0) :])
        for old in checkpoints_in(folder):
            if old not in held:
                _drop(old)
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """The oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == ".pt" or is_shards(path))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, if any."""
    return max(checkpoints_in(folder), default=None)


class BrokenCheckpoint(ValueError):
    """None of a folder's checkpoints is whole."""


def _read_checkpoint(path: Path, blank: Blank | None = None) -> dict[str, Any]:
    """The state in ``path``, every part of which has its checksum; torch.load alone reads what it finds."""
    if path.is_dir():
        return read_shards(path, blank)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"its part {broken} is not what was written")
        # mapped, where but a part of it is wanted
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=blank is not None)
        state["fingerprint"]
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    return state


def newest_checkpoint(folder: Path, blank: Blank | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in ``folder`` and its state, if there is any checkpoint. A warning names those that are not.

    Raises:
        BrokenCheckpoint: none of them is whole.
    """
    broken: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        try:
            state = _read_checkpoint(path, blank)
        except ValueError as error:
            broken.append(str(error))
            continue
        if broken:
            warnings.warn(f"{'; '.join(broken)}; {path}, the one before it, is used", stacklevel=3)
        return path, state
    if broken:
        raise BrokenCheckpoint("; ".join(broken))
    return None


def resume_from(
    folder: Path, fingerprint: dict[str, Any], ranks: Ranks | None = None, blank: Blank | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """``newest_checkpoint``, as the first rank finds it; ValueError if it was written by a run with other options or another
    model. ``blank``: of a rank that wants a part (``read_shards``)."""
    found: tuple[Path, dict[str, Any]] | None = None

    def find() -> Path | None:
        nonlocal found
        found = newest_checkpoint(folder, blank)
        return None if found is None else found[0]

    newest = find() if ranks is None else ranks.once(find)
    if newest is None:
        return None
    path, state = found or (newest, _read_checkpoint(newest, blank))
    theirs = state["fingerprint"]
    for key, ours in fingerprint.items():
        if theirs.get(key) != ours:
            raise ValueError(f"checkpoint {path} was written with {key} = {theirs.get(key)!r}; this run has {ours!r}")
    return path, state


def read_log(path: Path) -> list[dict[str, float]]:
    """The steps of a run, those before a resumption too."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def truncate_log(path: Path, step: int) -> None:
    """Drops the lines of ``path`` at and after ``step``, which the resumed run writes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # a line cut off by the interruption
            continue
    text = "".join(line + "\n" for line in kept)
    write_file(path, lambda file: file.write(text.encode()))
