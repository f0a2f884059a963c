"""Every causal LM class of the installed transformers, tiny: its config's sizes are replaced by small ones, by their names."""

from __future__ import annotations

import tomllib
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
H, F, LAYERS, HEADS, KV_HEADS, D, V = 32, 64, 2, 4, 2, 8, 64
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "moe_k", "moe_topk")
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim"), H),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), F),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_blocks", "num_encoder_blocks", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "swa_v_head_dim", "qk_nope_head_dim"), D),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), D),
    "mamba_d_head": D,
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(ACTIVE, 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("nemo_conv_channels", "ext_pw_out_channel", "depthwise_separable_out_channel"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), V),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "max_position_embeddings": 64,
    "encoder_hash_byte_group_vocab": 64,
    "initializer_range": 0.3,  # large enough that every layer matters
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": D, "mamba_d_state": 8, "mamba_n_groups": 1}
_CONV = {"layer_types": ["conv", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
# what else must change for the small sizes to fit together, and one layer of each type
EXTRA: dict[str, dict] = {
    "bailing_hybrid": _LINEAR,
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": KV_HEADS}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [F] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "lfm3": _CONV,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "olmo_hybrid": _LINEAR,
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_text": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {"pronunciation_vocab_size": 16, "pronunciation_embed_dim": 16, "shape_vocab_size": 16, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "mamba_dt_rank": 4},
    "zamba2": {
        **{"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
        **{"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_d_state": 8},
    },
    "zaya": {"num_experts_per_tok": 1},
}


def _small(config: PreTrainedConfig) -> dict:
    values = config.to_dict()
    fields = {name: value for name, value in SMALL.items() if name in values or name in config.attribute_map}
    for name in (*EXPERTS, *ACTIVE):  # a dense model stays one
        if not values.get(config.attribute_map.get(name, name)):
            fields.pop(name, None)
    if "kv_lora_rank" in values:
        fields["num_key_value_heads"] = HEADS
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = {"model_type": part.model_type, **_small(part)}
    return fields


def tiny_config(kind: str) -> PreTrainedConfig:
    """Whatever transformers raises, where the sizes do not fit together."""
    fields = _small(CONFIG_MAPPING[kind]())
    for name, value in EXTRA.get(kind, {}).items():
        both = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = fields[name] | value if both else value
    return AutoConfig.for_model(kind, **fields)


def tiny_model(kind: str) -> PreTrainedModel:
    """In eval mode."""
    return AutoModelForCausalLM.from_config(tiny_config(kind)).eval()


def expected_outcomes() -> tuple[str, dict[str, str]]:
    """The version of transformers they hold for, and by kind "equal", "not made" or "refused: why"."""
    table = tomllib.loads((Path(__file__).parent / "architectures.toml").read_text(encoding="utf-8"))
    outcomes = dict.fromkeys(table["equal"], "equal") | dict.fromkeys(table["not_made"], "not made")
    for reason, kinds in table["refused"].items():
        outcomes |= dict.fromkeys(kinds, f"refused: {reason}")
    return table["transformers"], outcomes
