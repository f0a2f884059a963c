"""What a conversion starts from: the dense model and its tokenizer, as transformers reads them.

Of a .gguf file transformers makes the dense weights, the config and the tokenizer.
"""

from __future__ import annotations

import copy
import io
import os
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .._checks import refuse, require
from ..models.backbone import meta_backbone
from ..models.config import DotMoeConfig
from ..models.folder import check_stock_files
from ..models.untrusted import building, check_files


def quieten() -> None:
    """Errors alone from transformers and the hub, and no bars of theirs: for a command, which says what there is to say."""
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_gguf(name: str) -> bool:
    """Whether it is named as a GGUF file is."""
    return Path(name).suffix.lower() == ".gguf"


def location(name: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained takes: the folder or the name as it is, of a .gguf file its folder and gguf_file=.

    Raises:
        ImportError: gguf or accelerate is needed; it names the extra.
    """
    if not is_gguf(name):
        return name, {}
    for package in ("gguf", "accelerate"):  # transformers asks for both
        if find_spec(package) is None:
            raise ImportError(f"reading {name} needs {package}: pip install 'dotmoe_kernels[gguf]'")
    path = Path(name).expanduser()
    return str(path.parent), {"gguf_file": path.name}


def _read_gguf(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Dequantised, in a model that knows nothing of it: neither its config nor what is saved of it later says quantised."""
    folder, file = location(name)
    kind = getattr(transformers, "GgufConfig", None)  # before it came, transformers always dequantised
    if kind is not None:
        file["quantization_config"] = kind(dequantize=True)
    try:
        with redirect_stderr(io.StringIO()):  # a bar that no setting of transformers turns off
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **file)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        refuse("model", f"{name}, which transformers cannot dequantise ({error})", "a GGUF file of a dense causal LM")
    packed, found = loaded
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.load_state_dict(packed.state_dict())
    return model, found


def _check_dense(name: str) -> None:
    """Refuse a folder by its config and headers: of sizes that a config alone says nothing is allocated."""
    check_files(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    require(config.model_type != DotMoeConfig.model_type, "model", f"{name}, which is already converted", "a dense model")
    if getattr(config, "quantization_config", None) is None:  # whose tensors have names and shapes of their own
        check_stock_files(Path(name), meta_backbone(config))


def read_dense(name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal LM of a folder, of a name, or of a .gguf file, which is dequantised; on the CPU.

    dtype: of the weights; "auto": as saved, and float32 of a .gguf file.

    Raises:
        ValueError: a tensor of the model is not in the checkpoint or has another shape, a file that must not be read
            (``check_files``), one that transformers cannot dequantise, a config that fits no model.
        OSError: it cannot be read, found or fetched.
        ImportError: a .gguf file needs the extra gguf.
    """
    if is_gguf(name):
        model, found = _read_gguf(name, torch.float32 if isinstance(dtype, str) else dtype)
    else:
        options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
        with building(name):
            if os.path.isdir(name):
                _check_dense(name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        model, found = loaded
    lacking = sorted(found["missing_keys"])
    require(not lacking, "model", f"{name}, without the tensor {', '.join(lacking[:4])}", "a complete causal LM")
    return model


def read_tokenizer(folder: str, *, allowed: str = "a MODEL saved with one, as save(model, folder, tokenizer=...) does") -> Any:
    """The tokenizer of a model's folder, name or .gguf file. ``allowed``: what the error asks for instead.

    Raises:
        ValueError: there is none that can be read.
        ImportError: it needs another package.
    """
    place, file = location(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **file)
        tokenizer("", add_special_tokens=False, verbose=False)  # settings that fit none are read without complaint
        return tokenizer
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises the bare class, and broken JSON whatever its wrong type leads to
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} has no tokenizer that can be read; allowed: {allowed} ({reason})") from None
