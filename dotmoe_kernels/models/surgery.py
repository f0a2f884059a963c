"""Find the FFNs of a dense model by their structure, and swap modules.

A gated FFN is a module with three linear projections, two H -> F and one F -> H, that computes

    y = Wd (act(Wg x) * (Wu x))

for an activation of transformers' ACT2FN. No class name is consulted: the formula is tried on the module itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN

from .._checks import FLOATS

# config fields that only sparse models fill in
_SPARSE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "hidden_activation_function")
_CANONICAL = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "gelu_new", "quick_gelu")

_Reading = tuple[Tensor, Tensor, Tensor, tuple[str, str, str], bool]  # gate, up, down, children, gate_first


@dataclass(frozen=True)
class DenseFFN:
    """A gated FFN found in a model; the tensors are the model's own (views of it where gate and up are fused)."""

    gate_proj: Tensor  # [F, H]
    up_proj: Tensor  # [F, H]
    down_proj: Tensor  # [H, F]
    activation: str  # name in ACT2FN
    module: nn.Module = field(repr=False)
    children: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # gate and up are one child where fused
    gate_first: bool = True  # of a fused child: gate above up

    def assign(self, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, *, requires_grad: bool) -> None:
        """Give the module these weights, under this reading of its children."""
        first, second, third = (self.module.get_submodule(child) for child in self.children)
        if first is second:
            halves = (gate_proj, up_proj) if self.gate_first else (up_proj, gate_proj)
            first.weight = nn.Parameter(torch.cat(halves), requires_grad=requires_grad)
        else:
            first.weight = nn.Parameter(gate_proj, requires_grad=requires_grad)
            second.weight = nn.Parameter(up_proj, requires_grad=requires_grad)
        third.weight = nn.Parameter(down_proj, requires_grad=requires_grad)


def _activation_name(act: object, config: object) -> str | None:
    """The ACT2FN name whose values are those of ``act``; the config's own name first, since several names share one function."""
    if not callable(act) or (isinstance(act, nn.Module) and any(True for _ in act.parameters())):
        return None
    named = [name for key in _ACTIVATION_FIELDS if isinstance(name := getattr(config, key, None), str)]
    x = torch.linspace(-12, 12, 97, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        try:
            values = act(x)
        except Exception:  # whatever it is, it is no elementwise activation
            return None
        if not isinstance(values, Tensor) or values.shape != x.shape:
            return None
        for name in dict.fromkeys([*named, *_CANONICAL, *ACT2CLS]):
            if name in ("prelu", "xielu") or name not in ACT2CLS:  # these have parameters
                continue
            if torch.allclose(values, ACT2FN[name](x), rtol=1e-6, atol=1e-7):
                return name
    return None


def _formula_error(module: nn.Module, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> float:
    """Relative error of y = Wd (act(Wg x) * (Wu x)) against the module itself, in eval mode, on two tokens."""
    x = torch.randn(1, 2, gate.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(device=gate.device, dtype=gate.dtype)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            y = module(x)
            expected = (ACT2FN[activation](x @ gate.T) * (x @ up.T)) @ down.T
    except Exception:  # it takes something else than hidden states
        return float("inf")
    finally:
        module.train(training)
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return float("inf")
    return float((y - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _linear_candidates(linears: dict[str, nn.Linear]) -> Iterator[_Reading]:
    """Every reading of two or three linears as gate, up, down that has the right shapes."""
    if len(linears) == 3:
        for g, u, d in permutations(linears):
            gate, up, down = linears[g].weight, linears[u].weight, linears[d].weight
            if gate.shape == up.shape == down.T.shape:
                yield gate, up, down, (g, u, d), True
    elif len(linears) == 2:
        for m, d in permutations(linears):
            merged, down = linears[m].weight, linears[d].weight
            if merged.shape == (2 * down.shape[1], down.shape[0]):
                first, second = merged.chunk(2)  # [F, H] each
                yield first, second, down, (m, m, d), True
                yield second, first, down, (m, m, d), False


def recognise_ffn(module: nn.Module, config: object = None, *, name: str = "module") -> DenseFFN | None:
    """The gated FFN that ``module`` is, or None.

    Raises:
        ValueError: it is a gated FFN with biases, or it has the parts of one but computes something else.
    """
    linears = {n: c for n, c in module.named_children() if isinstance(c, nn.Linear)}
    others = {n: c for n, c in module.named_children() if n not in linears}
    if any(True for c in others.values() for _ in c.parameters()) or next(module.parameters(recurse=False), None) is not None:
        return None
    readings = list(_linear_candidates(linears))
    if not readings:
        return None
    functions = [*others.values(), *(v for v in vars(module).values() if callable(v) and not isinstance(v, type))]
    activation = next((n for f in functions if (n := _activation_name(f, config)) not in (None, "linear")), None)
    if activation is None:
        return None
    biased = [n for n, c in linears.items() if c.bias is not None]
    if biased:
        raise ValueError(f"{name} has biases in {', '.join(biased)}; allowed: a gated FFN without biases")
    dtype = readings[0][0].dtype
    if dtype not in FLOATS:
        raise ValueError(f"{name} has weights of dtype {dtype}; allowed: an unquantised model in float32, bfloat16 or float16")
    if readings[0][0].device.type == "meta":  # nothing to try the formula on: the order of declaration
        best, error = readings[0], 0.0
    else:
        best, error = min(((r, _formula_error(module, *r[:3], activation)) for r in readings), key=lambda pair: pair[1])
    if not error <= max(32 * torch.finfo(dtype).eps, 1e-4):  # two products of a few thousand terms
        raise ValueError(
            f"{name} has three projections and {activation}, but its output differs from down({activation}(gate(x)) * up(x)) by "
            f"{error:.1e} (relative); allowed: a gated FFN with nothing else inside"
        )
    gate, up, down, children, gate_first = best
    return DenseFFN(gate, up, down, activation, module, children, gate_first)


def _configs(model: nn.Module) -> tuple[Any, Any]:
    """The model's config and its text config."""
    config: Any = getattr(model, "config", None)
    return config, config.get_text_config() if hasattr(config, "get_text_config") else config


def refuse_sparse(model: nn.Module) -> None:
    """Raise a ValueError for a model that has experts already."""
    config, text = _configs(model)
    kind = type(model).__name__
    if getattr(config, "model_type", None) == "dotmoe":
        raise ValueError(f"model is {kind}, which is already converted; allowed: a dense model")
    for key in _SPARSE_FIELDS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 1:
            raise ValueError(f"model is {kind}, which is already sparse ({key} = {value}); allowed: a dense model")
    for name, module in model.named_modules():
        if any(child == "experts" for child, _ in module.named_children()):
            raise ValueError(f"model is {kind}, which is already sparse ({name}.experts); allowed: a dense model")


def _candidate(model: nn.Module) -> str:
    """The module most like an FFN, for the error: named like one, or else the parent of the widest linears."""
    named = [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in ("mlp", "ffn", "feed_forward", "fc1", "ff")]
    if not named:
        named = [n for n, m in model.named_modules() if any(isinstance(c, nn.Linear) for c in m.children())]
    if not named:
        return "there is no linear layer in it"
    module = model.get_submodule(named[0])
    parts = ", ".join(
        f"{n}: {list(weight.shape)}" if isinstance(weight := getattr(c, "weight", None), Tensor) else f"{n}: {type(c).__name__}"
        for n, c in module.named_children()
    )
    return f"the nearest is {named[0]} ({type(module).__name__}: {parts or 'no children'})"


def find_ffns(model: nn.Module) -> dict[str, DenseFFN]:
    """Every gated FFN of a dense model, by module path in the model's order, such as "model.layers.0.mlp".

    Args:
        model: a dense model with its own weights (on any device, meta included; not quantised).

    Returns:
        DenseFFN by name; gate_proj, up_proj [F, H] and down_proj [H, F] are the model's tensors.

    Raises:
        ValueError: the model is already sparse; no FFN is recognised (names the nearest module and what was looked for);
            an FFN has biases, computes something else besides or belongs to two layers.
    """
    refuse_sparse(model)
    _, text = _configs(model)
    found = {}
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        ffn = recognise_ffn(module, text, name=name)
        if ffn is None:
            continue
        for weight in module.parameters():  # an FFN of two layers would be swapped in one of them
            other = owner.setdefault(id(weight), name)
            if other != name:
                raise ValueError(f"{name} has the weights of {other}; allowed: an FFN of its own for every layer")
        found[name] = ffn
    if not found:
        raise ValueError(
            f"model is {type(model).__name__}, in which no FFN was recognised: {_candidate(model)}; looked for: a module with "
            "three linear projections, two H -> F and one F -> H (or a fused one H -> 2F), and an activation of ACT2FN"
        )
    return found


def assign_ffn(
    ffn: DenseFFN, weights: tuple[Tensor, Tensor, Tensor], config: object, name: str, *, requires_grad: bool = False
) -> None:
    """Give a module that had no storage its weights gate_proj, up_proj [F, H] and down_proj [H, F]. Without it gate and up cannot
    be told apart: asked again, now that the formula can be tried."""
    ffn.assign(*weights, requires_grad=requires_grad)
    tried = recognise_ffn(ffn.module, config, name=name)
    if tried is not None and (tried.children, tried.gate_first) != (ffn.children, ffn.gate_first):
        tried.assign(*weights, requires_grad=requires_grad)


def swap_ffn(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` at path ``name`` of ``model``; returns the module that was there.

    Raises:
        ValueError: there is no module of that name.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"name is {name!r}; allowed: a module path of {type(model).__name__}") from None
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return old
