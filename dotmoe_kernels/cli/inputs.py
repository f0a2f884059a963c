"""What the commands of `dotmoe` share: the device, the tokenizer and the model's folder that the arguments name, and the names
that errors call them by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .._checks import refuse, require

# what load_tokens calls the options of the data
DATA = {"sources": "--data", "text_field": "--text-field", "sequence_length": "--sequence-length", "max_tokens": "--max-tokens"}


@contextmanager
def named(**options: str) -> Iterator[None]:
    """Inside, an error that begins with one of these arguments, as every one of ours does, names what the user typed instead."""
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).partition(" ")
        if argument not in options:
            raise
        raise ValueError(f"{options[argument]} {rest}") from None


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Inside MODEL ``name`` is read: what cannot be read, found or fetched is its fault, whatever transformers says of it."""
    from huggingface_hub.errors import StrictDataclassError  # of a config's fields; transformers imports it anyway

    try:
        with named(model="MODEL", folder="MODEL"):
            yield
    except (OSError, SafetensorError, StrictDataclassError) as error:
        refuse("MODEL", f"{name}, which cannot be read ({error})", "a Hugging Face model folder, or a name")


def require_seed(seed: int, argument: str = "--seed") -> None:
    """Training makes seeds of a few steps or epochs from it, and torch takes 64 bits."""
    require(abs(seed) < 1 << 32, argument, seed, "an integer below 2^32")


def find_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    known = name == "cpu" or (kind == "cuda" and (name == kind or number.isdecimal()))
    require(known, "--device", repr(name), "auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = f"cpu, or cuda:N with N below {count}" if count else "cpu: this machine has no usable GPU"
    require(name == "cpu" or int(number or 0) < count, "--device", repr(name), allowed)
    return name


def require_model_folder(name: str, *, weights: bool = True) -> None:
    """A local folder must hold a config, and weights unless told otherwise; another name is left to transformers."""
    require(bool(name), "MODEL", repr(name), "a Hugging Face model folder, or a name")
    path = Path(name).expanduser()
    if path.is_dir():
        require((path / "config.json").is_file(), "MODEL", f"{name}, without config.json", "a Hugging Face model folder")
        files = [f for pattern in ("*.safetensors", "*.bin", "*.index.json") for f in path.glob(pattern)]
        require(bool(files) or not weights, "MODEL", f"{name}, without weights", "a folder with safetensors files")
        if weights:
            from ..models.untrusted import check_files

            with named(folder="MODEL"):
                check_files(path)
    else:
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
        require(not local, "MODEL", f"{name}, which is no folder", "a Hugging Face model folder, or a name")


def require_vocabulary(tokens: Any, vocabulary: int, name: str) -> None:
    """The tokenizer of MODEL ``name`` must know no more ids than the model."""
    most = int(tokens.max())
    require(
        most < vocabulary, "MODEL", f"{name}, whose tokenizer gives ids up to {most}", f"ids below its vocabulary, {vocabulary}"
    )
