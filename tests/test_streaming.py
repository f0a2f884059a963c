"""Folders that are written layer by layer: the same as from memory, within the memory of a layer, whole or absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, E, dense_model, sparse_model, tokens
from transformers import AutoConfig

import dotmoe_kernels as dk
from dotmoe_kernels import cli, exports
from dotmoe_kernels.conversion import all_experts, convert_folder
from dotmoe_kernels.models.checkpoint import load
from dotmoe_kernels.models.modeling import restore_dense
from dotmoe_kernels.models.shards import ShardReader, Spec, writing

GB = 10**9


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def settings(folder):
    values = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in values.items() if key != "transformers_version"}


# --- shards ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5GB", 600])
def test_shards_are_those_of_the_library(tmp_path, size):
    state = {
        "b": torch.randn(5, 7).bfloat16(),
        "a": torch.arange(6),
        "c.weight": torch.randn(8, 16),
        "d": torch.tensor(3.0),
        "e": torch.zeros(0, 4),
        "f": torch.tensor([True, False]),
    }
    with writing(tmp_path, {name: Spec.of(tensor) for name, tensor in state.items()}, size) as writer:
        for name in reversed(state):
            tensor = state[name]
            writer.write(name, tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor)  # of any strides
    found = tensors(tmp_path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (size != "5GB") == (tmp_path / "model.safetensors.index.json").is_file()
    if size == "5GB":
        save_file(state, tmp_path / "library", metadata={"format": "pt"})
        assert (tmp_path / "library").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    else:
        where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        for name, file in where.items():
            with safe_open(tmp_path / file, framework="pt") as handle:
                assert name in handle.keys()  # noqa: SIM118
    reader = ShardReader(tmp_path)
    assert all(torch.equal(reader.read(name), state[name]) and reader.specs[name] == Spec.of(state[name]) for name in state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: w.write("b", torch.zeros(2)), "name is 'b'; allowed: a tensor of the layout"),
        (lambda w: w.write("a", torch.zeros(3)), "a is Spec"),
        (lambda w: w.write("a", torch.zeros(2).half()), "a is Spec"),
        (lambda w: None, "tensors is without a; allowed: every tensor of the layout"),
    ],
)
def test_what_is_not_in_the_layout_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message), writing(tmp_path, {"a": Spec(torch.float32, (2,))}) as writer:
        wrong(writer)


# --- the same as from memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_streamed_dense_model_is_that_of_memory(kind, tie, tmp_path, monkeypatch):
    model = sparse_model(kind, tie_word_embeddings=tie, dtype=torch.bfloat16)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    dk.save(model, tmp_path / "moe", max_shard_size="20KB")
    restore_dense(load(tmp_path / "moe")).save_pretrained(tmp_path / "memory")
    monkeypatch.setattr(exports, "load", None)  # nobody loads it whole
    dk.export(tmp_path / "moe", tmp_path / "streamed")
    assert same(tmp_path / "memory", tmp_path / "streamed")
    assert settings(tmp_path / "memory") == settings(tmp_path / "streamed")
    assert json.loads((tmp_path / "streamed" / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.mark.parametrize("method", ["dot", "random", "kmeans"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "glm", "gemma2"])
def test_the_streamed_conversion_is_that_of_memory(kind, method, tmp_path):
    dense = dense_model(kind, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    config = dk.DotMoeConfig(num_experts=E, top_k=2)
    checks = convert_folder(tmp_path / "dense", tmp_path / "streamed", config, method=method)
    with pytest.warns(UserWarning, match="nothing is trained"):
        dk.save(dk.convert(dense, config, method=method), tmp_path / "memory")
    assert same(tmp_path / "memory", tmp_path / "streamed")
    assert settings(tmp_path / "memory") == settings(tmp_path / "streamed")
    assert (tmp_path / "memory" / "README.md").read_text().splitlines()[6:] == (
        (tmp_path / "streamed" / "README.md").read_text().splitlines()[6:]
    )
    assert 0 <= checks["all_experts_error"] < checks["tolerance"]


def test_the_soft_router_is_streamed_too(tmp_path):
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    x = tokens()
    with torch.no_grad():
        expected = dense(x).logits
    convert_folder(tmp_path / "dense", tmp_path / "moe", dk.DotMoeConfig(num_experts=E, top_k=2, router="soft"))
    model = dk.load(tmp_path / "moe")
    assert model.config.router_k == [2.0, 2.0]
    with all_experts(model), torch.no_grad():
        assert torch.allclose(model(x).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_command_without_text(tmp_path, capsys):
    dense_model().save_pretrained(tmp_path / "dense")
    arguments = ["convert", str(tmp_path / "dense"), "--num-experts", "8", "--top-k", "2", "--output", str(tmp_path / "moe")]
    assert cli.main(arguments) == 2
    assert "the following arguments are required: --data" in capsys.readouterr().err
    assert cli.main([*arguments, "--steps", "0", "--method", "kmeans"]) == 0
    assert "nothing was trained (--steps 0)" in capsys.readouterr().out
    assert dk.load(tmp_path / "moe").config.assignment["method"] == "kmeans"
    assert cli.main([*arguments, "--steps", "0", "--method", "activation", "--overwrite"]) == 2
    assert "--method is activation; allowed: one that needs no text" in capsys.readouterr().err
    assert cli.main([*arguments, "--steps", "0", "--init", "activation", "--overwrite"]) == 2
    assert "--init is activation; allowed: one that needs no text" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "moe"), *arguments[2:-1], str(tmp_path / "again"), "--steps", "0"]) == 2
    assert "which is already converted" in capsys.readouterr().err


def test_a_checkpoint_of_other_names(tmp_path):
    dense_model().save_pretrained(tmp_path / "dense")
    state = {name.replace("model.layers", "layers"): t for name, t in tensors(tmp_path / "dense").items()}
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without the tensor model\.layers.*allowed: a checkpoint whose tensors have the names"):
        convert_folder(tmp_path / "dense", tmp_path / "moe", dk.DotMoeConfig(num_experts=E, top_k=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


# --- interrupted -----------------------------------------------------------------------------------------------------------


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    dk.save(sparse_model(), tmp_path / "moe")
    before = ShardReader.read

    def fail(self, name):
        if name.startswith("model.layers.1"):
            raise OSError("disk gone")
        return before(self, name)

    monkeypatch.setattr(ShardReader, "read", fail)
    with pytest.raises(OSError, match="disk gone"):
        dk.export(tmp_path / "moe", tmp_path / "dense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe"]
    monkeypatch.undo()
    dk.export(tmp_path / "moe", tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()


_SLOW = """
import sys, time
import dotmoe_kernels as dk
from dotmoe_kernels.models.shards import ShardReader
before = ShardReader.read
def slow(self, name):
    if name.startswith("model.layers.1"):
        print("half way", flush=True)
        time.sleep(60)
    return before(self, name)
ShardReader.read = slow
dk.export(sys.argv[1], sys.argv[2])
"""


def run(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dk.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_an_export_that_was_killed_can_be_run_again(tmp_path):
    dk.save(sparse_model(), tmp_path / "moe")
    process = run(_SLOW, tmp_path / "moe", tmp_path / "dense")
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dense").exists()
    dk.export(tmp_path / "moe", tmp_path / "dense")
    restore_dense(load(tmp_path / "moe")).save_pretrained(tmp_path / "memory")
    assert same(tmp_path / "memory", tmp_path / "dense")


# --- memory ----------------------------------------------------------------------------------------------------------------

LAYERS, HIDDEN, WIDTH, VOCABULARY = 15, 2048, 8192, 8192
LARGEST = 2 * (3 * HIDDEN * WIDTH + 4 * HIDDEN * HIDDEN)  # a layer in bfloat16

_PEAK = """
import sys, warnings
import torch
import dotmoe_kernels as dk
from dotmoe_kernels.conversion import convert_folder
from dotmoe_kernels.models.shards import ShardReader
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
what, source, out = sys.argv[1:4]
torch.set_num_threads(1)
if what == "convert":
    convert_folder(source, out, dk.DotMoeConfig(num_experts=64, top_k=16), method="random", max_shard_size="500MB")
elif what == "export":
    dk.export(source, out)
elif what == "save":
    model = dk.load(source)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    with open("/proc/self/status") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    dk.save(model, out, max_shard_size="1GB")
    print(peak() - held)
    sys.exit()
print(peak())
"""


def peak_of(*arguments):
    process = run(_PEAK, *arguments)
    out, error = process.communicate(timeout=1200)
    assert process.returncode == 0, error[-2000:]
    return int(out)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see the peak of a process")
def test_two_gigabytes_take_the_memory_of_a_layer(tmp_path):
    """The whole process, libraries and all, stays below the largest layer and 1 GB; of saving what comes on top of the model."""
    config = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    dense = AutoConfig.for_model("llama", **config, num_attention_heads=16, dtype="bfloat16")
    layer = {f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    layer |= {f"mlp.{p}_proj.weight": (WIDTH, HIDDEN) for p in ("gate", "up")} | {"mlp.down_proj.weight": (HIDDEN, WIDTH)}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    layout = {f"model.layers.{n}.{name}": Spec(torch.bfloat16, shape) for n in range(LAYERS) for name, shape in layer.items()}
    layout |= {name: Spec(torch.bfloat16, (VOCABULARY, HIDDEN)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    layout["model.norm.weight"] = Spec(torch.bfloat16, (HIDDEN,))
    assert sum(spec.nbytes for spec in layout.values()) > 2 * GB
    dense.save_pretrained(tmp_path / "dense")
    drawn = (torch.randint(-100, 100, (WIDTH * HIDDEN,), generator=torch.Generator().manual_seed(0)) * 2e-4).bfloat16()
    with writing(tmp_path / "dense", layout, "500MB") as writer:
        for n, (name, spec) in enumerate(layout.items()):
            count = spec.nbytes // 2
            writer.write(name, torch.roll(drawn, 977 * n)[:count].view(spec.shape))
    found = {
        "convert": peak_of("convert", tmp_path / "dense", tmp_path / "moe"),
        "export": peak_of("export", tmp_path / "moe", tmp_path / "back"),
    }
    assert {name: size for name, size in found.items() if size > LARGEST + GB} == {}
    reader, back = ShardReader(tmp_path / "dense"), ShardReader(tmp_path / "back")
    assert back.specs == reader.specs
    for name in list(layout)[:9] + list(layout)[-12:]:
        assert torch.equal(back.read(name), reader.read(name)), name
    for folder in ("back", "dense"):  # of 2 GB each
        shutil.rmtree(tmp_path / folder)
    assert peak_of("save", tmp_path / "moe", tmp_path / "saved") <= LARGEST + GB
    shutil.rmtree(tmp_path)
