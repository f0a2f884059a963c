"""The masked hidden layer's entries in the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import shapes
from bench.kernels.registry import BF16, Cost, Kernel, Variant
from dotmoe_kernels import _tiles

_TOKENS = {"alignment": 8192, "mid": 256}
_ROWS = ("stride_gt", "stride_ut", "stride_dt", "stride_xt", "stride_ge", "stride_gn", "stride_gf", "stride_uf", "stride_dh")
_LAST = ("stride_gf", "stride_uf", "stride_df", "stride_ik", "stride_wk", "stride_xh", "stride_gh")
_FORMS = (("bf16", shapes.L3), ("bf16", shapes.Q25), ("bf16", shapes.COARSE), ("fp32", shapes.L3))


_THIN = shapes.Shape("s 56", 4096, 256, 56, 64)


def _forms(kind: str) -> tuple[tuple[str, shapes.Shape], ...]:
    if kind.startswith("up"):
        return _FORMS[:1]  # float32 takes PyTorch's product
    return (*_FORMS, ("bf16", _THIN)) if kind.startswith(("slots", "soft")) else _FORMS


def _constexprs(kind: str, shape: shapes.Shape, dtype: str, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    product = {"UPCAST": False, "PRECISION": "ieee"}
    last = dict.fromkeys(_LAST, 1)
    if kind.startswith("pack"):
        last = dict.fromkeys(("stride_gh", "stride_uh", "stride_df"), 1)
    if kind == "mask":
        tile, options = _tiles.mask_tile(shape.E)
        return {**tile, **last}, options
    if kind == "pack rows":
        tile, options = _tiles.row_tile(shape.H, torch.bfloat16)
        return {**tile, **last}, options
    if kind == "pack columns":
        tile, options = _tiles.columns_tile(shape.F, 4 if dtype == "fp32" else 2, backend)
        return {**tile, **last}, options
    if kind.startswith("slots"):
        tile, options = _tiles.slots_tile(shape.s)
        return {"ACTIVATION": "silu", "UNIT": 8, **tile, **({"d_ptr": None} if kind == "slots" else {})}, options
    if kind.startswith("soft"):
        tile, options = _tiles.masked_tile("plan", shape.s, shape.E, dtype == "fp32")
        return {
            "ACTIVATION": "silu",
            "UNIT": 8,
            **product,
            **tile,
            **({"dplan_ptr": None} if kind == "soft router" else {}),
        }, options
    if kind.startswith("up"):
        tile, options = _tiles.masked_up_tile(64 if kind == "up, few" else 256, shape.s, backend)
        return {"ACTIVATION": "silu", **product, **tile, **last}, options
    width = shape.s if kind == "view hidden" else shape.F
    tile, options = _tiles.masked_tile(kind.removeprefix("view "), width, shape.E, dtype == "fp32")
    known = {"ACTIVATION": "silu", "NEEDS_GATE": True, "NEEDS_R": True, **product, **tile, **last}
    return known | ({"expert_of_ptr": None} if kind == "view hidden" else {}), options


def _variants(function: str, kinds: tuple[str, ...]) -> Callable[[str], list[Variant]]:
    def variants(backend: str) -> list[Variant]:
        names = Kernel("", function, lambda _: []).load().arg_names
        others = dict.fromkeys(("indices_ptr", "expert_of_ptr"), "*i64")
        others |= dict.fromkeys(("order_ptr", "starts_ptr", "token_ptr", "source_ptr", "offsets_ptr"), "*i32")
        others |= dict.fromkeys(("dr_ptr", "dplan_ptr", "weights_ptr"), "*fp32")
        found = []
        for kind in kinds:
            for dtype, shape in _forms(kind):
                given, options = _constexprs(kind, shape, dtype, backend)
                constexprs = {n: v for n, v in given.items() if n in names}

                def type_of(name: str, dtype: str = dtype) -> str:
                    return others.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

                signature = {n: type_of(n) for n in names if n not in constexprs}
                divisible = tuple(n for n in signature if n in ("F", "H", "C", "share", *_ROWS) or (n == "s" and shape.s % 16 == 0))
                found.append(Variant(f"{dtype} {shape.name} {kind}", signature, constexprs, options, divisible))
        return found

    return variants


def _costs(passes: float, tokens: tuple[str, ...], product: bool = False) -> dict[str, Cost]:
    """``passes`` reads or writes of [T, F] in 16 bits; ``product``: with [T, F] x [F, E]."""
    costs = {}
    for shape in (shapes.L3, shapes.Q25):
        for T in (_TOKENS[name] for name in tokens):
            flops = 2.0 * T * shape.F * shape.E if product else 0.0
            costs[f"{shape.name} T={T}"] = Cost(2.0 * passes * T * shape.F, flops, BF16)
    return costs


def _kernel(name: str, module: str, kinds: tuple[str, ...], costs: dict[str, Cost], **more: Any) -> Kernel:
    function = f"dotmoe_kernels.experts.masked.gpu.{module}:_{name}_kernel"
    return Kernel(name, function, _variants(function, kinds), costs, **more)


_MASK_COSTS = {f"{s.name} T={T}": Cost(8.0 * T * s.K + 2.0 * T * s.E) for s in (shapes.L3, shapes.Q25) for T in _TOKENS.values()}
_UP_COSTS = {
    f"{s.name} T={T}": Cost(4.0 * s.F * s.H + 2.0 * T * (s.H + s.F), 4.0 * T * s.F * s.H, BF16)
    for s in (shapes.L3, shapes.Q25)
    for T in (64, 256)
}
_SHAPES = (shapes.L3, shapes.Q25)
_SLOTS_COSTS = {
    f"{s.name} T=8192{name}": Cost(2.0 * passes * 8192 * s.K * s.s)
    for s in _SHAPES
    for name, passes in (("", 3), (", backward", 5))
}

MASKED = (
    _kernel("masked_up", "hidden", ("up", "up, few"), _UP_COSTS, needs={"sm_90": ("wgmma",)}),
    _kernel("expert_mask", "hidden", ("mask",), _MASK_COSTS),
    _kernel("masked_hidden", "hidden", ("hidden", "view hidden"), _costs(3, ("alignment", "mid"))),
    _kernel("masked_hidden_bwd", "gradients", ("backward",), _costs(5, ("alignment",), product=True)),
    _kernel("plan_gradient", "gradients", ("plan",), _costs(3, ("alignment",), product=True)),
    _kernel("pack_rows", "slots", ("pack rows",), {s.name: Cost(8.0 * s.F * s.H) for s in _SHAPES}),
    _kernel("pack_columns", "slots", ("pack columns",), {s.name: Cost(4.0 * s.F * s.H) for s in _SHAPES}),
    _kernel("slots_hidden", "slots", ("slots", "slots backward"), _SLOTS_COSTS),
    _kernel("slots_soft", "slots", ("soft", "soft router"), _costs(3, ("alignment",), product=True)),
)
