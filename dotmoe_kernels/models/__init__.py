"""The sparse model as a citizen of transformers, which is imported once one of these names is touched.

config.py      its structure                          surgery.py     a dense model's FFNs, found and swapped
backbone.py    the dense model, and what is refused   names.py       tensors by their names in files
block.py       router and experts of a layer          modeling.py    the causal LM around a dense backbone
folder.py      what a saved model must hold           checkpoint.py  save and load
counts.py      parameters, all and active             card.py        README.md of a saved model
shards.py      safetensors folders a tensor at a time
layerwise.py   a model that runs from its files       stock.py       the architectures of transformers, likewise
inspect.py     what `dotmoe info` shows               registry.py    the experts of stock models on this library's kernels
target.py      where it may be written
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .block import DotMoeBlock, DotMoeExperts, DotMoeRouter, all_experts, interleave_storage, moe_blocks
    from .checkpoint import load, save
    from .config import DotMoeConfig
    from .counts import count_parameters
    from .modeling import DotMoeForCausalLM, materialize, restore_dense
    from .registry import register_experts
    from .surgery import DenseFFN, find_ffns, swap_ffn

__all__ = [
    "DenseFFN",
    "DotMoeBlock",
    "DotMoeConfig",
    "DotMoeExperts",
    "DotMoeForCausalLM",
    "DotMoeRouter",
    "all_experts",
    "count_parameters",
    "find_ffns",
    "interleave_storage",
    "load",
    "materialize",
    "moe_blocks",
    "register_experts",
    "restore_dense",
    "save",
    "swap_ffn",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".block": ("DotMoeBlock", "DotMoeExperts", "DotMoeRouter", "all_experts", "interleave_storage", "moe_blocks"),
        ".checkpoint": ("load", "save"),
        ".config": ("DotMoeConfig",),
        ".counts": ("count_parameters",),
        ".modeling": ("DotMoeForCausalLM", "materialize", "restore_dense"),
        ".registry": ("register_experts",),
        ".surgery": ("DenseFFN", "find_ffns", "swap_ffn"),
    },
)
