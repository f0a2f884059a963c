"""The dense backbone: its class, its twin without storage, and what a dense model must be to be converted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .._checks import FLOATS, refuse, require
from .surgery import find_ffns, refuse_sparse

_MERGE = "a model without adapters: peft's PeftModel.from_pretrained(base, adapter).merge_and_unload() puts them into the weights"
_COMPILE = "the model before torch.compile (its _orig_mod); compile the converted one"
_PLAIN = "weights as they were: torch.nn.utils.{} puts them back"


def dense_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal LM class of transformers for a dense config.

    Raises:
        ValueError: transformers has none.
    """
    try:
        classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"dense_config is a {type(config).__name__}; allowed: the config of a causal LM that transformers itself provides"
        ) from None
    if not isinstance(classes, list | tuple):
        return classes
    by_name = {c.__name__: c for c in classes}
    return next((by_name[a] for a in config.architectures or [] if a in by_name), classes[0])


def meta_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model without storage; it keeps ``config`` itself."""
    with torch.device("meta"):
        return dense_class(config)(config)


def ffn_width(config: PreTrainedConfig) -> int:
    """F, measured on the model without storage: not every config says it.

    Raises:
        ValueError: no FFN is recognised, or they differ in width.
    """
    return shared_width(ffn.gate_proj for ffn in find_ffns(meta_backbone(config)).values())


def shared_width(gates: Iterable[Tensor]) -> int:
    """F of gate projections [F, H]."""
    widths = sorted({gate.shape[0] for gate in gates})
    require(len(widths) == 1, "model", f"with FFN widths {widths}", "one width for every layer")
    return widths[0]


def check_backbone(model: nn.Module) -> None:
    """Refuse what would not come back from a file, or not train: anything but a plain dense model with its weights in memory.

    Every module and every tensor is compared with those of a fresh model of the same config, which is what a checkpoint is
    loaded into.

    Raises:
        ValueError: a wrapper, adapters, compiled, parametrised, pruned or quantised layers, tensors that are shared, have no
            storage or belong to inference mode. Names the module or the tensor and what to do.
    """
    _refuse_wrappers(model)
    assert isinstance(model, PreTrainedModel)  # for the type checker: required above
    refuse_sparse(model)
    kind, expected = type(model).__name__, dense_class(model.config)
    require(type(model) is expected, "model", f"a {kind}", f"the causal LM of its config, {expected.__name__}")
    require(not torch.is_inference_mode_enabled(), "torch.inference_mode", "on", "a call outside of it: the weights must train")
    fresh = meta_backbone(model.config)
    _check_modules(model, fresh)
    _check_tensors(model, fresh)


def _refuse_wrappers(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        return
    if type(model).__module__.startswith("peft."):
        refuse("model", f"a {kind}", "a model without adapters: model.merge_and_unload() puts them into the weights")
    if hasattr(model, "_orig_mod"):
        refuse("model", f"a {kind}", _COMPILE)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        refuse("model", f"a {kind}", "the model inside, model.module")
    refuse("model", f"a {kind}", "a dense causal LM of transformers")


def _advice(module: nn.Module, expected: str) -> str:
    """What to do about a module that is not as in a fresh model."""
    if hasattr(module, "base_layer") or type(module).__module__.startswith("peft."):
        return _MERGE
    if hasattr(module, "_orig_mod"):
        return _COMPILE
    if hasattr(module, "parametrizations"):
        return _PLAIN.format("parametrize.remove_parametrizations")
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if any(name.endswith("_orig") for name in names):
        return _PLAIN.format("prune.remove")
    if any(name.endswith("_g") for name in names):
        return _PLAIN.format("remove_weight_norm")
    return expected


def _check_modules(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Module by module the class, the names of the tensors and their shapes."""
    kind = type(model).__name__
    twins = dict(fresh.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        twin = twins.pop(name, None)
        if twin is None or type(module) is not type(twin):
            plain = "the modules" if twin is None else f"the {type(twin).__name__}"
            origin = type(module).__module__.partition(".")[0]  # peft's Linear has torch's name
            given = f"a {kind} with a {origin} {type(module).__name__} as {name}"
            refuse("model", given, _advice(module, f"{plain} of a fresh {kind}, unquantised"))
        ours, theirs = _own_state(module), _own_state(twin)
        for key in sorted(ours.keys() ^ theirs.keys()):
            given = f"a {kind} {'with' if key in ours else 'without'} {name}.{key}"
            refuse("model", given, _advice(module, f"the tensors of a fresh {kind}"))
        for key, shape in ours.items():
            require(shape == theirs[key], f"{name}.{key}", f"of shape {shape}", f"{theirs[key]}, as its config says")
    require(not twins, "model", f"a {kind} without {next(iter(twins), None)}", f"the modules of a fresh {kind}")


def _own_state(module: nn.Module) -> dict[str, list[int]]:
    """Shapes of the tensors that a checkpoint has of this module alone."""
    kept = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
    return {name: list(tensor.shape) for name, tensor in (*module.named_parameters(recurse=False), *kept.items())}


def _check_tensors(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    kind = type(model).__name__
    twins = {name: id(tensor) for name, tensor in fresh.named_parameters(remove_duplicate=False)}
    first: dict[Any, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if tensor.device.type == "meta":
            held = any(getattr(module, "_hf_hook", None) is not None for module in model.modules())
            where = "on the meta device, offloaded by accelerate" if held else "on the meta device, without values"
            refuse(f"{name} of {kind}", where, "a model whose weights are all in memory: load it without offloading")
        given = "a tensor of torch.inference_mode"
        require(not tensor.is_inference(), f"{name} of {kind}", given, "a model loaded outside of it: the weights must train")
        if name not in twins:
            continue
        floating = tensor.dtype in FLOATS
        allowed = "an unquantised model in float32, bfloat16 or float16"
        require(floating, f"{name} of {kind}", f"of dtype {tensor.dtype}", allowed)
        other = first.setdefault(_place(tensor), name)
        tied = other == name or twins[other] == twins[name]
        allowed = "tensors of their own, as in a fresh model: a file keeps one of them"
        require(tied, f"{name} of {kind}", f"the same tensor as {other}", allowed)


def _place(tensor: Tensor) -> Any:
    """Equal for parameters that are one tensor, as objects or in memory."""
    if not tensor.numel() or type(tensor.data) is not Tensor:  # a subclass has its memory elsewhere
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
