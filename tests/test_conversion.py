"""Surgery, config and modelling: the sparse model is the dense one with its neurons sorted, however transformers uses it."""

import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import safetensors.torch
import torch
from tiny import BACKBONES, E, F, H, K, V, dense_model, random_layers, sparse_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels.conversion import (
    DotMoeConfig,
    DotMoeForCausalLM,
    all_experts,
    count_parameters,
    find_ffns,
    interleave_storage,
    materialize,
    moe_blocks,
    restore_dense,
    self_check,
    swap_ffn,
)


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, **kwargs).logits


def has_layout(model):
    """down_proj is the transpose of a contiguous parameter [E, s, H] in every layer."""
    experts = [block.experts for block in moe_blocks(model).values()]
    return all(e.gate_up_proj.is_contiguous() and e.down_rows.is_contiguous() for e in experts) and all(
        e.down_proj.data_ptr() == e.down_rows.data_ptr() and e.down_proj.shape == (E, H, F // E) for e in experts
    )


# --- every backbone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKBONES)
def test_all_experts_is_the_dense_model(kind):
    model, x = dense_model(kind), tokens()
    expected = logits(model, x)
    sparse = materialize(model, DotMoeConfig(num_experts=E, top_k=K), random_layers(model))
    with all_experts(sparse):
        assert relative(logits(sparse, x), expected) < 5e-6
    assert relative(logits(sparse, x), expected) > 1e-2, "the router must matter outside the context"
    assert has_layout(sparse)


@pytest.mark.parametrize("kind", BACKBONES)
def test_routed_logits_are_the_masked_dense_model(kind):
    """Independent of the expert kernels: the dense model with the unselected neurons of every token zeroed."""
    sparse, x = sparse_model(kind), tokens()
    dense = restore_dense(sparse)
    chosen = {}
    hooks = [
        block.gate.register_forward_hook(lambda _, __, out, name=name: chosen.__setitem__(name, out[2]))
        for name, block in moe_blocks(sparse).items()
    ]
    routed = logits(sparse, x)
    for hook in hooks:
        hook.remove()
    for name, ffn in find_ffns(dense).items():
        expert_of = torch.empty(F, dtype=torch.int64)
        expert_of[moe_blocks(sparse)[name].neuron_order] = torch.arange(F) // (F // E)

        class Masked(nn.Module):
            def __init__(self, ffn, expert_of, indices):
                super().__init__()
                self.ffn, self.expert_of, self.indices = ffn, expert_of, indices

            def forward(self, hidden):
                f = self.ffn
                act = nn.SiLU() if f.activation == "silu" else nn.GELU(approximate="tanh")
                return reference.masked_ffn(
                    hidden.flatten(0, 1),
                    f.gate_proj,
                    f.up_proj,
                    f.down_proj,
                    self.expert_of,
                    self.indices,
                    activation=act,
                ).view_as(hidden)

        swap_ffn(dense, name, Masked(ffn, expert_of, chosen[name]))
    assert relative(routed, logits(dense, x)) < 5e-6


@pytest.mark.parametrize("kind", BACKBONES)
def test_generate_with_cache_equals_without(kind):
    model, x = sparse_model(kind), tokens()
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(x, use_cache=True, **options)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.filterwarnings("error")
def test_nothing_warns(kind):
    """Not of an argument that was given under the name of another version of transformers, for one."""
    model, x = sparse_model(kind), tokens()
    once = model(x, attention_mask=torch.ones_like(x))
    left = set(once.keys()) - set(model.config.keys_to_ignore_at_inference)
    assert left == {"logits"}, "what the Trainer gathers in an evaluation"
    further, names = tokens(length=1, seed=3), inspect.signature(type(model.backbone).forward).parameters
    name = next(n for n in ("cache", "past_key_values") if n in names)
    after = model(further, **{name: once[name]}).logits
    assert relative(after, logits(model, torch.cat([x, further], 1))[:, -1:]) < 1e-5
    model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, do_sample=False)
    model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, do_sample=False, use_cache=False)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_restored_bit_for_bit(kind, tie):
    model, x = dense_model(kind, tie_word_embeddings=tie), tokens()
    expected, state = logits(model, x), {n: t.clone() for n, t in model.state_dict().items()}
    sparse = materialize(model, DotMoeConfig(num_experts=E, top_k=K), random_layers(model))
    dense = restore_dense(sparse)
    assert type(dense) is type(AutoModelForCausalLM.from_config(sparse.config.dense_config))
    assert dense.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in dense.state_dict().items())
    assert (sparse.lm_head.weight is sparse.get_input_embeddings().weight) is tie
    assert (dense.lm_head.weight is dense.get_input_embeddings().weight) is tie
    assert torch.equal(logits(dense, x), expected)


# --- the model as transformers and torch use it ---------------------------------------------------------------------------


def test_state_dict_keys():
    dense = dense_model()
    ffn = {f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(2) for p in ("gate", "up", "down")}
    own = ("experts.gate_up_proj", "experts.down_rows", "gate.weight", "neuron_order")
    expected = (set(dense.state_dict()) - ffn) | {f"model.layers.{i}.mlp.{n}" for i in range(2) for n in own}
    state = sparse_model().state_dict()
    assert set(state) == expected
    shapes = [tuple(state[f"model.layers.0.mlp.{n}"].shape) for n in own]
    assert shapes == [(E, 2 * F // E, H), (E, F // E, H), (E, H), (F,)]
    assert state["model.layers.0.mlp.neuron_order"].dtype == torch.int64


def test_materialize_takes_over_tensors_and_frees_ffns():
    model = dense_model()
    embedding, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn.q_proj.weight
    layers, ffns = random_layers(model), find_ffns(model)
    gone = [weakref.ref(ffn.gate_proj) for ffn in ffns.values()]
    for name in ffns:  # as during alignment
        swap_ffn(model, name, nn.Identity())
    sparse = materialize(model, DotMoeConfig(num_experts=E, top_k=K), layers, ffns=ffns)
    gc.collect()
    assert sparse.model.embed_tokens.weight is embedding
    assert sparse.model.layers[0].self_attn.q_proj.weight is attention
    assert not ffns
    assert [ref() for ref in gone] == [None, None]
    order = sparse.model.layers[0].mlp.neuron_order
    assert torch.equal(layers["model.layers.0.mlp"][0][order], torch.arange(F) // (F // E))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype(dtype):
    model, x = sparse_model(), tokens()
    before, expected = [id(p) for p in model.parameters()], logits(model, x)
    model.to(dtype)
    assert [id(p) for p in model.parameters()] == before
    assert has_layout(model)
    assert model.dtype == dtype
    assert model.model.layers[0].mlp.neuron_order.dtype == torch.int64
    if dtype == torch.float64:
        assert relative(logits(model, x), expected.double()) < 5e-6
    with all_experts(model):
        bound = {torch.float64: 1e-13, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        assert relative(logits(model, x), logits(restore_dense(model), x)) < bound


def test_router_logits_are_float32_under_autocast():
    model, seen = sparse_model(), []
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model, tokens())
    assert seen == [(torch.float32, torch.float32)]
    assert low.dtype == torch.bfloat16
    model.to(torch.bfloat16)(tokens())
    assert seen[1] == (torch.bfloat16, torch.float32)


def test_deepcopy_and_pickle():
    model, x = sparse_model(tie_word_embeddings=True), tokens()
    expected = logits(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.backbone is not model.backbone
        assert other.backbone._modules is other._modules
        assert other.model.config is other.config.dense_config
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert has_layout(other)
        assert torch.equal(logits(other, x), expected)
        with torch.no_grad():
            other.model.layers[0].mlp.experts.down_proj.zero_()
        assert not torch.equal(logits(other, x), expected)
        assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("of_a_file", [True, False])
def test_load_state_dict_keeps_the_layout(assign, of_a_file):
    model, other = sparse_model(), sparse_model(seed=5)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    if of_a_file:
        for name in [n for n in state if n.endswith("down_rows")]:
            state[name.replace("down_rows", "down_proj")] = state.pop(name).transpose(1, 2).contiguous()
    names = list(state)
    other.load_state_dict(state, assign=assign)
    assert list(state) == names
    assert has_layout(other)
    assert torch.equal(logits(other, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("made", ["converted", "loaded", "drawn", "moved"])
def test_every_parameter_is_contiguous(made, tmp_path):
    """As FSDP2, flattening and safetensors want it, with one storage for all paths."""
    model = sparse_model()
    if made == "loaded":
        dk.save(model, tmp_path / "m")
        model = dk.load(tmp_path / "m")
    elif made == "drawn":
        model = DotMoeForCausalLM(model.config)
    elif made == "moved":
        model = copy.deepcopy(model).to(torch.bfloat16)
    assert all(p.is_contiguous() for p in model.parameters())
    assert has_layout(model)
    parameters = list(model.parameters())
    flat = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(flat * 2, parameters)
    assert torch.equal(torch.nn.utils.parameters_to_vector(parameters), flat * 2)
    safetensors.torch.save_file({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, tmp_path / "s.safetensors")


def test_lbfgs_takes_a_step():
    model, x = sparse_model().train(), tokens()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    assert float(closure().detach()) < first


def test_fully_sharded_training_equals_the_plain(tmp_path):
    """FSDP2 on one process: parameters become shards, and the loss and a step of SGD are the plain ones."""
    from torch.distributed.fsdp import fully_shard

    plain, sharded, x = sparse_model().train(), sparse_model().train(), tokens()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses = []
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                loss = model(x, labels=x).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
        assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_interleave_storage_keeps_parameters():
    model, x = sparse_model(), tokens()
    expected, down = logits(model, x), model.model.layers[0].mlp.experts.down_rows
    down.data = down.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert not has_layout(model)
    interleave_storage(model)
    interleave_storage(model)
    assert has_layout(model)
    assert model.model.layers[0].mlp.experts.down_rows is down
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_random_model_has_no_dense_weights_and_is_initialised(kind):
    config = sparse_model(kind).config
    model = DotMoeForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not find_gated(model)
    reference_buffers = dict(dense_model(kind).named_buffers())
    for name, buffer in model.named_buffers():
        if name in reference_buffers:
            assert torch.equal(buffer, reference_buffers[name])
    assert 0.5 < model.model.layers[0].mlp.experts.down_proj.std() / config.initializer_range < 2
    assert bool(torch.isfinite(logits(model, tokens())).all())
    with torch.device("meta"):
        assert {p.device.type for p in DotMoeForCausalLM(config).parameters()} == {"meta"}


def find_gated(model):
    return [n for n, m in model.named_modules() if hasattr(m, "up_proj")]


def test_gradients_reach_router_and_experts():
    model, x = sparse_model().train(), tokens()
    out = model(x, labels=x)
    out.loss.backward()
    for block in moe_blocks(model).values():
        for parameter in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_rows):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 1e-6
        assert block.experts.down_rows.grad.is_contiguous()


def test_gradients_equal_the_dense_models():
    dense = dense_model(dtype=torch.float64)
    sparse = materialize(copy.deepcopy(dense), DotMoeConfig(num_experts=E, top_k=K), random_layers(dense))
    x = tokens()
    dense(x, labels=x).loss.backward()
    with all_experts(sparse):
        sparse(x, labels=x).loss.backward()
    block, mlp = sparse.model.layers[0].mlp, dense.model.layers[0].mlp
    gate = block.experts.gate_up_proj.grad[:, : F // E].reshape(F, H)
    assert relative(gate, mlp.gate_proj.weight.grad[block.neuron_order]) < 1e-10
    down = block.experts.down_rows.grad.reshape(F, H)
    assert relative(down, mlp.down_proj.weight.grad.T[block.neuron_order]) < 1e-10


def test_gradient_checkpointing():
    model, x = sparse_model().train(), tokens()
    model(x, labels=x, use_cache=False).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with warnings.catch_warnings():  # the newer name is not there in every supported version
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    model(x, labels=x, use_cache=False).loss.backward()
    assert len(runs) == 2, "the layer is recomputed in the backward"
    assert all(torch.allclose(p.grad, plain[n], rtol=1e-5, atol=1e-7) for n, p in model.named_parameters())


def test_resize_embeddings():
    model, x = sparse_model(tie_word_embeddings=True), tokens()
    expected = logits(model, x)
    model.resize_token_embeddings(V + 6, mean_resizing=False)
    assert logits(model, x).shape[-1] == V + 6
    assert torch.equal(logits(model, x)[..., :V], expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == model.config.dense_config.vocab_size == V + 6
    model(x, labels=x).loss.backward()


def test_resize_embeddings_of_a_backbone_that_keeps_the_size():
    model = sparse_model("gemma3_text")
    model.resize_token_embeddings(V + 6, mean_resizing=False)
    assert model.backbone.vocab_size == V + 6
    model(tokens(), labels=tokens()).loss.backward()


def test_train_and_eval_reach_the_backbone():
    model = sparse_model()
    for mode in (True, False):
        model.train(mode)
        assert {m.training for m in (*model.modules(), model.backbone)} == {mode}


def test_restores_an_ffn_that_declares_up_first(monkeypatch):
    """Without storage, as when a checkpoint is loaded, gate and up cannot be told apart."""
    from transformers.models.llama import modeling_llama

    class UpFirst(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.up, self.gate = (nn.Linear(H, F, bias=False) for _ in range(2))
            self.down, self.act = nn.Linear(F, H, bias=False), nn.SiLU()

        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    monkeypatch.setattr(modeling_llama, "LlamaMLP", UpFirst)
    model = dense_model()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    dense = restore_dense(materialize(model, DotMoeConfig(num_experts=E, top_k=K), random_layers(model)))
    assert all(torch.equal(t, state[n]) for n, t in dense.state_dict().items())


def test_replacing_the_head_reaches_the_forward():
    model = sparse_model()
    model.lm_head = nn.Linear(H, 5, bias=False)
    assert logits(model, tokens()).shape[-1] == 5
    model.set_output_embeddings(nn.Linear(H, 7, bias=False))
    assert logits(model, tokens()).shape[-1] == 7


def test_attention_implementation():
    model, x = sparse_model(), tokens()
    expected = logits(model, x)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
    out = model(x, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2
    assert len(out.hidden_states) == 3
    assert relative(out.logits, expected) < 5e-6


def test_nothing_grows_per_call():
    model, x = sparse_model(), tokens()
    logits(model, x)
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    gc.collect()
    count = sum(type(o) is torch.Tensor for o in gc.get_objects())
    for _ in range(3):
        logits(model, x)
    gc.collect()
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == before
    assert sum(type(o) is torch.Tensor for o in gc.get_objects()) <= count


def test_all_experts_is_undone_after_an_error():
    model = sparse_model()
    with pytest.raises(RuntimeError, match="on purpose"), all_experts(model):
        raise RuntimeError("on purpose")
    assert not any(block.gate.bypass for block in moe_blocks(model).values())


@pytest.mark.parametrize("path", ["grouped", "decode", "masked"])
def test_paths_agree(path):
    model, x = sparse_model(), tokens()
    expected = logits(model, x)
    for block in moe_blocks(model).values():
        block.path = path
    assert relative(logits(model, x), expected) < 5e-6


def test_device_map_declarations():
    model = sparse_model()
    assert model._no_split_modules == {"LlamaDecoderLayer"}
    assert not any("mlp" in key for key in model._tp_plan)
    assert model.all_tied_weights_keys == {}
    assert sparse_model(tie_word_embeddings=True).all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_count_parameters():
    model = sparse_model(tie_word_embeddings=True)
    total, active = count_parameters(model)
    router = 2 * E * H
    assert total == sum(p.numel() for p in dense_model(tie_word_embeddings=True).parameters()) + router
    assert total - active == 2 * 3 * H * F * (E - K) // E


def test_self_check_passes_and_can_fail(tmp_path):
    model, x = dense_model(), tokens()
    expected = logits(model, x)
    sparse = materialize(model, DotMoeConfig(num_experts=E, top_k=K), random_layers(model))
    dk.save(sparse, tmp_path / "m")
    result = self_check(sparse, expected, x, folder=tmp_path / "m")
    assert result["passed"]
    assert result["reload_equal"]
    assert result["all_experts_error"] < 5e-6
    assert self_check(sparse, None, x)["passed"]
    assert self_check(sparse, restore_dense(sparse), x)["passed"]
    block = sparse.model.layers[1].mlp
    with torch.no_grad():
        block.experts.down_proj[3, 0, 0] += 1
    assert not self_check(sparse, expected, x)["passed"]
    assert not self_check(sparse, None, x, folder=tmp_path / "m")["reload_equal"]
    block.neuron_order[0] = block.neuron_order[1]
    assert not self_check(sparse, expected, x)["permutation"]


def test_registration_happens_on_first_access():
    code = (
        "import sys, dotmoe_kernels as dk, dotmoe_kernels.conversion as c\n"
        "assert 'transformers' not in sys.modules\n"
        "dk.load\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('dotmoe')).__name__)\n"
        "import importlib, dotmoe_kernels.models.modeling as m\n"
        "importlib.reload(m)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "DotMoeConfig"
