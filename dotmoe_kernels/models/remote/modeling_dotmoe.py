"""A sparse language model made from a dense one by dotmoe_kernels, as one file: it needs torch and transformers alone.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model is the dense backbone of transformers (``dense_config``) with every feed-forward module of ``ffn_modules`` replaced by

    Z = x Wr^T;  y_t = sum over the K largest Z_te of Down_e (act(Gate_e x_t) * (Up_e x_t)), each with weight exactly 1

or, with the soft router, by the experts weighted by p = LapSum(Z), those at and below the threshold left out. Zero experts are
further rows of Wr: one of them among the K largest adds nothing.

Serving engines load the base class through their Transformers backends. Their fused experts take the routing from here and
compute SiLU with K experts a token: where that is not this model, and in SGLang, which reads no packed experts, ``experts`` holds
its weights as buffers, which these engines leave alone. Experts run on dotmoe_kernels where that is installed.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

expert_ffn: Any = None
try:
    from dotmoe_kernels import experts as _kernels

    expert_ffn = _kernels.expert_ffn
except ImportError:
    pass

_ENGINES = ("vllm", "sglang")  # the names of their attention
# what a model declares on its class beyond what post_init gathers from its children
_DECLARED = (
    "_tied_weights_keys",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_input_embed_layer",
    "_is_stateful",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "base_model_prefix",
    "main_input_name",
    "supports_gradient_checkpointing",
)


class DotMoeConfig(PreTrainedConfig):
    """E experts of s neurons, K a token, around ``dense_config``; an attribute that is not found here is the dense model's.

    ``ffn_modules`` has the activation's name by the path of each feed-forward module in the dense causal LM.
    """

    model_type = "dotmoe"
    attribute_map = {"top_k": "num_experts_per_tok"}  # noqa: RUF012
    sub_configs = {"dense_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        *,
        dense_config: Any = None,
        num_experts: int = 16,
        num_experts_per_tok: int = 4,
        moe_intermediate_size: Any = None,
        ffn_modules: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(dense_config, dict):
            values = dict(dense_config)
            dense_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.num_experts = num_experts
        self.num_experts_per_tok = kwargs.pop("top_k", num_experts_per_tok)
        self.moe_intermediate_size = moe_intermediate_size
        self.ffn_modules = ffn_modules
        super().__init__(**kwargs)
        if dense_config is not None and self._attn_implementation is not None:
            dense_config._attn_implementation = self._attn_implementation
        object.__setattr__(self, "dense_config", dense_config)

    @property
    def logit_scale(self) -> float:
        """What engines multiply the logits by."""
        dense = self.__dict__.get("dense_config")
        return float(getattr(dense, "logit_scale", None) or 1.0) / float(getattr(dense, "logits_scaling", None) or 1.0)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config: engines read the experts and the dense model's sizes from one object."""
        return self

    def _get_generation_parameters(self) -> dict[str, Any]:
        """``top_k`` is the experts' here, not the sampling parameter of the same name, which would forbid saving."""
        return {key: value for key, value in super()._get_generation_parameters().items() if key != "top_k"}

    def __getattr__(self, name: str) -> Any:
        dense = self.__dict__.get("dense_config")
        if dense is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(dense, name)

    def __setattr__(self, key: str, value: Any) -> None:
        dense = self.__dict__.get("dense_config")
        ours = key.startswith("_") or key in self.__dict__ or hasattr(type(self), key) or key in self.attribute_map
        if dense is not None and not ours and hasattr(dense, key):
            setattr(dense, key, value)
        else:
            super().__setattr__(key, value)


def soft_top_k(scores: Tensor, k: float, temperature: float) -> Tensor:
    """LapSum: p [T, E] with sum k, from scores [T, E], both float64: p = Lap((r - b) / alpha) for the b that gives the sum.

    Between two neighbours of the sorted scores the sum is a quadratic in e^b; all of it stays in logarithms.
    """
    r = scores / temperature
    s = torch.sort(r, -1).values
    n = s.shape[-1]
    log_l = torch.logcumsumexp(s, -1) - s  # ln sum_{j <= i} e^{s_j - s_i}
    log_r = torch.logcumsumexp(-s.flip(-1), -1).flip(-1) + s  # ln sum_{j >= i} e^{s_i - s_j}
    phi = torch.arange(n, dtype=s.dtype, device=s.device) + 0.5 + (log_r.exp() - log_l.exp()) / 2
    m = (phi < n - k).sum(-1)  # b lies between s_{m-1} and s_m

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index.clamp(0, n - 1)[..., None])[..., 0]

    upper, lower = at(s, m), at(s, m - 1)
    log_b, log_c, gap = at(log_l, m - 1), at(log_r, m), upper - lower
    d = (n - m) - k
    q = torch.sqrt(d * d + torch.exp(log_b + log_c - gap))
    tiny = torch.finfo(s.dtype).tiny
    above = torch.log((d + q).clamp(min=tiny)) - log_c
    below = log_b - torch.log((q - d).clamp(min=tiny))
    offset = torch.where(d > 0, above, torch.where(d < 0, below, (gap + log_b - log_c) / 2))
    offset = torch.where(m == 0, math.log(2 * (n - k)) - log_c, offset)
    offset = torch.where(m == n, log_b - math.log(2 * k), offset)
    pivot = torch.where((m == 0) | ((d > 0) & (m < n)), upper, lower)
    z = (r - pivot[..., None]) - offset[..., None]
    half = 0.5 * torch.exp(-z.abs())
    return torch.where(z <= 0, half, 1 - half)


def _std(config: Any) -> float:
    return float(getattr(config, "initializer_range", None) or 0.02)


class DotMoeRouter(nn.Module):
    """x [T, H] -> (logits [T, E], weights [T, K], indices [T, K]); ties go to the lower index. The logits are at least float32.

    With N zero experts they are [T, E + N], and the choice of one has index E and weight 0."""

    def __init__(self, config: DotMoeConfig, layer: int) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.soft = None
        if getattr(config, "router", "top_k") == "soft":
            k = float(config.router_k[layer])
            self.top_k = min(config.num_experts, math.ceil(k * config.router_cap - 1e-6))
            self.soft = (k, float(config.router_temperature), float(config.router_threshold))
        self.num_experts, self.zeros = config.num_experts, getattr(config, "num_zero_experts", 0)
        self.weight = nn.Parameter(torch.empty(config.num_experts + self.zeros, config.hidden_size))
        nn.init.normal_(self.weight, std=_std(config))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = functional.linear(hidden_states.to(dtype), self.weight.to(dtype))
            indices = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self.top_k]
            if self.soft is None and self.zeros:
                return logits, (indices < self.num_experts).to(dtype), indices.clamp(max=self.num_experts)
            if self.soft is None:
                return logits, torch.ones_like(indices, dtype=dtype), indices
            k, temperature, threshold = self.soft
            weights = soft_top_k(logits.double(), k, temperature).to(dtype).gather(1, indices)
            off = weights <= threshold
            off[:, 0] = False  # one is always on
            return logits, weights.masked_fill(off, 0.0), indices


def _one_by_one(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    y = torch.zeros_like(hidden_states)
    for e in torch.unique(top_k_index[top_k_index < experts.num_experts]).tolist():
        token, slot = (top_k_index == e).nonzero(as_tuple=True)
        gate, up = functional.linear(hidden_states[token], experts.gate_up_proj[e]).chunk(2, dim=-1)
        out = functional.linear(experts.act_fn(gate) * up, experts.down_proj[e])
        y.index_add_(0, token, out * top_k_weights[token, slot, None].to(out.dtype))
    return y


@use_experts_implementation
class PackedExperts(nn.Module):
    """``gate_up_proj`` [E, 2s, H] and ``down_proj`` [E, H, s]; with ``hidden`` they are buffers."""

    gate_up_proj: Tensor
    down_proj: Tensor

    def __init__(self, config: DotMoeConfig, activation: str, hidden: bool) -> None:
        super().__init__()
        E, s, H = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts, self.activation, self.act_fn = E, activation, ACT2FN[activation]
        self.zeros = getattr(config, "num_zero_experts", 0)
        for name, shape in (("gate_up_proj", (E, 2 * s, H)), ("down_proj", (E, H, s))):
            if hidden:
                self.register_buffer(name, torch.empty(shape))
            else:
                setattr(self, name, nn.Parameter(torch.empty(shape)))
                nn.init.normal_(getattr(self, name), std=_std(config))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _one_by_one(self, hidden_states, top_k_index, top_k_weights)


class DotMoeExperts(PackedExperts):
    """Experts on dotmoe_kernels where it is installed, else on what transformers has, else one by one."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x, gate_up, down = hidden_states, self.gate_up_proj, self.down_proj
        if expert_ffn is not None and not torch.is_autocast_enabled(x.device.type):
            return expert_ffn(x, gate_up, down, top_k_index, top_k_weights, activation=self.activation)
        # a grouped product of torch wants rows of 16 bytes, and no empty slot
        if self.zeros or down.shape[-1] * down.element_size() % 16:
            return _one_by_one(self, x, top_k_index, top_k_weights)
        return super().forward(x, top_k_index, top_k_weights)


class DotMoeBlock(nn.Module):
    """In the place of a dense feed-forward module: x [..., H] -> y [..., H]."""

    def __init__(self, config: DotMoeConfig, activation: str, layer: int) -> None:
        super().__init__()
        engine = config._attn_implementation
        plain = getattr(config, "router", "top_k") == "top_k" and not getattr(config, "num_zero_experts", 0)
        fusible = engine != "sglang" and activation == "silu" and plain
        self.gate = DotMoeRouter(config, layer)
        self.experts = DotMoeExperts(config, activation, engine in _ENGINES and not fusible)
        self.register_buffer("neuron_order", torch.arange(config.num_experts * config.moe_intermediate_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(x)
        return self.experts(x, indices, weights).reshape(hidden_states.shape)


def _dense_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal LM class of a dense config."""
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(classes, list | tuple):
        return classes
    by_name = {c.__name__: c for c in classes}
    return next((by_name[a] for a in config.architectures or [] if a in by_name), classes[0])


class DotMoePreTrainedModel(PreTrainedModel):
    """This model and its backbone object share one module tree, so that every name is the dense model's own."""

    config_class = DotMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _backbone: PreTrainedModel

    def _make_backbone(self, config: DotMoeConfig) -> PreTrainedModel:
        raise NotImplementedError

    def _path(self, name: str, backbone: PreTrainedModel) -> str:
        """Of a module of the causal LM in this backbone."""
        return name

    def __init__(self, config: DotMoeConfig) -> None:
        super().__init__(config)
        backbone = self._make_backbone(config)
        paths = [self._path(name, backbone) for name in config.ffn_modules]
        for layer, (path, activation) in enumerate(zip(paths, config.ffn_modules.values(), strict=True)):
            parent, _, child = path.rpartition(".")
            setattr(backbone.get_submodule(parent), child, DotMoeBlock(config, activation, layer))
        self._parameters, self._buffers, self._modules = backbone._parameters, backbone._buffers, backbone._modules
        self._non_persistent_buffers_set = backbone._non_persistent_buffers_set
        self.__dict__["_backbone"] = backbone  # not a child: its names would appear twice
        for name in _DECLARED:
            if hasattr(backbone, name):
                setattr(self, name, copy.copy(getattr(backbone, name)))
        config._attn_implementation_internal = backbone.config._attn_implementation
        self.post_init()
        gone = tuple({re.sub(r"\.\d+\.", ".*.", path) + "." for path in paths})
        plan = getattr(backbone, "_tp_plan", None) or {}
        self._tp_plan = {key: rule for key, rule in plan.items() if not key.startswith(gone)}
        self._pp_plan = dict(getattr(backbone, "_pp_plan", None) or {})

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: modules are initialised by the backbone's own class, as in a dense model. Those of a class that is not of
        transformers are passed over once their tensors are loaded, and with them the buffers that are in no checkpoint."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DotMoeRouter | DotMoeExperts):
            for parameter in module.parameters():
                if not getattr(parameter, "_is_hf_initialized", False):  # it is, once it was loaded
                    nn.init.normal_(parameter, std=_std(self.config))
        else:
            self._backbone._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self._backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._backbone.set_input_embeddings(value)

    def train(self, mode: bool = True) -> DotMoePreTrainedModel:
        super().train(mode)
        self._backbone.training = mode
        return self


class DotMoeModel(DotMoePreTrainedModel):
    """The model without its head, as engines load it."""

    def _make_backbone(self, config: DotMoeConfig) -> PreTrainedModel:
        base: Any = MODEL_MAPPING[type(config.dense_config)]
        return base(config.dense_config)

    def _path(self, name: str, backbone: PreTrainedModel) -> str:
        return name.removeprefix(f"{backbone.base_model_prefix}.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, N] -> hidden states [B, N, H]; what else is given reaches the attention."""
        return self._backbone.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def get_decoder(self) -> nn.Module:
        return self


class DotMoeForCausalLM(DotMoePreTrainedModel, GenerationMixin):
    """The causal LM: its forward takes and returns what the dense model's does."""

    def _make_backbone(self, config: DotMoeConfig) -> PreTrainedModel:
        return _dense_class(config.dense_config)(config.dense_config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, N] -> logits [B, N, V], and the loss when ``labels`` are given."""
        for name, value in (("past_key_values", past_key_values), ("cache", cache)):
            if value is not None:  # a version of transformers takes one of the two
                kwargs[name] = value
        return self._backbone.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        backbone: Any = self._backbone
        return backbone.prepare_inputs_for_generation(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        return self._backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self._backbone.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self._backbone.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self._backbone.set_decoder(decoder)
