"""What each piece of dot is worth: dot with one thing changed, everything else as in the row "dot" of the same setting.

The starts (dot-<init>) and the transport cost off (dot-frozen: capacity and the router alone are left) are rows of the methods too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dotmoe_kernels.alignment.config import AlignmentConfig

from .layers import VariantFFN
from .methods import DOT, Job, Made, Method, adopt, package
from .transports import NoCapacity, OptimalRounding, RowSoftmax

_TERMS = ("kl", "ce", "z", "balance", "hidden")
_BIAS_RATE, _SHARPNESS = 0.005, 4.0
_HIDDEN = 4.0  # the weight of the fifth term where a setting has none


def varied(**attributes: Any) -> Callable[[Job], Made]:
    """dot's layers as VariantFFN with these attributes."""

    def make(job: Job) -> Made:
        layers = {}
        for name, layer in package("dot")(job).layers.items():
            layers[name] = adopt(job, name, layer, VariantFFN)
            for attribute, value in attributes.items():
                setattr(layers[name], attribute, value)
        return Made(dict(layers), [])

    return make


_DOT_LAYERS = package("dot")


def _structural() -> list[Method]:
    def arm(name: str, about: str, make: Callable[[Job], Made] = _DOT_LAYERS, **rest: Any) -> Method:
        return Method(name, "ablation", DOT, about, make, **rest)

    return [
        arm("no-transport", "plan by softmax of each neuron's row; the rounding alone keeps the capacity", transport=RowSoftmax),
        arm(
            "no-capacity",
            "plan by softmax, every neuron to its favourite expert, of whatever width: see the active parameters",
            varied(balanced=False),
            transport=NoCapacity,
        ),
        arm("optimal-rounding", "the best balanced assignment instead of the greedy's", transport=OptimalRounding),
        arm(
            "soft-router",
            "LapSum's truncated soft top-k instead of top-K (SoftMoE, arXiv 2606.17952)",
            package("dot", router="soft"),
        ),
        arm(
            "soft-router-less",
            "the same with three quarters of K: its mean is above its K, and so about as many experts as dot has",
            package("dot", router="soft", share=0.75),
        ),
        arm(
            "bias",
            f"experts chosen by logit and bias, which moves {_BIAS_RATE:g} a step against the load (arXiv 2408.15664)",
            varied(bias_rate=_BIAS_RATE),
            options={"balance": 0.0},
        ),
        arm(
            "sharp-balance",
            f"the balance term sees the softmax of {_SHARPNESS:g} times the logits",
            varied(sharpness=_SHARPNESS),
        ),
        arm("softmax-weights", "the chosen experts weighted by softmax, times K, instead of 1", varied(weighting="softmax")),
    ]


def _options(base: AlignmentConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, what it says, the options that differ)."""
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("implicit", "implicit gradient at the fixed point instead of the unrolled steps", {"backward": "implicit"}),
        ("unrolled", "the unrolled steps instead of the implicit gradient", {"backward": "unroll"}),
        ("sinkhorn-1", "one Sinkhorn step", {"num_iters": 1, "tol": 0.0}),
        ("sinkhorn-5", "5 Sinkhorn steps", {"num_iters": 5, "tol": 0.0}),
        ("tolerance-0.1", "steps until every column is within a tenth of its capacity", {"tol": 0.1}),
        ("tolerance-1e-6", "200 steps or a tolerance of 1e-6", {"num_iters": 200, "tol": 1e-6}),
        ("tau-1", "temperature 1 throughout", {"tau_start": 1.0, "tau_end": 1.0}),
        ("tau-0.1", "temperature 0.1 throughout", {"tau_start": 0.1, "tau_end": 0.1}),
        ("tau-slow", "temperature falling over the whole run", {"tau_decay": 1.0}),
        ("affinity-lr-low", "the affinities' learning rate a tenth", {"affinity_lr": base.affinity_lr / 10}),
        ("affinity-lr-high", "the affinities' learning rate five times", {"affinity_lr": base.affinity_lr * 5}),
        ("router-lr-low", "the router's learning rate a tenth", {"router_lr": base.router_rate / 10}),
        ("router-lr-high", "the router's learning rate five times", {"router_lr": base.router_rate * 5}),
        ("paper-lr", "both learning rates as in the paper, 5e-4", {"affinity_lr": 5e-4, "router_lr": 5e-4}),
        ("centre", "the routers do not see their mean input", {"centre": True}),
        ("no-centre", "the routers see their mean input", {"centre": False}),
    ]
    found += [(f"no-{term}", f"the term {term} of the loss off", {term: 0.0}) for term in _TERMS]
    found.append(("hidden", f"distillation of the blocks' outputs too, weight {_HIDDEN:g}", {"hidden": base.hidden or _HIDDEN}))
    return found


def ablations(base: AlignmentConfig) -> list[Method]:
    """Those that differ from ``base``, the options of dot."""
    arms = [Method(n, "ablation", DOT, about, _DOT_LAYERS, options) for n, about, options in _options(base)]
    return _structural() + [arm for arm in arms if dataclasses.replace(base, **arm.options) != base]
