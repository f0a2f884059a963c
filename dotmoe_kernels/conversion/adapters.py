"""Adapters on the attention's projections, by peft, and what rests beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.block import moe_blocks
from ..models.modeling import DotMoeForCausalLM


def require_lora() -> Any:
    """The module peft.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(
            "lora_rank needs peft, which is not installed; allowed: 0, or pip install 'dotmoe_kernels[lora]'"
        ) from None
    return peft


def _options(module: nn.Module, head: nn.Module | None, config: Any) -> Any:
    """Of the adapters of ``module``, a model or a block of one. ``config``: a FinetuneConfig."""
    inside = tuple(f"{name}." for name in moe_blocks(module))
    targets = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and child is not head and not name.startswith(inside)
    ]
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return require_lora().LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets)


def add_adapters(block: nn.Module, config: Any) -> None:
    """To one block, whose other weights no longer train: as ``adapters`` does it to the whole model, if called for one after the
    other with torch's generator left alone."""
    require_lora().inject_adapter_in_model(_options(block, None, config), block)


@contextmanager
def resting(model: nn.Module, rest: bool) -> Iterator[None]:
    """Inside, if they are to rest, the routers do not train."""
    gates = [block.gate.weight for block in moe_blocks(model).values()] if rest else []
    flags = [gate.requires_grad for gate in gates]
    try:
        for gate in gates:
            gate.requires_grad_(False)
        yield
    finally:
        for gate, flag in zip(gates, flags, strict=True):
            gate.requires_grad_(flag)


@contextmanager
def adapters(model: DotMoeForCausalLM, config: Any) -> Iterator[None]:
    """Inside, the attention's projections carry adapters, and these and perhaps the routers alone train; then they are merged."""
    if not config.lora_rank:
        yield
        return
    peft, options = require_lora(), _options(model, model.get_output_embeddings(), config)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        wrapped = peft.get_peft_model(model, options)
    for block in moe_blocks(model).values():
        block.gate.weight.requires_grad_()
    merge = False
    try:
        yield
        merge = True
    finally:
        (wrapped.merge_and_unload if merge else wrapped.unload)()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
