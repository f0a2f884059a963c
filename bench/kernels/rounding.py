"""Rounding's entry in the registry of kernels."""

from __future__ import annotations

from bench import shapes
from bench.kernels.registry import Cost, Kernel, Variant
from dotmoe_kernels import _tiles


def _rounding(backend: str) -> list[Variant]:
    import triton.language as tl

    variants = []
    dtypes = [("fp32", "i32", tl.int32, 2**31 - 1), ("bf16", "i32", tl.int32, 2**31 - 1), ("fp64", "i64", tl.int64, 2**63 - 1)]
    for scores, key, key_type, highest in dtypes:
        for most, (tile, options) in reversed(_tiles.rounding_tiles(backend).items()):
            integers = ("capacity_ptr", "begin_ptr", "ring_ptr", "state_ptr", "list_row_ptr")
            signature = {
                "scores_ptr": f"*{scores}",
                **dict.fromkeys(integers, "*i32"),
                "expert_of_ptr": "*i64",
                **dict.fromkeys(("bar_ptr", "list_key_ptr"), f"*{key}"),
                **dict.fromkeys(("F", "E", "most", "stride_sl", "stride_sf"), "i32"),
            }
            constexprs = {"stride_se": 1, "KEY": key_type, "HIGHEST": highest, **tile}
            variants.append(Variant(f"{scores} E<={most}", signature, constexprs, options))
    return variants


def _rounding_cost(layers: int, shape: shapes.Shape) -> Cost:
    """A converged plan takes 1.05 F proposals [counted in NumPy], and each reads a row. What waits for one another in a sweep: a
    tile's column blocks, its place in the ring, its list and its entries; and about 20 accesses of the selection [estimate]."""
    tile, _ = _tiles.rounding_tile(shape.E)
    proposals = 1.05 * shape.F
    trips = tile["SWEEP"] // tile["BLOCK_F"] * (3 + -(-shape.E // tile["BLOCK_E"])) + 20
    return Cost(4 * proposals * shape.E * layers, programs=layers, round_trips=trips * proposals / tile["SWEEP"])


ROUNDING = Kernel(
    name="rounding",
    function="dotmoe_kernels.rounding.gpu:_deferred_acceptance_kernel",
    variants=_rounding,
    costs={
        "Q25 x 28": _rounding_cost(28, shapes.Q25),
        "Q25 x 1": _rounding_cost(1, shapes.Q25),
        "L3 x 32": _rounding_cost(32, shapes.L3),
        "coarse x 32": _rounding_cost(32, shapes.COARSE),
    },
)
