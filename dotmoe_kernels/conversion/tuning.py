"""How a converted model is fine-tuned."""

from __future__ import annotations

import dataclasses
import math

from .._checks import is_integer, is_number, plain_numbers, require
from ..models.config import DotMoeConfig

_TAUGHT = {"kl": 1.0, "ce": 0.0}  # weights where there is a teacher


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a converted model is fine-tuned.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences a step.
        micro_batch_size: sequences a forward pass; the gradients of a step's passes are summed. None: ``batch_size``.
        lr: peak learning rate of AdamW. None: 3e-4, of adapters 1e-3.
        router_lr: of the top-K routers. None: 0, they stay as they were aligned; where there are zero experts that of the rest. The
            gradient that reaches it comes through the chosen experts alone; at an adapter's rate it undoes the alignment.
        weight_decay, clip: of AdamW (matrices alone decay), and the largest gradient norm.
        warmup: share of the steps over which the learning rate rises; then it falls as a cosine to zero.
        z, balance: weights of the routers' losses.
        kl, ce: weights of KL(teacher || sparse) and of the cross-entropy, with a teacher alone (None: 1 and 0); without one the
            cross-entropy counts 1.
        lora_rank: rank of the adapters on the attention's projections; 0 trains every weight.
        lora_alpha: their scale, times 1 / rank; None: twice the rank.
        zero_experts: N to add to every layer (``zero_experts``), whose choice is an empty slot; 0 adds none.
        zero_share, zero_balance: w and the weight of the balance of zero experts against the others, for a model that has some; it
            takes the place of ``balance``.
        seed: of the order of the data, of the adapters, of the zero experts and of dropout.
        checkpoint_every: steps between checkpoints; 0 writes only the last.
    """

    steps: int = 300
    batch_size: int = 8
    micro_batch_size: int | None = None
    lr: float | None = None
    router_lr: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    z: float = 1e-3
    balance: float = 1e-2
    kl: float | None = None
    ce: float | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    zero_experts: int = 0
    zero_share: float = 2.0
    zero_balance: float = 0.1
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("steps", "checkpoint_every", "lora_rank", "zero_experts"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 0, name, value, "an integer of at least 0")
        require(is_integer(self.batch_size) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        micro = self.micro_batch_size
        fits = micro is None or (is_integer(micro) and 1 <= micro <= self.batch_size)
        require(fits, "micro_batch_size", micro, f"1 to batch_size = {self.batch_size}")
        for name in ("lr", "clip", "zero_share"):
            value = getattr(self, name)
            fits = (value is None and name == "lr") or (is_number(value) and 0 < value < math.inf)
            require(fits, name, value, "a positive number")
        for name in ("weight_decay", "z", "balance", "kl", "ce", "zero_balance", "router_lr"):
            value = getattr(self, name)
            fits = (value is None and name in (*_TAUGHT, "router_lr")) or (is_number(value) and 0 <= value < math.inf)
            require(fits, name, value, "a number of at least 0")
        require(is_number(self.warmup) and 0 <= self.warmup <= 1, "warmup", self.warmup, "a share from 0 to 1")
        alpha = self.lora_alpha
        require(alpha is None or (is_number(alpha) and 0 < alpha < math.inf), "lora_alpha", alpha, "a positive number, or None")


def with_rates(options: FinetuneConfig, config: DotMoeConfig) -> FinetuneConfig:
    """``options`` with the learning rates for a model of this config."""
    rate = options.lr or (1e-3 if options.lora_rank else 3e-4)
    learns = config.router == "soft" or options.zero_experts or config.num_zero_experts
    router = (rate if learns else 0.0) if options.router_lr is None else options.router_lr
    return dataclasses.replace(options, lr=rate, router_lr=router)


def with_weights(options: FinetuneConfig, taught: bool) -> FinetuneConfig:
    """``options`` with the weights of the teacher's terms, if there is one."""
    given = {name: getattr(options, name) for name in _TAUGHT}
    if not taught:
        for name, value in given.items():
            require(value is None, name, value, "together with a teacher")
        return options
    given = {name: _TAUGHT[name] if value is None else value for name, value in given.items()}
    require(any(given.values()), "kl", given["kl"], f"a positive number where ce is {given['ce']}")
    return dataclasses.replace(options, **given)
