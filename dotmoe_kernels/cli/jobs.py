"""What `dotmoe convert` does with a model that each process has whole (``Whole``), or a part of its files (``Parts``). Once a whole
model is done the first rank works for all; with parts all make the same calls.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import require
from .inputs import reading

if TYPE_CHECKING:
    from torch import Tensor

    from ..alignment.ranks import Ranks

ALONE = ("finetune alone, of a dense MODEL", "another stage before it, or a converted MODEL")


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, args.dtype) if args.dtype else None


def _load_dense(args: argparse.Namespace, stages: list[str], device: str) -> Any:
    from ..conversion import find_ffns
    from ..conversion.sources import is_gguf, read_dense

    with reading(args.model):
        dense: Any = read_dense(args.model, _dtype(args) or "auto")
        if is_gguf(args.model):
            print(f"{args.model}: dequantised by transformers, to {str(dense.dtype).removeprefix('torch.')}")
        dense = dense.to(device)
        find_ffns(dense)  # a model that cannot be converted ends here, before the data is read
    require(stages != ["finetune"], "--stage", *ALONE)
    return dense


def _load_converted(args: argparse.Namespace, device: str) -> Any:
    from ..conversion import load

    with reading(args.model):
        return load(args.model, dtype=_dtype(args), device=device)


class Whole:
    """``sparse``: MODEL is converted."""

    def __init__(self, args: argparse.Namespace, stages: list[str], device: str, sparse: bool) -> None:
        self.device: Any = device
        self.model = _load_converted(args, device) if sparse else _load_dense(args, stages, device)

    def measured(self) -> Any:
        """The model as it is now, to compute what it gives."""
        return self.model

    def convert(self, config: Any, **options: Any) -> None:
        from ..conversion import convert

        self.model = convert(self.model, config, **options)

    def finetune(self, data: Tensor, config: Any, **options: Any) -> None:
        from ..conversion import finetune

        self.model = finetune(self.model, data, config, **options)

    def check(self, dense: Tensor | None, tokens: Tensor, folder: Path | None = None) -> dict[str, Any]:
        """``self_check``; ``dense``: the logits of the dense model."""
        from ..conversion import self_check

        return self_check(self.model, dense, tokens, folder=folder)

    def save(self, output: Path, **options: Any) -> None:
        from ..conversion import save

        save(self.model, output, **options)


class Parts:
    """Methods as of ``Whole``; between the stages the model lies in folders of ``run``."""

    def __init__(self, args: argparse.Namespace, stages: list[str], run: Path, ranks: Ranks, sparse: bool) -> None:
        from ..conversion import find_ffns
        from ..conversion.files import Files

        self.run, self.ranks, self.device = run, ranks, ranks.device
        with reading(args.model):
            self.files = Files(args.model, _dtype(args))
            if not sparse:
                find_ffns(self.files.model)
        require(sparse or stages != ["finetune"], "--stage", *ALONE)

    @property
    def model(self) -> Any:
        """Without weights."""
        return self.files.model

    def measured(self) -> Any:
        return self.files.spread(self.ranks)

    def convert(self, config: Any, **options: Any) -> None:
        from ..conversion.files import Files, convert_files

        convert_files(self.files, self.run / "aligned", config, **options)
        self.files = Files(self.run / "aligned")

    def finetune(self, data: Tensor, config: Any, **options: Any) -> None:
        from ..conversion.files import Files, finetune_files

        finetune_files(self.files, self.run / "tuned", data, config, **options)
        if config.steps:
            self.files = Files(self.run / "tuned")

    def check(self, dense: Tensor | None, tokens: Tensor, folder: Path | None = None) -> dict[str, Any]:
        from ..conversion import self_check
        from ..conversion.files import Files

        files = self.files if folder is None else Files(folder)
        return self_check(files.spread(self.ranks), dense, tokens)

    def save(self, output: Path, **options: Any) -> None:
        from ..conversion.files import publish

        self.ranks.once(lambda: publish(self.files, output, **options))
