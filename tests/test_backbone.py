"""Dense models that are not plain: refused before anything is trained, each with what to do. And what a saved one keeps."""

import json

import pytest
import torch
from architectures import KINDS, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import E, F, H, K, dense_model, sparse_model, tokens
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import dotmoe_kernels as dk
from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, convert, find_ffns, pipeline, self_check

Q = "model.layers.0.self_attn.q_proj"
MERGE = r"allowed: a model without adapters: .*merge_and_unload\(\) puts them into the weights"


def q_proj(model):
    return model.model.layers[0].self_attn.q_proj


def lora(**kwargs):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **kwargs)


def with_adapters(model):
    import peft

    return peft.get_peft_model(model, lora())


def base_with_adapters(model):
    with_adapters(model)
    return model


def with_an_own_adapter(model):
    try:
        model.add_adapter(lora())
    except ValueError as error:  # this transformers wants a newer peft
        pytest.skip(str(error))
    return model


def with_a_compiled_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def pruned(model):
    prune.random_unstructured(q_proj(model), "weight", 0.5)
    return model


def normed(model):
    nn.utils.parametrizations.weight_norm(q_proj(model))
    return model


def normed_as_of_old(model):
    nn.utils.weight_norm(q_proj(model))
    return model


def quantised(model):
    class Linear4bit(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Linear4bit(H, H, bias=False)
    return model


def with_a_shared_ffn(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def with_shared_attention(model):
    model.model.layers[1].self_attn.q_proj.weight = q_proj(model).weight
    return model


def tied_beside_its_config(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def with_a_buffer(model):
    q_proj(model).register_buffer("scale", torch.ones(1))
    return model


def resized_beside_its_config(model):
    model.lm_head = nn.Linear(H, 99, bias=False)
    return model


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, torch.device("cpu"))


def distributed(model):
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)  # without a process group
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def of_inference_mode(model):
    with torch.inference_mode():
        return dense_model()


def without_values(model):
    return model.to("meta")


def of_float8(model):
    return model.to(torch.float8_e4m3fn)


NOT_PLAIN = {
    with_adapters: r"model is a PeftModelForCausalLM; allowed: a model without adapters: model.merge_and_unload\(\)",
    base_with_adapters: rf"model is a LlamaForCausalLM with a peft Linear as {Q}; {MERGE}",
    with_an_own_adapter: rf"model is a LlamaForCausalLM with a peft Linear as {Q}; {MERGE}",
    with_a_compiled_layer: r"with a torch OptimizedModule as model.layers.0; allowed: the model before torch.compile \(its",
    torch.compile: r"model is a OptimizedModule; allowed: the model before torch.compile",
    pruned: rf"model is a LlamaForCausalLM \w+ {Q}.weight\w*; allowed: .*torch.nn.utils.prune.remove puts them back",
    normed: rf"ParametrizedLinear as {Q}; allowed: .*torch.nn.utils.parametrize.remove_parametrizations puts them back",
    normed_as_of_old: rf"model is a LlamaForCausalLM \w+ {Q}.weight\w*; allowed: .*torch.nn.utils.remove_weight_norm puts them",
    quantised: rf"with a \w+ Linear4bit as {Q}; allowed: the Linear of a fresh LlamaForCausalLM, unquantised",
    with_a_shared_ffn: r"model.layers.1.mlp.*same .* as model.layers.0.mlp.*; allowed: .* of their own",
    with_shared_attention: rf"model.layers.1.self_attn.q_proj.weight of LlamaForCausalLM is the same tensor as {Q}.weight",
    tied_beside_its_config: r"lm_head.weight of LlamaForCausalLM is the same tensor as model.embed_tokens.weight; allowed: ",
    with_a_buffer: rf"model is a LlamaForCausalLM with {Q}.scale; allowed: the tensors of a fresh LlamaForCausalLM",
    resized_beside_its_config: r"lm_head.weight is of shape \[99, 32\]; allowed: \[64, 32\], as its config says",
    nn.DataParallel: r"model is a DataParallel; allowed: the model inside, model.module",
    distributed: r"model is a DistributedDataParallel; allowed: the model inside, model.module",
    offloaded: r"model.embed_tokens.weight of LlamaForCausalLM is on the meta device, offloaded by accelerate; allowed: a model",
    of_inference_mode: r"is a tensor of torch.inference_mode; allowed: a model loaded outside of it",
    without_values: r"is on the meta device, without values; allowed: a model whose weights are all in memory",
    of_float8: r"weight of LlamaForCausalLM is of dtype torch.float8_e4m3fn; allowed: an unquant",
}


@pytest.mark.parametrize(("change", "message"), NOT_PLAIN.items(), ids=[change.__name__ for change in NOT_PLAIN])
def test_a_model_that_is_not_plain(monkeypatch, change, message):
    monkeypatch.setattr(pipeline, "align", None)  # nothing may be trained
    model = change(dense_model())
    with pytest.raises(ValueError, match=message) as caught:
        convert(model, DotMoeConfig(num_experts=E, top_k=K), data=tokens())
    assert "\n" not in str(caught.value)


def test_a_conversion_in_inference_mode():
    model = dense_model()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch.inference_mode is on; allowed: a call outside of it"):
        convert(model, DotMoeConfig(num_experts=E, top_k=K), data=tokens())


def test_a_shared_ffn_is_no_ffn_of_two_layers():
    with pytest.raises(ValueError, match=r"model.layers.1.mlp has the weights of model.layers.0.mlp; allowed: an FFN of its own"):
        find_ffns(with_a_shared_ffn(dense_model()))


def test_tied_as_the_config_says():
    model = convert(dense_model(tie_word_embeddings=True), DotMoeConfig(num_experts=E, top_k=K))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_in_the_model_folder(tmp_path):
    peft = pytest.importorskip("peft")
    dense_model().save_pretrained(tmp_path / "dense")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), lora())
    adapted.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=MERGE):
        convert(model, DotMoeConfig(num_experts=E, top_k=K), data=tokens())


# --- names and buffers ---------------------------------------------------------------------------------------------------


def converted(kind):
    if kind not in KINDS:
        pytest.skip(f"this transformers has no {kind}")
    return convert(tiny_model(kind), DotMoeConfig(num_experts=4, top_k=2))


def names_in(file):
    with safe_open(file, "pt") as handle:
        return set(handle.keys())


def assert_same(model, again):
    for ours, theirs in ((model.state_dict(), again.state_dict()), (dict(model.named_buffers()), dict(again.named_buffers()))):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["exaone", "gemma3"])
def test_checkpoints_of_the_trainer(kind, tmp_path):
    model = converted(kind)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    options = {"max_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 1}
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    assert_same(model, dk.load(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("original", [True, False])
def test_names_in_files(original, tmp_path):
    """As in the dense model's, or the state dict's, which files had that were written without the backbone's conversions."""
    model = converted("exaone")
    model.save_pretrained(tmp_path, save_original_format=original)
    head = "transformer.h.0.attn.attention.q_proj" if original else "model.layers.0.self_attn.q_proj"
    assert f"{head}.weight" in names_in(tmp_path / "model.safetensors")
    again = dk.load(tmp_path)
    assert_same(model, again)
    again.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again" / "model.safetensors") == names_in(tmp_path / "model.safetensors")


def test_a_renamed_tensor_that_is_missing(tmp_path):
    dk.save(converted("exaone"), tmp_path / "moe")
    file = tmp_path / "moe" / "model.safetensors"
    state = load_file(file)
    name = "transformer.h.0.attn.attention.q_proj.weight"
    save_file({n: t for n, t in state.items() if n != name}, file)
    with pytest.raises(ValueError, match=rf"without the tensor {Q}.weight; allowed: a checkpoint with every tensor"):
        dk.load(tmp_path / "moe")
    save_file(state | {name: torch.ones(3, 3)}, file)
    with pytest.raises(ValueError, match=rf"{Q}.weight of .*moe is of shape \[3, 3\]; allowed: shape \[32, 32\]"):
        dk.load(tmp_path / "moe")


def test_a_model_that_does_not_come_back_itself(tmp_path):
    """Read as another type than its folder says: what is written says neither."""
    if "exaone" not in KINDS:
        pytest.skip("this transformers has no exaone")
    tiny_model("exaone").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a saved LlamaForCausalLM is without the tensor model.embed_tokens.weight"):
        convert(model, DotMoeConfig(num_experts=4, top_k=2), data=tokens())


def test_the_restored_dense_model_has_all_of_its_names(tmp_path):
    dk.save(converted("exaone"), tmp_path / "moe")
    tiny_model("exaone").save_pretrained(tmp_path / "dense")
    dk.export(tmp_path / "moe", tmp_path / "back", architecture="dense")
    assert names_in(tmp_path / "back" / "model.safetensors") == names_in(tmp_path / "dense" / "model.safetensors")


@pytest.mark.parametrize("kind", ["falcon_h1", "gemma3_text", "olmo2"])
def test_buffers_that_are_in_no_file(kind, tmp_path):
    model = converted(kind)
    dense = dict(tiny_model(kind).named_buffers())
    dk.save(model, tmp_path / "moe")
    fresh = DotMoeForCausalLM(DotMoeConfig(num_experts=4, top_k=2, dense_config=tiny_config(kind)))
    for sparse in (model, dk.load(tmp_path / "moe"), fresh):
        found = {name: buffer for name, buffer in sparse.named_buffers() if not name.endswith("neuron_order")}
        assert found.keys() == dense.keys()
        assert all(torch.equal(found[name], dense[name]) for name in found)
    if kind == "falcon_h1":
        assert bool((fresh.model.layers[0].mamba.mup_vector == 1).all())


def test_the_self_check_compares_buffers(tmp_path):
    model = sparse_model()
    dk.save(model, tmp_path / "moe")
    assert self_check(model, None, tokens(), folder=tmp_path / "moe")["reload_equal"]
    model.model.rotary_emb.inv_freq.mul_(2)
    checks = self_check(model, None, tokens(), folder=tmp_path / "moe")
    assert not checks["reload_equal"]
    assert not checks["passed"]


def test_a_name_that_is_taken():
    message = r"model is a xLSTMForCausalLM, whose child backbone has the name of an attribute of DotMoeForCausalLM; allowed"
    with pytest.raises(ValueError, match=message):
        converted("xlstm")


def test_a_config_that_does_not_say_the_width():
    if "moshi" not in KINDS:
        pytest.skip("this transformers has no moshi")
    config = DotMoeConfig.for_dense(tiny_config("moshi"), expert_size=8)
    assert config.num_experts == F // 2 // 8


# --- config.json -----------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": H, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 64}


def test_sizes_at_the_top_level(tmp_path):
    model = sparse_model()
    dk.save(model, tmp_path / "moe")
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert {name: written.get(name) for name in SIZES} == SIZES
    # the dense config is what counts
    written |= {"vocab_size": 999, "hidden_size": 999}
    written["dense_config"]["use_cache"] = False
    (tmp_path / "moe" / "config.json").write_text(json.dumps(written))
    again = dk.load(tmp_path / "moe")
    assert (again.config.vocab_size, again.config.hidden_size, again.config.use_cache) == (64, H, False)
    again.resize_token_embeddings(70)
    dk.save(again, tmp_path / "wide")
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (written["vocab_size"], written["dense_config"]["vocab_size"]) == (70, 70)
    ours, theirs = (config.to_dict() | {"_name_or_path": ""} for config in (again.config, dk.load(tmp_path / "wide").config))
    assert ours == theirs


def test_sizes_of_a_text_config():
    if "gemma3" in KINDS:
        assert DotMoeConfig(dense_config=tiny_config("gemma3"), num_experts=4).to_dict()["hidden_size"] == 32


def test_prefix_tuning():
    peft = pytest.importorskip("peft")
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(sparse_model(), prefix)
    assert tuned(input_ids=tokens()).logits.shape == (2, 9, 64)


class Uneven(LlamaConfig):
    """With a value that only its layers have, as configs of heterogeneous models."""

    model_type = "llama"

    @property
    def rope_scale(self):
        raise RuntimeError("it differs by layer")


def test_an_error_of_the_dense_config_does_not_leak():
    config = DotMoeConfig(dense_config=Uneven(intermediate_size=64))
    assert not hasattr(config, "rope_scale")
    with pytest.raises(AttributeError, match="DotMoeConfig has no attribute 'rope_scale': it differs by layer"):
        config.rope_scale  # noqa: B018
