"""What a conversion starts from: the dense model and its tokenizer, as transformers reads them."""

from __future__ import annotations

import os
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .._checks import require
from ..models.untrusted import check_files


def quieten() -> None:
    """Errors alone from transformers and the hub, and no bars of theirs: for a command, which says what there is to say."""
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_dense(name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal LM of a folder, or of a name, on the CPU.

    Raises:
        ValueError: a tensor of the model is not in the checkpoint, or a file that must not be read (``check_files``).
        OSError, SafetensorError: it cannot be read, found or fetched.
    """
    if os.path.isdir(name):
        check_files(name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
    )
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    require(not lacking, "model", f"{name}, without the tensor {', '.join(lacking[:4])}", "a complete causal LM")
    return model


def read_tokenizer(folder: str) -> Any:
    """The tokenizer of a model's folder, or name.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        allowed = "a MODEL saved with one, as save(model, folder, tokenizer=...) does"
        raise ValueError(f"{folder} has no tokenizer that can be read; allowed: {allowed} ({reason})") from None
