"""The stock causal LMs of transformers that a converted model is exported to: built without storage, and read back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .._checks import require
from .modeling import meta_backbone


def empty_model(model_type: str, fields: Mapping[str, Any]) -> PreTrainedModel:
    """The causal LM of that type on the meta device."""
    return meta_backbone(AutoConfig.for_model(model_type, **fields))


def read_stock(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A folder as transformers alone reads it, in eval mode.

    Raises:
        ValueError: a tensor of the model is not in the folder, or one in it has no place.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    model, info = loaded
    for key, allowed in (("missing_keys", "a folder with every tensor"), ("unexpected_keys", "tensors of the model alone")):
        found = sorted(info[key])
        require(not found, str(folder), f"with {key.replace('_', ' ')}: {', '.join(found[:4])}", allowed)
    return model.eval()
