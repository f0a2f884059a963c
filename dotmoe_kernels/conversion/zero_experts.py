"""Zero experts (ZEDA, arXiv 2605.18643): router rows whose choice is nothing, so that a token visits K experts at the most.

Only the router grows. The fine-tuning then learns where to choose nothing, from the model as it was before, while the balance of
the two groups of rows (``route_top_k``) holds the share of the empty slots near w N / (w N + E).
"""

from __future__ import annotations

import torch

from .._checks import require
from ..models.block import moe_blocks
from ..models.config import DotMoeConfig
from ..models.modeling import DotMoeForCausalLM


def note_zero_experts(config: DotMoeConfig, count: int) -> None:
    """Of a model that gets ``count`` of them in every layer.

    Raises:
        ValueError: a model that has some, or one of the soft router.
    """
    given = f"{count}, of a model that has {config.num_zero_experts}"
    require(not config.num_zero_experts, "zero_experts", given, "0, or a model without zero experts")
    require(config.router == "top_k", "zero_experts", f'{count}, of a model of router "{config.router}"', '0, or router "top_k"')
    config.num_zero_experts, config.format_version = count, max(config.format_version, 3)


def add_zero_experts(model: DotMoeForCausalLM, count: int, *, seed: int = 0) -> None:
    """``count`` zero experts in every layer, in place; the routers' weights are new parameters.

    Raises:
        ValueError: see ``note_zero_experts``.
    """
    note_zero_experts(model.config, count)
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model).values():
        block.gate.add_zero_experts(count, generator)
