"""A converted model as another architecture, in a folder that needs nothing of this package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .._checks import require
from .._files import check_target, replace_folder
from ..models.checkpoint import load
from ..models.folder import OURS
from ..models.modeling import restore_dense
from .streaming import stream_dense

__all__ = ["ARCHITECTURES", "export"]

ARCHITECTURES = ("dense",)


def export(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], architecture: str = "dense", overwrite: bool = False
) -> None:
    """Write a converted model as another architecture.

    Args:
        folder: as written by ``save``.
        out: folder to write.
        architecture: "dense": the source model, bit for bit, for AutoModelForCausalLM; of a model that was fine-tuned a dense model
            of its weights.
        overwrite: replace a model folder that exists.

    Raises:
        ValueError: an unknown architecture, an ``out`` that exists, and those of ``load``.
    """
    require(architecture in ARCHITECTURES, "architecture", repr(architecture), " | ".join(map(repr, ARCHITECTURES)))
    path = check_target(out, "out", overwrite)
    with replace_folder(path) as new:
        if stream_dense(Path(folder).expanduser(), new) is None:
            restore_dense(load(folder)).save_pretrained(new)
        for file in sorted(Path(folder).iterdir()):  # the tokenizer's
            if file.is_file() and file.name not in OURS and file.suffix != ".safetensors":
                shutil.copy2(file, new / file.name)
