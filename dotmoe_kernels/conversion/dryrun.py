"""What a conversion would take, from the dense config alone: topology, parameters, and of every stage the tokens, the memory and
the PREDICTED time that ``costs`` counts. The models are built without storage; nothing is loaded or computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from .._checks import refuse, require
from .._tiles import H200_BF16
from ..alignment.config import AlignmentConfig
from ..models.config import DotMoeConfig
from ..models.counts import count_parameters
from ..models.modeling import DotMoeForCausalLM, meta_backbone
from ..models.surgery import find_ffns
from ..routing.budgets import slots
from .costs import SHARE, Cost, Sizes, align_cost, finetune_cost, reconstruct_cost
from .finetuning import FinetuneConfig
from .recipes import Recipe
from .scaling import gpu_lines, predict_gpus
from .sources import location

_H200_GB = 141  # as published


def dense_config(model: str | None, recipe: Recipe | None) -> PreTrainedConfig:
    """The dense config: that of ``model``, or the recipe's ``backbone``, or that of the recipe's ``model``.

    Raises:
        ValueError: there is none, transformers does not know it, or it is already converted.
    """
    if model is None and recipe is not None and recipe.backbone:
        values = dict(recipe.backbone)
        kind = values.pop("model_type", None)
        require(kind is not None, f"backbone in recipe {recipe.name}", "without model_type", 'a model type, such as "llama"')
        try:
            return AutoConfig.for_model(kind, **values)
        except StrictDataclassError as error:
            refuse(f"backbone in recipe {recipe.name}", f"no {kind} ({error})", "sizes that fit one another")
        except ValueError:
            raise ValueError(f"backbone.model_type in recipe {recipe.name} is {kind!r}; allowed: one of transformers") from None
    name = model or (recipe.model if recipe is not None else None)
    if name is None:
        raise ValueError("MODEL is missing; allowed: a model folder, a name, or a recipe with a backbone or a model")
    place, file = location(name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, **file)
    require(config.model_type != DotMoeConfig.model_type, "MODEL", f"{name}, which is already converted", "a dense model")
    return config


def _most_experts(sparse: DotMoeConfig, cap: float) -> int:
    """Of a token."""
    E, K = sparse.num_experts, sparse.num_experts_per_tok
    return K if sparse.router != "soft" else max(slots(k, sparse.router_cap or cap, E) for k in sparse.router_k or [K])


def _sizes(dense: PreTrainedConfig, sparse: DotMoeConfig, sequence_length: int, w: int, learned: bool, cap: float) -> Sizes:
    most = _most_experts(sparse, cap)
    with torch.device("meta"):
        n, active = count_parameters(DotMoeForCausalLM(sparse))  # fills in what the config leaves out
    model = meta_backbone(dense)
    ffns, text = find_ffns(model), dense.get_text_config()
    F, H = next(iter(ffns.values())).gate_proj.shape
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or H // heads
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    inside, head = tuple(f"{name}." for name in ffns), model.get_output_embeddings()
    blocks = tuple(f"{name.rpartition('.')[0]}." for name in ffns)
    around = [m for name, m in linears.items() if m is not head and not name.startswith(inside)]  # what adapters go on
    return Sizes(
        L=len(ffns),
        F=F,
        H=H,
        E=sparse.num_experts,
        K=sparse.num_experts_per_tok,
        slots=most,
        soft=sparse.router == "soft",
        V=text.vocab_size,
        S=sequence_length,
        q=heads * width,
        v=(getattr(text, "num_key_value_heads", None) or heads) * width,
        w=w,
        N=sum(p.numel() for p in model.parameters()),
        n=n,
        active=active,
        P=sum(m.weight.numel() for m in linears.values()),
        adapters=sum(m.in_features + m.out_features for m in around),
        around=sum(p.numel() for name, p in model.named_parameters() if not name.startswith(blocks)),
        learned=learned,
    )


def predict_run(
    dense: PreTrainedConfig,
    sparse: DotMoeConfig,
    options: AlignmentConfig,
    *,
    sequence_length: int,
    dtype: torch.dtype | None = None,
    learned: bool = True,
    stages: Sequence[str] = ("align",),
    reconstruct_steps: int = 100,
    tuning: FinetuneConfig | None = None,
    teacher: str | None = None,
    gpus: int | None = None,
    activation_checkpointing: bool = False,
) -> dict[str, Any]:
    """The figures of ``costs``, and with ``gpus`` of ``scaling``.

    Args:
        dense: config of the dense model.
        sparse: the topology for it (``DotMoeConfig.for_dense``).
        options: of the training.
        sequence_length: S.
        dtype: of the weights. None: as the config says, or float32.
        learned: the assignment is learned; False: fixed, and the router alone trains.
        stages: those of the run, of reconstruct, align and finetune.
        reconstruct_steps: of each layer.
        tuning: options of the stage finetune. None: FinetuneConfig().
        teacher: of that stage: "itself", the model with every expert on, or "another". None: the text alone.
        gpus: as many at the most, from 1 on. None: one.
        activation_checkpointing: align and finetune keep of a block its input alone, and compute it again.

    Returns:
        topology, parameters; ``stages``: of each its steps, tokens, predicted memory in GB by part, flops and predicted seconds;
        the predicted memory and seconds of the whole run, and what they rest on.

    Raises:
        ValueError: a model without recognisable FFNs or already sparse, a topology that does not fit.
    """
    kind = dtype or getattr(dense.get_text_config(), "dtype", None) or torch.float32
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    z = _sizes(dense, sparse, sequence_length, kind.itemsize, learned, options.cap)
    costs: dict[str, Cost] = {}
    for stage in stages:
        if stage == "reconstruct":
            costs[stage] = reconstruct_cost(z, options, reconstruct_steps)
        elif stage == "align":
            costs[stage] = align_cost(z, options, activation_checkpointing)
        else:
            costs[stage] = finetune_cost(z, tuning or FinetuneConfig(), kind, teacher, activation_checkpointing)
    rests_on = f"one H200 at {SHARE:.0%} [estimate] of {H200_BF16 / 1e12:.0f} TFLOP/s in bfloat16; nobody measured it"
    if kind == torch.float32 or (kind == torch.float16 and "finetune" in costs):
        rests_on += "; products in float32, which this run has, are slower"
    more: dict[str, Any] = {"stages": list(stages), "reconstruct_steps": reconstruct_steps, "tuning": tuning or FinetuneConfig()}
    more |= {"most": gpus, "dtype": kind, "teacher": teacher, "capacity": _H200_GB * 1e9}
    more["again"] = activation_checkpointing
    return {
        "layers": z.L,
        "hidden_size": z.H,
        "ffn_width": z.F,
        "num_experts": z.E,
        "expert_size": z.F // z.E,
        "top_k": z.K,
        "router": sparse.router,
        "dense_parameters": z.N,
        "total_parameters": z.n,
        "active_parameters": z.active,
        "active_share": round(z.active / z.n, 4),
        "dtype": str(kind).removeprefix("torch."),
        "sequence_length": z.S,
        "stages": {name: _figures(cost) for name, cost in costs.items()},
        "predicted_memory_gb": round(max(sum(cost.memory.values()) for cost in costs.values()) / 1e9, 3),
        "predicted_seconds": round(sum(cost.seconds for cost in costs.values()), 3),
        "predicted_for": rests_on,
        **({} if gpus is None else {"gpus": predict_gpus(z, options, **more)}),
    }


def _figures(cost: Cost) -> dict[str, Any]:
    memory = [*cost.memory.items(), ("total", sum(cost.memory.values()))]
    return {
        "steps": cost.steps,
        "tokens": cost.tokens,
        "tokens_a_step": cost.tokens_a_step,
        "tokens_a_pass": cost.tokens_a_pass,
        "predicted_memory_gb": {name: round(size / 1e9, 3) for name, size in memory},
        "flops": cost.flops,
        "predicted_seconds": round(cost.seconds, 3),
    }


def _duration(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.3g} seconds"


def _stage_lines(stage: str, figures: dict[str, Any], dtype: str) -> list[str]:
    f, memory = figures, dict(figures["predicted_memory_gb"])
    whole = memory.pop("total")
    steps = f"{f['steps']:,} steps of {f['tokens_a_step']:,} tokens"
    given = (
        f"{steps} in each layer, from the first {f['tokens']:,}" if stage == "reconstruct" else f"{f['tokens']:,} tokens, {steps}"
    )
    return [
        f"stage {stage}: {given}, {f['tokens_a_pass']:,} a pass",
        f"  predicted memory a GPU: {whole:.1f} GB in {dtype}: " + ", ".join(f"{name} {size:.3g}" for name, size in memory.items()),
        f"  predicted time: {_duration(f['predicted_seconds'])}",
    ]


def run_lines(report: dict[str, Any]) -> list[str]:
    """The result of ``predict_run`` in words."""
    r = report
    E, s, K = r["num_experts"], r["expert_size"], r["top_k"]
    return [
        f"topology: {r['layers']} layers of F = {r['ffn_width']} = E {E} x s {s}, K {K} ({K / E:.1%} of the FFN), "
        f"router {r['router']}",
        f"parameters: {r['total_parameters']:,} (dense {r['dense_parameters']:,}), "
        f"active a token {r['active_parameters']:,} ({r['active_share']:.1%})",
        *(line for stage, figures in r["stages"].items() for line in _stage_lines(stage, figures, r["dtype"])),
        f"predicted in all: {_duration(r['predicted_seconds'])}, up to {r['predicted_memory_gb']:.1f} GB"
        + (f", more than the {_H200_GB} of one H200" if r["predicted_memory_gb"] > _H200_GB else ""),
        f"predicted for {r['predicted_for']}",
        *(gpu_lines(r["gpus"], _duration) if "gpus" in r else []),
    ]
