"""Zero experts: router rows whose choice is an empty slot; the op, the model that has some, and the fine-tuning that adds them."""

import copy
import importlib.util
import json

import pytest
import torch
from checks import DEVICES, compare, error
from shapes import normal, uniform
from test_cli import call, convert_arguments, prose, write_model
from test_stages import SHORT, finetune_arguments, progressions, soft_model, stages_of, states_equal
from tiny import E, H, K, dense_model, random_layers, sparse_model, tokens

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels.conversion import DotMoeConfig, all_experts, count_parameters, materialize, moe_blocks, restore_dense
from dotmoe_kernels.conversion.demo import train_tokenizer
from dotmoe_kernels.conversion.finetuning import FinetuneConfig, finetune
from dotmoe_kernels.conversion.zero_experts import add_zero_experts
from dotmoe_kernels.evaluation import collect_load
from dotmoe_kernels.models.card import model_card

LORA = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install '.[lora]'")
RANKS = pytest.mark.parametrize("rank", [0, pytest.param(2, marks=LORA)], ids=["every weight", "adapters"])
ZEROS = 3

# --- the op ---------------------------------------------------------------------------------------------------------------


def differentiable(routing):
    return routing.weights, routing.balance_loss, routing.z_loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("weights", ["unit", "softmax", "renormalized"])
@pytest.mark.parametrize(("T", "E", "N", "K"), [(63, 7, 2, 3), (50, 148, 40, 37), (9, 1, 1, 1), (20, 4, 9, 4)])
def test_equals_the_reference(T, E, N, K, weights, masked, device):
    logits, mask = normal(T, E + N, seed=0, scale=2.0), uniform(T, seed=1) < 0.7 if masked else None
    there = None if mask is None else mask.to(device)
    found = dk.route_top_k(logits.to(device), K, weights=weights, mask=there, num_zero_experts=N, zero_share=1.5)
    expected = reference.route_top_k(logits, K, weights=weights, mask=mask, num_zero_experts=N, zero_share=1.5)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert int(found.indices.max()) <= E
    assert bool(((found.weights == 0) == (found.indices == E)).all())
    assert found.load.shape == (E + N,)
    assert error(found.load, expected.load) < 1e-6

    def routed(route, mask):
        return lambda logits: differentiable(
            route(logits, K, weights=weights, mask=None if mask is None else mask.to(logits.device), num_zero_experts=N)
        )

    compare(routed(dk.route_top_k, mask), routed(reference.route_top_k, mask), device=device, logits=logits)


def test_the_balance_of_two_groups_is_that_of_the_formula():
    """(E + w N) / K (f_E P_E / E + f_N P_N / (w N)), f: slots a token and group; with its gradient by autograd."""
    T, E, N, K, w = 40, 8, 3, 2, 2.0
    logits = normal(T, E + N, seed=2).requires_grad_()
    found = dk.route_top_k(logits, K, num_zero_experts=N, zero_share=w).balance_loss
    (gradient,) = torch.autograd.grad(found, logits)
    chosen = logits.topk(K).indices
    f = torch.tensor([(chosen < E).sum(), (chosen >= E).sum()]).double() / T
    mean = logits.softmax(-1).mean(0)
    p = torch.stack([mean[:E].sum(), mean[E:].sum()])
    expected = (E + w * N) / K * (f[0] * p[0] / E + f[1] * p[1] / (w * N))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert error(gradient, torch.autograd.grad(expected, logits)[0]) < 1e-12
    assert torch.autograd.gradcheck(lambda z: dk.route_top_k(z, K, num_zero_experts=N).balance_loss, logits)


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_the_share_settles_where_the_formula_says(share):
    """Logits of two levels, moved by the balance alone."""
    E, N, K = 8, 4, 3
    noise, level = normal(4000, E + N, seed=3, dtype=torch.float32), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([level], lr=0.05)
    for _ in range(150):
        offset = torch.cat((torch.zeros(E), level.expand(N)))
        routing = dk.route_top_k(noise + offset, K, num_zero_experts=N, zero_share=share)
        optimizer.zero_grad()
        routing.balance_loss.backward()
        optimizer.step()
    settled = share * N / (share * N + E)
    assert float(routing.load[E:].sum()) == pytest.approx(settled, abs=0.08)
    assert routing.balance_loss.item() == pytest.approx(1, abs=0.02)


def test_no_zero_experts_is_the_op_as_it_was():
    logits = normal(20, 8, seed=4)
    for found, expected in zip(dk.route_top_k(logits, 2, num_zero_experts=0), dk.route_top_k(logits, 2), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_zero_experts": 8}, "num_zero_experts is 8; allowed: an integer from 0 to 7, below the columns of the logits"),
        ({"num_zero_experts": -1}, "num_zero_experts is -1; allowed: an integer from 0 to 7"),
        ({"num_zero_experts": 1.0}, r"num_zero_experts is 1\.0; allowed: an integer"),
        ({"num_zero_experts": 2, "zero_share": 0.0}, r"zero_share is 0\.0; allowed: a positive number"),
    ],
)
def test_bad_options_of_the_op(options, message):
    with pytest.raises(ValueError, match=message):
        dk.route_top_k(normal(3, 8, seed=0), 2, **options)


# --- the model ------------------------------------------------------------------------------------------------------------


def with_zeros(kind="llama", count=ZEROS, **kwargs):
    model = sparse_model(kind, **kwargs)
    add_zero_experts(model, count, seed=7)
    return model


def test_rows_are_drawn_around_those_there_are():
    model = with_zeros(count=400)
    for before, block in zip(moe_blocks(sparse_model()).values(), moe_blocks(model).values(), strict=True):
        old, new = block.gate.weight[:E], block.gate.weight[E:]
        assert torch.equal(old, before.gate.weight)
        assert new.shape == (400, H)
        deviation = old.std(0, unbiased=False)
        assert ((new.mean(0) - old.mean(0)).abs() < 5 * deviation / 20).all()
        assert torch.allclose(new.std(0), deviation, rtol=0.2)
    assert states_equal(with_zeros(), with_zeros())


@pytest.mark.parametrize("path", ["auto", "grouped", "decode", "masked"])
def test_a_token_that_chooses_zeros_alone_gets_nothing(path):
    model, x = with_zeros(), normal(5, H, seed=5, dtype=torch.float32)
    for block in moe_blocks(model).values():
        block.path = path
        weight = block.gate.weight.data
        weight[:] = 0
        weight[E:] = torch.sign(x[0])  # logits of the sum of |x| for the first token
        y, (_, weights, indices) = block(x), block.gate(x)
        assert torch.equal(indices[0], torch.full((K,), E))
        assert not weights[0].any()
        assert not y[0].any()
        assert torch.isfinite(y).all()


def test_every_expert_on_is_the_dense_model_still():
    dense, model, x = dense_model(), with_zeros(), tokens()
    with torch.no_grad(), all_experts(model):
        torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=1e-4, atol=1e-4)
    assert states_equal(restore_dense(model), dense)


def test_the_block_equals_the_experts_one_by_one():
    model, x = with_zeros(dtype=torch.float64), normal(40, H, seed=6)
    for block in moe_blocks(model).values():
        chosen = (x @ block.gate.weight.T).topk(K).indices
        assert (chosen >= E).any()
        expected = torch.zeros_like(x)
        for e in range(E):
            gate, up = (x @ block.experts.gate_up_proj[e].T).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].T
            expected += y * (chosen == e).any(-1, keepdim=True)
        assert error(block(x), expected) < 1e-12


def test_saved_and_loaded(tmp_path):
    model, x = with_zeros(), tokens()
    dk.save(model, tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["num_zero_experts"], config["format_version"]) == (ZEROS, 3)
    again = dk.load(tmp_path / "moe")
    assert states_equal(model, again)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    text = (tmp_path / "moe" / "README.md").read_text()
    assert f"| zero experts a layer | {ZEROS}, whose choice is nothing |" in text
    assert f"| experts a token | at most {K} |" in text


def test_generation_with_and_without_a_cache():
    model, x = with_zeros(), tokens(2, 5)
    cached, plain = (model.generate(x, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_counted_by_what_is_chosen():
    model = with_zeros()
    with collect_load(model) as counts, torch.no_grad():
        model(tokens(8, 16))
    means = counts.mean_active()
    assert all(0 < mean < K for mean in means.values())
    total, most = count_parameters(model)
    assert count_parameters(model, means)[1] < most
    assert total == count_parameters(sparse_model())[0] + 2 * ZEROS * H


def test_bad_models():
    with pytest.raises(ValueError, match="zero_experts is 2, of a model that has 3; allowed: 0, or a model without zero experts"):
        add_zero_experts(with_zeros(), 2)
    with pytest.raises(ValueError, match='zero_experts is 2, of a model of router "soft"; allowed: 0, or router "top_k"'):
        add_zero_experts(soft_model(), 2)
    with pytest.raises(ValueError, match="num_zero_experts is -1; allowed: an integer of at least 0"):
        DotMoeConfig(num_zero_experts=-1)
    with pytest.raises(ValueError, match='num_zero_experts is 1; allowed: 0 with router "soft"'):
        DotMoeConfig(num_zero_experts=1, router="soft")
    dense = dense_model()
    with pytest.raises(ValueError, match=r"config\.num_zero_experts is 1; allowed: 0: fine-tuning adds them"):
        materialize(dense, DotMoeConfig(num_experts=E, top_k=K, num_zero_experts=1), random_layers(dense))


def test_exports(tmp_path):
    dk.save(with_zeros(), tmp_path / "moe")
    for architecture in ("mixtral", "qwen2_moe", "qwen3_moe", "granite_moe", "glm4_moe"):
        reason = f"architecture is '{architecture}' of a model of 3 zero experts; allowed: none: in a stock router every choice"
        with pytest.raises(ValueError, match=reason):
            dk.export(tmp_path / "moe", tmp_path / architecture, architecture=architecture)
    with pytest.raises(ValueError, match=r"architecture is 'auto' of a model that none takes .*of 3 zero experts"):
        dk.export(tmp_path / "moe", tmp_path / "auto", architecture="auto")
    dk.export(tmp_path / "moe", tmp_path / "dense", architecture="dense")
    assert states_equal(type(dense_model()).from_pretrained(tmp_path / "dense"), dense_model())


# --- the fine-tuning ------------------------------------------------------------------------------------------------------


def tune(model=None, *, teacher="itself", **kwargs):
    fields = {n: kwargs.pop(n) for n in list(kwargs) if n in FinetuneConfig.__dataclass_fields__}
    values = {"steps": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 0, "zero_experts": ZEROS}
    model = sparse_model(initializer_range=0.1) if model is None else model
    teacher = model if teacher == "itself" else teacher
    return finetune(model, progressions(), FinetuneConfig(**(values | fields)), teacher=teacher, **kwargs)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@RANKS
def test_fine_tuning_adds_them(rank, tmp_path):
    static = sparse_model(initializer_range=0.1)
    model = tune(copy.deepcopy(static), lora_rank=rank, folder=tmp_path)
    assert model.config.num_zero_experts == ZEROS
    assert all(block.gate.weight.shape == (E + ZEROS, H) for block in moe_blocks(model).values())
    (figures,) = model.config.stages["finetune"]
    log = read_log(tmp_path)
    assert figures["teacher"] == "the model itself, before its zero experts"
    assert figures["zero"][0] > 0
    assert all(entry["loss"] == pytest.approx(entry["kl"] + 1e-3 * entry["z"] + 0.1 * entry["balance"], rel=1e-5) for entry in log)
    assert "| zero |" in model_card(model, "title", {})


def test_the_static_model_teaches(tmp_path):
    """With its own routing: the same as a copy that was made before."""
    model = sparse_model(initializer_range=0.1)
    before = copy.deepcopy(model)
    kls = {}
    for name, teacher in (("itself", model), ("copy", before)):
        tune(copy.deepcopy(before) if name == "copy" else model, teacher=teacher, steps=1, folder=tmp_path / name)
        kls[name] = read_log(tmp_path / name)[0]["kl"]
    assert kls["itself"] == kls["copy"] > 0


def test_the_balance_moves_their_share(tmp_path):
    def last(weight, share):
        folder = tmp_path / f"{weight}-{share}"
        tune(zero_balance=weight, zero_share=share, steps=40, lr=5e-3, folder=folder)
        return read_log(folder)[-1]["zero"]

    few, many = last(10.0, 0.2), last(10.0, 5.0)
    assert few < last(0.0, 2.0) < many


@RANKS
def test_resumes_bit_for_bit(tmp_path, rank):
    run = {"lora_rank": rank, "steps": 6, "checkpoint_every": 2}
    whole = tune(**run, folder=tmp_path / "whole")

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(**run, folder=tmp_path / "parts", on_step=stop)
    parts = tune(**run, folder=tmp_path / "parts", resume=True)
    assert states_equal(whole, parts)
    assert whole.config.stages == parts.config.stages
    with pytest.raises(ValueError, match="was written with "):
        tune(**run, zero_share=3.0, folder=tmp_path / "parts", resume=True)
    with pytest.raises(ValueError, match="was written with "):
        tune(**run, zero_experts=0, folder=tmp_path / "parts", resume=True)


def test_a_model_that_has_some_trains_on(tmp_path):
    model = tune(with_zeros(initializer_range=0.1), zero_experts=0, teacher=None, folder=tmp_path)
    assert model.config.num_zero_experts == ZEROS
    log = read_log(tmp_path)
    assert all(entry["loss"] == pytest.approx(entry["ce"] + 1e-3 * entry["z"] + 0.1 * entry["balance"], rel=1e-5) for entry in log)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype):
    model = tune(sparse_model(dtype=dtype, initializer_range=0.1), steps=2)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_experts": -1}, "zero_experts is -1; allowed: an integer of at least 0"),
        ({"zero_share": 0}, "zero_share is 0; allowed: a positive number"),
        ({"zero_balance": -1.0}, "zero_balance is -1.0; allowed: a number of at least 0"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**fields)


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_commands(capsys, tmp_path):
    write_model(tmp_path / "dense", train_tokenizer([prose(60)], vocab_size=300))
    (tmp_path / "text.txt").write_text(prose(60))
    assert call(capsys, *convert_arguments(tmp_path, tmp_path / "moe"))[0] == 0
    arguments = finetune_arguments(tmp_path / "moe", tmp_path / "text.txt", tmp_path / "zeda", *SHORT[2:], "--zero-experts", "2")
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    (figures,) = stages_of(tmp_path / "zeda")["finetune"]
    assert figures["teacher"] == "the model itself, before its zero experts"
    assert ", zero " in out
    model = dk.load(tmp_path / "zeda")
    K = model.config.num_experts_per_tok

    status, out, err = call(capsys, "eval", tmp_path / "zeda", "--data", tmp_path / "text.txt", "--sequence-length", "16")
    assert (status, err) == (0, "")
    assert f" of the K {K} slots of a token are empty in the mean" in out
    status, text, _ = call(capsys, "eval", tmp_path / "zeda", "--data", tmp_path / "text.txt", "--sequence-length", "16", "--json")
    report = json.loads(text)
    assert report["mean_active_experts"] < K
    assert f"zero experts: {1 - report['mean_active_experts'] / K:.1%} of the K" in out
    assert report["active_parameters"] < count_parameters(model)[1]

    status, out, _ = call(capsys, "info", tmp_path / "zeda")
    assert "num_zero_experts: 2\n" in out
    assert "zero experts 2" in out
    status, out, _ = call(capsys, "info", "--paths", tmp_path / "zeda")
    assert status == 0
    arguments[1], arguments[5] = tmp_path / "zeda", tmp_path / "again"
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert err == "dotmoe convert: error: --zero-experts is 2, of a model that has 2; allowed: 0, or a model without zero experts\n"
    status, _, err = call(capsys, *convert_arguments(tmp_path, tmp_path / "x", "--zero-experts", "2"))
    assert (status, err) == (2, "dotmoe convert: error: --zero-experts is 2; allowed: together with --stage finetune\n")
