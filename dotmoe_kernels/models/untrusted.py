"""A model folder from anywhere: what could run code, reach outside or take the machine's memory is refused before it is read.

Only safetensors are read; an index names files of its own folder; headers and configs are bounded by the files' real sizes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .._checks import refuse, require

_MOST_JSON = 1 << 24  # bytes of config.json
_MOST_INDEX = 1 << 28  # bytes of an index: a line a tensor
_MOST_HEADER = 100_000_000  # bytes, as of the safetensors library
_MOST_SIZE = 1 << 31  # of anything that a config counts
DTYPES = ("float64", "float32", "bfloat16", "float16")
_MOST_LAYERS = 10_000  # of a config without weights
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # built one by one, even without storage
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_inside(file: Path, folder: Path) -> None:
    """``file`` must lie in ``folder`` once links are followed; the hub's cache may link from a snapshot to its blobs.

    Raises:
        ValueError: it lies elsewhere.
    """
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    inside = real.is_relative_to(home) or real.is_relative_to(blobs)
    require(inside, file.name, f"a link out of {folder}", "files of the model's own folder")


def read_json(file: Path, most: int = _MOST_JSON) -> Any:
    """The JSON of a file of the folder.

    Raises:
        ValueError: no JSON, or one nested too deeply or too large.
    """
    size = file.stat().st_size
    require(size <= most, str(file), f"of {size:,} bytes", f"at most {most:,}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is not valid JSON (nested too deeply); allowed: a JSON object") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); allowed: a JSON object") from None


def _counts(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a config by its key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _counts(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _counts(inner, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value


def _index_names(index: Path) -> list[str]:
    """The files that an index names, none where it is not of that form: who reads it says so.

    Raises:
        ValueError: a name that is no plain file name.
    """
    try:
        values = read_json(index, _MOST_INDEX)
    except ValueError as error:
        raise ValueError(f"{index} cannot be read ({error}); allowed: a weight_map of files by tensor") from None
    listed = values.get("weight_map") if isinstance(values, dict) else None
    if isinstance(listed, dict) and not isinstance(values.get("metadata"), dict):
        given = repr(values.get("metadata"))
        raise ValueError(f"{index} cannot be read (metadata {given}); allowed: a weight_map of files by tensor, and metadata")
    names = sorted({name for name in listed.values() if isinstance(name, str)}) if isinstance(listed, dict) else []
    for name in names:
        plain = name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name) and name.endswith(".safetensors")
        require(plain, f"weight_map of {index}", f"with the file {name!r}", "names of safetensors files in the same folder")
    return names


def _require_header(file: Path) -> None:
    """The header's length, which a file says first, must fit the file."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        given = f"a header of {length:,} bytes in a file of {size:,}"
        raise ValueError(
            f"{file} cannot be read ({given}); allowed: a complete safetensors file, its header at most {_MOST_HEADER:,}"
        )


def _count_tensors(files: list[Path]) -> int | None:
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                count += len(list(handle.keys()))
        except (SafetensorError, OSError):  # who reads it says so
            return None
    return count


def check_files(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder whose files must not be read; what is merely missing or broken is left to whoever reads it.

    Raises:
        ValueError: pickled weights alone; an index that points outside; links that leave the folder; a header longer than its file;
            a config with absurd sizes or of more layers than the files have tensors.
    """
    path = Path(folder).expanduser()
    index, whole = path / _INDEX, path / "model.safetensors"
    for file in (path / "config.json", index, whole):
        if file.is_file():
            require_inside(file, path)
    files = [whole] if whole.is_file() else []
    if not files and index.is_file():
        files = [path / name for name in _index_names(index)]
    files = [file for file in files if file.is_file()]
    if not files and not index.is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            convert = (
                f'python -c "from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(path)!r}).save_pretrained'
            )
            refuse(
                "folder",
                f"{path}, whose weights are pickled ({pickles[0]}): reading such a file can run what is in it",
                f"safetensors files; where you trust it, this writes them: {convert}('NEW')\"",
            )
    for file in files:
        require_inside(file, path)
        _require_header(file)
    _check_config(path, _count_tensors(files) if files else None)


def check_config(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder whose config alone is read, where that must not be.

    Raises:
        ValueError: a link that leaves the folder, absurd sizes.
    """
    path = Path(folder).expanduser()
    if (path / "config.json").is_file():
        require_inside(path / "config.json", path)
    _check_config(path, None)


def _check_config(path: Path, tensors: int | None) -> None:
    """``tensors``: how many the files have, where that is known."""
    config = path / "config.json"
    if not config.is_file():
        return
    try:
        values = read_json(config)
    except ValueError as error:
        given = str(error).partition("; allowed")[0]
        raise ValueError(f"folder is {path}, which cannot be read ({given}); allowed: a model folder with a config.json") from None
    for key in ("dtype", "torch_dtype"):  # the second is its older name
        value = values.get(key) if isinstance(values, dict) else None
        require(value is None or value in DTYPES, f"{key} of {config}", repr(value), " | ".join(DTYPES))
    for key, count in _counts(values):
        require(abs(count) <= _MOST_SIZE, f"{key} of {config}", count, f"at most {_MOST_SIZE:,}")
    most, why = (_MOST_LAYERS, "") if tensors is None else (tensors, ", the number of tensors in the files")
    for key, count in _counts(values):
        require(key not in _LAYERS or count <= most, f"{key} of {config}", count, f"at most {most}{why}")


@contextmanager
def building(folder: object) -> Iterator[None]:
    """Inside, a model is made of the config in ``folder``: whatever a class of transformers raises of odd values, it is one
    ValueError."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch: no fault of the folder's
            raise
        name, reason = type(error).__name__, " ".join(str(error).split())
        words = reason if name.startswith("StrictDataclass") else f"{name}: {reason}"
        raise ValueError(f"folder is {folder}, which cannot be read ({words}); allowed: a model folder whose config fits") from None
