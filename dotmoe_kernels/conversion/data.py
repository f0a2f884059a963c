"""Text files or a Hugging Face dataset -> packed sequences of token ids."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import is_integer, refuse, require, require_indices

_WHOLE = (".txt", ".md", ".py")
_SUFFIXES = (*_WHOLE, ".jsonl", ".parquet")
_SOURCES = "a file, a folder or a dataset's name"
_SHUFFLE_BUFFER = 10_000


def as_tokens(data: Tensor | Iterable[Tensor], argument: str = "data") -> Tensor:
    """Packed sequences [N, S] int64 on the CPU, of a tensor or of its rows one by one.

    Raises:
        ValueError: no sequence, sequences of different lengths or below 2 tokens, another dtype; names ``argument``.
    """
    if isinstance(data, Tensor):
        tokens = data
    else:
        rows = [torch.as_tensor(row) for row in data]
        lengths = sorted({row.numel() for row in rows})
        require(bool(rows), argument, "empty", "sequences of at least 2 tokens")
        require(len(lengths) == 1, argument, f"of sequences of {lengths[0]} to {lengths[-1]} tokens", "sequences of one length")
        tokens = torch.stack(rows)
    require_indices(tokens, argument, 2, "[N, S]")
    require(
        tokens.shape[0] >= 1 and tokens.shape[1] >= 2, argument, f"of shape {list(tokens.shape)}", "sequences of at least 2 tokens"
    )
    return tokens.long().cpu()


def _missing_extra(package: str, source: str) -> ImportError:
    return ImportError(f"reading {source} needs {package}: pip install 'dotmoe_kernels[data]'")


def _whole(path: Path) -> Iterator[str]:
    """A stray byte of another encoding is replaced; a zero byte is in no text, but in most binary files and in UTF-16."""
    content = path.read_bytes()
    require(b"\0" not in content, "sources", f"{path}, which holds zero bytes", "files with text in UTF-8")
    text = content.decode("utf-8", errors="replace")
    if text.strip():
        yield text


def _field(row: Any, text_field: str, where: str) -> str:
    known = sorted(row) if isinstance(row, dict) else type(row).__name__
    require(isinstance(row, dict) and text_field in row, "text_field", f"{text_field!r}, which {where} lacks", f"one of {known}")
    return _text(row[text_field], text_field, where)


def _text(value: Any, text_field: str, where: str) -> str:
    """Nothing counts as no text; a list of messages, say, is not what a model should read as Python writes it."""
    kind = type(value).__name__
    require(value is None or isinstance(value, str), "text_field", f"{text_field!r}, a {kind} in {where}", "a field of text")
    return value or ""


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:  # of the encoding or the syntax
                refuse("sources", f"{path}, which is no JSON in line {number} ({error})", "one object a line, in UTF-8")
            yield _field(row, text_field, f"line {number} of {path}")


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _missing_extra("pyarrow", str(path)) from None
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors are both
        refuse("sources", f"{path}, which cannot be read ({error})", "a parquet file")
    names = file.schema_arrow.names
    require(text_field in names, "text_field", f"{text_field!r}, which {path} lacks", f"one of {names}")
    for batch in file.iter_batches(columns=[text_field]):
        for value in batch.column(0):
            yield _text(value.as_py(), text_field, str(path))


def _hub(name: str, text_field: str, seed: int) -> Iterator[str]:
    """A dataset by name, or "name:split" or "name:config:split"; streamed, shuffled within a buffer."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise _missing_extra("datasets", name) from None
    path, *rest = name.split(":")
    require(len(rest) <= 2, "sources", name, "NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    split = rest[-1] if rest else "train"
    try:
        rows = load_dataset(path, rest[0] if len(rest) == 2 else None, split=split, streaming=True)
    except (ValueError, OSError) as error:
        refuse("sources", f"{name}, a dataset that cannot be read ({error})", _SOURCES)
    for row in rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER):
        yield _field(row, text_field, name)


def _file(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        return _jsonl(path, text_field)
    if path.suffix == ".parquet":
        return _parquet(path, text_field)
    return _whole(path)


def _documents(source: str, text_field: str, seed: int) -> Iterator[str]:
    require(bool(source), "sources", repr(source), _SOURCES)
    path, kinds = Path(source).expanduser(), ", ".join(_SUFFIXES)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in _SUFFIXES)
        reason, allowed = "a folder without text", f"a folder with {kinds} files, not all of them empty"
    elif path.is_file():
        require(path.suffix in _SUFFIXES, "sources", str(path), f"files ending in {kinds}")
        files, reason, allowed = [path], "which is empty", "files with text"
    elif path.suffix in _SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        refuse("sources", f"{source}, which does not exist", _SOURCES)
    else:
        yield from _hub(source, text_field, seed)
        return
    texts = (text for file in files for text in _file(file, text_field))
    first = next(texts, None)
    if first is None:
        refuse("sources", f"{path}, {reason}", allowed)
    yield first
    yield from texts


def read_documents(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, text_field: str = "text", seed: int = 0
) -> Iterator[str]:
    """The documents of ``sources``, one by one; arguments and errors as of ``load_tokens``."""
    names = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    require(bool(names), "sources", names, "at least one file, folder or dataset name")
    for name in names:
        yield from _documents(os.fspath(name), text_field, seed)


def pack_documents(
    documents: Iterable[str], tokenizer: Any, *, sequence_length: int, max_tokens: int | None = None, given: str = "the documents"
) -> Tensor:
    """Tokenised ``documents`` packed into [M, N] int64 as ``load_tokens`` says; ``given`` names them in errors."""
    require(is_integer(sequence_length) and sequence_length >= 1, "sequence_length", sequence_length, "an integer >= 1")
    enough = max_tokens is None or max_tokens >= sequence_length
    require(enough, "max_tokens", max_tokens, f"at least one sequence, {sequence_length}, or None")
    end = tokenizer.eos_token_id
    ids = array("q")
    for text in documents:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if end is not None:
            ids.append(end)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    count = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    require(count >= sequence_length, "sources", f"{given}, {count} tokens", f"at least one sequence of {sequence_length} tokens")
    rows = count // sequence_length
    return torch.frombuffer(ids, dtype=torch.int64, count=rows * sequence_length).view(rows, sequence_length)  # not a copy


def load_tokens(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    sequence_length: int,
    max_tokens: int | None = None,
    text_field: str = "text",
    seed: int = 0,
) -> Tensor:
    """Documents, joined by the end-of-text token where the tokenizer has one, cut into full sequences; the rest is dropped.

    Args:
        sources: one or several of: a .txt, .md or .py file (one document), a .jsonl or .parquet file (one a row), a folder of
            those, or the name of a Hugging Face dataset ("name", "name:split", "name:config:split"), which is streamed.
        tokenizer: of transformers.
        sequence_length: N tokens a sequence.
        max_tokens: stop after so many tokens; None reads everything.
        text_field: the field of a .jsonl, .parquet or dataset row that holds the text.
        seed: of the shuffle of a dataset's stream; files are read in order.

    Returns:
        tokens [M, N] int64, the same for the same arguments.

    Raises:
        ValueError: no source, an empty file, no such field, an unknown kind of file, fewer tokens than one sequence.
        ImportError: pyarrow or datasets is needed; it names the extra.
    """
    names = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    return pack_documents(
        read_documents(names, text_field=text_field, seed=seed),
        tokenizer,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        given=", ".join(map(str, names)),
    )
