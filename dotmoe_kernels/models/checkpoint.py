"""Save and load a converted model: one folder, checked before it takes its place; ``folder.py`` says what is in it, ``target.py``
where it may be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .._checks import require
from .._files import write_folder
from .card import model_card
from .folder import check_folder
from .modeling import DotMoeForCausalLM
from .shards import save_options
from .target import check_target, in_its_place, replaced_files


def save(
    model: DotMoeForCausalLM,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
    max_shard_size: str = "2GB",
) -> None:
    """Write a converted model as one folder; ``load`` and ``from_pretrained`` read it.

    The model appears complete and readable or not at all: whatever goes wrong, an older one stays as it was.

    Args:
        model: the sparse model.
        folder: to write; parents are made.
        tokenizer: saved along when given.
        overwrite: replace the model in a folder that has one; its files that are no part of a model stay.
        card: measured figures for README.md: name -> number, text, or a dictionary of those (a table of its own).
        max_shard_size: of one safetensors file; while it is written, a third of it is needed in memory.

    Raises:
        ValueError: ``model`` is not a DotMoeForCausalLM; the folder exists and ``overwrite`` is False; it holds no model; what was
            written cannot be read back.
        OSError, SafetensorError: the disk is full or not writable.
    """
    require(isinstance(model, DotMoeForCausalLM), "model", f"a {type(model).__name__}", "a DotMoeForCausalLM")
    path = check_target(folder, "folder", overwrite)
    with write_folder(path, replaced_files(tokenizer=tokenizer is not None)) as new:
        model.save_pretrained(new, max_shard_size=max_shard_size, **save_options(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(model_card(model, path.name, card or {}), encoding="utf-8")
        with in_its_place(new, path):
            check_folder(new, DotMoeForCausalLM)


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> DotMoeForCausalLM:
    """Read a converted model from a folder, in eval mode and with the storage layout of ``DotMoeExperts``.

    Args:
        folder: as written by ``save``.
        dtype: of the weights; None keeps that of the files. ``torch_dtype`` is its older name.
        device: to move the model to; None leaves it on the CPU.
        kwargs: for ``from_pretrained`` (``device_map``, ``attn_implementation``, ...); a config field such as ``top_k`` replaces
            the saved value.

    Raises:
        ValueError: no folder, config or weights; another kind of model; a newer format; a tensor that is missing, has a wrong
            shape or cannot be read; a neuron_order that is no permutation. Each names what it found.
    """
    require(
        os.path.exists(folder),
        "folder",
        f"{folder or repr(folder)}, which does not exist",
        "a folder written by dotmoe_kernels.save",
    )
    require(dtype is None or torch_dtype is None, "torch_dtype", f"{torch_dtype} beside dtype", "one of the two")
    dtype = torch_dtype if dtype is None else dtype
    model = DotMoeForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype, **kwargs)
    return model if device is None else model.to(device)
