"""Dispatch's entries in the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import shapes
from bench.kernels.registry import Cost, Kernel, Variant
from dotmoe_kernels import _tiles

_TOKENS = (8192, 65536)
_SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
_GPU = "dotmoe_kernels.dispatch.gpu"
_INTEGERS = {
    **dict.fromkeys(("slot_ptr", "offsets_ptr", "table_ptr", "tiles_ptr"), "*i32"),
    **dict.fromkeys(("token_ptr", "source_ptr"), "*i64"),
}
_OF_WEIGHTS = ("weights_ptr", "dweights_ptr", "stride_wt", "stride_wk")


def _path(function: str) -> str:
    file = "tiles" if "tiles" in function else "rows" if "rows" in function else "sort"
    return f"{_GPU}.{file}:{function}"


def _variant(function: str, name: str, rows: str, constexprs: dict[str, Any], options: dict[str, Any]) -> Variant:
    """Every pointer to rows in the dtype ``rows``, weights in float32; the last strides are 1."""
    names = Kernel("", _path(function), lambda _: []).load().arg_names
    last = dict.fromkeys(("stride_k", "stride_xh", "stride_yh", "stride_dh", "stride_wk"), 1)
    constexprs = {n: v for n, v in {**last, **constexprs}.items() if n in names}

    def type_of(argument: str) -> str:
        if argument in _OF_WEIGHTS[:2]:
            return "*fp32"
        return _INTEGERS.get(argument, f"*{rows}" if argument.endswith("_ptr") else "i32")

    signature = {n: type_of(n) for n in names if n not in constexprs}
    divisible = tuple(n for n in ("H", "stride_xt", "stride_ys", "stride_dt", "stride_ot") if n in signature)
    return Variant(name, signature, constexprs, options, divisible)


def _sort(function: str, alone: tuple[bool, ...]) -> Callable[[str], list[Variant]]:
    def variants(backend: str) -> list[Variant]:
        found = []
        for E, indices in ((148, "i64"), (8, "i64"), (512, "i64"), (1024, "i64"), (148, "i32")):
            tiles, scan, options = _tiles.dispatch_tiles(E)
            for single in alone:
                for most, tile in reversed(tiles.items()):
                    if not single and most < max(tiles):  # fewer pairs are one block
                        continue
                    constexprs: dict[str, Any] = {**tile, **scan, "ALONE": single, **({"table_ptr": None} if single else {})}
                    name = f"{indices} E={E}{f' S<={most}' if single else ''}"
                    entries = {"BLOCK_R": _tiles.row_tiles_tile(E)[0]["BLOCK_R"]}
                    if "place" in function:
                        with_tiles = {**constexprs, **entries, "BLOCK_M": 128, "GROUP_M": 16}
                        found.append(_variant(function, f"{name} tiles", indices, with_tiles, options))
                    constexprs |= {**entries, "tiles_ptr": None, "BLOCK_M": 1, "GROUP_M": 1}
                    found.append(_variant(function, name, indices, constexprs, options))
        return found

    return variants


def _scan(backend: str) -> list[Variant]:
    _, scan, options = _tiles.dispatch_tiles(148)
    return [_variant("_dispatch_scan_kernel", "any", "i32", scan, options)]


def _row_tiles(backend: str) -> list[Variant]:
    found = []
    for E in (112, 1025):
        block, options = _tiles.row_tiles_tile(E)
        found.append(_variant("_row_tiles_kernel", f"E={E}", "i32", {**block, "BLOCK_M": 128, "GROUP_M": 16}, options))
    return found


def _inverse(backend: str) -> list[Variant]:
    return [_variant("_inverse_slots_kernel", "i64", "i64", {"BLOCK_S": 1024}, {"num_warps": 4})]


def _rows(function: str, forms: dict[str, dict[str, Any]]) -> Callable[[str], list[Variant]]:
    def variants(backend: str) -> list[Variant]:
        import triton.language as tl

        found = []
        for dtype, of_torch in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)):
            tile, options = _tiles.row_tile(4096, of_torch)
            total = tl.float64 if dtype == "fp64" else tl.float32
            for name, form in forms.items():
                found.append(_variant(function, f"{dtype} {name}".strip(), dtype, {**tile, "SUM": total, **form}, options))
        return found

    return variants


_UNIT: dict[str, Any] = {"HAS_WEIGHTS": False, **dict.fromkeys(_OF_WEIGHTS[::2], None), "stride_wt": 0}
_WEIGHTED: dict[str, Any] = {"HAS_WEIGHTS": True}
_BACKWARD: dict[str, dict[str, Any]] = {
    "both": {**_WEIGHTED, "ROWS": True, "DOTS": True},
    "rows": {**_WEIGHTED, "ROWS": True, "DOTS": False, "ys_ptr": None, "stride_ys": 0, "dweights_ptr": None},
    "dots": {**_WEIGHTED, "ROWS": False, "DOTS": True, "dys_ptr": None},
    "unit": {**_UNIT, "ROWS": True, "DOTS": False, "ys_ptr": None, "stride_ys": 0, "dweights_ptr": None},
}


def _costs(size: Callable[[shapes.Shape, int], float], flops: Callable[[shapes.Shape, int], float]) -> dict[str, Cost]:
    return {f"{s.name} T={T}": Cost(size(s, T), flops(s, T)) for s in _SHAPES for T in _TOKENS}


def _table(s: shapes.Shape, T: int) -> float:
    """Bytes of the counts by expert and block."""
    block = max(_tiles.dispatch_tiles(s.E)[0])
    return 4.0 * s.E * -(-T * s.K // block)


def _no_flops(s: shapes.Shape, T: int) -> float:
    return 0.0


def _sums(s: shapes.Shape, T: int) -> float:
    return 2.0 * T * s.K * s.H


def _kernel(name: str, variants: Callable[[str], list[Variant]], costs: dict[str, Cost]) -> Kernel:
    return Kernel(name, _path(f"_{name}_kernel"), variants, costs)


DISPATCH = (
    _kernel(
        "dispatch_count",
        _sort("_dispatch_count_kernel", (False,)),
        _costs(lambda s, T: 8.0 * T * s.K + _table(s, T), _no_flops),
    ),
    _kernel("dispatch_scan", _scan, _costs(lambda s, T: 2 * _table(s, T), _no_flops)),
    _kernel(
        "dispatch_place",
        _sort("_dispatch_place_kernel", (False, True)),
        # a bitonic sort of 2^10 keys takes 55 steps of about 5 integer operations an element [estimate]
        _costs(lambda s, T: 28.0 * T * s.K + 2 * _table(s, T), lambda s, T: 275.0 * T * s.K),
    ),
    _kernel("row_tiles", _row_tiles, _costs(lambda s, T: 16.0 * (T * s.K / 128 + s.E), _no_flops)),
    _kernel("inverse_slots", _inverse, _costs(lambda s, T: 12.0 * T * s.K, _no_flops)),
    _kernel(
        "scatter_rows",
        _rows("_scatter_rows_kernel", {"": {}}),
        _costs(lambda s, T: 2.0 * T * s.H * (1 + s.K), _no_flops),
    ),
    _kernel(
        "gather_rows",
        _rows("_gather_rows_kernel", {"weighted": _WEIGHTED, "unit": _UNIT}),
        _costs(lambda s, T: 2.0 * T * s.H * (1 + s.K), _sums),
    ),
    _kernel(
        "gather_rows_bwd",
        _rows("_gather_rows_bwd_kernel", _BACKWARD),
        _costs(lambda s, T: 2.0 * T * s.H * (1 + 2 * s.K), lambda s, T: 2 * _sums(s, T)),
    ),
)
