# mypy: disable-error-code="no-untyped-def"
"""The activations of ``experts/activations.py`` within a kernel: value and derivative in float32, by name."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh_gelu_argument(x):
    """gelu's tanh form is x sigmoid(this)."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x)"""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu" or ACTIVATION == "gelu_python":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_fast" or ACTIVATION == "gelu_pytorch_tanh":
        return x * tl.sigmoid(_tanh_gelu_argument(x))
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, x, 0.0)
    elif ACTIVATION == "relu2":
        return tl.where(x > 0, x * x, 0.0)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        tl.static_assert(ACTIVATION == "linear", "unknown activation")
        return x


@triton.jit
def activate_derivative(x, ACTIVATION: tl.constexpr):
    """act'(x)"""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu" or ACTIVATION == "gelu_python":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_fast" or ACTIVATION == "gelu_pytorch_tanh":
        s = tl.sigmoid(_tanh_gelu_argument(x))
        return s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * x * x)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1.0 - s)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        return tl.where(x > 0, 2.0 * x, 0.0)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1.0 - s)
    elif ACTIVATION == "tanh":
        s = tl.sigmoid(2.0 * x)
        return 4.0 * s * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "linear", "unknown activation")
        return x * 0.0 + 1.0
