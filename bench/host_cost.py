"""Host cost: microseconds of processor time that an op takes before its kernels could run, on any machine.

    python -m bench.host_cost [--json] [OP ...]

The ops go through Triton's own JIT under a driver that launches nothing (``rehearsal.py``), at shapes of Llama-3-8B and few tokens:
there a call costs more than its kernels. Best of many repeats of process_time, after the kernels were compiled. What is not in it:
the driver's own call, 2-4 us a launch, and what the allocator of a GPU takes instead of the CPU's.

    call         the public function
    launcher     the part of it that allocates and launches
    around it    the rest: checks, choices of a path
    dispatcher   what the operator costs more than the launcher: a call outside torch.compile and without a gradient saves it
    launches     of one call
    bound        those whose arguments Triton's JIT looks at again
    alike        a second call launches what the first one did, argument for argument
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import dotmoe_kernels as dk
from bench.machine import describe
from bench.rehearsal import Driver, noted, rehearsal
from bench.shapes import L3

_STEPS = 50


class Case(NamedTuple):
    """One op: the public function, what launches its kernels, and the torch operator around that."""

    name: str
    call: Callable[[], object]
    launcher: Callable[[], object]
    operator: Callable[[], object]


def best(call: Callable[[], object], seconds: float = 0.4) -> float:
    """Microseconds of processor time a call: the least of rounds of 20 calls within about that many seconds."""
    call()
    least, end = float("inf"), time.process_time() + seconds
    while (start := time.process_time()) < end:
        for _ in range(20):
            call()
        least = min(least, (time.process_time() - start) / 20)
    return least * 1e6


def _decode(T: int) -> Case:
    from dotmoe_kernels.experts.decode import gpu, operators

    E, K, s, H = L3.E, L3.K, L3.s, L3.H
    x, gate_up, down = (torch.empty(size, dtype=torch.bfloat16) for size in ((T, H), (E, 2 * s, H), (E, s, H)))
    down = down.transpose(1, 2)
    indices, weights = torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K)
    given = (x, gate_up, down, indices, weights)
    return Case(
        f"expert_ffn decode T={T}",
        lambda: dk.expert_ffn(*given, path="auto" if T == 1 else "decode"),  # on a CPU auto takes another path for more
        lambda: gpu.decode_ffn(*given, "silu"),
        lambda: operators.decode_op(*given, "silu"),
    )


def _routing() -> list[Case]:
    from dotmoe_kernels.routing import choose, operators
    from dotmoe_kernels.routing.gpu import soft, top_k

    E, K, z = L3.E, L3.K, torch.empty(1, L3.E)
    k, temperature = torch.full((1,), float(K), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return [
        Case(
            "route_top_k T=1",
            lambda: dk.route_top_k(z, K),
            lambda: top_k.forward(z, None, K, "unit"),
            lambda: operators.route_top_k_op(z, None, K, "unit"),
        ),
        Case(
            "a model's router T=1",
            lambda: choose(z, K, None),
            lambda: top_k.choose(z, K, E),
            lambda: operators.choose_top_k_op(z, K, E),
        ),
        Case(
            "route_soft_top_k T=1",
            lambda: dk.route_soft_top_k(z, float(K), temperature=1.0, threshold=0.2, max_active=K),
            lambda: soft.forward(z, k, temperature, None, 0.2, K),
            lambda: operators.route_soft_top_k_op(z, k, temperature, None, 0.2, K),
        ),
    ]


def _soft_top_k() -> Case:
    from dotmoe_kernels.soft_topk import gpu, operators

    z, k, temperature = torch.empty(1, L3.E), *(torch.full((1,), value, dtype=torch.float64) for value in (4.0, 1.0))
    return Case(
        "soft_top_k T=1",
        lambda: dk.soft_top_k(z, 4.0),
        lambda: gpu.forward(z, k, temperature),
        lambda: operators.soft_top_k_op(z, k, temperature),
    )


def _dispatch(T: int) -> list[Case]:
    from dotmoe_kernels.dispatch import operators
    from dotmoe_kernels.dispatch.gpu import rows, sort

    E, K, S, H = L3.E, L3.K, T * L3.K, L3.H
    indices, weights = torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K)
    slots = dk.Slots(torch.zeros(S, dtype=torch.int64), torch.arange(S), torch.zeros(E + 1, dtype=torch.int32))
    x, ys = torch.empty(T, H), torch.empty(S, H)
    return [
        Case(
            f"dispatch_tokens T={T}",
            lambda: dk.dispatch_tokens(indices, E),
            lambda: sort.sort_slots(indices, E),
            lambda: operators.sort_slots_op(indices, E),
        ),
        Case(
            f"scatter_tokens T={T}",
            lambda: dk.scatter_tokens(x, slots),
            lambda: rows.scatter_rows(x, sort.inverse(slots.source).view(T, K), slots.offsets),
            lambda: operators.scatter_op(x, operators.inverse_op(slots.source).view(T, K), slots.offsets),
        ),
        Case(
            f"gather_tokens T={T}",
            lambda: dk.gather_tokens(ys, slots, weights),
            lambda: rows.gather_rows(ys, weights, sort.inverse(slots.source).view(T, K), slots.offsets),
            lambda: operators.gather_op(ys, weights, operators.inverse_op(slots.source).view(T, K), slots.offsets),
        ),
    ]


def _sinkhorn() -> Case:
    from dotmoe_kernels.transport import operators
    from dotmoe_kernels.transport.gpu import streaming

    F, E = L3.F, L3.E
    affinity = torch.empty(F, E)
    given = (affinity[None], torch.full((1, E), F / E), torch.ones(1), torch.zeros(1, E))
    return Case(
        f"sinkhorn {_STEPS} steps",
        lambda: dk.sinkhorn(affinity, num_iters=_STEPS),
        lambda: streaming.solve(*given, _STEPS, 0.0, True),
        lambda: operators.sinkhorn_op(*given, _STEPS, 0.0, True, True),
    )


def cases() -> list[Case]:
    return [_decode(1), _decode(8), *_routing(), _soft_top_k(), *_dispatch(8), _sinkhorn()]


def forget() -> None:
    """No op knows a signature any more."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("dotmoe_kernels")]
    for value in (value for module in modules for value in list(vars(module).values()) if hasattr(value, "cache_clear")):
        value.cache_clear()


def measure(case: Case, driver: Driver) -> dict[str, Any]:
    case.call()  # imports, decorates and compiles the kernels
    forget()
    (first, _), (second, bound) = noted(driver, case.call), noted(driver, case.call)
    call, launcher, operator = best(case.call), best(case.launcher), best(case.operator)
    return {
        "op": case.name,
        "call": call,
        "launcher": launcher,
        "around it": call - launcher,
        "dispatcher": operator - launcher,
        "launches": [launch.name for launch in second],
        "bound": len(bound),
        "alike": first == second,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'us':24s}"
        + "".join(f"{name:>12s}" for name in ("call", "launcher", "around it", "dispatcher", "launches", "bound", "alike"))
    ]
    for row in rows:
        times = "".join(f"{row[name]:12.1f}" for name in ("call", "launcher", "around it", "dispatcher"))
        lines.append(f"{row['op']:24s}{times}{len(row['launches']):12d}{row['bound']:12d}{'yes' if row['alike'] else 'NO':>12s}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_cost", description="processor time of a call before its kernels run"
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only ops whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="machine and rows as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with rehearsal() as driver, torch.no_grad():
        chosen = [case for case in cases() if not given.ops or any(name in case.name for name in given.ops)]
        rows = [measure(case, driver) for case in chosen]
    print(json.dumps({"machine": describe(), "rows": rows}, indent=1) if given.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
