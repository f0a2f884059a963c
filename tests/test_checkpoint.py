"""Save, load, export: what is written comes back bit for bit, what does not fit is an error, and a failed save changes nothing."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, E, F, H, dense_model, random_layers, sparse_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import dotmoe_kernels as dk
from dotmoe_kernels import exports
from dotmoe_kernels.conversion import DotMoeConfig, all_experts, finetuning, materialize, moe_blocks

SHAPE = {"num_experts": E, "top_k": 2}
MLP = "model.layers.0.mlp"


@pytest.fixture
def saved(tmp_path):
    """A saved model's folder, which a test may damage."""
    dk.save(sparse_model(), tmp_path / "model")
    return tmp_path / "model"


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def edit(folder, change):
    """Rewrite the weights after ``change`` of their dictionary."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def word_tokenizer():
    vocabulary = {"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


# --- round trips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_save_and_load(kind, tie, tmp_path):
    model, x = sparse_model(kind, tie_word_embeddings=tie), tokens()
    dk.save(model, tmp_path / "m")
    loaded = dk.load(tmp_path / "m")
    assert same_state(model, loaded)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tie
    assert all(b.experts.down_proj.transpose(1, 2).is_contiguous() for b in moe_blocks(loaded).values())
    with torch.no_grad():
        expected = model(x).logits
        assert float((loaded(x).logits - expected).abs().max() / expected.abs().max()) < 5e-6
    assert loaded.config.dense_config.to_dict() == type(loaded.config.dense_config)(**model.config.dense_config.to_dict()).to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_export_dense_is_bit_for_bit(kind, tie, dtype, tmp_path):
    model = dense_model(kind, tie_word_embeddings=tie, dtype=dtype)
    model.save_pretrained(tmp_path / "source")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    sparse = materialize(source, DotMoeConfig(**SHAPE), random_layers(source))
    dk.save(sparse, tmp_path / "m", tokenizer=word_tokenizer())
    dk.export(tmp_path / "m", tmp_path / "out")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("source", "out")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(t, files[1][n]) and t.dtype == files[1][n].dtype for n, t in files[0].items())
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(restored) is type(model)
    assert same_state(restored, model)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out"))
    assert before == after
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == [2, 3]


def test_from_pretrained_of_both_classes(saved):
    for cls in (dk.DotMoeForCausalLM, AutoModelForCausalLM):
        model = cls.from_pretrained(saved)
        assert type(model) is dk.DotMoeForCausalLM
        assert moe_blocks(model)[MLP].experts.down_proj.transpose(1, 2).is_contiguous()


def test_load_with_another_dtype_and_top_k(saved):
    model = dk.load(saved, dtype=torch.bfloat16, device="cpu", top_k=5)
    assert model.dtype == torch.bfloat16
    assert moe_blocks(model)[MLP].neuron_order.dtype == torch.int64
    assert moe_blocks(model)[MLP].gate.top_k == model.config.top_k == 5


def test_shards(tmp_path):
    model = sparse_model()
    dk.save(model, tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert same_state(dk.load(tmp_path / "m"), model)
    next((tmp_path / "m").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"without model-00002-of-.*allowed: a folder with every shard"):
        dk.load(tmp_path / "m")


def test_folder_contents(tmp_path):
    model = sparse_model()
    model.config.assignment = {"method": "dot", "seed": 3}
    dk.save(model, tmp_path / "m", tokenizer=word_tokenizer(), card={"base_model": "x/y", "perplexity": 7.25, "Tasks": {"a": 1}})
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'base_model: "x/y"' in card
    assert "| perplexity | 7.25 |" in card
    assert "## Tasks" in card
    assert "| method | dot |" in card
    assert dk.load(tmp_path / "m").config.assignment == {"method": "dot", "seed": 3}
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("a")["input_ids"] == [2]
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text()


def test_config_has_no_path_of_the_source(tmp_path):
    dense_model().save_pretrained(tmp_path / "source")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    dk.save(materialize(source, DotMoeConfig(**SHAPE), random_layers(source)), tmp_path / "m")
    assert all(str(tmp_path) not in f.read_text() for f in (tmp_path / "m").glob("*.[jm][sd]*"))


def test_training_after_loading(saved):
    model, x = dk.load(saved).train(), tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(x, labels=x).loss
    before.backward()
    optimizer.step()
    assert model(x, labels=x).loss < before
    dk.save(model, saved, overwrite=True)  # the loaded tensors may still be mapped from the folder that goes
    assert same_state(dk.load(saved), model)


def test_all_experts_after_reload_is_the_dense_model(tmp_path):
    model, x = dense_model(), tokens()
    with torch.no_grad():
        expected = model(x).logits
        dk.save(materialize(model, DotMoeConfig(**SHAPE), random_layers(model)), tmp_path / "m")
        loaded = dk.load(tmp_path / "m")
        with all_experts(loaded):
            assert float((loaded(x).logits - expected).abs().max() / expected.abs().max()) < 5e-6


# --- what does not fit -----------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"folder is .*nowhere, which does not exist; allowed: a folder written by"):
        dk.load(tmp_path / "nowhere")


def test_folder_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match=r"folder is .*f, which is no folder; allowed: a folder"):
        dk.load(tmp_path / "f")


def test_no_config(saved):
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"without a config.json; allowed"):
        dk.load(saved)


def test_broken_config(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        dk.load(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json is a JSON list; allowed: an object"):
        dk.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_broken_index(saved, text):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json cannot be read \(.*\); allowed: a weight_map of files"):
        dk.load(saved)


def test_another_kind_of_model(tmp_path):
    dense_model().save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match=r"folder is .*d, whose model_type is 'llama'; allowed: a folder written"):
        dk.load(tmp_path / "d")


def test_no_dense_config(saved):
    edit_config(saved, dense_config=None)
    with pytest.raises(ValueError, match=r"dense_config of .* is absent; allowed"):
        dk.load(saved)


def test_newer_format(saved):
    edit_config(saved, format_version=4)
    with pytest.raises(ValueError, match=r"format_version is 4; allowed: at most 3.*upgrade"):
        dk.load(saved)


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"without weights; allowed: a folder with model.safetensors or model.safetensors.index.json"
    ):
        dk.load(saved)


def test_truncated_weights(saved):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*allowed: a complete safetensors file"):
        dk.load(saved)


LOADERS = [dk.load, dk.DotMoeForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [f"{MLP}.gate.weight", f"{MLP}.experts.down_proj", f"{MLP}.neuron_order", "lm_head.weight"])
def test_missing_tensor(saved, name, loader):
    edit(saved, lambda state: state.pop(name))
    with pytest.raises(ValueError, match=rf"without the tensor {name}; allowed: a checkpoint with every tensor"):
        loader(saved)


def test_missing_tied_embedding(tmp_path):
    dk.save(sparse_model(tie_word_embeddings=True), tmp_path / "m")
    edit(tmp_path / "m", lambda state: state.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"without the tensor model.embed_tokens.weight"):
        dk.load(tmp_path / "m")


@pytest.mark.parametrize("loader", LOADERS)
def test_wrong_shape(saved, loader):
    edit(saved, lambda state: state.update({f"{MLP}.experts.down_proj": torch.zeros(E, F // E, H)}))
    with pytest.raises(ValueError, match=rf"{MLP}.experts.down_proj of .* is of shape \[8, 8, 32\]; allowed: shape \[8, 32, 8\]"):
        loader(saved)


@pytest.mark.parametrize("loader", LOADERS)
def test_order_is_no_permutation(saved, loader):
    edit(saved, lambda state: state[f"{MLP}.neuron_order"].__setitem__(0, state[f"{MLP}.neuron_order"][1].clone()))
    with pytest.raises(ValueError, match=rf"{MLP}.neuron_order of .* is no permutation; allowed: each of 0 to 63 once"):
        loader(saved)


def test_topology_that_does_not_fit_the_dense_model(saved):
    edit_config(saved, num_experts=7)
    with pytest.raises(ValueError, match=r"num_experts is 7; allowed: a divisor of F = 64"):
        dk.load(saved)


def test_export_architecture(saved, tmp_path):
    with pytest.raises(ValueError, match=r"architecture is 'bert'; allowed: 'dense' \| 'auto' \| 'qwen3_moe'"):
        dk.export(saved, tmp_path / "out", architecture="bert")
    assert not (tmp_path / "out").exists()


def test_save_of_a_dense_model(tmp_path):
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM; allowed: a DotMoeForCausalLM"):
        dk.save(dense_model(), tmp_path / "m")


# --- writing ---------------------------------------------------------------------------------------------------------------


def test_existing_folder(saved, tmp_path):
    before = contents(saved)
    for act in (lambda: dk.save(sparse_model(seed=9), saved), lambda: dk.export(saved, saved)):
        with pytest.raises(ValueError, match=r"which exists; allowed: a new folder, or overwrite=True"):
            act()
    assert contents(saved) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file, a file; allowed: a folder"):
        dk.save(sparse_model(), tmp_path / "file", overwrite=True)


def keep_sake(folder):
    """Files that are no part of a model, and their contents."""
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"weights")
    (folder / "corpus.txt").write_text("text")
    names = [".git/HEAD", "checkpoint-500/model.safetensors", "corpus.txt"]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("act", ["save", "export"])
def test_overwrite_replaces_the_model_and_keeps_the_rest(saved, tmp_path, act):
    model, kept = sparse_model(seed=9), keep_sake(saved)
    if act == "save":
        dk.save(model, saved, overwrite=True)
        assert same_state(dk.load(saved), model)
    else:
        dk.save(model, tmp_path / "source")
        dk.export(tmp_path / "source", saved, overwrite=True)
        assert same_state(AutoModelForCausalLM.from_pretrained(saved), dense_model(seed=9))
        shutil.rmtree(tmp_path / "source")
    assert {name: (saved / name).read_bytes() for name in kept} == kept
    assert [f.name for f in saved.parent.iterdir()] == ["model"]
    assert not list(saved.glob(".dotmoe-*"))


def test_overwrite_leaves_nothing_of_the_older_model(tmp_path):
    """Neither shards nor a tokenizer's chat template, in whatever order the sizes come."""
    old, new, folder = word_tokenizer(), word_tokenizer(), tmp_path / "m"
    old.chat_template = "{{ messages }}"
    dk.save(sparse_model(), folder, tokenizer=old, max_shard_size="20KB")
    assert {"chat_template.jinja", "model.safetensors.index.json"} <= contents(folder).keys()
    for size in ("5GB", "10KB", "40KB"):
        model = sparse_model(seed=len(size))
        dk.save(model, folder, tokenizer=new, max_shard_size=size, overwrite=True)
        dk.save(model, tmp_path / size, tokenizer=new, max_shard_size=size)
        assert contents(folder).keys() == contents(tmp_path / size).keys()
        assert same_state(dk.load(folder), model)


def test_an_older_tokenizer_stays_where_none_is_given(tmp_path):
    dk.save(sparse_model(), tmp_path / "m", tokenizer=word_tokenizer())
    dk.save(sparse_model(seed=9), tmp_path / "m", overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("a b")["input_ids"] == [2, 3]


@pytest.mark.parametrize("text", ['{"port": 80}', "[]", "{", '{"model_type": 3}'])
def test_a_config_of_something_else_makes_no_model_folder(tmp_path, text):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text(text)
    (tmp_path / "app" / "README.md").write_text("mine")
    before = contents(tmp_path / "app")
    with pytest.raises(ValueError, match=r"which holds something else than a model; allowed: a new folder, or one with the config"):
        dk.save(sparse_model(), tmp_path / "app", overwrite=True)
    assert contents(tmp_path / "app") == before


def test_a_folder_in_the_place_of_a_file(saved):
    (saved / "README.md").unlink()
    (saved / "README.md").mkdir()
    (saved / "README.md" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"whose README.md is a folder; allowed"):
        dk.save(sparse_model(), saved, overwrite=True)
    assert (saved / "README.md" / "notes.txt").read_text() == "mine"


def test_an_adapter_is_never_left_beside_another_model(saved, tmp_path):
    """transformers would put it into whatever model it finds there."""
    (saved / "adapter_config.json").write_text("{}")
    before = contents(saved)
    dk.save(sparse_model(), tmp_path / "source")
    for act in (
        lambda: dk.save(sparse_model(seed=9), saved, overwrite=True),
        lambda: dk.export(tmp_path / "source", saved, overwrite=True),
    ):
        with pytest.raises(
            ValueError, match=r"whose adapter_config.json would be loaded into the model; allowed: a folder without one"
        ):
            act()
    assert contents(saved) == before


def test_export_never_replaces_its_source(saved, tmp_path):
    before = contents(saved)
    (tmp_path / "link").symlink_to(saved)
    for out in (saved, tmp_path / "link", f"{saved}/../model/"):
        with pytest.raises(ValueError, match=r"out is .*model, which holds folder; allowed: another folder"):
            dk.export(saved, out, overwrite=True)
    assert contents(saved) == before


def test_export_replaces_no_file_that_is_not_a_models(saved, tmp_path):
    dk.export(saved, tmp_path / "out")
    for folder in (saved, tmp_path / "out"):
        (folder / "notes.txt").write_text(str(folder))
    dk.export(saved, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == str(tmp_path / "out")


def test_a_fresh_volume_is_empty(tmp_path):
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    dk.save(sparse_model(), tmp_path / "volume")
    assert (tmp_path / "volume" / "lost+found").is_dir()
    dk.load(tmp_path / "volume")


def test_overwrite_refuses_a_folder_without_a_model(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="papers, which holds something else than a model"):
        dk.save(sparse_model(), tmp_path / "papers", overwrite=True)
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "x"


def test_empty_folder_and_new_parents(tmp_path):
    (tmp_path / "empty").mkdir()
    dk.save(sparse_model(), tmp_path / "empty")
    dk.save(sparse_model(), tmp_path / "a" / "b")
    assert dk.load(tmp_path / "a" / "b").config.num_experts == E


class Interrupting:
    def save_pretrained(self, folder):
        assert (folder / "model.safetensors").is_file(), "interrupted late"
        raise KeyboardInterrupt


def test_interrupted_save(saved):
    before = contents(saved)
    with pytest.raises(KeyboardInterrupt):
        dk.save(sparse_model(seed=9), saved, tokenizer=Interrupting(), overwrite=True)
    assert contents(saved) == before
    assert [f.name for f in saved.parent.iterdir()] == ["model"]


def test_failed_rename_puts_the_old_folder_back(saved, monkeypatch):
    before, rename = contents(saved), type(saved).rename

    def failing(self, target):
        if ".new" in str(self.parent):
            raise OSError("on purpose")
        return rename(self, target)

    monkeypatch.setattr(type(saved), "rename", failing)
    with pytest.raises(OSError, match="on purpose"):
        dk.save(sparse_model(seed=9), saved, overwrite=True)
    assert contents(saved) == before
    assert [f.name for f in saved.parent.iterdir()] == ["model"]


class Damaging:
    """As a save that goes wrong without an error."""

    def __init__(self, what):
        self.what = what

    def save_pretrained(self, folder):
        if self.what == "tensor":
            edit(folder, lambda state: state.pop(f"{MLP}.gate.weight"))
        elif self.what == "shape":
            edit(folder, lambda state: state.update({f"{MLP}.gate.weight": torch.zeros(2, 2)}))
        else:
            (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("what", ["tensor", "shape", "file"])
def test_what_cannot_be_read_back_is_not_saved(saved, tmp_path, what):
    before = contents(saved)
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(ValueError, match=rf"{folder}.*; allowed: ") as caught:
            dk.save(sparse_model(seed=9), folder, tokenizer=Damaging(what), overwrite=True)
        assert ".dotmoe-" not in str(caught.value)
    assert contents(saved) == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["missing", "left over", "shape"])
def test_a_dense_export_that_cannot_be_read_back_is_not_written(saved, tmp_path, monkeypatch, kind):
    real = exports.restore_dense

    def damaged(model):
        dense = real(model)
        if kind == "missing":
            del dense.model.norm
        elif kind == "left over":
            dense.model.more = torch.nn.Linear(2, 2)
        else:
            dense.model.norm.weight = torch.nn.Parameter(torch.ones(3))
        return dense

    monkeypatch.setattr(exports, "stream_dense", lambda *args: None)  # as of a backbone whose files have other names
    monkeypatch.setattr(exports, "restore_dense", damaged)
    with pytest.raises(ValueError, match=r"model\.(norm|more)") as caught:
        dk.export(saved, tmp_path / "out")
    assert f"{tmp_path / 'out'} is " in str(caught.value)
    assert ".dotmoe-" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["renamed", "left over", "shape"])
def test_names_that_cannot_be_read_back_are_refused_before_the_fine_tuning(kind):
    model, done = sparse_model(), []
    attention = model.model.layers[1].self_attn
    if kind == "renamed":
        torch.nn.utils.parametrizations.weight_norm(attention.q_proj)
    elif kind == "left over":
        attention.more = torch.nn.Linear(2, 2)
    else:
        model.config.get_text_config().vocab_size += 8
    with pytest.raises(
        ValueError, match=r"model is a \w+ (with the tensor|whose) .*; allowed: the tensors that a model of its config has"
    ):
        finetuning.finetune(model, tokens(), finetuning.FinetuneConfig(steps=1), on_step=done.append)
    assert done == []


HARSH = """
import os, resource, signal, sys
import dotmoe_kernels as dk
folder = sys.argv[1]
model = dk.load(folder)
class Killer:
    def save_pretrained(self, folder):
        os.kill(os.getpid(), signal.SIGKILL)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
for act in (lambda: dk.save(model, folder, overwrite=True), lambda: dk.export(folder, folder + "-dense")):
    try:
        act()
    except Exception as error:
        print("refused", os.listdir(os.path.dirname(folder)), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
dk.save(model, folder, tokenizer=Killer(), overwrite=True)
"""


def test_file_size_limit_and_kill(saved):
    """A write that fails half-way, as on a full disk, for save and export; then a save that is killed before its rename."""
    before = contents(saved)
    assert len(before["model.safetensors"]) > 40_000
    done = subprocess.run([sys.executable, "-c", HARSH, str(saved)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["refused ['model']"] * 2, done.stderr
    assert done.returncode == -9
    (left,) = saved.glob(".dotmoe-*.new")
    assert dk.load(saved).config.num_experts == E
    shutil.rmtree(left)
    assert contents(saved) == before
