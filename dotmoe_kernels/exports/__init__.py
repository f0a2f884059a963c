"""A converted model as another architecture, in a folder that needs nothing of this package.

stock.py        the architectures of transformers, and a model as one of them
calibration.py  eps of the routers            report.py     the figures, the check, the card
streaming.py    from folder to folder, a layer at a time
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import refuse, require, require_indices
from .._files import write_folder
from ..models.checkpoint import load
from ..models.config import DotMoeConfig
from ..models.folder import OURS, check_dense_folder, check_folder
from ..models.layerwise import converted_layers
from ..models.modeling import DotMoeForCausalLM, restore_dense
from ..models.stock import stock_layers
from ..models.target import VOCABULARIES, check_target, in_its_place, replaced_files, require_apart
from ..models.untrusted import building, require_inside
from .calibration import choose_shifts, own_samples
from .report import logit_figures, parity, report_lines, require_parity, router_figures, stock_card
from .stock import ARCHITECTURES as STOCK
from .stock import Architecture, refusal, target_blocks
from .streaming import stream_dense, stream_stock

__all__ = ["ARCHITECTURES", "export", "report_lines"]

_TOKENIZERS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # suffixes of what a stock model takes along
ARCHITECTURES = ("dense", "auto", *(architecture.name for architecture in STOCK))


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    architecture: str = "dense",
    overwrite: bool = False,
    *,
    top_k: int | None = None,
    data: Tensor | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write a converted model as another architecture, which transformers loads without this package.

    The weights go from folder to folder layer by layer, and so do those of the forward passes that a stock architecture is measured
    in: of however large a model a layer is held, and twice that where layers are checked in float32. A pass reads the whole
    model: about 5 for every 1,024 tokens of ``data``, and 127 more for samples of the model's own.

    Args:
        folder: as written by ``save``.
        out: folder to write; neither ``folder`` nor one that holds it.
        architecture: "dense": the source model, bit for bit, for AutoModelForCausalLM; of a model that was fine-tuned a dense model
            of its weights. "mixtral", "qwen2_moe", "qwen3_moe", "granite_moe", "glm4_moe": a stock sparse model, whose router comes
            close to weights of 1; "auto": the one of those that fits the backbone best.
        overwrite: replace the model in a folder that has one; its files that are no part of a model stay.
        top_k: K experts a token instead of the saved number; not for "dense".
        data: tokens [N, S] int64 that eps is chosen and the errors are measured on; None: samples of the model's own.
        max_shard_size: of one safetensors file.
        dtype: of the weights; None keeps that of the files.
        device: where the layers run that are measured.

    Returns:
        Of a stock architecture the figures that its README.md has: architecture, reason, eps (m by layer), fold, gate_error,
        swapped, logit_error, kl, perplexity, ...; of "dense" the architecture alone.

    Raises:
        ValueError: an unknown architecture, one that cannot be right for the model (by name and reason), an ``out`` that exists,
            tokens of a wrong shape, logits that differ by more than the routers explain, what was written cannot be read back, and
            those of ``load``.
    """
    require(architecture in ARCHITECTURES, "architecture", repr(architecture), " | ".join(map(repr, ARCHITECTURES)))
    require(top_k is None or architecture != "dense", "top_k", top_k, 'None with architecture "dense"')
    path = check_target(out, "out", overwrite)
    require_apart(path, "out", f"{path}, which", {"folder": folder})
    if architecture != "dense":
        with building(folder):  # a config may be fit for being built, and not for being run
            source = Path(folder).expanduser()
            return _export_stock(source, path, architecture, top_k, data, max_shard_size, dtype, device)
    config = check_folder(folder, DotMoeForCausalLM)
    others = _other_files(Path(folder))
    replaced = replaced_files(tokenizer=bool(others))
    with building(folder), write_folder(path, replaced) as new:
        dense = stream_dense(config, Path(folder).expanduser(), new, max_shard_size, dtype)
        if dense is None:
            dense = restore_dense(load(folder, dtype=dtype))
            dense.save_pretrained(new, max_shard_size=max_shard_size)
        _copy_others(others, new, path)
        with in_its_place(new, path):
            check_dense_folder(new, type(dense))
    return {"architecture": "dense"}


def _other_files(folder: Path) -> list[Path]:
    """The tokenizer's, and whatever else lies beside the model's own."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".safetensors"]
    others = [file for file in files if file.name not in OURS]
    for file in others:
        require_inside(file, folder)
    return others


def _copy_others(others: list[Path], new: Path, path: Path) -> None:
    """Into the new folder, but for what would replace a file of the user's in ``path``."""
    replaced = replaced_files(tokenizer=True)
    for file in others:
        if replaced(file.name) or file.name in VOCABULARIES or not (path / file.name).exists():
            shutil.copy2(file, new / file.name)


def pick(model: DotMoeForCausalLM, name: str) -> tuple[Architecture, str]:
    """The architecture of that name, or for "auto" the best, and why.

    Raises:
        ValueError: it cannot be right for the model; it says what stands in the way.
    """
    if name != "auto":
        chosen = next(architecture for architecture in STOCK if architecture.name == name)
        if found := refusal(model, chosen):
            refuse("architecture", f"{name!r} of a model {found[0]}", found[1])
        return chosen, "asked for"
    refused = {architecture.name: refusal(model, architecture) for architecture in STOCK}
    fits = [architecture for architecture in STOCK if not refused[architecture.name]]
    if not fits:
        reasons = "; ".join(f"{name}: {found[0]}" for name, found in refused.items() if found)
        refuse("architecture", f"'auto' of a model that none takes ({reasons})", "'dense'")
    kind = model.config.dense_config.model_type
    best = fits[0]
    factor = best.factor(model)
    exact = next((a for a in fits if not a.factor(model) & (a.factor(model) - 1)), best)  # a power of two rounds nothing
    if model.dtype != torch.float32 and factor & (factor - 1) and exact is not best:
        name = str(model.dtype).removeprefix("torch.")
        return exact, f"backbone {kind}: {exact.why}; {best.name} would round {name} weights times {factor}"
    return best, f"backbone {kind}: {best.why}"


def _tokens(data: Tensor, vocabulary: int) -> Tensor:
    require_indices(data, "data", 2, "[N, S]")
    require(data.shape[0] >= 1 and data.shape[1] >= 2, "data", f"of shape {list(data.shape)}", "at least one pair of tokens")
    most = int(data.max())
    fits = int(data.min()) >= 0 and most < vocabulary
    require(fits, "data", f"with ids up to {most}", f"ids below the vocabulary, {vocabulary}")
    return data


def _export_stock(
    folder: Path,
    out: Path,
    name: str,
    top_k: int | None,
    data: Tensor | None,
    max_shard_size: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, Any]:
    config = check_folder(folder, DotMoeForCausalLM)
    if top_k is not None:
        config = DotMoeConfig.from_pretrained(folder, top_k=top_k)
    exact = converted_layers(folder, config, dtype=dtype, device=device)
    model = exact.model
    architecture, reason = pick(model, name)
    others = [file for file in _other_files(folder) if file.suffix in _TOKENIZERS]
    given = None if data is None else _tokens(data, config.get_text_config().vocab_size)
    tokens = (own_samples(model, device) if given is None else given).to(device)
    shifts = choose_shifts(model, tokens, architecture.scores)
    with write_folder(out, replaced_files(tokenizer=bool(others))) as new:
        target, lossless = stream_stock(exact, architecture, shifts, folder, new, max_shard_size)
        with in_its_place(new, out):
            check_dense_folder(new, type(target))
        gates = [f"{path}.{architecture.gate}" for path in target_blocks(model, architecture).values()]
        stock = stock_layers(new, exact.layers, keep=gates, device=device).model  # what a user will have
        report = {
            "architecture": architecture.name,
            "reason": reason,
            "backbone": config.dense_config.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_experts": config.num_experts,
            "top_k": config.num_experts_per_tok,
            "fold": {"factor": architecture.factor(model), "lossless": lossless},
            "eps": shifts,
            "calibration": {"tokens": tokens.numel(), "source": "the model's own samples" if data is None else "the data given"},
            **router_figures(model, stock, architecture, tokens),
            **logit_figures(model, stock, tokens),
        }
        kind = model.dtype
        if kind != torch.float32:  # parity is checked where rounding hides nothing
            wide: dict[str, Any] = {"dtype": torch.float32, "read_as": kind, "device": device}
            model = converted_layers(folder, config, **wide).model
            stock = stock_layers(new, exact.layers, keep=gates, **wide).model
        report["parity"] = parity(model, stock, architecture, tokens, kind)
        require_parity(report["parity"], architecture)
        _copy_others(others, new, out)
        (new / "README.md").write_text(stock_card(out.name, report), encoding="utf-8")
    return report
