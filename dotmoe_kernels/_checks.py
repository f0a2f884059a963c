"""Argument checks shared by the public functions: every error is a ValueError that names the argument, what was given and what
is allowed. Shapes, dtypes and devices are checked everywhere; values on CPU tensors only, since on a GPU that would synchronise.
"""

from __future__ import annotations

from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, given: object, allowed: str) -> None:
    """Raise ``ValueError: <argument> is <given>; allowed: <allowed>`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument} is {given}; allowed: {allowed}")


def require_tensor(value: object, argument: str, dims: str) -> Tensor:
    """``value`` must be a tensor; ``dims`` says its shape in words for the message."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument} is a {type(value).__name__}; allowed: a tensor {dims}")
    return value


def require_float(value: object, argument: str, rank: int, dims: str, *, at_least: bool = False) -> Tensor:
    """A floating-point tensor of that rank (or at least that rank)."""
    tensor = require_tensor(value, argument, dims)
    fits = tensor.dim() >= rank if at_least else tensor.dim() == rank
    require(fits, argument, f"of shape {list(tensor.shape)}", f"shape {dims}")
    require(tensor.dtype in FLOATS, argument, f"of dtype {tensor.dtype}", "float64, float32, bfloat16 or float16")
    return tensor


def require_indices(value: object, argument: str, rank: int, dims: str) -> Tensor:
    """An int64 or int32 tensor of that rank."""
    tensor = require_tensor(value, argument, dims)
    require(tensor.dim() == rank, argument, f"of shape {list(tensor.shape)}", f"shape {dims}")
    require(tensor.dtype in (torch.int64, torch.int32), argument, f"of dtype {tensor.dtype}", "int64 or int32")
    return tensor


def require_shape(tensor: Tensor, argument: str, shape: tuple[int, ...], dims: str) -> None:
    require(tuple(tensor.shape) == shape, argument, f"of shape {list(tensor.shape)}", f"{dims} = {list(shape)}")


def require_same(tensor: Tensor, argument: str, other: Tensor, other_argument: str, *, dtype: bool = True) -> None:
    """``tensor`` lies on the device of ``other`` and, unless ``dtype`` is False, has its dtype."""
    require(tensor.device == other.device, argument, f"on {tensor.device}", f"the device of {other_argument}, {other.device}")
    if dtype:
        require(tensor.dtype == other.dtype, argument, f"of dtype {tensor.dtype}", f"the dtype of {other_argument}, {other.dtype}")


def require_finite(tensor: Tensor, argument: str) -> None:
    """No NaN and no infinity (CPU tensors only, and not while torch.compile traces)."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if isfinite(tensor.detach().sum().item()):  # a finite sum has finite terms
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = "NaN" if bool(torch.isnan(tensor).any()) else "infinite values"
        raise ValueError(f"{argument} holds {bad}; allowed: finite values")


def require_range(tensor: Tensor, argument: str, low: int, high: int) -> None:
    """Every entry in [low, high] (CPU tensors only)."""
    if tensor.device.type == "cpu" and tensor.numel():
        least, most = (int(v) for v in torch.aminmax(tensor))
        require(low <= least and most <= high, argument, f"in [{least}, {most}]", f"entries from {low} to {high}")


def require_offsets(offsets: object, argument: str, num_groups: int, num_rows: int) -> Tensor:
    """[E + 1] offsets with a leading 0, not decreasing, the last at most ``num_rows`` (values on CPU tensors only)."""
    tensor = require_indices(offsets, argument, 1, "[E + 1]")
    require_shape(tensor, argument, (num_groups + 1,), "[E + 1]")
    if tensor.device.type == "cpu":
        values = tensor.tolist()
        rising = values[0] == 0 and all(a <= b for a, b in pairwise(values))
        require(rising, argument, values, "offsets that begin at 0 and never decrease")
        require(values[-1] <= num_rows, argument, f"ending at {values[-1]}", f"at most the {num_rows} rows there are")
    return tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
