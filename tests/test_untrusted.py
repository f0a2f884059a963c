"""A folder from anywhere: an error message every time, and never a crash, a hang, code that runs, or a file outside the folder."""

import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dense_model, sparse_model, tokens

import dotmoe_kernels as dk
from dotmoe_kernels.cli import main
from dotmoe_kernels.conversion.sources import read_dense, read_tokenizer
from dotmoe_kernels.models.config import _fitting_num_experts
from dotmoe_kernels.models.inspect import describe
from dotmoe_kernels.models.untrusted import building

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    model = sparse_model(num_hidden_layers=1)
    dk.save(model, root / "whole")
    dk.save(model, root / "shards", max_shard_size="15KB")
    dense_model(num_hidden_layers=1).save_pretrained(root / "dense", max_shard_size="15KB")
    return root


@pytest.fixture
def shards(pristine, tmp_path):
    return shutil.copytree(pristine / "shards", tmp_path / "m")


def point(folder, name):
    """One tensor of the index at the file ``name``."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))


# --- pickles and remote code -----------------------------------------------------------------------------------------------


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_how_to_convert_them(name, pristine, tmp_path, capsys):
    for kind, read in (("whole", dk.load), ("dense", read_dense)):
        folder = shutil.copytree(pristine / kind, tmp_path / kind)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        torch.save(Planted(tmp_path / "ran"), folder / name)
        words = (
            rf"folder is .*{kind}, whose weights are pickled \({name}\): .*; allowed: safetensors files.*save_pretrained\('NEW'\)"
        )
        with pytest.raises(ValueError, match=words):
            read(folder)
    assert main(["convert", str(folder), "--data", "x.txt", "--output", str(tmp_path / "out")]) == 2
    assert "MODEL is " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_does_not_run(pristine, tmp_path):
    """Neither is anybody asked whether it may: that would hang where nobody answers."""
    for kind, read in (("dense", read_dense), ("whole", dk.load)):
        folder = shutil.copytree(pristine / kind, tmp_path / kind)
        (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
        values = json.loads((folder / "config.json").read_text())
        code = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "theirs.C")
        (folder / "config.json").write_text(json.dumps(values | {"auto_map": code}))
        read(folder)
        describe(folder)
        (folder / "config.json").write_text(json.dumps({**values, "auto_map": code, "model_type": "theirs"}))
        for act in (read, describe):
            with pytest.raises((ValueError, OSError)):
                act(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.T", None]}}))
        with pytest.raises(ValueError, match="has no tokenizer that can be read"):
            read_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


# --- outside the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", "x.bin", "a\\b"])
def test_an_index_names_files_of_its_folder(name, shards):
    point(shards, name)
    with pytest.raises(ValueError, match=r"weight_map of .* is with the file .*; allowed: names of safetensors files in the same"):
        dk.load(shards)


def test_an_absolute_path_or_a_link_to_a_fitting_file_is_refused_too(shards, pristine, tmp_path):
    shard = sorted(shards.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"model-00001-of-.* is a link out of .*; allowed: files of the model's own folder"):
        dk.load(shards)
    shard.unlink()
    point(shards, str(tmp_path / "elsewhere.safetensors"))
    with pytest.raises(ValueError, match="weight_map of "):
        dk.load(shards)
    for name in (WHOLE, "config.json"):
        folder = shutil.copytree(pristine / "whole", tmp_path / name)
        shutil.move(folder / name, tmp_path / f"of-{name}")
        (folder / name).symlink_to(tmp_path / f"of-{name}")
        with pytest.raises(ValueError, match=f"{name} is a link out of"):
            dk.load(folder)


def test_the_hubs_cache_links_to_its_blobs(pristine, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate((pristine / "whole").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert dk.load(snapshot).config.num_experts


def test_export_copies_no_link_out_of_the_folder(pristine, tmp_path):
    folder = shutil.copytree(pristine / "whole", tmp_path / "m")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    for architecture in ("dense", "mixtral"):
        with pytest.raises(ValueError, match=r"vocab.txt is a link out of"):
            dk.export(folder, tmp_path / "out", architecture)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["dense", "mixtral"])
def test_a_generation_config_is_read_from_the_folder_or_refused(architecture, pristine, tmp_path):
    folder = shutil.copytree(pristine / "whole", tmp_path / "m")
    file = folder / "generation_config.json"
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"generation_config.json cannot be read \(.*; allowed: the generation config of a"):
            dk.export(folder, tmp_path / "out", architecture, data=tokens(1, 4))
    shutil.copy(pristine / "whole" / file.name, tmp_path / "elsewhere.json")
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"generation_config.json is a link out of"):
        dk.export(folder, tmp_path / "out", architecture, data=tokens(1, 4))
    assert not (tmp_path / "out").exists()


# --- sizes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 10**8 + 1, 10**6])
def test_an_absurd_header_is_refused_before_it_is_read(length, pristine, tmp_path):
    folder = shutil.copytree(pristine / "whole", tmp_path / "m")
    data = (folder / WHOLE).read_bytes()
    with (folder / WHOLE).open("wb") as file:
        file.write(struct.pack("<Q", length) + data[8:])
        if length == 10**8 + 1:
            file.truncate(2 * 10**8)  # no room on the disk, but long enough
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(a header of [0-9,]+ bytes in a file of"):
        dk.load(folder)


ABSURD = {
    "num_hidden_layers": (
        10**9,
        r"num_hidden_layers of .* is 1000000000; allowed: at most \d+, the number of tensors in the files",
    ),
    "intermediate_size": (10**18, r"intermediate_size of .* is 1000000000000000000; allowed: at most 2,147,483,648"),
    "vocab_size": (10**30, r"vocab_size of .* is 10{30}; allowed: at most"),
    "num_attention_heads": (0, r"folder is .*, which cannot be read \(ZeroDivisionError"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": "x"}, r"folder is .*, which cannot be read \("),
    "hidden_size": ("wide", r"folder is .*, which cannot be read \("),
}


@pytest.mark.parametrize("field", ABSURD)
def test_absurd_sizes(field, pristine, tmp_path):
    value, words = ABSURD[field]
    folder = shutil.copytree(pristine / "whole", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["dense_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        dk.load(folder)


def test_memory_that_runs_out_is_no_fault_of_the_folder():
    with pytest.raises(torch.OutOfMemoryError), building("m"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_deep_json(pristine, tmp_path):
    for kind, name in (("whole", "config.json"), ("shards", INDEX)):
        folder = shutil.copytree(pristine / kind, tmp_path / kind)
        (folder / name).write_text("[" * 200_000)
        with pytest.raises(ValueError, match="nested too deeply"):
            dk.load(folder)


def test_the_fitting_number_of_experts_is_found_at_once():
    """By divisors up to the root: a width of 2^31 is a config's to give."""
    assert _fitting_num_experts(1 << 31, 100, 8) == 128
    for width in (1, 7, 36, 64, 1536, 14336):
        slow = [e for e in range(1, width + 1) if width % e == 0 and width // e % 8 == 0]
        assert _fitting_num_experts(width, 1, 8) == (slow[0] if slow else None)
        assert _fitting_num_experts(width, 10**6, 8) == (slow[-1] if slow else None)


# --- fuzz ------------------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([10**9, 2**31, 2**63, 10**400, -(2**63)]),
    st.floats(),
    st.sampled_from(["", "silu", "float32", "llama", "dotmoe", "default", "../x", "\0", "model-00001-of-00002.safetensors"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=4
)


@st.composite
def changed(draw, values):
    """JSON of which one to three entries, anywhere, are replaced, taken out or added."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        place = values
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(list(keys)))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(VALUES)
            break
    return values


def outcome(folder, out):
    """Loads, describes and exports a folder that was tampered with: each works or is a ValueError, and OUT is whole or absent."""
    worked = []
    for act in (lambda: dk.load(folder), lambda: describe(folder), lambda: dk.export(folder, out, "auto", data=tokens(1, 4))):
        try:
            act()
            worked.append(True)
        except ValueError:
            worked.append(False)
    assert out.exists() is worked[-1]
    assert not [f for f in out.parent.iterdir() if f.name.startswith(".")]
    shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="module")
def scratch(pristine, tmp_path_factory):
    root = tmp_path_factory.mktemp("scratch")
    return {kind: shutil.copytree(pristine / kind, root / kind) for kind in ("whole", "shards")}, root


@settings(max_examples=40)
@given(data=st.data())
def test_fuzzed_config(data, pristine, scratch):
    folders, root = scratch
    config = json.loads((pristine / "whole" / "config.json").read_text())
    (folders["whole"] / "config.json").write_text(json.dumps(data.draw(changed(config))))
    try:
        outcome(folders["whole"], root / "out")
    finally:
        shutil.copy(pristine / "whole" / "config.json", folders["whole"])


@settings(max_examples=25)
@given(data=st.data())
def test_fuzzed_index(data, pristine, scratch):
    folders, root = scratch
    index = json.loads((pristine / "shards" / INDEX).read_text())
    (folders["shards"] / INDEX).write_text(json.dumps(data.draw(changed(index))))
    try:
        outcome(folders["shards"], root / "out")
    finally:
        shutil.copy(pristine / "shards" / INDEX, folders["shards"])


@settings(max_examples=40)
@given(data=st.data())
def test_fuzzed_header(data, pristine, scratch):
    """The header as JSON that was changed, with the right length; or bytes of the file's beginning that were changed."""
    folders, root = scratch
    whole = (pristine / "whole" / WHOLE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(changed(json.loads(whole[8 : 8 + length])))).encode()
        tampered = struct.pack("<Q", len(header)) + header + whole[8 + length :]
    else:
        tampered = bytearray(whole)
        for place in data.draw(st.lists(st.integers(0, length + 8), min_size=1, max_size=4)):
            tampered[place] = data.draw(st.integers(0, 255))
    (folders["whole"] / WHOLE).write_bytes(tampered)
    try:
        outcome(folders["whole"], root / "out")
    finally:
        shutil.copy(pristine / "whole" / WHOLE, folders["whole"])
