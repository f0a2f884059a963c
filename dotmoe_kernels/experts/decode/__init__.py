"""Decode experts: a few tokens, no sort; every chosen expert's weights are read once and no others. For T up to about 16.

    y_t = sum over the chosen experts e of w_te Down_e (act(Gate_e x_t) * (Up_e x_t))

Bound by the bytes of the chosen experts' weights. Without a gradient: training takes the grouped path.
"""

from __future__ import annotations

from torch import Tensor

from ..._backend import is_direct, use_kernels
from . import cpu


def decode_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there."""
    arguments = (x, gate_up_proj, down_proj, indices, weights, activation)
    if not use_kernels(x):
        return cpu.decode_ffn(*arguments)
    if is_direct(*arguments[:5]):
        from .gpu import decode_ffn as launch

        return launch(*arguments)
    from .operators import decode_op  # defined when it is first needed: that takes milliseconds

    return decode_op(*arguments)
