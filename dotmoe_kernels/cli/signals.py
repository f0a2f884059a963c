"""SIGTERM, which schedulers send before they take a machine away, asks for a stop; Ctrl-C interrupts at once, as ever."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..alignment.stopping import Stop


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Inside, SIGTERM asks the stop that is yielded; only the main thread may take signals."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
