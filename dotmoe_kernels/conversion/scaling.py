"""What a conversion would take on 1 to 64 GPUs: the costs of one (``costs``) shared out, and the messages between them. PREDICTED.

n GPUs, of M passes a step ceil(M / n) each, or a part of the rows of the one pass where there is no micro-batch size; smaller
passes where n is more than M. r = (n - 1) / n of what is gathered passes a GPU's link, twice that of what is summed; bytes a step:

    align        r (4 L F E (1 + 2 + 1) + 2 4 L E H)    plans gathered, their gradients summed, A's gathered; the routers' summed
    finetune     2 r 4 p                                the gradients of the p parameters that train
    --shard      3 r w B a pass                         of align, the B parameters of the blocks: dense, sparse and backward pass.
                                                        It runs beside the products, so that the longer of the two counts
                 r w B a pass                           of reconstruct, of those that collect inputs; and 3 r w L F H for its layers
                 r (2 c B + w B) a pass                 of finetune: sparse and backward pass, each weight in the c bytes of a
                                                        product; and the teacher's pass, where there is one
                 + r (4 B + 12 O) a pass                the gradients of the blocks summed in float32; the O parameters around them
                                                        gathered twice, and their gradients summed. With adapters r 2 c O

Sinkhorn takes ceil(L / n) of L layers, and so does the whole of reconstruct; AdamW takes all, or of finetune with --shard a part.
Memory is that of one GPU at its share of the passes; what is gathered lies there once more, 8 L F E. With --shard, B / L a block:

    weights      w (B / n + 2 B / L)            and what is around the blocks; in reconstruct 3 w F H of the layer that trains
    finetune     the nth part of weights in float32, gradients and moments; with adapters of frozen weights and adapters
                 + 3 c B / L + 4 B / L          two blocks, one block's gradients, and those in float32 while they are summed; with
                                                adapters 2 c B / L
                 + 8 O                          what is around the blocks, and its gradient; with adapters c O
    its teacher  w (B / n + 2 B / L + O)        nothing where it is the student
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .._checks import is_integer, require
from .._tiles import GPUS_A_MACHINE, NETWORK, NVLINK
from ..alignment.config import AlignmentConfig
from ..alignment.reconstruction import _MEMORY, _ROWS
from .costs import (
    Cost,
    Sizes,
    adam_seconds,
    align_cost,
    finetune_cost,
    reconstruct_cost,
    sinkhorn_seconds,
    trained_parameters,
)
from .finetuning import FinetuneConfig
from .pipeline import RECONSTRUCT_TOKENS

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


def _passes(options: Any) -> int:
    """Of a GPU in all steps; ``options`` of its own."""
    return options.steps * -(-options.batch_size // (options.micro_batch_size or options.batch_size))


def _beside(gathering: float, seconds: dict[str, float]) -> dict[str, float]:
    """``seconds`` where weights are gathered beside the products: the longer of the two counts."""
    if gathering <= seconds["products"]:
        return seconds
    return {"gathering of weights": gathering} | {name: s for name, s in seconds.items() if name != "products"}


def share_align(z: Sizes, options: AlignmentConfig, gpus: int, sharded: bool = False, again: bool = False) -> Share | None:
    own = _shared(options, gpus)
    if own is None:
        return None
    cost, transport = align_cost(z, own, again), sinkhorn_seconds(z, own)
    plans, routers = 4 * z.L * z.plan, 4 * z.L * z.E * z.H
    seconds = {
        "products": cost.seconds - transport,
        "transport": transport * -(-z.L // gpus) / z.L,
        "messages": options.steps * _messages(4 * plans + 2 * routers, gpus),
    }
    memory = sum(cost.memory.values())
    if sharded:
        memory = _share_weights(z, cost, gpus)
        seconds = _beside(_passes(own) * _messages(3 * z.w * (z.N - z.around), gpus), seconds)
    return Share(memory + (2 * plans if gpus > 1 else 0), seconds)


def share_reconstruct(z: Sizes, options: AlignmentConfig, steps: int, gpus: int, sharded: bool = False) -> Share:
    own = -(-z.L // gpus)
    cost = reconstruct_cost(z, options, steps, layers=own)
    seconds = {"products": cost.seconds, "messages": _messages(8 * z.L * z.plan, gpus)}
    if not sharded:
        return Share(sum(cost.memory.values()), seconds)
    sequences = max(1, RECONSTRUCT_TOKENS // z.S)
    groups = -(-own // max(1, _MEMORY // (sequences * z.S * z.H * z.w)))
    passes = groups * -(-sequences // max(1, _ROWS // z.S))
    layer = 3 * z.w * z.F * z.H
    gathering = _messages(passes * z.w * (z.N - z.around) + z.L * layer, gpus)
    return Share(_share_weights(z, cost, gpus) + layer, _beside(gathering, seconds))


def share_finetune(
    z: Sizes,
    options: FinetuneConfig,
    dtype: torch.dtype,
    teacher: str | None,
    gpus: int,
    sharded: bool = False,
    again: bool = False,
) -> Share | None:
    own = _shared(options, gpus)
    if own is None:
        return None
    cost = finetune_cost(z, own, dtype, teacher, again)
    messages = options.steps * _messages(8 * trained_parameters(z, options), gpus)
    if not sharded:
        return Share(sum(cost.memory.values()), {"products": cost.seconds, "messages": messages})
    width, adapters = 2 if dtype == torch.bfloat16 else 4, bool(options.lora_rank)
    blocks, memory = z.n - z.around, dict(cost.memory)
    dense, itself = z.N - z.around, adapters and teacher == "itself"
    divided = (width if adapters else 4) * z.n + memory.pop("trained")
    gathered = 2 * width * blocks / z.L + width * z.around if adapters else (3 * width + 4) * blocks / z.L + 8 * z.around
    taught = teacher is not None and not itself
    memory |= {"weights": divided / gpus + gathered, "teacher": z.w * (dense / gpus + 2 * dense / z.L + z.around) if taught else 0}
    a_pass = 2 * width * blocks + (2 * width * z.around if adapters else 4 * blocks + 12 * z.around)
    a_pass += 0 if teacher is None else width * blocks if itself else z.w * dense
    seconds = {"products": cost.seconds - adam_seconds(z, own) * (1 - 1 / gpus)}
    return Share(sum(memory.values()), _beside(_passes(own) * _messages(a_pass, gpus), seconds))


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
    again: bool = False,
) -> list[dict[str, Any]]:
    """Of 1, 2, 4, ... and ``most`` GPUs: memory of each and time of the whole run with the weights on every one (``whole``) and
    divided (``sharded``), how near that comes to n times as fast, and what bounds it: products, transport, messages, gathering of
    weights, memory; None where a GPU would have no sequence. ``micro_batch_size``: where it has to be less. ``capacity``: bytes of
    a GPU; ``again``: blocks are computed again in the backward pass."""
    found, alone = [], None
    for gpus in gpu_counts(most):
        shares = {
            "reconstruct": lambda sharded, n=gpus: share_reconstruct(z, options, reconstruct_steps, n, sharded),
            "align": lambda sharded, n=gpus: share_align(z, options, n, sharded, again),
            "finetune": lambda sharded, n=gpus: share_finetune(z, tuning, dtype, teacher, n, sharded, again),
        }
        whole = _figures([shares[stage](False) for stage in stages], gpus, alone, capacity)
        if gpus == 1 and whole is not None:
            alone, whole = whole["predicted_seconds"], whole | {"share_of_the_ideal": 1.0}
        sharded = _figures([shares[stage](True) for stage in stages], gpus, alone, capacity) if gpus > 1 else None
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
