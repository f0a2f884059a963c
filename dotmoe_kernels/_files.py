"""Files and folders that are whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".dotmoe-"  # how the folder begins in which a write is prepared; short, whatever the length of the target's name
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that cannot sync a folder


def _temporary(kind: str) -> str:
    return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls ``write`` on a temporary file and renames it to ``path``; on an error ``path`` is left as it was."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            if path.exists():  # whoever could read it can read the new one
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def write_folder(path: Path, belongs: Callable[[str], bool] = lambda name: False, *, last: str = "config.json") -> Iterator[Path]:
    """Yields a new folder that becomes ``path`` on success; on any exception ``path`` is as it was.

    Where ``path`` exists, or the file system renames no folders, the new files take their places in it one by one. ``last`` is the
    first to go and the last to come: without it the folder is no model, so that a process killed in between leaves no mixture. What
    has a new file's name in ``path``, or a name that ``belongs``, goes; everything else stays.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = (path.parent if path in made else path) / _temporary("new")
    try:
        new.mkdir()
        yield new
        for file in sorted(new.rglob("*")):
            _sync(file)
        _sync(new)
        if path not in made or not _rename_folder(new, path):
            _move_files(new, path, belongs, last)
        if path in made:
            sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                if os.path.exists(folder):
                    folder.rmdir()
        raise
    shutil.rmtree(new, ignore_errors=True)


def _rename_folder(new: Path, path: Path) -> bool:
    """False, and an empty ``path``, where the file system refuses."""
    try:
        new.rename(path)
    except OSError:
        path.mkdir()  # an error again if somebody else made it
        return False
    return True


def _move_files(new: Path, path: Path, belongs: Callable[[str], bool], last: str) -> None:
    """The files of ``new`` into ``path``; what they replace is put back on any exception."""
    names = [str(file.relative_to(new)) for file in sorted(new.rglob("*")) if not file.is_dir()]
    names.sort(key=lambda name: name == last)
    held = {entry.name for entry in path.iterdir() if belongs(entry.name)} | {n for n in names if os.path.lexists(path / n)}
    for name in sorted(held):
        if (path / name).is_dir() and not (path / name).is_symlink():
            raise IsADirectoryError(errno.EISDIR, "a folder in the place of a file", str(path / name))
    old, moves, made = path / _temporary("old"), list[tuple[Path, Path]](), list[Path]()

    def move(source: Path, target: Path) -> None:
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
            made.append(target.parent)
        moves.append((source, target))
        source.rename(target)

    try:
        old.mkdir()
        for name in sorted(held, key=lambda name: name != last):
            move(path / name, old / name)
        for name in names:
            if name == last:
                sync_folder(path)
            move(new / name, path / name)
        for folder in {(path / name).parent for name in names}:
            sync_folder(folder)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target):
                target.rename(source)
        for folder in (*made, old):  # empty: had a way back failed, we would not be here
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def probe_folder(path: Path, *, file: bool = False) -> None:
    """Takes the steps of ``write_folder(path)``, or of ``write_file`` in it, with an empty file, and undoes them.

    Raises:
        OSError: one of them fails.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    probe = path / _temporary("probe")
    try:
        if file:
            path.mkdir(parents=True, exist_ok=True)
            write_file(probe, lambda handle: handle.write(b"\0"))
        else:
            with write_folder(path, last=probe.name) as new:
                (new / probe.name).write_bytes(b"\0")
        probe.unlink()
    finally:
        with suppress(OSError):
            for folder in made:
                if os.path.exists(folder):
                    folder.rmdir()
