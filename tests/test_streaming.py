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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, E, dense_model, sparse_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels import cli, exports
from dotmoe_kernels.conversion import all_experts, convert_folder
from dotmoe_kernels.evaluation import perplexity
from dotmoe_kernels.exports import stock
from dotmoe_kernels.models.checkpoint import load
from dotmoe_kernels.models.layerwise import converted_layers
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


STOCK = [
    *(("llama", architecture, {}) for architecture in ("mixtral", "qwen2_moe", "granite_moe", "glm4_moe")),
    *(("qwen3", "qwen3_moe", {}), ("phi3", "mixtral", {}), ("qwen2", "qwen2_moe", {"tie_word_embeddings": True})),
]


@pytest.mark.parametrize(("kind", "architecture", "fields"), STOCK)
def test_the_streamed_stock_model_is_that_of_memory(kind, architecture, fields, tmp_path, monkeypatch):
    model = sparse_model(kind, dtype=torch.bfloat16, **fields)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    dk.save(model, tmp_path / "moe", max_shard_size="20KB")
    monkeypatch.setattr(exports, "load", None)  # nobody loads it whole
    report = dk.export(tmp_path / "moe", tmp_path / "streamed", architecture, data=tokens(4, 24), max_shard_size="20KB")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    row, whole = next(a for a in stock.ARCHITECTURES if a.name == architecture), load(tmp_path / "moe")
    target = stock.stock_skeleton(whole, row)
    state, lossless = stock.stock_tensors(whole, row, report["eps"], target)
    target.load_state_dict(state, assign=True)
    target.tie_weights()
    target.generation_config = whole.generation_config
    target.save_pretrained(tmp_path / "memory")
    assert lossless is report["fold"]["lossless"]
    assert same(tmp_path / "memory", tmp_path / "streamed")
    assert settings(tmp_path / "memory") == settings(tmp_path / "streamed")
    assert json.loads((tmp_path / "streamed" / "generation_config.json").read_text())["temperature"] == 0.5
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert report["perplexity"] == pytest.approx(perplexity(found, tokens(4, 24), batch_size=4), rel=1e-3)
    assert report["perplexity_exact"] == pytest.approx(perplexity(whole, tokens(4, 24), batch_size=4), rel=1e-3)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_model_runs_from_its_files(kind, tie, tmp_path):
    """Forward and generate as of the loaded model, at first and again; afterwards nothing is held."""
    dk.save(sparse_model(kind, tie_word_embeddings=tie), tmp_path / "moe", max_shard_size="20KB")
    whole = load(tmp_path / "moe")
    model = converted_layers(tmp_path / "moe", whole.config).model
    x, options = tokens(), {"max_new_tokens": 5, "do_sample": False}
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(x).logits, whole(x).logits)
    assert torch.equal(model.generate(x, **options), whole.generate(x, **options))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("architecture", ["dense", "mixtral"])
def test_another_dtype(architecture, tmp_path):
    dk.save(sparse_model(dtype=torch.bfloat16), tmp_path / "moe")
    given = {} if architecture == "dense" else {"data": tokens(4, 24)}
    report = dk.export(tmp_path / "moe", tmp_path / "out", architecture, dtype=torch.float16, **given)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    if architecture == "mixtral":
        assert report["dtype"] == "float16"
        return
    with torch.no_grad():
        expected = restore_dense(load(tmp_path / "moe", dtype=torch.float16))(tokens()).logits
        assert torch.equal(model(tokens()).logits, expected)


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


@pytest.mark.parametrize("architecture", ["dense", "mixtral"])
def test_an_error_half_way_leaves_nothing(architecture, tmp_path, monkeypatch):
    dk.save(sparse_model(), tmp_path / "moe")
    before = ShardReader.read

    def fail(self, name):
        if name.startswith("model.layers.1"):
            raise OSError("disk gone")
        return before(self, name)

    monkeypatch.setattr(ShardReader, "read", fail)
    with pytest.raises(OSError, match="disk gone"):
        dk.export(tmp_path / "moe", tmp_path / "out", architecture, data=tokens())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe"]
    monkeypatch.undo()
    dk.export(tmp_path / "moe", tmp_path / "out", architecture, data=tokens())
    assert (tmp_path / "out" / "model.safetensors").is_file()


_SLOW = """
import sys, time
import torch
import dotmoe_kernels as dk
from dotmoe_kernels.models.shards import ShardWriter
before = ShardWriter.write
def slow(self, name, tensor):
    if name.startswith("model.layers.1"):
        print("half way", flush=True)
        time.sleep(60)
    return before(self, name, tensor)
ShardWriter.write = slow
dk.export(sys.argv[1], sys.argv[2], sys.argv[3], data=torch.arange(32)[None])
"""


def run(code, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dk.__file__).parents[1]), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("architecture", ["dense", "mixtral"])
def test_an_export_that_was_killed_can_be_run_again(architecture, tmp_path):
    """Killed while weights are written: no folder of that name, and what is left loads as nothing."""
    dk.save(sparse_model(), tmp_path / "moe")
    process = run(_SLOW, tmp_path / "moe", tmp_path / "out", architecture)
    assert process.stdout.readline() == "half way\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in tmp_path.iterdir() if path.name != "moe"]
    assert all(path.name.startswith(".dotmoe-") for path in left)
    for path in left:
        with pytest.raises((OSError, ValueError, SafetensorError)):
            AutoModelForCausalLM.from_pretrained(path)
    x = torch.arange(32)[None]
    report = dk.export(tmp_path / "moe", tmp_path / "out", architecture, data=x)
    assert report == dk.export(tmp_path / "moe", tmp_path / "again", architecture, data=x)
    assert same(tmp_path / "out", tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- memory ----------------------------------------------------------------------------------------------------------------

MB = 10**6
SIZES = {  # layers, H, F
    "300 MB": (8, 1024, 4096),
    "many layers": (24, 512, 2048),
    "500 MB": (14, 1024, 4096),
    "2 GB": (15, 2048, 8192),
}
VOCABULARY = 8192

_PEAK = """
import json, sys, threading, time, warnings
import torch
import dotmoe_kernels as dk
from dotmoe_kernels import exports
from dotmoe_kernels.cli import main
from dotmoe_kernels.conversion import convert_folder
from dotmoe_kernels.conversion.sources import read_dense

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def touch(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()

what, source, out = sys.argv[1:4]
torch.set_num_threads(1)
dk.DotMoeForCausalLM
torch.nn.functional.linear(torch.ones(64, 512).bfloat16(), torch.ones(512, 512).bfloat16())
if what == "report":
    import matplotlib.backends.backend_agg, matplotlib.figure
if what == "save":
    model = dk.load(source)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
held, anonymous = status("VmRSS"), [status("RssAnon")]

def sample():
    while True:
        anonymous.append(status("RssAnon"))
        time.sleep(0.002)

threading.Thread(target=sample, daemon=True).start()
if what == "convert":
    convert_folder(source, out, dk.DotMoeConfig(num_experts=64, top_k=16), method="random", max_shard_size="500MB")
elif what == "stock":
    dk.export(source, out, "mixtral", data=torch.arange(16)[None])
elif what == "dense":
    dk.export(source, out)
elif what == "save":
    dk.save(model, out, max_shard_size="1GB")
elif what == "load":
    touch(dk.load(source))
elif what == "read":
    touch(read_dense(source))
elif what == "align":
    assert main(["convert", source, "--output", out, *sys.argv[4:]]) == 0
elif what == "report":
    assert main(["report", source, "--output", out, *sys.argv[4:]]) == 0
print()
print(json.dumps({"peak": status("VmHWM"), "growth": status("VmHWM") - held, "anonymous": max(anonymous) - anonymous[0]}))
"""


def peak_of(*arguments):
    """Of a process: its peak, what that was more than at the start, and the same of memory that is no file's. glibc gives back what
    is freed at once: left to itself it keeps blocks of up to 32 MB, and how many of them differs by 100 MB from run to run."""
    process = run(_PEAK, *arguments, MALLOC_MMAP_THRESHOLD_=str(MB))
    out, error = process.communicate(timeout=1200)
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


def layer_bytes(size):
    _, H, F = SIZES[size]
    return 2 * (3 * H * F + 4 * H * H)  # bfloat16


def write_dense(folder, size):
    """A dense checkpoint of random weights, shard by shard; its layout."""
    layers, H, F = SIZES[size]
    config = {"vocab_size": VOCABULARY, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": layers}
    dense = AutoConfig.for_model("llama", **config, num_attention_heads=16, dtype="bfloat16")
    layer = {f"self_attn.{p}_proj.weight": (H, H) for p in "qkvo"}
    layer |= {f"mlp.{p}_proj.weight": (F, H) for p in ("gate", "up")} | {"mlp.down_proj.weight": (H, F)}
    layer |= {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
    layout = {f"model.layers.{n}.{name}": Spec(torch.bfloat16, shape) for n in range(layers) for name, shape in layer.items()}
    layout |= {name: Spec(torch.bfloat16, (VOCABULARY, H)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    layout["model.norm.weight"] = Spec(torch.bfloat16, (H,))
    dense.save_pretrained(folder)
    drawn = (torch.randint(-100, 100, (max(F, VOCABULARY) * H,), generator=torch.Generator().manual_seed(0)) * 2e-4).bfloat16()
    with writing(folder, layout, "500MB" if size == "2 GB" else "100MB") as writer:
        for n, (name, spec) in enumerate(layout.items()):
            count = spec.nbytes // 2
            writer.write(name, torch.roll(drawn, 977 * n)[:count].view(spec.shape))
    return layout


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see the peak of a process"
)


@needs_proc
@pytest.mark.parametrize("size", ["500 MB", pytest.param("2 GB", marks=pytest.mark.slow)])
def test_folder_to_folder_takes_the_memory_of_a_layer(size, tmp_path):
    """2 GB: the whole process, libraries and all, stays below the largest layer and 1 GB; of saving what comes on top of the model.
    500 MB: what comes on top of the libraries stays below two layers and 100 MB."""
    layout = write_dense(tmp_path / "dense", size)
    total = sum(spec.nbytes for spec in layout.values())
    found = {
        "convert": peak_of("convert", tmp_path / "dense", tmp_path / "moe"),
        "dense": peak_of("dense", tmp_path / "moe", tmp_path / "back"),
        "stock": peak_of("stock", tmp_path / "moe", tmp_path / "stock"),
    }
    if size == "2 GB":
        assert total > 2 * GB
        key, most = "peak", layer_bytes(size) + GB
    else:
        key, most = "growth", 2 * layer_bytes(size) + 100 * MB
        assert most < 0.4 * total
    assert {name: sizes for name, sizes in found.items() if sizes[key] > most} == {}
    reader, back = ShardReader(tmp_path / "dense"), ShardReader(tmp_path / "back")
    assert back.specs == reader.specs
    for name in list(layout)[:9] + list(layout)[-12:]:
        assert torch.equal(back.read(name), reader.read(name)), name
    for folder in ("back", "dense", "stock"):
        shutil.rmtree(tmp_path / folder)
    saving = peak_of("save", tmp_path / "moe", tmp_path / "saved")
    assert saving["growth"] <= most
    shutil.rmtree(tmp_path)


@needs_proc
def test_a_model_is_read_once(tmp_path):
    """In bfloat16: neither a second copy nor one in float32. The files' pages count in what is resident, though the system may take
    them back; of the converted model, only the down projections are not the files' own pages."""
    layout = write_dense(tmp_path / "dense", "300 MB")
    total, layers = sum(spec.nbytes for spec in layout.values()), SIZES["300 MB"][0]
    convert_folder(
        tmp_path / "dense", tmp_path / "moe", dk.DotMoeConfig(num_experts=64, top_k=16), method="random", max_shard_size="100MB"
    )
    down = layers * layout["model.layers.0.mlp.down_proj.weight"].nbytes
    for what, folder, copied in (("read", "dense", 0), ("load", "moe", down)):
        found = peak_of(what, tmp_path / folder, tmp_path / "out")
        assert found["growth"] < total + 100 * MB, what  # a shard
        assert found["anonymous"] < copied + 50 * MB, what


@needs_proc
def test_a_report_takes_the_memory_of_a_layer(tmp_path):
    """With every figure measured; matplotlib is there before."""
    pytest.importorskip("matplotlib", reason="the report draws with matplotlib: pip install 'dotmoe_kernels[demo]'")
    from test_checkpoint import word_tokenizer

    layout = write_dense(tmp_path / "dense", "300 MB")
    config = dk.DotMoeConfig(num_experts=64, top_k=16)
    convert_folder(tmp_path / "dense", tmp_path / "moe", config, method="random", tokenizer=word_tokenizer())
    (tmp_path / "a.txt").write_text("a b b a " * 50)
    data = ["--data", tmp_path / "a.txt", "--max-tokens", 64, "--sequence-length", 16, "--device", "cpu"]
    most = 2 * layer_bytes("300 MB") + 100 * MB
    assert most < 0.6 * sum(spec.nbytes for spec in layout.values())
    found = peak_of("report", tmp_path / "moe", tmp_path / "page.html", *data)
    assert found["growth"] < most
    assert "Co-routing" in (tmp_path / "page.html").read_text()


@needs_proc
def test_the_alignment_takes_what_the_dry_run_says(tmp_path, capsys):
    """And its model is written without another one in memory: of what the process allocates, most is the FFNs as experts."""
    from test_checkpoint import word_tokenizer

    layout = write_dense(tmp_path / "dense", "300 MB")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "a.txt").write_text("a b b a " * 200)
    given = ["--num-experts", "8", "--top-k", "2", "--sequence-length", "32", "--steps", "1", "--batch-size", "1"]
    assert cli.main(["convert", str(tmp_path / "dense"), *given, "--dry-run", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted_memory_gb"] * GB
    assert predicted < 1.3 * sum(spec.nbytes for spec in layout.values())
    data = ["--data", tmp_path / "a.txt", "--max-tokens", 128, "--no-progress", "--device", "cpu"]
    found = peak_of("align", tmp_path / "dense", tmp_path / "moe", *given, *data)
    assert found["anonymous"] < predicted + layer_bytes("300 MB") + 50 * MB
