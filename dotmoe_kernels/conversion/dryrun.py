"""What a conversion would take, from the dense config alone: topology, parameters, memory, tokens and PREDICTED time.

The models are built without storage; nothing is loaded or computed. L layers, S tokens a sequence, T = micro-batch size * S tokens
a pass, w bytes a weight, q and v the widths of queries and of keys (= values), V the vocabulary, N parameters of the dense model.

Memory of a GPU that holds the whole model (every GPU of a data-parallel run does), in bytes:

    weights      w N                            frozen
    trained      16 L (F E + E H)               A and the routers in float32, their gradients, AdamW's two moments
    transport    12 L F E                       A of all layers in one tensor, the plan and its gradient, float32
    activations  T L (w (2 F + 2 q + 2 v + E)   kept for the backward pass: gate, up; queries, keys, values, attention's output; R;
                      + 4 (3 H + 2 E) + 12 K)   in float32 the inputs of two norms and of the router, logits, Q; the K chosen
                 + 4 T w F                      while one layer works: the hidden and its gradients
    loss         3 T w H + 16 C V               both last hidden states and a gradient; four float32 [C, V] of a chunk

What is not in it: the context of the driver and the allocator's gaps. The backward pass of Sinkhorn, rounding and AdamW come when
the activations are gone, and take less.

Time: flops a token, P parameters in products (the head included), a = 2 S q L of causal attention:

    teacher      2 P + a
    sparse pass  2 P + a + 2 L E H              of the dense width: the straight-through rule needs every neuron
    backward     2 P + 2.5 a + 4 L E H          through the activations alone, since the weights are frozen; through the router;
                 + 2 L F E                      and to the plan

over a share of the bfloat16 rate of one H200, plus 2 num_iters reads of A a step (Sinkhorn and its adjoint) at its memory's rate.
The share is an estimate: the paper's 3 hours on 8 H100 for LLaMA-3-8B would be a third of the same rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from .._checks import require
from .._tiles import H200_BANDWIDTH, H200_BF16
from ..alignment.chunked import chunk_rows
from ..alignment.config import AlignmentConfig
from .checks import count_parameters
from .config import DotMoeConfig
from .modeling import DotMoeForCausalLM, meta_backbone
from .recipes import Recipe
from .surgery import find_ffns

_SHARE = 0.4  # of the rate that a whole step reaches [estimate]


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
        except ValueError:
            raise ValueError(f"backbone.model_type in recipe {recipe.name} is {kind!r}; allowed: one of transformers") from None
    name = model or (recipe.model if recipe is not None else None)
    if name is None:
        raise ValueError("MODEL is missing; allowed: a model folder, a name, or a recipe with a backbone or a model")
    config = AutoConfig.from_pretrained(name)
    require(config.model_type != DotMoeConfig.model_type, "MODEL", f"{name}, which is already converted", "a dense model")
    return config


def predict_run(
    dense: PreTrainedConfig,
    sparse: DotMoeConfig,
    options: AlignmentConfig,
    *,
    sequence_length: int,
    dtype: torch.dtype | None = None,
    learned: bool = True,
) -> dict[str, Any]:
    """The figures of the docstring above, in seconds on a CPU.

    Args:
        dense: config of the dense model.
        sparse: the topology for it (``DotMoeConfig.for_dense``).
        options: of the training.
        sequence_length: S.
        dtype: of the weights. None: as the config says, or float32.
        learned: the assignment is learned; False: fixed, and the router alone trains.

    Returns:
        topology, parameters, memory in GB by part, tokens, flops, predicted seconds, and what they rest on.

    Raises:
        ValueError: a model without recognisable FFNs or already sparse, a topology that does not fit.
    """
    model = meta_backbone(dense)
    ffns = find_ffns(model)
    text = dense.get_text_config()
    kind = dtype or getattr(text, "dtype", None) or torch.float32
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    F, H = next(iter(ffns.values())).gate_proj.shape
    L, S, V = len(ffns), sequence_length, text.vocab_size
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or H // heads
    q, v = heads * width, (getattr(text, "num_key_value_heads", None) or heads) * width
    dense_total = sum(p.numel() for p in model.parameters())
    in_products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    with torch.device("meta"):
        total, active = count_parameters(DotMoeForCausalLM(sparse))
    E, K = sparse.num_experts, sparse.num_experts_per_tok
    plan = L * F * E if learned else 0

    w, T = kind.itemsize, (options.micro_batch_size or options.batch_size) * S
    kept = w * (2 * F + 2 * q + 2 * v + E) + 4 * (3 * H + 2 * E) + 12 * K  # bytes a token and layer
    memory = {
        "weights": w * dense_total,
        "trained": 16 * (plan + L * E * H),
        "transport": 12 * plan,
        "activations": T * L * kept + 4 * T * w * F,
        "loss": 3 * T * w * H + 16 * min(chunk_rows(V, torch.device("cuda")), T) * V,
    }
    attention = 2 * S * q * L
    flops = 6 * in_products + 4.5 * attention + 6 * L * E * H + 2 * plan  # a token
    tokens = options.steps * options.batch_size * S
    seconds = tokens * flops / (_SHARE * H200_BF16) + options.steps * 2 * options.num_iters * 4 * plan / H200_BANDWIDTH
    return {
        "layers": L,
        "hidden_size": H,
        "ffn_width": F,
        "num_experts": E,
        "expert_size": F // E,
        "top_k": K,
        "router": sparse.router,
        "dense_parameters": dense_total,
        "total_parameters": total,
        "active_parameters": active,
        "active_share": round(active / total, 4),
        "dtype": str(kind).removeprefix("torch."),
        "memory_gb": {name: round(size / 1e9, 3) for name, size in [*memory.items(), ("total", sum(memory.values()))]},
        "tokens_a_pass": T,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "sequence_length": S,
        "tokens": tokens,
        "flops": float(tokens * flops),
        "predicted_seconds": round(seconds, 3),
        "predicted_for": f"one H200 at {_SHARE:.0%} [estimate] of {H200_BF16 / 1e12:.0f} TFLOP/s in bfloat16; nobody measured it",
    }


def _duration(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.3g} seconds"


def run_lines(report: dict[str, Any]) -> list[str]:
    """The result of ``predict_run`` in words."""
    r, memory = report, dict(report["memory_gb"])
    whole = memory.pop("total")
    E, s, K = r["num_experts"], r["expert_size"], r["top_k"]
    return [
        f"topology: {r['layers']} layers of F = {r['ffn_width']} = E {E} x s {s}, K {K} ({K / E:.1%} of the FFN), "
        f"router {r['router']}",
        f"parameters: {r['total_parameters']:,} (dense {r['dense_parameters']:,}), "
        f"active a token {r['active_parameters']:,} ({r['active_share']:.1%})",
        f"tokens: {r['tokens']:,} ({r['steps']:,} steps of {r['batch_size']} x {r['sequence_length']})",
        f"predicted memory a GPU: {whole:.1f} GB in {r['dtype']}, {r['tokens_a_pass']:,} tokens a pass: "
        + ", ".join(f"{name} {size:.3g}" for name, size in memory.items()),
        f"predicted time: {_duration(r['predicted_seconds'])} on {r['predicted_for']}",
    ]
