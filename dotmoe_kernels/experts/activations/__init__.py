"""The FFN activations by their transformers ACT2FN names, each with its derivative.

An entry is (forward(x), backward(grad, x)); the sigmoid-weighted ones multiply by the gate in the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..._checks import require


class Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the output, input) -> gradient of the input


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(functional.gelu, approximate=approximate),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate=approximate),
    )


_SILU = Activation(functional.silu, torch.ops.aten.silu_backward)
ACTIVATIONS = {
    "silu": _SILU,
    "swish": _SILU,
    "gelu": _gelu("none"),
    "gelu_python": _gelu("none"),
    "gelu_new": _gelu("tanh"),
    "gelu_fast": _gelu("tanh"),
    "gelu_pytorch_tanh": _gelu("tanh"),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    "relu": Activation(functional.relu, lambda grad, x: grad * (x > 0)),
    "relu2": Activation(_relu2, lambda grad, x: 2 * grad * functional.relu(x)),
    "sigmoid": Activation(torch.sigmoid, lambda grad, x: torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(x))),
    "tanh": Activation(torch.tanh, lambda grad, x: torch.ops.aten.tanh_backward(grad, torch.tanh(x))),
    "linear": Activation(torch.clone, lambda grad, x: grad),
}


def find_activation(name: str) -> Activation:
    """The activation of that ACT2FN name; ValueError that lists the known ones otherwise."""
    require(isinstance(name, str) and name in ACTIVATIONS, "activation", repr(name), ", ".join(sorted(ACTIVATIONS)))
    return ACTIVATIONS[name]
