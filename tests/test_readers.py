"""Every kind of file, whole, packed and broken; folders; rows by field; chat messages."""

import gzip
import io
import json
import os
import socket
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from dotmoe_kernels.conversion import load_tokens, readers
from dotmoe_kernels.conversion.data import as_tokens, read_documents

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
EOS = 0
CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def tokenizer():
    vocabulary = {"<eos>": EOS, "<unk>": 1} | {chr(97 + i): 2 + i for i in range(26)} | {"user": 28, "assistant": 29}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")


def packed(content, suffix):
    return {"": lambda c: c, ".gz": gzip.compress, ".zst": pack_zstd}[suffix](content)


def pack_zstd(content):
    return bytes(pa.compress(content, "zstd", asbytes=True))


def documents(*sources, **options):
    return list(read_documents(sources, **options))


def refused(message, *sources, **options):
    with pytest.raises(ValueError, match=message) as caught:
        documents(*sources, **options)
    assert "\n" not in str(caught.value)


# --- kinds ------------------------------------------------------------------------------------------------------------------


ROWS = [{"text": "a b"}, {"text": "c"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
KINDS = {
    "x.txt": (b"a b", ["a b"]),
    "x.md": (b"a b", ["a b"]),
    "x.py": (b"a b", ["a b"]),
    "x.jsonl": (LINES, ["a b", "c"]),
    "x.json": (json.dumps(ROWS).encode(), ["a b", "c"]),
    "lines.json": (LINES, ["a b", "c"]),
    "indented.json": (json.dumps(ROWS, indent=1).encode(), ["a b", "c"]),
    "one.json": (b'{"text": "a b"}', ["a b"]),
    "indented one.json": (b'\n{\n "text": "a b"\n}\n', ["a b"]),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_every_kind_plain_and_packed(tmp_path, name, suffix, upper, bom):
    """A byte order mark is no text, and no part of JSON."""
    content, expected = KINDS[name]
    path = tmp_path / (name + suffix)
    path = path.with_name(path.name.upper()) if upper else path
    path.write_bytes(packed(bom + content, suffix))
    assert documents(path) == expected
    assert documents(tmp_path) == expected


def test_a_byte_order_mark_is_no_token(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a b", encoding="utf-8-sig")
    (tmp_path / "x.jsonl").write_text('{"text": "c"}\n', encoding="utf-8-sig")
    assert load_tokens(tmp_path / "x.txt", tokenizer, sequence_length=3).tolist() == [[2, 3, EOS]]
    assert load_tokens(tmp_path / "x.jsonl", tokenizer, sequence_length=2).tolist() == [[4, EOS]]
    (tmp_path / "x.txt").write_text("", encoding="utf-8-sig")
    refused("x.txt, which is empty", tmp_path / "x.txt")


def test_parquet_by_upper_case_and_of_no_packing(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "X.PARQUET")
    assert documents(tmp_path / "X.PARQUET") == ["a", "", "b"]
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress((tmp_path / "X.PARQUET").read_bytes()))
    refused(r"x.parquet.gz; allowed: files ending in .txt, .*, and .gz or .zst of all but parquet", tmp_path / "x.parquet.gz")


@pytest.mark.parametrize("name", ["x.gz", "x.zst", "x.txt.bz2", "x", ".txt", "x.tar.gz"])
def test_a_kind_that_is_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"a b")
    refused(r"; allowed: files ending in \.txt, \.md, \.py, \.jsonl, \.parquet, \.json, and \.gz", tmp_path / name)


@pytest.mark.parametrize("codec", ["compression.zstd", "backports.zstd", "pyarrow", "zstandard"])
def test_every_codec_of_zstd(tmp_path, monkeypatch, codec):
    """Frames one after the other are one file, and one that was cut off is no shorter one."""
    content = b"".join(b'{"text": "%d"}\n' % n for n in range(50_000))
    frame = pack_zstd(content)
    others = {"compression.zstd", "backports.zstd", "pyarrow", "zstandard"} - {codec}
    pytest.importorskip(codec, exc_type=ImportError)
    for other in others:
        monkeypatch.setitem(sys.modules, other, None)
    (tmp_path / "x.jsonl.zst").write_bytes(frame + frame)
    assert documents(tmp_path / "x.jsonl.zst") == [str(n) for n in range(50_000)] * 2
    for broken in (frame[:-9], frame + frame[:-9], frame[: len(frame) // 2], b"no frame at all", frame + b"no frame"):
        (tmp_path / "x.jsonl.zst").write_bytes(broken)
        refused(r"sources is .*x.jsonl.zst, which cannot be read \(.+\)", tmp_path / "x.jsonl.zst")


def test_no_codec_of_zstd(tmp_path, monkeypatch):
    (tmp_path / "x.txt.zst").write_bytes(b"")
    for name in ("compression.zstd", "backports.zstd", "pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"reading .*x.txt.zst needs Python 3.14, pyarrow or zstandard: pip install '.*\[data\]'"):
        documents(tmp_path / "x.txt.zst")


class Frames:
    """zstandard's interface of one frame, whose packing is a length and the bytes."""

    class ZstdError(Exception):
        pass

    class ZstdDecompressor:
        def decompressobj(self):
            return Frames.One()

    class One:
        def __init__(self):
            self.eof, self.unused_data, self.held = False, b"", b""

        def decompress(self, chunk):
            self.held += chunk
            size = int.from_bytes(self.held[:4], "big")
            if len(self.held) < 4 + size:
                return b""
            self.eof, self.unused_data = True, self.held[4 + size :]
            return self.held[4 : 4 + size]


@pytest.mark.parametrize("sizes", [[5], [3, 4], [0, 5, 0, 2], [700_000, 1], []])
def test_frames_are_read_to_their_ends(sizes):
    parts = [bytes([65 + n]) * size for n, size in enumerate(sizes)]
    content = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert io.BufferedReader(readers._Chunks(readers._frames(io.BytesIO(content), Frames))).read() == b"".join(parts)
    if sizes:
        with pytest.raises(EOFError, match="it was cut off"):
            list(readers._frames(io.BytesIO(content[:-1]), Frames))


# --- what is broken ---------------------------------------------------------------------------------------------------------


DEEP = b"[" * 200_000
BROKEN = {
    "x.jsonl": {
        "syntax": (b'{"text": "a"}\n{\n', r"no JSON in line 2 \("),
        "deep": (b'{"text": "a"}\n{"text": ' + DEEP, r"no JSON in line 2 \(.*recursion"),
        "surrogate": (b'{"text": "a"}\n{"text": "b \\ud800 c"}\n', r"line 2 of .*, with half of a surrogate pair, .*ud800"),
        "no object": (b'{"text": "a"}\n[1]\n', "is line 2 of .*x.jsonl, a list; allowed: an object with a field 'text'"),
        "null": (b"null\n", "is line 1 of .*x.jsonl, a NoneType; allowed: an object"),
        "latin-1": (b'{"text": "\xe9"}\n', "no JSON in line 1"),
        "utf-16": ('{"text": "a"}\n'.encode("utf-16"), "no JSON in line 1"),
        "a long number": (b'{"text": ' + b"1" * 5000 + b"}", r"no JSON in line 1 \(Exceeds the limit|an? int in line 1"),
    },
    "x.json": {
        "cut off": (b'[{"text": "a"}, {"te', r"no JSON \("),
        "one cut off": (b'{"text": "a', r"no JSON \("),
        "deep": (DEEP, r"no JSON \(.*recursion"),
        "one deep": (b'{"text": ' + DEEP, r"no JSON \(.*recursion"),
        "surrogate": (b'[{"text": "a"}, {"text": "\\udfff"}]', r"row 2 of .*, with half of a surrogate pair"),
        "no rows": (b'["a", "b"]', "row 1 of .*x.json, a str; allowed: an object"),
        "a number": (b"3", "x.json, a int; allowed: a list of rows, or one object a line"),
        "no field": (b'{"rows": []}', r"text_field is 'text', which .*x.json lacks; allowed: one of \['rows'\]"),
        "a broken line": (b'{"text": "a"}\n{"te\n', r"no JSON in line 2"),
        "utf-16": ('[{"text": "a"}]'.encode("utf-16"), r"no JSON \("),
        "utf-16 without its mark": ('{"text": "a"}'.encode("utf-16-le"), r"no JSON \("),
        "empty list": (b"[]", "x.json, which is empty"),
        "empty": (b"", "x.json, which is empty"),
        "blank": (b"\n \n", "x.json, which is empty"),
    },
    "x.txt": {
        "utf-16": ("漢字".encode("utf-16"), "which is in UTF-16; allowed: files with text in UTF-8"),
        "zero": (b"a\0", "which holds zero bytes"),
    },
    "x.txt.gz": {
        "cut off": (gzip.compress(os.urandom(999))[:-20], "cannot be read"),
        "no gzip": (b"a b", "cannot be read"),
        "changed": (gzip.compress(b"a" * 99)[:-8] + b"12345678", "cannot be read"),
        "bits": (gzip.compress(b"a" * 9)[:10] + b"\xff" * 30, "cannot be read"),
        "empty": (b"", "which is empty"),
        "zero": (gzip.compress(b"a\0"), "zero bytes"),
    },
    "x.jsonl.gz": {
        "cut off": (gzip.compress(LINES)[:-5], "cannot be read"),
        "syntax": (gzip.compress(b"{"), "no JSON in line 1"),
    },
    "x.json.gz": {"cut off": (gzip.compress(LINES)[:-5], "cannot be read"), "syntax": (gzip.compress(b"["), r"no JSON \(")},
    "x.json.zst": {"cut off": (pack_zstd(LINES)[:-5], "cannot be read"), "no zstd": (LINES, "cannot be read")},
    "x.txt.zst": {"cut off": (pack_zstd(os.urandom(999))[:-5], "cannot be read"), "no zstd": (b"a", "cannot be read")},
    "x.parquet": {"no parquet": (b"PAR1 and no more", "cannot be read"), "empty": (b"", "cannot be read")},
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BROKEN.items() for case in cases])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_broken_file_is_named(tmp_path, name, case, where):
    content, message = BROKEN[name][case]
    (tmp_path / name).write_bytes(content)
    if where == "folder":
        if "empty" in message or case == "no field":
            return  # passed over, or a folder without text
        refused(name, tmp_path)
    else:
        refused(rf"(?s)(?=.*{name}).*{message}", tmp_path / name)


def test_a_page_of_a_parquet_file_that_is_broken(tmp_path):
    """What pyarrow says of it names no file."""
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": [f"word {n} of many" for n in range(9999)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    whole = len(documents(path))
    assert whole == 9999
    content[len(content) // 3 : len(content) // 3 + 4000] = bytes(4000)
    path.write_bytes(content)
    refused(r"sources is .*x.parquet, which cannot be read \(", path)
    path.write_bytes(content[: len(content) // 2])
    refused(r"sources is .*x.parquet, which cannot be read \(", path)
    array = pa.array([b"a", b"\xff\xfe"]).view(pa.string())
    parquet.write_table(pa.table({"text": array}), path)
    refused(r"sources is .*x.parquet, which cannot be read \(.*utf-8", path)


@pytest.fixture
def public():
    """A folder that everybody may enter, as nobody may those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextmanager
def as_nobody():
    """The superuser reads everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.parquet", "x.txt.gz", "x.txt.zst"])
def test_a_file_that_may_not_be_read(public, name):
    path = public / name
    path.write_bytes(b"a")
    path.chmod(0)
    with as_nobody():
        refused(rf"sources is .*{name}, which cannot be read \(.*Permission denied", path)
        refused(rf"sources is .*{name}, which cannot be read \(.*Permission denied", public)


def test_a_folder_that_may_not_be_read(public):
    (public / "a.txt").write_text("a")
    (public / "in").mkdir()
    (public / "in" / "b.txt").write_text("b")
    (public / "in").chmod(0)
    with as_nobody():
        refused(r"sources is .*in, which cannot be read \(Permission denied\)", public)
        refused(r"sources is .*in, which cannot be read \(Permission denied\)", public / "in")
        refused(r"sources is .*b.txt', which cannot be read \(Permission denied\)", public / "in" / "b.txt")
    (public / "in").chmod(0o755)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.txt"))
        refused("s.txt, which is no regular file but a pipe or a device", tmp_path / "s.txt")
        refused("pipe.txt, which is no regular file but a pipe or a device", tmp_path / "pipe.txt")
        refused("null, which is no regular file but a pipe or a device", "/dev/null")
        refused("gone.txt, which leads to nothing", tmp_path / "gone.txt")
        refused("gone, which leads to nothing", tmp_path / "gone")
        refused(r"round.txt', which cannot be read \(Too many levels of symbolic links\)", tmp_path / "round.txt")
        refused(r"which cannot be read \(File name too long\)", tmp_path / ("a" * 300 + ".txt"))
        refused(r"which cannot be read \(File name too long\)", "a" * 300)
        refused(r"which cannot be read \(embedded null byte\)", "a\0b.txt")
        refused("~nobody-of-that-name/x.txt, which does not exist", "~nobody-of-that-name/x.txt")
        (tmp_path / "a.txt").write_text("a")
        with pytest.warns(UserWarning, match="1 files are read, 5 passed over: 1 of another kind .gone., 4 broken links, pipes or"):
            assert documents(tmp_path) == ["a"]


# --- folders ----------------------------------------------------------------------------------------------------------------


def test_what_a_folder_passes_over_is_said(tokenizer, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("z")
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    (tmp_path / "sub" / ".cache" / "y.txt").write_text("z")
    (tmp_path / "sub" / ".hidden.txt").write_text("z")
    (tmp_path / "README.md").write_text("a")
    (tmp_path / "train.json.gz").write_bytes(gzip.compress(b'[{"text": "b"}]'))
    (tmp_path / "sub" / "TEST.TXT").write_text("c")
    (tmp_path / "info.json").write_text('{"rows": 3}')
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(b"")
    (tmp_path / "sub" / "up").symlink_to("..")
    with pytest.warns(UserWarning, match="passed over") as caught:
        tokens = load_tokens(tmp_path, tokenizer, sequence_length=6)
    assert tokens.tolist() == [[2, EOS, 4, EOS, 3, EOS]]
    (message,) = [str(w.message) for w in caught]
    assert message == (
        f"{tmp_path}: 3 files are read, 10 passed over: 3 hidden (.git/, sub/.cache/, sub/.hidden.txt), "
        "5 of another kind (0.png, 1.png, 2.png, ...), 1 settings (info.json), 1 links to folders (sub/up/)"
    )


def test_a_folder_read_whole_says_nothing(tmp_path):
    """Its own name may be hidden, end as a file's does, or be that of a link."""
    folder = tmp_path / ".hidden.jsonl"
    folder.mkdir()
    (folder / "part-0.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link").symlink_to(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert documents(folder) == documents(tmp_path / "link") == ["a"]


def test_folders_that_contain_themselves(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    with pytest.warns(UserWarning, match=r"1 of another kind \(self\), 1 links to folders \(a/loop/\)"):
        assert documents(tmp_path) == ["x"]


# --- fields and messages ----------------------------------------------------------------------------------------------------


NESTED = [{"a": {"b": "x", "n": 1}, "id": 7}, {"a": {"b": None}, "id": 8}, {"a": None, "id": 9}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_field_within_a_field(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(NESTED), path)
    else:
        path.write_text("\n".join(map(json.dumps, NESTED)) if kind == "jsonl" else json.dumps(NESTED))
    assert documents(path, text_field="a.b") == ["x", "", ""]
    refused(r"text_field is 'a.c', which .* lacks; allowed: one of \['a.b', 'a.n', 'id'\]", path, text_field="a.c")
    refused(r"text_field is 'id.b', which .* lacks", path, text_field="id.b")
    refused(r"text_field is 'a', a dict in (line|row) 1 of .*; allowed: a field of text or of chat", path, text_field="a")
    refused(r"text_field is '', which", path, text_field="")
    refused(r"text_field is 'a.n', a int in (line|row) 1 of", path, text_field="a.n")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_whose_name_has_a_dot(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"a.b": ["x"], "id": [1]}), path)
    else:
        path.write_text('{"a.b": "x", "a": {"b": "y"}}')
    assert documents(path, text_field="a.b") == ["x"]


def chat_file(folder, kind, rows):
    path = folder / f"x.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_messages_go_through_the_chat_template(tokenizer, tmp_path, kind):
    path = chat_file(tmp_path, kind, [{"c": {"messages": CHAT}}, {"c": {"messages": CHAT[:1]}}, {"c": {"messages": []}}])
    tokenizer.chat_template = TEMPLATE
    out = load_tokens(path, tokenizer, sequence_length=10, text_field="c.messages")
    assert out.tolist() == [[28, 2, 3, 29, 4, EOS, 28, 2, 3, EOS]]
    tokenizer.chat_template = TEMPLATE + "<eos>"  # no second end beside the template's
    assert load_tokens(path, tokenizer, sequence_length=10, text_field="c.messages").tolist() == out.tolist()


def test_what_a_message_leaves_out_is_not_there(tokenizer, tmp_path):
    """A parquet file has the same fields in every message."""
    rows = [{"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": "b"}]}]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% if 'tool_calls' in m %} z{% endif %} {% endfor %}"
    path = chat_file(tmp_path, "parquet", rows)
    assert load_tokens(path, tokenizer, sequence_length=4, text_field="m").tolist() == [[28, 29, 27, EOS]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_that_cannot_be_joined(tokenizer, tmp_path, kind):
    path = chat_file(tmp_path, kind, [{"m": CHAT}])
    message = "text_field is 'm', chat messages in (line|row) 1 of .* without a chat template; allowed: a field of text, or a tok"
    for given in (None, tokenizer):
        refused(message, path, text_field="m", tokenizer=given)
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    refused(r"which the tokenizer's chat template refuses \(system first\)", path, text_field="m", tokenizer=tokenizer)
    tokenizer.chat_template = "{% for"
    refused(r"which the tokenizer's chat template refuses \(", path, text_field="m", tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    path = chat_file(tmp_path, kind, [{"m": [{"from": "human", "value": "a"}]}])
    refused("text_field is 'm', a list in (line|row) 1 of", path, text_field="m", tokenizer=tokenizer)
    (tmp_path / "x.jsonl").write_text('{"m": [{"role": "user", "content": "\\ud800"}]}')
    refused("line 1 of .*, with half of a surrogate pair", tmp_path / "x.jsonl", text_field="m", tokenizer=tokenizer)


@pytest.mark.parametrize("sources", [None, 3, [3], b"x.txt", [b"x.txt"], [None]])
def test_sources_that_are_no_names(tokenizer, sources):
    with pytest.raises(ValueError, match=r"sources is .*; allowed: a file, a folder or a dataset's name, or several"):
        load_tokens(sources, tokenizer, sequence_length=1)
    with pytest.raises(ValueError, match="text_field is None; allowed: a string"):
        load_tokens("x.txt", tokenizer, sequence_length=1, text_field=None)


# --- datasets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_a_dataset_that_fails_on_the_way_is_named(monkeypatch, late):
    class Rows(list):
        def shuffle(self, seed, buffer_size):
            return self

        def __iter__(self):
            yield {"text": "a"}
            raise RuntimeError("a page is\nmissing")

    def load_dataset(*args, **kwargs):
        if not late:
            raise RuntimeError("a page is\nmissing")
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].load_dataset = load_dataset
    refused(r"sources is o/n, a dataset that cannot be read \(a page is missing\); allowed: a file", "o/n")


# --- token ids --------------------------------------------------------------------------------------------------------------


IDS = [[1, 2, 3], [4, 5, 6]]
TOKENS = r"; allowed: token ids: a tensor \[N, S\] int64, or an iterable of \[S\], such as the input_ids of each row"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"input_ids": torch.tensor(IDS)}, "data is a dict" + TOKENS),
        (BatchEncoding({"input_ids": torch.tensor(IDS)}), "data is a BatchEncoding" + TOKENS),
        ([{"input_ids": IDS[0]}], "data is of rows such as a dict" + TOKENS),
        ([BatchEncoding({"input_ids": IDS[0]})], "data is of rows such as a BatchEncoding" + TOKENS),
        ("corpus.txt", "data is a str" + TOKENS),
        (["corpus.txt"], "data is of rows such as a str" + TOKENS),
        (b"corpus.txt", "data is a bytes" + TOKENS),
        (3, "data is a int" + TOKENS),
        ([1, 2, 3], r"data is of rows of shape \[\]" + TOKENS),
        ([IDS], r"data is of rows of shape \[2, 3\]" + TOKENS),
        ([torch.tensor([[1, 2]]), torch.tensor([1, 2])], r"data is of rows of shape \[1, 2\]" + TOKENS),
        ([[[1], [2, 3]]], "data is of rows such as a list" + TOKENS),
        ([None], "data is of rows such as a NoneType" + TOKENS),
        ([[2**70, 1]], "data is of rows such as a list" + TOKENS),
        ([[1, 2], [1, 2, 3]], "data is of sequences of 2 to 3 tokens; allowed: sequences of one length"),
        ([[1.5, 2]], "data is of dtype torch.float32; allowed: int64 or int32"),
        ([], "data is empty"),
    ],
)
def test_what_is_no_token_ids(data, message):
    with pytest.raises(ValueError, match=message):
        as_tokens(data)


@pytest.mark.parametrize("data", [torch.tensor(IDS), np.array(IDS), IDS, iter(IDS), map(torch.tensor, IDS), np.array(IDS, "int32")])
def test_token_ids(data):
    tokens = as_tokens(data)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == IDS
