"""The methods, each with its source and what it does here. All that train do so on the same tokens with the same loss.

A method puts its layers into a copy of the dense model. Layers with an affinity learn their assignment and their router, layers
without one their router alone; static methods train nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dotmoe_kernels.alignment.config import INITS, AlignmentConfig
from dotmoe_kernels.alignment.module import AlignmentFFN, collect_inputs
from dotmoe_kernels.alignment.transport import Transport
from dotmoe_kernels.conversion.pipeline import _build_layers
from dotmoe_kernels.models.config import DotMoeConfig
from dotmoe_kernels.models.surgery import DenseFFN, find_ffns, swap_ffn
from dotmoe_kernels.partitions import PARTITIONS, noise_router

from . import clusterings, pruning
from .layers import MaskedFFN, VariantFFN
from .settings import Topology
from .transports import MaskTransport

CALIBRATION = 2048  # tokens


class Made(NamedTuple):
    """What a method made of the model."""

    layers: dict[str, AlignmentFFN]
    zeroed: list[Tensor]  # whose zeros are not counted as parameters


@dataclass
class Job:
    """A copy of the dense model, which the method changes."""

    model: PreTrainedModel
    topology: Topology
    train: Tensor
    options: AlignmentConfig
    ffns: dict[str, DenseFFN] = field(init=False)

    def __post_init__(self) -> None:
        self.ffns = find_ffns(self.model)

    @property
    def calibration(self) -> Tensor:
        rows = -(-CALIBRATION // self.train.shape[1])
        return self.train[:rows].to(self.model.device)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.options.seed)


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        name: of its row and its file.
        kind: "dense", "dot", "moe" (routed, trained on the same tokens), "pruned", "2:4", "tuned" (dot, then its weights) or
            "ablation".
        source: paper or address.
        about: one line: what it does here.
        make: changes the model of a job.
        options: of AlignmentConfig, beside the setting's.
        seeded: differs from seed to seed.
        transport: of ``align``.
        tuning: of dot's model, after its alignment (see ``tuning``).
    """

    name: str
    kind: str
    source: str
    about: str
    make: Callable[[Job], Made]
    options: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True
    transport: Callable[[dict[str, AlignmentFFN], AlignmentConfig], Transport] = Transport
    tuning: dict[str, Any] | None = None

    @property
    def trained(self) -> bool:
        return self.kind not in ("dense", "pruned", "2:4")


# --- routed --------------------------------------------------------------------------------------------------------------


def package(method: str, *, router: str = "top_k", share: float = 1.0) -> Callable[[Job], Made]:
    """A method of ``convert``, built as it builds it; with ``share`` of the setting's K."""

    def make(job: Job) -> Made:
        top_k = max(1, round(share * job.topology.top_k))
        config = DotMoeConfig(num_experts=job.topology.num_experts, top_k=top_k, router=router)
        return Made(_build_layers(job.model, job.ffns, config, method, job.options, job.train), [])

    return make


def frozen(job: Job) -> Made:
    """As "dot" begins, its first assignment kept."""
    layers = package("dot")(job).layers
    Transport(layers, job.options).refresh(job.options.tau_end)
    for layer in layers.values():
        layer.affinity = layer.plan = None
    return Made(layers, [])


def adopt(job: Job, name: str, layer: AlignmentFFN, kind: type[VariantFFN]) -> VariantFFN:
    """``layer`` as another kind of it, in its place."""
    new = kind(
        layer.gate_proj,
        layer.up_proj,
        layer.down_proj,
        router_weight=layer.router_weight.detach(),
        top_k=layer.top_k,
        activation=layer.activation,
        affinity=None if layer.affinity is None else layer.affinity.detach(),
        expert_of=layer.expert_of,
    )
    swap_ffn(job.model, name, new)
    return new


def swap_in(job: Job, kind: type[VariantFFN] = VariantFFN, *, num_experts: int = 0, top_k: int = 0) -> dict[str, VariantFFN]:
    """A layer for every FFN, its router drawn as noise."""
    E, K = num_experts or job.topology.num_experts, top_k or job.topology.top_k
    generator, layers = job.generator(), {}
    for name, ffn in job.ffns.items():
        router = noise_router(E, ffn.gate_proj.shape[1], generator, std=job.options.init_std).to(ffn.gate_proj.device)
        weights = (ffn.gate_proj.data, ffn.up_proj.data, ffn.down_proj.data)
        layers[name] = kind(*weights, router_weight=router, top_k=K, activation=ffn.activation)
        swap_ffn(job.model, name, layers[name])
    return layers


def clustered(cluster: Callable[[VariantFFN, Tensor, torch.Generator], None]) -> Callable[[Job], Made]:
    """A fixed assignment of ``clusterings``, from the inputs of the FFNs."""

    def make(job: Job) -> Made:
        layers, generator = swap_in(job), job.generator()
        inputs = collect_inputs(job.model, dict(layers), job.calibration)
        for name, layer in layers.items():
            cluster(layer, inputs.pop(name), generator)
        return Made(dict(layers), [])

    return make


def by_importance(job: Job) -> Made:
    effect = clusterings.first_order_effect(job.model, job.ffns, job.calibration)
    left = iter(effect.values())
    return clustered(lambda layer, x, generator: clusterings.by_importance(layer, x, generator, next(left)))(job)


def masks(job: Job) -> Made:
    """Experts that may overlap, of widths that the layers share; one is chosen. The affinities are the masks' scores."""
    E = min(8, job.topology.num_experts)
    layers, generator = swap_in(job, MaskedFFN, num_experts=E, top_k=1), job.generator()
    for layer in layers.values():
        assert isinstance(layer, MaskedFFN)
        F, layer.share = len(layer.gate_proj), job.topology.top_k / job.topology.num_experts
        scores = job.options.init_std * torch.randn(F, E, generator=generator)
        layer.affinity = nn.Parameter(scores.to(layer.gate_proj.device))
    return Made(dict(layers), [])


# --- static --------------------------------------------------------------------------------------------------------------


def dense(job: Job) -> Made:
    return Made({}, [])


def prune_magnitude(job: Job) -> Made:
    scores = {name: pruning.magnitude_score(ffn) for name, ffn in job.ffns.items()}
    pruning.keep_neurons(job.ffns, scores, job.topology.num_experts, job.topology.top_k)
    return Made({}, [])


def prune_wanda(job: Job) -> Made:
    scores = pruning.wanda_scores(job.model, job.ffns, job.calibration)
    pruning.keep_neurons(job.ffns, scores, job.topology.num_experts, job.topology.top_k)
    return Made({}, [])


def prune_layers(job: Job) -> Made:
    E, K = job.topology.num_experts, job.topology.top_k
    budget = sum(p.numel() for p in job.model.parameters())
    for ffn in job.ffns.values():
        F, H = ffn.gate_proj.shape
        budget += E * H - 3 * H * (F - K * F // E)
    pruning.drop_blocks(job.model, pruning.block_influence(job.model, job.calibration), budget)
    return Made({}, [])


def two_to_four_magnitude(job: Job) -> Made:
    return Made({}, pruning.prune_two_to_four(job.model, None))


def two_to_four_wanda(job: Job) -> Made:
    modules: dict[str, nn.Module] = dict(pruning.block_linears(job.model))
    return Made({}, pruning.prune_two_to_four(job.model, pruning.input_norms(job.model, modules, job.calibration)))


# --- the registry --------------------------------------------------------------------------------------------------------

DOT = "DOT-MoE, arXiv 2606.01666"
_NOISE = {"init": "noise"}  # of the router, which then learns faster than a fitted one

METHODS: tuple[Method, ...] = (
    Method("dense", "dense", "-", "the model that is converted", dense, seeded=False),
    Method("dot", "dot", DOT, "assignment and router learned together, from noise or shared, as the inputs say", package("dot")),
    *(
        Method(f"dot-{init}", "dot", DOT, f"the same, from {init}", package("dot"), {"init": init})
        for init in INITS
        if init != "auto"
    ),
    Method("dot-frozen", "moe", DOT, "dot's first assignment kept, the router learned: transport cost off", frozen),
    Method("random", "moe", "LLaMA-MoE, arXiv 2406.16554", "random equal experts", package("random"), _NOISE),
    Method("kmeans", "moe", "MoEfication, arXiv 2110.01786", "balanced k-means on the neurons' weights", package("kmeans"), _NOISE),
    Method(
        "coactivation",
        "moe",
        "MoEfication, arXiv 2110.01786, section 3.2",
        "balanced partition of the graph of neurons that are among a token's strongest tenth together; router by least squares",
        clustered(clusterings.coactivation),
    ),
    Method(
        "activation",
        "moe",
        "in the manner of CMoE, arXiv 2502.04416",
        "balanced k-means on the neurons' contributions by token; router by least squares",
        package("activation"),
    ),
    *(
        Method(name, "moe", "dotmoe_kernels.partitions", "the start of dot, its assignment kept", package(name))
        for name in PARTITIONS
        if name not in ("random", "kmeans", "activation")
    ),
    Method(
        "shared-rate",
        "moe",
        "CMoE, arXiv 2502.04416",
        "half of the K experts always on, of the neurons that are most often among a token's strongest; the rest clustered",
        clustered(clusterings.by_rate),
    ),
    Method(
        "shared-importance",
        "moe",
        "LLaMA-MoE-v2, arXiv 2411.15708",
        "half of the K experts always on, of the neurons of the largest first-order effect on the loss; the rest clustered",
        by_importance,
    ),
    Method(
        "gate",
        "moe",
        "ExpertWeaver",
        "balanced k-means on gate activations, router = mean gate vector, always on what varies least, by layer",
        clustered(clusterings.by_gate),
    ),
    Method(
        "masks",
        "moe",
        "ToMoE, arXiv 2501.15316",
        "masks learned without capacity: 8 experts of any width that may overlap, one a token, one budget over all layers",
        masks,
        _NOISE,
        transport=MaskTransport,
    ),
    Method(
        "prune-magnitude",
        "pruned",
        "group magnitude as in LLM-Pruner, arXiv 2305.11627",
        "the neurons of the largest weights; nothing is trained",
        prune_magnitude,
        seeded=False,
    ),
    Method(
        "prune-wanda",
        "pruned",
        "Wanda's score by neuron, arXiv 2306.11695",
        "the neurons of the largest sum of |Wd| |U|; nothing is trained",
        prune_wanda,
        seeded=False,
    ),
    Method(
        "prune-layers",
        "pruned",
        "ShortGPT, arXiv 2403.03853",
        "blocks of the least influence dropped whole; nothing is trained",
        prune_layers,
        seeded=False,
    ),
    Method(
        "2to4-magnitude",
        "2:4",
        "magnitude at 2:4, arXiv 2104.08378",
        "two of four weights of every linear layer in the blocks, by size; nothing is trained",
        two_to_four_magnitude,
        seeded=False,
    ),
    Method(
        "2to4-wanda",
        "2:4",
        "Wanda at 2:4, arXiv 2306.11695",
        "two of four weights of every linear layer in the blocks, by |W| |x|; nothing is trained",
        two_to_four_wanda,
        seeded=False,
    ),
)
