"""Tiny random dense models of every backbone, and their conversion."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, find_ffns, materialize

H, F, E, K, V = 32, 64, 8, 2, 64
BACKBONES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "granite",
    "smollm3",
    "phi3",  # gate and up fused
    "glm",  # gate and up fused
]


def dense_model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: object) -> PreTrainedModel:
    """In eval mode; weights large enough that every layer matters."""
    values = {
        "hidden_size": H,
        "intermediate_size": F,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": V,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(values | fields)), dtype=dtype).eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_layers(model: PreTrainedModel, num_experts: int = E, seed: int = 2) -> dict:
    """A random balanced assignment and a random router for every FFN."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randperm(ffn.gate_proj.shape[0], generator=draw) % num_experts,
            torch.randn(num_experts, ffn.gate_proj.shape[1], generator=draw),
        )
        for name, ffn in find_ffns(model).items()
    }


def sparse_model(kind: str = "llama", *, top_k: int = K, **kwargs: object) -> DotMoeForCausalLM:
    model = dense_model(kind, **kwargs)
    return materialize(model, DotMoeConfig(num_experts=E, top_k=top_k), random_layers(model))
