"""Recipes: the topology and the training options of a conversion in a small TOML file, for `dotmoe convert --recipe`.

    description = "LLaMA-3-8B, ..."          model = "meta-llama/Meta-Llama-3-8B"  # a folder, or a name
    dtype = "bfloat16"                       sequence_length = 2048
    [topology]   num_experts or expert_size; active_fraction or top_k; router
    [alignment]  fields of AlignmentConfig
    [backbone]   model_type and sizes, as in the model's config.json: enough for a dry run, which then needs no download

Every key may be left out. Those that ship with the package lie in ``recipes/``.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .._checks import refuse, require
from ..alignment.config import AlignmentConfig

_NUMBER = (int, float)
_TOPOLOGY = {"expert_size": int, "num_experts": int, "active_fraction": _NUMBER, "top_k": int, "router": str}
_PAIRS = (("expert_size", "num_experts"), ("active_fraction", "top_k"))
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_BACKBONE = {"model_type": str, **dict.fromkeys(_SIZES, int), "tie_word_embeddings": bool}
_KINDS: dict[str, Any] = {"int": int, "float": _NUMBER, "str": str, "bool": bool}
_ALIGNMENT = {f.name: _KINDS[str(f.type).removesuffix(" | None")] for f in dataclasses.fields(AlignmentConfig)}
_TABLES: dict[str, dict[str, Any]] = {"topology": _TOPOLOGY, "alignment": _ALIGNMENT, "backbone": _BACKBONE}
_TOP = {"description": str, "model": str, "dtype": str, "sequence_length": int, **dict.fromkeys(_TABLES, dict)}
_CHOICES = {"dtype": ("float32", "bfloat16", "float16"), "topology.router": ("top_k", "soft")}
_WORDS = {int: "an integer", _NUMBER: "a number", str: "a string", bool: "true or false", dict: "a table"}


@dataclass(frozen=True)
class Recipe:
    """What a recipe says; what it leaves out is None or absent."""

    name: str
    description: str = ""
    model: str | None = None
    dtype: str | None = None
    sequence_length: int | None = None
    topology: dict[str, Any] = field(default_factory=dict)  # arguments of DotMoeConfig.for_dense
    alignment: dict[str, Any] = field(default_factory=dict)  # fields of AlignmentConfig
    backbone: dict[str, Any] = field(default_factory=dict)  # fields of the dense config


def recipe_names() -> list[str]:
    """The recipes of the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe of the package by its name, or a TOML file of your own by its path.

    Raises:
        ValueError: an unknown name; a file that is not there or no TOML; an unknown key, a value of the wrong type or out of
            range, each named with the file and what is allowed.
    """
    if name.endswith(".toml"):
        path = Path(os.path.expanduser(name))
        require(path.is_file(), "recipe", f"{name}, which is no file", "the path of a TOML file, or a name without .toml")
        try:
            data = path.read_bytes()
        except OSError as error:
            refuse("recipe", f"{name}, which cannot be read ({error.strerror})", "a file that may be read")
    else:
        names = recipe_names()
        require(name in names, "recipe", repr(name), f"{', '.join(names)}, or the path of a .toml file")
        data = (resources.files(__package__) / "recipes" / f"{name}.toml").read_bytes()
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of the encoding or the syntax; nested deeper than Python goes
        raise ValueError(f"recipe {name} is no TOML file ({error})") from None
    return _checked(name, values)


def _checked(name: str, values: dict[str, Any]) -> Recipe:
    _check_table(name, "", values, _TOP)
    for table, kinds in _TABLES.items():
        _check_table(name, f"{table}.", values.get(table, {}), kinds)
    for key, value in values.get("backbone", {}).items():
        require(key not in _SIZES or value >= 1, f"backbone.{key} in recipe {name}", value, "at least 1")
    topology = values.get("topology", {})
    for pair in _PAIRS:
        given = [key for key in pair if key in topology]
        require(len(given) < 2, f"topology in recipe {name}", f"with both {' and '.join(given)}", "one of them")
    length = values.get("sequence_length", 2)
    require(length >= 2, f"sequence_length in recipe {name}", length, "at least 2 tokens")
    try:
        AlignmentConfig(**values.get("alignment", {}))
    except ValueError as error:
        raise ValueError(f"alignment in recipe {name}: {error}") from None
    return Recipe(name=name, **values)


def _check_table(name: str, prefix: str, values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for key, value in values.items():
        require(key in kinds, f"a key in recipe {name}", repr(prefix + key), ", ".join(prefix + k for k in kinds))
        kind = kinds[key]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        require(fits, f"{prefix}{key} in recipe {name}", repr(value), _WORDS[kind])
        choices = _CHOICES.get(prefix + key)
        require(choices is None or value in choices, f"{prefix}{key} in recipe {name}", repr(value), " | ".join(choices or ()))
