"""The grouped experts' entries in the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import shapes
from bench.kernels.registry import BF16, Cost, Kernel, Variant
from dotmoe_kernels import _tiles
from dotmoe_kernels._tiles.grouped import down_launch, up_launch
from dotmoe_kernels._tiles.launches import Launch

_TOKENS = (512, 8192)
_SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
_GPU = "dotmoe_kernels.experts"
_UP, _DOWN = "grouped.gpu.up:_grouped_up_kernel", "grouped.gpu.down:_grouped_mm_kernel"
_JOINT, _REST = "grouped.gpu.joint:_grouped_joint_up_kernel", "grouped.gpu.stationary:_grouped_stationary_kernel"
_BACKWARD, _WEIGHT = "training.gpu:_grouped_hidden_bwd_kernel", "grouped.gpu.down:_grouped_weight_kernel"
_TYPES = {
    "token_ptr": "*i64",
    "source_ptr": "*i64",
    "offsets_ptr": "*i32",
    "tiles_ptr": "*i32",
    "weights_ptr": "*fp32",
    "dweights_ptr": "*fp32",
}
_KEPT = {"token_ptr": "*i32", "source_ptr": "*i32"}  # the routing between the passes
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WIDTH = 128  # s of the variants
_EXPERTS = 112
_ROWS = (2048, 64, 32, 16)  # rows an expert: one for each tile
_EARLY, _LATE = ("sm_80",), ("sm_90", "sm_100")  # as ``_tiles.before_hopper`` has it
_TRAINING = (_BACKWARD, _WEIGHT)


def _variant(function: str, name: str, dtype: str, constexprs: dict[str, Any], options: dict[str, Any]) -> Variant:
    names = Kernel("", f"{_GPU}.{function}", lambda _: []).load().arg_names
    constexprs = {n: v for n, v in {"UPCAST": False, "PRECISION": "ieee", **constexprs}.items() if n in names}
    types = _TYPES | _KEPT if function in _TRAINING else _TYPES
    signature = {n: types.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names if n not in constexprs}
    integers = tuple(n for n in signature if n.startswith("stride") or n in ("H", "s", "Kdim", "N"))
    return Variant(name, signature, constexprs, options, integers)


def _up(backend: str) -> list[Variant]:
    found = []
    for dtype, rows in [*(("bf16", rows) for rows in _ROWS), ("fp16", 2048), ("fp32", 2048), ("fp32", 16)]:
        last = {"stride_xh": 1, "stride_gh": 1, "ACTIVATION": "silu", "EVEN": True, "BLOCK_E": 128}
        bare = {"source_ptr": None, "weights_ptr": None, "z_ptr": None, "DENSE": False}
        forms: list[tuple[str, dict[str, Any]]] = [("", bare)]
        if rows == 2048:
            forms.append((" keep", {n: v for n, v in bare.items() if n != "z_ptr"}))
            forms.append((" dense", {"z_ptr": None, "DENSE": True}))
            forms.append((" odd H", {**bare, "EVEN": False, "ACTIVATION": "gelu"}))
        for form, constexprs in forms:
            name, keep = f"{dtype} rows<={rows}{form}", form == " keep"
            for targets, early in ((_LATE, False), (_EARLY, True)) if backend == "cuda" else (((), False),):
                tile = _tiles.grouped_up_tile(rows * _EXPERTS, _EXPERTS, _WIDTH, _DTYPES[dtype], backend, keep=keep, early=early)
                one = _variant(_UP, name, dtype, {**last, **constexprs, **tile.block}, tile.options)
                found.append(replace(one, targets=targets))
    return found


def _mm(backend: str) -> list[Variant]:
    found = []
    for dtype, rows in [*(("bf16", rows) for rows in _ROWS), ("fp16", 2048), ("fp32", 2048), ("fp32", 16)]:
        tile = _tiles.grouped_mm_tile(rows * _EXPERTS, _EXPERTS, _WIDTH, 4096, _DTYPES[dtype], backend)
        found_tiles = {"tiles_ptr": None}
        bare = {"token_ptr": None, "source_ptr": None, "weights_ptr": None, "ATOMIC": False, "ZERO": False, **found_tiles}
        base = {"stride_ak": 1, "EVEN": True, "EVEN_N": True, "BLOCK_E": 128}
        forms: list[tuple[str, dict[str, Any]]] = [("", {**base, "stride_bn": 1, **bare})]
        if rows == 2048:
            forms.append((" of contiguous down_proj", {**base, "stride_bk": 1, **bare}))
            forms.append((" odd", {**base, "stride_bn": 1, **bare, "EVEN": False, "EVEN_N": False, "ZERO": True}))
            forms.append((" atomics", {**base, "stride_bk": 1, "ATOMIC": True, "ZERO": False, **found_tiles}))
        if dtype != "fp32":
            forms.append((" table", {**base, "stride_bn": 1, **{n: v for n, v in bare.items() if n != "tiles_ptr"}}))
        for form, constexprs in forms:
            name = f"{dtype} rows<={rows}{form}"
            found.append(_variant(_DOWN, name, dtype, {**constexprs, **tile.block}, tile.options))
    return found


def _joint(backend: str) -> list[Variant]:
    """In 16 bits, where it is launched; float32 for the interpreter's sake compiles too."""
    found = []
    for dtype, rows in [*(("bf16", rows) for rows in _ROWS), ("fp16", 2048), ("fp32", 16)]:
        base = {"stride_xh": 1, "stride_gh": 1, "ACTIVATION": "silu", "EVEN": True}
        forms: list[tuple[str, dict[str, Any]]] = [("", {**base, "z_ptr": None})]
        if rows == 2048:
            forms.append((" keep", base))
            forms.append((" odd H", {**base, "z_ptr": None, "EVEN": False, "ACTIVATION": "gelu"}))
        for form, constexprs in forms:
            for targets, early in ((_LATE, False), (_EARLY, True)) if backend == "cuda" else (((), False),):
                keep = form == " keep"
                tile = _tiles.grouped_up_tile(rows * _EXPERTS, _EXPERTS, _WIDTH, _DTYPES[dtype], backend, keep=keep, early=early)
                one = _variant(_JOINT, f"{dtype} rows<={rows}{form}", dtype, {**constexprs, **tile.block}, tile.options)
                found.append(replace(one, targets=targets))
    return found


def _stationary(backend: str) -> list[Variant]:
    found = []
    for dtype, rows, Kdim in [*(("bf16", rows, _WIDTH) for rows in _ROWS), ("bf16", 2048, 2 * _WIDTH), ("fp16", 2048, _WIDTH)]:
        base = {"stride_ak": 1, "EVEN": True, "EVEN_N": True}
        forms: list[tuple[str, dict[str, Any]]] = [("", {**base, "stride_bn": 1})]
        if rows == 2048:
            forms.append((" of contiguous down_proj", {**base, "stride_bk": 1}))
            forms.append((" odd", {**base, "stride_bn": 1, "EVEN": False, "EVEN_N": False}))
        for form, constexprs in forms:
            for targets, early in ((_LATE, False), (_EARLY, True)) if backend == "cuda" else (((), True),):
                tile = _tiles.grouped_stationary_tile(rows * _EXPERTS, _EXPERTS, Kdim, 4096, _DTYPES[dtype], backend, early=early)
                name = f"{dtype} rows<={rows} Kdim={Kdim}{form}"
                found.append(replace(_variant(_REST, name, dtype, {**constexprs, **tile.block}, tile.options), targets=targets))
    return found


def _hidden_bwd(backend: str) -> list[Variant]:
    found = []
    for dtype, rows in [*(("bf16", rows) for rows in _ROWS), ("fp16", 2048), ("fp32", 2048), ("fp32", 16)]:
        tile = _tiles.grouped_hidden_bwd_tile(rows * _EXPERTS, _EXPERTS, _WIDTH, _DTYPES[dtype], backend)
        base = {"stride_dh": 1, "ACTIVATION": "silu", "PRODUCT": True, "EVEN": True, "EVEN_N": True, "BLOCK_E": 128}
        forms: list[tuple[str, dict[str, Any]]] = [("", {**base, "stride_wh": 1})]
        if rows == 2048:
            forms.append((" of contiguous down_proj", {**base, "stride_ws": 1}))
            forms.append((" odd", {**base, "stride_wh": 1, "EVEN": False, "EVEN_N": False, "ACTIVATION": "gelu"}))
            forms.append((" frozen experts", {**base, "stride_wh": 1, "h_ptr": None}))
            forms.append((" router only", {**base, "stride_wh": 1, "h_ptr": None, "dz_ptr": None}))
            forms.append((" down_proj only", {**base, "PRODUCT": False, "dz_ptr": None, "dweights_ptr": None}))
        for form, constexprs in forms:
            name = f"{dtype} rows<={rows}{form}"
            found.append(_variant(_BACKWARD, name, dtype, {**constexprs, **tile.block}, tile.options))
    return found


def _weight(backend: str) -> list[Variant]:
    found = []
    for dtype in _DTYPES:
        last = {"stride_ak": 1, "stride_gn": 1}
        forms: list[tuple[str, dict[str, Any]]] = [
            ("", {**last, "stride_bn": 1, "token_ptr": None}),
            (" gathered", {**last, "stride_bn": 1}),
            (" gathered, of contiguous down_proj", {**last, "stride_bk": 1}),
        ]
        for form, constexprs in forms:
            block, options = _tiles.grouped_weight_tile(_DTYPES[dtype], backend, gathered="token_ptr" not in constexprs)
            found.append(_variant(_WEIGHT, f"{dtype}{form}", dtype, {**constexprs, **block}, options))
    return found


def _costs(bytes_of: Callable[[int, shapes.Shape], float], flops: float) -> dict[str, Cost]:
    """In bfloat16; ``flops``: how often S s H. Every array is read or written once, but the rows of x once a slot."""
    return {
        f"{shape.name} T {T}": Cost(bytes_of(T * shape.K, shape), flops * T * shape.K * shape.s * shape.H, BF16)
        for shape in _SHAPES
        for T in _TOKENS
    }


def _launches(
    of: Callable[[int, shapes.Shape], Launch], named: tuple[shapes.Shape, ...] = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
) -> dict[str, Launch]:
    """In bfloat16, programs and what they wait for counted as well."""
    return {f"{shape.name} T {T}": of(T * shape.K, shape) for shape in named for T in _TOKENS}


_WGMMA: dict[str, tuple[str, ...]] = {"sm_90": ("wgmma",)}
EXPERTS = (
    Kernel(
        "grouped_up",
        f"{_GPU}.{_UP}",
        _up,
        _launches(lambda S, c: up_launch("halves", S, c.E, c.s, c.H)),
        _WGMMA,
    ),
    Kernel(
        "grouped_mm",
        f"{_GPU}.{_DOWN}",
        _mm,
        _launches(lambda S, c: down_launch("tiles", S, c.E, c.s, c.H))
        | {f"{shape}, table": launch for shape, launch in _launches(lambda S, c: down_launch("table", S, c.E, c.s, c.H)).items()},
        _WGMMA,
    ),
    Kernel(
        "grouped_joint_up",
        f"{_GPU}.{_JOINT}",
        _joint,
        _launches(lambda S, c: up_launch("joint", S, c.E, c.s, c.H)),
        _WGMMA,
    ),
    Kernel(
        "grouped_stationary",
        f"{_GPU}.{_REST}",
        _stationary,
        _launches(lambda S, c: down_launch("stationary", S, c.E, c.s, c.H), (shapes.L3, shapes.Q25)),
        _WGMMA,
    ),
    Kernel(
        "grouped_hidden_bwd",
        f"{_GPU}.{_BACKWARD}",
        _hidden_bwd,
        _costs(lambda S, c: 2 * (c.F * c.H + S * c.H + 5 * S * c.s), 2),
        _WGMMA,
    ),
    Kernel(
        "grouped_weight",
        f"{_GPU}.{_WEIGHT}",
        _weight,
        _costs(lambda S, c: 2 * (c.F * c.H + S * c.s + S * c.H), 2),
        _WGMMA,
    ),
)
