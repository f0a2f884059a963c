"""The routed FFN: y_t = sum_j w_tj Down_e (act(Gate_e x_t) * (Up_e x_t)), e = indices[t, j]. This page picks how it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, autocast, is_autocast_enabled
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from .._autograd import wants_gradient
from .._backend import is_plain, use_kernels
from .._checks import (
    Passed,
    is_integer,
    refuse,
    require,
    require_float,
    require_indices,
    require_range,
    require_same,
    require_shape,
)
from .._tiles import pick_path
from ..permutation import has_dense_view
from .activations import find_activation
from .decode import decode_ffn
from .grouped import grouped_ffn, grouped_mm
from .masked import masked_ffn, masked_view_ffn
from .operators import expert_ffn_op
from .training import training_ffn

__all__ = ["expert_ffn", "grouped_mm", "masked_ffn"]

_PATHS: dict[str, Callable[..., Tensor]] = {"grouped": grouped_ffn, "decode": decode_ffn, "masked": masked_view_ffn}
_passed = Passed()


def check_path(path: object) -> None:
    """A name that ``expert_ffn`` takes."""
    require(path in ("auto", *_PATHS), "path", repr(path), "auto | " + " | ".join(_PATHS))


def _check(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    path: str,
    workspace: int | None,
) -> None:
    """The arguments of ``expert_ffn`` fit each other."""
    require_float(x, "x", 2, "[T, H]")
    require_float(gate_up_proj, "gate_up_proj", 3, "[E, 2s, H]")
    require_float(down_proj, "down_proj", 3, "[E, H, s]")
    T, H = x.shape
    E, width = gate_up_proj.shape[:2]
    require(width % 2 == 0, "gate_up_proj", f"of shape {list(gate_up_proj.shape)}", "[E, 2s, H], an even second size")
    require_shape(gate_up_proj, "gate_up_proj", (E, width, H), "[E, 2s, H]")
    require_shape(down_proj, "down_proj", (E, H, width // 2), "[E, H, s]")
    require_indices(indices, "indices", 2, "[T, K]")
    if indices.shape[0] != T:  # its words are written only then: in a graph they would make T a constant
        refuse("indices", f"of shape {list(indices.shape)}", f"[T, K] with T = {T}")
    require(
        is_compiling() or indices.numel() < 2**31,
        "indices",
        f"of shape {list(indices.shape)}",
        "fewer than 2^31 entries: offsets are int32",
    )
    for name, tensor, dtype in (
        ("gate_up_proj", gate_up_proj, True),
        ("down_proj", down_proj, True),
        ("indices", indices, False),
    ):
        require_same(tensor, name, x, "x", dtype=dtype)
    require_range(indices, "indices", 0, E)
    if weights is not None:
        require_float(weights, "weights", 2, "[T, K]")
        require_shape(weights, "weights", tuple(indices.shape), "[T, K]")
        require_same(weights, "weights", x, "x", dtype=False)
    find_activation(activation)
    check_path(path)
    fits = workspace is None or (is_integer(workspace) and workspace >= 1)
    require(fits, "workspace", repr(workspace), "None, or bytes as an integer of at least 1")


def expert_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    *,
    activation: str = "silu",
    path: str = "auto",
    recompute: bool = False,
    workspace: int | None = None,
) -> Tensor:
    """Routed FFN: y_t = sum_j weights_tj Down_e (act(Gate_e x_t) * (Up_e x_t)) with e = indices[t, j].

    Args:
        x: [T, H] floating point.
        gate_up_proj: [E, 2s, H], each expert's gate rows above its up rows, in the dtype of ``x``.
        down_proj: [E, H, s], any strides. As the transpose of a contiguous [E, s, H] it is the dense FFN as well, which
            ``path="masked"`` uses without a copy.
        indices: [T, K] int64 or int32 in [0, E], T K < 2^31; E marks an empty slot. An expert that a token names twice counts
            twice.
        weights: [T, K] floating point. None: 1.
        activation: an ACT2FN name.
        path: "grouped" sorts the tokens by expert (prefill, training), "decode" reads only the chosen experts (1-16 tokens; where
            a gradient is needed it is "grouped"), "masked" runs the dense product and masks it (in between), "auto" picks by
            shape. All on the same tensors.
        recompute: where a gradient is needed, keep only x and the routing for the backward pass, which computes the hidden layer
            again, instead of gate and up (the grouped path: [T K, 2s]; the masked path: [T, 2F] and more).
        workspace: bytes, at least 1, that the grouped path's kernels may take for the rows [T K, H] which they sum to y and, in the
            backward pass, to dx: as many columns at a time as fit, but at least 128. No bit depends on it. None: 1 GB.

    Returns:
        y [T, H] in the dtype of ``x``, combined in float32.

    Raises:
        ValueError: a wrong rank, shape, dtype or device, too many slots, an unknown activation or path, a workspace
            that is no positive integer; on CPU indices outside [0, E].

    Gradient: to x, both weights and the routing weights. A second derivative is refused.

    Source: eq. 6 of DOT-MoE (arXiv 2606.01666); names and shapes as in Hugging Face transformers v5.
    """
    plain = is_plain(x, gate_up_proj, down_proj, indices, weights)
    signature = plain and (
        *(x.shape, x.dtype, x.device),
        *(gate_up_proj.shape, gate_up_proj.dtype, gate_up_proj.device),
        *(down_proj.shape, down_proj.dtype, down_proj.device),
        *(indices.shape, indices.dtype, indices.device),
        *((None,) if weights is None else (weights.shape, weights.dtype, weights.device)),
        *(activation, path, workspace, type(workspace)),
    )
    if signature and signature in _passed:
        require_range(indices, "indices", 0, gate_up_proj.shape[0])
    else:
        _check(x, gate_up_proj, down_proj, indices, weights, activation, path, workspace)
        if signature:
            _passed.add(signature)
    workspace = None if workspace is None else int(workspace)
    options: dict[str, Any] = {"recompute": recompute, "workspace": workspace, "plain": plain}
    return routed_ffn(x, gate_up_proj, down_proj, indices, weights, activation, path, **options)


def routed_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    path: str,
    *,
    recompute: bool = False,
    workspace: int | None = None,
    plain: bool | None = None,
) -> Tensor:
    """``expert_ffn`` whose arguments are known to fit: a model's block, whose weights and router's choice do. ``plain``: whether
    they ``is_plain``; None: not looked at."""
    T, H = x.shape
    E, width = gate_up_proj.shape[:2]
    needs_grad = wants_gradient(x, gate_up_proj, down_proj, weights)
    if path == "auto" and not (is_compiling() and not needs_grad):  # T may be open in a graph: there the operator picks
        K, view = indices.shape[1], has_dense_view(down_proj) and gate_up_proj.is_contiguous()
        path = pick_path(T, E, width // 2, K, H, x.dtype, x.device.type, dense_view=view, needs_grad=needs_grad).path
    if (path == "decode" and needs_grad) or gate_up_proj.numel() == 0:
        path = "grouped"
    arguments = (x, gate_up_proj, down_proj, indices, weights, activation)
    with autocast(x.device.type, enabled=False) if is_autocast_enabled(x.device.type) else nullcontext():
        if path == "auto" or (is_compiling() and path != "masked" and not use_kernels(x)):
            return expert_ffn_op(*arguments, path)
        if path == "grouped":
            return training_ffn(*arguments, recompute, workspace) if needs_grad else grouped_ffn(*arguments, workspace)
        if path == "decode" and plain and use_kernels(x):
            from .decode.gpu import decode_ffn as launch

            return launch(*arguments)
        if recompute and needs_grad:
            return checkpoint(_PATHS[path], *arguments, use_reentrant=False, preserve_rng_state=False)
        return _PATHS[path](*arguments)
