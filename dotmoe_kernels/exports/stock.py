"""The stock architectures: what each takes, and a converted model as one of them.

A converted model adds its top K experts with weight exactly 1; a stock router weighs them by a softmax or a sigmoid of the
logits z. With its weights multiplied by eps = 2^-m the order stays and the weights become uniform:

    softmax over the selected K      (1 + eps (z - mean z)) / K       times K, folded into the down projections
    softmax over all E               (1 + eps (z - mean z)) / E       times E, folded likewise
    2 sigmoid                        1 + eps z / 2                    nothing to fold
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.block import moe_blocks
from ..models.modeling import DotMoeForCausalLM
from ..models.stock import empty_model, is_built_as

SHARED_WIDTH = 32  # of Qwen2Moe's shared expert, all zero: llama.cpp's and vLLM's need one, and quantised rows have 32 values
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")  # rope types that need the same fields in every architecture
_LIKE_LLAMA = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
_SHARED = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout")
_LLAMAS = ("llama", "mistral", "ministral", "phi3", "smollm3")  # the same layer, once Phi-3's fused projections are split
_BIASED = ("qwen2", "seed_oss")  # that with biases of queries, keys and values
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class Architecture:
    """One row of the table. ``fields`` makes the config's own fields; ``takes`` names features beyond plain attention."""

    name: str
    model_type: str
    backbones: tuple[str, ...]
    scores: str  # "selected" | "all": softmax over those; "sigmoid"
    fold: str  # "K" | "E" | "": what the down projections are multiplied by
    takes: frozenset[str]
    fields: Callable[[DotMoeForCausalLM], dict[str, Any]]
    why: str
    block: str = "mlp"  # in a layer, and the router in that
    gate: str = "gate"

    def factor(self, model: DotMoeForCausalLM) -> int:
        """What the down projections are multiplied by."""
        config = model.config
        return {"K": config.num_experts_per_tok, "E": config.num_experts, "": 1}[self.fold]


def _named(model: DotMoeForCausalLM, ending: str) -> bool:
    return any(name.endswith(ending) for name in model.state_dict())


def _window(dense: Any) -> tuple[int | None, bool]:
    """(window, mixed): the one of every layer, or whether layers differ."""
    layers = dense.num_hidden_layers
    window = getattr(dense, "sliding_window", None)
    if not getattr(dense, "use_sliding_window", True) or not window:
        return None, False
    kinds = getattr(dense, "layer_types", None) or ["sliding_attention"] * layers
    sliding = [kind == "sliding_attention" for kind in kinds]
    return (window if all(sliding) else None), any(sliding) and not all(sliding)


def _expert_size(model: DotMoeForCausalLM) -> int:
    return next(iter(moe_blocks(model).values())).experts.expert_size


def _mixtral(model: DotMoeForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "num_local_experts": config.num_experts,
        "intermediate_size": _expert_size(model),
        "sliding_window": _window(config.get_text_config())[0],
    }


def _qwen2_moe(model: DotMoeForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "num_experts": config.num_experts,
        "moe_intermediate_size": _expert_size(model),
        "intermediate_size": config.num_experts * _expert_size(model),
        "shared_expert_intermediate_size": SHARED_WIDTH,
        "norm_topk_prob": False,  # llama.cpp never does
        "qkv_bias": True,  # of zeros where the backbone has none: llama.cpp wants the tensors
        "use_sliding_window": False,
    }


def _qwen3_moe(model: DotMoeForCausalLM) -> dict[str, Any]:
    config, (window, _) = model.config, _window(model.config.get_text_config())
    return {
        "num_experts": config.num_experts,
        "moe_intermediate_size": _expert_size(model),
        "intermediate_size": config.num_experts * _expert_size(model),
        "norm_topk_prob": True,
        "attention_bias": _named(model, "self_attn.q_proj.bias"),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _granite_moe(model: DotMoeForCausalLM) -> dict[str, Any]:
    config = model.config
    dense = config.get_text_config()
    neutral = dict.fromkeys(_MULTIPLIERS, 1.0) | {"attention_multiplier": _head_dim(dense) ** -0.5}
    return {
        "num_local_experts": config.num_experts,
        "intermediate_size": _expert_size(model),
        "attention_bias": _named(model, "self_attn.q_proj.bias"),
        **{name: getattr(dense, name, default) for name, default in neutral.items()},
    }


def _glm4_moe(model: DotMoeForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "n_routed_experts": config.num_experts,
        "moe_intermediate_size": _expert_size(model),
        "intermediate_size": config.num_experts * _expert_size(model),
        "n_shared_experts": 1,  # of zeros: what every engine reads
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "partial_rotary_factor": _partial_rotary(config.get_text_config()),
        "attention_bias": _named(model, "self_attn.q_proj.bias"),
        "use_qk_norm": _named(model, "self_attn.q_norm.weight"),
        "num_nextn_predict_layers": 0,
    }


ARCHITECTURES = (  # the order of preference
    Architecture(
        *("qwen3_moe", "qwen3_moe", ("qwen3",), "selected", "K", frozenset({"window"}), _qwen3_moe),
        why="its attention is Qwen3's, and it renormalises the weights of the selected experts",
    ),
    Architecture(
        *("mixtral", "mixtral", _LLAMAS, "selected", "K", frozenset({"window"}), _mixtral),
        why="its attention is LLaMA's and Mistral's, and it renormalises the weights of the selected experts",
    ),
    Architecture(
        *("qwen2_moe", "qwen2_moe", (*_BIASED, *_LLAMAS), "all", "E", frozenset(), _qwen2_moe),
        why="its attention has Qwen2's biases",
    ),
    Architecture(
        *("granite_moe", "granitemoe", ("granite", *_LLAMAS, *_BIASED), "selected", "K"),
        *(frozenset({"multipliers"}), _granite_moe),
        why="it has Granite's multipliers, and selects experts by their logits",
        block="block_sparse_moe",
        gate="router",
    ),
    Architecture(
        *("glm4_moe", "glm4_moe", (*_LLAMAS, *_BIASED, "qwen3", "granite"), "sigmoid", ""),
        *(frozenset({"partial rotary"}), _glm4_moe),
        why="it routes in float32, and nothing is folded into its weights",
    ),
)


def _head_dim(dense: Any) -> int:
    return getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads


def _partial_rotary(dense: Any) -> float:
    rope = getattr(dense, "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor", getattr(dense, "partial_rotary_factor", None) or 1.0))


def target_fields(model: DotMoeForCausalLM, architecture: Architecture) -> dict[str, Any]:
    """The config of the target as a dictionary."""
    config, dense = model.config, model.config.get_text_config()
    rope = dict(getattr(dense, "rope_parameters", None) or {})
    fields = {name: getattr(dense, name) for name in (*_LIKE_LLAMA, *_SHARED) if hasattr(dense, name)}
    fields |= {
        "head_dim": _head_dim(dense),
        "hidden_act": "silu",
        "num_experts_per_tok": config.num_experts_per_tok,
        "tie_word_embeddings": bool(dense.tie_word_embeddings),
        "rope_parameters": rope,
        "dtype": model.dtype,
        **architecture.fields(model),
    }
    if "partial_rotary_factor" in fields:
        rope["partial_rotary_factor"] = fields["partial_rotary_factor"]
    return fields


def stock_skeleton(model: DotMoeForCausalLM, architecture: Architecture) -> Any:
    """The target without storage."""
    return empty_model(architecture.model_type, target_fields(model, architecture))


def _config_refusal(model: DotMoeForCausalLM, architecture: Architecture) -> tuple[str, str] | None:
    """What of the config the target lacks, as (what is given, what is allowed)."""
    config, dense = model.config, model.config.get_text_config()
    if config.router != "top_k":
        return f'of router "{config.router}"', 'router "top_k": a stock router has one number of experts and no weights p'
    if config.num_zero_experts:
        return f"of {config.num_zero_experts} zero experts", "none: in a stock router every choice is an expert that computes"
    blocks = moe_blocks(model)
    sizes = {(b.gate.num_experts, b.gate.top_k, b.experts.expert_size) for b in blocks.values()}
    if len(sizes) != 1 or len(blocks) != dense.num_hidden_layers:
        return "with layers of unequal width", "one number and one width of experts in every layer"
    activation = next(iter(blocks.values())).experts.activation
    if activation != "silu":
        return f"of activation {activation}", "silu, the only one that engines run in this architecture"
    takes, rope = architecture.takes, getattr(dense, "rope_parameters", None) or {}
    window, mixed = _window(dense)
    kind, part = rope.get("rope_type", "per layer" if rope else "default"), _partial_rotary(dense)
    neutral = dict.fromkeys(_MULTIPLIERS, 1) | {"attention_multiplier": _head_dim(dense) ** -0.5}
    scaled = [name for name in _MULTIPLIERS if abs(getattr(dense, name, neutral[name]) - neutral[name]) > 1e-6]
    for found, words, allowed in (
        (mixed, "with a sliding window in some layers", "one kind of attention in every layer"),
        (window and "window" not in takes, f"with a sliding window of {window} tokens", "attention without a window"),
        (scaled and "multipliers" not in takes, f"with {', '.join(scaled)}", "no multiplier"),
        (part != 1 and "partial rotary" not in takes, f"with partial_rotary_factor {part}", "rotary embeddings of whole heads"),
        (kind not in _ROPE_TYPES, f"with rope scaling {kind!r}", ", ".join(_ROPE_TYPES)),
        (0 in (getattr(dense, "no_rope_layers", None) or [1]), "with layers without rotary embeddings", "rotary embeddings in all"),
        *(
            (getattr(dense, name, None), f"with {name} {getattr(dense, name, None)}", f"no {name}")
            for name in ("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "query_pre_attn_scalar")
        ),
    ):
        if found:
            return words, allowed
    return None


def refusal(model: DotMoeForCausalLM, architecture: Architecture) -> tuple[str, str] | None:
    """Why ``model`` cannot be one of ``architecture``, as (what is given, what is allowed); None where nothing speaks against it.

    The config first, then the backbone's name, then every tensor by name and shape.
    """
    if found := _config_refusal(model, architecture):
        return found
    kind = model.config.dense_config.model_type
    words = _tensor_refusal(model, architecture)
    if not is_built_as(model.backbone, architecture.backbones):
        words = words or "whose layers compute something else from such tensors, as far as is known"
        return f"of backbone {kind}, {words}", f"backbone {' | '.join(architecture.backbones)}"
    return (words, f"a model whose tensors are those of {architecture.model_type}") if words else None


def _tensor_refusal(model: DotMoeForCausalLM, architecture: Architecture) -> str:
    """The tensors, by kind, that one side has and the other has not; "" where all have a place."""
    tensors = dict(_outside(model))
    target = stock_skeleton(model, architecture).state_dict()
    inside = tuple(f"{path}." for path in target_blocks(model, architecture).values())
    more = [name for name, tensor in tensors.items() if name not in target or target[name].shape != tensor.shape]
    fewer = [name for name in target if name not in tensors and not name.startswith(inside) and not name.endswith(".bias")]
    for names, word in ((more, "with"), (fewer, "without")):
        kinds = dict.fromkeys(".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names)
        if kinds:
            return f"{word} {', '.join(list(kinds)[:4])}"
    return ""


def _outside(model: DotMoeForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The tensors outside the FFNs, under LLaMA's names: a fused projection of the attention is three views."""
    inside, dense = tuple(f"{name}." for name in moe_blocks(model)), model.config.get_text_config()
    heads, keys, width = dense.num_attention_heads, dense.num_key_value_heads, _head_dim(dense)
    for name, tensor in model.state_dict().items():
        if name.startswith(inside):
            continue
        if ".qkv_proj." in name:
            parts = tensor.split([heads * width, keys * width, keys * width])
            yield from (
                (name.replace("qkv_proj", part), value) for part, value in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)
            )
        else:
            yield name, tensor


def target_blocks(model: DotMoeForCausalLM, architecture: Architecture) -> dict[str, str]:
    """Path of the target's block by ours."""
    return {name: f"{name.rpartition('.')[0]}.{architecture.block}" for name in moe_blocks(model)}


@torch.no_grad()
def stock_tensors(
    model: DotMoeForCausalLM, architecture: Architecture, shifts: Mapping[str, int], target: Any, unit: str = ""
) -> tuple[dict[str, Tensor], bool]:
    """The tensors of ``target`` by name, and whether the fold rounded nothing.

    Args:
        model: for which ``refusal`` is None.
        architecture: of the table.
        shifts: m of every layer, by path.
        target: ``model`` as one of ``architecture``, without storage.
        unit: path of a module: its tensors alone, so that no other needs storage.
    """
    start = f"{unit}." if unit else ""
    factor, paths, lossless = architecture.factor(model), target_blocks(model, architecture), True
    tensors = {name: tensor for name, tensor in _outside(model) if name.startswith(start)}
    for name, block in moe_blocks(model).items():
        if not name.startswith(start):
            continue
        path, experts = paths[name], block.experts
        weight = block.gate.weight.float() if architecture.scores == "sigmoid" else block.gate.weight  # that one routes in float32
        folded = experts.down_rows if factor == 1 else experts.down_rows * factor
        lossless = lossless and (folded.is_meta or _is_product(folded, experts.down_rows, factor))
        tensors[f"{path}.{architecture.gate}.weight"] = weight * 2.0 ** -shifts[name]
        tensors[f"{path}.experts.gate_up_proj"] = experts.gate_up_proj
        tensors[f"{path}.experts.down_proj"] = folded.transpose(1, 2)
    for name, place in target.state_dict().items():
        if name.startswith(start) and name not in tensors:
            fill = torch.ones if name.endswith("shared_expert_gate.weight") else torch.zeros  # llama.cpp divides by its logit
            kept = torch.float32 if name.endswith("e_score_correction_bias") else model.dtype
            tensors[name] = fill(place.shape, dtype=kept)
    return tensors, lossless


def _is_product(folded: Tensor, rows: Tensor, factor: int) -> bool:
    """Whether folded [E, s, H] is rows times factor without rounding; expert by expert, since float64 takes room."""
    return factor == 1 or all(
        torch.equal(row.double() * factor, product.double()) for row, product in zip(rows, folded, strict=True)
    )
