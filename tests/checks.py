"""How a test compares: value and gradients against float64, by the rule of twice the plain error plus a floor."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from shapes import generator
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def error(value: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """Largest deviation, relative to the largest exact value and at least to ``scale``; NaN stays NaN."""
    if exact.numel() == 0:
        return 0.0
    scale = max(scale, exact.detach().abs().max().item()) or 1.0
    return (value.detach().double().cpu() - exact.detach().double().cpu()).abs().max().item() / scale


def value_and_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of ``function(**tensors)``, and the gradients to its floating-point arguments for a fixed random cotangent."""
    leaves = {n: t.detach().clone().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    out = function(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = torch.zeros((), dtype=torch.float64, device=out[0].device)
    for i, o in enumerate(out):
        cotangent = torch.randn(o.shape, generator=generator(100 + i), dtype=torch.float64).to(torch.bfloat16)
        total = total + (o.double() * cotangent.to(o.device).double()).sum()
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        assert gradient.shape == leaf.shape, f"gradient of {name}: {tuple(gradient.shape)}"
        assert gradient.dtype == leaf.dtype, f"gradient of {name}: {gradient.dtype}"
    outputs = {f"output {i}": o.detach() for i, o in enumerate(out)}
    return outputs | {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    *,
    device: str = "cpu",
    floor: float | None = None,
    scales: dict[str, float] | None = None,
    **tensors: Tensor,
) -> None:
    """error(ours) <= 2 error(reference in the same dtype) + floor, for every output and every gradient.

    Both errors are against the reference in float64. ``floor`` defaults to that of the narrowest dtype among ``tensors``.
    ``scales`` names gradients that are small differences of large terms, with the size of those terms."""
    floats = [t.dtype for t in tensors.values() if t.is_floating_point()]
    if floor is None:
        floor = max(FLOOR[d] for d in floats)
    exact = value_and_gradients(reference, {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()})
    there = {n: t.to(device) for n, t in tensors.items()}
    plain = value_and_gradients(reference, there)
    for name, value in value_and_gradients(ours, there).items():
        assert value.shape == exact[name].shape, f"{name}: {tuple(value.shape)}, expected {tuple(exact[name].shape)}"
        scale = (scales or {}).get(name.removeprefix("gradient of "), 0.0)
        allowed = 2 * error(plain[name], exact[name], scale) + floor
        found = error(value, exact[name], scale)
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


def assert_finite(results: dict[str, Tensor]) -> None:
    for name, value in results.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{name} differs"


SECOND = pytest.mark.parametrize(
    "how", ["grad", "backward", "grad, along another path too", "of a linear loss, along another path too"]
)


def second_derivative(function: Callable[[Tensor], Tensor], leaf: Tensor, how: str) -> Tensor | None:
    leaf = leaf.detach().clone().requires_grad_()
    out = function(leaf)
    # of a linear loss the gradient that comes in does not depend on the leaf
    first = (out * torch.linspace(-1, 2, out.numel()).view_as(out).to(out)).sum() if "linear" in how else out.square().sum()
    gradient = torch.autograd.grad(first, leaf, create_graph=True)[0]
    loss = gradient.square().sum()
    if "another path" in how:  # the other path's derivative alone must not pass for the whole
        loss = loss + leaf.square().sum()
    if how != "backward":
        return torch.autograd.grad(loss, leaf)[0]
    loss.backward()
    return leaf.grad


def assert_no_wrong_second_derivative(
    function: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], leaf: Tensor, how: str
) -> None:
    """A second derivative is refused with a clear error; an operation that plain autograd carries may also give the right one."""
    try:
        found = second_derivative(function, leaf, how)
    except RuntimeError as refusal:
        if not re.search(r"(?i)second|twice", str(refusal)):
            raise AssertionError(f"no clear error: {refusal}") from refusal
    else:
        found_error = error(found, second_derivative(reference, leaf, how))
        assert found_error < 1e-9, f"a wrong second derivative is returned without an error: off by {found_error:.3g}"
