"""convert: every method end to end on a tiny model, a dense model that is whole after any failure, bad input."""

import copy
import dataclasses
import warnings

import pytest
import torch
from tiny import E, F, H, K, V, dense_model, sparse_model, tokens
from torch import nn
from transformers import LlamaForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.ranks import Ranks
from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, find_ffns, moe_blocks, self_check, starts
from dotmoe_kernels.conversion import pipeline as module
from dotmoe_kernels.conversion.pipeline import METHODS

METHOD = pytest.mark.parametrize("method", METHODS)
DATA = tokens(6, 12, seed=5)


def topology(**fields):
    return DotMoeConfig(**({"num_experts": E, "top_k": K} | fields))


def options(**fields):
    return AlignmentConfig(**({"steps": 3, "batch_size": 2, "num_iters": 10, "checkpoint_every": 0} | fields))


def convert(model=None, config=None, **kwargs):
    kwargs = {"data": DATA, "alignment": options()} | kwargs
    return dk.convert(dense_model() if model is None else model, topology() if config is None else config, **kwargs)


def logits(model, x=None):
    with torch.no_grad():
        return model(tokens() if x is None else x, use_cache=False).logits


def assignment(model):
    return {name: block.neuron_order.clone() for name, block in moe_blocks(model).items()}


def routers(model):
    return {name: block.gate.weight.detach().clone() for name, block in moe_blocks(model).items()}


def same(a, b):
    return {name: torch.equal(a[name], b[name]) for name in a}


# --- every method ---------------------------------------------------------------------------------------------------------


@METHOD
def test_conversion_end_to_end(method):
    model = dense_model()
    expected = logits(model)
    state = {n: p.clone() for n, p in model.state_dict().items() if ".mlp." not in n}
    sparse = convert(model, method=method)
    assert isinstance(sparse, DotMoeForCausalLM)
    assert not sparse.training
    checks = self_check(sparse, expected, tokens())
    assert checks["passed"], checks
    assert not torch.allclose(logits(sparse), expected, rtol=0.1)
    for name, value in state.items():
        assert torch.equal(sparse.state_dict()[name], value), name
    assert sparse.config.assignment == {
        "method": method,
        "init": {"dot": "noise"}.get(method, method),
        "steps": 3,
        "seed": 0,
        "tokens": 3 * 2 * 12,
    }
    assert all(p.requires_grad for p in sparse.model.embed_tokens.parameters())


@METHOD
def test_every_expert_on_gives_the_dense_logits(method):
    model = dense_model()
    expected = logits(model)
    sparse = convert(model, topology(top_k=E), method=method)
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@METHOD
def test_the_seed_fixes_everything(method):
    first, again, other = (convert(method=method, alignment=options(seed=seed)) for seed in (0, 0, 1))
    assert all(same(first.state_dict(), again.state_dict()).values())
    assert not any(same(assignment(first), assignment(other)).values())
    assert not any(same(routers(first), routers(other)).values())


@pytest.mark.parametrize("method", ["random", "kmeans", "activation", "shared"])
def test_a_fixed_method_trains_its_router_alone(method):
    before, after = (convert(method=method, alignment=options(steps=steps)) for steps in (0, 5))
    assert all(same(assignment(before), assignment(after)).values())
    assert not any(same(routers(before), routers(after)).values())
    assert before.config.assignment["steps"] == 0


def test_dot_changes_its_assignment():
    before, after = (convert(alignment=options(steps=steps, affinity_lr=0.1)) for steps in (0, 8))
    assert not any(same(assignment(before), assignment(after)).values())
    assert not any(same(routers(before), routers(after)).values())


@pytest.mark.parametrize("init", ["kmeans", "activation", "shared"])
def test_dot_starts_from_a_partition(init):
    partition = convert(method=init, alignment=options(steps=0))
    begun = convert(alignment=options(steps=0, init=init))
    first = "model.layers.0.mlp"  # the layers draw from one generator: only the first sees the same numbers
    assert torch.equal(assignment(begun)[first], assignment(partition)[first])
    assert torch.equal(routers(begun)[first], routers(partition)[first])
    assert not any(same(assignment(begun), assignment(convert(alignment=options(steps=0, init="noise")))).values())
    assert begun.config.assignment["init"] == init


def test_auto_is_the_shared_start_where_the_inputs_share_a_vector():
    plain = [convert(alignment=options(steps=0, **init)) for init in ({}, {"init": "auto"}, {"init": "noise"})]
    assert {model.config.assignment["init"] for model in plain} == {"noise"}
    assert all(all(same(routers(plain[0]), routers(other)).values()) for other in plain[1:])

    def alike():
        model = dense_model()
        with torch.no_grad():
            model.model.embed_tokens.weight += 3 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        return model

    model, inputs = alike(), []
    ffns = find_ffns(model)
    handles = [ffn.module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1))) for ffn in ffns.values()]
    with torch.no_grad():
        model(input_ids=DATA)
    assert len(inputs) == 2
    for handle in handles:
        handle.remove()
    shares = [float(x.mean(0).square().sum() / x.square().sum(1).mean()) for x in inputs]
    assert starts.constant_share(model, ffns, DATA) == pytest.approx(sum(shares) / 2, rel=1e-5)
    plainly = dense_model()
    assert sum(shares) / 2 > 0.3 > 0.15 > starts.constant_share(plainly, find_ffns(plainly), DATA)
    assert not any(ffn.module._forward_pre_hooks for ffn in ffns.values())
    found = [convert(alike(), alignment=options(steps=0, **init)) for init in ({}, {"init": "shared"})]
    assert {model.config.assignment["init"] for model in found} == {"shared"}
    assert all(same(routers(found[0]), routers(found[1])).values())
    assert convert(alignment=options(steps=0, shared=1)).config.assignment["init"] == "shared", "asked for by its option"
    with pytest.warns(UserWarning, match="the router is random"):
        assert convert(data=None).config.assignment["init"] == "noise"


class OneOf(Ranks):
    """Keeps what it would add to that of the others."""

    def sum(self, tensors):
        self.given = tensors[0].clone()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ranks_measure_the_constant_share_of_their_own_sequences(count):
    """Four sequences, of which the last of three ranks has none, nor has the last of five."""
    model, rows = dense_model(), []
    ffns, data = find_ffns(model), tokens(4, 512 + 1, seed=5)
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    ranks = [OneOf(rank, count) for rank in range(count)]
    for each in ranks:
        starts.constant_share(model, ffns, data, each)
    assert rows == {2: [2, 2], 3: [2, 2, 1], 5: [1, 1, 1, 1, 1]}[count]
    total = sum(each.given for each in ranks)
    share = (total[:, :-1].square().sum(-1) / total[:, -1]).mean()
    assert starts.constant_share(model, ffns, data) == pytest.approx(float(share), rel=1e-5)


def test_dot_from_a_partition_may_leave_it():
    partition = convert(method="kmeans", alignment=options(steps=0))
    learned = convert(alignment=options(steps=10, init="kmeans", init_strength=0.05, affinity_lr=0.2))
    first = "model.layers.0.mlp"
    assert not torch.equal(assignment(learned)[first], assignment(partition)[first])


def test_methods_share_data_order_and_router_training():
    """The comparison is fair: at the start the KL of every fixed method differs by its partition alone."""
    seen = {}

    def record(model, layers, data, config, **kwargs):
        top_k = [layer.top_k for layer in layers.values()]
        seen[kwargs["label"]] = (dataclasses.replace(config, init="noise"), data.clone(), top_k)
        return real(model, layers, data, config, **kwargs)

    real = module.align
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "align", record)
        for method in METHODS:
            convert(method=method)
    assert list(seen) == list(METHODS)
    assert all(c == seen["dot"][0] and torch.equal(d, seen["dot"][1]) and k == seen["dot"][2] for c, d, k in seen.values())


def test_rows_may_come_one_by_one():
    a, b = convert(), convert(data=iter(DATA))
    assert all(same(a.state_dict(), b.state_dict()).values())
    c = convert(data=[row.tolist() for row in DATA])
    assert all(same(a.state_dict(), c.state_dict()).values())
    d = convert(data=DATA.to(torch.int32))
    assert all(same(a.state_dict(), d.state_dict()).values())


def test_training_lowers_the_loss():
    fields = {"affinity_lr": 0.1, "router_lr": 0.02, "batch_size": 6, "init": "noise"}
    before, after = (convert(alignment=options(steps=steps, **fields)) for steps in (0, 40))
    dense = logits(dense_model(), DATA).log_softmax(-1)

    def kl(model):
        return float((dense.exp() * (dense - logits(model, DATA).log_softmax(-1))).sum(-1).mean())

    assert kl(after) < 0.8 * kl(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_keep_their_dtype(dtype):
    sparse = convert(dense_model(dtype=dtype), method="dot")
    blocks = moe_blocks(sparse).values()
    assert all(b.experts.gate_up_proj.dtype == b.experts.down_proj.dtype == dtype for b in blocks)
    assert torch.isfinite(logits(sparse)).all()


def test_the_callers_config_is_left_alone():
    config = topology()
    before = config.to_dict()
    convert(config=config)
    assert config.to_dict() == before


def test_flags_of_the_parameters_survive():
    model = dense_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    sparse = convert(model)
    assert not sparse.model.embed_tokens.weight.requires_grad
    assert sparse.model.norm.weight.requires_grad
    assert all(p.requires_grad for block in moe_blocks(sparse).values() for p in block.experts.parameters())


# --- no data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dot", "random", "kmeans"])
def test_no_data_gives_a_random_router_and_says_so(method):
    model = dense_model(hidden_size=64, head_dim=16)
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"data is None: nothing is trained, the router is random \(N\(0, 0.01\)\)") as caught:
        sparse = convert(model, method=method, data=None)
    assert caught[0].filename == __file__ or "test_convert" in caught[0].filename
    weight = torch.cat(list(routers(sparse).values()))
    assert float(weight.std()) == pytest.approx(0.01, rel=0.1)
    assert sparse.config.assignment["steps"] == sparse.config.assignment["tokens"] == 0
    assert self_check(sparse, expected, tokens())["passed"]


def test_data_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert()


# --- whole again after a failure ------------------------------------------------------------------------------------------


def snapshot(model):
    return {
        "modules": {name: id(m) for name, m in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
    }


def assert_whole(model, before):
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["training"] == before["training"]
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (key, flag, value) in before["parameters"].items():
        assert after["parameters"][name][:2] == (key, flag), name
        assert torch.equal(after["parameters"][name][2], value), name


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["align", "align, trained", "activation_partition", "collect_inputs", "start_affinity"])
def test_the_dense_model_is_whole_after_an_error(monkeypatch, where, error, mode):
    model = dense_model().train(mode != "eval")
    if mode == "mixed":
        model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, expected = snapshot(model), logits(copy.deepcopy(model).eval())
    kwargs = {"method": "activation"}
    if where == "align, trained":
        real = module.align

        def interrupted(*args, **rest):
            def on_step(done):
                if done == 2:
                    raise error("on the way")

            return real(*args, **rest, on_step=on_step)

        monkeypatch.setattr(module, "align", interrupted)
    else:

        def raising(*args, **rest):
            raise error("on the way")

        monkeypatch.setattr(starts if where == "activation_partition" else module, where, raising)
    if where == "start_affinity":
        kwargs = {"alignment": options(init="activation")}
    with pytest.raises(error, match="on the way"):
        convert(model, **kwargs)
    assert_whole(model, before)
    assert torch.equal(logits(model.eval()), expected)
    monkeypatch.undo()
    assert self_check(convert(model), expected, tokens())["passed"]  # and can be converted


def test_the_dense_model_is_whole_after_a_loss_that_is_not_finite(tmp_path):
    model = dense_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.inf
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match=r"at step 1 in the output head .*last good checkpoint: none"):
        convert(model, folder=tmp_path)
    assert_whole(model, before)


def test_a_layer_that_turns_non_finite_is_named(tmp_path, monkeypatch):
    real = module.align

    def poisoned(model, layers, *args, **kwargs):
        def on_step(done):
            if done == 4:
                layers["model.layers.1.mlp"].down_proj.data = layers["model.layers.1.mlp"].down_proj * torch.nan

        return real(model, layers, *args, **kwargs, on_step=on_step)

    monkeypatch.setattr(module, "align", poisoned)
    model = dense_model()
    before = snapshot(model)
    message = r"at step 5 in layer model\.layers\.1\.mlp .*last good checkpoint: .*step-0000003\.pt"
    with pytest.raises(FloatingPointError, match=message):
        convert(model, folder=tmp_path, alignment=options(steps=6, checkpoint_every=3))
    assert_whole(model, before)


def test_non_finite_attention_is_named_by_the_layer_it_enters():
    model = dense_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"at step 1 in layer model\.layers\.1\.mlp "):
        convert(model, alignment=options(init="noise"))
    for init in ("auto", "activation"):
        with pytest.raises(FloatingPointError, match=r"what enters layer model\.layers\.1\.mlp of the dense model is not finite"):
            convert(model, alignment=options(init=init))


@METHOD
def test_an_interrupted_conversion_resumes_bit_for_bit(tmp_path, monkeypatch, method):
    run = {"method": method, "alignment": options(steps=6, checkpoint_every=3, affinity_lr=0.1)}
    whole = convert(**run, folder=tmp_path / "whole")
    real = module.align

    def interrupted(*args, **kwargs):
        def on_step(done):
            if done == 4:
                raise KeyboardInterrupt

        return real(*args, **kwargs, on_step=on_step)

    monkeypatch.setattr(module, "align", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(**run, folder=tmp_path / "parts")
    monkeypatch.undo()
    parts = convert(**run, folder=tmp_path / "parts", resume=True)
    assert all(same(whole.state_dict(), parts.state_dict()).values())
    assert whole.state_dict().keys() == parts.state_dict().keys()
    assert torch.equal(logits(whole), logits(parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "random"}, "written with method = 'dot'; this run has 'random'"),
        ({"config": {"top_k": 3}}, r"written with topology = \[8, 2\]; this run has \[8, 3\]"),
        ({"data": DATA.flip(0)}, "written with tokens = "),
        ({"model": {"tie_word_embeddings": True}}, "written with model = "),
        ({"model": {"seed": 1}}, "written with weights = "),
    ],
    ids=["method", "topology", "other text", "another model", "other weights"],
)
def test_a_checkpoint_of_another_conversion(tmp_path, change, message):
    run = {"alignment": options(steps=3)}
    convert(**run, folder=tmp_path)
    change = dict(change)
    model, config = dense_model(**change.pop("model", {})), topology(**change.pop("config", {}))
    before = snapshot(model)
    with pytest.raises(ValueError, match="step-0000003.pt was " + message):
        convert(model, config, **(run | change), folder=tmp_path, resume=True)
    assert_whole(model, before)


# --- bad input ------------------------------------------------------------------------------------------------------------


def rejected(message, model=None, config=None, **kwargs):
    """ValueError with this message, and the model as it was."""
    model = dense_model() if model is None else model
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model, config, **kwargs)
    assert_whole(model, before)


def test_an_unknown_method():
    rejected(r"method is 'moe'; allowed: dot \| random \| kmeans \| activation", method="moe")


def test_experts_that_do_not_divide_the_width():
    rejected(rf"num_experts is 7; allowed: a divisor of F = {F}, such as 8", config=topology(num_experts=7))


@pytest.mark.parametrize("top_k", [0, -1, E + 1, 1.5])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}; allowed: an integer from 1 to num_experts = {E}"):
        topology(top_k=top_k)
    config = topology()
    config.num_experts_per_tok = top_k  # set past the config's own check
    rejected(rf"top_k is {top_k}; allowed: an integer from 1 to num_experts = {E}", config=config)


@pytest.mark.parametrize("value", [V, V + 100, -1])
def test_token_ids_outside_the_vocabulary(value):
    data = DATA.clone()
    data[2, 3] = value
    low, high = (value, "[0-9]+") if value < 0 else ("[0-9]+", value)
    rejected(rf"data is in \[{low}, {high}\]; allowed: entries from 0 to {V - 1}", data=data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), r"data is of shape \[0, 8\]; allowed: sequences of at least 2 tokens"),
        (torch.zeros(3, 1, dtype=torch.int64), r"data is of shape \[3, 1\]; allowed: sequences of at least 2 tokens"),
        (torch.zeros(8, dtype=torch.int64), r"data is of shape \[8\]; allowed: shape \[N, S\]"),
        (torch.zeros(2, 8), "data is of dtype torch.float32; allowed: int64 or int32"),
        ([], "data is empty; allowed: sequences of at least 2 tokens"),
        (iter(()), "data is empty; allowed: sequences of at least 2 tokens"),
        ([[3, 4, 5], [3, 4]], r"data is of sequences of 2 to 3 tokens; allowed: sequences of one length"),
    ],
    ids=["empty", "one token", "rank", "dtype", "an empty list", "an empty iterator", "ragged"],
)
def test_bad_data(data, message):
    rejected(message, data=data)


@pytest.mark.parametrize("kind", ["activation", "shared"])
@pytest.mark.parametrize("where", ["method", "init"])
def test_a_start_that_needs_data_without_data(kind, where):
    kwargs = {"method": kind} if where == "method" else {"alignment": options(init=kind)}
    rejected(f'data is None; allowed: token sequences to calibrate on, for "{kind}"', data=None, **kwargs)


def test_as_many_shared_experts_as_a_token_has():
    rejected(f"shared is {K + 1}; allowed: at most K = {K}", alignment=options(init="shared", shared=K + 1))
    assert convert(alignment=options(init="shared", shared=K, steps=0)).config.assignment["init"] == "shared"


def test_a_config_of_another_kind():
    rejected("config is a LlamaConfig; allowed: a DotMoeConfig", config=dense_model().config)


def test_an_already_converted_model():
    rejected("model is DotMoeForCausalLM, which is already converted; allowed: a dense model", model=sparse_model())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_sparse_model(kind):
    model = dense_model(kind, num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    rejected(r"(?i)(sparse|experts)", model=model)


def test_a_model_without_a_recognisable_ffn():
    model = dense_model("gpt2", n_embd=H, n_layer=1, n_head=2, n_inner=F)
    rejected("in which no FFN was recognised: the nearest is transformer.h.0.mlp", model=model)


def test_a_model_without_linear_layers():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="no FFN was recognised: there is no linear layer in it"):
        find_ffns(model)
    with pytest.raises(ValueError, match="model is a Sequential; allowed: a dense causal LM of transformers"):
        convert(model)


class Subclass(LlamaForCausalLM):
    pass


def test_a_class_of_ones_own_is_refused_before_the_training(monkeypatch):
    monkeypatch.setattr(module, "align", None)
    rejected("model is a Subclass; allowed: the causal LM of its config, LlamaForCausalLM", model=Subclass(dense_model().config))


def test_layers_of_different_width_are_refused_before_the_training(monkeypatch):
    monkeypatch.setattr(module, "align", None)
    model, wide = dense_model(), dense_model(intermediate_size=2 * F)
    model.model.layers[1].mlp = wide.model.layers[1].mlp
    given = rf"model.layers.1.mlp.gate_proj.weight is of shape \[{2 * F}, {H}\]; allowed: \[{F}, {H}\], as its config says"
    rejected(given, model=model)
