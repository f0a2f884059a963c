"""The token ids of a corpus in a file: written once, document after document, and mapped into memory, of which they take none.

    DIR/KEY/tokens.bin   int32, 4 bytes a token
    DIR/KEY/index.json   what they are of, and the parts of the file: documents, tokens and CRC-32 of each

KEY is a hash of what they are of. A part is on disk before the index names it, and nothing that the index names ever changes: a
process that is killed leaves whole parts, after which the next one goes on, and others may read meanwhile. One file, not one a
part: a mapping is one tensor, which all that takes token ids can index.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import refuse
from .._files import write_file

_PART = 1 << 22  # tokens of a part at the least: 16 MB are held while it is written
_FORMAT = 1


class _Part(NamedTuple):
    documents: int
    tokens: int
    crc32: int


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of all that makes token ids of a text, chat messages included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        inside = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # of the last call, which every call sets
            inside.pop(name, None)
    said = [type(tokenizer).__name__, inside, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


class TokenCache:
    """The tokens of one corpus.

    Args:
        folder: of the caches of however many corpora.
        source: what the tokens are of, as JSON; another one is another cache.
    """

    def __init__(self, folder: Path, source: dict[str, Any]) -> None:
        self.source = json.loads(json.dumps({"format": _FORMAT, "byteorder": sys.byteorder, **source}))
        key = hashlib.sha256(json.dumps(self.source, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / key
        self.path, self.index = self.folder / "tokens.bin", self.folder / "index.json"

    def tokens(
        self,
        documents: Callable[[], Iterable[str]],
        encode: Callable[[str], list[int]],
        wanted: int | None = None,
        *,
        progress: bool = False,
    ) -> Tensor:
        """[T] int32 on disk: the first ``wanted`` tokens, or all, that ``encode`` makes of ``documents``.

        One process writes what is not there yet, others wait for it; all of them check what they read.
        """
        found, _ = self._read(wanted)
        if found is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                found, parts = self._read(wanted)
                if found is None:
                    self._write(parts, documents, encode, wanted, progress)
                    found, _ = self._read(wanted)
        if found is None:
            raise ValueError(f"{self.path} is not what was written to it a moment ago; allowed: a disk that keeps what it is given")
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.folder / "lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                warnings.warn(f"another process writes {self.path}: waiting for it", stacklevel=4)
                lock.acquire()
        except NotImplementedError as error:
            refuse("cache", f"{self.folder}, which cannot be locked ({error})", "a folder on a file system with locks")
        try:
            yield
        finally:
            lock.release()

    def _entries(self) -> tuple[list[_Part], bool]:
        """What the index names, and whether it is all of the corpus."""
        try:
            values = json.loads(self.index.read_text(encoding="utf-8"))
            if values["source"] == self.source:
                return [_Part(*map(int, part)) for part in values["parts"]], bool(values["complete"])
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            pass
        return [], False

    def _read(self, wanted: int | None) -> tuple[Tensor | None, list[_Part]]:
        """The tokens, or None if some are to be written; the parts that are whole."""
        parts, complete = self._entries()
        whole = self._whole(parts)
        total = sum(part.tokens for part in whole)
        enough = total >= wanted if wanted is not None and not complete else complete
        if not enough or len(whole) < len(parts):
            return None, whole
        tokens = torch.empty(0, dtype=torch.int32) if total == 0 else self._mapped(total)
        return tokens[:wanted], whole

    def _mapped(self, count: int) -> Tensor:
        """Copied on a write, of which there is none: so the file need not be writable, and torch has nothing to warn of."""
        return torch.from_file(str(self.path), shared=False, size=count, dtype=torch.int32)

    def _whole(self, parts: list[_Part]) -> list[_Part]:
        """The parts before the first whose bytes are not those that were written."""
        size = self.path.stat().st_size // 4 if self.path.exists() else 0
        first = 0
        for number, part in enumerate(parts):
            last = first + part.tokens
            fits = last <= size
            if fits and part.tokens:
                fits = zlib.crc32(self._mapped(last)[first:].numpy().data) == part.crc32
            if not fits:
                return parts[:number]
            first = last
        return parts

    def _write(
        self,
        parts: list[_Part],
        documents: Callable[[], Iterable[str]],
        encode: Callable[[str], list[int]],
        wanted: int | None,
        progress: bool,
    ) -> None:
        """Goes on after the parts that are whole."""
        if self.index.exists() and len(parts) < max(1, len(self._entries()[0])):
            warnings.warn(f"{self.folder} is damaged after {len(parts)} parts: the rest is tokenised anew", stacklevel=4)
        done, total = sum(part.documents for part in parts), sum(part.tokens for part in parts)
        ids, count = array("i"), 0
        bar = tqdm(desc="tokenise", total=wanted, initial=total, unit="tok", unit_scale=True, delay=2, disable=not progress)
        self.path.touch()
        with bar, self.path.open("r+b") as file:
            file.seek(4 * total)  # what follows is written over and not cut off: another process may have it mapped
            for text in islice(documents(), done, None):
                found = encode(text)
                ids.extend(found)
                count += 1
                bar.update(len(found))
                enough = wanted is not None and total + len(ids) >= wanted
                if enough or len(ids) >= _PART:
                    self._append(file, parts, _Part(count, len(ids), zlib.crc32(ids)), ids, complete=False)
                    total += len(ids)
                    ids, count = array("i"), 0
                if enough:
                    return
            self._append(file, parts, _Part(count, len(ids), zlib.crc32(ids)), ids, complete=True)

    def _append(self, file: BinaryIO, parts: list[_Part], part: _Part, ids: array[int], *, complete: bool) -> None:
        file.write(memoryview(ids))
        if complete:
            file.truncate()
        file.flush()
        os.fsync(file.fileno())
        parts.append(part)
        text = json.dumps({"source": self.source, "complete": complete, "parts": parts}, indent=1)
        mode = self.path.stat().st_mode & 0o777  # a temporary file is its owner's alone, and others may read this one

        def write(index: BinaryIO) -> None:
            index.write(text.encode())
            os.fchmod(index.fileno(), mode)

        write_file(self.index, write)
