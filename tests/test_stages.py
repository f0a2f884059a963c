"""Stages: reconstruct lowers every layer's error and is what align starts from; fine-tuning learns; each resumes bit for bit."""

import copy
import importlib.util
import json
import resource
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_cli import call, contents, convert_arguments, prose, write_model
from test_finetune import checkpointing
from tiny import E, F, K, V, dense_model, sparse_model, tokens

import dotmoe_kernels as dk
from dotmoe_kernels.alignment import reconstruction as module
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.module import AlignmentFFN, all_experts, collect_inputs
from dotmoe_kernels.alignment.reconstruction import reconstruct
from dotmoe_kernels.conversion import DotMoeConfig, find_ffns, finetuning, moe_blocks, pipeline, self_check, swap_ffn
from dotmoe_kernels.conversion.demo import train_tokenizer
from dotmoe_kernels.conversion.finetuning import FinetuneConfig, finetune
from dotmoe_kernels.evaluation import reconstruction_error
from dotmoe_kernels.models.card import model_card

DATA = tokens(32, 16, seed=5)
ROUTERS = pytest.mark.parametrize("router", ["top_k", "soft"])
LORA = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install '.[lora]'")


def options(**fields):
    values = {"steps": 30, "batch_size": 4, "num_iters": 10, "router_lr": 0.02, "affinity_lr": 0.05, "checkpoint_every": 0}
    return AlignmentConfig(**(values | fields))


def prepared(*, router="top_k", fixed=False, seed=0):
    """(dense model with AlignmentFFNs in place, the AlignmentFFNs)."""
    model, draw = dense_model(), torch.Generator().manual_seed(seed)
    layers = {}
    for name, ffn in find_ffns(model).items():
        weights = (ffn.gate_proj.data, ffn.up_proj.data, ffn.down_proj.data)
        layers[name] = AlignmentFFN(
            *weights,
            router_weight=0.01 * torch.randn(E, weights[0].shape[1], generator=draw),
            top_k=K,
            activation=ffn.activation,
            affinity=None if fixed else 0.01 * torch.randn(F, E, generator=draw),
            expert_of=torch.randperm(F, generator=draw) % E if fixed else None,
            router=router,
        )
        swap_ffn(model, name, layers[name])
    return model, layers


def run(model, layers, config=None, **kwargs):
    return reconstruct(model, layers, DATA, config or options(), **({"progress": False, "batch_tokens": 64} | kwargs))


def learned(layers):
    """Every trained tensor and the assignments, by layer."""
    affinity = {n: layer.affinity.detach().clone() for n, layer in layers.items() if layer.affinity is not None}
    rest = {n: (layer.router_weight.detach().clone(), layer.expert_of.clone()) for n, layer in layers.items()}
    return affinity, rest


def same(a, b):
    return all(torch.equal(a[0][n], b[0][n]) for n in a[0]) and all(
        torch.equal(x, y) for n in a[1] for x, y in zip(a[1][n], b[1][n], strict=True)
    )


# --- reconstruct ------------------------------------------------------------------------------------------------------


@ROUTERS
@pytest.mark.parametrize("fixed", [False, True], ids=["dot", "fixed"])
def test_the_error_falls_in_every_layer(router, fixed):
    model, layers = prepared(router=router, fixed=fixed)
    before = {n: layer.expert_of for n, layer in layers.items()}
    result = run(model, layers)
    assert list(result.errors) == list(layers)
    assert result.tokens == 30 * 16  # of 32 sequences two are held out
    assert all(after < (0.97 if fixed else 0.9) * first for first, after in result.errors.values()), result.errors
    for name, layer in layers.items():
        assert torch.bincount(layer.expert_of, minlength=E).tolist() == [F // E] * E
        assert layer.plan is None
        assert layer.router_weight.grad is None
        assert not fixed or torch.equal(layer.expert_of, before[name])


def test_the_errors_are_those_of_the_ffns_on_sequences_held_out():
    model, layers = prepared()
    result = run(model, layers, options(steps=4))
    x = collect_inputs(model, layers, DATA[-2:])
    for name, layer in layers.items():
        with torch.no_grad():
            found = layer(x[name])
            with all_experts({name: layer}):
                expected = layer(x[name])
        assert reconstruction_error(expected, found) == pytest.approx(result.errors[name][1], rel=1e-5)


def test_few_inputs_at_a_time_give_the_same(monkeypatch):
    model, layers = prepared()
    whole = run(model, layers, options(steps=4))
    sizes, real = [], module.collect_inputs

    def collect(model, layers, tokens, **kwargs):
        sizes.append(len(layers))
        return real(model, layers, tokens, **kwargs)

    monkeypatch.setattr(module, "_MEMORY", 1)
    monkeypatch.setattr(module, "collect_inputs", collect)
    model, again = prepared()
    assert run(model, again, options(steps=4)).errors == whole.errors
    assert sizes == [1, 1]
    assert same(learned(layers), learned(again))


def test_layers_that_are_done_are_taken_over(tmp_path, monkeypatch):
    model, layers = prepared()
    whole = run(model, layers, options(steps=4))
    real, fitted = module._fit, []

    def interrupted(name, *args):
        if fitted:
            raise KeyboardInterrupt
        fitted.append(name)
        return real(name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_fit", interrupted)
        model, parts = prepared()
        with pytest.raises(KeyboardInterrupt):
            run(model, parts, options(steps=4), folder=tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.pt")] == ["layer-0000/step-0000004.pt"]
    model, again = prepared()
    monkeypatch.setattr(module, "_fit", lambda name, *args: fitted.append(name) or real(name, *args))
    assert run(model, again, options(steps=4), folder=tmp_path, resume=True).errors == whole.errors
    assert fitted == list(layers)  # the second one alone was trained again
    assert same(learned(layers), learned(again))
    for change in ({"seed": 1}, {"steps": 5}):
        with pytest.raises(ValueError, match="was written with"):
            run(*prepared(), options(**({"steps": 4} | change)), folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="was written with model = None; this run has 'another'"):
        run(*prepared(), options(steps=4), folder=tmp_path, resume=True, fingerprint={"model": "another"})


@pytest.mark.parametrize("stage", ["reconstruct", "finetune"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path, stage):
    train = {
        "reconstruct": lambda: run(*prepared(), options(steps=1), folder=tmp_path),
        "finetune": lambda: tune(steps=1, folder=tmp_path),
    }[stage]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ([] if stage == "reconstruct" else ["log.jsonl"])


def test_the_plan_may_be_rounded_now_and_then(monkeypatch):
    seen, refresh = [], module.Transport.refresh

    def spy(self, tau, *, rounding=True):
        seen.append(rounding)
        return refresh(self, tau, rounding=rounding)

    monkeypatch.setattr(module.Transport, "refresh", spy)
    run(*prepared(), options(steps=4, refresh_every=3))
    assert seen == 2 * [True, True, False, False, True, True]  # of each layer before, the four steps and after


def test_the_dense_model_is_whole_after_an_interruption(monkeypatch):
    model = dense_model()
    with torch.no_grad():
        expected = model(DATA).logits

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dk.convert(model, DotMoeConfig(num_experts=E, top_k=K), data=DATA, alignment=options(), stages=["reconstruct"])
    with torch.no_grad():
        assert torch.equal(model(DATA).logits, expected)
    assert all(p.requires_grad for p in model.parameters())


def test_what_the_joint_training_alone_reads_may_change(tmp_path):
    run(*prepared(), options(steps=1), folder=tmp_path)
    run(*prepared(), options(steps=1, kl=1.0, micro_batch_size=2), folder=tmp_path, resume=True)


def test_the_rest_of_the_model_is_left_alone():
    model, layers = prepared()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".mlp." not in n}
    weights = {n: [w.clone() for w in (f.gate_proj, f.up_proj, f.down_proj)] for n, f in layers.items()}
    run(model, layers, options(steps=2))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(
        torch.equal(w, old)
        for n, f in layers.items()
        for w, old in zip((f.gate_proj, f.up_proj, f.down_proj), weights[n], strict=True)
    )


def test_a_layer_that_is_not_finite_is_named():
    model, layers = prepared()
    layers["model.layers.1.mlp"].down_proj[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"at step 1 of the reconstruction in layer model\.layers\.1\.mlp"):
        run(model, layers)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": 0}, "tokens is 0; allowed: an integer of at least 1"),
        ({"batch_tokens": 0}, "batch_tokens is 0; allowed: an integer of at least 1"),
        ({"layers": {}}, "layers is empty; allowed: at least one FFN"),
    ],
)
def test_bad_arguments_of_reconstruct(kwargs, message):
    model, layers = prepared()
    with pytest.raises(ValueError, match=message):
        run(model, kwargs.pop("layers", layers), **kwargs)


# --- reconstruct before align -----------------------------------------------------------------------------------------


def convert(stages=("reconstruct", "align"), **kwargs):
    values = {"data": DATA, "alignment": options(steps=4), "reconstruct_steps": 4}
    return dk.convert(dense_model(), DotMoeConfig(num_experts=E, top_k=K), stages=stages, **(values | kwargs))


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_align_starts_from_the_reconstruction(monkeypatch):
    alone = convert(["reconstruct"])
    seen, real = {}, pipeline.align

    def align(model, layers, *args, **kwargs):
        seen.update({n: (f.router_weight.detach().clone(), f.expert_of.clone()) for n, f in layers.items()})
        return real(model, layers, *args, **kwargs)

    monkeypatch.setattr(pipeline, "align", align)
    both = convert(["align", "reconstruct"])  # in whatever order they are given
    for name, block in moe_blocks(alone).items():
        assert torch.equal(block.gate.weight, seen[name][0])
        assert torch.equal(block.neuron_order, dk.neuron_order(seen[name][1]))
    assert not states_equal(both, alone)
    assert list(both.config.stages) == ["reconstruct", "align"]
    assert both.config.stages["reconstruct"] == alone.config.stages["reconstruct"]
    assert self_check(alone, dense_model(), tokens())["passed"]


def test_both_stages_resume_bit_for_bit(tmp_path, monkeypatch):
    run = {"alignment": options(steps=4, checkpoint_every=2)}
    whole, real = convert(**run, folder=tmp_path / "whole"), pipeline.align

    def interrupted(*args, **kwargs):
        def on_step(done):
            if done == 3:
                raise KeyboardInterrupt

        return real(*args, **kwargs, on_step=on_step)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "align", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(**run, folder=tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fit", None)  # every layer is done
        parts = convert(**run, folder=tmp_path / "parts", resume=True)
    assert states_equal(whole, parts)
    assert whole.config.stages == parts.config.stages
    with pytest.raises(ValueError, match="was written with reconstruct_steps = 4; this run has 0"):
        convert(["align"], **run, folder=tmp_path / "parts", resume=True)


@pytest.mark.parametrize("method", ["random", "activation"])
def test_other_methods_reconstruct_their_router(method):
    assert list(convert(method=method).config.stages["reconstruct"]["relative_error"]) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stages": []}, "stages is empty; allowed: one or both of reconstruct align"),
        ({"stages": ["align", "finetune"]}, "stages is align finetune; allowed: one or both of reconstruct align"),
        ({"reconstruct_steps": -1}, "reconstruct_steps is -1; allowed: an integer of at least 0"),
    ],
)
def test_bad_stages(kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert(**kwargs)


def test_the_card_has_every_stage():
    model = convert()
    text = model_card(model, "title", {})
    errors, kl = (model.config.stages[s][k] for s, k in (("reconstruct", "relative_error"), ("align", "kl")))
    for name, (before, after) in errors.items():
        assert f"| relative_error of {name} | {before:.6g} -> {after:.6g} |" in text
    assert f"| kl | {kl[0]:.6g} -> {kl[1]:.6g} |" in text
    assert "with every expert active it equals the dense model" in text


# --- finetune ---------------------------------------------------------------------------------------------------------


def progressions(count=64, length=16):
    """The next token is the last one plus the sequence's step."""
    draw = torch.Generator().manual_seed(5)
    start, step = torch.randint(0, 60, (count, 1), generator=draw), torch.randint(1, 3, (count, 1), generator=draw)
    return 3 + (start + step * torch.arange(length)) % (V - 4)


def tune(model=None, *, held_out=None, folder=None, resume=False, on_step=None, **fields):
    config = FinetuneConfig(**({"steps": 12, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 0} | fields))
    model = sparse_model(initializer_range=0.1) if model is None else model
    return finetune(model, progressions(), config, held_out=held_out, folder=folder, resume=resume, on_step=on_step)


def soft_model():
    config = DotMoeConfig(num_experts=E, top_k=K, router="soft")
    return dk.convert(dense_model(initializer_range=0.1), config, data=DATA, alignment=options(steps=1))


@pytest.mark.parametrize("make", [lambda: sparse_model(initializer_range=0.1), soft_model], ids=["top_k", "soft"])
def test_the_loss_falls(make):
    held = progressions(70)[64:]
    before = make()
    model = tune(copy.deepcopy(before), held_out=held)
    (figures,) = model.config.stages["finetune"]
    assert figures["loss"][1] < figures["loss"][0] - 0.3
    assert figures["perplexity"][1] < 0.8 * figures["perplexity"][0]
    assert (figures["steps"], figures["tokens"]) == (12, 12 * 4 * 16)
    assert not model.training
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        rests = before.config.router == "top_k" and name.endswith("gate.weight")
        assert torch.equal(p, q) == rests, name
        assert p.requires_grad, name
    assert list(model.config.stages)[-1] == "finetune"
    assert list(model.config.stages)[:-1] == list(before.config.stages or {})


def test_the_routers_losses_are_part_of_it(tmp_path):
    def last(**weights):
        model = sparse_model(initializer_range=0.1)
        with torch.no_grad():
            for block in moe_blocks(model).values():
                block.gate.weight.mul_(0.1)
        folder = tmp_path / "-".join(map(str, weights.values()))
        tune(model, folder=folder, lr=5e-3, router_lr=5e-3, **weights)
        return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])

    plain = last(z=0.0, balance=0.0)
    assert last(z=1.0, balance=0.0)["z"] < 0.8 * plain["z"]
    assert last(z=0.0, balance=10.0)["balance"] - 1 < 0.8 * (plain["balance"] - 1)  # 1 is even
    assert plain["loss"] == plain["ce"]


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=LORA)])
def test_finetune_resumes_bit_for_bit(tmp_path, rank):
    run = {"lora_rank": rank, "steps": 6, "checkpoint_every": 2}
    whole = tune(**run, folder=tmp_path / "whole")

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(**run, folder=tmp_path / "parts", on_step=stop)
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-0000002.pt"]
    parts = tune(**run, folder=tmp_path / "parts", resume=True)
    assert states_equal(whole, parts)
    assert whole.config.stages == parts.config.stages
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"was written with lr = 0\.01; this run has 0\.02"):
        tune(**run, lr=2e-2, folder=tmp_path / "parts", resume=True)
    with pytest.raises(ValueError, match="was written with weights = "):
        tune(sparse_model(seed=1, initializer_range=0.1), **run, folder=tmp_path / "parts", resume=True)


def test_passes_of_a_step_add_up():
    a, b = (tune(model, micro_batch_size=micro, steps=3, balance=0.0).state_dict() for model, micro in ((None, None), (None, 1)))
    assert all(torch.allclose(a[n].double(), b[n].double(), atol=2e-4) for n in a)  # AdamW divides by small gradients


def test_gradient_checkpointing_changes_nothing():
    """The routers' losses leave the layers that are computed again by a hook, not as an output."""
    run = {"steps": 2, "balance": 1.0, "z": 0.1}
    assert states_equal(tune(**run), tune(checkpointing(sparse_model(initializer_range=0.1)), **run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_stay_narrow_and_keep_their_layout(dtype):
    model = sparse_model(dtype=dtype, initializer_range=0.1)
    layout = [block.experts.down_proj.stride() for block in moe_blocks(model).values()]
    tune(model, steps=2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [block.experts.down_proj.stride() for block in moe_blocks(model).values()] == layout


def test_narrow_weights_train_wide():
    """40 steps of 1e-5 move a quarter of the weights by a bfloat16 unit; one by one all but 4 % of N(0, 0.1) would lose them."""
    start = sparse_model(dtype=torch.bfloat16, initializer_range=0.1)
    model = tune(copy.deepcopy(start), lr=1e-5, steps=40, batch_size=1)
    names = [f"model.layers.{n}.self_attn.{which}_proj.weight" for n in (0, 1) for which in "vo"]
    moved = [float((model.get_parameter(n) != start.get_parameter(n)).float().mean()) for n in names]
    assert min(moved) > 0.12, moved


def test_frozen_parameters_stay():
    model = sparse_model(initializer_range=0.1)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    tune(model, steps=2)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({}, [3e-4, 3e-4]),
        ({"router_lr": 2e-3}, [3e-4, 3e-4, 2e-3]),
        ({"lr": 1e-2, "router_lr": 2e-3}, [1e-2, 1e-2, 2e-3]),
        ({"zero_experts": 2}, [3e-4, 3e-4, 3e-4]),
        pytest.param({"lora_rank": 2}, [1e-3], marks=LORA),
        pytest.param({"lora_rank": 2, "router_lr": 2e-3}, [1e-3, 2e-3], marks=LORA),
    ],
)
def test_the_routers_have_a_rate_of_their_own(fields, rates, monkeypatch):
    seen, real = [], torch.optim.AdamW

    def keep(groups, **rest):
        seen.extend(group["peak"] for group in groups)
        return real(groups, **rest)

    monkeypatch.setattr(torch.optim, "AdamW", keep)
    model = sparse_model(initializer_range=0.1)
    gates = [block.gate.weight.detach().clone() for block in moe_blocks(model).values()]
    dk.finetune(model, progressions(8), FinetuneConfig(**{"steps": 2, "batch_size": 2, "warmup": 0.0} | fields))
    assert seen == rates
    after = [block.gate.weight for block in moe_blocks(model).values()]
    moved = [not torch.equal(old, new[: len(old)]) for old, new in zip(gates, after, strict=True)]
    assert moved == ["router_lr" in fields or "zero_experts" in fields] * len(gates)
    assert all(p.requires_grad for p in model.parameters())


@LORA
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_adapters_are_merged_into_the_attention(kind, tmp_path):
    start = sparse_model(kind, initializer_range=0.1)
    flags = {n: p.requires_grad for n, p in start.named_parameters()}
    held = progressions(70)[64:]
    model = tune(copy.deepcopy(start), lora_rank=4, lr=3e-2, steps=20, held_out=held)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    moved = {n for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True) if not torch.equal(p, q)}
    attention = {n for n in flags if ".self_attn." in n and n.endswith("proj.weight")}
    assert moved == attention, "the routers rest"
    (figures,) = model.config.stages["finetune"]
    assert figures["lora_rank"] == 4
    assert figures["perplexity"][1] < 0.9 * figures["perplexity"][0]
    dk.save(model, tmp_path / "moe")
    with torch.no_grad():
        assert torch.equal(dk.load(tmp_path / "moe")(held).logits, model(held).logits)


@LORA
def test_an_interrupted_model_is_rid_of_its_adapters():
    model = sparse_model(initializer_range=0.1)
    names, attention = dict(model.named_parameters()).keys(), model.model.layers[0].self_attn.q_proj.weight.clone()

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, lora_rank=2, on_step=stop)
    assert dict(model.named_parameters()).keys() == names
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, attention)


def test_adapters_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank needs peft, which is not installed; allowed: 0, or pip install"):
        tune(lora_rank=2)


def test_a_loss_that_is_not_finite():
    model = sparse_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.inf
    with pytest.raises(FloatingPointError, match=r"at step 1 of the fine-tuning .*last good checkpoint: none"):
        tune(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps is -1; allowed: an integer of at least 0"),
        ({"batch_size": 0}, "batch_size is 0; allowed: an integer of at least 1"),
        ({"micro_batch_size": 9}, "micro_batch_size is 9; allowed: 1 to batch_size = 8"),
        ({"lr": 0.0}, "lr is 0.0; allowed: a positive number"),
        ({"balance": -1.0}, "balance is -1.0; allowed: a number of at least 0"),
        ({"warmup": 2}, "warmup is 2; allowed: a share from 0 to 1"),
        ({"lora_rank": -1}, "lora_rank is -1; allowed: an integer of at least 0"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0; allowed: a positive number, or None"),
    ],
)
def test_bad_options_of_finetune(fields, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**fields)


def test_bad_arguments_of_finetune():
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM; allowed: a DotMoeForCausalLM"):
        finetune(dense_model(), DATA)
    with pytest.raises(ValueError, match=rf"data is in \[{V}, {V}\]; allowed: entries from 0 to {V - 1}"):
        finetune(sparse_model(), torch.full((2, 4), V))
    with pytest.raises(ValueError, match="held_out is of shape"):
        finetune(sparse_model(), DATA, held_out=DATA[:, :1])
    frozen = sparse_model().requires_grad_(False)
    with pytest.raises(ValueError, match="model is without a parameter that requires a gradient"):
        finetune(frozen, DATA)


def test_the_card_says_that_the_weights_moved():
    text = model_card(tune(steps=2), "title", {})
    assert "## Stage: finetune" in text
    assert "with every expert active it is not the dense model any more" in text


def test_every_run_has_a_row_in_the_card(tmp_path):
    """In their order, through a file, beside figures that another run does not have."""
    held = progressions(70)[64:]
    model = tune(steps=3)
    dk.save(model, tmp_path / "once")
    model = tune(dk.load(tmp_path / "once"), steps=2, held_out=held, folder=tmp_path / "run")
    dk.save(model, tmp_path / "twice")
    first, second = dk.load(tmp_path / "twice").config.stages["finetune"]
    assert (first["steps"], second["steps"]) == (3, 2)
    text = (tmp_path / "twice" / "README.md").read_text()
    arrow = "{:.6g} -> {:.6g}".format
    table = [
        "| run | steps | tokens | loss | perplexity |",
        "|---|---|---|---|---|",
        f"| 1 | 3 | {3 * 4 * 16} | {arrow(*first['loss'])} | - |",
        f"| 2 | 2 | {2 * 4 * 16} | {arrow(*second['loss'])} | {arrow(*second['perplexity'])} |",
    ]
    assert "## Stage: finetune\n\n" + "\n".join(table) + "\n\n" in text


def test_a_resumed_run_has_one_row(tmp_path):
    dk.save(tune(steps=1), tmp_path / "once")
    run = {"steps": 4, "checkpoint_every": 2, "folder": tmp_path / "run"}

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(dk.load(tmp_path / "once"), **run, on_step=stop)
    for _ in range(2):  # the second time there is no step left
        model = tune(dk.load(tmp_path / "once"), **run, resume=True)
        assert [figures["steps"] for figures in model.config.stages["finetune"]] == [1, 4]


def test_a_log_that_was_removed_gives_no_figure(tmp_path):
    """The first losses are gone with it."""

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    run = {"steps": 4, "checkpoint_every": 2, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        tune(**run, on_step=stop)
    (tmp_path / "log.jsonl").unlink()
    (figures,) = tune(**run, resume=True).config.stages["finetune"]
    assert figures == {"steps": 4, "tokens": 4 * 4 * 16}
    convert(["align"], folder=tmp_path / "moe")
    (tmp_path / "moe" / "log.jsonl").unlink()
    figures = convert(["align"], folder=tmp_path / "moe", resume=True).config.stages["align"]
    assert figures == {"steps": 4, "tokens": 4 * 4 * 16}


def test_a_run_that_moved_no_weight_is_not_counted_again(tmp_path):
    run = {"steps": 2, "lr": 1e-12, "folder": tmp_path, "resume": True, "held_out": progressions(66)[64:]}
    model = tune(sparse_model(dtype=torch.bfloat16), **run)
    assert len(tune(model, **run).config.stages["finetune"]) == 1


def test_figures_of_a_folder_that_has_those_of_one_run_alone():
    """As they were written before a run had a row of its own."""
    model = sparse_model(initializer_range=0.1)
    model.config.stages = {"align": {"steps": 1}, "finetune": {"steps": 7, "loss": [3.0, 2.0]}}
    assert "| 1 | 7 | 3 -> 2 |" in model_card(model, "title", {})
    stages = tune(model, steps=1).config.stages
    assert [run["steps"] for run in stages["finetune"]] == [7, 1]
    assert stages["align"] == {"steps": 1}


def test_no_step_is_no_run():
    """The weights are the dense model's still, and the card says so."""
    model = tune(steps=0)
    assert not model.config.stages
    assert "with every expert active it equals the dense model" in model_card(model, "title", {})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """dense/, text.txt; read only."""
    folder = tmp_path_factory.mktemp("stages")
    write_model(folder / "dense", train_tokenizer([prose(60)], vocab_size=300))
    (folder / "text.txt").write_text(prose(60))
    return folder


STAGES = ("--stage", "reconstruct,align", "--stage", "finetune")
SHORT = ("--reconstruct-steps", "2", "--finetune-steps", "4", "--finetune-lr", "0.01", "--checkpoint-every", "2")


def stages_of(folder):
    return json.loads((folder / "config.json").read_text())["stages"]


def test_the_command_takes_every_stage_and_resumes(capsys, here, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, out, err = call(capsys, *convert_arguments(here, whole, *STAGES, *SHORT))
    assert (status, err) == (0, "")
    assert set(stages_of(whole)) == {"reconstruct", "align", "finetune"}
    for name, (before, after) in stages_of(whole)["reconstruct"]["relative_error"].items():
        assert f"  {name:<28}{before:>8.3f} -> {after:.3f}\n" in out
    before, after = stages_of(whole)["finetune"][0]["perplexity"]
    assert f"perplexity {before:.3f} -> {after:.3f}" in out
    assert f", sparse {after:.3f} (" in out
    card = (whole / "README.md").read_text()
    assert [line for line in card.splitlines() if "Stage" in line] == [
        f"## Stage: {s}" for s in ("reconstruct", "align", "finetune")
    ]
    assert sorted(contents(tmp_path / "whole.run")) == ["finetune/log.jsonl", "log.jsonl"]

    real = finetuning._train

    def interrupted(*args, **told):
        def stop(done):
            if done == 3:
                raise KeyboardInterrupt

        return real(*args, **{**told, "on_step": stop})

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "_train", interrupted)
        status, _, err = call(capsys, *convert_arguments(here, parts, *STAGES, *SHORT))
    assert (status, err) == (130, "dotmoe convert: interrupted; the same command with --resume continues it\n")
    assert not parts.exists()
    assert call(capsys, *convert_arguments(here, parts, *STAGES, *SHORT))[0] == 2  # neither --resume nor --overwrite
    assert call(capsys, *convert_arguments(here, parts, *STAGES, *SHORT, "--resume"))[0] == 0
    assert states_equal(dk.load(whole), dk.load(parts))
    assert stages_of(whole) == stages_of(parts)
    assert len(stages_of(parts)["finetune"]) == 1


def finetune_arguments(model, data, output, *flags):
    common = ("--sequence-length", "16", "--batch-size", "2", "--no-progress", "--stage", "finetune")
    return ["convert", model, "--data", data, "--output", output, *common, *flags]


def test_the_command_fine_tunes_a_converted_model(capsys, here, tmp_path):
    assert call(capsys, *convert_arguments(here, tmp_path / "moe"))[0] == 0
    before = contents(tmp_path / "moe")
    arguments = finetune_arguments(tmp_path / "moe", here / "text.txt", tmp_path / "tuned", *SHORT[2:])
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    assert contents(tmp_path / "moe") == before
    assert set(stages_of(tmp_path / "tuned")) == {"align", "finetune"}
    assert stages_of(tmp_path / "tuned")["align"] == stages_of(tmp_path / "moe")["align"]
    assert "finetune, run 1: loss " in out
    assert "every expert on = a dense model of the fine-tuned weights: relative error" in out
    status, out, err = call(capsys, "info", tmp_path / "tuned")
    assert (status, err) == (0, "")
    assert "fine_tuned: 1\n" in out
    assert not states_equal(dk.load(tmp_path / "moe"), dk.load(tmp_path / "tuned"))
    status, _, err = call(capsys, *arguments, "--top-k", "3", "--overwrite")
    assert (status, err) == (2, "dotmoe convert: error: --top-k is 3; allowed: none: MODEL is converted already\n")

    arguments[1], arguments[5] = tmp_path / "tuned", tmp_path / "again"
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    first, second = stages_of(tmp_path / "again")["finetune"]
    assert [first] == stages_of(tmp_path / "tuned")["finetune"]
    assert first["perplexity"][1] == pytest.approx(second["perplexity"][0], rel=1e-5)
    assert "finetune, run 1: loss " in out
    assert "finetune, run 2: loss " in out


@pytest.mark.parametrize(
    ("flag", "value", "stage"),
    [
        ("steps", "50", "align"),  # --finetune-steps is what was meant
        ("method", "kmeans", "reconstruct or align"),
        ("tau-end", "0.5", "reconstruct or align"),
    ],
)
def test_the_fine_tuning_refuses_what_it_does_not_read(capsys, here, tmp_path, flag, value, stage):
    sparse_model().config.save_pretrained(tmp_path / "moe")
    arguments = finetune_arguments(tmp_path / "moe", here / "text.txt", tmp_path / "tuned", f"--{flag}", value)
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err == f"dotmoe convert: error: --{flag} is {value}; allowed: together with --stage {stage}\n"


def test_fine_tuning_a_dense_model(capsys, here, tmp_path):
    status, out, err = call(capsys, *finetune_arguments(here / "dense", here / "text.txt", tmp_path / "tuned"))
    assert (status, out) == (2, "")
    message = "--stage is finetune alone, of a dense MODEL; allowed: another stage before it, or a converted MODEL"
    assert err == f"dotmoe convert: error: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stage", "prune"), "--stage is 'prune'; allowed: reconstruct, align, finetune"),
        (("--lora-rank", "4"), "--lora-rank is 4; allowed: together with --stage finetune"),
        (("--reconstruct-steps", "4"), "--reconstruct-steps is 4; allowed: together with --stage reconstruct"),
        (("--stage", "reconstruct"), "--steps is 3; allowed: together with --stage align"),
        (("--stage", "align,finetune", "--finetune-lr", "0"), "--finetune-lr is 0.0; allowed: a positive number"),
        (("--stage", "align,finetune", "--finetune-steps", "-1"), "--finetune-steps is -1; allowed: an integer of at least 0"),
        (("--stage", "align,finetune", "--lora-rank", "4"), "--lora-rank needs peft, which is not installed"),
        (
            ("--stage", "reconstruct,align", "--reconstruct-steps", "-4"),
            "--reconstruct-steps is -4; allowed: at least 0",
        ),
    ],
)
def test_wrong_flags_of_the_stages(capsys, here, tmp_path, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, out, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *flags))
    assert status == 2
    assert err.startswith(f"dotmoe convert: error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_commands_of_the_readme(capsys, here, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in readme.splitlines() if line.startswith("dotmoe convert") and "--stage" in line]
    assert len(commands) == 2
    shutil.copytree(here / "dense", tmp_path / "llama")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": prose(3, seed=n)}) + "\n" for n in range(20)))
    monkeypatch.chdir(tmp_path)
    short = ("--sequence-length", "16", "--finetune-steps", "1", "--batch-size", "2", "--no-progress")
    first = (*commands[0], *short, "--expert-size", "8", "--steps", "1", "--reconstruct-steps", "1")
    assert call(capsys, *first)[0] == 0
    status, _, err = call(capsys, *commands[1], *short)
    if importlib.util.find_spec("peft") is None:
        assert (status, "--lora-rank needs peft, which is not installed" in err) == (2, True)
    else:
        assert (status, err) == (0, "")
        assert stages_of(tmp_path / "llama-moe-tuned")["finetune"][-1]["lora_rank"] == 16
