"""Where a model is written: which folders may be, and which of their files it replaces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .._checks import require
from .._files import TEMPORARY
from .folder import OURS

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# what AutoTokenizer reads and no other program means by the name; those of an older tokenizer would mix with the new one's
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
# of tokenizers as well, but others may mean something else by the name
VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
_ADAPTER = "adapter_config.json"
_NOTHING = "lost+found"  # a fresh volume's


def replaced_files(*, tokenizer: bool) -> Callable[[str], bool]:
    """Whether a file of that name goes when a model is written into its folder, also one that the new model has no need of.

    Args:
        tokenizer: whether one is written along.
    """
    return lambda name: name in OURS or bool(_SHARD.fullmatch(name)) or (tokenizer and name in _TOKENIZER)


def is_model(folder: Path) -> bool:
    """Whether it has a model's config.json; other programs have files of that name too."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and isinstance(values.get("model_type"), str)


def occupants(folder: Path) -> list[str]:
    """Names of what a folder holds; none, where it does not exist."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != _NOTHING) if os.path.exists(folder) else []


def check_target(folder: str | os.PathLike[str], argument: str, overwrite: bool, *, flag: str = "overwrite=True") -> Path:
    """The folder to write a model to, symbolic links resolved: a new one, an empty one, or if ``overwrite`` one with a model.

    Args:
        argument, flag: what errors call ``folder`` and ``overwrite``.

    Raises:
        ValueError: it is another.
    """
    path = Path(os.path.realpath(os.path.expanduser(folder)))
    if not os.path.exists(path):
        return path
    require(path.is_dir(), argument, f"{path}, a file", "a folder")
    names = occupants(path)
    require(overwrite or not names, argument, f"{path}, which exists", f"a new folder, or {flag}")
    ours = replaced_files(tokenizer=True)
    begun = [name for name in names if name.startswith(TEMPORARY)]  # a save that was killed, which may have moved config.json away
    left = bool(begun) and "config.json" not in names and all(ours(name) or name in begun for name in names)
    known = not names or is_model(path) or left
    blocked = next((name for name in names if ours(name) and (path / name).is_dir()), None)
    require(
        known, argument, f"{path}, which holds something else than a model", "a new folder, or one with the config.json of a model"
    )
    require(blocked is None, argument, f"{path}, whose {blocked} is a folder", "a new folder, or one with a model")
    require(_ADAPTER not in names, argument, f"{path}, whose {_ADAPTER} would be loaded into the model", "a folder without one")
    return path


def require_apart(target: Path, argument: str, given: str, others: Mapping[str, str | os.PathLike[str]]) -> None:
    """Nothing that is read, or worked in, may lie in a folder that is written to.

    Args:
        target: the folder.
        argument, given: what errors call it, and how they go on before "holds".
        others: the paths by what errors call them; one that does not exist is a name of something else.

    Raises:
        ValueError: one of them is ``target`` or lies in it.
    """
    inside = os.path.realpath(target)
    for words, other in others.items():
        for name in {os.fspath(other), os.path.expanduser(other)}:
            folder, entry = os.path.split(os.path.abspath(name))
            forms = (os.path.realpath(name), os.path.join(os.path.realpath(folder), entry))  # a link itself may lie there, too
            found = os.path.exists(name) and any(os.path.commonpath([inside, form]) == inside for form in forms)
            require(not found, argument, f"{given} holds {words}", "another folder")


@contextmanager
def in_its_place(new: Path, path: Path) -> Iterator[None]:
    """Inside, an error about the folder ``new`` names ``path``, which it is to become."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(new), str(path))) from error
