"""Kinds of files -> their documents: text as it stands, or rows by one field of them; plain, .gz or .zst."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import refuse, require

_WHOLE = (".txt", ".md", ".py")
_SUFFIXES = (*_WHOLE, ".jsonl", ".parquet", ".json")
KINDS = f"{', '.join(_SUFFIXES)}, and .gz or .zst of all but parquet"
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

Rows = Iterator[tuple[str, Any]]  # where it stands, and the row


def missing_extra(package: str, source: str) -> ImportError:
    return ImportError(f"reading {source} needs {package}: pip install 'dotmoe_kernels[data]'")


@contextmanager
def naming(source: object, *errors: type[BaseException]) -> Iterator[None]:
    """Inside, these errors are those of ``source``, which what was raised need not name."""
    try:
        yield
    except errors as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        refuse("sources", f"{source}, which cannot be read ({' '.join(reason.split())})", "a file that is whole and may be read")


class TextField(NamedTuple):
    """The field of a row that holds the text. ``tokenizer``: whose chat template joins a list of messages; None: none does."""

    name: str
    tokenizer: Any = None

    def find(self, row: Any, where: str) -> Any:
        """The field's value; "a.b" is a field of that name, or b in the object a."""
        require(isinstance(row, dict), "sources", f"{where}, a {type(row).__name__}", f"an object with a field {self.name!r}")
        if self.name in row:
            return row[self.name]
        value = row
        for part in self.name.split("."):
            if value is None:  # an object that this row leaves out
                return None
            if not isinstance(value, dict) or part not in value:
                refuse("text_field", f"{self.name!r}, which {where} lacks", f"one of {_known(row)}")
            value = value[part]
        return value

    def text(self, row: Any, where: str) -> str:
        """Nothing counts as no text; a list of numbers, say, is not what a model should read as Python writes it."""
        value = self.find(row, where)
        if _is_chat(value):
            value = self._join(value, where) if value else None
        fits, kind = value is None or isinstance(value, str), type(value).__name__
        require(fits, "text_field", f"{self.name!r}, a {kind} in {where}", "a field of text or of chat messages")
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:  # JSON can write it, and no tokenizer takes it
            half = value[error.start : error.end]
            refuse("sources", f"{where}, with half of a surrogate pair, {half!r}, in {self.name!r}", "text in Unicode")
        return value or ""

    def _join(self, messages: list[dict[str, Any]], where: str) -> str:
        given = f"{self.name!r}, chat messages in {where}"
        template = getattr(self.tokenizer, "chat_template", None)
        require(bool(template), "text_field", f"{given} without a chat template", "a field of text, or a tokenizer with a template")
        # a parquet file fills in None for what a message leaves out, and templates ask whether it is there
        found = [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages]
        try:
            return str(self.tokenizer.apply_chat_template(found, tokenize=False))
        except ImportError:
            raise
        except Exception as error:  # the template is a program, and raises what it likes
            reason = " ".join(str(error).split())
            refuse("text_field", f"{given}, which the tokenizer's chat template refuses ({reason})", "messages that it takes")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)


def _known(row: dict[str, Any]) -> list[str]:
    """The fields of a row and of the objects right in it."""
    names = ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key] for key, value in row.items())
    return sorted(name for some in names for name in some)[:50]


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator gives piece by piece."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _frames(file: io.BufferedIOBase, zstandard: Any) -> Iterator[bytes]:
    """Its own stream ends without a word where the file was cut off: so frame by frame, each of which must end."""
    unpack = None
    while chunk := file.read(1 << 18):
        while chunk:
            unpack = unpack or zstandard.ZstdDecompressor().decompressobj()
            yield unpack.decompress(chunk)
            chunk = unpack.unused_data if unpack.eof else b""
            unpack = None if unpack.eof else unpack
    if unpack is not None:
        raise EOFError("it was cut off")


def _unpack_zstd(file: io.BufferedIOBase, path: Path) -> tuple[io.BufferedIOBase, type[Exception]]:
    """The stream, and what it raises for bytes that are none of zstd's."""
    for name in ("compression.zstd", "backports.zstd"):  # of Python 3.14, and the same for those before it
        try:
            zstd: Any = import_module(name)
        except ImportError:
            continue
        return zstd.open(file), zstd.ZstdError
    try:
        import pyarrow

        if pyarrow.Codec.is_available("zstd"):
            return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")), pyarrow.ArrowException
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise missing_extra("Python 3.14, pyarrow or zstandard", str(path)) from None
    return io.BufferedReader(_Chunks(_frames(file, zstandard)), 1 << 18), zstandard.ZstdError


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unpacked where its suffix says that they are packed."""
    with naming(path, OSError, EOFError, zlib.error), path.open("rb") as file:
        suffix = path.suffix.lower()
        if suffix == ".zst":
            stream, error = _unpack_zstd(file, path)
            with naming(path, error), stream:
                yield stream
        elif suffix == ".gz":
            with gzip.open(file) as unpacked:
                yield unpacked
        else:
            yield file


def _whole(path: Path) -> Iterator[str]:
    """A stray byte of another encoding is replaced; a zero byte is in no text, but in most binary files and in UTF-16."""
    with _opened(path) as file:
        content = file.read()
    require(b"\0" not in content, "sources", f"{path}, which holds zero bytes", "files with text in UTF-8")
    require(not content.startswith(_UTF_16), "sources", f"{path}, which is in UTF-16", "files with text in UTF-8")
    text = content.decode("utf-8-sig", errors="replace")
    if text.strip():
        yield text


def _parse(content: bytes, path: Path, place: str = "") -> Any:
    try:
        return json.loads(content.removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of the encoding or the syntax; nested deeper than Python goes
        kind = "one object a line" if place else "rows, or one object a line"
        refuse("sources", f"{path}, which is no JSON{place} ({error})", f"{kind}, in UTF-8")


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(_BOM).strip()


def _lines(path: Path) -> Rows:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not _is_blank(line):
                yield f"line {number} of {path}", _parse(line, path, f" in line {number}")


def _lone_object(path: Path) -> dict[str, Any] | None:
    """The one object that a .json file is, as settings are; None for rows."""
    with _opened(path) as file:
        first = next((line for line in file if not _is_blank(line)), b"").removeprefix(_BOM)
        if not first.lstrip().startswith(b"{"):
            return None
        try:
            row = json.loads(first.decode("utf-8"))
        except (ValueError, RecursionError):  # it goes on in the lines below
            return _parse(first + file.read(), path)
        return None if any(not _is_blank(line) for line in file) else row


def _json(path: Path) -> Rows:
    lone = _lone_object(path)
    if lone is not None:
        yield str(path), lone
        return
    with _opened(path) as file:
        begin = next((line for line in file if not _is_blank(line)), b"").removeprefix(_BOM).lstrip()[:1]
    if begin in (b"{", b""):
        yield from _lines(path)
        return
    with _opened(path) as file:
        rows = _parse(file.read(), path)
    require(isinstance(rows, list), "sources", f"{path}, a {type(rows).__name__}", "a list of rows, or one object a line")
    for number, row in enumerate(rows, 1):
        yield f"row {number} of {path}", row


def is_settings(path: Path, field: TextField) -> bool:
    """Whether a .json file is one object without the field, as the settings beside a data set are, and no rows."""
    lone = _lone_object(path) if kind_of(path) == ".json" else None
    try:
        return lone is not None and field.find(lone, "") is None
    except ValueError:
        return True


def _shape(types: Any, struct: type) -> dict[str, Any]:
    """A row of a schema of pyarrow, with nothing but its fields and those of structs in it."""
    return {f.name: _shape(f.type, struct) if isinstance(f.type, struct) else "" for f in types}


def _parquet(path: Path, field: TextField) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise missing_extra("pyarrow", str(path)) from None
    errors = (pyarrow.ArrowException, OSError, ValueError)
    with naming(path, *errors):
        file = parquet.ParquetFile(path)
    with file:
        field.find(_shape(file.schema_arrow, pyarrow.StructType), str(path))
        number = 0
        with naming(path, *errors):
            for batch in file.iter_batches(columns=[field.name]):
                (name,) = batch.schema.names
                for value in batch.column(0):
                    number += 1
                    yield f"row {number} of {path}", {name: value.as_py()}


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of its packing; None: it is not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] in ([".gz"], [".zst"])
    kind = "".join(suffixes[:-1][-1:] if packed else suffixes[-1:])
    return kind if kind in _SUFFIXES and not (packed and kind == ".parquet") else None


def read_file(path: Path, field: TextField) -> Iterator[str]:
    """The documents of a file.

    Raises:
        ValueError: it cannot be read, or is not what its name says; the field is lacking or holds no text. The file is named.
        ImportError: a package is needed; it names the extra.
    """
    kind = kind_of(path)
    if kind in _WHOLE:
        yield from _whole(path)
        return
    rows = _parquet(path, field) if kind == ".parquet" else _json(path) if kind == ".json" else _lines(path)
    for where, row in rows:
        yield field.text(row, where)
