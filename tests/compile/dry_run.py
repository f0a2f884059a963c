"""Every public op, forward and backward, at the sizes of real models up to the launch: arguments bound and specialised by Triton's
JIT, binaries compiled for sm_90, grids looked at. ``bench.gpu.fake`` stands for the device; nothing is launched.

    python tests/compile/dry_run.py FOLDER [--all] [--jobs N] [--shape NAME ...]

Of every kernel its first binary is compiled, with --all each; FOLDER/report.json says what came of it. In a process of its own,
without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed with the package

import dotmoe_kernels as dk
from bench.gpu import fake
from bench.kernels.compile_report import TARGETS, _read_cubin
from bench.shapes import COARSE, L3, MID, Q25, Shape

LARGEST_GRID = (2**31 - 1, 65535, 65535)
TARGET = "sm_90"
SHAPES = {shape.name: shape for shape in (L3, Q25, COARSE, MID)}
Case = tuple[str, Any]


def made(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").requires_grad_(learns)


def whole_pass(outputs: Any, *leaves: torch.Tensor) -> None:
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True)


def transport(shape: Shape) -> Iterator[Case]:
    def solve(final: str, backward: str, dtype: torch.dtype, layers: int = 2) -> None:
        affinity, tau, capacity = (
            made(layers, shape.F, shape.E, dtype=dtype, learns=True),
            made(layers, learns=True),
            made(shape.E, learns=True),
        )
        options = {"num_iters": 3, "tol": 1e-3, "final": final, "backward": backward, "return_info": True}
        plan, info = dk.sinkhorn(affinity, capacity, tau=tau, **options)
        whole_pass(plan, affinity, tau, capacity)
        dk.sinkhorn(affinity, init=info.log_v, **options)

    for final, backward in product(("row", "column"), ("unroll", "implicit")):
        yield f"sinkhorn {final} {backward}", lambda final=final, backward=backward: solve(final, backward, torch.float32)
    yield "sinkhorn in 16 bits", lambda: solve("row", "unroll", torch.bfloat16)
    yield "sinkhorn of more layers than a GPU holds", lambda: solve("row", "unroll", torch.float32, 256)  # a launch a step
    for dtype in (torch.float32, torch.float64):
        yield (
            f"balanced_assignment {dtype}",
            lambda dtype=dtype: dk.balanced_assignment(made(2, shape.F, shape.E, dtype=dtype), return_gap=True),
        )
    yield (
        "balanced_assignment with capacities",
        lambda: dk.balanced_assignment(made(2, shape.F, shape.E), torch.empty(shape.E, dtype=torch.int64, device="cuda")),
    )


def routing(shape: Shape) -> Iterator[Case]:
    E, K = shape.E, shape.K

    def hard(T: int, dtype: torch.dtype) -> None:
        logits, mask = made(T, E, dtype=dtype, learns=True), torch.empty(T, dtype=torch.bool, device="cuda")
        for weights in ("unit", "softmax", "renormalized"):
            found = dk.route_top_k(logits, K, weights=weights, mask=mask if weights == "softmax" else None)
            whole_pass((found.weights, found.probs, found.balance_loss, found.z_loss), logits)
        whole_pass(dk.route_top_k(logits, K).weights, logits)
        dk.route_top_k(logits.detach(), K)

    def soft(T: int, dtype: torch.dtype) -> None:
        logits, k = made(T, E, dtype=dtype, learns=True), made(T, learns=True)
        found = dk.route_soft_top_k(logits, 0.5, temperature=1.0, threshold=0.1, max_active=K)
        whole_pass((found.weights, found.probs, found.balance_loss, found.z_loss), logits)
        whole_pass(dk.soft_top_k(logits, k), logits, k)

    for T, dtype in product((1, 8192), (torch.float32, torch.bfloat16)):
        yield f"route_top_k T {T} {dtype}", lambda T=T, dtype=dtype: hard(T, dtype)
        yield f"soft top-k T {T} {dtype}", lambda T=T, dtype=dtype: soft(T, dtype)


def chosen(T: int, shape: Shape, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(T, shape.K, dtype=dtype, device="cuda")


def dispatch(shape: Shape) -> Iterator[Case]:
    def rows(T: int, dtype: torch.dtype) -> None:
        slots = dk.dispatch_tokens(chosen(T, shape), shape.E)
        x, weights = made(T, shape.H, dtype=dtype, learns=True), made(T, shape.K, learns=True)
        whole_pass(dk.scatter_tokens(x, slots), x)
        ys = made(T * shape.K, shape.H, dtype=dtype, learns=True)
        whole_pass(dk.gather_tokens(ys, slots, weights), ys, weights)
        whole_pass(dk.gather_tokens(ys, slots, num_tokens=T), ys)

    for T in (1, 8192):
        yield f"dispatch T {T}", lambda T=T: rows(T, torch.bfloat16)
    yield "dispatch in float32", lambda: rows(64, torch.float32)
    yield "dispatch of int32", lambda: dk.dispatch_tokens(chosen(512, shape, torch.int32), shape.E)


def experts(shape: Shape) -> Iterator[Case]:
    E, K, s, H = shape.E, shape.K, shape.s, shape.H

    def weights_of(dtype: torch.dtype, learns: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate_up, down as this library keeps it, and as a stock model does."""
        down = made(E, s, H, dtype=dtype).transpose(1, 2).detach().requires_grad_(learns)
        return made(E, 2 * s, H, dtype=dtype, learns=learns), down, made(E, H, s, dtype=dtype)

    def forward(path: str, T: int, dtype: torch.dtype) -> None:
        gate_up, down, stock = weights_of(dtype)
        x = made(T, H, dtype=dtype)
        dk.expert_ffn(x, gate_up, down, chosen(T, shape), made(T, K), path=path)
        dk.expert_ffn(x, gate_up, stock, chosen(T, shape), None, path="grouped" if path == "masked" else path)

    def train(T: int, dtype: torch.dtype) -> None:
        (gate_up, down, _), (x, weights) = weights_of(dtype, True), (made(T, H, dtype=dtype, learns=True), made(T, K, learns=True))
        whole_pass(dk.expert_ffn(x, gate_up, down, chosen(T, shape), weights), x, gate_up, down, weights)
        frozen = gate_up.detach(), down.detach()
        whole_pass(dk.expert_ffn(x, *frozen, chosen(T, shape), weights, recompute=True), x, weights)

    def multiply(dtype: torch.dtype) -> None:
        a, b = made(64 * K, H, dtype=dtype, learns=True), made(E, H, s, dtype=dtype, learns=True)
        whole_pass(dk.grouped_mm(a, b, torch.empty(E + 1, dtype=torch.int32, device="cuda")), a, b)

    tokens = {"decode": (1, 4, 16, 64), "masked": (64, 256), "grouped": (64, 512, 8192)}
    for path, T in ((path, T) for path, sizes in tokens.items() for T in sizes):
        yield f"expert_ffn {path} T {T}", lambda path=path, T=T: forward(path, T, torch.bfloat16)
    for T in (512, 8192):
        yield f"expert_ffn forward and backward T {T}", lambda T=T: train(T, torch.bfloat16)
    for path in tokens:
        yield f"expert_ffn {path} in float32", lambda path=path: forward(path, 4, torch.float32)
    yield "expert_ffn forward and backward in float32", lambda: train(64, torch.float32)
    yield "expert_ffn by TF32", lambda: in_tf32(lambda: (train(64, torch.float32), forward("decode", 4, torch.float32)))
    for dtype in (torch.bfloat16, torch.float32):
        yield f"grouped_mm {dtype}", lambda dtype=dtype: multiply(dtype)


def in_tf32(call: Any) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        call()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def alignment(shape: Shape) -> Iterator[Case]:
    E, K, F, H = shape.E, shape.K, shape.F, shape.H

    def train(T: int, dtype: torch.dtype, balanced: bool, *soft: str) -> None:
        x, gate, up, down = (
            made(T, H, dtype=dtype, learns=True),
            made(F, H, dtype=dtype),
            made(F, H, dtype=dtype),
            made(H, F, dtype=dtype),
        )
        sizes = {"plan": (F, E), "probs": (T, E), "weights": (T, K)}
        leaves = {name: made(*sizes[name], learns=True) for name in soft}
        expert_of = torch.empty(F, dtype=torch.int64, device="cuda")
        whole_pass(dk.masked_ffn(x, gate, up, down, expert_of, chosen(T, shape), balanced=balanced, **leaves), x, *leaves.values())

    for balanced, soft in product((True, False), (("plan", "probs"), ("plan", "weights"), ("probs",))):
        name = f"masked_ffn {'balanced ' if balanced else ''}{'+'.join(soft)}"
        yield name, lambda balanced=balanced, soft=soft: train(2048, torch.bfloat16, balanced, *soft)
    yield "masked_ffn in float32", lambda: train(512, torch.float32, True, "plan", "probs")


def walk(folder: Path, shapes: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The binaries of each kernel, in the order in which they are asked for, and what went wrong."""
    found: dict[str, list[str]] = {}
    wrong: list[str] = []
    run, now = triton.JITFunction.run, ""

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not callable(grid) and any(not 0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=False)):
            wrong.append(f"{now}: {self.__name__} is launched on a grid of {grid}")
        return run(self, *args, grid=grid, warmup=warmup, **options)

    with fake.device(), fake.binaries(folder) as binaries, patch.object(triton.JITFunction, "run", noted):
        for shape, cases in product((SHAPES[name] for name in shapes), (transport, routing, dispatch, experts, alignment)):
            for name, call in cases(shape):
                now, before = f"{shape.name} {name}", set(binaries.names)
                try:
                    call()
                except Exception as problem:
                    wrong.append(f"{now}: {type(problem).__name__}: {problem}")
                for binary in sorted(binaries.names - before):
                    found.setdefault(json.loads((folder / binary).read_text())["function"], []).append(binary)
    return found, wrong


def compiled(path: Path) -> dict[str, Any]:
    fake.use_driver()
    wanted = json.loads(path.read_text())
    module, name = wanted["function"].split(":")
    try:
        kernel = getattr(importlib.import_module(module), name).preload(wanted["data"])
        return {"kernel": name, **_read_cubin(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}
    except Exception as problem:
        return {"kernel": name, "error": f"{type(problem).__name__}: {problem}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    fake.use_driver()
    found, wrong = walk(given.folder, given.shape or list(SHAPES))
    chosen = [given.folder / name for names in found.values() for name in (names if given.all else names[:1])]
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(compiled, chosen))
    report = {
        "triton": triton.__version__,
        "wrong": wrong,
        "binaries": {kernel.split(":")[1]: len(names) for kernel, names in found.items()},
        "compiled": rows,
        "shared_limit": TARGETS[TARGET].shared,
    }
    (given.folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
