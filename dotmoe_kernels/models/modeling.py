"""DotMoeForCausalLM: a dense backbone of transformers whose FFNs are DotMoeBlocks.

The model and its backbone object share one module tree: every child, and so every name in the state dict, is the dense model's
own, except that ``{mlp}`` holds a DotMoeBlock. ``forward`` is the backbone's. Importing this module registers the classes with
AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from .._checks import require
from ..routing.budgets import SoftRouter
from .backbone import check_backbone, meta_backbone, shared_width
from .block import DotMoeBlock, check_layer, interleave_storage, moe_blocks
from .config import DotMoeConfig
from .folder import check_folder, check_orders
from .names import check_names, file_tensors, read_conversions, write_conversions
from .surgery import DenseFFN, assign_ffn, find_ffns, swap_ffn

# what a causal LM declares on its class beyond what post_init gathers from its children
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
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "base_model_prefix",
    "main_input_name",
    "supports_gradient_checkpointing",
)


class _OfBackbone:
    """A method that is the backbone's own, with its signature: transformers, the Trainer and PEFT read there what a model takes. No
    data descriptor: hooks of accelerate set another ``forward`` on the model."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        def method(model: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(model._backbone, name)(*args, **kwargs)

        method.__name__, method.__qualname__, method.__doc__ = name, f"{owner.__qualname__}.{name}", self.__doc__
        self.name, self.method = name, method

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        return self.method if model is None else getattr(model._backbone, self.name)


class DotMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """A sparse causal LM made from a dense one.

    ``DotMoeForCausalLM(config)`` draws every weight at random; ``materialize`` and ``convert`` take over a dense model's tensors,
    ``from_pretrained`` and ``load`` read a saved one. The forward takes and returns what the dense model's does, and so does the
    loss: fine-tuning adds no balance loss. A forward hook on a block's ``gate`` sees (logits, weights, indices), from which
    ``route_top_k(logits, gate.top_k).balance_loss`` is one, without gradient checkpointing.

    Args:
        config: with its ``dense_config``.
        backbone: a dense model whose FFNs have been swapped for DotMoeBlocks; its config is ``config.dense_config``.

    Raises:
        ValueError: no dense_config, or a topology that does not fit.
    """

    config_class = DotMoeConfig
    config: DotMoeConfig
    _backbone: PreTrainedModel
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # permissive here: the backbone decides for itself when it is built
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: DotMoeConfig, *, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        require(config.dense_config is not None, "config.dense_config", None, "the dense model's config")
        config.check()
        target = torch.empty(0).device  # honours torch.device and set_default_device
        fresh = backbone is None
        if backbone is None:
            backbone = meta_backbone(config.dense_config)
            ffns = find_ffns(backbone)
            for (name, ffn), soft in zip(ffns.items(), config.soft_routers(len(ffns)), strict=True):
                swap_ffn(backbone, name, self._meta_block(ffn, soft))
        require(backbone.config is config.dense_config, "backbone", "of another config", "the model of config.dense_config")
        taken = next((name for name, _ in backbone.named_children() if hasattr(DotMoeForCausalLM, name)), None)
        given = f"a {type(backbone).__name__}, whose child {taken} has the name of an attribute of DotMoeForCausalLM"
        require(taken is None, "model", given, "a backbone without such a child")
        # One module tree, two objects: what is set on one is set on the other. deepcopy and pickle keep it so.
        self._parameters, self._buffers, self._modules = backbone._parameters, backbone._buffers, backbone._modules
        self._non_persistent_buffers_set = backbone._non_persistent_buffers_set
        config.ffn_modules = {name: block.experts.activation for name, block in moe_blocks(backbone).items()}
        self.__dict__["_backbone"] = backbone  # not a child: its names would appear twice
        for name in _DECLARED:
            if hasattr(backbone, name):
                setattr(self, name, copy.copy(getattr(backbone, name)))
        self.config._attn_implementation_internal = backbone.config._attn_implementation
        self.training = backbone.training
        self.post_init()
        self._drop_ffn_plans()
        if not fresh:
            self.all_tied_weights_keys = dict(backbone.all_tied_weights_keys)
        elif target.type != "meta":
            self._draw_weights(target)

    def _meta_block(self, ffn: DenseFFN, soft: SoftRouter | None) -> DotMoeBlock:
        config, (width, hidden) = self.config, ffn.gate_proj.shape
        config.check(dense_width=width)
        with torch.device("meta"):
            return DotMoeBlock(
                *(config.num_experts, config.num_experts_per_tok, hidden, width // config.num_experts, ffn.activation),
                soft=soft,
                num_zero_experts=config.num_zero_experts,
            )

    def _draw_weights(self, device: torch.device) -> None:
        self.to_empty(device=device)
        self.initialize_weights()  # also the buffers that are in no checkpoint, as after every load
        std = float(getattr(self.config, "initializer_range", None) or 0.02)
        for block in moe_blocks(self).values():
            block.reset_parameters(std)
        self.tie_weights(recompute_mapping=False)

    def _drop_ffn_plans(self) -> None:
        """The backbone's tensor-parallel plan names projections that are gone."""
        gone = {re.sub(r"\.\d+\.", ".*.", name) + "." for name in moe_blocks(self)}
        plan = getattr(self, "_tp_plan", None) or {}
        self._tp_plan = {key: rule for key, rule in plan.items() if not any(key.startswith(prefix) for prefix in gone)}

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: modules are initialised by the backbone's own class, as in a dense model. Those of a class that is not of
        transformers are passed over once their tensors are loaded, and with them the buffers that are in no checkpoint."""
        return False

    @property
    def _weight_conversions(self) -> Any:
        """Read and set by transformers: what ``save_pretrained`` reverts, so that files have the backbone's names."""
        return write_conversions(self._backbone)

    @_weight_conversions.setter
    def _weight_conversions(self, used: Any) -> None:
        backbone: Any = self._backbone
        backbone._weight_conversions = used

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any) -> Any:
        """As of every model of transformers, with the conversions of the backbone in the place of ours."""
        ours, quantizer = load_config.weight_mapping or [], load_config.hf_quantizer
        asked = ours[: len(ours) - len(get_model_conversion_mapping(model, hf_quantizer=quantizer))]  # key_mapping comes first
        options = dataclasses.replace(load_config, weight_mapping=[*asked, *read_conversions(model.backbone, quantizer)])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, options, *args, **kw)

    def init_weights(self) -> None:
        """Nothing: __init__ draws weights itself, and only where it was given none."""

    def _init_weights(self, module: nn.Module) -> None:
        self._backbone._init_weights(module)

    @property
    def backbone(self) -> PreTrainedModel:
        """The dense class's object; it shares every module with this model."""
        return self._backbone

    forward: Any = _OfBackbone(
        "The dense model's forward: input_ids [B, N] -> logits [B, N, V], and the loss when ``labels`` are given."
    )
    prepare_inputs_for_generation: Any = _OfBackbone("The dense model's.")

    @property
    def generation_config(self) -> Any:
        """The backbone's, so that whatever is set here goes along wherever the backbone goes."""
        return getattr(self.__dict__.get("_backbone"), "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "_backbone" in self.__dict__:  # the base class sets one before there is a backbone, which has its own
            self._backbone.generation_config = value

    def get_input_embeddings(self) -> nn.Module:
        return self._backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self._backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self._backbone.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self._backbone.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self._backbone.set_decoder(decoder)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if hasattr(self._backbone, "vocab_size"):  # read by the loss of some backbones
            self._backbone.vocab_size = self.config.vocab_size
        return embeddings

    def train(self, mode: bool = True) -> DotMoeForCausalLM:
        super().train(mode)
        self._backbone.training = mode
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of every model of transformers, but a checkpoint that does not fit is an error, never a random weight.

        Raises:
            ValueError: see ``load``.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source = pretrained_model_name_or_path
        plain = not any(kwargs.get(key) for key in ("subfolder", "variant", "gguf_file", "state_dict"))
        if plain and isinstance(source, str | os.PathLike) and os.path.exists(source):
            check_folder(source, DotMoeForCausalLM)
        loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        lacking = sorted(info["missing_keys"])
        require(not lacking, str(source), f"without {', '.join(lacking[:4])}", "a checkpoint with every tensor of the model")
        check_orders({name: block.neuron_order for name, block in moe_blocks(model).items()}, str(source))
        interleave_storage(model)
        return (model, info) if wants_info else model


def materialize(
    model: PreTrainedModel,
    config: DotMoeConfig,
    layers: dict[str, tuple[Tensor, Tensor]],
    *,
    ffns: dict[str, DenseFFN] | None = None,
) -> DotMoeForCausalLM:
    """Turn a dense model into the sparse one; it takes over the dense model's tensors, and the dense model is used up.

    Args:
        model: a dense causal LM; its FFN modules may have been swapped for others in the meantime.
        config: structure; copied and bound to the model's config.
        layers: by FFN path, (expert_of [F] int64, router_weight [E, H]) for every FFN.
        ffns: as found by ``find_ffns`` before anything was swapped; emptied layer by layer, so that the dense FFNs are freed.
            None finds them in the model.

    Returns:
        The sparse model, in the mode (train or eval) and on the devices of the dense one.

    Raises:
        ValueError: FFN names that do not match, a topology that does not fit, uneven experts, not a causal LM of transformers.
    """
    if ffns is None:
        check_backbone(model)
        ffns = find_ffns(model)
    missing, unknown = sorted(set(ffns) - set(layers)), sorted(set(layers) - set(ffns))
    require(not missing, "layers", f"without {', '.join(missing[:4])}", "an entry for every FFN of the model")
    require(not unknown, "layers", f"with {', '.join(unknown[:4])}", "only FFNs of the model")
    width = shared_width(ffn.gate_proj for ffn in ffns.values())
    config = copy.deepcopy(config)
    require(not config.num_zero_experts, "config.num_zero_experts", config.num_zero_experts, "0: fine-tuning adds them")
    config.bind(model.config, dense_width=width)
    soft = config.soft_routers(len(ffns))
    for name, ffn in ffns.items():  # before anything is swapped
        check_layer(ffn, *layers[name], config.num_experts, name)
    for name, router in zip(list(ffns), soft, strict=True):
        block = DotMoeBlock.from_dense(ffns[name], *layers[name], config.num_experts_per_tok, soft=router)
        swap_ffn(model, name, block)
        del ffns[name]
    return DotMoeForCausalLM(config, backbone=model)


def check_return(model: PreTrainedModel, config: DotMoeConfig, width: int) -> None:
    """Whether what ``save`` will write of this dense model, once it is converted, is what ``load`` looks for: names and shapes,
    without any storage. ``width`` is F.

    Raises:
        ValueError: a tensor would be missing, or have another shape.
    """
    trial = copy.deepcopy(config)
    trial.bind(copy.deepcopy(model.config), dense_width=width)
    with tempfile.TemporaryDirectory() as folder:  # config.json may say something else than the config in memory
        trial.save_pretrained(folder)
        written = DotMoeConfig.from_pretrained(folder)
    with torch.device("meta"):
        sparse, reader = DotMoeForCausalLM(trial), DotMoeForCausalLM(written)
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        sparse._weight_conversions = used
    check_names(reader, file_tensors(sparse), f"a saved {type(model).__name__}", read_conversions(reader.backbone))


def restore_dense(model: DotMoeForCausalLM) -> PreTrainedModel:
    """The dense model, with the FFN neurons in their first order; every tensor outside the FFNs is shared with ``model``."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    dense = copy.deepcopy(model.backbone, memo=shared)
    dense.__dict__.pop("_weight_conversions", None)  # those that a sparse file needed: none of the FFNs'
    skeleton = find_ffns(meta_backbone(dense.config))
    text = dense.config.get_text_config()
    for name, block in moe_blocks(model).items():
        ffn = skeleton[name]
        assign_ffn(ffn, block.dense_weights(), text, name, requires_grad=block.experts.gate_up_proj.requires_grad)
        swap_ffn(dense, name, ffn.module.train(block.training))
    return dense


AutoConfig.register(DotMoeConfig.model_type, DotMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(DotMoeConfig, DotMoeForCausalLM, exist_ok=True)
