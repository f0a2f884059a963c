"""The topologies that fit a dense model, from its config alone: what each keeps active, exports without loss and runs fast on, and
its PREDICTED speed (``speeds.py``). The model is built without storage; nothing is loaded or computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .._checks import refuse, require
from ..exports.stock import ARCHITECTURES
from ..models.backbone import meta_backbone
from ..models.surgery import find_ffns
from .speeds import LAUNCH, RESTS_ON, dense_seconds, one_pass, product_seconds, routed_seconds

# by stock architecture: its backbones, and what its down projections are multiplied by: bfloat16 keeps powers of two
EXPORTS = {architecture.name: (architecture.backbones, architecture.fold) for architecture in ARCHITECTURES}
_LEAST_WIDTH, _LEAST_EXPERTS, _MOST_EXPERTS = 32, 4, 1024
_LLAMA_CPP_EXPERTS, _K_QUANT_BLOCK = 512, 256
_FAST_PREFILL = (1, 2, 4, 6, 8, 10, 16, 32)  # K for which llama.cpp has its fast path: those that divide 32, and two more
_CONTEXT = 512  # tokens before a decoded one, and of a sequence of the prefill
_SMALL = 5  # launches a layer beside the products: norms, rotary embedding, residuals [estimate]
_POINTS = (("decode", 1), ("decode", 8), ("prefill", 512), ("prefill", 8192))  # tokens


@dataclass(frozen=True)
class Topology:
    """One way to cut FFNs of F neurons and hidden size H: E experts of s, K of them a token."""

    H: int
    F: int
    E: int
    K: int

    @property
    def s(self) -> int:
        return self.F // self.E


@dataclass(frozen=True)
class _Dense:
    """What the figures are made from."""

    kind: str
    L: int
    F: int
    H: int
    activation: str
    N: int  # parameters
    V: int
    linears: tuple[tuple[int, int], ...]  # (rows, columns) of every product beside the FFNs and the head
    q: int  # width of the queries
    v: int  # of keys, and of values

    def parameters(self, c: Topology) -> tuple[int, int, int]:
        """(all, a token's, a token's in the FFNs); routers included, as ``count_parameters`` counts."""
        router = self.L * c.E * self.H
        ffn = 3 * self.L * c.K * c.s * self.H + router
        return self.N + router, self.N - 3 * self.L * self.F * self.H + ffn, ffn

    def share(self, c: Topology) -> float:
        total, active, _ = self.parameters(c)
        return active / total

    def around(self, phase: str, T: int) -> float:
        """Seconds of a pass outside the FFNs."""
        cached = 2 * T * _CONTEXT * 2 * self.v if phase == "decode" else 0  # bytes of keys and values a layer
        attention = one_pass(cached + 2 * T * 2 * (self.q + self.v), 4 * T * self.q * _CONTEXT / (1 if phase == "decode" else 2))
        head = product_seconds(T if phase == "decode" else -(-T // _CONTEXT), self.H, self.V)
        return sum(product_seconds(T, *shape) for shape in self.linears) + self.L * (attention + _SMALL * LAUNCH) + head


def _read(dense: PreTrainedConfig) -> _Dense:
    model, text = meta_backbone(dense), dense.get_text_config()
    ffns = find_ffns(model)
    widths = sorted({tuple(ffn.gate_proj.shape) for ffn in ffns.values()})
    require(len(widths) == 1, "MODEL", f"with FFN shapes {widths}", "one width for every layer")
    (F, H), first = widths[0], next(iter(ffns.values()))
    head, inside = model.get_output_embeddings(), tuple(f"{name}." for name in ffns)
    around = [
        m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and not n.startswith(inside)
    ]  # attention
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or H // heads
    return _Dense(
        kind=dense.model_type,
        L=len(ffns),
        F=F,
        H=H,
        activation=first.activation,
        N=sum(p.numel() for p in model.parameters()),
        V=text.vocab_size,
        linears=tuple((m.in_features, m.out_features) for m in around),
        q=heads * width,
        v=(getattr(text, "num_key_value_heads", None) or heads) * width,
    )


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def lossless_exports(kind: str, c: Topology) -> list[str]:
    """The stock architectures that a model of backbone ``kind`` exports to with weights that bfloat16 keeps exactly."""
    factors = {"K": c.K, "E": c.E, "": 1}
    return [name for name, (backbones, fold) in EXPORTS.items() if kind in backbones and _power_of_two(factors[fold])]


def fast_paths(c: Topology) -> dict[str, bool]:
    """What engines ask of a topology for their fast paths."""
    return {
        "llama.cpp experts at most 512": c.E <= _LLAMA_CPP_EXPERTS,
        "llama.cpp k-quants, s % 256 == 0": c.s % _K_QUANT_BLOCK == 0,
        "llama.cpp fused top-k on CUDA, E a power of two": _power_of_two(c.E),
        "llama.cpp fast prefill, K divides 32 or is 6 or 10": c.K in _FAST_PREFILL,
        "torch grouped product, s % 8 == 0": c.s % 8 == 0,
        "vLLM, one K and one width": True,  # of every layer, as a top-K router has it
    }


def _topologies(d: _Dense, budget: float | None) -> list[Topology]:
    """By E the largest K that fits, and the largest power of two below it."""
    found = []
    most = min(d.F // _LEAST_WIDTH, _MOST_EXPERTS)
    counts = [E for E in range(_LEAST_EXPERTS, most + 1) if d.F % E == 0]
    require(bool(counts), "MODEL", f"with FFNs of {d.F} neurons", f"F with a divisor E of at least 4 and F / E of {_LEAST_WIDTH}")
    for E in counts:
        if budget is None:
            largest = -(-E // 4)
        else:
            largest = max((K for K in range(1, E) if d.share(Topology(d.H, d.F, E, K)) <= budget), default=0)
        found += [Topology(d.H, d.F, E, K) for K in sorted({largest, 1 << max(largest.bit_length() - 1, 0)}) if 1 <= K <= largest]
    if not found:
        least = min((Topology(d.H, d.F, E, 1) for E in counts), key=d.share)
        near = f"at least {d.share(least):.4f}, the nearest: E {least.E}, s {least.s}, K 1"
        refuse("--budget", f"{budget:g}, which no topology fits", near)
    return found


def _row(d: _Dense, c: Topology, dense: dict[tuple[str, int], float]) -> dict[str, Any]:
    total, active, ffn = d.parameters(c)
    speed = {}
    for phase, T in _POINTS:
        ours = d.around(phase, T) + d.L * routed_seconds(T, c)
        speed[f"{phase} {T}"] = {
            "seconds": ours,
            "times_dense": round(dense[phase, T] / ours, 3),
            "ffn_times_dense": round(dense_seconds(T, c) / routed_seconds(T, c), 3),
        }
    return {
        "num_experts": c.E,
        "expert_size": c.s,
        "top_k": c.K,
        "active_ffn_parameters": ffn,
        "active_parameters": active,
        "total_parameters": total,
        "active_share": round(active / total, 4),
        "lossless_exports": lossless_exports(d.kind, c),
        "fast_paths": fast_paths(c),
        "memory_gb": round(2 * total / 1e9, 3),
        "predicted": speed,
    }


def plan_topologies(dense: PreTrainedConfig, budget: float | None = None) -> dict[str, Any]:
    """The topologies that fit a dense model.

    Args:
        dense: its config.
        budget: most active parameters a token over all, everything that a token touches counted. None: 25 % of the FFN.

    Returns:
        the model's sizes; ``topologies``: by E the largest K that fits and the largest power of two in it, each with its active
        parameters, the stock exports that are lossless, the engines' fast paths, the bytes of its weights in bfloat16, and its
        predicted seconds a pass, of the whole model and against the dense one; ``predicted_for``: what those rest on.

    Raises:
        ValueError: a budget outside (0, 1) or that nothing fits; a model without recognisable FFNs or already sparse.
    """
    require(budget is None or 0 < budget < 1, "--budget", budget, "a number between 0 and 1: active over all parameters")
    d = _read(dense)
    whole = Topology(d.H, d.F, 1, 1)
    times = {(phase, T): d.around(phase, T) + d.L * dense_seconds(T, whole) for phase, T in _POINTS}
    return {
        "backbone": d.kind,
        "ffns": d.L,
        "hidden_size": d.H,
        "ffn_width": d.F,
        "activation": d.activation,
        "total_parameters": d.N,
        "ffn_parameters": 3 * d.L * d.F * d.H,
        "budget": budget,
        "exports": [name for name, (backbones, _) in EXPORTS.items() if d.kind in backbones],
        "memory_gb": round(2 * d.N / 1e9, 3),
        "predicted_dense_seconds": {f"{phase} {T}": seconds for (phase, T), seconds in times.items()},
        "topologies": [_row(d, c, times) for c in _topologies(d, budget)],
        "predicted_for": f"{RESTS_ON}. A context of {_CONTEXT} tokens; {_SMALL} launches a layer beside the products [estimate]",
    }


_MARKS = ("E", "q", "t", "p", "g", "v")  # of the fast paths, in their order


def _millions(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"


def plan_lines(report: dict[str, Any]) -> list[str]:
    """The result of ``plan_topologies`` in words."""
    r, every = report, report["exports"]
    taken = "25 % of the FFN" if r["budget"] is None else f"active / total parameters at most {r['budget']:g}"
    lines = [
        f"{r['backbone']}: {r['ffns']} FFNs of F = {r['ffn_width']}, H = {r['hidden_size']}, {r['activation']}; "
        f"{_millions(r['total_parameters'])} parameters, {_millions(r['ffn_parameters'])} of them in FFNs; {taken}",
        "",
        f"{'E':>5}{'s':>6}{'K':>5}{'active FFN':>12}{'active':>10}{'':>7}  {'fast':<6}  {'GB':>6}"
        + "".join(f"{f'{phase} {T}':>14}" for phase, T in _POINTS)
        + "  lossless exports",
    ]
    for row in r["topologies"]:
        marks = "".join(m if met else "-" for m, met in zip(_MARKS, row["fast_paths"].values(), strict=True))
        speeds = "".join(f"{row['predicted'][f'{phase} {T}']['times_dense']:>13.2f}x" for phase, T in _POINTS)
        named = "all" if row["lossless_exports"] == every else ", ".join(row["lossless_exports"]) or "none"
        lines.append(
            f"{row['num_experts']:>5}{row['expert_size']:>6}{row['top_k']:>5}{_millions(row['active_ffn_parameters']):>12}"
            f"{_millions(row['active_parameters']):>10}{row['active_share']:>7.1%}  {marks:<6}  {row['memory_gb']:>6.3g}{speeds}"
            f"  {named if every else '-'}"
        )
    paths = r["topologies"][0]["fast_paths"]
    return [
        *lines,
        "",
        "fast:",
        *(f"  {mark} {path}" for mark, path in zip(_MARKS, paths, strict=True)),
        f"exports to stock architectures: {', '.join(every) or 'none of this backbone'}",
        "  as dense, and in this library's own form, every E and K is exact",
        "GB: of the weights in bfloat16. Speeds: the whole model against the dense one, PREDICTED",
        f"  for {r['predicted_for']}",
    ]
