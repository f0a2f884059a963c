"""Peak extra memory of a call, by the operating system: a fresh process, its peak resident size minus what it held before.

    python -m bench.memory bench.bench_transport NAME      prints bytes

The module's ``memory_call(NAME)`` builds the inputs, warms the libraries up on something small and returns the call. The peak
is the high-water mark of the resident set (VmHWM, set back before the call through /proc/self/clear_refs; without it ru_maxrss).
It counts everything, the scratch of the math libraries and the outputs included, and not only what one allocator reports.
glibc is told to map every block above 64 KiB, so that freed blocks leave the resident set and the mark follows the live bytes.

What autograd keeps between forward and backward is counted instead, storage by storage.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bench.machine import ROOT
from dotmoe_kernels.conversion.machine import forget_peak, process_memory


def measure_here(module: str, name: str) -> int:
    """Bytes beyond those held before the call, at the call's peak; in this process."""
    call = importlib.import_module(module).memory_call(name)
    gc.collect()
    if forget_peak():
        before = process_memory("VmRSS")
        call()
        return max(process_memory("VmHWM") - before, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def peak_extra_bytes(module: str, name: str) -> int:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", module, name],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"bench.memory {module} {name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def kept_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a call for its backward pass, beyond those of ``held`` (the inputs) and of the output."""
    kept: dict[int, int] = {}

    def weigh(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(weigh, lambda tensor: tensor):
        output = forward()
    for tensor in (*held, output):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


if __name__ == "__main__":
    print(measure_here(sys.argv[1], sys.argv[2]))
