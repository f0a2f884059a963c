"""The passes of a step of the fine-tuning: forward with the routers' losses, backward, over micro-batches and over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.ranks import Ranks
from ..alignment.sharding import Divided
from ..alignment.stopping import Stop
from ..models.block import DotMoeRouter, moe_blocks
from ..models.modeling import DotMoeForCausalLM
from ..reference import Routing
from ..routing import route_soft, route_top_k
from .teacher import Teacher


@contextmanager
def router_losses(
    model: nn.Module, zero_share: float = 2.0, kept: list[Routing] | None = None
) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, every pass appends z and balance of each router to the list, and the share of its slots that zero experts got; and
    to ``kept`` the routing."""
    found: list[dict[str, Tensor]] = []

    def hook(gate: DotMoeRouter, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if gate.soft is None:
            routing = route_top_k(output[0], gate.top_k, num_zero_experts=gate.num_zero_experts, zero_share=zero_share)
        else:
            routing = route_soft(output[0], gate.soft)
        if kept is not None:
            kept.append(routing)
        terms = {"z": routing.z_loss, "balance": routing.balance_loss}
        found.append(terms | ({"zero": routing.load[gate.num_experts :].sum()} if gate.num_zero_experts else {}))

    handles = [block.gate.register_forward_hook(hook) for block in moe_blocks(model).values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _text_loss(model: DotMoeForCausalLM, teacher: Teacher | None, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted terms that come of the text [B, N], and each by name."""
    if teacher is not None:
        return teacher.losses(model, tokens)
    ce = model(input_ids=tokens, labels=tokens, use_cache=False).loss.float()
    return ce, {"ce": ce}


class Passes:
    """The passes of a step, those of the other ranks included: they leave the gradients of the whole batch; where the model is
    ``divided``, of this rank's part of it."""

    def __init__(
        self,
        model: DotMoeForCausalLM,
        teacher: Teacher | None,
        trained: list[nn.Parameter],
        config: Any,  # a FinetuneConfig
        half: bool,
        ranks: Ranks,
        divided: Divided | None = None,
    ) -> None:
        self.divided = divided
        self.model, self.teacher, self.trained, self.config, self.half, self.ranks = model, teacher, trained, config, half, ranks
        self.split = ranks.splits(config.micro_batch_size)
        self.routings: list[Routing] = []
        self.zeros = model.config.num_zero_experts
        self._watch = router_losses(model, config.zero_share, self.routings if self.split else None)

    def __enter__(self) -> Passes:
        self.routers = self._watch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__(*error)

    def take(self, batch: Tensor, stop: Stop) -> tuple[dict[str, Tensor], Tensor | None]:
        """Of a step on ``batch`` [B, N]: the terms by name, and of several ranks how many were asked to stop."""
        config, device = self.config, batch.device
        balanced = config.zero_balance if self.zeros else config.balance
        sums: dict[str, Tensor] = {}
        for micro, weight in self.ranks.passes(batch, config.micro_batch_size):
            self.routers.clear()
            self.routings.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
                loss = partial(_text_loss, self.model, self.teacher)
                text, terms = loss(micro) if self.divided is None else self.divided(loss, micro)
            terms |= {name: torch.stack([losses[name] for losses in self.routers]).mean() for name in self.routers[0]}
            if self.split:
                options = {
                    "soft": self.model.config.router == "soft",
                    "num_zero_experts": self.zeros,
                    "zero_share": config.zero_share,
                }
                shared = self.ranks.balanced(self.routings, **options)
                terms["balance"] = torch.stack([routing.balance_loss for routing in shared]).mean()
            total = text + config.z * terms["z"] + balanced * terms["balance"]
            (total * weight).backward()
            for name, term in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + term.detach().float() * weight
        if self.ranks.count == 1:
            return sums, None
        wish = torch.tensor(float(stop.asked), device=device)
        gradients = [] if self.divided is not None else [self._gradient(parameter) for parameter in self.trained]
        self.ranks.sum([*sums.values(), wish, *gradients])
        return sums, wish

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad
