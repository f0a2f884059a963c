"""Everybody's routed FFN on one set of weights, the dense FFN that it replaces, and the float64 values to compare with.

The benches of the experts share it: ``bench_experts`` on a CPU, ``gpu/experts.py`` on a GPU, ``training`` for the gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.paired import missing
from bench.shapes import Shape
from dotmoe_kernels import reference
from dotmoe_kernels.permutation import dense_storage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_INT32 = 2**31  # elements; beyond, a peer's 32-bit addresses would take the whole process down


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


# --- dense -------------------------------------------------------------------------------------------------------------


def silu_and_mul(product: Tensor) -> Tensor:
    """[T, 2F] -> [T, F]"""
    gate, up = product.chunk(2, -1)
    return functional.silu(gate) * up


def dense(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Three products, as in a LLaMA or Qwen block."""
    return functional.linear(functional.silu(functional.linear(x, w["gate"])).mul_(functional.linear(x, w["up"])), w["dense_down"])


def dense_out_of_place(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same where autograd needs what lies in between."""
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def dense_merged(x: Tensor, w: dict[str, Tensor], swiglu: Callable[[Tensor], Tensor] = silu_and_mul) -> Tensor:
    """gate and up in one product."""
    return functional.linear(swiglu(functional.linear(x, w["dense_gate_up"])), w["dense_down"])


def masked_dense(x: Tensor, w: dict[str, Tensor], indices: Tensor, E: int) -> Tensor:
    """The dense FFN with the neurons of the other experts set to zero, as one writes it first."""
    mask = torch.zeros(x.shape[0], E, dtype=x.dtype, device=x.device).scatter_(1, indices, 1.0)
    hidden = functional.silu(functional.linear(x, w["gate"])) * functional.linear(x, w["up"])
    return functional.linear(hidden * mask.repeat_interleave(hidden.shape[1] // E, dim=1), w["dense_down"])


# --- transformers ------------------------------------------------------------------------------------------------------


def stock_experts(shape: Shape, w: dict[str, Tensor], implementation: str) -> Any:
    """Qwen3Moe's experts with one of transformers' implementations, frozen."""
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


def without_transformers(name: str, shape: Shape, T: int, most_gathered: float = 0.0) -> str | None:
    """The reason to skip an implementation of transformers, or None. ``batched_mm`` may copy ``most_gathered`` bytes in 16 bits."""
    if reason := missing("transformers"):
        return reason
    gathered = T * shape.K * 3 * shape.s * shape.H * 2
    if name == "batched_mm" and gathered > most_gathered:
        return f"copies the weights of every slot: {gathered / 1e9:.0f} GB"
    if name == "eager":
        return None
    if name not in importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS:
        return f"not registered in transformers {importlib.import_module('transformers').__version__}"
    if name == "sonicmoe":
        try:
            importlib.import_module("transformers.integrations.sonicmoe").load_sonicmoe_kernel()
        except Exception as problem:
            return f"cannot be loaded: {(str(problem).splitlines() or [''])[0][:120]}"
    return None


# --- the other libraries -----------------------------------------------------------------------------------------------

Peer = Callable[[Tensor, dict[str, Tensor], Tensor, Tensor], Callable[[], Tensor]]


def _liger(x: Tensor, w: dict[str, Tensor], indices: Tensor, routing: Tensor) -> Callable[[], Tensor]:
    apply = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction.apply
    return partial(apply, x, w["gate_up"], w["down_stock"], indices.int(), routing)


def _vllm(x: Tensor, w: dict[str, Tensor], indices: Tensor, routing: Tensor) -> Callable[[], Tensor]:
    fused_experts = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts
    return partial(fused_experts, x, w["gate_up"], w["down_stock"], topk_weights=routing, topk_ids=indices.int())


def _scattermoe(x: Tensor, w: dict[str, Tensor], indices: Tensor, routing: Tensor) -> Callable[[], Tensor]:
    """Its GLU block; gate before up, as the weights are stored here."""
    library = importlib.import_module("scattermoe.parallel_experts")
    E, K = w["gate_up"].shape[0], indices.shape[1]

    def call() -> Tensor:
        gates, up_weight, down_weight = routing.to(x.dtype), w["gate_up"].transpose(1, 2), w["down_stock"].transpose(1, 2)
        order = library.flatten_sort_count(indices, E)
        gate, up = library.parallel_linear(x, up_weight, K, *order, grouped_out=True).chunk(2, -1)
        return library.parallel_linear(functional.silu(gate) * up, down_weight, 1, *order, grouped_in=True, gates=gates)

    return call


LIBRARIES: dict[str, tuple[str, Peer]] = {
    "liger": ("liger_kernel", _liger),
    "scattermoe": ("scattermoe", _scattermoe),
    "vllm": ("vllm", _vllm),
}


def library_call(name: str, x: Tensor, w: dict[str, Tensor], indices: Tensor, routing: Tensor) -> Callable[[], Tensor] | str:
    """The call, or the reason why there is none."""
    package, peer = LIBRARIES[name]
    if reason := missing(package):
        return reason
    if not x.is_cuda:
        return "needs a GPU"
    if indices.numel() * x.shape[1] >= _INT32:
        return "its rows [T K, H] may be beyond 32-bit addresses"
    try:
        return peer(x, w, indices, routing)
    except Exception as problem:
        return f"cannot be loaded: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:120]}"


# --- the values --------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


def reference_rows(x: Tensor, w: dict[str, Tensor], indices: Tensor) -> Tensor:
    """reference.expert_ffn in float64 with routing weights 1, a few experts' weights at a time."""
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


def ends(T: int) -> list[int]:
    """The first two and the last two of T."""
    return sorted({0, min(1, T - 1), max(T - 2, 0), T - 1})


def ffn_info(shape: Shape, T: int, dtype: str, passes: int = 1) -> dict[str, Any]:
    """flops of the routed FFN; bytes of the experts' weights that random routing touches, read once a pass."""
    touched = 1 - (1 - shape.K / shape.E) ** T
    size = DTYPES[dtype].itemsize
    return {
        "shape": f"T {T}, {shape}",
        "dtype": dtype,
        "flops": 6 * T * shape.K * shape.s * shape.H * passes,
        "bytes": round(touched * 3 * shape.F * shape.H * size + 2 * T * shape.H * size) * passes,
    }
