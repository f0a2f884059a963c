"""The only place that knows hardware: which path and which tile shapes fit a size and a device."""

from __future__ import annotations

import torch
from torch import Tensor


def pick_path(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, *, needs_grad: bool = False) -> str:
    """The path of ``expert_ffn`` for these tensors: "grouped", "decode" or "masked"."""
    T, K = indices.shape
    E = gate_up_proj.shape[0]
    if needs_grad:
        return "grouped"
    # 16-bit products on a CPU reach their speed only at many rows: the dense view is the faster one while an expert has few
    has_dense_view = down_proj.transpose(1, 2).is_contiguous()
    if x.dtype in (torch.bfloat16, torch.float16) and has_dense_view and T >= 3 and T * K < 16 * E:
        return "masked"
    return "decode" if T <= 2 else "grouped"
