"""The transport's entries in the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import shapes
from bench.kernels.registry import FP32, Cost, Kernel, Variant
from dotmoe_kernels import _tiles

_STEPS = 50
_SIZES = (("Q25 x 28", 28, shapes.Q25), ("Q25 x 1", 1, shapes.Q25), ("L3 x 32", 32, shapes.L3))
_EXPERTS = (148, 112, 8, 512)  # Q25, which is two column tiles; L3; coarse; the most
_OF_AFFINITY = ("a_ptr", "x_ptr", "da_ptr")  # in the affinity's own dtype
_TYPES = {"count_ptr": "*i64", "met_ptr": "*i64", "plain_ptr": "*i32", "tol": "fp32", "safe": "fp32"}


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile_of(kind: str, E: int, backend: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Constexprs and launch options, as the launchers put them together."""
    if kind == "gram":
        block, options = _tiles.gram_tiles(E, backend)
        return {**block, "BLOCKS": -(-E // block["BLOCK_M"])}, options
    if kind in ("error", "range"):
        return {"BLOCK_E": _power_of_two(max(E, 16))}, {"num_warps": 4}
    tile = _tiles.transport_tiles(E, kind, backend)
    return dict(tile.blocks), tile.options


def _variants(function: str, kind: str) -> Callable[[str], list[Variant]]:
    def variants(backend: str) -> list[Variant]:
        names = Kernel("", function, lambda _: []).load().arg_names
        found = []
        sizes = [*(("fp32", E, True) for E in _EXPERTS), *([("bf16", 148, True)] if set(names) & set(_OF_AFFINITY) else [])]
        for dtype, E, exact_rows in [*sizes, *([("fp32", 148, False)] if "EXACT_ROWS" in names else [])]:
            tile, options = _tile_of(kind, E, backend)
            vec = next(v for v in (16, 8, 4, 2, 1) if E % v == 0)  # what of a row's stride is known
            last = {n: 1 for n in names if n in ("stride_ae", "stride_xe", "stride_ge")}
            known = {"E": E, "VEC": vec, "VEC_G": vec, "EXACT_ROWS": exact_rows, "NEEDS_TAU": True, "BLOCK_P": 16, "BLOCK_T": 16}
            constexprs = {**{n: v for n, v in {**known, **tile}.items() if n in names}, **last}

            def type_of(name: str, dtype: str = dtype) -> str:
                if name in _OF_AFFINITY:
                    return f"*{dtype}"
                return _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")

            signature = {n: type_of(n) for n in names if n not in constexprs}
            divisible = tuple(n for n in names if n in ("stride_al", "stride_xl", "stride_gl"))
            found.append(Variant(f"{dtype} E={E}{'' if exact_rows else ' columns'}", signature, constexprs, options, divisible))
        return found

    return variants


def _costs(passes: float, flops: Callable[[shapes.Shape], float], rate: float = FP32) -> dict[str, Cost]:
    """``passes`` reads or writes of [L, F, E] in float32, ``flops`` an element."""
    costs = {}
    for name, L, shape in _SIZES:
        elements = L * shape.F * shape.E
        costs[name] = Cost(4 * elements * passes, elements * flops(shape), rate)
    return costs


def _each(count: float) -> Callable[[shapes.Shape], float]:
    return lambda _: count


def _kernel(name: str, module: str, kind: str, costs: dict[str, Cost]) -> Kernel:
    function = f"dotmoe_kernels.transport.gpu.{module}:_{name}_kernel"
    return Kernel(name, function, _variants(function, kind), costs)


def _of_history(rows: float) -> dict[str, Cost]:
    """Kernels that see potentials or column sums only: ``rows`` of [L, E]; one program a layer, row after row."""
    return {name: Cost(4 * L * shape.E * rows, programs=L, round_trips=rows) for name, L, shape in _SIZES}


TRANSPORT = (
    _kernel("sinkhorn_first_step", "streaming", "first", _costs(1, _each(20))),
    _kernel("sinkhorn_step", "streaming", "step", _costs(1, _each(10))),
    _kernel("sinkhorn_persistent", "persistent", "persistent", _costs(_STEPS, _each(10 * _STEPS))),
    _kernel("sinkhorn_columns", "ending", "first", _costs(1, _each(20))),  # final="column"
    _kernel("sinkhorn_plan", "ending", "plan", _costs(2, _each(12))),
    _kernel("sinkhorn_error", "ending", "error", _of_history(8)),
    _kernel("sinkhorn_adjoint_range", "adjoint", "range", _of_history(_STEPS / 16)),
    _kernel("sinkhorn_adjoint_start", "adjoint", "adjoint", _costs(2, _each(10))),
    _kernel("sinkhorn_adjoint_step", "adjoint", "adjoint", _costs(1, _each(8))),
    _kernel("sinkhorn_adjoint_plain", "plain", "plain", _of_history(4)),  # where no step needs it
    _kernel("sinkhorn_adjoint_finish", "product", "finish", _costs(4, _each(4 * _STEPS + 8))),
    _kernel("sinkhorn_stats", "gram", "stats", _costs(2, _each(8))),
    _kernel("sinkhorn_gram", "gram", "gram", _costs(1, lambda shape: shape.E + 64)),
    _kernel("sinkhorn_apply", "gram", "apply", _costs(4, _each(8))),
)
