"""The entries of routing and of LapSum in the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import shapes
from bench.kernels.registry import Cost, Kernel, Variant
from dotmoe_kernels import _tiles

_SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
_TOKENS = (8192, 65536)
_EXPERTS = ((112, 28), (8, 2), (8, 1), (32, 8), (64, 16), (148, 37), (512, 128), (512, 28))  # E, K: every tile; one with few slots
_DOUBLES = ("k_ptr", "temperature_ptr", "solution_ptr", "dk_ptr", "dtemperature_ptr")
_LAST = dict.fromkeys(("stride_ze", "stride_se", "stride_ge", "stride_wk", "stride_qe", "stride_pe", "stride_l"), 1)


def _type_of(name: str, dtype: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "threshold" else "i32"
    if name in ("logits_ptr", "scores_ptr", "dlogits_ptr", "dscores_ptr"):
        return f"*{dtype}"
    others = {"indices_ptr": "*i64", "mask_ptr": "*i8", "count_ptr": "*i32"}
    return others.get(name, "*fp64" if name in _DOUBLES else "*fp32")


def _forms(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """What of the arguments changes the code, by name."""
    if kind == "top_k":
        nothing = dict.fromkeys(("mask_ptr", "probs_ptr", "lse_ptr", "count_ptr", "sum_ptr", "scalar_ptr"))
        return [
            *((mode, {"MODE": i}) for i, mode in enumerate(("unit", "softmax", "renormalized"))),
            ("alone", {"MODE": 0, **nothing}),
        ]
    if kind == "top_k_backward":
        return [("unit", {"RENORMALIZED": False}), ("renormalized", {"RENORMALIZED": True})]
    return [("", {})]


def _tile(kind: str, E: int, backend: str) -> tuple[dict[str, int], dict[str, Any]]:
    if kind == "route_soft":
        return _tiles.soft_routing_tile(E, backend)
    tiles = {"top_k": _tiles.routing_tile, "top_k_backward": _tiles.routing_tile, "finish": _tiles.routing_finish_tile}
    return tiles.get(kind, _tiles.soft_top_k_tile)(E)


def _variants(kind: str, function: str) -> Callable[[str], list[Variant]]:
    def variants(backend: str) -> list[Variant]:
        names = Kernel("", function, lambda _: []).load().arg_names
        found = []
        for E, K in _EXPERTS:
            tile, options = _tile(kind, E, backend)
            for dtype in ("fp32",) if kind == "finish" else ("fp32", "bf16"):
                for form, more in _forms(kind):
                    block_k = {"BLOCK_K": min(1 << (K - 1).bit_length(), tile["BLOCK_E"])}
                    constexprs = {n: v for n, v in {**_LAST, **block_k, **tile, **more}.items() if n in names}
                    signature = {n: _type_of(n, dtype) for n in names if n not in constexprs}
                    name = " ".join(part for part in (dtype, form, f"E={E} K={K}") if part)
                    found.append(Variant(name, signature, constexprs, options))
        return found

    return variants


def _cost(kind: str, shape: shapes.Shape, T: int) -> Cost:
    """Router logits are float32. A comparator of a sort and a step of a scan count as two operations, an exponential in float32 as
    two and in float64 as 20; float64 runs at half the rate, so counts twice."""
    E, K = shape.E, shape.K
    programs = 4 * 132
    if kind == "finish":
        return Cost(programs * (8.0 * E + 8), programs=1, round_trips=1)
    rows, slots = 4.0 * T * E, 12.0 * T * K
    steps = (max(16, E) - 1).bit_length()
    sort, scans = float(T * E * steps * (steps + 1)), 2.0 * 24 * 2 * steps * T * E
    given = {  # bytes, operations
        "top_k": (2 * rows + slots + 4.0 * T, sort + 6.0 * T * E),
        "top_k_backward": (2 * rows + slots + 4.0 * T, 8.0 * T * E + 2.0 * T * E * K),
        "route_soft": (2 * rows + slots + 36.0 * T, sort + scans + 120.0 * T * E),
        "route_soft_backward": (2 * rows + slots + 44.0 * T, 120.0 * T * E + 2.0 * T * E * K),
        "soft": (2 * rows + 32.0 * T, sort + scans + 60.0 * T * E),
        "soft_backward": (3 * rows + 40.0 * T, 60.0 * T * E),
    }
    return Cost(*given[kind])


def _kernel(name: str, kind: str, module: str) -> Kernel:
    function = f"dotmoe_kernels.{module}:_{name}_kernel"
    tokens = _TOKENS if kind != "finish" else _TOKENS[:1]
    costs = {f"{shape.name} T={T}": _cost(kind, shape, T) for shape in _SHAPES for T in tokens}
    return Kernel(name, function, _variants(kind, function), costs)


ROUTING = (
    _kernel("route_top_k", "top_k", "routing.gpu.top_k"),
    _kernel("route_finish", "finish", "routing.gpu.top_k"),
    _kernel("route_top_k_backward", "top_k_backward", "routing.gpu.top_k"),
    _kernel("route_soft_top_k", "route_soft", "routing.gpu.soft"),
    _kernel("route_soft_top_k_backward", "route_soft_backward", "routing.gpu.soft"),
    _kernel("soft_top_k", "soft", "soft_topk.gpu"),
    _kernel("soft_top_k_backward", "soft_backward", "soft_topk.gpu"),
)
