"""Hugging Face: find FFNs, swap them, materialise the sparse model, save, load and export it.

The only part of the package that imports transformers, and only once one of these names is touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.block import DotMoeBlock, DotMoeExperts, DotMoeRouter, all_experts, interleave_storage, moe_blocks
    from ..export import export
    from ..models.checkpoint import load, save
    from .checks import check_lines, self_check
    from ..models.counts import count_parameters
    from ..models.config import DotMoeConfig
    from .data import load_tokens
    from .finetuning import FinetuneConfig, finetune
    from ..models.modeling import DotMoeForCausalLM, materialize, restore_dense
    from .pipeline import convert
    from ..models.registry import register_experts
    from ..models.surgery import DenseFFN, find_ffns, swap_ffn

__all__ = [
    "DenseFFN",
    "DotMoeBlock",
    "DotMoeConfig",
    "DotMoeExperts",
    "DotMoeForCausalLM",
    "DotMoeRouter",
    "FinetuneConfig",
    "all_experts",
    "check_lines",
    "convert",
    "count_parameters",
    "export",
    "find_ffns",
    "finetune",
    "interleave_storage",
    "load",
    "load_tokens",
    "materialize",
    "moe_blocks",
    "register_experts",
    "restore_dense",
    "save",
    "self_check",
    "swap_ffn",
]

_NAMES_IN = {
    "block": ("DotMoeBlock", "DotMoeExperts", "DotMoeRouter", "all_experts", "interleave_storage", "moe_blocks"),
    "checkpoint": ("export", "load", "save"),
    "checks": ("check_lines", "count_parameters", "self_check"),
    "config": ("DotMoeConfig",),
    "pipeline": ("convert",),
    "data": ("load_tokens",),
    "finetuning": ("FinetuneConfig", "finetune"),
    "modeling": ("DotMoeForCausalLM", "materialize", "restore_dense"),
    "registry": ("register_experts",),
    "surgery": ("DenseFFN", "find_ffns", "swap_ffn"),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # a submodule of the same name would otherwise take its place
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
