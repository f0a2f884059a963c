"""Which settings, methods and seeds a preset has.

ci      2 minutes on one core, a tiny model: proves the path, not the ranking
cpu     an hour on two cores with --jobs 2: the demo's model with every method and ablation, a 7 M model with some
real    SmolLM2-135M of ``fetch``, 131,072 tokens an arm, 1 M for the long ones; the ablation that won on the demo; goes on
        inside an arm
gpu     the same with more tokens and seeds, and the ablations
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dotmoe_kernels.alignment.config import AlignmentConfig

from .ablations import ablations
from .methods import METHODS, Method
from .settings import CI, DEMO, SEVEN, SMOLLM2, Plan
from .tuning import tuned

_LONGER = 8  # times the tokens of an arm, alignment and tuning together


@dataclass(frozen=True)
class Part:
    """One setting of a preset."""

    plan: Plan
    seeds: tuple[int, ...]
    methods: tuple[str, ...] | None = None  # None: all
    ablations: bool | tuple[str, ...] = False  # True: all
    options: dict[str, Any] = field(default_factory=dict)

    def arms(self) -> list[Method]:
        base = AlignmentConfig(**(self.plan.options | self.options))
        arms = [m for m in METHODS if self.methods is None or m.name in self.methods]
        if self.plan.tuning:
            arms += tuned(self.plan.tuning, 0 if self.plan.shape is not None else _LONGER - 1)
        varied = ablations(base) if self.ablations else []
        if isinstance(self.ablations, tuple):
            varied = [arm for arm in varied if arm.name in self.ablations]
        return arms + varied + longer(self.plan, base)

    def tokens(self) -> int:
        """The most that an arm trains on."""
        options = [AlignmentConfig(**(self.plan.options | self.options | arm.options)) for arm in self.arms()]
        return max(c.steps * c.batch_size for c in options) * self.plan.sequence


def longer(plan: Plan, base: AlignmentConfig) -> list[Method]:
    """dot on eight times the tokens, where the setting is a real model."""
    if plan.shape is not None:
        return []
    dot = next(m for m in METHODS if m.name == "dot")
    about = f"dot on {_LONGER} times the tokens"
    return [replace(dot, name="dot-long", kind="ablation", about=about, options={"steps": _LONGER * base.steps})]


# what is named here and in no registry is left out
_PRUNED = ("prune-magnitude", "prune-wanda", "prune-layers", "2to4-wanda")
_RIVALS = ("random", "kmeans", "coactivation", "activation", "shared-rate", "shared-importance", "gate", "masks")
_SEVEN = ("dense", "dot", "dot-noise", "dot-shared", *_RIVALS, *_PRUNED)
_REAL = ("dense", "dot", "dot-noise", "shared-rate", "shared-importance", "gate", *_PRUNED)
PRESETS: dict[str, tuple[Part, ...]] = {
    "ci": (Part(CI, (0,), ablations=True),),
    "cpu": (Part(DEMO, (0, 1, 2), ablations=True), Part(SEVEN, (0,), methods=_SEVEN)),
    "real": (Part(SMOLLM2, (0,), methods=_REAL, ablations=("soft-router-less",)),),
    "gpu": (Part(replace(SMOLLM2, name="smollm2-gpu"), (0, 1, 2), ablations=True, options={"steps": 2048, "batch_size": 16}),),
}
