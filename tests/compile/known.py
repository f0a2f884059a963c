"""What a compiler is known to spill, by Triton's release: bytes of local memory on sm_90 that a test lets pass."""

from __future__ import annotations

# release -> kernel -> bytes at most. Others keep all of it in registers
SPILLS = {
    (3, 6): {
        "_route_top_k_kernel": 8,  # softmax at E 148
        "_deferred_acceptance_kernel": 152,  # float64
    },
    (3, 9): {"_plan_gradient_kernel": 8},  # TF32
}


def allowed_spill(kernel: str, triton: str) -> int:
    return SPILLS.get(tuple(int(part) for part in triton.split(".")[:2]), {}).get(kernel, 0)
