"""The state of a run of several ranks on disk, by torch.distributed.checkpoint: a folder a checkpoint, whole or absent.

    step-0000100/state.pt     numbers and names, and in the place of every tensor one without values
    step-0000100/*.distcp     the tensors; each rank writes a part of them, or its shards
    step-0000100/.metadata    which is where

Any number of ranks continues from it, and from the file of a single process, which goes on writing files.
"""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import sync_folder, write_file
from .checkpoints import checkpoint_path, load_checkpoint, save_checkpoint
from .ranks import Ranks

_KEEP = 2  # the newest checkpoints that are kept, as of those in files
_STATE = "state.pt"


def _engine() -> Any:
    """Nearly a second to import, which a single process need not spend."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Dictionaries, lists and tuples with every tensor changed, always in the same order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(value, change) for value in tree)
    return tree


def _numbered(tree: Any) -> dict[str, Tensor]:
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(tree, take)
    return {str(n): tensor for n, tensor in enumerate(found)}


def checkpoints_in(folder: Path) -> list[Path]:
    """Files and folders, the newest last."""
    whole = [p for p in folder.glob("step-*") if p.suffix == ".pt" or (p / ".metadata").is_file()]
    return sorted(whole, key=lambda path: path.name)


def _drop_others(path: Path) -> None:
    """All but the newest up to ``path``; those of an abandoned run that got further too."""
    others = [p for p in checkpoints_in(path.parent) if p != path]
    older = [p for p in others if p.stem < path.stem]
    kept = older[len(older) - (_KEEP - 1) :]
    for old in others:
        if old in kept:
            continue
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def save_of_ranks(folder: Path, step: int, state: dict[str, Any], ranks: Ranks) -> Path:
    """``save_checkpoint``, by all ranks together.

    Raises:
        OSError: the disk of one of them is full or not writable; on all.
    """
    if ranks.count == 1:
        path = save_checkpoint(folder, step, state)
        _drop_others(path)
        return path
    path = checkpoint_path(folder, step).with_suffix("")

    def begin() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{path.name}.{secrets.token_hex(4)}"
        new.mkdir()
        plain = _map(state, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
        write_file(new / _STATE, lambda file: torch.save(plain, file))
        return new

    def finish() -> None:
        sync_folder(new)
        if path.exists():  # of an abandoned run
            shutil.rmtree(path)
        new.rename(path)
        sync_folder(folder)
        _drop_others(path)

    new, dcp = ranks.once(begin), _engine()
    try:
        dcp.save(_numbered(state), checkpoint_id=new)
        ranks.once(finish)
    except dcp.api.CheckpointException as error:
        if ranks.first:
            shutil.rmtree(new, ignore_errors=True)
        rank, (cause, _) = min(error.failures.items())
        raise OSError(f"checkpoint {path} could not be written by rank {rank}: {cause}") from error
    return path


def last_of_ranks(folder: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint in ``folder``, a file or a folder, if any: what the first rank sees."""
    return ranks.once(lambda: next(iter(checkpoints_in(folder)[-1:]), None))


def load_of_ranks(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """``load_checkpoint`` of a file or a folder; every rank reads it whole."""
    if not path.is_dir():
        return load_checkpoint(path, fingerprint)
    state, dcp = load_checkpoint(path / _STATE, fingerprint), _engine()
    state = _map(state, lambda t: torch.empty(t.shape, dtype=t.dtype))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a single process reads: each does so on its own
            dcp.load(_numbered(state), checkpoint_id=path, no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    return state
