"""The dense model out of a converted model's folder, layer by layer: nothing but the weights of one layer is held at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ..models.backbone import meta_backbone
from ..models.config import DotMoeConfig
from ..models.shards import ShardReader, Spec, file_layout, save_configs, writing
from ..models.surgery import assign_ffn, find_ffns
from ..permutation import unpack_experts


def stream_dense(config: DotMoeConfig, folder: Path, new: Path, max_shard_size: str | int = "5GB") -> Any:
    """Write config and weights of the dense model into ``new``, bit for bit those of the files.

    Args:
        config: of the converted model in ``folder``, which has been checked.

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
    save_configs(dense, new, folder, next(kind for kind in kinds.values() if kind.is_floating_point))
    layout = {name: Spec(kinds[name], tuple(tensor.shape)) for name, tensor in names.items()}
    with writing(new, layout, max_shard_size) as writer, torch.no_grad():
        for name in layout.keys() - owner.keys():
            writer.write(name, reader.read(source[name]))
        for name, ffn in ffns.items():
            parts = (reader.read(f"{name}.{part}") for part in ("experts.gate_up_proj", "experts.down_proj", "neuron_order"))
            assign_ffn(ffn, unpack_experts(*parts), text, name)
            for part, tensor in ffn.module.state_dict().items():
                writer.write(f"{name}.{part}", tensor)
            ffn.module.to("meta")
    return dense
