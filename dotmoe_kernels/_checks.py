"""Argument checks shared by the public functions: every error is a ValueError that names the argument, what was given and what
is allowed. Shapes, dtypes and devices are checked everywhere; values on CPU tensors only, since on a GPU that would synchronise,
and not while torch.compile traces, when there are none.
"""

from __future__ import annotations

from contextlib import suppress
from math import isfinite, isnan
from numbers import Integral, Number, Real
from typing import NoReturn

import torch
from torch import Tensor

from ._backend import MOST_PLANS, rehearsing

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse(argument: str, given: object, allowed: str) -> NoReturn:
    """Raise ``ValueError: <argument> is <given>; allowed: <allowed>``."""
    raise ValueError(f"{argument} is {given}; allowed: {allowed}")


def require(condition: bool, argument: str, given: object, allowed: str) -> None:
    """``refuse`` unless ``condition`` holds. The checks below write their words only then: in every call they would cost more
    than a small op."""
    if not condition:
        refuse(argument, given, allowed)


class Passed:
    """Signatures of calls whose arguments have passed their checks: everything that those look at, but for values. Types too, where
    an allowed value equals one that is not: 1 and True."""

    def __init__(self) -> None:
        self.seen: set[tuple[object, ...]] = set()

    def __contains__(self, signature: tuple[object, ...]) -> bool:
        try:
            return signature in self.seen
        except TypeError:  # an argument without a hash: the checks will say what is wrong with it
            return False

    def add(self, signature: tuple[object, ...]) -> None:
        if len(self.seen) >= MOST_PLANS:
            self.seen.clear()
        with suppress(TypeError):
            self.seen.add(signature)


def require_tensor(value: object, argument: str, dims: str) -> Tensor:
    """``value`` must be a tensor; ``dims`` says its shape in words for the message."""
    if not isinstance(value, Tensor):
        refuse(argument, f"a {type(value).__name__}", f"a tensor {dims}")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value):
        refuse(argument, "inside a transform of torch.func (grad, vmap, ...)", "torch.autograd; or use dotmoe_kernels.reference")
    return value


def require_float(value: object, argument: str, rank: int, dims: str, *, at_least: bool = False) -> Tensor:
    """A floating-point tensor of that rank (or at least that rank)."""
    tensor = require_tensor(value, argument, dims)
    fits = tensor.dim() >= rank if at_least else tensor.dim() == rank
    if not fits:
        refuse(argument, f"of shape {list(tensor.shape)}", f"shape {dims}")
    if tensor.dtype not in FLOATS:
        refuse(argument, f"of dtype {tensor.dtype}", "float64, float32, bfloat16 or float16")
    return tensor


def require_indices(value: object, argument: str, rank: int, dims: str) -> Tensor:
    """An int64 or int32 tensor of that rank."""
    tensor = require_tensor(value, argument, dims)
    if tensor.dim() != rank:
        refuse(argument, f"of shape {list(tensor.shape)}", f"shape {dims}")
    if tensor.dtype not in (torch.int64, torch.int32):
        refuse(argument, f"of dtype {tensor.dtype}", "int64 or int32")
    return tensor


def require_shape(tensor: Tensor, argument: str, shape: tuple[int, ...], dims: str) -> None:
    if tuple(tensor.shape) != shape:
        refuse(argument, f"of shape {list(tensor.shape)}", f"{dims} = {list(shape)}")


def require_same(tensor: Tensor, argument: str, other: Tensor, other_argument: str, *, dtype: bool = True) -> None:
    """``tensor`` lies on the device of ``other`` and, unless ``dtype`` is False, has its dtype."""
    if tensor.device != other.device:
        refuse(argument, f"on {tensor.device}", f"the device of {other_argument}, {other.device}")
    if dtype and tensor.dtype != other.dtype:
        refuse(argument, f"of dtype {tensor.dtype}", f"the dtype of {other_argument}, {other.dtype}")


def has_values(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be looked at for nothing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not rehearsing()


def require_finite(tensor: Tensor, argument: str) -> None:
    """No NaN and no infinity (where the values are at hand)."""
    if not has_values(tensor):
        return
    if isfinite(tensor.detach().sum().item()):  # a finite sum has finite terms
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{argument} holds {'NaN' if bool(tensor.isnan().any()) else 'infinite values'}; allowed: finite values")


def require_range(tensor: Tensor, argument: str, low: int, high: int) -> None:
    """Every entry in [low, high] (where the values are at hand)."""
    if not has_values(tensor) or tensor.numel() == 0:
        return
    values = tensor.numpy()
    if low == 0 and values.view(f"u{values.itemsize}").max() <= high:  # below 0 is beyond all others there: one pass for both ends
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        refuse(argument, f"in [{least}, {most}]", f"entries from {low} to {high}")


def require_mask(value: object, argument: str, shape: tuple[int, ...], dims: str) -> Tensor:
    """A mask of that shape as bool, from bool or from integers 0 and 1. A float one may be additive, 0 where a token counts: read
    as truth it would mean the opposite."""
    mask = require_tensor(value, argument, dims)
    require_shape(mask, argument, shape, dims)
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        refuse(argument, f"of dtype {mask.dtype}", "bool, or integers 0 and 1; true for a valid token")
    if has_values(mask) and mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 1:
        refuse(argument, f"in [{int(mask.min())}, {int(mask.max())}]", "bool, or integers 0 and 1; true for a valid token")
    return mask.bool()


def require_offsets(offsets: object, argument: str, num_groups: int, num_rows: int) -> Tensor:
    """[E + 1] offsets with a leading 0, not decreasing, the last at most ``num_rows`` (the values where they are at hand)."""
    tensor = require_indices(offsets, argument, 1, "[E + 1]")
    require_shape(tensor, argument, (num_groups + 1,), "[E + 1]")
    if has_values(tensor):
        values = tensor.tolist()
        if values[0] != 0 or values != sorted(values):
            refuse(argument, values, "offsets that begin at 0 and never decrease")
        if values[-1] > num_rows:
            refuse(argument, f"ending at {values[-1]}", f"at most the {num_rows} rows there are")
    return tensor


def require_grid(count: int, argument: str, tensor: Tensor, what: str) -> None:
    """Kernels that take ``count`` programs along a grid's second or third axis, where a GPU has 65,535."""
    if count > 65535:
        refuse(argument, f"of shape {list(tensor.shape)}", f"at most 65535 {what} a call on a GPU")


def is_integer(value: object) -> bool:
    """Python's or NumPy's; True and False are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
    """Real, Python's or NumPy's, and not NaN; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and not isnan(value)


def plain_numbers(config: object) -> None:
    """NumPy's numbers among the attributes become Python's, which JSON can hold."""
    for name, value in list(vars(config).items()):
        if isinstance(value, Number) and hasattr(value, "item"):
            object.__setattr__(config, name, value.item())


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
