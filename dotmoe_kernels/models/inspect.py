"""What `dotmoe info` shows of a folder, from its config alone: nothing is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .._checks import require
from .._tiles import pick_path
from .card import router_facts
from .config import DotMoeConfig
from .counts import count_parameters
from .folder import check_folder
from .modeling import DotMoeForCausalLM, meta_backbone
from .surgery import find_ffns
from .untrusted import building, check_files

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_SIZES = (32, 64, 96, 112, 128, 192, 256, 512, 1024)


def model_type(folder: str | os.PathLike[str]) -> str | None:
    """What the config of a model's folder calls its kind; None without a config that says it."""
    path = Path(os.path.expanduser(folder)) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever reads it says what is amiss
        return None
    found = values.get("model_type") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def is_converted(folder: str | os.PathLike[str]) -> bool:
    """Whether it is the folder of a converted model."""
    return model_type(folder) == DotMoeConfig.model_type


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Structure and parameters of a converted model, or the topologies at 25 % of the FFN that fit a dense one.

    Args:
        folder: a converted model, or a dense one that transformers reads.

    Raises:
        ValueError: no such model, an FFN that is not recognised, a checkpoint of a newer format or with parts missing.
    """
    if os.path.isdir(folder):
        check_files(folder)
    if is_converted(folder):
        config = check_folder(folder, DotMoeForCausalLM)
        with torch.device("meta"):
            model = DotMoeForCausalLM(config)
        total, active = count_parameters(model)
        return {
            "model": str(folder),
            "kind": "dotmoe",
            "backbone": config.dense_config.model_type,
            "layers": config.num_hidden_layers,
            "num_experts": config.num_experts,
            "top_k": config.num_experts_per_tok,
            "expert_size": config.moe_intermediate_size,
            "router": config.router,
            **({"num_zero_experts": config.num_zero_experts} if config.num_zero_experts else {}),
            "router_facts": router_facts(config),
            "total_parameters": total,
            "active_parameters": active,
            "active_share": round(active / total, 4),
            "assignment": config.assignment or {},
            "fine_tuned": len(config.finetune_runs),
            "format_version": config.format_version,
        }
    with building(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        dense = meta_backbone(config)
    ffns = find_ffns(dense)
    first = next(iter(ffns.values()))
    (F, H), total = first.gate_proj.shape, sum(p.numel() for p in dense.parameters())
    rows = []
    for size in _SIZES:
        if F % size or F // size < 4:
            continue
        sparse = DotMoeConfig.for_dense(config.get_text_config(), expert_size=size, active_fraction=0.25)
        E, K = sparse.num_experts, sparse.num_experts_per_tok
        active = total + len(ffns) * (E * H - 3 * F * H * (E - K) // E)
        rows.append({"expert_size": size, "num_experts": E, "top_k": K, "active_parameters": active})
    return {
        "model": str(folder),
        "kind": "dense",
        "backbone": config.model_type,
        "ffns": len(ffns),
        "hidden_size": H,
        "ffn_width": F,
        "activation": first.activation,
        "total_parameters": total,
        "topologies at 25 % of the FFN": rows,
    }


def describe_paths(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What ``expert_ffn(path="auto")`` picks for a converted model at every number of tokens, and why; nothing is loaded.

    Args:
        folder: a converted model.
        dtype: of the weights; None takes that of the config.

    Raises:
        ValueError: not a converted model.
    """
    require(is_converted(folder), "MODEL", folder, "a converted model")
    config = check_folder(folder, DotMoeForCausalLM)
    E, s, K = config.num_experts, config.moe_intermediate_size or 0, config.num_experts_per_tok
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    rows = []
    for device in ("cpu", "gpu"):
        for T in _TOKENS:
            path, why = pick_path(T, E, s, K, config.hidden_size, kind, device, dense_view=True)
            rows.append({"device": device, "tokens": T, "path": path, "why": why})
    return {"model": str(folder), "dtype": str(kind).removeprefix("torch."), "paths": rows}
