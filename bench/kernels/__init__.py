"""The registry of Triton kernels: what ``tests/compile`` compiles and ``bench.kernels.compile_report`` reports, without a GPU.

A kernel joins by one entry in KERNELS:

    Kernel(
        name="rounding",                                              # as in reports and in --kernel
        function="dotmoe_kernels.rounding.gpu:_deferred_acceptance_kernel",   # module:attribute, imported when it is compiled
        variants=_rounding,                                           # backend -> the forms it is launched in
        costs=_rounding_costs,                                        # {shape: Cost}, what one launch does there
        needs={"sm_90": ("wgmma",)},                                  # instructions (compile_report.py) that the tests insist on
    )

``variants("cuda" | "hip")`` gives a list of ``Variant``, one for each entry of the kernel's tile table in ``_tiles.py`` (and for
each dtype that changes the code); the first is the one that the tests compile. ``Variant.signature`` types every argument that
is not a constexpr in Triton's words ("*fp32", "*bf16", "*i64", "i32", "fp32"); pointers count as aligned to 16 bytes, and so do
the values of the integers named in ``divisible``. ``constexprs`` and ``options`` (num_warps, num_stages) are those of the launch.
Arguments that the launch gives as None or 1 belong into ``constexprs``.
"""

from __future__ import annotations

from bench import shapes
from bench.kernels.decode import DECODE
from bench.kernels.dispatch import DISPATCH
from bench.kernels.grouped import EXPERTS
from bench.kernels.masked import MASKED
from bench.kernels.routing import ROUTING
from bench.kernels.transport import TRANSPORT
from bench.kernels.registry import Cost, Kernel, Variant
from dotmoe_kernels import _tiles

# --- rounding ----------------------------------------------------------------------------------------------------------


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
                **dict.fromkeys(("F", "E", "stride_sl", "stride_sf"), "i32"),
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


_ROUNDING = Kernel(
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

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (*TRANSPORT, _ROUNDING, *ROUTING, *DISPATCH, *EXPERTS, *DECODE, *MASKED)
}
