"""The experts of stock MoE models on ``expert_ffn``, through the experts interface of transformers.

    register_experts()
    model.set_experts_implementation("dotmoe")          # or from_pretrained(..., experts_implementation="dotmoe")

Served is what computes y_t = sum_j w_tj Down_e (act(Gate_e x_t) * (Up_e x_t)) from ``gate_up_proj`` and ``down_proj``; every other
expert is refused when it is first called.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from .._checks import FLOATS
from ..experts import expert_ffn
from ..experts.activations import ACTIVATIONS
from .surgery import _activation_name

NAME = "dotmoe"


# by its class, so that a graph that is being traced, which has no values, can tell too
_BY_CLASS = {type(ACT2FN[name]): name for name in reversed(ACTIVATIONS)}


@lru_cache(maxsize=1024)
def _tried(act: Any, named: str | None) -> str | None:
    """The ACT2FN name of an activation, tried on values; ``named`` is tried first."""
    return _activation_name(act, type("Named", (), {"hidden_act": named}))


def _name_of(act: Any, named: str | None) -> str | None:
    name = _BY_CLASS.get(type(act))
    return _tried(act, named) if name is None and not torch.compiler.is_compiling() else name


def _reason(experts: Any) -> str | None:
    """Why these experts compute something else than ``expert_ffn``; None: they do not."""
    gate = getattr(experts, "_apply_gate", None)
    gate = getattr(gate, "__func__", gate)
    if not getattr(experts, "has_gate", True):
        return "no gate: they are down(act(up(x)))"
    if getattr(experts, "has_bias", False) or any("bias" in name for name, _ in experts.named_parameters(recurse=False)):
        return "biases"
    if not getattr(experts, "is_concatenated", True):
        return "gate and up rows interleaved in gate_up_proj"
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm after each expert"
    if gate is not None and gate is not _default_apply_gate:
        return "an _apply_gate of their own"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"no {name} of three dimensions"
        if weight.dtype not in FLOATS:
            return f"a quantised {name} of dtype {weight.dtype}"
    return None


def _check(experts: nn.Module) -> str:
    """The activation's name.

    Raises:
        ValueError: these experts are not served; names their class and the reason.
    """
    kind, reason = type(experts).__name__, _reason(experts)
    if reason is not None:
        raise ValueError(
            f'experts implementation "{NAME}": {kind} has {reason}; allowed: experts that are down(act(gate(x)) * up(x)) and '
            'nothing else. Use another implementation, such as "eager"'
        )
    act = getattr(experts, "act_fn", None)
    config = getattr(experts, "config", None)
    named = next((n for key in ("hidden_act", "hidden_activation") if isinstance(n := getattr(config, key, None), str)), None)
    name = _name_of(act, named)
    if name not in ACTIVATIONS:
        raise ValueError(
            f'experts implementation "{NAME}": {kind} has the activation {name or act!r}; allowed: {", ".join(sorted(ACTIVATIONS))}'
        )
    return name


def dotmoe_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a stock model: hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H].

    Ids of ``num_experts`` are empty slots, as expert parallelism leaves them. Under autocast as nn.Linear, and the result in the
    dtype of ``hidden_states``.

    Raises:
        ValueError: experts that are not served, see ``register_experts``.
    """
    activation = _check(self)
    x, gate_up, down = hidden_states, self.gate_up_proj, self.down_proj
    if getattr(self, "is_transposed", False):  # [E, H, 2s] and [E, s, H]
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    return expert_ffn(x, gate_up, down, top_k_index, top_k_weights, activation=activation).to(hidden_states.dtype)


def register_experts() -> str:
    """Register ``expert_ffn`` as the experts implementation "dotmoe" of transformers, for every stock MoE model.

        dotmoe_kernels.conversion.register_experts()
        model.set_experts_implementation("dotmoe")

    Nothing else changes: the model keeps its router and its weights, and may be set back at any time. Served are experts that are
    down(act(gate(x)) * up(x)) with ``gate_up_proj`` [E, 2s, H] and ``down_proj`` [E, H, s], or both transposed: Mixtral, Qwen 2 and
    3, OLMoE, DeepSeek V3, Granite and most others. Calling it again does nothing.

    Returns:
        "dotmoe".

    Raises:
        ValueError: the name is taken by another function; and at the first forward of a model whose experts have biases, an
            interleaved, clamped or missing gate, a norm of their own, quantised weights, or an activation that is not known.

    Gradient: to hidden states, routing weights and both projections. A second derivative is refused.

    Source: the experts interface of transformers v5.
    """
    before = ALL_EXPERTS_FUNCTIONS.get(NAME)
    if before is not None and before is not dotmoe_experts_forward:
        raise ValueError(f'the experts implementation "{NAME}" is {before!r} already; allowed: a name that is free')
    ALL_EXPERTS_FUNCTIONS.register(NAME, dotmoe_experts_forward)
    return NAME
