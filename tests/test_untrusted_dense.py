"""Dense models and tokenizers from anywhere, fuzzed: read for a conversion, converted, measured, exported; an error in one line
every time, and never a crash, a hang or a part of a folder."""

import json
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import word_tokenizer
from test_untrusted import INDEX, WHOLE, changed
from tiny import dense_model, sparse_model

import dotmoe_kernels as dk
from dotmoe_kernels.cli import main
from dotmoe_kernels.conversion import convert_folder, load_tokens
from dotmoe_kernels.conversion.sources import read_dense, read_tokenizer

SIZES = ("--num-experts", "8", "--top-k", "2")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    dense = dense_model(num_hidden_layers=1)
    dense.save_pretrained(root / "dense")
    dense.save_pretrained(root / "shards", max_shard_size="15KB")
    dk.save(sparse_model(num_hidden_layers=1), root / "moe", tokenizer=word_tokenizer())
    for name in ("dense", "shards"):
        word_tokenizer().save_pretrained(root / name)
    (root / "a.txt").write_text("a b b a " * 200)
    return root


@pytest.fixture(scope="module")
def scratch(pristine, tmp_path_factory):
    root = tmp_path_factory.mktemp("scratch")
    for kind in ("dense", "shards", "moe"):
        shutil.copytree(pristine / kind, root / kind)
    return root


def whole_or_absent(out, worked):
    """A folder that was written, and nothing else beside it, or nothing at all."""
    assert out.exists() is worked
    assert not [path for path in out.parent.iterdir() if path.name.startswith((".", out.name)) and path != out]
    shutil.rmtree(out, ignore_errors=True)


def attempt(act, *arguments, **options):
    """Whether it worked; any other error than a ValueError is a fault."""
    try:
        act(*arguments, **options)
    except ValueError:
        return False
    return True


def command(*arguments):
    """Whether `dotmoe` worked; otherwise it has said why in one line."""
    errors = StringIO()
    with redirect_stderr(errors), redirect_stdout(StringIO()):
        status = main([str(argument) for argument in arguments])
    lines = [line for line in errors.getvalue().splitlines() if ": warning: " not in line]
    assert status in (0, 2)
    assert [line.startswith(f"dotmoe {arguments[0]}: error: ") for line in lines] == [True] * (status == 2), lines
    return status == 0


def outcome_dense(folder, out, text):
    """Everything that reads a dense model."""
    attempt(read_dense, str(folder))
    config = dk.DotMoeConfig(num_experts=8, top_k=2)
    whole_or_absent(out, attempt(convert_folder, folder, out, config, method="random"))
    start = ("convert", folder, *SIZES, "--output", out, "--steps", "0")
    whole_or_absent(out, command(*start, "--method", "random"))
    with_text = ("--data", text, "--sequence-length", "16", "--max-tokens", "64", "--no-progress", "--device", "cpu")
    whole_or_absent(out, command(*start, *with_text))
    for arguments in (("convert", folder, *SIZES, "--dry-run"), ("plan", folder), ("info", folder)):
        command(*arguments)


@pytest.fixture
def shards(pristine, tmp_path):
    return shutil.copytree(pristine / "shards", tmp_path / "m")


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def convert(folder):
    convert_folder(folder, folder.with_name("out"), dk.DotMoeConfig(num_experts=8, top_k=2), method="random")


READERS = {"read": lambda folder: read_dense(str(folder)), "convert": convert}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_sizes_are_those_of_the_files(read, shards):
    """Refused by the headers: a tensor of the size that the config says would take terabytes."""
    set_config(shards, vocab_size=2**31)
    with pytest.raises(ValueError, match=r"of .*m is of shape \[64, 32\]; allowed: shape \[2147483648, 32\]"):
        read(shards)
    set_config(shards, vocab_size=64, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"without the tensor model\.layers\.1\."):
        read(shards)
    assert [path.name for path in shards.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_nothing_outside_is_read_and_nobody_is_asked(read, shards, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    index = json.loads((shards / INDEX).read_text())
    shutil.copy(shards / next(iter(index["weight_map"].values())), shards.parent / "x.safetensors")
    (shards / INDEX).write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], "../x.safetensors")}))
    with pytest.raises(ValueError, match=r"weight_map of .* is with the file '../x.safetensors'; allowed: names of"):
        read(shards)
    (shards / INDEX).write_text(json.dumps(index))
    set_config(shards, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})
    (shards / "theirs.py").write_text("raise SystemExit('executed')\n")
    with pytest.raises(ValueError, match=r"trust_remote_code"):
        read(shards)


@pytest.mark.parametrize("arguments", [("plan",), ("convert", *SIZES, "--dry-run")], ids=["plan", "dry-run"])
def test_a_config_alone_has_so_many_layers(arguments, pristine, tmp_path, capsys):
    """Layer by layer a model without storage is built, which of a billion ends for want of memory."""
    shutil.copy(pristine / "dense" / "config.json", tmp_path)
    set_config(tmp_path, num_hidden_layers=10**9)
    assert main([arguments[0], str(tmp_path), *arguments[1:]]) == 2
    assert "num_hidden_layers of " in (error := capsys.readouterr().err)
    assert error.endswith(" is 1000000000; allowed: at most 10000\n")


def tampered_header(data, whole):
    """The header as JSON that was changed, with the right length; or bytes of the file's beginning that were changed."""
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(changed(json.loads(whole[8 : 8 + length])))).encode()
        return struct.pack("<Q", len(header)) + header + whole[8 + length :]
    tampered = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, length + 8), min_size=1, max_size=4)):
        tampered[place] = data.draw(st.integers(0, 255))
    return bytes(tampered)


@settings(max_examples=30)
@given(data=st.data())
def test_fuzzed_dense_config(data, pristine, scratch):
    values = json.loads((pristine / "dense" / "config.json").read_text())
    (scratch / "dense" / "config.json").write_text(json.dumps(data.draw(changed(values))))
    try:
        outcome_dense(scratch / "dense", scratch / "out", pristine / "a.txt")
    finally:
        shutil.copy(pristine / "dense" / "config.json", scratch / "dense")


@settings(max_examples=10)
@given(data=st.data())
def test_fuzzed_dense_index(data, pristine, scratch):
    index = json.loads((pristine / "shards" / INDEX).read_text())
    (scratch / "shards" / INDEX).write_text(json.dumps(data.draw(changed(index))))
    try:
        outcome_dense(scratch / "shards", scratch / "out", pristine / "a.txt")
    finally:
        shutil.copy(pristine / "shards" / INDEX, scratch / "shards")


@settings(max_examples=20)
@given(data=st.data())
def test_fuzzed_dense_header(data, pristine, scratch):
    (scratch / "dense" / WHOLE).write_bytes(tampered_header(data, (pristine / "dense" / WHOLE).read_bytes()))
    try:
        outcome_dense(scratch / "dense", scratch / "out", pristine / "a.txt")
    finally:
        shutil.copy(pristine / "dense" / WHOLE, scratch / "dense")


@settings(max_examples=30)
@given(data=st.data())
def test_fuzzed_config_of_a_dense_export(data, pristine, scratch):
    values = json.loads((pristine / "moe" / "config.json").read_text())
    (scratch / "moe" / "config.json").write_text(json.dumps(data.draw(changed(values))))
    try:
        whole_or_absent(scratch / "out", attempt(dk.export, scratch / "moe", scratch / "out"))
        whole_or_absent(scratch / "out", command("export", scratch / "moe", "--architecture", "dense", "--output", scratch / "out"))
    finally:
        shutil.copy(pristine / "moe" / "config.json", scratch / "moe")


@settings(max_examples=20)
@given(data=st.data())
def test_fuzzed_header_of_a_dense_export(data, pristine, scratch):
    (scratch / "moe" / WHOLE).write_bytes(tampered_header(data, (pristine / "moe" / WHOLE).read_bytes()))
    try:
        whole_or_absent(scratch / "out", attempt(dk.export, scratch / "moe", scratch / "out"))
    finally:
        shutil.copy(pristine / "moe" / WHOLE, scratch / "moe")


@settings(max_examples=40)
@given(data=st.data())
def test_fuzzed_tokenizer(data, pristine, scratch):
    """Its files as JSON that was changed, or cut off; read, used on text, and saved along."""
    name = data.draw(st.sampled_from(TOKENIZER))
    text = (pristine / "dense" / name).read_text()
    cut = data.draw(st.integers(0, 9)) == 0
    tampered = text[: data.draw(st.integers(0, len(text)))] if cut else json.dumps(data.draw(changed(json.loads(text))))
    out = scratch / "out"
    for kind in ("dense", "moe"):
        (scratch / kind / name).write_text(tampered)
    try:
        attempt(lambda: load_tokens([pristine / "a.txt"], read_tokenizer(str(scratch / "dense")), sequence_length=16))
        whole_or_absent(out, command("convert", scratch / "dense", *SIZES, "--output", out, "--steps", "0", "--method", "random"))
        text = ("--data", pristine / "a.txt", "--sequence-length", "16", "--max-tokens", "64", "--device", "cpu")
        whole_or_absent(out, command("export", scratch / "moe", *text, "--architecture", "mixtral", "--output", out))
        command("eval", scratch / "dense", *text)
        command("generate", scratch / "moe", "--prompt", "a b", "--max-new-tokens", "2")
    finally:
        for kind in ("dense", "moe"):
            shutil.copy(pristine / kind / name, scratch / kind)
