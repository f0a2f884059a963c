"""Decode as a torch operator: Triton's kernels, which are imported when it is first called.

dotmoe_kernels::decode_ffn   x [T, H] -> y [T, H], without a gradient: training takes the grouped path
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("dotmoe_kernels::decode_ffn", mutates_args=())
def decode_op(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """gate_up_proj [E, 2s, H] and down_proj [E, H, s], any strides; indices [T, K]; weights [T, K], None: 1."""
    from .gpu import decode_ffn

    return decode_ffn(x, gate_up_proj, down_proj, indices, weights, activation)


@decode_op.register_fake
def _(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
