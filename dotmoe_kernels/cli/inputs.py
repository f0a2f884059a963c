"""What the commands of `dotmoe` share: the device, the tokenizer and the model's folder that the arguments name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._checks import require


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


def read_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]})") from None


def require_model_folder(name: str, *, weights: bool = True) -> None:
    """A local folder must hold a config, and weights unless told otherwise; another name is left to transformers."""
    path = Path(name).expanduser()
    if path.is_dir():
        require((path / "config.json").is_file(), "MODEL", f"{name}, without config.json", "a Hugging Face model folder")
        files = [f for pattern in ("*.safetensors", "*.bin", "*.index.json") for f in path.glob(pattern)]
        require(bool(files) or not weights, "MODEL", f"{name}, without weights", "a folder with safetensors files")
    else:
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
        require(not local, "MODEL", f"{name}, which is no folder", "a Hugging Face model folder, or a name")
