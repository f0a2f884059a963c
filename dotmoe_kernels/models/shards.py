"""Safetensors folders a tensor at a time: what is read stays mapped while it is held, what is written takes no more than itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .._checks import require
from .block import moe_blocks
from .folder import INDEX, WEIGHTS, _weight_files
from .untrusted import require_inside

GENERATION = "generation_config.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Spec(NamedTuple):
    """Of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tensor.dtype, tuple(tensor.shape))


class ShardReader:
    """The tensors of a folder by name. A file is mapped for as long as a tensor of it lives, so that one after the other takes the
    memory of one.

    Raises:
        ValueError: no weights, a shard that is missing or cannot be read, a dtype that is not known.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.specs: dict[str, Spec] = {}
        self._files: dict[str, Path] = {}
        for file in _weight_files(Path(folder).expanduser()):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118
                        header = handle.get_slice(name)
                        kind = header.get_dtype()
                        require(kind in _DTYPES, f"{name} of {file}", f"of dtype {kind}", ", ".join(_DTYPES))
                        self.specs[name] = Spec(_DTYPES[kind], tuple(header.get_shape()))
                        self._files[name] = file
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); allowed: a complete safetensors file") from None

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)


class ShardWriter:
    """Shards whose headers are written first, and whose tensors come in any order.

    Args:
        folder: to write into; it is the caller's to make it appear at once.
        layout: of every tensor that is going to be written.
        max_shard_size: of one file, such as "5GB".
    """

    def __init__(self, folder: Path, layout: Mapping[str, Spec], max_shard_size: str | int = "5GB") -> None:
        self._left = dict(layout)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._open: list[BinaryIO] = []
        sizes: dict[str, Any] = dict(layout)
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1),
            max_shard_size=max_shard_size,
        )
        for name, tensors in split.filename_to_tensors.items():
            self._begin(folder / name, {tensor: layout[tensor] for tensor in tensors})
        if split.is_sharded:
            numbers = {"total_parameters": sum(math.prod(spec.shape) for spec in layout.values() if spec.dtype.is_floating_point)}
            index = {"metadata": {**numbers, **split.metadata}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, path: Path, specs: Mapping[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n)):  # wide ones first: then all are aligned
            spec = specs[name]
            offsets[name], end = end, end + spec.nbytes
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._open.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        self._places.update({name: (file, start + offset) for name, offset in offsets.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        """
        Raises:
            ValueError: a tensor that is not in the layout, or is in it otherwise; one that was written already.
        """
        expected = self._left.pop(name, None)
        require(expected is not None, "name", repr(name), "a tensor of the layout that is not written yet")
        require(Spec.of(tensor) == expected, name, Spec.of(tensor), f"{expected}")
        file, offset = self._places[name]
        file.seek(offset)
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """
        Raises:
            ValueError: a tensor of the layout was not written.
        """
        require(not self._left, "tensors", f"without {', '.join(list(self._left)[:4])}", "every tensor of the layout")
        self.abandon()

    def abandon(self) -> None:
        for file in self._open:
            file.close()


@contextmanager
def writing(folder: Path, layout: Mapping[str, Spec], max_shard_size: str | int = "5GB") -> Iterator[ShardWriter]:
    """A ShardWriter that is complete at the end, or an error."""
    writer = ShardWriter(folder, layout, max_shard_size)
    try:
        yield writer
        writer.close()
    finally:
        writer.abandon()


def file_layout(model: Any) -> dict[str, Tensor]:
    """The tensors of ``model`` by the names and in the shapes that its files have, without storage: tied ones once."""
    tied = model.all_tied_weights_keys
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in tied}
    return in_files(model, state)


def in_files(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``model`` by the names and in the shapes that its files have; of a layer all together."""
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return found


def find_dtype(given: torch.dtype | None, config: Any, reader: ShardReader) -> torch.dtype:
    """Of a model's weights: as asked for, as its config says, or as the first of its files' that float."""
    kind = given or getattr(config, "dtype", None) or next(s.dtype for s in reader.specs.values() if s.dtype.is_floating_point)
    dtype: torch.dtype = getattr(torch, kind) if isinstance(kind, str) else kind
    return dtype


def save_configs(model: Any, folder: Path, source: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json of ``model``, which may have no storage; the second as ``source`` has it. They come
    after the weights: shards have their headers and their size from the start, and would load half written."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    (read_generation(source) or model.generation_config).save_pretrained(folder)


def read_generation(folder: Path) -> GenerationConfig | None:
    """That of a model's folder, None where it has none.

    Raises:
        ValueError: it cannot be read, or lies elsewhere.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    require_inside(file, folder)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a JSON of another form leads to
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read ({reason}); allowed: the generation config of a model, or none") from None


def save_options(model: PreTrainedModel) -> dict[str, Any]:
    """For ``save_pretrained`` of a converted model: its state by the files' names, in which down projections are views of the
    files' shape, copied when their shard is written rather than all at once. Nothing where weights are offloaded, since those are
    fetched by the names that they have in memory, and where files have other names besides."""
    state = dict(model.state_dict())
    if any(tensor.is_meta for tensor in state.values()):
        return {}
    for name in moe_blocks(model):
        state[f"{name}.experts.down_proj"] = state.pop(f"{name}.experts.down_rows").transpose(1, 2)
    plain = state.keys() == revert_weight_conversion(model, {n: t.to("meta") for n, t in model.state_dict().items()}).keys()
    return {"state_dict": state, "save_original_format": False} if plain else {}
