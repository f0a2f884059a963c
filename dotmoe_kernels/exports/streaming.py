"""Another model out of a converted model's folder, layer by layer: nothing but the weights of one layer is held at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.backbone import meta_backbone
from ..models.config import DotMoeConfig
from ..models.layerwise import Layerwise
from ..models.shards import ShardReader, Spec, file_layout, in_files, save_configs, writing
from ..models.surgery import assign_ffn, find_ffns
from ..permutation import unpack_experts
from .stock import Architecture, stock_skeleton, stock_tensors


def stream_dense(
    config: DotMoeConfig, folder: Path, new: Path, max_shard_size: str | int = "5GB", dtype: torch.dtype | None = None
) -> Any:
    """Write config and weights of the dense model into ``new``, bit for bit those of the files.

    Args:
        config: of the converted model in ``folder``, which has been checked.
        dtype: of the weights, where it is not to be that of the files.

    Returns:
        the dense model without storage; None, and nothing is written, where transformers keeps its tensors in files by other names
        than in memory.
    """
    dense, reader = meta_backbone(copy.deepcopy(config.dense_config)), ShardReader(folder)
    ffns, text = find_ffns(dense), dense.config.get_text_config()
    names, tied = file_layout(dense), dense.all_tied_weights_keys
    if names.keys() != dense.state_dict().keys() - tied.keys():
        return None
    owner = {f"{name}.{part}": name for name, ffn in ffns.items() for part in ffn.module.state_dict()}
    source = {name: name if name in reader else next((t for t, s in tied.items() if s == name), name) for name in names}
    experts = [f"{name}.experts.{part}" for name in ffns for part in ("gate_up_proj", "down_proj")]
    if any(name not in reader for name in (*experts, *(source[n] for n in names if n not in owner))):
        return None
    kinds = {n: reader.specs[f"{owner[n]}.experts.gate_up_proj" if n in owner else source[n]].dtype for n in names}
    if dtype is not None:
        kinds = {name: dtype if kind.is_floating_point else kind for name, kind in kinds.items()}
    layout = {name: Spec(kinds[name], tuple(tensor.shape)) for name, tensor in names.items()}
    with writing(new, layout, max_shard_size) as writer, torch.no_grad():
        for name in layout.keys() - owner.keys():
            writer.write(name, reader.read(source[name]).to(kinds[name]))
        for name, ffn in ffns.items():
            parts = (reader.read(f"{name}.{part}") for part in ("experts.gate_up_proj", "experts.down_proj", "neuron_order"))
            assign_ffn(ffn, unpack_experts(*parts), text, name)
            for part, tensor in ffn.module.state_dict().items():
                writer.write(f"{name}.{part}", tensor.to(kinds[f"{name}.{part}"]))
            ffn.module.to("meta")
    save_configs(dense, new, folder, next(kind for kind in kinds.values() if kind.is_floating_point))
    return dense


def stream_stock(
    exact: Layerwise, architecture: Architecture, shifts: Mapping[str, int], folder: Path, new: Path, max_shard_size: str | int
) -> tuple[Any, bool]:
    """Write config and weights of the model as one of ``architecture`` into ``new``.

    Args:
        exact: the converted model in ``folder``, for which ``refusal`` is None.
        shifts: m of every layer, by path.

    Returns:
        the stock model without storage, and whether the fold rounded nothing.
    """
    model, lossless = exact.model, True
    target = stock_skeleton(model, architecture)
    tied = target.all_tied_weights_keys
    planned, _ = stock_tensors(model, architecture, shifts, target)
    layout = in_files(target, {name: tensor.to("meta") for name, tensor in planned.items() if name not in tied})
    with writing(new, {name: Spec.of(tensor) for name, tensor in layout.items()}, max_shard_size) as writer:
        for unit in exact.units:
            with exact.loaded(unit):
                found, whole = stock_tensors(model, architecture, shifts, target, unit)
                lossless = lossless and whole
                rest: dict[str, Tensor] = {name: tensor for name, tensor in found.items() if name not in tied}
                del found
                for name, tensor in in_files(target, rest).items():
                    writer.write(name, tensor)
                del rest
    save_configs(target, new, folder, model.dtype)
    return target, lossless
