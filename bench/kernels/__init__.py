"""The registry of Triton kernels: what ``tests/compile`` compiles and ``python -m bench.kernels`` reports, without a GPU.

A kernel joins by one entry in the file of its step, and so in KERNELS:

    Kernel(
        name="rounding",                                              # as in reports and in --kernel
        function="dotmoe_kernels.rounding.gpu:_deferred_acceptance_kernel",   # module:attribute, imported when it is compiled
        variants=_rounding,                                           # backend -> the forms it is launched in
        costs=_rounding_costs,                                        # {shape: Cost}, what one launch does there
        needs={"sm_90": ("wgmma",)},                                  # instructions (compile_report.py) that the tests insist on
    )

``variants("cuda" | "hip")`` gives a list of ``Variant``, one for each entry of the kernel's tile table in ``_tiles`` (and for
each dtype that changes the code); the first is the one that the tests compile. ``Variant.signature`` types every argument that
is not a constexpr in Triton's words ("*fp32", "*bf16", "*i64", "i32", "fp32"); pointers count as aligned to 16 bytes, and so do
the values of the integers named in ``divisible``. ``constexprs`` and ``options`` (num_warps, num_stages) are those of the launch.
Arguments that the launch gives as None or 1 belong into ``constexprs``.
"""

from __future__ import annotations

from bench.kernels.decode import DECODE
from bench.kernels.dispatch import DISPATCH
from bench.kernels.grouped import EXPERTS
from bench.kernels.masked import MASKED
from bench.kernels.registry import Kernel, with_launch_forms
from bench.kernels.rounding import ROUNDING
from bench.kernels.routing import ROUTING
from bench.kernels.transport import TRANSPORT

KERNELS: dict[str, Kernel] = {
    kernel.name: with_launch_forms(kernel) for kernel in (*TRANSPORT, ROUNDING, *ROUTING, *DISPATCH, *EXPERTS, *DECODE, *MASKED)
}
