"""The folder of a saved model: what must be in it, checked before any weight is read.

config.json, modeling_dotmoe.py, model*.safetensors, generation_config.json, README.md, and the tokenizer's files when one is given
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from .._checks import require
from .config import MODELING, DotMoeConfig
from .names import check_names, header_tensors, read_conversions
from .untrusted import building, check_files, read_json

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
    values = read_json(file)
    require(isinstance(values, dict), str(file), f"a JSON {type(values).__name__}", "an object")
    kind = values.get("model_type")
    known = kind == DotMoeConfig.model_type
    require(known, "folder", f"{path}, whose model_type is {kind!r}", "a folder written by dotmoe_kernels.save")
    require(isinstance(values.get("dense_config"), dict), f"dense_config of {file}", "absent", "the dense model's config")
    with building(path):
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


@contextmanager
def _headers(path: Path) -> Iterator[dict[str, Any]]:
    """The open files of ``path`` by the tensors in them."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in _weight_files(path):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); allowed: a complete safetensors file") from None
            where.update(dict.fromkeys(handle.keys(), handle))
        yield where


def check_stock_files(folder: Path, model: Any) -> list[str]:
    """Check by the headers that ``model`` of transformers, which has no storage and is used up, finds its tensors in ``folder``.

    Returns:
        names of the tensors that no tensor of it reads.

    Raises:
        ValueError: no weights, a tensor that is missing or of another shape.
    """
    with _headers(folder) as where:
        return check_names(model, header_tensors(where), str(folder), get_model_conversion_mapping(model))


def check_dense_folder(folder: Path, model_class: Any) -> None:
    """Check the folder of a stock model by its headers: transformers reads every tensor of ``model_class`` from it and no other.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape.
    """
    config = model_class.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(config)
    left = check_stock_files(folder, model)
    require(not left, str(folder), f"with {', '.join(left[:4])}, which no tensor of the model reads", "the model's tensors alone")


def check_state(model: Any, fresh: Any) -> None:
    """The tensors of ``model`` must be those that a model of its config has, or what is saved of it cannot be read back.

    Args:
        model: about to be trained.
        fresh: a model of its config, without storage.

    Raises:
        ValueError: a tensor too many, too few or of another shape.
    """
    ours, theirs = ({name: list(t.shape) for name, t in m.state_dict().items()} for m in (model, fresh))
    kind, allowed = type(model).__name__, "the tensors that a model of its config has, as from_pretrained gives it"
    lacking, left = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    require(not left, "model", f"a {kind} with the tensor {', '.join(left[:4])}", allowed)
    require(not lacking, "model", f"a {kind} without the tensor {', '.join(lacking[:4])}", allowed)
    other = next((name for name, shape in ours.items() if shape != theirs[name]), None)
    require(other is None, "model", f"a {kind} whose {other} is of shape {ours.get(other or '')}", allowed)


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
    check_files(path)
    config = _read_config(path)
    with building(path), torch.device("meta"):
        model = model_class(config)
    with _headers(path) as where:
        check_names(model, header_tensors(where), str(path), read_conversions(model.backbone))
        orders = {n.removesuffix(".neuron_order"): where[n].get_tensor(n) for n in where if n.endswith(".neuron_order")}
        check_orders(orders, str(path))
    return config
