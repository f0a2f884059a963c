"""The options of an alignment run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._checks import is_integer, is_number, plain_numbers, require

INITS = ("auto", "noise", "kmeans", "activation", "shared")
SOFT_OPTIONS = ("router_temperature_start", "router_temperature_end", "threshold", "cap", "budget_lr")


@dataclass(frozen=True)
class AlignmentConfig:
    """How A and the router are trained. The defaults suit a run of a few hundred steps; the paper's are beside them.

    Attributes:
        steps: optimizer steps (paper: 3500).
        batch_size: sequences a step (paper: 64 of 2048 tokens).
        micro_batch_size: sequences a forward pass; the gradients of a step's passes are summed. None: ``batch_size``. The balance
            loss, a product of two means, is then that of each pass. Several ranks share the passes, or with None the one.
        affinity_lr, router_lr: peak learning rates of AdamW (paper: 5e-4 for both; a short run needs far more). Of the routers
            None is 2e-3, and 5e-4 for those that a partition fitted to the inputs: more would undo the fit.
        weight_decay, clip: of AdamW, and the largest gradient norm.
        warmup: share of the steps over which the learning rate rises; then it falls as a cosine to zero.
        tau_start, tau_end: temperature of the transport, falling linearly over the first ``tau_decay`` share of the steps.
        num_iters, tol, backward: of ``sinkhorn``, warm-started from the step before.
        refresh_every: steps between roundings of the plan, which is new in every step: the assignment is held in between.
        router_temperature_start, router_temperature_end: LapSum's temperature of the soft router, falling as tau does.
        threshold, cap: of the soft router: an expert with p <= threshold is off, and so are those beyond ceil(k cap).
        budget_lr: peak learning rate of the layers' shares of the soft router's budget; they do not decay.
        kl, ce, z, balance: weights of the four loss terms.
        hidden: weight of a fifth, the distillation of every block's output (see ``hidden``; paper: none). 0: not computed.
        centre: the routers do not see the direction of their FFN's mean input, which in a trained model is much of every input
            and sends all tokens to the same experts (paper: no). It is projected out of their weights, also of those exported.
        init: what A and the router start from: "noise" (paper), or the partition "kmeans", "activation" or "shared". "auto":
            "shared" where there is text and it shows that more than a fifth of what enters the FFNs is one vector, as in trained
            models of some size; else "noise".
        shared: of the start "shared": the experts that every token visits at first. None: half of K.
        init_std: standard deviation of the noise.
        init_strength: affinity of a neuron to its expert of the partition, in the units of tau.
        seed: of the noise and of the order of the data.
        checkpoint_every: steps between checkpoints; 0 writes only the last.
    """

    steps: int = 300
    batch_size: int = 8
    micro_batch_size: int | None = None
    affinity_lr: float = 2e-2
    router_lr: float | None = None
    weight_decay: float = 1e-4
    clip: float = 1.0
    warmup: float = 0.2
    tau_start: float = 1.0
    tau_end: float = 0.1
    tau_decay: float = 0.2
    num_iters: int = 50
    tol: float = 1e-3
    backward: str = "unroll"
    refresh_every: int = 1
    router_temperature_start: float = 0.2
    router_temperature_end: float = 0.05
    threshold: float = 0.05
    cap: float = 2.0
    budget_lr: float = 1e-2
    kl: float = 2.0
    ce: float = 1.0
    z: float = 1e-3
    balance: float = 1e-2
    hidden: float = 0.0
    centre: bool = False
    init: str = "auto"
    init_std: float = 0.01
    init_strength: float = 0.1
    shared: int | None = None
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("steps", "checkpoint_every"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 0, name, value, "an integer of at least 0")
        for name in ("batch_size", "num_iters", "refresh_every"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 1, name, value, "an integer of at least 1")
        shared = self.shared
        require(shared is None or (is_integer(shared) and shared >= 0), "shared", shared, "an integer of at least 0, or None")
        micro = self.micro_batch_size
        fits = micro is None or (is_integer(micro) and 1 <= micro <= self.batch_size)
        require(fits, "micro_batch_size", micro, f"1 to batch_size = {self.batch_size}")
        for name in (
            *("affinity_lr", "budget_lr", "clip", "tau_start", "tau_end"),
            *("router_temperature_start", "router_temperature_end"),
        ):
            value = getattr(self, name)
            require(is_number(value) and 0 < value < math.inf, name, value, "a positive number")
        rate = self.router_lr
        fits = rate is None or (is_number(rate) and 0 < rate < math.inf)
        require(fits, "router_lr", rate, "a positive number, or None")
        for name in ("weight_decay", "kl", "ce", "z", "balance", "hidden", "init_std", "init_strength", "tol"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < math.inf, name, value, "a number of at least 0")
        for name in ("warmup", "tau_decay"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "a share from 0 to 1")
        require(is_number(self.threshold) and 0 <= self.threshold < 1, "threshold", self.threshold, "a number in [0, 1)")
        require(is_number(self.cap) and 1 <= self.cap < math.inf, "cap", self.cap, "a number of at least 1")
        require(self.backward in ("unroll", "implicit"), "backward", repr(self.backward), '"unroll" or "implicit"')
        require(isinstance(self.centre, bool), "centre", self.centre, "True or False")
        require(self.init in INITS, "init", repr(self.init), " | ".join(INITS))

    @property
    def router_rate(self) -> float:
        """Peak learning rate of the routers."""
        if self.router_lr is not None:
            return self.router_lr
        return 2e-3 if self.init in ("noise", "kmeans") else 5e-4

    def tau(self, step: int) -> float:
        """Temperature of that step (0-based)."""
        return self._falling(self.tau_start, self.tau_end, step)

    def router_temperature(self, step: int) -> float:
        """Temperature of the soft router in that step (0-based)."""
        return self._falling(self.router_temperature_start, self.router_temperature_end, step)

    def _falling(self, start: float, end: float, step: int) -> float:
        decay = max(self.tau_decay * self.steps, 1e-9)
        return start + (end - start) * min(step / decay, 1.0)
