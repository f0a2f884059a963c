"""The decode path's entries in the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import shapes
from bench.kernels.registry import Cost, Kernel, Variant
from dotmoe_kernels import _tiles

_SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
_TOKENS = (1, 4, 16)
# T, shape, dtype: the vector form and the tile forms, narrow, wide and highest
_FORMS = (
    *((T, shape, "bf16") for T, shape in ((1, shapes.L3), (4, shapes.L3), (16, shapes.L3), (64, shapes.L3), (1, shapes.Q25))),
    *((T, shapes.L3, "fp32") for T in (1, 4, 64)),
)


def expected_union(shape: shapes.Shape, T: int) -> float:
    """Experts that T tokens choose together, if each chooses at random."""
    return shape.E * (1 - (1 - shape.K / shape.E) ** T)


def _constexprs(kind: str, T: int, shape: shapes.Shape, dtype: str, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tile = _tiles.decode_tile(T, shape.H, shape.E, shape.s, shape.K, 4 if dtype == "fp32" else 2, backend)
    product = {"UPCAST": False, "PRECISION": "ieee"}
    if kind == "up":
        strides = {"stride_xh": 1, "stride_gh": 1, "stride_ik": 1, "stride_wk": 1}
        known = {"ACTIVATION": "silu", "BY_PAIR": T * shape.K < shape.E, **product, **tile.up, **strides}
        return known, tile.up_options
    if kind == "down":
        return {**product, **tile.down, "stride_dh": 1}, tile.down_options
    return {"SPLITS": tile.splits, "BLOCK": 256}, {"num_warps": 2}


def _variants(kind: str) -> Callable[[str], list[Variant]]:
    def variants(backend: str) -> list[Variant]:
        names = _kernel(kind).load().arg_names
        found = []
        for T, shape, dtype in _FORMS:
            constexprs, options = _constexprs(kind, T, shape, dtype, backend)
            others = {"indices_ptr": "*i64", "list_ptr": "*i32", "partial_ptr": "*fp32", "weights_ptr": "*fp32"}

            def type_of(name: str, others: dict[str, str] = others, dtype: str = dtype) -> str:
                return others.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

            signature = {n: type_of(n) for n in names if n not in constexprs}
            aligned = ("H", "s", "numel", "stride_xt", "stride_ge", "stride_gn", "stride_de", "stride_ds")
            divisible = tuple(n for n in names if n in aligned and n not in constexprs)
            found.append(Variant(f"{dtype} {shape.name} T={T}", signature, constexprs, options, divisible))
        return found

    return variants


def _costs(kind: str) -> dict[str, Cost]:
    costs = {}
    for shape in _SHAPES:
        for T in _TOKENS:
            experts = expected_union(shape, T)
            tile = _tiles.decode_tile(T, shape.H, shape.E, shape.s, shape.K, 2, "cuda")
            weights = 2.0 * experts * shape.s * shape.H  # bytes of one projection
            hidden, partial = 2.0 * experts * T * shape.s, 4.0 * tile.splits * T * shape.H
            byte_count = {"up": 2 * weights + hidden, "down": weights + hidden + partial, "sum": partial + 2.0 * T * shape.H}
            costs[f"{shape.name} T={T}"] = Cost(byte_count[kind])
    return costs


def _kernel(kind: str) -> Kernel:
    function = f"dotmoe_kernels.experts.decode.gpu:_decode_{kind}_kernel"
    return Kernel(f"decode_{kind}", function, _variants(kind), _costs(kind))


DECODE = tuple(_kernel(kind) for kind in ("up", "down", "sum"))
