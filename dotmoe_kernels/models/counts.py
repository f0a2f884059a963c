"""Parameters of a converted model: all, and those that a token touches."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .block import moe_blocks


def count_parameters(model: nn.Module, active: Mapping[str, float] | None = None) -> tuple[int, int]:
    """(total, active a token): all parameters, and those a token touches.

    Embeddings, attention, norms and routers count as active, of the experts K out of E (with zero experts that is the most); tied
    tensors count once. The soft router's share is nominal, its k_l (the sum of p, not a count) out of E. ``active`` gives instead
    the mean that was measured, by layer.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for name, block in moe_blocks(model).items():
        experts, E = sum(p.numel() for p in block.experts.parameters()), block.gate.num_experts
        idle += round(experts // E * (E - (block.gate.mean_active if active is None else active[name])))
    return total, total - idle
