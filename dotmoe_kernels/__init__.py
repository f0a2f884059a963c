"""dotmoe_kernels: a dense LLM into a sparse Mixture-of-Experts by differentiable optimal transport (DOT-MoE), made fast.

The public names, in the order of the method. The Hugging Face side is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_names
from .alignment import AlignmentConfig
from .dispatch import Slots, dispatch_tokens, gather_tokens, scatter_tokens
from .experts import expert_ffn, grouped_mm, masked_ffn
from .permutation import neuron_order, pack_experts, unpack_experts
from .reference import Routing, SinkhornInfo
from .rounding import balanced_assignment, straight_through
from .routing import route_soft_top_k, route_top_k
from .soft_topk import soft_top_k
from .transport import sinkhorn

if TYPE_CHECKING:
    from .conversion import FinetuneConfig, convert, finetune
    from .exports import export
    from .models import DotMoeConfig, DotMoeForCausalLM, load, save

__version__ = "0.1.0"

__all__ = [
    "AlignmentConfig",
    "DotMoeConfig",
    "DotMoeForCausalLM",
    "FinetuneConfig",
    "Routing",
    "SinkhornInfo",
    "Slots",
    "balanced_assignment",
    "convert",
    "dispatch_tokens",
    "expert_ffn",
    "export",
    "finetune",
    "gather_tokens",
    "grouped_mm",
    "load",
    "masked_ffn",
    "neuron_order",
    "pack_experts",
    "route_soft_top_k",
    "route_top_k",
    "save",
    "scatter_tokens",
    "sinkhorn",
    "soft_top_k",
    "straight_through",
    "unpack_experts",
]


__getattr__, _ = lazy_names(
    __name__,
    {
        ".conversion": ("FinetuneConfig", "convert", "finetune"),
        ".exports": ("export",),
        ".models": ("DotMoeConfig", "DotMoeForCausalLM", "load", "save"),
    },
)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
