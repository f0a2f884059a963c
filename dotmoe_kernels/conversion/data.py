"""Text files or a Hugging Face dataset -> packed sequences of token ids."""

from __future__ import annotations

import os
import stat
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .._checks import is_integer, refuse, require, require_indices
from .readers import KINDS, TextField, is_settings, kind_of, missing_extra, read_file
from .token_cache import TokenCache, tokenizer_identity

_SOURCES = "a file, a folder or a dataset's name"
_TOKENS = "token ids: a tensor [N, S] int64, or an iterable of [S], such as the input_ids of each row"
_SHUFFLE_BUFFER = 10_000


def _row(row: Any, argument: str) -> Tensor:
    try:
        found = torch.as_tensor(row, device="cpu")
    except (TypeError, ValueError, RuntimeError, LookupError):  # a dictionary, text, lists of several lengths
        refuse(argument, f"of rows such as a {type(row).__name__}", _TOKENS)
    require(found.dim() == 1, argument, f"of rows of shape {list(found.shape)}", _TOKENS)
    return found


def as_tokens(data: Tensor | Iterable[Tensor], argument: str = "data") -> Tensor:
    """Packed sequences [N, S] on the CPU, of a tensor, int64 or int32 as it is, or of its rows one by one, int64.

    Raises:
        ValueError: no token ids (a dictionary, say), no sequence, sequences of different lengths or below 2 tokens, another dtype;
            names ``argument``.
    """
    if isinstance(data, Tensor):
        tokens = data
    else:
        iterable = isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping)
        require(iterable, argument, f"a {type(data).__name__}", _TOKENS)
        rows = [_row(row, argument) for row in data]
        lengths = sorted({row.numel() for row in rows})
        require(bool(rows), argument, "empty", "sequences of at least 2 tokens")
        require(len(lengths) == 1, argument, f"of sequences of {lengths[0]} to {lengths[-1]} tokens", "sequences of one length")
        tokens = torch.stack(rows)
        tokens = tokens.long() if tokens.dtype == torch.int32 else tokens
    require_indices(tokens, argument, 2, "[N, S]")
    require(
        tokens.shape[0] >= 1 and tokens.shape[1] >= 2, argument, f"of shape {list(tokens.shape)}", "sequences of at least 2 tokens"
    )
    return tokens.cpu()  # int32 may lie on disk


def _hub(name: str, field: TextField, seed: int) -> Iterator[str]:
    """A dataset by name, or "name:split" or "name:config:split"; streamed, shuffled within a buffer."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise missing_extra("datasets", name) from None
    path, *rest = name.split(":")
    require(len(rest) <= 2, "sources", name, "NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    split = rest[-1] if rest else "train"

    def rows() -> Iterator[Any]:
        try:
            stream = load_dataset(path, rest[0] if len(rest) == 2 else None, split=split, streaming=True)
            yield from stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        except Exception as error:  # of the network, of the hub, of the file of whatever kind behind the name
            reason = " ".join(str(error).split())
            refuse("sources", f"{name}, a dataset that cannot be read ({reason})", _SOURCES)

    for row in rows():
        yield field.text(row, name)


def _folder(folder: Path, field: TextField) -> list[Path]:
    """Its files in their order; a warning says what is passed over. Links to folders are: they may lead round in a circle."""
    files: list[Path] = []
    passed: dict[str, list[str]] = {
        name: [] for name in ("hidden", "of another kind", "settings", "links to folders", "broken links, pipes or devices")
    }

    def fail(error: OSError) -> NoReturn:  # os.walk would go on without a word
        refuse("sources", f"{error.filename}, which cannot be read ({error.strerror})", "folders that may be read")

    for root, folders, names in os.walk(folder, onerror=fail):
        for number, name in enumerate([*folders, *names]):
            path, inner = Path(root, name), number < len(folders)
            if name.startswith("."):
                kind = "hidden"
            elif inner and path.is_symlink():
                kind = "links to folders"
            elif inner:
                continue
            elif kind_of(path) is None:
                kind = "of another kind"
            elif not os.path.isfile(path):
                kind = "broken links, pipes or devices"
            elif is_settings(path, field):
                kind = "settings"
            else:
                files.append(path)
                continue
            passed[kind].append(f"{path.relative_to(folder)}{'/' if inner else ''}")
        folders[:] = [name for name in folders if not name.startswith(".")]
    count = sum(map(len, passed.values()))
    if count:
        parts = (f"{len(n)} {k} ({', '.join(sorted(n)[:3])}{', ...' if len(n) > 3 else ''})" for k, n in passed.items() if n)
        warnings.warn(f"{folder}: {len(files)} files are read, {count} passed over: {', '.join(parts)}", stacklevel=2)
    return sorted(files)


class _Located(NamedTuple):
    """A source: the files of a file or a folder and what is wrong where they hold no text, or the name of a dataset."""

    name: str
    files: list[Path] | None = None
    reason: str = ""
    allowed: str = ""

    def identity(self, seed: int) -> list[Any]:
        """What is another, once other text is read. A dataset is known by its name alone."""
        if self.files is None:
            return [self.name, seed]
        states = [(os.path.realpath(file), file.stat()) for file in self.files]
        return [[path, state.st_size, state.st_mtime_ns] for path, state in states]

    def texts(self, field: TextField, seed: int) -> Iterator[str]:
        if self.files is None:
            yield from _hub(self.name, field, seed)
            return
        texts = (text for file in self.files for text in read_file(file, field))
        first = next(texts, None)
        if first is None:
            refuse("sources", f"{Path(os.path.expanduser(self.name))}, {self.reason}", self.allowed)
        yield first
        yield from texts


def _locate(source: str, field: TextField) -> _Located:
    require(bool(source), "sources", repr(source), _SOURCES)
    path = Path(os.path.expanduser(source))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:  # a zero byte in the name is a ValueError
        refuse("sources", f"{source!r}, which cannot be read ({getattr(error, 'strerror', None) or error})", _SOURCES)
    if mode is None:
        link = os.path.islink(path)
        local = link or kind_of(path) or source.startswith((".", "/", "~")) or source.count("/") > 1
        require(not local, "sources", f"{source}, which {'leads to nothing' if link else 'does not exist'}", _SOURCES)
        return _Located(source)
    if stat.S_ISDIR(mode):
        files = _folder(path, field)
        return _Located(source, files, "a folder without text", f"a folder with {KINDS}, not all of them empty")
    require(stat.S_ISREG(mode), "sources", f"{path}, which is no regular file but a pipe or a device", _SOURCES)
    require(kind_of(path) is not None, "sources", str(path), f"files ending in {KINDS}")
    return _Located(source, [path], "which is empty", "files with text")


def _names(sources: Any) -> list[str]:
    names = [sources] if isinstance(sources, str | os.PathLike) or not isinstance(sources, Iterable) else list(sources)
    require(bool(names), "sources", names, "at least one file, folder or dataset name")
    for name in names:
        known = isinstance(name, str | os.PathLike) and isinstance(os.fspath(name), str)
        require(known, "sources", f"{name!r}, a {type(name).__name__}", f"{_SOURCES}, or several")
    return [os.fspath(name) for name in names]


def read_documents(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    seed: int = 0,
    tokenizer: Any = None,
) -> Iterator[str]:
    """The documents of ``sources``, one by one; arguments and errors as of ``load_tokens``, but that the tokenizer, for its chat
    template alone, may be None."""
    require(isinstance(text_field, str), "text_field", repr(text_field), "a string")
    field = TextField(text_field, tokenizer)
    for name in _names(sources):
        yield from _locate(name, field).texts(field, seed)


def _check_lengths(sequence_length: int, max_tokens: int | None) -> None:
    require(is_integer(sequence_length) and sequence_length >= 1, "sequence_length", sequence_length, "an integer >= 1")
    enough = max_tokens is None or max_tokens >= sequence_length
    require(enough, "max_tokens", max_tokens, f"at least one sequence, {sequence_length}, or None")


def _encode(text: str, tokenizer: Any) -> list[int]:
    """With the end-of-text token, where there is one."""
    try:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raises the bare class
        reason = " ".join(str(error).split())
        refuse("tokenizer", f"a {type(tokenizer).__name__}, which cannot encode the text ({reason})", "one for any text")
    end = tokenizer.eos_token_id
    return found if end is None or found[-1:] == [end] else [*found, end]  # a chat template may have written it


def _require_rows(count: int, sequence_length: int, given: str) -> int:
    require(count >= sequence_length, "sources", f"{given}, {count} tokens", f"at least one sequence of {sequence_length} tokens")
    return count // sequence_length


def pack_documents(
    documents: Iterable[str], tokenizer: Any, *, sequence_length: int, max_tokens: int | None = None, given: str = "the documents"
) -> Tensor:
    """Tokenised ``documents`` packed into [M, N] int64 as ``load_tokens`` says; ``given`` names them in errors."""
    _check_lengths(sequence_length, max_tokens)
    ids = array("q")
    for text in documents:
        ids.extend(_encode(text, tokenizer))
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    rows = _require_rows(len(ids) if max_tokens is None else min(len(ids), max_tokens), sequence_length, given)
    return torch.frombuffer(ids, dtype=torch.int64, count=rows * sequence_length).view(rows, sequence_length)  # not a copy


def load_tokens(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    sequence_length: int,
    max_tokens: int | None = None,
    text_field: str = "text",
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Tensor:
    """Documents, joined by the end-of-text token where the tokenizer has one, cut into full sequences; the rest is dropped.

    Args:
        sources: one or several of: a .txt, .md or .py file (one document), a .jsonl, .json or .parquet file (one a row; .json: a
            list of rows, or one object a line), all but parquet also as .gz or .zst; a folder of those, whose hidden files are
            passed over; the name of a Hugging Face dataset ("name", "name:split", "name:config:split"), which is streamed.
        tokenizer: of transformers.
        sequence_length: N tokens a sequence.
        max_tokens: stop after so many tokens; None reads everything.
        text_field: the field of a row that holds the text, or a list of chat messages ({"role", "content"}), which the chat
            template of the tokenizer joins; "a.b" is b in the object a.
        seed: of the shuffle of a dataset's stream; files are read in order.
        cache: a folder for the token ids, 4 bytes each, which then are read from there and take no memory. What is there already
            is not tokenised again, also after an interruption and by several processes at once, as long as the tokenizer and the
            files, by their names, sizes and times, are the same. None: in memory, 8 bytes each.
        progress: show a bar while ``cache`` is written.

    Returns:
        tokens [M, N] int64, the same for the same arguments; with ``cache`` int32.

    Raises:
        ValueError: no source, an empty or broken file, no such field, an unknown kind of file, fewer tokens than one sequence.
        ImportError: pyarrow or datasets is needed; it names the extra.

    A warning says what a folder holds that is not read.
    """
    names = _names(sources)
    given, field = ", ".join(names), TextField(text_field, tokenizer)
    if cache is None:
        documents = read_documents(names, text_field=text_field, seed=seed, tokenizer=tokenizer)
        return pack_documents(documents, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens, given=given)
    _check_lengths(sequence_length, max_tokens)
    require(isinstance(text_field, str), "text_field", repr(text_field), "a string")
    located = [_locate(name, field) for name in names]
    source = {"files": [one.identity(seed) for one in located], "text_field": text_field}
    store = TokenCache(Path(os.path.expanduser(cache)), source | {"tokenizer": tokenizer_identity(tokenizer)})
    tokens = store.tokens(
        lambda: (text for one in located for text in one.texts(field, seed)),
        lambda text: _encode(text, tokenizer),
        max_tokens,
        progress=progress,
    )
    rows = _require_rows(tokens.numel(), sequence_length, given)
    return tokens[: rows * sequence_length].view(rows, sequence_length)
