"""What a compiler is known to spill, by Triton's release: bytes of local memory on sm_90 that a test lets pass."""

from __future__ import annotations

# release -> kernel -> bytes at most. A newer Triton keeps all of them in registers
SPILLS = {
    (3, 6): {"_route_top_k_kernel": 8, "_deferred_acceptance_kernel": 152},  # softmax at E 148; float64
}


def allowed_spill(kernel: str, triton: str) -> int:
    return SPILLS.get(tuple(int(part) for part in triton.split(".")[:2]), {}).get(kernel, 0)
