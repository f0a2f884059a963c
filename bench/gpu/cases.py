"""Every public op against plain PyTorch at one small and one real 16-bit shape, values and gradients: the smoke of a first call.

An item is "op/size"; of ``expert_ffn`` every path is an op. The reference is ``dotmoe_kernels.reference`` in float32 on the same
device. ``BENCHED`` are the sizes of the headline benches, whose kernels are compiled beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import dotmoe_kernels as dk
from bench import shapes
from bench.gpu.experts import draw, draw_indices
from bench.shapes import Shape
from dotmoe_kernels import reference
from dotmoe_kernels.permutation import dense_storage
from tests.shapes import balanced_expert_of

SMALL = Shape("small", 48, 6, 16, 2)
SOFT: dict[str, Any] = {"temperature": 0.5, "threshold": 0.1}
_SWEEPS = 10_000  # of the rounding; drawn scores take tens
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Size(NamedTuple):
    shape: Shape
    T: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.shape.name} T {self.T}"


class Call(NamedTuple):
    """Both give tensors in the same order: outputs, then the gradients to ``leaves``."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    leaves: tuple[Tensor, ...] = ()
    gradients: bool = True


def _made(size: Size, device: str) -> Callable[..., Tensor]:
    return partial(draw, device=device, dtype=size.dtype)


def _sinkhorn(size: Size, device: str, backward: str = "unroll") -> Call:
    options: dict[str, Any] = {"tau": 1.0, "num_iters": 20}  # enough for the fixed point, where both gradients meet
    leaves = (_made(size, device)(2, size.shape.F, size.shape.E, seed=0),)
    return Call(partial(dk.sinkhorn, backward=backward, **options), lambda a: reference.sinkhorn(a, **options)[0], leaves)


def _route(size: Size, device: str) -> Call:
    options: dict[str, Any] = {"top_k": size.shape.K, "weights": "softmax"}
    leaves = (_made(size, device)(size.T, size.shape.E, seed=0),)
    return Call(partial(dk.route_top_k, **options), partial(reference.route_top_k, **options), leaves)


def _soft(size: Size, device: str) -> Call:
    leaves, k = (_made(size, device)(size.T, size.shape.E, seed=0),), float(size.shape.K)
    return Call(lambda z: dk.soft_top_k(z, k, temperature=0.5), lambda z: reference.soft_top_k(z, k, temperature=0.5), leaves)


def _route_soft(size: Size, device: str) -> Call:
    """Probabilities and z loss: at the threshold a rounding decides whether a slot is used."""

    def only(route: Callable[..., Any], z: Tensor) -> tuple[Tensor, Tensor]:
        routing = route(z, float(size.shape.K), max_active=size.shape.K, **SOFT)
        return routing.probs, routing.z_loss

    leaves = (_made(size, device)(size.T, size.shape.E, seed=0),)
    return Call(partial(only, dk.route_soft_top_k), partial(only, reference.route_soft_top_k), leaves)


def _dispatch(size: Size, device: str) -> Call:
    indices = draw_indices(size.T, size.shape, device)
    return Call(lambda: dk.dispatch_tokens(indices, size.shape.E), lambda: reference.dispatch_tokens(indices, size.shape.E))


def _slots(size: Size, device: str) -> Any:
    return dk.dispatch_tokens(draw_indices(size.T, size.shape, device), size.shape.E)


def _scatter(size: Size, device: str) -> Call:
    slots, leaves = _slots(size, device), (_made(size, device)(size.T, size.shape.H, seed=1),)
    return Call(lambda x: dk.scatter_tokens(x, slots), lambda x: reference.scatter_tokens(x, slots), leaves)


def _gather(size: Size, device: str) -> Call:
    slots, K, made = _slots(size, device), size.shape.K, _made(size, device)
    leaves = made(size.T * K, size.shape.H, seed=1), draw(size.T, K, seed=2, device=device, dtype=torch.float32)
    return Call(lambda ys, w: dk.gather_tokens(ys, slots, w), lambda ys, w: reference.gather_tokens(ys, slots, w), leaves)


def _grouped_mm(size: Size, device: str) -> Call:
    c, offsets, made = size.shape, _slots(size, device).offsets, _made(size, device)
    leaves = made(size.T * c.K, c.H, seed=1), made(c.E, c.H, c.s, seed=2, scale=c.H**-0.5)
    return Call(lambda a, b: dk.grouped_mm(a, b, offsets), lambda a, b: reference.grouped_mm(a, b, offsets), leaves)


def _experts(size: Size, device: str, path: str = "auto", gradients: bool = False) -> Call:
    c, made, indices = size.shape, _made(size, device), draw_indices(size.T, size.shape, device)
    down = dense_storage(made(c.E, c.s, c.H, seed=1, scale=c.s**-0.5).transpose(1, 2))
    gate_up = made(c.E, 2 * c.s, c.H, seed=0, scale=c.H**-0.5)
    weights = draw(size.T, c.K, seed=2, device=device, dtype=torch.float32).sigmoid()
    leaves = made(size.T, c.H, seed=3), gate_up, down, weights
    return Call(
        lambda x, g, d, w: dk.expert_ffn(x, g, d, indices, w, path=path),
        lambda x, g, d, w: reference.expert_ffn(x, g, d, indices, w, activation=functional.silu),
        leaves,
        gradients,
    )


def _masked(size: Size, device: str) -> Call:
    c, made = size.shape, _made(size, device)
    gate, up = (made(c.F, c.H, seed=seed, scale=c.H**-0.5) for seed in (0, 1))
    fixed, indices = (gate, up, made(c.H, c.F, seed=2, scale=c.F**-0.5)), draw_indices(size.T, c, device)
    expert_of = balanced_expert_of(c.F, c.E, seed=6).to(device)
    plan, probs = (draw(n, c.E, seed=seed, device=device, dtype=torch.float32).softmax(-1) for n, seed in ((c.F, 7), (size.T, 8)))

    def masked(function: Callable[..., Tensor], x: Tensor, plan: Tensor, probs: Tensor, **options: Any) -> Tensor:
        return function(x, *(w.to(x.dtype) for w in fixed), expert_of, indices, plan=plan, probs=probs, **options)

    ours = partial(masked, dk.masked_ffn, balanced=True)
    return Call(ours, partial(masked, reference.masked_ffn, activation=functional.silu), (made(size.T, c.H, seed=3), plan, probs))


def _permutation(size: Size, device: str, which: str) -> Call:
    c, made = size.shape, _made(size, device)
    expert_of = balanced_expert_of(c.F, c.E, seed=6).to(device)
    order = reference.neuron_order(expert_of)
    dense = made(c.F, c.H, seed=0), made(c.F, c.H, seed=1), made(c.H, c.F, seed=2)
    if which == "neuron_order":
        return Call(lambda: dk.neuron_order(expert_of), lambda: order)
    blocks = partial(reference.expert_blocks, order=order, num_experts=c.E)
    if which == "pack_experts":
        return Call(lambda gate, up, down: dk.pack_experts(gate, up, down, order, c.E), lambda *w: blocks(*w), dense)
    return Call(lambda *w: dk.unpack_experts(*blocks(*w), order), lambda *w: w, dense)


def _straight_through(size: Size, device: str) -> Call:
    c, made = size.shape, _made(size, device)
    hard = functional.one_hot(balanced_expert_of(c.F, c.E, seed=6).to(device), c.E)
    return Call(partial(dk.straight_through, hard), lambda soft: hard + (soft - soft.detach()), (made(c.F, c.E, seed=0),))


def _rounding(size: Size, device: str) -> Call:
    """The CPU's answer is the greedy one. On a GPU the kernel runs under a cap first: one that does not end is then an error."""
    F, E = size.shape.F, size.shape.E
    scores = _made(size, device)(1, F, E, seed=0)

    def ours() -> Tensor:
        if scores.is_cuda:
            from dotmoe_kernels.rounding.gpu import deferred_acceptance

            capacity = torch.tensor([[F // E + (e < F % E) for e in range(E)]], device=device)
            waiting = float((deferred_acceptance(scores, capacity, most=_SWEEPS) < 0).float().sum())
            if waiting:
                raise RuntimeError(f"balanced_assignment: {waiting:.0f} rows have no place after {_SWEEPS} sweeps")
        return dk.balanced_assignment(scores)

    return Call(ours, lambda: dk.balanced_assignment(scores.cpu()).to(device))


@dataclass(frozen=True)
class Op:
    build: Callable[..., Call]
    real: Size
    small: Size = field(default_factory=lambda: Size(SMALL, 13, torch.float32))


_TOKENS = Size(shapes.L3, 256)
ROUNDING = "balanced_assignment"
OPS: dict[str, Op] = {
    "sinkhorn": Op(_sinkhorn, Size(shapes.Q25, 0)),
    "sinkhorn implicit": Op(partial(_sinkhorn, backward="implicit"), Size(shapes.Q25, 0)),
    "straight_through": Op(_straight_through, Size(shapes.Q25, 0)),
    **{
        name: Op(partial(_permutation, which=name), Size(shapes.L3, 0))
        for name in ("neuron_order", "pack_experts", "unpack_experts")
    },
    "route_top_k": Op(_route, Size(shapes.Q25, 2048)),
    "route_soft_top_k": Op(_route_soft, Size(shapes.L3, 2048)),
    "soft_top_k": Op(_soft, Size(shapes.L3, 2048)),
    "dispatch_tokens": Op(_dispatch, Size(shapes.Q25, 2048)),
    "scatter_tokens": Op(_scatter, _TOKENS),
    "gather_tokens": Op(_gather, _TOKENS),
    "grouped_mm": Op(_grouped_mm, _TOKENS),
    "expert_ffn": Op(_experts, Size(shapes.L3, 1)),
    "expert_ffn decode": Op(partial(_experts, path="decode"), Size(shapes.L3, 4)),
    "expert_ffn masked": Op(partial(_experts, path="masked"), Size(shapes.L3, 64)),
    "expert_ffn grouped": Op(partial(_experts, path="grouped"), Size(shapes.COARSE, 2048)),
    "expert_ffn training": Op(partial(_experts, gradients=True), Size(shapes.L3, 512)),
    "masked_ffn": Op(_masked, Size(shapes.L3, 256)),
    ROUNDING: Op(_rounding, Size(shapes.Q25, 0)),  # last: it is the one that could fail to end
}
SMOKE = tuple(f"{name}/{size}" for name in OPS for size in ("small", "real"))

_ROUTED = tuple(Size(shapes.L3, T, torch.float32) for T in (16, 8192, 65536))
BENCHED: dict[str, tuple[str, Size]] = {
    f"{name}/{size}": (name, size)
    for name, sizes in (
        ("expert_ffn", [Size(c, T) for c in (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID) for T in (1, 4, 16, 64, 256, 8192)]),
        ("expert_ffn training", [Size(c, 8192) for c in (shapes.L3, shapes.COARSE, shapes.MID)]),
        ("masked_ffn", [Size(c, 8192) for c in (shapes.L3, shapes.Q25, shapes.COARSE)]),
        ("route_top_k", [*_ROUTED, Size(shapes.L3, 1), Size(shapes.L3, 8192)]),
        ("dispatch_tokens", list(_ROUTED)),
        ("sinkhorn", [Size(c, 0, torch.float32) for c in (shapes.Q25, shapes.L3)]),
        ("sinkhorn implicit", [Size(shapes.Q25, 0, torch.float32)]),
        (ROUNDING, [Size(shapes.Q25, 0, torch.float32)]),
    )
    for size in sizes
}


def build(item: str, device: str) -> tuple[Call, torch.dtype]:
    if item in BENCHED:
        name, size = BENCHED[item]
    else:
        name, which = item.split("/")
        size = getattr(OPS[name], which)
    return OPS[name].build(size, device), size.dtype


def values(call: Call, function: Callable[..., Any], *, wide: bool = False) -> list[Tensor]:
    """Outputs, then the gradients to the leaves for fixed random cotangents; ``wide``: from the leaves in float32."""
    leaves = [(t.float() if wide else t).detach().requires_grad_(call.gradients) for t in call.leaves]
    out: Any = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    smooth: Sequence[Tensor] = [t for t in out if t.requires_grad]
    found = [t.detach() for t in out]
    if smooth:
        cotangents = [
            draw(*t.shape, seed=50 + i, device=t.device.type, dtype=torch.bfloat16).to(t.dtype) for i, t in enumerate(smooth)
        ]
        found += torch.autograd.grad(smooth, leaves, cotangents)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, by norms; of integers 0 or infinite; what is not finite is infinitely wrong."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found.long(), expected.long()) else float("inf")
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def check(item: str, device: str) -> dict[str, Any]:
    """Raises where ours is further from the reference than the dtype explains."""
    call, dtype = build(item, device)
    found, expected = values(call, call.ours), values(call, call.reference, wide=True)
    errors = [distance(a, b) for a, b in zip(found, expected, strict=True)]
    if max(errors) > _TOLERANCE[dtype]:
        raise AssertionError(f"error {max(errors):.3g} of tensor {errors.index(max(errors))}, allowed {_TOLERANCE[dtype]:.3g}")
    return {"error": max(errors)}
