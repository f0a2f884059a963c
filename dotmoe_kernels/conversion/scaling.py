"""What a conversion would take on 1 to 64 GPUs: the costs of one (``costs``) shared out, and the messages between them. PREDICTED.

n GPUs, of M passes a step ceil(M / n) each, or a part of the rows of the one pass where there is no micro-batch size; smaller
passes where n is more than M. r = (n - 1) / n of what is gathered passes a GPU's link, twice that of what is summed; bytes a step:

    align        r (4 L F E (1 + 2 + 1) + 2 4 L E H)    plans gathered, their gradients summed, A's gathered; the routers' summed
    finetune     2 r 4 p                                the gradients of the p parameters that train
    --shard      3 r w B a pass                         the B parameters of the blocks: dense, sparse and backward pass. It runs
                                                        beside the products, so that the longer of the two counts

Sinkhorn takes ceil(L / n) of L layers, and so does the whole of reconstruct; AdamW takes all. Memory is that of one GPU at its
share of the passes; what is gathered lies there once more, 8 L F E. With --shard the blocks' weights take w B / n, and two whole
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .._checks import is_integer, require
from .._tiles import GPUS_A_MACHINE, NETWORK, NVLINK
from ..alignment.config import AlignmentConfig
from .costs import Cost, Sizes, align_cost, finetune_cost, reconstruct_cost, sinkhorn_seconds, trained_parameters
from .finetuning import FinetuneConfig

MOST = 64
RESTS_ON = (
    f"links of {NVLINK / 1e9:.0f} GB/s a direction within a machine of {GPUS_A_MACHINE} and {NETWORK / 1e9:.0f} GB/s a GPU between "
    "machines, as published; nobody measured it"
)


@dataclass(frozen=True)
class Share:
    """Of one stage on one of several GPUs."""

    memory: float  # bytes
    seconds: dict[str, float]  # by what takes them, one after the other


def gpu_counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``.

    Raises:
        ValueError: it is no number from 1 to 64.
    """
    require(is_integer(most) and 1 <= most <= MOST, "gpus", most, f"1 to {MOST}")
    return sorted({1 << n for n in range(most.bit_length()) if 1 << n <= most} | {most})


def _messages(size: float, gpus: int) -> float:
    """Seconds that ``size`` bytes, of which each GPU holds or adds its part, take to be gathered."""
    return size * (gpus - 1) / gpus / (NVLINK if gpus <= GPUS_A_MACHINE else NETWORK)


def _shared(options: Any, gpus: int) -> Any:
    """``options`` of the passes that one of the GPUs makes; None where it would have none, however small."""
    micro, batch = options.micro_batch_size, options.batch_size
    if batch < gpus:
        return None
    if micro is None:
        return replace(options, batch_size=-(-batch // gpus))
    micro = _smaller(options, gpus) or micro
    passes = -(-batch // micro)
    return replace(options, micro_batch_size=micro, batch_size=-(-passes // gpus) * micro)


def _smaller(options: Any, gpus: int) -> int | None:
    """The micro-batch size that gives each of the GPUs a pass, where that of ``options`` does not."""
    micro, most = options.micro_batch_size, options.batch_size if gpus == 1 else (options.batch_size - 1) // (gpus - 1)
    return None if micro is None or micro <= most else most


def _share_weights(z: Sizes, cost: Cost, gpus: int) -> float:
    """Bytes with the blocks' weights divided."""
    blocks = z.w * (z.N - z.around)
    return sum(cost.memory.values()) - blocks + blocks / gpus + 2 * blocks / z.L


def share_align(z: Sizes, options: AlignmentConfig, gpus: int, sharded: bool = False) -> Share | None:
    own = _shared(options, gpus)
    if own is None:
        return None
    cost, transport = align_cost(z, own), sinkhorn_seconds(z, own)
    plans, routers = 4 * z.L * z.plan, 4 * z.L * z.E * z.H
    seconds = {
        "products": cost.seconds - transport,
        "transport": transport * -(-z.L // gpus) / z.L,
        "messages": options.steps * _messages(4 * plans + 2 * routers, gpus),
    }
    memory = sum(cost.memory.values())
    if sharded:
        passes = own.steps * -(-own.batch_size // (own.micro_batch_size or own.batch_size))
        gathering = passes * _messages(3 * z.w * (z.N - z.around), gpus)
        memory = _share_weights(z, cost, gpus)
        if gathering > seconds["products"]:
            seconds = {"gathering of weights": gathering} | {name: s for name, s in seconds.items() if name != "products"}
    return Share(memory + (2 * plans if gpus > 1 else 0), seconds)


def share_reconstruct(z: Sizes, options: AlignmentConfig, steps: int, gpus: int) -> Share:
    cost = reconstruct_cost(z, options, steps, layers=-(-z.L // gpus))
    return Share(sum(cost.memory.values()), {"products": cost.seconds, "messages": _messages(8 * z.L * z.plan, gpus)})


def share_finetune(z: Sizes, options: FinetuneConfig, dtype: torch.dtype, teacher: str | None, gpus: int) -> Share | None:
    own = _shared(options, gpus)
    if own is None:
        return None
    cost = finetune_cost(z, own, dtype, teacher)
    messages = options.steps * _messages(8 * trained_parameters(z, options), gpus)
    return Share(sum(cost.memory.values()), {"products": cost.seconds, "messages": messages})


def _figures(shares: list[Share | None], gpus: int, alone: float | None, capacity: float) -> dict[str, Any] | None:
    """None: a GPU would have no pass."""
    found = [share for share in shares if share is not None]
    if len(found) < len(shares):
        return None
    seconds: dict[str, float] = {}
    for share in found:
        for name, value in share.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    memory, total = max(share.memory for share in found), sum(seconds.values())
    bound = "memory" if memory > capacity else max(seconds, key=lambda name: seconds[name])
    efficiency = None if alone is None else round(alone / (gpus * total), 3) if total else 1.0
    return {
        "predicted_memory_gb": round(memory / 1e9, 3),
        "predicted_seconds": round(total, 3),
        "share_of_the_ideal": efficiency,
        "bound_by": bound,
    }


def predict_gpus(
    z: Sizes,
    options: AlignmentConfig,
    *,
    most: int,
    stages: list[str],
    reconstruct_steps: int,
    tuning: FinetuneConfig,
    dtype: torch.dtype,
    teacher: str | None,
    capacity: float,
) -> list[dict[str, Any]]:
    """Of 1, 2, 4, ... and ``most`` GPUs: memory of each and time of the whole run with the weights on every one (``whole``) and
    divided (``sharded``, of the alignment alone), how near that comes to n times as fast, and what bounds it: products, transport,
    messages, gathering of weights, memory; None where a GPU would have no sequence. ``micro_batch_size``: where it has to be less.
    ``capacity``: bytes of a GPU."""
    found, alone = [], None
    for gpus in gpu_counts(most):
        shares = {
            "reconstruct": lambda n=gpus: share_reconstruct(z, options, reconstruct_steps, n),
            "align": lambda n=gpus: share_align(z, options, n),
            "finetune": lambda n=gpus: share_finetune(z, tuning, dtype, teacher, n),
        }
        whole = _figures([shares[stage]() for stage in stages], gpus, alone, capacity)
        if gpus == 1 and whole is not None:
            alone, whole = whole["predicted_seconds"], whole | {"share_of_the_ideal": 1.0}
        sharded = None
        if stages == ["align"] and gpus > 1:
            sharded = _figures([share_align(z, options, gpus, True)], gpus, alone, capacity)
        micro = _smaller(tuning if stages == ["finetune"] else options, gpus)
        found.append({"gpus": gpus, "micro_batch_size": micro, "whole": whole, "sharded": sharded})
    return found


def gpu_lines(report: list[dict[str, Any]], duration: Any) -> list[str]:
    """The result of ``predict_gpus`` in words; ``duration`` writes seconds."""
    lines = []
    for row in report:
        n, smaller = row["gpus"], row["micro_batch_size"]
        name = f"predicted on {n} GPU{'s' if n > 1 else ''}"
        if row["whole"] is None:
            lines.append(f"{name}: fewer sequences a step than GPUs; --batch-size {n} at the least")
            continue
        given = "" if smaller is None else f" with --micro-batch-size {smaller}"
        for kind, f in (("", row["whole"]), (" with --shard", row["sharded"])):
            if f is not None:
                near = f", {f['share_of_the_ideal']:.0%} of {n} times as fast" if n > 1 else ""
                lines.append(
                    f"{name}{kind}{given if not kind else given.replace(' with', ' and')}: {f['predicted_memory_gb']:.1f} GB each, "
                    f"{duration(f['predicted_seconds'])}{near}; bound by {f['bound_by']}"
                )
    return [*lines, f"predicted with {RESTS_ON}"]
