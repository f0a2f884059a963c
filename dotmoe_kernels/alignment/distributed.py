"""A checkpoint of several ranks, by torch.distributed.checkpoint: a folder, whole or absent, that any number of ranks reads.

step-0000100/state.pt      numbers and names, and in the place of every tensor one without values
step-0000100/*.distcp      the tensors; each rank writes a part of them, or its shards
step-0000100/.metadata     which is where
step-0000100/checks.json   a checksum of each of these files
"""

from __future__ import annotations

import json
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import sync_folder, write_file
from .ranks import Ranks

_STATE, _CHECKS = "state.pt", "checks.json"


# puts a DTensor in the place of tensors without values that are to be read in parts
Blank = Callable[[dict[str, Any]], dict[str, Any]]


def _room(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def _engine() -> Any:
    """Nearly a second to import, which a single process need not spend."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Dictionaries, lists and tuples with every tensor changed, always in the same order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def _numbered(tree: Any) -> dict[str, Tensor]:
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(tree, take)
    return {str(n): tensor for n, tensor in enumerate(found)}


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            total = zlib.crc32(part, total)
    return total


def write_shards(path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Makes ``path`` the folder of ``state``: all ranks together, each with its own or the same tensors.

    Raises:
        OSError: one of them cannot write; ``path`` is as it was.
    """

    def begin() -> Path:
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        new.mkdir()
        return new

    def finish(checks: list[dict[str, int]]) -> None:
        plain = map_tensors(state, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
        write_file(new / _STATE, lambda file: torch.save(plain, file))
        found = {name: value for part in checks for name, value in part.items()}
        found |= {name: _checksum(new / name) for name in (_STATE, ".metadata")}
        write_file(new / _CHECKS, lambda file: file.write(json.dumps(found).encode()))
        if path.exists():  # of an abandoned run
            shutil.rmtree(path)
        new.rename(path)
        sync_folder(path.parent)

    new, dcp = ranks.once(begin), _engine()
    try:
        dcp.save(_numbered(state), checkpoint_id=new)
        written = {file.name: _checksum(file) for file in new.glob(f"__{ranks.rank}_*.distcp")}
        checks = ranks.collect(written)
        ranks.once(lambda: finish(checks))
    except (OSError, dcp.api.CheckpointException) as error:
        if ranks.first:
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        rank, (cause, _) = min(error.failures.items())
        raise OSError(getattr(cause, "errno", None), f"rank {rank}: {cause}") from error


def is_shards(path: Path) -> bool:
    return path.is_dir() and path.suffix == "" and (path / _CHECKS).is_file()


def read_shards(path: Path, blank: Blank | None = None) -> dict[str, Any]:
    """The state in a folder, every tensor whole but for those that ``blank`` divides.

    Raises:
        ValueError: a part of it is missing, or not what was written.
    """
    dcp = _engine()
    try:
        for name, expected in json.loads((path / _CHECKS).read_text()).items():
            if _checksum(path / name) != expected:
                raise ValueError(f"its part {name} is not what was written")
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        state = map_tensors(state if blank is None else blank(state), _room)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a single process reads: each does so on its own
            dcp.load(_numbered(state), checkpoint_id=path, no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    return state
