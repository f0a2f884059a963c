"""Dispatch against plain torch: the stable sort of the routed pairs by expert, rows out to their slots, weighted sums of rows back.

The cases run on any device; ``bench/gpu/dispatch.py`` takes them to a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench.paired import OURS, Case, Group, cases, missing
from dotmoe_kernels import reference
from tests.shapes import normal, routed_indices, uniform

EXPERTS = ((8, 2), (32, 8), (112, 28), (128, 32), (148, 37))  # E, K
SORTS = (OURS, "torch-sort-bincount", "torch-sort-histc", "liger")
ROWS = (OURS, "torch")


def sort_histc(indices: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """As in transformers' grouped_mm experts: sort, histogram of floats, running sum."""
    ids, source = torch.sort(indices.reshape(-1), stable=True)
    count = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=indices.device)
    offsets[1:] = torch.cumsum(count, 0, dtype=torch.int32)
    return source // indices.shape[1], source, offsets


def _equal(found: Any, expected: Any) -> float:
    return float(not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))


def sort_case(T: int, E: int, K: int, device: str = "cpu") -> Case:
    indices = routed_indices(T, K, E, seed=0).to(device)
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: dk.dispatch_tokens(indices, E),
        "torch-sort-bincount": lambda: reference.dispatch_tokens(indices, E),
        "torch-sort-histc": lambda: sort_histc(indices, E),
    }
    expected = reference.dispatch_tokens(indices, E)
    skipped = {}
    if reason := missing("liger_kernel") or ("" if indices.is_cuda else "its kernels need a GPU"):
        skipped["liger"] = reason
    else:
        metadata = importlib.import_module("liger_kernel.ops.fused_moe").compute_routing_metadata
        narrow = indices.int()
        run["liger"] = lambda: metadata(narrow, E)  # counts, offsets, token and pair of every slot, and what its products need

    def error(name: str, found: Any) -> float:
        if name == "liger":
            found = (found[2].long(), found[3].long(), found[1])
        return _equal(found, expected)

    return Case(run, error, 0.0, skipped=skipped)


def scatter_case(T: int, E: int, K: int, H: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Against one index_select."""
    slots = dk.dispatch_tokens(routed_indices(T, K, E, seed=0).to(device), E)
    x = normal(T, H, seed=1, dtype=dtype).to(device)
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: dk.scatter_tokens(x, slots),
        "torch": lambda: x.index_select(0, slots.token),
    }
    return Case(run, lambda _, found: _equal([found], [x[slots.token]]), 0.0)


def gather_case(T: int, E: int, K: int, H: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Against weighting, undoing the sort and summing, as transformers' grouped_mm experts do."""
    slots = dk.dispatch_tokens(routed_indices(T, K, E, seed=0).to(device), E)
    ys = normal(T * K, H, seed=2, dtype=dtype).to(device)
    weights = uniform(T, K, seed=3, dtype=torch.float32).to(device)

    def combine() -> Tensor:
        rows = ys * weights.reshape(-1)[slots.source][:, None].to(ys.dtype)
        inverse = torch.empty_like(slots.source)
        inverse[slots.source] = torch.arange(slots.source.numel(), device=device)
        return rows[inverse].view(T, K, H).sum(1)

    run: dict[str, Callable[[], Any]] = {OURS: lambda: dk.gather_tokens(ys, slots, weights), "torch": combine}
    few = slots.token < 4  # float64 for the first tokens alone
    rows = ys[few].double() * weights.reshape(-1)[slots.source[few]][:, None].double()
    expected = torch.zeros(min(T, 4), H, dtype=torch.float64, device=device).index_add_(0, slots.token[few], rows)

    def error(_: str, found: Any) -> float:
        return float((found[:4].double() - expected).norm() / expected.norm())

    return Case(run, error, 1e-5 if dtype == torch.float32 else 2e-2)


def groups_of(
    tokens: tuple[int, ...], H: int, dtype: torch.dtype, device: str, *, most_bytes: float, prefix: str = ""
) -> list[Group]:
    """The sort at every (T, E, K), and the rows where they take at most ``most_bytes``."""
    groups = []
    for T in tokens:
        for E, K in EXPERTS:
            where = f"T{T}-E{E}-K{K}"
            shape: dict[str, Any] = {"shape": f"T {T}, E {E}, K {K}", "flops": 0}
            sort = {**shape, "dtype": "int64", "bytes": T * K * (8 + 8 + 8)}
            groups.append(Group(f"{prefix}dispatch-{where}", SORTS, partial(sort_case, T, E, K, device), sort, 9, 3.0))
            rows = {**shape, "shape": f"T {T}, E {E}, K {K}, H {H}", "dtype": str(dtype).removeprefix("torch.")}
            size = T * (K + 1) * H * dtype.itemsize
            rows["bytes"] = size
            if 2 * size <= most_bytes and E in (8, 112):
                for name, case in (("scatter", scatter_case), ("gather", gather_case)):
                    made = partial(case, T, E, K, H, dtype, device)
                    groups.append(Group(f"{prefix}{name}-{where}", ROWS, made, rows, 9, 3.0))
    return groups


@cases(
    [
        *[g for g in groups_of((256,), 64, torch.float32, "cpu", most_bytes=1e8, prefix="quick-") if "E112" in g.name],
        *groups_of((1, 16, 512, 8192, 65536), 1024, torch.float32, "cpu", most_bytes=1e9),
    ]
)
def test_dispatch(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
