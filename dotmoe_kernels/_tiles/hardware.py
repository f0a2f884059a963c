"""The hardware: rates that predictions are made from, and what a device says of itself."""

from __future__ import annotations

import torch

BACKEND = "hip" if torch.version.hip else "cuda"

# of one H200, measured elsewhere: what predictions are made from
H200_BANDWIDTH = 4.3e12  # bytes/s, device copy, read plus written
H200_BF16 = 790e12  # flops/s, bfloat16 matrix product
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


def before_hopper(device: torch.device) -> bool:
    """Whether sums lie in the registers of the warps that multiply, without wgmma."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 9
