"""Save, load and export a converted model: one folder, written beside its place and renamed.

config.json, model*.safetensors, generation_config.json, README.md, and the tokenizer's files when one is given
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._checks import require
from .._files import sync_folder
from .block import moe_blocks
from .card import model_card
from .config import DotMoeConfig
from .modeling import DotMoeForCausalLM, restore_dense

ARCHITECTURES = ("dense",)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = ("config.json", "generation_config.json", "README.md", _WEIGHTS, _INDEX)  # written anew by every save


def _check_target(folder: str | os.PathLike[str], argument: str, overwrite: bool) -> Path:
    path = Path(folder).expanduser().resolve()
    if path.exists():
        require(path.is_dir(), argument, f"{path}, a file", "a folder")
        occupied = any(path.iterdir())
        require(overwrite or not occupied, argument, f"{path}, which exists", "a new folder, or overwrite=True")
        known = not occupied or (path / "config.json").is_file()
        require(known, argument, f"{path}, which holds something else than a model", "a new folder, or one with a config.json")
    return path


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def _replace_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside ``path``, which takes its place on success and is removed on any exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    new, old = path.parent / f".{path.name}.new-{tag}", path.parent / f".{path.name}.old-{tag}"
    new.mkdir()
    try:
        yield new
        for file in sorted(new.rglob("*")):
            _sync(file)
        _sync(new)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save(
    model: DotMoeForCausalLM,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a converted model as one folder; ``load`` and ``from_pretrained`` read it.

    The folder appears complete or not at all: whatever goes wrong, an older one stays as it was.

    Args:
        model: the sparse model.
        folder: to write; parents are made.
        tokenizer: saved along when given.
        overwrite: replace a model folder that exists.
        card: measured figures for README.md: name -> number, text, or a dictionary of those (a table of its own).
        max_shard_size: of one safetensors file.

    Raises:
        ValueError: ``model`` is not a DotMoeForCausalLM; the folder exists and ``overwrite`` is False; it holds no model.
        OSError, SafetensorError: the disk is full or not writable.
    """
    require(isinstance(model, DotMoeForCausalLM), "model", f"a {type(model).__name__}", "a DotMoeForCausalLM")
    path = _check_target(folder, "folder", overwrite)
    with _replace_folder(path) as new:
        model.save_pretrained(new, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(model_card(model, path.name, card or {}), encoding="utf-8")


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> DotMoeForCausalLM:
    """Read a converted model from a folder, in eval mode and with the storage layout of ``DotMoeExperts``.

    Args:
        folder: as written by ``save``.
        dtype: of the weights; None keeps that of the files.
        device: to move the model to; None leaves it on the CPU.
        kwargs: for ``from_pretrained`` (``device_map``, ``attn_implementation``, ...); a config field such as ``top_k`` replaces
            the saved value.

    Raises:
        ValueError: no folder, config or weights; another kind of model; a newer format; a tensor that is missing, has a wrong
            shape or cannot be read; a neuron_order that is no permutation. Each names what it found.
    """
    require(
        os.path.exists(folder),
        "folder",
        f"{folder or repr(folder)}, which does not exist",
        "a folder written by dotmoe_kernels.save",
    )
    model = DotMoeForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype, **kwargs)
    return model if device is None else model.to(device)


def export(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], architecture: str = "dense", overwrite: bool = False
) -> None:
    """Write a converted model as another architecture.

    Args:
        folder: as written by ``save``.
        out: folder to write.
        architecture: "dense": the source model, bit for bit, for AutoModelForCausalLM; of a model that was fine-tuned a dense model
            of its weights.
        overwrite: replace a model folder that exists.

    Raises:
        ValueError: an unknown architecture, an ``out`` that exists, and those of ``load``.
    """
    require(architecture in ARCHITECTURES, "architecture", repr(architecture), " | ".join(map(repr, ARCHITECTURES)))
    path = _check_target(out, "out", overwrite)
    model = load(folder)
    with _replace_folder(path) as new:
        restore_dense(model).save_pretrained(new)
        for file in sorted(Path(folder).iterdir()):  # the tokenizer's
            if file.is_file() and file.name not in _OURS and file.suffix != ".safetensors":
                shutil.copy2(file, new / file.name)


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
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    require((path / _INDEX).is_file(), "folder", f"{path}, without weights", f"a folder with {_WEIGHTS} or {_INDEX}")
    try:
        shards = sorted({path / name for name in json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or none of that form
        raise ValueError(
            f"{path / _INDEX} cannot be read ({type(error).__name__}: {error}); allowed: a weight_map of files by tensor"
        ) from None
    absent = [shard.name for shard in shards if not shard.is_file()]
    require(not absent, "folder", f"{path}, without {', '.join(absent)}", f"a folder with every shard of {_INDEX}")
    return shards


def check_folder(folder: str | os.PathLike[str]) -> DotMoeConfig:
    """Check a saved model by its config and file headers, before any weight is read; returns its config.

    Raises:
        ValueError: see ``load``.
    """
    path = Path(folder).expanduser()
    require(path.is_dir(), "folder", f"{path}, which is no folder", "a folder written by dotmoe_kernels.save")
    config = _read_config(path)
    with torch.device("meta"):
        model = DotMoeForCausalLM(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in _weight_files(path):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); allowed: a complete safetensors file") from None
            where.update(dict.fromkeys(handle.keys(), handle))
        # of a tied pair one is enough
        absent = [n for n in expected if n not in where and tied.get(n) not in where and not _is_tied_source(n, tied, where)]
        require(not absent, str(path), f"without the tensor {', '.join(absent[:4])}", "a checkpoint with every tensor of the model")
        for name in expected.keys() & where.keys():
            shape = list(where[name].get_slice(name).get_shape())
            require(shape == expected[name], f"{name} of {path}", f"of shape {shape}", f"shape {expected[name]}")
        names = [f"{name}.neuron_order" for name in moe_blocks(model)]
        check_orders({n.removesuffix(".neuron_order"): where[n].get_tensor(n) for n in names}, str(path))
    return config


def _is_tied_source(name: str, tied: Mapping[str, str], where: Mapping[str, Any]) -> bool:
    return any(source == name and target in where for target, source in tied.items())
