"""What the commands of `dotmoe` share: the device, the tokenizer and the model's folder that the arguments name, and the names
that errors call them by."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .._checks import refuse, require

if TYPE_CHECKING:
    from ..alignment.ranks import Ranks

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
    except (ValueError, ImportError, MemoryError, FloatingPointError):
        raise
    except Exception as error:  # JSON of another form than transformers counts on leads to whatever it leads to
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = f"{type(error).__name__}: {error}"
        refuse("MODEL", f"{name}, which cannot be read ({reason})", "a Hugging Face model folder, or a name")


def require_text(args: argparse.Namespace) -> None:
    """Bytes that are no UTF-8 come in as halves of surrogate pairs, which no tokenizer takes and no file."""
    for name, value in vars(args).items():
        shown = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        for part in value if isinstance(value, list) else [value]:
            whole = not isinstance(part, str) or not any("\ud800" <= letter <= "\udfff" for letter in part)
            require(whole, shown, repr(part), "text in UTF-8")


def require_seed(seed: int, argument: str = "--seed") -> None:
    """Training makes seeds of a few steps or epochs from it, and torch takes 64 bits."""
    require(abs(seed) < 1 << 32, argument, seed, "an integer below 2^32")


def find_device(name: str) -> str:
    """Of several processes on a machine each has a GPU of its own."""
    import torch

    from ..alignment.ranks import launched, local_rank

    if launched():
        place, gpus = local_rank(), torch.cuda.device_count() if torch.cuda.is_available() else 0
        require(name in ("auto", "cpu", "cuda"), "--device", repr(name), "auto, cpu or cuda with several processes")
        if name == "cpu" or (name == "auto" and not gpus):
            return "cpu"
        require(place < gpus, "--nproc-per-node of torchrun", f"more than {place}", f"at most {gpus}, a GPU for each process")
        return f"cuda:{place}"
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    known = name == "cpu" or (kind == "cuda" and (name == kind or number.isdecimal()))
    require(known, "--device", repr(name), "auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = f"cpu, or cuda:N with N below {count}" if count else "cpu: this machine has no usable GPU"
    require(name == "cpu" or int(number or 0) < count, "--device", repr(name), allowed)
    return name


def process_rank() -> int:
    """Of this process among those of torchrun, or as far as it is known among those of this machine."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # what torch looks at, which is slow to import for an error in the arguments
        return 0
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else dist.get_node_local_rank(0)


@contextmanager
def joined_ranks(args: argparse.Namespace) -> Iterator[Ranks]:
    """Inside, the processes that torchrun started are connected, and all but the first are silent."""
    import torch

    from ..alignment.ranks import joined, launched

    with joined(torch.device(find_device(args.device) if launched() else "cpu")) as ranks, ExitStack() as silence:
        if not ranks.first:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
            args.no_progress = True
        yield ranks


def require_model_folder(name: str, *, weights: bool = True, gguf: bool = False) -> None:
    """A local folder must hold a config, and weights unless told otherwise; another name is left to transformers. ``gguf``: a
    .gguf file will do."""
    require(bool(name), "MODEL", repr(name), "a Hugging Face model folder, or a name")
    path = Path(os.path.expanduser(name))
    if gguf and path.suffix.lower() == ".gguf":
        require(path.is_file(), "MODEL", f"{name}, which is no file", "a .gguf file, a Hugging Face model folder, or a name")
    elif path.is_dir():
        require((path / "config.json").is_file(), "MODEL", f"{name}, without config.json", "a Hugging Face model folder")
        files = [f for pattern in ("*.safetensors", "*.bin", "*.index.json") for f in path.glob(pattern)]
        require(bool(files) or not weights, "MODEL", f"{name}, without weights", "a folder with safetensors files")
        from ..models.untrusted import check_config, check_files

        with named(folder="MODEL"):
            (check_files if weights else check_config)(path)
    else:
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
        require(not local, "MODEL", f"{name}, which is no folder", "a Hugging Face model folder, or a name")


def converted_config(name: str) -> Any:
    """Of the converted model MODEL, whose folder is checked by its headers."""
    from ..models import DotMoeForCausalLM
    from ..models.folder import check_folder

    require(os.path.exists(name), "MODEL", f"{name or repr(name)}, which does not exist", "a folder written by dotmoe_kernels.save")
    with reading(name):
        return check_folder(name, DotMoeForCausalLM)


def find_tokenizer(args: argparse.Namespace) -> Any:
    """That of --tokenizer, else MODEL's own."""
    from ..conversion.sources import read_tokenizer

    require(args.tokenizer != "", "--tokenizer", "''", "a folder with a tokenizer, or a name")
    if args.tokenizer is None:
        saved = "a MODEL saved with one, as save(model, folder, tokenizer=...) does, or --tokenizer"
        return read_tokenizer(args.model, allowed=saved)
    try:
        return read_tokenizer(args.tokenizer, allowed="a folder with one, or a name")
    except ValueError as error:
        raise ValueError(f"--tokenizer {error}") from None


def require_vocabulary(tokens: Any, vocabulary: int, args: argparse.Namespace) -> None:
    """The tokenizer must know no more ids than MODEL."""
    most = int(tokens.max())
    if args.tokenizer is None:
        given = f"{args.model}, whose tokenizer gives ids up to {most}"
        require(most < vocabulary, "MODEL", given, f"ids below its vocabulary, {vocabulary}")
    given = f"{args.tokenizer}, which gives ids up to {most}"
    require(most < vocabulary, "--tokenizer", given, f"ids below the vocabulary of MODEL, {vocabulary}")
