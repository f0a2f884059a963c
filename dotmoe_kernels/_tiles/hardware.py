"""The hardware: rates that predictions are made from, and what a device says of itself."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

BACKEND = "hip" if torch.version.hip else "cuda"


class Span(NamedTuple):
    """From the low to the high end of what is not known better."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low * self.high) ** 0.5


class GPU(NamedTuple):
    """What predictions are made from: rates that kernels are seen to reach, not those of a data sheet."""

    name: str
    multiprocessors: int
    clock: Span  # cycles/s under load
    bandwidth: Span  # bytes/s of a device copy, read plus written
    l2: Span  # bytes/s that the multiprocessors draw from L2 [estimate]
    l2_bytes: float
    bf16: Span  # flops/s of a product in the vendor's library
    fp32: float  # flops/s outside the matrix units
    launch: Span  # seconds from the end of a kernel to the start of the next in a stream or a graph [estimate]
    barrier: Span  # seconds of a barrier across the grid: an atomic addition, and reading it until all have come [estimate]


# of one H200, measured elsewhere
H200_BANDWIDTH = 4.3e12  # bytes/s, device copy, read plus written
H200_BF16 = 790e12  # flops/s, bfloat16 matrix product
# the same multiprocessors with other memory; an H100 copies at about the same share of its published 3.35 TB/s
H200 = GPU(
    "H200",
    multiprocessors=132,
    clock=Span(1.5e9, 1.98e9),
    bandwidth=Span(4.1e12, 4.4e12),
    l2=Span(5.5e12, 8e12),
    l2_bytes=50e6,
    bf16=Span(700e12, 790e12),
    fp32=60e12,
    launch=Span(1.5e-6, 3.5e-6),
    barrier=Span(1e-6, 3e-6),
)
H100 = H200._replace(name="H100", bandwidth=Span(2.8e12, 3.1e12), bf16=Span(650e12, 790e12))
GPUS = (H100, H200)

# cycles of what a program waits for before its first product and behind its last [estimates]: a barrier of its warps, a shuffle, a
# dependent access to global memory (from L2 to the device's), and the start of a program where another has ended
BARRIER_CYCLES, SHUFFLE_CYCLES = Span(20, 45), Span(22, 32)
ACCESS_CYCLES, START_CYCLES = Span(300, 800), Span(200, 600)
TRITON_SPAN = Span(0.65, 0.85)  # of the vendor's rate, which the inner loop of a product in Triton reaches [estimate]
ROUND_TRIP = Span(0.6e-6, 1.5e-6)  # seconds of a dependent access to the device's memory with its barrier [estimate]
PROGRAM_BANDWIDTH = Span(30e9, 70e9)  # bytes/s that a single program draws [estimate]
UNHIDDEN = 0.25  # of the shorter of memory and arithmetic, which the longer does not hide at the high end [estimate]

NVLINK = 450e9  # bytes/s a direction between two GPUs of a machine, as published
NETWORK = 50e9  # bytes/s a direction and GPU between machines, as published of 400 Gbit/s adapters
GPUS_A_MACHINE = 8
TRITON_SHARE = 0.75  # of that rate, which a product in Triton reaches [estimate]

# bytes of one float32 [tokens, vocabulary] of a chunk of the distillation loss: a core's cache; what keeps a GPU's product busy
LOSS_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def multiplies_into_float32(x: torch.Tensor) -> bool:
    """Whether one product of PyTorch's takes 16-bit tensors like ``x`` and leaves their sums in float32."""
    return BACKEND == "cuda" and x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


@cache
def has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether this machine's processor multiplies matrices of ``dtype`` by instructions of their own (AMX), as far as PyTorch
    tells."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("amx_tile")) and bool(found.get({torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype, "")))


def before_hopper(device: torch.device) -> bool:
    """Whether sums lie in the registers of the warps that multiply, without wgmma."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 9
