"""A conversion without training from folder to folder, layer by layer: of however large a model one layer's weights are held."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from .._checks import require
from .._files import write_folder
from ..alignment.config import AlignmentConfig
from ..alignment.transport import Transport
from ..models.backbone import meta_backbone
from ..models.block import DotMoeBlock
from ..models.card import model_card
from ..models.config import DotMoeConfig
from ..models.folder import check_folder
from ..models.modeling import DotMoeForCausalLM
from ..models.shards import ShardReader, ShardWriter, Spec, file_layout, find_dtype, save_configs, writing
from ..models.surgery import DenseFFN, find_ffns, recognise_ffn, swap_ffn
from ..models.target import check_target, in_its_place, replaced_files, require_apart
from ..models.untrusted import building, check_files
from ..partitions import CALIBRATED
from ..routing.budgets import SoftRouter
from .checks import TOLERANCES, relative_error
from .pipeline import METHODS, _build_layers, _check_model, _describe, find_start

_FILE_NAMES = {"experts.down_rows": "experts.down_proj"}


class Source:
    """The dense model: its skeleton without storage, and its files."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: PreTrainedConfig,
        dtype: torch.dtype | None,
        otherwise: str = "--data, with which it is loaded whole",
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self.reader = ShardReader(folder)
        self.model = meta_backbone(config)
        self.ffns = find_ffns(self.model)
        tied = self.model.all_tied_weights_keys
        lacking = [
            n
            for n in file_layout(self.model)
            if n not in self.reader and not any(s == n and t in self.reader for t, s in tied.items())
        ]
        allowed = f"a checkpoint whose tensors have the names that they have in the model, or {otherwise}"
        require(not lacking, "MODEL", f"{folder}, without the tensor {', '.join(lacking[:4])}", allowed)
        self.tied = {source: target for target, source in tied.items()}
        for name, tensor in file_layout(self.model).items():
            shape = self.reader.specs[self._name(name)].shape
            require(shape == tensor.shape, f"{name} of {folder}", f"of shape {list(shape)}", f"shape {list(tensor.shape)}")
        self.dtype = find_dtype(dtype, config, self.reader)

    def _name(self, name: str) -> str:
        """In the files, which have one of a tied pair."""
        return name if name in self.reader else self.tied[name]

    def read(self, name: str) -> Tensor:
        """In the dtype that the model is to have."""
        tensor = self.reader.read(self._name(name))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def ffn(self, name: str) -> DenseFFN:
        """With its weights; gate and up are told apart by trying."""
        module = self.ffns[name].module
        module.load_state_dict({part: self.read(f"{name}.{part}") for part in module.state_dict()}, assign=True)
        found = recognise_ffn(module, self.config.get_text_config(), name=name)
        assert found is not None  # it was, without storage
        return found


@torch.no_grad()
def _layer_error(ffn: DenseFFN, block: DotMoeBlock) -> float:
    """Relative error of the block with every expert on against the dense FFN, on two tokens."""
    x = torch.randn(2, ffn.gate_proj.shape[1], generator=torch.Generator().manual_seed(0)).to(ffn.gate_proj.dtype)
    block.gate.bypass = True
    error = relative_error(block(x[None])[0], ffn.module(x[None])[0])
    block.gate.bypass = False
    return error


# of a layer the assignment [F] and the router [E, H]
Learned = Callable[[str, DenseFFN], tuple[Tensor, Tensor]]


def _write_layer(
    source: Source, config: DotMoeConfig, name: str, learned: Learned, soft: SoftRouter | None, writer: ShardWriter
) -> float:
    """One layer; its error against the dense FFN."""
    ffn = source.ffn(name)
    expert_of, router = learned(name, ffn)
    block = DotMoeBlock.from_dense(ffn, expert_of, router, config.num_experts_per_tok, soft=soft)
    for part, tensor in block.state_dict().items():
        file_name = _FILE_NAMES.get(part)
        writer.write(f"{name}.{file_name or part}", tensor.transpose(1, 2) if file_name else tensor)
    error = _layer_error(ffn, block)
    ffn.module.to("meta")
    return error


def write_converted(
    origin: Source,
    config: DotMoeConfig,
    learned: Learned,
    path: Path,
    *,
    tokenizer: Any = None,
    card: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> float:
    """Writes the sparse model of the dense one in ``origin``, whose config is bound in ``config``, with the memory of one layer;
    returns the largest error of a layer.

    Raises:
        ValueError: a layer whose error is above the tolerance.
    """
    with torch.device("meta"):
        sparse = DotMoeForCausalLM(config)
    names, inside = file_layout(sparse), tuple(f"{name}." for name in origin.ffns)
    layout = {n: Spec(origin.dtype if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in names.items()}
    soft = config.soft_routers(len(origin.ffns))
    with write_folder(path, replaced_files(tokenizer=tokenizer is not None)) as new:
        with writing(new, layout, max_shard_size) as writer:
            for name in layout:
                if not name.startswith(inside):
                    writer.write(name, origin.read(name))
            worst = max([_write_layer(origin, config, name, learned, s, writer) for name, s in zip(origin.ffns, soft, strict=True)])
        save_configs(sparse, new, origin.folder, origin.dtype)
        most = TOLERANCES[origin.dtype]
        require(worst <= most, "a layer with every expert on", f"{worst:.1e} from its dense FFN", f"at most {most:.0e}")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(model_card(sparse, path.name, card or {}), encoding="utf-8")
        with in_its_place(new, path):
            check_folder(new, DotMoeForCausalLM)
    return worst


def convert_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: DotMoeConfig,
    *,
    method: str = "dot",
    alignment: AlignmentConfig | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """What ``save(convert(model, config, data=None), output)`` writes, with the memory of one layer.

    Args:
        source: a dense model's folder with safetensors files.
        output: folder to write; it appears complete or not at all.
        config: DotMoeConfig(num_experts=E, top_k=K).
        method: "dot" (as its start leaves it), "random" or "kmeans".
        alignment: ``init``, ``init_std``, ``seed`` and the like are read.
        dtype: of the weights; None takes that of the config, or of the files.
        tokenizer, overwrite, card, max_shard_size: as of ``save``.

    Returns:
        all_experts_error: the largest relative error of a layer with every expert on against its dense FFN, and ``tolerance`` for
        the dtype.

    Raises:
        ValueError: see ``convert`` and ``save``; "activation" or "shared", which need data; a checkpoint whose tensors have other
            names than in the model; a layer whose error is above the tolerance.
    """
    given = AlignmentConfig() if alignment is None else alignment
    require(method in METHODS, "method", repr(method), " | ".join(METHODS))
    for name, kind in (("method", method), ("init", given.init if method == "dot" else None)):
        require(kind not in CALIBRATED, name, kind, "one that needs no text, or data to calibrate on")
    path = check_target(output, "output", overwrite)
    require_apart(path, "output", f"{path}, which", {"source": source})
    check_files(source)
    config = copy.deepcopy(config)
    with building(source), torch.device("meta"):
        dense = AutoConfig.from_pretrained(source, trust_remote_code=False)
        origin = Source(source, dense, dtype)
        _check_model(origin.model, config, origin.ffns)
        options = find_start(given, method, origin.model, origin.ffns, None)
        config.bind(dense, dense_width=next(iter(origin.ffns.values())).gate_proj.shape[0])
        _describe(config, method, options, {}, None)
    generator = torch.Generator().manual_seed(options.seed)

    def start(name: str, ffn: DenseFFN) -> tuple[Tensor, Tensor]:
        """In the order of ``convert``, and with its draws."""
        (layer,) = _build_layers(origin.model, {name: ffn}, config, method, options, None, generator).values()
        if method == "dot":
            Transport({name: layer}, options).refresh(options.tau_end)
        swap_ffn(origin.model, name, ffn.module)
        assert layer.expert_of is not None
        return layer.expert_of, layer.router_weight.detach()

    with building(source):
        worst = write_converted(origin, config, start, path, tokenizer=tokenizer, card=card, max_shard_size=max_shard_size)
    return {"all_experts_error": worst, "tolerance": TOLERANCES[origin.dtype]}
