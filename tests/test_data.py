"""Text in, packed sequences of token ids out."""

import json
import sys
import tracemalloc

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dotmoe_kernels.conversion import load_tokens

EOS = 0


def make_tokenizer(eos=True):
    vocabulary = {"<eos>": EOS, "<unk>": 1} | {chr(97 + i): 2 + i for i in range(26)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>" if eos else None)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_whole_files_are_joined_by_eos(tokenizer, tmp_path, suffix):
    (tmp_path / f"1{suffix}").write_text("a b c")
    (tmp_path / f"2{suffix}").write_text("d\ne")
    files = [tmp_path / f"1{suffix}", str(tmp_path / f"2{suffix}")]
    out = load_tokens(files, tokenizer, sequence_length=3)
    assert out.dtype == torch.int64
    assert out.tolist() == [[2, 3, 4], [EOS, 5, 6]]  # the last end-of-text is the dropped remainder


def test_without_eos(tmp_path):
    (tmp_path / "1.txt").write_text("a b")
    (tmp_path / "2.txt").write_text("c d")
    files = [tmp_path / "1.txt", tmp_path / "2.txt"]
    assert load_tokens(files, make_tokenizer(eos=False), sequence_length=4).tolist() == [[2, 3, 4, 5]]


def test_jsonl_rows_are_documents(tokenizer, tmp_path):
    rows = [{"body": "a b"}, {"body": "c"}, {"body": None}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    out = load_tokens(tmp_path / "x.jsonl", tokenizer, sequence_length=6, text_field="body")
    assert out.tolist() == [[2, 3, EOS, 4, EOS, EOS]]


def test_parquet_rows_are_documents(tokenizer, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"id": [1, 2], "text": ["a b", "c"]}), tmp_path / "x.parquet")
    assert load_tokens(tmp_path / "x.parquet", tokenizer, sequence_length=5).tolist() == [[2, 3, EOS, 4, EOS]]
    with pytest.raises(ValueError, match=r"text_field is 'body', which .*x.parquet lacks; allowed: one of \['id', 'text'\]"):
        load_tokens(tmp_path / "x.parquet", tokenizer, sequence_length=2, text_field="body")


def test_folder_is_read_in_order_and_repeatably(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.txt").write_text("c")
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    first = load_tokens(tmp_path, tokenizer, sequence_length=2)
    assert first.tolist() == [[2, EOS], [3, EOS], [4, EOS]]
    assert torch.equal(first, load_tokens(tmp_path, tokenizer, sequence_length=2))


def test_empty_files_of_a_folder_are_passed_over(tokenizer, tmp_path):
    """As every package of Python sources has them."""
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "b.txt").write_text("b")
    assert load_tokens(tmp_path, tokenizer, sequence_length=2).tolist() == [[3, EOS]]
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"sources is .*, a folder without text; allowed: a folder with \.txt"):
        load_tokens(tmp_path, tokenizer, sequence_length=2)


def test_max_tokens(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e f g h")
    assert load_tokens(tmp_path / "a.txt", tokenizer, sequence_length=2, max_tokens=5).tolist() == [[2, 3], [4, 5]]
    with pytest.raises(ValueError, match="max_tokens is 1; allowed: at least one sequence, 2"):
        load_tokens(tmp_path / "a.txt", tokenizer, sequence_length=2, max_tokens=1)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_empty_file(tokenizer, tmp_path, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(ValueError, match=rf"sources is .*{name}, which is empty; allowed: files with text"):
        load_tokens(tmp_path / name, tokenizer, sequence_length=2)


def test_the_ids_are_not_copied(tmp_path):
    """A list of them on the way to a tensor takes seven times their memory."""
    (tmp_path / "a.txt").write_text("a")
    ids = list(range(300_500))

    class Counting:
        eos_token_id = None

        def __call__(self, *args, **kwargs):
            return {"input_ids": ids}

    tracemalloc.start()
    try:
        tokens = load_tokens(tmp_path / "a.txt", Counting(), sequence_length=1000)
        assert tracemalloc.get_traced_memory()[1] < 2 * 8 * len(ids)
    finally:
        tracemalloc.stop()
    assert tokens.shape == (300, 1000)
    assert tokens.flatten().tolist() == ids[:300_000]


def test_too_few_tokens(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a b")
    with pytest.raises(ValueError, match=r"sources is .*x.txt, 3 tokens; allowed: at least one sequence of 4 tokens"):
        load_tokens(tmp_path / "x.txt", tokenizer, sequence_length=4)


def test_no_such_field(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"content": "a"}\n')
    with pytest.raises(ValueError, match=r"text_field is 'text', which line 1 of .*x.jsonl lacks; allowed: one of \['content'\]"):
        load_tokens(tmp_path / "x.jsonl", tokenizer, sequence_length=1)


@pytest.mark.parametrize("value", [["a b"], {"a": "b"}, 3], ids=["list", "dict", "int"])
def test_a_field_that_is_no_text(tokenizer, tmp_path, value):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": value}) + "\n")
    kind = type(value).__name__
    with pytest.raises(ValueError, match=rf"text_field is 'text', a {kind} in line 2 of .*x.jsonl; allowed: a field of text"):
        load_tokens(tmp_path / "x.jsonl", tokenizer, sequence_length=1)
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": [value]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"text_field is 'text', a {kind} in .*x.parquet; allowed: a field of text"):
        load_tokens(tmp_path / "x.parquet", tokenizer, sequence_length=1)


def test_broken_line(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(ValueError, match=r"sources is .*x.jsonl, which is no JSON in line 2 \("):
        load_tokens(tmp_path / "x.jsonl", tokenizer, sequence_length=1)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
@pytest.mark.parametrize("content", [bytes(range(256)), "a b".encode("utf-16")], ids=["binary", "utf-16"])
def test_bytes_that_are_no_text(tokenizer, tmp_path, name, content):
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"sources is .*{name}, which (holds|is|cannot)"):
        load_tokens(tmp_path / name, tokenizer, sequence_length=1)


def test_a_stray_byte_is_no_binary_file(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a b \xe9")
    assert load_tokens(tmp_path / "x.txt", tokenizer, sequence_length=2).tolist() == [[2, 3], [1, EOS]]


def test_a_dataset_that_cannot_be_loaded_is_named(tokenizer, monkeypatch):
    """What datasets says need not name it."""

    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("no data file")

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].load_dataset = load_dataset
    with pytest.raises(ValueError, match=r"sources is o/n, a dataset that cannot be read \(no data file\); allowed: a file"):
        load_tokens("o/n", tokenizer, sequence_length=1)
    with pytest.raises(ValueError, match=r"sources is o/n:a:b:c; allowed: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT"):
        load_tokens("o/n:a:b:c", tokenizer, sequence_length=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.txt", r"nowhere.txt, which does not exist; allowed: a file, a folder or a dataset's name"),
        ("nowhere", r"nowhere, which does not exist; allowed: a file, a folder or a dataset's name"),
        ("x.pdf", r"x.pdf; allowed: files ending in .txt, .md, .py, .jsonl, .parquet"),
        ("empty", r"empty, a folder without text"),
    ],
)
def test_bad_sources(tokenizer, tmp_path, name, message):
    (tmp_path / "x.pdf").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_tokens(tmp_path / name, tokenizer, sequence_length=1)


def test_no_source(tokenizer):
    with pytest.raises(ValueError, match=r"sources is \[\]; allowed: at least one file"):
        load_tokens([], tokenizer, sequence_length=1)


def test_a_source_without_a_name(tokenizer):
    """It is not the current folder."""
    with pytest.raises(ValueError, match=r"sources is ''; allowed: a file, a folder or a dataset's name"):
        load_tokens("", tokenizer, sequence_length=1)


def test_bad_sequence_length(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="sequence_length is 0; allowed: an integer >= 1"):
        load_tokens(tmp_path, tokenizer, sequence_length=0)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "x.parquet"), ("datasets", "some/dataset")])
def test_missing_package_names_the_extra(tokenizer, tmp_path, monkeypatch, package, source):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"reading {source} needs {package}: pip install 'dotmoe_kernels\[data\]'"):
        load_tokens(source, tokenizer, sequence_length=1)


def test_dataset_stream(tokenizer, monkeypatch):
    class Rows(list):
        def shuffle(self, seed, buffer_size):
            assert (seed, buffer_size) == (7, 10_000)
            return self

    calls = []

    def load_dataset(path, name, *, split, streaming):
        calls.append((path, name, split, streaming))
        return Rows([{"text": "a b"}, {"text": "c"}])

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].load_dataset = load_dataset
    for source in ("o/n", "o/n:test", "o/n:config:test"):
        assert load_tokens(source, tokenizer, sequence_length=5, seed=7).tolist() == [[2, 3, EOS, 4, EOS]]
    assert calls == [("o/n", None, "train", True), ("o/n", None, "test", True), ("o/n", "config", "test", True)]


def test_a_tokenizer_that_cannot_encode(tmp_path):
    """What tokenizers raises is the bare Exception."""
    (tmp_path / "1.txt").write_text("a \u00e9")
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")))
    with pytest.raises(ValueError, match=r"tokenizer is a \w+, which cannot encode the text \(.+\); allowed: one for any text"):
        load_tokens([tmp_path / "1.txt"], broken, sequence_length=1)
