"""Files and folders that are whole or absent: written to a temporary name beside the target, fsynced, renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ._checks import require


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls ``write`` on a temporary file and renames it to ``path``; on an error ``path`` is left as it was."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_target(folder: str | os.PathLike[str], argument: str, overwrite: bool) -> Path:
    path = Path(folder).expanduser().resolve()
    if path.exists():
        require(path.is_dir(), argument, f"{path}, a file", "a folder")
        occupied = any(path.iterdir())
        require(overwrite or not occupied, argument, f"{path}, which exists", "a new folder, or overwrite=True")
        known = not occupied or (path / "config.json").is_file()
        require(known, argument, f"{path}, which holds something else than a model", "a new folder, or one with a config.json")
    return path


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside ``path``, which takes its place on success and is removed on any exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    new, old = path.parent / f".{path.name}.new-{tag}", path.parent / f".{path.name}.old-{tag}"
    new.mkdir()
    try:
        yield new
        for file in sorted(new.rglob("*")):
            _sync(file)
        _sync(new)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
