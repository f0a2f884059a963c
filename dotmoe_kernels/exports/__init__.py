"""A converted model as another architecture, in a folder that needs nothing of this package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .._checks import require
from .._files import write_folder
from ..models.checkpoint import load
from ..models.folder import OURS, check_dense_folder, check_folder
from ..models.modeling import DotMoeForCausalLM, restore_dense
from ..models.target import VOCABULARIES, check_target, in_its_place, replaced_files, require_apart
from .streaming import stream_dense

__all__ = ["ARCHITECTURES", "export"]

ARCHITECTURES = ("dense",)


def export(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], architecture: str = "dense", overwrite: bool = False
) -> None:
    """Write a converted model as another architecture.

    Args:
        folder: as written by ``save``.
        out: folder to write; neither ``folder`` nor one that holds it.
        architecture: "dense": the source model, bit for bit, for AutoModelForCausalLM; of a model that was fine-tuned a dense model
            of its weights.
        overwrite: replace the model in a folder that has one; its files that are no part of a model stay.

    Raises:
        ValueError: an unknown architecture, an ``out`` that exists, what was written cannot be read back, and those of ``load``.
    """
    require(architecture in ARCHITECTURES, "architecture", repr(architecture), " | ".join(map(repr, ARCHITECTURES)))
    path = check_target(out, "out", overwrite)
    require_apart(path, "out", f"{path}, which", {"folder": folder})
    config = check_folder(folder, DotMoeForCausalLM)
    files = [file for file in sorted(Path(folder).iterdir()) if file.is_file() and file.suffix != ".safetensors"]
    others = [file for file in files if file.name not in OURS]  # the tokenizer's
    replaced = replaced_files(tokenizer=bool(others))
    with write_folder(path, replaced) as new:
        dense = stream_dense(config, Path(folder).expanduser(), new)
        if dense is None:
            dense = restore_dense(load(folder))
            dense.save_pretrained(new)
        for file in others:
            if replaced(file.name) or file.name in VOCABULARIES or not (path / file.name).exists():
                shutil.copy2(file, new / file.name)
        with in_its_place(new, path):
            check_dense_folder(new, type(dense))
