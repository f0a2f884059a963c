"""Zero experts (ZEDA, arXiv 2605.18643): router rows whose choice is nothing, so that a token visits K experts at the most.

Only the router grows. The fine-tuning then learns where to choose nothing, from the model as it was before, while the balance of
the two groups of rows (``route_top_k``) holds the share of the empty slots near w N / (w N + E).
"""

from __future__ import annotations

import torch

from .._checks import require
from ..models.block import moe_blocks
from ..models.modeling import DotMoeForCausalLM


def add_zero_experts(model: DotMoeForCausalLM, count: int, *, seed: int = 0) -> None:
    """``count`` zero experts in every layer, in place; the routers' weights are new parameters.

    Raises:
        ValueError: a model that has some, or one of the soft router.
    """
    config = model.config
    given = f"{count}, of a model that has {config.num_zero_experts}"
    require(not config.num_zero_experts, "zero_experts", given, "0, or a model without zero experts")
    require(config.router == "top_k", "zero_experts", f'{count}, of a model of router "{config.router}"', '0, or router "top_k"')
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model).values():
        block.gate.add_zero_experts(count, generator)
    config.num_zero_experts, config.format_version = count, max(config.format_version, 3)
