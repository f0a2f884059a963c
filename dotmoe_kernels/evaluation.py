"""What a model is worth: perplexity, the error of an FFN's output, the load of the experts, how many of them a token visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import is_integer, require, require_indices

COLLAPSE = "what those hold is pruned, not routed"
_ENOUGH = 16  # slots an expert


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, *, batch_size: int = 8) -> float:
    """exp of the mean next-token cross-entropy in nats, every sequence on its own.

    Args:
        model: a causal LM, called as model(input_ids=..., use_cache=False).logits.
        tokens: [N, S] int64 packed sequences; they go where the model's weights are, unless those are read layer by layer.
        batch_size: sequences a forward pass.

    Raises:
        ValueError: tokens of a wrong shape or dtype, a batch_size below 1.
    """
    require_indices(tokens, "tokens", 2, "[N, S]")
    require(is_integer(batch_size) and batch_size >= 1, "batch_size", batch_size, "an integer of at least 1")
    require(
        tokens.shape[0] >= 1 and tokens.shape[1] >= 2, "tokens", f"of shape {list(tokens.shape)}", "at least one pair of tokens"
    )
    device = next(model.parameters()).device
    if device.type == "meta":  # a model that runs from its files
        device = tokens.device
    total = 0.0
    for batch in tokens.split(batch_size):
        batch = batch.long().to(device)
        logits = model(input_ids=batch, use_cache=False).logits.float()
        total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return to_perplexity(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def to_perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats."""
    return math.exp(loss) if loss < 700 else loss * math.inf  # exp overflows; NaN stays NaN


def retention(dense_perplexity: float, sparse_perplexity: float) -> float:
    """Share of the dense model's perplexity that is kept: dense / sparse, 1 when nothing is lost."""
    return dense_perplexity / sparse_perplexity


@torch.no_grad()
def reconstruction_error(dense_output: Tensor, sparse_output: Tensor) -> float:
    """Relative error |sparse - dense| / |dense| of an FFN's output [T, H] over all tokens."""
    wide = dense_output.double()
    return float((sparse_output.double() - wide).norm() / wide.norm().clamp(min=1e-300))


def load_summary(load: Tensor) -> dict[str, float]:
    """Of the loads [E] of one layer, as multiples of the even share 1 / E: least, median, most, and the experts never used."""
    scaled = load.double() * load.numel()
    return {
        "min": float(scaled.min()),
        "median": float(scaled.median()),
        "max": float(scaled.max()),
        "unused": int((load == 0).sum()),
    }


def unused_experts(slots: dict[str, Tensor]) -> dict[str, int]:
    """Of the slots [E] of every expert, by layer: the layers that leave experts without a token, and how many.

    A layer of fewer than 16 slots an expert in the mean is not judged: there one without a token may be chance."""
    found = {name: int((count == 0).sum()) for name, count in slots.items() if float(count.sum()) >= _ENOUGH * len(count)}
    return {name: count for name, count in found.items() if count}


def unused_line(unused: dict[str, int], slots: dict[str, Tensor]) -> str:
    """``unused_experts`` in words."""
    worst = max(unused, key=lambda name: unused[name])
    most = f"the most in {worst}, {unused[worst]} of {len(slots[worst])}"
    return f"{len(unused)} of {len(slots)} layers leave experts without a token ({most})"


def active_summary(counts: Tensor) -> dict[str, float]:
    """Of counts [E + 1], the tokens by their number of active experts: mean, least, (lower) median and most."""
    total, numbers = counts.sum(), torch.arange(counts.numel(), device=counts.device)
    used = counts.nonzero()[:, 0]
    if not used.numel():
        return {"mean": 0.0, "min": 0, "median": 0, "max": 0}
    return {
        "mean": float((counts.double() * numbers).sum() / total),
        "min": int(used[0]),
        "median": int((2 * counts.cumsum(0) >= total).nonzero()[0, 0]),
        "max": int(used[-1]),
    }


class RoutingCounts:
    """What ``collect_load`` counted so far. Called, it gives the loads [E] by layer, each summing to 1."""

    def __init__(self) -> None:
        self.slots: dict[str, Tensor] = {}  # [E] slots of every expert
        self.active: dict[str, Tensor] = {}  # [E + 1] tokens by their number of active experts
        self.routes: dict[str, Tensor] = {}  # [E] sum over the tokens of r_t, see mutual_information

    def __call__(self) -> dict[str, Tensor]:
        return {name: count.double() / count.sum().clamp(min=1) for name, count in self.slots.items()}

    def mean_active(self) -> dict[str, float]:
        """Mean number of active experts a token, by layer."""
        return {name: active_summary(counts)["mean"] for name, counts in self.active.items()}

    def mutual_information(self) -> dict[str, float]:
        """I(token; expert) in nats, by layer: what a token says of the expert that it gets.

            I = H(mean_t r_t) - mean_t H(r_t),   r_t [E]: 1 / k_t for each of the k_t experts that token t chose

        A token is an occurrence in its context, not an id of the vocabulary, which the router does not see: nothing is estimated
        from a table of ids and experts, and there is no bias to correct. 0: every token gets the same experts, and the layer is a
        pruned dense one. With K experts a token H(r_t) = log K, so that I is at most log(E / K), which an even load reaches; with
        K = 1 it is the entropy of the load.
        """
        found = {}
        for name, routes in self.routes.items():
            counts, share = self.active[name].double(), routes / routes.sum().clamp(min=1)
            sizes = torch.arange(counts.numel(), device=counts.device).clamp(min=1).double()
            within = (counts * sizes.log()).sum() / counts[1:].sum().clamp(min=1)  # mean_t log k_t
            found[name] = max(0.0, float(-torch.xlogy(share, share).sum() - within))
        return found

    def add(self, name: str, indices: Tensor, num_experts: int) -> None:
        """Counts indices [T, K], of which num_experts is an empty slot."""
        active = (indices < num_experts).sum(-1, keepdim=True)  # [T, 1]
        weights = (1 / active.clamp(min=1).double()).expand(indices.shape)
        flat, size = indices.flatten(), num_experts + 1
        for counted, found in (
            (self.slots, torch.bincount(flat, minlength=size)[:num_experts]),
            (self.active, torch.bincount(active.flatten(), minlength=size)),
            (self.routes, torch.bincount(flat, weights.flatten(), minlength=size)[:num_experts]),
        ):
            counted[name] = counted[name] + found if name in counted else found


@contextmanager
def collect_load(model: nn.Module) -> Iterator[RoutingCounts]:
    """Inside, counts the slots of every expert and the active experts of every token; see ``RoutingCounts``, which it yields.

    The layers are the modules whose child ``gate`` has ``num_experts`` and returns (logits, weights, indices [T, K]), as a
    converted model's do.
    """
    counts, handles = RoutingCounts(), []

    def hook(name: str) -> Callable[..., None]:
        def count(module: Any, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            counts.add(name, output[2], module.num_experts)

        return count

    for name, module in model.named_modules():
        if name.endswith(".gate") and hasattr(module, "num_experts"):
            handles.append(module.register_forward_hook(hook(name.removesuffix(".gate"))))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
