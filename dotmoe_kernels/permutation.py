"""Permutation: assignment -> the order in which the neurons are stored; FFN weights -> expert blocks and back (eq. 6).

Expert e owns the rows [e s, (e + 1) s) of the permuted FFN. ``gate_up_proj`` [E, 2s, H] holds each expert's gate rows above its
up rows; ``down_proj`` [E, H, s] is the transpose of a contiguous [E, s, H] (see ``dense_storage``), so that
``gate_up_proj.view(2F, H)`` and the [F, H] view of ``down_proj`` are also the permuted dense FFN: one set of weights serves the
grouped, masked and dense paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import require, require_indices, require_range


def neuron_order(expert_of: Tensor) -> Tensor:
    """Neurons sorted by expert, stable: ``order[n]`` is the neuron stored at position n.

    Args:
        expert_of: [..., F] int64 or int32, the expert of each neuron.

    Returns:
        order [..., F] int64; ``torch.argsort(order)`` is its inverse.

    Raises:
        ValueError: a wrong rank or dtype.

    Source: eq. 6 of DOT-MoE (arXiv 2606.01666).
    """
    require_indices(expert_of, "expert_of", max(getattr(expert_of, "ndim", 1), 1), "[..., F]")
    return torch.sort(expert_of, dim=-1, stable=True).indices


def pack_experts(gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, order: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Dense gate, up [F, H] and down [H, F] -> new gate_up_proj [E, 2s, H] and down_proj [E, H, s] in the stored order.

    Raises:
        ValueError: F is not a multiple of ``num_experts``.
    """
    F, H = gate_proj.shape
    require(num_experts >= 1 and F % num_experts == 0, "num_experts", num_experts, f"a divisor of F = {F}")
    gate_up = torch.empty(num_experts, 2, F // num_experts, H, dtype=gate_proj.dtype, device=gate_proj.device)
    gate_up[:, 0] = gate_proj[order].view(num_experts, -1, H)
    gate_up[:, 1] = up_proj[order].view(num_experts, -1, H)
    down = down_proj.T[order].view(num_experts, F // num_experts, H)  # contiguous [E, s, H]
    return gate_up.view(num_experts, -1, H), down.transpose(1, 2)


def unpack_experts(gate_up_proj: Tensor, down_proj: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack_experts``: gate_proj, up_proj [F, H] and down_proj [H, F] in the neurons' first order.

    Raises:
        ValueError: ``order`` names a neuron that does not exist.
    """
    E, width, H = gate_up_proj.shape
    F = E * width // 2
    require_range(order, "order", 0, F - 1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(F, device=order.device)
    gate, up = gate_up_proj.view(E, 2, width // 2, H).unbind(1)
    down = down_proj.transpose(1, 2).reshape(F, H)
    return gate.reshape(F, H)[inverse], up.reshape(F, H)[inverse], down[inverse].T.contiguous()


def dense_storage(down_proj: Tensor) -> Tensor:
    """``down_proj`` [E, H, s] stored as the transpose of a contiguous [E, s, H], so that it is the permuted dense FFN as well;
    shares the memory when it already is."""
    return down_proj.transpose(1, 2).contiguous().transpose(1, 2)


def has_dense_view(down_proj: Tensor) -> bool:
    """Whether ``down_proj`` [E, H, s] is stored as [E, s, H] or as [H, E, s], the permuted dense FFN."""
    _, H, s = down_proj.shape
    if down_proj.stride() == (s * H, 1, H):  # nearly always, and known without a view
        return True
    return down_proj.transpose(1, 2).is_contiguous() or down_proj.transpose(0, 1).is_contiguous()
