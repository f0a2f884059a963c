"""Recipes are valid and true to the published models; a dry run counts what a conversion gives, from the config alone."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import torch
from tiny import dense_model, random_layers, sparse_model
from torch.utils.flop_counter import FlopCounterMode

from dotmoe_kernels import cli
from dotmoe_kernels._tiles import leaves_zeros_out
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.transport import Transport
from dotmoe_kernels.conversion import DotMoeConfig, count_parameters, find_ffns, materialize, moe_blocks, passes, pipeline
from dotmoe_kernels.conversion.dryrun import dense_config, predict_run, run_lines
from dotmoe_kernels.conversion.finetuning import FinetuneConfig
from dotmoe_kernels.conversion.recipes import load_recipe, recipe_names
from dotmoe_kernels.experts.training import cpu as training
from dotmoe_kernels.models import block

# E, s, K; parameters as published, in billions
PAPER = {
    "llama2-7b": (86, 128, 22, 6.74),
    "llama3-8b": (112, 128, 28, 8.03),
    "qwen2.5-7b": (148, 128, 37, 7.62),
}
OTHERS = {
    "llama2-7b-e32": (32, 344, 8, 6.74),
    "llama3-8b-e128": (128, 112, 32, 8.03),
    "qwen2.5-7b-e64": (64, 296, 16, 7.62),
    "qwen2.5-0.5b": (38, 128, 10, 0.494),
    "smollm2-135m": (24, 64, 6, 0.1345),
}


def predict_all(name, stages, *, tuning=None, reconstruct_steps=100, learned=True, router="top_k", teacher=None, **changes):
    recipe = load_recipe(name)
    dense = dense_config(None, recipe)
    return predict_run(
        dense,
        DotMoeConfig.for_dense(dense, **(recipe.topology | {"router": router})),
        AlignmentConfig(**(recipe.alignment | changes)),
        sequence_length=recipe.sequence_length,
        dtype=getattr(torch, recipe.dtype),
        learned=learned,
        stages=stages,
        tuning=tuning,
        reconstruct_steps=reconstruct_steps,
        teacher=teacher,
    )


def predict(name, **changes):
    """Structure and the alignment's figures in one."""
    report = predict_all(name, ["align"], **changes)
    return report | report["stages"]["align"]


def predict_stage(name, stage, **changes):
    return predict_all(name, [stage], **changes)["stages"][stage]


def call(capsys, *arguments):
    """(status, stdout, stderr)"""
    capsys.readouterr()
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


# --- the recipes of the package -------------------------------------------------------------------------------------------


def test_every_recipe_is_tested_here():
    assert recipe_names() == sorted(PAPER | OTHERS)


@pytest.mark.filterwarnings("error")  # an expert size that kernels refuse warns
@pytest.mark.parametrize("name", PAPER | OTHERS)
def test_topology_and_parameters_of(name):
    E, s, K, billions = (PAPER | OTHERS)[name]
    report = predict(name)
    assert (report["num_experts"], report["expert_size"], report["top_k"]) == (E, s, K)
    digits = len(str(billions).split(".")[1])
    assert round(report["dense_parameters"] / 1e9, digits) == billions
    assert report["total_parameters"] == report["dense_parameters"] + report["layers"] * E * report["hidden_size"]
    if "-e" in name:  # E and K powers of two, beside the same model and options
        assert E & (E - 1) == K & (K - 1) == 0
        base, ours = load_recipe(name.rpartition("-e")[0]), load_recipe(name)
        assert (ours.backbone, ours.alignment, ours.model) == (base.backbone, base.alignment, base.model)


@pytest.mark.parametrize("name", PAPER)
def test_options_of_the_paper(name):
    recipe = load_recipe(name)
    options = AlignmentConfig(**recipe.alignment)
    assert (options.steps, options.batch_size, recipe.sequence_length, options.num_iters) == (3500, 64, 2048, 50)
    assert (options.affinity_lr, options.router_lr, options.weight_decay, options.clip) == (5e-4, 5e-4, 1e-4, 1.0)
    assert (options.kl, options.ce, options.z, options.balance, options.init_std) == (2.0, 1.0, 1e-3, 1e-2, 0.01)
    assert (recipe.alignment["hidden"], recipe.alignment["centre"]) == (0.0, False)  # said, whatever the defaults become
    assert [options.tau(step) for step in (0, 350, 700, 3499)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    report = predict(name)
    assert report["tokens"] == 458_752_000
    assert 0.43 < report["active_share"] < 0.53  # 25 % of the FFN is about half of all
    assert report["predicted_memory_gb"]["total"] < 70  # an 80 GB GPU has about 78


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "smollm2-135m"])
def test_small_models_take_minutes_with_the_rates_of_a_short_run(name):
    recipe = load_recipe(name)
    options = AlignmentConfig(**recipe.alignment)
    assert (options.affinity_lr, options.router_rate) == (2e-2, 5e-4)
    assert AlignmentConfig(**recipe.alignment | {"init": "noise"}).router_rate == 2e-3
    report = predict(name)
    assert report["predicted_seconds"] < 600
    assert report["predicted_memory_gb"]["total"] < 16


def test_recipes_are_package_data():
    """The globs of pyproject.toml find every recipe."""
    patterns = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = resources.files("dotmoe_kernels.conversion")
    found = {path.stem for pattern in patterns["dotmoe_kernels.conversion"] for path in Path(str(folder)).glob(pattern)}
    assert found == set(recipe_names())


# --- what a dry run counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_converted_model(kind, tied):
    dense = dense_model(kind, tie_word_embeddings=tied)
    expected_dense = sum(p.numel() for p in dense.parameters())
    sparse = sparse_model(kind, tie_word_embeddings=tied)
    report = predict_run(
        dense.config, DotMoeConfig.for_dense(dense.config, num_experts=8, top_k=2), AlignmentConfig(), sequence_length=8
    )
    assert report["dense_parameters"] == expected_dense
    assert (report["total_parameters"], report["active_parameters"]) == count_parameters(sparse)


def kept_bytes(num_layers, top_k, **fields):
    """What autograd keeps of one aligned pass through the layers, a token; weights and what all layers share left out."""
    dense = dense_model("llama", num_hidden_layers=num_layers, dtype=torch.bfloat16, **fields)
    options = AlignmentConfig(batch_size=2)
    config = DotMoeConfig.for_dense(dense.config, num_experts=16, top_k=top_k)
    layers = pipeline._build_layers(dense.requires_grad_(False), find_ffns(dense), config, "dot", options, None)
    Transport(layers, options).refresh(1.0)
    ours = [*dense.parameters(), *dense.buffers()]
    for layer in layers.values():
        ours += [layer.gate_proj, layer.up_proj, layer.down_proj, layer.router_weight, layer.affinity, layer.plan, layer.expert_of]
    known = {t.untyped_storage().data_ptr() for t in ours}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dense.model(input_ids=torch.randint(3, 64, (2, 64)), use_cache=False)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known) / 128


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_activations_are_what_autograd_keeps(kv_heads):
    fields = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": kv_heads}
    measured = kept_bytes(3, 6, **fields) - kept_bytes(2, 6, **fields)
    config = dense_model("llama", num_hidden_layers=1, **fields).config
    sparse = DotMoeConfig.for_dense(config, num_experts=16, top_k=6)
    options = AlignmentConfig(batch_size=1000)  # T = 64,000
    report = predict_run(config, sparse, options, sequence_length=64, dtype=torch.bfloat16)
    one_layer = (
        report["stages"]["align"]["predicted_memory_gb"]["activations"] * 1e9 / 64000 - 4 * 2 * 128
    )  # without the hidden of the layer at work
    assert one_layer == pytest.approx(measured, rel=0.03)  # log-sums of attention and norms, a few bytes a head, are left out


def test_hidden_states_are_counted():
    """A [T, H] of every block, and three in float32 while one is compared."""
    plain, more = (predict("smollm2-135m", hidden=weight) for weight in (0.0, 4.0))
    assert "hidden" not in plain["predicted_memory_gb"]
    T = more["tokens_a_pass"]
    expected = T * 30 * 2 * 576 + 12 * T * 576
    assert more["predicted_memory_gb"]["hidden"] == round(expected / 1e9, 3)
    total = plain["predicted_memory_gb"]["total"] + more["predicted_memory_gb"]["hidden"]
    assert more["predicted_memory_gb"]["total"] == pytest.approx(total, abs=2e-3)
    assert more["flops"] == plain["flops"]


def test_memory_and_time_grow_with_what_they_depend_on():
    small, large = predict("smollm2-135m", micro_batch_size=4), predict("smollm2-135m", micro_batch_size=16)
    assert large["predicted_memory_gb"]["activations"] == pytest.approx(4 * small["predicted_memory_gb"]["activations"], rel=1e-3)
    assert large["predicted_memory_gb"]["weights"] == small["predicted_memory_gb"]["weights"] == round(2 * 134_515_008 / 1e9, 3)
    assert large["predicted_seconds"] == small["predicted_seconds"]
    assert predict("smollm2-135m", steps=2000)["predicted_seconds"] == pytest.approx(2 * small["predicted_seconds"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "sizes"),  # L, H, F, E, K, V, S, q, v, and whether a GPU leaves the mask's zeros out
    [
        ("smollm2-135m", (30, 576, 1536, 24, 6, 49152, 1024, 576, 192)),
        ("llama3-8b", (32, 4096, 14336, 112, 28, 128256, 2048, 4096, 1024)),
    ],
)
def test_flops_of_a_token_by_hand(name, sizes):
    """Products of 2 H (q + v) + 3 F H weights a layer and of the head, causal attention, routers, the plan's gradient."""
    L, H, F, E, K, V, S, q, v = sizes
    products, attention = L * (2 * H * (q + v) + 3 * F * H) + H * V, L * 2 * S * q
    forward, backward = 2 * products + attention, 2 * products + 2.5 * attention
    router, plan = L * 2 * E * H, L * 2 * F * E
    report = predict(name)
    T = report["tokens_a_pass"]
    dense = 2 * forward + backward + 3 * router + plan
    behind = 3 * L * 2 * F * H  # down, and the gradients of gate and up
    left_out = leaves_zeros_out(T, E, F // E, K, H)
    assert left_out == (name == "llama3-8b")
    flops = dense - behind * (1 - K / E) if left_out else dense
    assert report["flops"] / report["tokens"] == pytest.approx(flops, rel=1e-9)
    slow = dense - behind * (1 - K / E / 0.75) if left_out else dense
    transport = report["steps"] * 2 * 50 * 4 * L * F * E / 4.3e12
    seconds = report["tokens"] * slow / (0.4 * 790e12) + transport
    assert report["predicted_seconds"] == pytest.approx(seconds, abs=1e-3)


def test_a_fixed_assignment_trains_the_router_alone():
    for stage, copies in (("align", 16 * 30), ("reconstruct", 4 * 30 + 12)):
        memory = predict_stage("smollm2-135m", stage, learned=False)["predicted_memory_gb"]
        assert memory["transport"] == 0
        assert memory["trained"] == round(copies * 24 * 576 / 1e9, 3)


def finetune_bytes(num_layers, length, half, router, **fields):
    """What autograd keeps of one pass of the fine-tuning through the layers."""
    dense = dense_model("llama", num_hidden_layers=num_layers, **fields)
    config = DotMoeConfig(num_experts=16, top_k=6, router=router, **({"router_cap": 1.5} if router == "soft" else {}))
    model = materialize(dense, config, random_layers(dense, 16)).train()
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16, enabled=half), passes.router_losses(model):
        model.model(input_ids=torch.randint(3, 64, (1, length)), use_cache=False)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("router", ["top_k", "soft"])
def test_activations_of_the_fine_tuning_are_what_autograd_keeps(kv_heads, half, router, monkeypatch):
    monkeypatch.setattr(training, "in_batches", lambda x: False)  # of rows filled up, which a GPU has not: a plan is of one
    fields = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "num_key_value_heads": kv_heads}
    (a, b), (c, d) = ([finetune_bytes(layers, length, half, router, **fields) for length in (64, 128)] for layers in (2, 3))
    measured = (d - c - (b - a)) / 64  # of a layer and a token: neither weights cast nor what the layers share
    dense = dense_model("llama", num_hidden_layers=1, **fields).config
    report = predict_run(
        dense,
        DotMoeConfig.for_dense(dense, num_experts=16, top_k=6, router=router),
        AlignmentConfig(cap=1.5),
        sequence_length=64,
        dtype=torch.bfloat16 if half else torch.float32,
        stages=["finetune"],
        tuning=FinetuneConfig(batch_size=1000),
    )
    predicted = report["stages"]["finetune"]["predicted_memory_gb"]["activations"] * 1e9 / 64000
    assert predicted <= measured <= 1.01 * predicted  # log-sums of attention and norms, a few bytes a head, are left out


def test_flops_of_the_fine_tuning_are_those_of_autograd(monkeypatch):
    """All but the experts', which a CPU pads; attention as matrices, which are not halved, and no product is computed again."""
    monkeypatch.setattr(block, "routed_ffn", lambda x, up, down, indices, weights, *_: x * weights.sum(-1, keepdim=True))
    model = sparse_model("llama").train()
    for layer in moe_blocks(model).values():
        layer.gate.weight.requires_grad_(False)  # the routers rest
    model.set_attn_implementation("eager")
    S = 16
    with FlopCounterMode(display=False) as counter, passes.router_losses(model) as losses:
        ids = torch.randint(3, 64, (2, S))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + sum(terms["z"] + terms["balance"] for terms in losses)).backward()
    config = model.config
    report = predict_run(
        config.dense_config, config, AlignmentConfig(), sequence_length=S, stages=["finetune"], tuning=FinetuneConfig(steps=1)
    )
    figures = report["stages"]["finetune"]
    experts = 6 * sum(layer.experts.gate_up_proj.numel() * 3 // 2 for layer in moe_blocks(model).values()) * 2 // 8  # 2 of 8
    attention = 2 * S * 32 * 2  # a, of two layers
    predicted = figures["flops"] / figures["tokens"] - experts - 3.5 * attention
    assert counter.get_total_flops() / (2 * S) == pytest.approx(predicted + 3 * 2 * attention, rel=1e-9)


def test_fine_tuning_by_hand():
    """SmolLM2-135M, tied: the head is in the products and not in the parameters twice."""
    L, H, F, E, K, V, S, q, v, n = 30, 576, 1536, 24, 6, 49152, 1024, 576, 192, 134_929_728
    around, head, experts, routers = L * 2 * H * (q + v), H * V, L * 3 * K * F // E * H, L * E * H
    attention = L * 2 * S * q
    whole = predict_stage("smollm2-135m", "finetune", tuning=FinetuneConfig(steps=10, batch_size=4, micro_batch_size=2))
    assert (whole["tokens"], whole["tokens_a_step"], whole["tokens_a_pass"]) == (10 * 4 * S, 4 * S, 2 * S)
    token = 6 * (around + head + experts) + 3.5 * attention + 4 * routers
    assert whole["flops"] / whole["tokens"] == pytest.approx(token, rel=1e-9)
    seconds = 10 * 4 * S * token / (0.4 * 790e12) + 10 * 84 * n / 4.3e12
    assert whole["predicted_seconds"] == pytest.approx(seconds, abs=1e-3)
    memory = whole["predicted_memory_gb"]
    assert memory["weights"] == round((4 * n + 2 * (around + head + L * 3 * F * H)) / 1e9, 3)
    assert memory["trained"] == round(12 * n / 1e9, 3)
    assert memory["loss"] == round(12 * 2 * S * V / 1e9, 3)

    adapters = 8 * L * (4 * H + 2 * q + 2 * v)
    lora = predict_stage("smollm2-135m", "finetune", tuning=FinetuneConfig(steps=10, batch_size=4, micro_batch_size=2, lora_rank=8))
    token = 4 * (around + head + experts) + 3.5 * attention + 4 * routers + 6 * adapters
    assert lora["flops"] / lora["tokens"] == pytest.approx(token, rel=1e-9)
    memory = lora["predicted_memory_gb"]
    assert memory["weights"] == round(2 * n / 1e9, 3)
    assert memory["trained"] == round(16 * adapters / 1e9, 3)

    some = FinetuneConfig(steps=10, batch_size=4, micro_batch_size=2, lora_rank=8, router_lr=1e-4)
    learning = predict_stage("smollm2-135m", "finetune", tuning=some)
    assert learning["flops"] / learning["tokens"] == pytest.approx(token + 2 * routers, rel=1e-9)
    memory = learning["predicted_memory_gb"]
    assert memory["weights"] == round(2 * (n - routers) / 1e9, 3)
    assert memory["trained"] == round(16 * (routers + adapters) / 1e9, 3)


def test_a_teacher_by_hand():
    """SmolLM2-135M: a pass of the dense model more, and a copy of it where every weight trains; chunks instead of whole logits."""
    L, H, F, V, S, q, v, N = 30, 576, 1536, 49152, 1024, 576, 192, 134_515_008
    dense = 2 * (L * (2 * H * (q + v) + 3 * F * H) + H * V) + L * 2 * S * q
    for rank, teacher, copies, head in ((0, "itself", 1, H), (8, "itself", 0, 0), (8, "another", 1, 0)):
        tuning = FinetuneConfig(steps=10, batch_size=4, lora_rank=rank)
        plain = predict_stage("smollm2-135m", "finetune", tuning=tuning)
        taught = predict_stage("smollm2-135m", "finetune", tuning=tuning, teacher=teacher)
        assert (taught["flops"] - plain["flops"]) / taught["tokens"] == pytest.approx(dense, rel=1e-9)
        memory, before = taught["predicted_memory_gb"], plain["predicted_memory_gb"]
        rows = max((1 << 28) // (4 * V), head // 4)
        assert memory["teacher"] == round(copies * 2 * N / 1e9, 3)
        assert memory["loss"] == round((12 * 4 * S * H + 16 * rows * V + 8 * V * head) / 1e9, 3)
        assert {name: memory[name] for name in ("weights", "trained", "activations")} == {
            name: before[name] for name in ("weights", "trained", "activations")
        }


def test_reconstruction_by_hand():
    """65,536 tokens are 64 sequences, 4 of them held out; the inputs of 14 of 30 layers fit at a time."""
    L, H, F, E, V, S, M = 30, 576, 1536, 24, 49152, 1024, 65536
    products, attention = L * (2 * H * (576 + 192) + 3 * F * H) + H * V, L * 2 * S * 576
    dense, router = 6 * F * H, 2 * E * H
    collecting = 3 * M * (2 * products + attention)
    errors = L * (M * dense + 2 * 4 * S * (dense + router))
    step = 1024 * (dense + 2 * F * H + 2 * router + 2 * F * E)
    found = predict_stage("smollm2-135m", "reconstruct", reconstruct_steps=50)
    assert (found["steps"], found["tokens"], found["tokens_a_step"]) == (50, M, 1024)
    assert found["flops"] == pytest.approx(collecting + errors + L * 50 * step, rel=1e-9)
    memory = found["predicted_memory_gb"]
    assert memory["inputs"] == round(2 * 14 * M * 2 * H / 1e9, 3)
    assert memory["activations"] == round(4096 * 2 * V / 1e9, 3)  # the logits of a pass that collects
    # such small products are nothing beside the launches: a millisecond a step and a layer
    assert found["predicted_seconds"] == pytest.approx((collecting + errors) / (0.4 * 790e12) + L * 50 * 1e-3, abs=1e-3)
    wide = [predict_stage("llama3-8b", "reconstruct", reconstruct_steps=n) for n in (0, 50, 100)]
    slope = (wide[2]["flops"] - wide[1]["flops"]) / (0.4 * 790e12)
    assert not leaves_zeros_out(1024, 112, 128, 28, 4096)  # so few tokens: the products are dense
    seconds = [w["predicted_seconds"] for w in wide]
    transport = 32 * 50 * 2 * 50 * 4 * 14336 * 112 / 4.3e12
    assert seconds[2] - seconds[1] == pytest.approx(slope + transport, abs=2e-3)
    assert seconds[1] - seconds[0] == pytest.approx(seconds[2] - seconds[1], abs=2e-3)


def test_the_run_is_all_of_its_stages():
    stages = ["reconstruct", "align", "finetune"]
    report = predict_all("qwen2.5-0.5b", stages)
    assert list(report["stages"]) == stages
    assert report["predicted_seconds"] == pytest.approx(sum(f["predicted_seconds"] for f in report["stages"].values()), abs=3e-3)
    totals = [figures["predicted_memory_gb"]["total"] for figures in report["stages"].values()]
    assert report["predicted_memory_gb"] == max(totals)
    assert report["stages"]["align"] == predict_stage("qwen2.5-0.5b", "align")


def test_lines_say_what_is_predicted():
    lines = run_lines(predict_all("llama3-8b", ["reconstruct", "align", "finetune"]))
    assert lines[0].startswith("topology: 32 layers of F = 14336 = E 112 x s 128, K 28 (25.0% of the FFN)")
    assert [line.split(": ")[0] for line in lines if line.startswith("stage")] == [
        "stage reconstruct",
        "stage align",
        "stage finetune",
    ]
    figures = [line.strip() for line in lines if " GB" in line or "H200" in line or "time" in line]
    assert len(figures) == 3 * 2 + 2
    assert all(line.startswith("predicted ") for line in figures)
    assert lines[-2].endswith(" GB, more than the 141 of one H200")
    assert "nobody measured it" in lines[-1]
    assert "float32" not in lines[-1]


def test_float32_is_said_to_be_slower():
    dense = dense_model("llama").config
    sparse = DotMoeConfig.for_dense(dense, num_experts=8, top_k=2)
    for dtype, stages, slower in (("float32", ["align"], True), ("float16", ["align"], False), ("float16", ["finetune"], True)):
        report = predict_run(dense, sparse, AlignmentConfig(), sequence_length=8, dtype=getattr(torch, dtype), stages=stages)
        assert report["predicted_for"].endswith("; products in float32, which this run has, are slower") == slower


# --- a file of one's own --------------------------------------------------------------------------------------------------


def test_a_file_of_ones_own(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "sequence_length = 64\n[topology]\ntop_k = 3\n[alignment]\nwarmup = 0\nmicro_batch_size = 2\n")
    )
    assert (recipe.sequence_length, recipe.topology, recipe.model) == (64, {"top_k": 3}, None)
    assert AlignmentConfig(**recipe.alignment) == AlignmentConfig(warmup=0, micro_batch_size=2)
    assert load_recipe(write(tmp_path, "")).alignment == {}


BAD = {
    "unknown key": (
        "sequence_lenght = 4",
        "a key in recipe {0} is 'sequence_lenght'; allowed: description, model, dtype, sequence_length",
    ),
    "unknown option": (
        "[alignment]\nlr = 1.0",
        "a key in recipe {0} is 'alignment.lr'; allowed: alignment.steps, alignment.batch_size",
    ),
    "unknown size": ("[backbone]\nhiden_size = 8", "a key in recipe {0} is 'backbone.hiden_size'; allowed: backbone.model_type"),
    "both of a pair": (
        "[topology]\nnum_experts = 8\nexpert_size = 8",
        "topology in recipe {0} is with both expert_size and num_experts; allowed: one of them",
    ),
    "a string": ('[alignment]\nsteps = "many"', "alignment.steps in recipe {0} is 'many'; allowed: an integer"),
    "true": ("[topology]\ntop_k = true", "topology.top_k in recipe {0} is True; allowed: an integer"),
    "a fraction": ("[alignment]\nbatch_size = 1.5", "alignment.batch_size in recipe {0} is 1.5; allowed: an integer"),
    "out of range": ("[alignment]\nwarmup = 2.0", "alignment in recipe {0}: warmup is 2.0; allowed: a share from 0 to 1"),
    "no number": ("[alignment]\nclip = nan", "alignment in recipe {0}: clip is nan; allowed: a positive number"),
    "router": ('[topology]\nrouter = "hard"', "topology.router in recipe {0} is 'hard'; allowed: top_k | soft"),
    "dtype": ('dtype = "int8"', "dtype in recipe {0} is 'int8'; allowed: float32 | bfloat16 | float16"),
    "length": ("sequence_length = 1", "sequence_length in recipe {0} is 1; allowed: at least 2 tokens"),
    "no layers": (
        "[backbone]\nnum_hidden_layers = 0",
        "backbone.num_hidden_layers in recipe {0} is 0; allowed: at least 1",
    ),
    "no table": ("topology = 3", "topology in recipe {0} is 3; allowed: a table"),
    "no TOML": ("steps == 3", "recipe {0} is no TOML file ("),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe(tmp_path, case):
    text, message = BAD[case]
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert str(error.value).startswith(message.format(path))


def test_bad_bytes_and_bad_names(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no TOML file"):
        load_recipe(str(tmp_path / "bytes.toml"))
    with pytest.raises(ValueError, match=r"recipe is .*no-such.toml, which is no file; allowed: the path of a TOML file"):
        load_recipe(str(tmp_path / "no-such.toml"))
    with pytest.raises(ValueError, match=r"recipe is 'llama'; allowed: llama2-7b, .*smollm2-135m, or the path of a .toml file"):
        load_recipe("llama")


# --- the command line -----------------------------------------------------------------------------------------------------


def test_dry_run_needs_no_model_no_data_and_no_network(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "none")}
    command = [sys.executable, "-m", "dotmoe_kernels", "convert", "--recipe", "llama3-8b", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("llama3-8b: LLaMA-3-8B, the paper's topology and options")
    assert "\n".join(run_lines(predict_all("llama3-8b", ["align"]))) in done.stdout


def test_flags_go_before_the_recipe(capsys):
    status, out, err = call(capsys, "convert", "--recipe", "llama3-8b", "--dry-run", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["model"], report["recipe"]) == ("meta-llama/Meta-Llama-3-8B", "llama3-8b")
    assert predict_all("llama3-8b", ["align"]).items() <= report.items()
    flags = (
        "--expert-size",
        "256",
        "--top-k",
        "5",
        "--steps",
        "7",
        "--sequence-length",
        "512",
        "--dtype",
        "float32",
        "--router",
        "soft",
    )
    status, out, err = call(capsys, "convert", "--recipe", "llama3-8b", "--dry-run", "--json", *flags)
    assert (status, err) == (0, "")
    changed = json.loads(out)
    assert (changed["num_experts"], changed["expert_size"], changed["top_k"], changed["router"]) == (56, 256, 5, "soft")
    assert (changed["stages"]["align"]["tokens"], changed["dtype"]) == (7 * 64 * 512, "float32")
    weights = [r["stages"]["align"]["predicted_memory_gb"]["weights"] for r in (report, changed)]
    assert weights[1] == pytest.approx(2 * weights[0], abs=2e-3)
    status, out, _ = call(capsys, "convert", "--recipe", "llama3-8b", "--dry-run", "--json", "--num-experts", "64")
    assert json.loads(out)["top_k"] == 16  # the recipe's share of another number of experts


def test_dry_run_of_a_folder_reads_its_config_alone(capsys, tmp_path):
    dense = dense_model("qwen2")
    dense.config.save_pretrained(tmp_path / "dense")
    before = sorted(path.name for path in (tmp_path / "dense").iterdir())
    arguments = ("convert", tmp_path / "dense", "--dry-run", "--json", "--num-experts", "8", "--batch-size", "4")
    status, out, err = call(capsys, *arguments, "--sequence-length", "32")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["dense_parameters"] == dense.num_parameters()
    assert (report["hidden_size"], report["ffn_width"], report["top_k"]) == (32, 64, 2)
    assert report["stages"]["align"]["tokens_a_pass"] == 128
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == before


STAGES = ("--stage", "reconstruct,align", "--stage", "finetune")


def test_dry_run_of_every_stage_takes_their_flags(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # it is not needed to count
    flags = ("--reconstruct-steps", "7", "--finetune-steps", "5", "--lora-rank", "4", "--steps", "3", "--batch-size", "2")
    arguments = ("convert", "--recipe", "smollm2-135m", "--dry-run", *STAGES, *flags, "--micro-batch-size", "1")
    status, out, err = call(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    stages = json.loads(out)["stages"]
    assert [(name, figures["steps"]) for name, figures in stages.items()] == [("reconstruct", 7), ("align", 3), ("finetune", 5)]
    assert stages["finetune"]["tokens"] == 5 * 2 * 1024
    tuning = FinetuneConfig(steps=5, batch_size=2, micro_batch_size=1, lora_rank=4)
    assert stages["finetune"] == predict_stage("smollm2-135m", "finetune", tuning=tuning, teacher="itself")
    for given, teacher in ((("--no-teacher",), None), (("--teacher", "x"), "another")):
        stages = json.loads(call(capsys, *arguments, *given, "--json")[1])["stages"]
        assert stages["finetune"] == predict_stage("smollm2-135m", "finetune", tuning=tuning, teacher=teacher)
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    assert out.count("predicted time: ") == 3
    status, out, _ = call(capsys, "convert", "--recipe", "smollm2-135m", "--dry-run", *STAGES[:2], "--method", "random", "--json")
    assert [f["predicted_memory_gb"]["transport"] for f in json.loads(out)["stages"].values()] == [0, 0]


def test_dry_run_of_fine_tuning_a_converted_model(capsys, tmp_path):
    sparse = sparse_model("llama")
    sparse.config.save_pretrained(tmp_path / "moe")
    arguments = ("convert", tmp_path / "moe", "--stage", "finetune", "--dry-run", "--sequence-length", "16")
    status, out, err = call(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert list(report["stages"]) == ["finetune"]
    assert (report["num_experts"], report["top_k"]) == (8, 2)
    assert (report["total_parameters"], report["active_parameters"]) == count_parameters(sparse)
    status, out, err = call(capsys, *arguments, "--top-k", "3")
    assert (status, out) == (2, "")
    assert err == "dotmoe convert: error: --top-k is 3; allowed: none: MODEL is converted already\n"


def test_a_converted_model_is_refused(capsys, tmp_path):
    sparse_model("llama").config.save_pretrained(tmp_path / "moe")
    status, out, err = call(capsys, "convert", tmp_path / "moe", "--dry-run")
    assert (status, out) == (2, "")
    assert err == f"dotmoe convert: error: MODEL is {tmp_path / 'moe'}, which is already converted; allowed: a dense model\n"


def test_a_run_takes_the_recipe(capsys, tmp_path, monkeypatch):
    """Every value reaches ``convert``; nothing is trained here."""
    seen = {}

    class Stop(ValueError):
        pass

    def record(model, config, *, data, alignment, **kwargs):
        seen.update(config=config, alignment=alignment, dtype=model.dtype, length=data.shape[1])
        raise Stop("seen")

    from transformers import AutoTokenizer

    from dotmoe_kernels import conversion
    from dotmoe_kernels.conversion.demo import train_tokenizer

    text = "one token after another " * 40
    dense_model("llama", vocab_size=300).save_pretrained(tmp_path / "dense")
    train_tokenizer([text], vocab_size=300).save_pretrained(tmp_path / "dense")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(conversion, "convert", record)
    recipe = write(
        tmp_path,
        f'model = "{tmp_path / "dense"}"\ndtype = "bfloat16"\nsequence_length = 8\n[topology]\nnum_experts = 8\ntop_k = 3\n'
        "[alignment]\nsteps = 5\nweight_decay = 0.5\nseed = 3\n",
    )
    common = ("convert", "--recipe", recipe, "--data", tmp_path / "text.txt", "--output", tmp_path / "moe")
    status, _, err = call(capsys, *common, "--seed", "4")
    assert (status, err) == (2, "dotmoe convert: error: seen\n")
    assert (seen["config"].num_experts, seen["config"].top_k, seen["config"].router) == (8, 3, "top_k")
    assert seen["alignment"] == AlignmentConfig(steps=5, weight_decay=0.5, seed=4)
    assert (seen["dtype"], seen["length"]) == (torch.bfloat16, 8)


WRONG = {
    "fine-tuning of a dense model": (
        ("--recipe", "smollm2-135m", "--dry-run", "--stage", "finetune"),
        "--stage is finetune alone, of a dense MODEL; allowed: another stage before it, or a converted MODEL",
    ),
    "a flag of another stage": (
        ("--recipe", "smollm2-135m", "--dry-run", "--finetune-steps", "5"),
        "--finetune-steps is 5; allowed: together with --stage finetune",
    ),
    "no recipe of that name": (("--recipe", "llama", "--dry-run"), "--recipe is 'llama'; allowed: llama2-7b, "),
    "no recipe file": (
        ("--recipe", "./none.toml", "--dry-run"),
        "--recipe is ./none.toml, which is no file; allowed: the path of a TOML",
    ),
    "nothing to dry-run": (("--dry-run",), "MODEL is missing; allowed: a model folder, a name, or a recipe"),
    "a folder without config": ((".", "--dry-run"), "MODEL is ., without config.json; allowed: a Hugging Face model folder"),
    "no folder": (("./none", "--dry-run"), "MODEL is ./none, which is no folder; allowed: a Hugging Face model folder, or a name"),
    "a topology that does not fit": (
        ("--recipe", "smollm2-135m", "--dry-run", "--num-experts", "7"),
        "--num-experts is 7; allowed: a divisor",
    ),
    "a short sequence": (
        ("--recipe", "smollm2-135m", "--dry-run", "--sequence-length", "1"),
        "--sequence-length is 1; allowed: at least 2",
    ),
    "JSON of a run": (("model", "--json"), "--json is given; allowed: together with --dry-run"),
    "a run without data": (("--recipe", "smollm2-135m"), "the following arguments are required: --data, --output"),
    "a run of nothing": ((), "the following arguments are required: MODEL, --data, --output"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_end_with_one_line(capsys, tmp_path, monkeypatch, case):
    arguments, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, "convert", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dotmoe convert: error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_the_recipe_says_is_named_with_it(capsys, tmp_path):
    """And what a flag says by the flag, though the recipe says it too."""
    dense = '[backbone]\nmodel_type = "llama"\nintermediate_size = 64\nhidden_size = 32\nnum_attention_heads = 4\n'
    recipe = write(tmp_path, dense + "[topology]\nnum_experts = 7\n[alignment]\nbatch_size = 8\nmicro_batch_size = 4\nseed = 1\n")
    for flags, message in (
        ((), f"num_experts in recipe {recipe} is 7; allowed: a divisor of F = 64"),
        (("--expert-size", "5"), "--expert-size is 5; allowed: a divisor of F = 64"),
        (("--batch-size", "2"), f"micro_batch_size in recipe {recipe} is 4; allowed: 1 to batch_size = 2"),
        (("--micro-batch-size", "9"), "--micro-batch-size is 9; allowed: 1 to batch_size = 8"),
    ):
        status, out, err = call(capsys, "convert", "--recipe", recipe, "--dry-run", *flags)
        assert (status, out) == (2, "")
        assert err.startswith(f"dotmoe convert: error: {message}")


def test_backbone_that_transformers_does_not_know(capsys, tmp_path):
    for text, message in (
        ('[backbone]\nmodel_type = "lama"\n', "is 'lama'; allowed: one of transformers"),
        ('[backbone]\nmodel_type = "llama"\nhidden_size = 7\nnum_attention_heads = 4\n', "is no llama ("),
        ("[backbone]\nhidden_size = 8\n", 'is without model_type; allowed: a model type, such as "llama"'),
    ):
        status, _, err = call(capsys, "convert", "--recipe", write(tmp_path, text), "--dry-run")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


def test_help_names_the_recipes(capsys):
    status, out, _ = call(capsys, "convert", "--help")
    assert status == 0
    assert all(name in out.replace("\n", "").replace(" ", "") for name in recipe_names())


def test_commands_of_the_readme(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if line.startswith("dotmoe convert") and "--recipe" in line]
    assert len(commands) >= 2
    for command in commands:
        dry = [*shlex.split(command)[1:], *([] if "--dry-run" in command else ["--dry-run"])]
        status, out, err = call(capsys, *dry)
        assert (status, err) == (0, ""), command
        assert "predicted time: " in out
