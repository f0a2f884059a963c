"""What the alignment starts from: which of the partitions, and the partition of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..alignment.config import INITS, AlignmentConfig
from ..alignment.module import AlignmentFFN
from ..alignment.ranks import Ranks
from ..models.surgery import DenseFFN
from ..partitions import (
    CALIBRATED,
    Partition,
    activation_partition,
    kmeans_partition,
    random_partition,
    shared_partition,
)

CALIBRATION_TOKENS = 2048, 16384  # least and most that a partition is fitted to; 8 H between: its router has H columns
_CONSTANT_SHARE = 0.2  # of the inputs' mean square


def constant_share(
    model: PreTrainedModel, ffns: Mapping[str, DenseFFN | AlignmentFFN], tokens: Tensor, ranks: Ranks | None = None
) -> float:
    """Mean over the FFNs of |mean x|^2 / mean |x|^2, x [H] their inputs at the beginning of ``tokens`` [N, S] in the dense model:
    from 0 to 1, how much of every input is one vector. 0.1 in a LLaMA of a million parameters, 0.3 in SmolLM2-135M. ``ranks``: each
    of which takes a part of the sequences."""
    means: list[Tensor] = []  # of an FFN the sums of x [H] and of |x|^2 over the tokens

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = next(iter((*args, *kwargs.values()))).flatten(0, -2).float()  # [T, H]
        means.append(torch.cat((x.mean(0), x.square().sum(-1).mean()[None])))

    modules = [ffn.module if isinstance(ffn, DenseFFN) else ffn for ffn in ffns.values()]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    rows = tokens[: -(-CALIBRATION_TOKENS[0] // tokens.shape[1])].long()
    own = rows if ranks is None else ranks.own(rows)
    try:
        with torch.no_grad():  # a rank without a sequence counts nothing, but the others need its part of the weights
            model(input_ids=(own if len(own) else rows[:1]).to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = torch.stack([mean.cpu() for mean in means]) * (len(own) / len(rows))  # [L, H + 1]
    if ranks is not None:
        found = found.to(ranks.device)
        ranks.sum([found])
    least = torch.finfo(found.dtype).tiny
    return float((found[:, :-1].square().sum(-1) / found[:, -1].clamp(min=least)).mean())


def find_start(
    options: AlignmentConfig,
    method: str,
    model: PreTrainedModel,
    ffns: Mapping[str, DenseFFN | AlignmentFFN],
    tokens: Tensor | None,
    ranks: Ranks | None = None,
) -> AlignmentConfig:
    """``options`` with the start that ``method`` has: its own for a fixed one; for "dot" what ``init`` says, where "auto" is
    "shared" if a large part of the FFNs' inputs is one vector, through which a random router sends all tokens to the same experts,
    or if ``shared`` is set."""
    start = options.init
    if method != "dot":
        start = method if method in INITS else "noise"  # random
    elif start == "auto":  # a share that is no number is for the calibration to name
        shares = tokens is not None and (
            options.shared is not None or not constant_share(model, ffns, tokens, ranks) <= _CONSTANT_SHARE
        )
        start = "shared" if shares else "noise"
    return dataclasses.replace(options, init=start)


def make_partition(
    kind: str, ffn: AlignmentFFN, inputs: Tensor | None, num_experts: int, shared: int, generator: torch.Generator
) -> Partition | None:
    F, H = ffn.gate_proj.shape
    weights = (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
    gate, up, down = (w.detach().to(w.device if inputs is None else inputs.device) for w in weights)
    if kind == "random":
        return random_partition(F, num_experts, H, generator)
    if kind == "kmeans":
        return kmeans_partition(gate, up, num_experts, generator)
    if kind in CALIBRATED:
        assert inputs is not None
        sample = (inputs, gate, up, down, num_experts, ffn.activation, generator)
        return activation_partition(*sample) if kind == "activation" else shared_partition(*sample, shared=shared)
    return None
