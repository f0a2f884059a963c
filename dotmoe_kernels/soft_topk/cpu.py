"""LapSum in PyTorch: the CPU's implementation, and that of float64 everywhere.

With s the sorted r / alpha, L_i = sum_{j<=i} e^{s_j - s_i} and R_i = sum_{j>=i} e^{s_i - s_j}, the number n - k is reached between
two neighbours s_{m-1} and s_m, where b solves a quadratic in e^b. All of it stays in logarithms: e^{s_{m-1} - s_m} underflows
when k is an integer and the gap is wide. Computed in float64: the differences of scores of 1e4 would cost float32 its digits.
Cost: one sort and two scans of [..., E].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autograd import first_order


def _laplace_offset(s: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(pivot, offset) [...] with b = pivot + offset for the ascending s [..., n] and k [...].

    The pivot is the neighbour that b lies close to: measured from the other one, the gap would cost the digits."""
    n = s.shape[-1]
    log_l = torch.logcumsumexp(s, -1) - s  # ln L
    log_r = torch.logcumsumexp(-s.flip(-1), -1).flip(-1) + s  # ln R
    phi = torch.arange(n, dtype=s.dtype, device=s.device) + 0.5 + (log_r.exp() - log_l.exp()) / 2
    m = (phi < (n - k)[..., None]).sum(-1)  # first i with phi_i >= n - k

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index.clamp(0, n - 1)[..., None])[..., 0]

    upper, lower = at(s, m), at(s, m - 1)
    log_b, log_c, gap = at(log_l, m - 1), at(log_r, m), upper - lower
    d = (n - m) - k
    q = torch.sqrt(d * d + torch.exp(log_b + log_c - gap))
    tiny = torch.finfo(s.dtype).tiny
    above = torch.log((d + q).clamp(min=tiny)) - log_c  # d > 0: from the upper neighbour
    below = log_b - torch.log((q - d).clamp(min=tiny))  # d < 0: from the lower one
    middle = (gap + log_b - log_c) / 2
    offset = torch.where(d > 0, above, torch.where(d < 0, below, middle))
    offset = torch.where(m == 0, torch.log(2 * (n - k)) - log_c, offset)  # below every score
    offset = torch.where(m == n, log_b - torch.log(2 * k), offset)  # above every score
    return torch.where((m == 0) | ((d > 0) & (m < n)), upper, lower), offset


class SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        """scores [..., n], k and temperature [...], all float64."""
        s = scores / temperature[..., None]
        pivot, offset = _laplace_offset(torch.sort(s, -1).values, k)
        z = (s - pivot[..., None]) - offset[..., None]
        half = 0.5 * torch.exp(-z.abs())
        ctx.save_for_backward(scores, temperature, z)
        return torch.where(z <= 0, half, 1 - half)

    @staticmethod
    @first_order("soft_top_k")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, temperature, z = ctx.saved_tensors
        alpha = temperature[..., None]
        total = 0.5 * torch.exp(torch.logsumexp(-z.abs(), -1, keepdim=True))  # S = sum of the densities
        h = torch.softmax(-z.abs(), -1)
        dk = (h * grad).sum(-1, keepdim=True)
        dscores = (total / alpha) * h * (grad - dk)
        dtemperature = -(dscores * scores).sum(-1) / temperature
        return dscores, dk[..., 0], dtemperature
