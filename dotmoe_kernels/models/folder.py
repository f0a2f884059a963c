"""The folder of a saved model: what must be in it, checked before any weight is read.

config.json, modeling_dotmoe.py, model*.safetensors, generation_config.json, README.md, and the tokenizer's files when one is given
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from .._checks import require
from .block import moe_blocks
from .config import MODELING, DotMoeConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = ("config.json", MODELING.name, "generation_config.json", "README.md", WEIGHTS, INDEX)  # written anew by every save


def check_orders(orders: Mapping[str, Tensor], source: str) -> None:
    """Every neuron_order [F] must be a permutation.

    Raises:
        ValueError: names the layer.
    """
    for name, order in orders.items():
        if order.device.type != "meta":
            values = order.cpu()
            whole = torch.equal(values.sort().values, torch.arange(values.numel(), dtype=values.dtype))
            require(whole, f"{name}.neuron_order of {source}", "no permutation", f"each of 0 to {values.numel() - 1} once")


def _read_config(path: Path) -> DotMoeConfig:
    file = path / "config.json"
    require(file.is_file(), "folder", f"{path}, without a config.json", "a folder written by dotmoe_kernels.save")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); allowed: a config.json written by dotmoe_kernels.save") from None
    require(isinstance(values, dict), str(file), f"a JSON {type(values).__name__}", "an object")
    kind = values.get("model_type")
    known = kind == DotMoeConfig.model_type
    require(known, "folder", f"{path}, whose model_type is {kind!r}", "a folder written by dotmoe_kernels.save")
    require(isinstance(values.get("dense_config"), dict), f"dense_config of {file}", "absent", "the dense model's config")
    return DotMoeConfig.from_pretrained(path)


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    require((path / INDEX).is_file(), "folder", f"{path}, without weights", f"a folder with {WEIGHTS} or {INDEX}")
    try:
        shards = sorted({path / name for name in json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or none of that form
        raise ValueError(
            f"{path / INDEX} cannot be read ({type(error).__name__}: {error}); allowed: a weight_map of files by tensor"
        ) from None
    absent = [shard.name for shard in shards if not shard.is_file()]
    require(not absent, "folder", f"{path}, without {', '.join(absent)}", f"a folder with every shard of {INDEX}")
    return shards


def check_folder(folder: str | os.PathLike[str], model_class: Callable[[DotMoeConfig], Any]) -> DotMoeConfig:
    """Check a saved model by its config and file headers, before any weight is read; returns its config.

    Args:
        folder: as written by ``save``.
        model_class: what makes the model of a config, ``DotMoeForCausalLM``.

    Raises:
        ValueError: see ``load``.
    """
    path = Path(folder).expanduser()
    require(path.is_dir(), "folder", f"{path}, which is no folder", "a folder written by dotmoe_kernels.save")
    config = _read_config(path)
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: list(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    tied = model.all_tied_weights_keys
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in _weight_files(path):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); allowed: a complete safetensors file") from None
            where.update(dict.fromkeys(handle.keys(), handle))
        # of a tied pair one is enough, and the source is named
        absent = [n for n in expected if n not in where and n not in tied and not _is_tied_source(n, tied, where)]
        require(not absent, str(path), f"without the tensor {', '.join(absent[:4])}", "a checkpoint with every tensor of the model")
        for name in expected.keys() & where.keys():
            shape = list(where[name].get_slice(name).get_shape())
            require(shape == expected[name], f"{name} of {path}", f"of shape {shape}", f"shape {expected[name]}")
        names = [f"{name}.neuron_order" for name in moe_blocks(model)]
        check_orders({n.removesuffix(".neuron_order"): where[n].get_tensor(n) for n in names}, str(path))
    return config


def _is_tied_source(name: str, tied: Mapping[str, str], where: Mapping[str, Any]) -> bool:
    return any(source == name and target in where for target, source in tied.items())
