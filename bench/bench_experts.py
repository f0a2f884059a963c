"""Experts: the routed FFN with 25 % of its neurons active, and the dense FFN that it replaces. Which is faster at T tokens?

The weights are drawn once for a shape and dtype. Ours has ``down_proj`` as a converted model stores it; the peers get
their own stock layout. The dense FFN answers another question than the sparse ones, so it is compared with all experts active.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dotmoe_kernels as dk
from bench import shapes
from bench.curves import CURVE
from bench.paired import Case, Group, cases, missing
from bench.shapes import Shape
from dotmoe_kernels import reference
from dotmoe_kernels.permutation import dense_storage
from tests.shapes import balanced_expert_of, expert_weights, normal, routed_indices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OWN_PATHS = ("ours-decode", "ours-grouped", "ours-masked")
_DENSE = ("dense", "dense-merged")
_TRANSFORMERS = ("transformers-eager", "transformers-grouped_mm", "transformers-batched_mm")
IMPLS = ("ours", *_OWN_PATHS, *_DENSE, "eager-masked-dense", *_TRANSFORMERS)
_CURVE_IMPLS = ("ours", "dense", "dense-merged", "transformers-grouped_mm")
_CURVE_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 8192, 16384)
_MOST_GATHERED = 2e9  # bytes of expert weights that batched_mm may copy


@lru_cache(maxsize=1)
def weights(shape: Shape, dtype: str) -> dict[str, Tensor]:
    """One FFN in every layout that somebody needs."""
    return layouts(shape, *expert_weights(shape.E, shape.s, shape.H, seed=0, dtype=DTYPES[dtype]))


def layouts(shape: Shape, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """gate_up [E, 2s, H] and down [E, H, s] as everybody wants them."""
    down = dense_storage(down)
    gate, up = gate_up.view(shape.E, 2, shape.s, shape.H).unbind(1)
    gate, up = gate.reshape(shape.F, shape.H), up.reshape(shape.F, shape.H)
    return {
        "gate_up": gate_up,
        "down": down,
        "down_stock": down.contiguous(),  # [E, H, s]
        "gate": gate,
        "up": up,
        "dense_gate_up": torch.cat((gate, up)),  # [2F, H]
        "dense_down": down.transpose(1, 2).reshape(shape.F, shape.H).T.contiguous(),  # [H, F], as in nn.Linear
    }


def _stock_experts(shape: Shape, w: dict[str, Tensor], implementation: str) -> Callable[..., Tensor]:
    """Qwen3Moe's experts with one of transformers' implementations."""
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = importlib.import_module("transformers").Qwen3MoeConfig(
        num_experts=shape.E, hidden_size=shape.H, moe_intermediate_size=shape.s, hidden_act="silu"
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = modeling.Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(w["gate_up"], requires_grad=False)
    module.down_proj = torch.nn.Parameter(w["down_stock"], requires_grad=False)
    return module


def _dense(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Three products, as in a LLaMA or Qwen block."""
    return functional.linear(functional.silu(functional.linear(x, w["gate"])).mul_(functional.linear(x, w["up"])), w["dense_down"])


def _dense_merged(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """gate and up in one product."""
    gate, up = functional.linear(x, w["dense_gate_up"]).chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, w["dense_down"])


def _masked_dense(x: Tensor, w: dict[str, Tensor], indices: Tensor, E: int) -> Tensor:
    """The dense FFN with the neurons of the other experts set to zero, as one writes it first."""
    mask = torch.zeros(x.shape[0], E, dtype=x.dtype, device=x.device).scatter_(1, indices, 1.0)
    hidden = functional.silu(functional.linear(x, w["gate"])) * functional.linear(x, w["up"])
    return functional.linear(hidden * mask.repeat_interleave(hidden.shape[1] // E, dim=1), w["dense_down"])


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _prepare(shape: Shape, T: int, dtype: str) -> Case:
    w = weights(shape, dtype)
    x = normal(T, shape.H, seed=3, dtype=DTYPES[dtype])
    indices = routed_indices(T, shape.K, shape.E, seed=4)
    ones = torch.ones(T, shape.K, dtype=DTYPES[dtype])
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.expert_ffn(x, w["gate_up"], w["down"], indices, ones),
        "dense": lambda: _dense(x, w),
        "dense-merged": lambda: _dense_merged(x, w),
        "eager-masked-dense": lambda: _masked_dense(x, w, indices, shape.E),
    }
    for name in _OWN_PATHS:
        run[name] = partial(dk.expert_ffn, x, w["gate_up"], w["down"], indices, ones, path=name.removeprefix("ours-"))
    skipped = {}
    if T > 64:
        skipped["ours-decode"] = "the path of a few tokens"
    gathered = T * shape.K * 3 * shape.s * shape.H * x.element_size()
    for name in _TRANSFORMERS:
        if reason := missing("transformers"):
            skipped[name] = reason
        elif name.endswith("batched_mm") and gathered > _MOST_GATHERED:
            skipped[name] = f"copies the weights of every slot: {gathered / 1e9:.0f} GB"
        else:
            run[name] = partial(_stock_experts(shape, w, name.removeprefix("transformers-")), x, indices, ones)
    checked = {name: call for name, call in run.items() if name not in skipped}
    # the reference in float64 for a few tokens only: on all of them it would take longer than the bench
    few = min(T, 4)
    wide = {name: w[name] for name in ("gate_up", "down")}
    expected = _reference(x[:few], wide, indices[:few])
    everyone = torch.arange(shape.E).expand(few, -1)
    expected_dense = _reference(x[:few], wide, everyone)

    def error(name: str, found: Tensor) -> float:
        return _error(found[:few], expected_dense if name in _DENSE else expected)

    return Case(checked, error, 1e-5 if dtype == "float32" else 2e-2, skipped=skipped)


def _reference(x: Tensor, w: dict[str, Tensor], indices: Tensor) -> Tensor:
    """reference.expert_ffn in float64, a few experts' weights at a time."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in indices.unique().tolist():
        rows = (indices == e).any(1)
        one = torch.zeros(int(rows.sum()), 1, dtype=torch.int64, device=x.device)
        y[rows] += reference.expert_ffn(
            x[rows].double(),
            w["gate_up"][e : e + 1].double(),
            w["down"][e : e + 1].double(),
            one,
            torch.ones(one.shape, dtype=torch.float64, device=x.device),
            activation=functional.silu,
        )
    return y


# --- training ---------------------------------------------------------------------------------------------------------------

TRAINING = ("ours", "transformers-grouped_mm", "dense")


def _prepare_training(shape: Shape, T: int, dtype: str) -> Case:
    """Forward and backward to the input and all weights: the fine-tune of the sparse model."""
    w = weights(shape, dtype)
    x = normal(T, shape.H, seed=3, dtype=DTYPES[dtype]).requires_grad_()
    dy = normal(T, shape.H, seed=5, dtype=DTYPES[dtype])
    indices = routed_indices(T, shape.K, shape.E, seed=4)
    ones = torch.ones(T, shape.K, dtype=DTYPES[dtype])
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in w.items()}

    def ours() -> Any:
        y = dk.expert_ffn(x, leaves["gate_up"], leaves["down"], indices, ones)
        return torch.autograd.grad(y, [x, leaves["gate_up"], leaves["down"]], dy)

    def dense() -> Any:
        hidden = functional.silu(functional.linear(x, leaves["gate"])) * functional.linear(x, leaves["up"])
        y = functional.linear(hidden, leaves["dense_down"])
        return torch.autograd.grad(y, [x, leaves["gate"], leaves["up"], leaves["dense_down"]], dy)

    run: dict[str, Callable[[], Any]] = {"ours": ours, "dense": dense}
    skipped = {}
    if reason := missing("transformers"):
        skipped["transformers-grouped_mm"] = reason
    else:
        module: Any = _stock_experts(shape, w, "grouped_mm")
        module.requires_grad_(True)
        run["transformers-grouped_mm"] = lambda: torch.autograd.grad(
            module(x, indices, ones), [x, module.gate_up_proj, module.down_proj], dy
        )
    wide = [t.detach().float().requires_grad_() for t in (x, w["gate_up"], w["down"])]
    y = reference.expert_ffn(wide[0], wide[1], wide[2], indices, ones.float(), activation=functional.silu)
    expected = [t.double() for t in torch.autograd.grad(y, wide, dy.float())]

    def error(name: str, found: Any) -> float:
        return 0.0 if name == "dense" else max(_error(a, b) for a, b in zip(found, expected, strict=True))

    return Case(run, error, 1e-5 if dtype == "float32" else 2e-2, skipped=skipped)


ALIGNMENT = ("ours", "eager", "frozen-dense")


def _prepare_alignment(shape: Shape, T: int, dtype: str) -> Case:
    """One layer's step of alignment: forward, and backward to the input, the plan and the router, the weights frozen."""
    w = weights(shape, dtype)
    gate, up, down = w["gate"], w["up"], w["dense_down"]
    expert_of = balanced_expert_of(shape.F, shape.E, seed=6)
    indices = routed_indices(T, shape.K, shape.E, seed=4)
    x, dy = (normal(T, shape.H, seed=s, dtype=DTYPES[dtype]) for s in (3, 5))
    plan = normal(shape.F, shape.E, seed=7, dtype=torch.float32).softmax(-1).requires_grad_()
    probs = normal(T, shape.E, seed=8, dtype=torch.float32).softmax(-1).requires_grad_()
    x.requires_grad_()

    def ours() -> Any:
        y = dk.masked_ffn(x, gate, up, down, expert_of, indices, plan=plan, probs=probs)
        return torch.autograd.grad(y, [x, plan, probs], dy)

    def eager(inputs: tuple[Tensor, ...] = (x, gate, up, down, dy, plan, probs)) -> Any:
        a, g, u, d, grad, p, q = inputs
        y = reference.masked_ffn(a, g, u, d, expert_of, indices, plan=p, probs=q, activation=functional.silu)
        return torch.autograd.grad(y, [a, p, q], grad)

    def frozen() -> Any:
        return torch.autograd.grad(_dense_out_of_place(x, gate, up, down), [x], dy)

    wide = tuple(t.detach().float() for t in (x, gate, up, down, dy, plan, probs))
    for i in (0, 5, 6):
        wide[i].requires_grad_()
    expected = [t.double() for t in eager(wide)]

    def error(name: str, found: Any) -> float:
        return 0.0 if name == "frozen-dense" else max(_error(a, b) for a, b in zip(found, expected, strict=True))

    return Case({"ours": ours, "eager": eager, "frozen-dense": frozen}, error, 1e-4 if dtype == "float32" else 5e-2)


def _dense_out_of_place(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def _info(shape: Shape, T: int, dtype: str, passes: int = 1) -> dict[str, Any]:
    """flops of the routed FFN; bytes of the experts' weights that random routing touches, read once."""
    touched = 1 - (1 - shape.K / shape.E) ** T
    size = DTYPES[dtype].itemsize
    return {
        "shape": f"T {T}, {shape}",
        "dtype": dtype,
        "flops": 6 * T * shape.K * shape.s * shape.H * passes,
        "bytes": round(touched * 3 * shape.F * shape.H * size + 2 * T * shape.H * size) * passes,
    }


def _groups() -> list[Group]:
    def ffn(prefix: str, shape: Shape, T: int, dtype: str, rounds: int, budget: float) -> Group:
        name = f"{prefix}experts-{shape.name}-{dtype}-T{T}"
        return Group(name, IMPLS, partial(_prepare, shape, T, dtype), _info(shape, T, dtype), rounds, budget)

    def curve(shape: Shape, T: int, dtype: str) -> Group:
        info = {**_info(shape, T, dtype), "T": T, "s": shape.s}
        return Group(f"{CURVE}{shape.name}-{dtype}-T{T}", _CURVE_IMPLS, partial(_prepare, shape, T, dtype), info, 9, 2.5)

    groups = [ffn("quick-", shapes.TINY, T, "float32", 5, 1.0) for T in (1, 16, 64)]
    for dtype in DTYPES:
        groups += [ffn("", shapes.CPU, T, dtype, 15, 4.0) for T in (1, 4, 16, 64, 512)]
        for name, impls, prepare in (("training", TRAINING, _prepare_training), ("alignment", ALIGNMENT, _prepare_alignment)):
            case = partial(prepare, shapes.CPU, 512, dtype)
            groups.append(
                Group(f"experts-{name}-cpu-{dtype}-T512", impls, case, _info(shapes.CPU, 512, dtype, 3), rounds=7, budget=10.0)
            )
    groups += [ffn("", shapes.L3, 1, dtype, 11, 6.0) for dtype in DTYPES]
    groups += [curve(shape, T, "bfloat16") for shape in shapes.WIDTHS for T in _CURVE_TOKENS]
    groups += [curve(shapes.WIDTHS[2], T, "float32") for T in _CURVE_TOKENS if T <= 4096]
    return groups


@cases(_groups())
def test_experts(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
