"""The stock causal LMs of transformers that a converted model is exported to: built without storage, and run from their files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .backbone import meta_backbone
from .layerwise import Layerwise


def is_built_as(model: PreTrainedModel, kinds: Iterable[str]) -> bool:
    """Whether the class of ``model`` is the causal LM of one of these model types; some types are another's class by a new name."""
    return type(model).__name__ in [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) for kind in kinds]


def empty_model(model_type: str, fields: Mapping[str, Any]) -> PreTrainedModel:
    """The causal LM of that type on the meta device."""
    return meta_backbone(AutoConfig.for_model(model_type, **fields))


def stock_layers(folder: str | os.PathLike[str], layers: Iterable[str], **options: Any) -> Layerwise:
    """The stock model in ``folder``, which has been checked; options as of ``Layerwise``."""
    model = meta_backbone(AutoConfig.from_pretrained(folder))
    return Layerwise(model, folder, get_model_conversion_mapping(model), layers, **options)
