"""Tensors by their names in files: transformers renames and converts those of some backbones on save, and back on load.

A converted model's files have the names of its dense model's, but for what is in the FFNs: the conversions are looked up for the
backbone, as for the dense model itself. Of the experts, files have ``down_proj`` [E, H, s], as Hugging Face's do, and the state
dict ``down_rows`` [E, s, H].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    Transpose,
    WeightConverter,
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from .._checks import require


class _View(ConversionOps):
    """The transpose without a copy: files are written tensor by tensor, and each is made contiguous there."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kw: Any
    ) -> dict[str, Any]:
        tensors = next(iter(input_dict.values()))
        return {target_patterns[0]: (tensors[0] if isinstance(tensors, list) else tensors).transpose(1, 2)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Transpose(1, 2)


class _Rows(Transpose):
    @property
    def reverse_op(self) -> ConversionOps:
        return _View()


def _experts() -> WeightConverter:
    return WeightConverter("experts.down_proj", "experts.down_rows", [_Rows(1, 2)])


def _is_ours(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and any(isinstance(op, _Rows) for op in conversion.operations)


def read_conversions(backbone: PreTrainedModel, quantizer: Any = None) -> list[Any]:
    """From the names in files to those of the state dict."""
    return [_experts(), *get_model_conversion_mapping(backbone, hf_quantizer=quantizer)]


def write_conversions(backbone: PreTrainedModel) -> list[Any]:
    """What ``save_pretrained`` reverts: the conversions that the files needed which the model came from, or else all."""
    used = getattr(backbone, "_weight_conversions", None)
    if used is None:  # a prefix may be there or not, and a model that came from no file is written without
        used = [c for c in get_model_conversion_mapping(backbone, add_legacy=False) if not isinstance(c, PrefixChange)]
    return [*(c for c in used if not _is_ours(c)), _experts()]  # the files of a dense model did without ours


def file_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of ``model`` as a file has it."""
    tensors: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return tensors


def check_names(model: Any, tensors: Mapping[str, Tensor], source: str, conversions: list[Any]) -> list[str]:
    """Load ``tensors``, which have shapes but no storage, into ``model``, which has none either: what a real load will find.

    Args:
        model: on the meta device; it is used up.
        tensors: by name in the file.
        source: of the tensors, for the message.
        conversions: from the names in files to those of the model.

    Returns:
        names of the tensors that no tensor of the model reads.

    Raises:
        ValueError: a tensor is missing or has a wrong shape.
    """
    options = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=conversions)
    tied = model.all_tied_weights_keys
    with no_bar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    for name, error in info.conversion_errors.items():
        raise ValueError(f"{name} of {source} cannot be converted: {str(error).strip().splitlines()[-1]}")
    for name, *shapes in sorted(info.mismatched_keys):
        given, expected = (_in_file(name, list(shape))[1] for shape in shapes)
        require(False, f"{_in_file(name)[0]} of {source}", f"of shape {given}", f"shape {expected}")
    missing = info.missing_keys
    have = {target for target in tied if target not in missing} | {source for source in tied.values() if source not in missing}
    # of a tied pair one is enough
    filled = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["(?!)"]))  # by the model itself
    lacking = [name for name in model.state_dict() if name in missing and not filled.search(name)]
    absent = [_in_file(name)[0] for name in lacking if not _has_twin(name, tied, have)]
    require(not absent, source, f"without the tensor {', '.join(absent[:4])}", "a checkpoint with every tensor of the model")
    return sorted(info.unexpected_keys)


def _in_file(name: str, shape: list[int] | None = None) -> tuple[str, list[int]]:
    """Name and shape of a tensor of the experts as a file has them; others as they are."""
    shape = shape or []
    renamed = name.replace("experts.down_rows", "experts.down_proj")
    return renamed, shape if renamed == name else [*shape[:-2], *shape[:-3:-1]]


def _has_twin(name: str, tied: Mapping[str, str], have: set[str]) -> bool:
    return tied.get(name) in have or any(source == name and target in have for target, source in tied.items())


@contextmanager
def no_bar() -> Iterator[None]:
    """Nothing is read here, so nothing is announced."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def header_tensors(handles: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors without storage as the headers of safetensors files describe them; ``handles`` by tensor name."""
    return {name: torch.empty(handle.get_slice(name).get_shape(), device="meta") for name, handle in handles.items()}
