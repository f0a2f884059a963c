"""The paths that look at which experts have rows as torch operators, for torch.compile where Triton's kernels do not run: a graph
holds no values.

dotmoe_kernels::expert_ffn            y [T, H] by the path of that name; "auto" picks it from the T that comes, without a gradient
dotmoe_kernels::expert_ffn_backward   gradients of the arguments, with the hidden layer computed again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require_range
from .._tiles import pick_path
from ..dispatch import sort_slots
from ..permutation import has_dense_view
from .decode import decode_ffn
from .grouped import grouped_ffn
from .masked import masked_view_ffn
from .training.cpu import Needs, backward


@torch.library.custom_op("dotmoe_kernels::expert_ffn", mutates_args=())
def expert_ffn_op(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str, path: str
) -> Tensor:
    require_range(indices, "indices", 0, gate_up_proj.shape[0])  # there were no values while the graph was made
    if path == "auto":
        (T, H), (E, width, _), view = x.shape, gate_up_proj.shape, has_dense_view(down_proj) and gate_up_proj.is_contiguous()
        path = pick_path(T, E, width // 2, indices.shape[1], H, x.dtype, x.device.type, dense_view=view).path
    run = {"decode": decode_ffn, "masked": masked_view_ffn}.get(path, grouped_ffn)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # the operator has its own derivative
        return run(x, gate_up_proj, down_proj, indices, weights, activation)


@expert_ffn_op.register_fake
def _(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str, path: str
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dotmoe_kernels::expert_ffn_backward", mutates_args=())
def expert_ffn_backward_op(
    dy: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up_proj, down_proj and weights; each empty unless needed."""
    _, source, offsets = sort_slots(indices, gate_up_proj.shape[0])
    w = torch.ones(indices.shape, device=x.device) if weights is None else weights
    with torch.no_grad():
        found = backward(dy, x, gate_up_proj, down_proj, w, source, offsets, None, activation, Needs(*needs))
    return tuple(dy.new_empty(0) if g is None else g.contiguous() for g in found)  # type: ignore[return-value]


@expert_ffn_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (x, gate_up_proj, down_proj, weights)
    made = [t.new_empty(t.shape) if n and t is not None else dy.new_empty(0) for t, n in zip(given, needs, strict=True)]
    return tuple(made)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate_up_proj, down_proj, _, weights = ctx.needs_input_grad[:5]
    needs = [bool(n) for n in (x, gate_up_proj, down_proj, weights)]
    found = expert_ffn_backward_op(dy, *ctx.saved_tensors, ctx.activation, needs)
    dx, dgate_up, ddown, dweights = (g if n else None for g, n in zip(found, needs, strict=True))
    return dx, dgate_up, ddown, None, dweights, None, None


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError("expert_ffn has no second derivative; differentiate it once, or use dotmoe_kernels.reference")


expert_ffn_op.register_autograd(_backward, setup_context=_save)
expert_ffn_backward_op.register_autograd(_refuse)
