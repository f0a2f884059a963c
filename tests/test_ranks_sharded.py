"""Fine-tuning with the weights, the gradients and the moments divided over two processes, as in one that has them all."""

import importlib.util
import math

import pytest
import torch
from processes import run_ranks
from test_ranks_stages import DATA, Stopped, assert_same
from tiny import dense_model, sparse_model

import dotmoe_kernels as dk
from dotmoe_kernels.alignment.checkpoints import checkpoints_in, read_log
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.ranks import find_ranks
from dotmoe_kernels.conversion.files import convert_files, finetune_files
from dotmoe_kernels.conversion.finetuning import FinetuneConfig, finetune
from dotmoe_kernels.conversion.origins import Files, Memory
from dotmoe_kernels.conversion.sharded import divide_student

TOPOLOGY = dk.DotMoeConfig(num_experts=8, top_k=2)
ALIGNMENT = AlignmentConfig(steps=4, batch_size=4, micro_batch_size=1, num_iters=10, affinity_lr=0.05, init="auto")
CASES = {
    "text alone": ({"micro_batch_size": 1}, {}),
    "tied embeddings": ({}, {"tie_word_embeddings": True}),
    "the model teaches": ({}, {"teach": "itself"}),
    "another model teaches": ({"ce": 0.5}, {"teach": "another"}),
    "zero experts": ({"zero_experts": 2, "clip": 0.1}, {"teach": "itself"}),
    "computed again": ({"micro_batch_size": 2}, {"teach": "itself", "activation_checkpointing": True}),
}
if importlib.util.find_spec("peft") is not None:
    CASES |= {
        "adapters": ({"lora_rank": 2, "lr": 1e-2}, {"teach": "itself"}),
        "adapters and zero experts": ({"lora_rank": 2, "zero_experts": 2, "lr": 1e-3}, {"teach": "itself"}),
    }


def tune(case, folder=None, *, until=math.inf, resume=False, dtype=torch.float32, **options):
    """On one process all of it, on several divided. ``until``: the run is interrupted after so many steps; None then."""
    fields, arguments = CASES[case]
    arguments = dict(arguments)
    teach = arguments.pop("teach", None)
    model = sparse_model(dtype=dtype, tie_word_embeddings=arguments.pop("tie_word_embeddings", False))
    values = FinetuneConfig(**({"steps": 5, "batch_size": 4, "checkpoint_every": 2, "lr": 2e-4} | fields | options))
    teacher = {None: None, "itself": model, "another": dense_model(seed=3, dtype=dtype)}[teach]

    def on_step(done):
        if done >= until:
            raise Stopped

    given = {"teacher": teacher, "folder": folder, "held_out": DATA[:2], "resume": resume, "on_step": on_step, **arguments}
    shard = torch.distributed.is_initialized()
    try:
        finetune(model, DATA, values, shard=shard, **given)
    except Stopped:
        return None
    log = None if folder is None else read_log(folder / "log.jsonl")
    return log, model.state_dict(), model.config.stages


def parts():
    """Entries of the weights, their gradients and their moments that this rank has, and that there are of each."""
    model, held = sparse_model(), {}
    student = divide_student(Memory(model), FinetuneConfig(router_lr=1e-3), find_ranks(), False)
    trained = list(student.model.parameters())
    optimizer = torch.optim.AdamW(trained)
    student.divided(lambda tokens: student.model(input_ids=tokens, labels=tokens).loss, DATA[:2]).backward()
    optimizer.step()
    held["weights"], held["gradients"] = [p.to_local().numel() for p in trained], [p.grad.to_local().numel() for p in trained]
    held["moments"] = [optimizer.state[p]["exp_avg"].to_local().numel() for p in trained]
    return {name: sum(sizes) for name, sizes in held.items()}, sum(p.numel() for p in trained)


def from_files(folder):
    """Both kinds of run from the files of a folder to another one."""
    values = FinetuneConfig(steps=5, batch_size=4, lr=2e-4)
    source = Files(folder / "sparse")
    options = {"resume": False, "progress": False, "stop": None, "activation_checkpointing": False}
    tuning = {"teacher": source.model, "held_out": DATA[:2], "folder": folder / "tuned.run"}
    finetune_files(source, folder / "tuned", DATA, values, **tuning, **options)
    aligning = {"alignment": ALIGNMENT, "stages": ("reconstruct", "align"), "reconstruct_steps": 2, "folder": folder / "moe.run"}
    convert_files(Files(folder / "dense"), folder / "moe", TOPOLOGY, data=DATA, **aligning, **options)


def tune_all(folder):
    from_files(folder)
    tune("the model teaches", folder / "begun", until=4, resume=True)
    tune("text alone", folder / "twice", until=3)
    half = {"twice": tune("text alone", folder / "twice", resume=True)}
    half |= {"half": tune("the model teaches", folder / "half", dtype=torch.bfloat16)}
    return {case: tune(case, folder / case) for case in CASES} | {"parts": parts()} | half


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def by_two(folder, tmp_path_factory):
    tune("the model teaches", folder / "begun", until=2)
    dk.save(sparse_model(), folder / "sparse")
    dense_model(tie_word_embeddings=True).save_pretrained(folder / "dense")
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), tune_all, folder)


@pytest.mark.parametrize("case", CASES)
def test_divided_weights_train_as_whole_ones(by_two, case, tmp_path):
    first, second = (found[case] for found in by_two)
    expected = tune(case, tmp_path)
    names = {"loss", "ce", "z", "balance", "grad_norm"} | ({"kl", "zero"} & expected[0][0].keys())
    assert_same(first, expected, names)
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    figures, others = (found[2]["finetune"][0] for found in (first, expected))
    assert figures["perplexity"] == pytest.approx(others["perplexity"], rel=1e-4)
    assert {name: value for name, value in figures.items() if not isinstance(value, list)} == {
        name: value for name, value in others.items() if not isinstance(value, list)
    }


def test_each_rank_has_half(by_two):
    for held, total in (found["parts"] for found in by_two):
        assert held == {"weights": total // 2, "gradients": total // 2, "moments": total // 2}


def test_bfloat16_comes_near(by_two, tmp_path):
    """Its norms and routers are rounded for a pass, which autocast leaves in float32."""
    log, state, _ = by_two[0]["half"]
    expected_log, expected, _ = tune("the model teaches", tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.bfloat16}
    for entry, other in zip(log, expected_log, strict=True):
        assert entry["ce"] == pytest.approx(other["ce"], rel=2e-2)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3)


def test_one_then_two_then_one(by_two, folder, tmp_path):
    found = tune("the model teaches", folder / "begun", resume=True)
    assert [path.name for path in checkpoints_in(folder / "begun" / "checkpoints")] == ["step-0000004", "step-0000005.pt"]
    assert_same(found, tune("the model teaches", tmp_path), {"loss", "ce", "kl", "z", "balance"})


def test_two_go_on_from_what_two_have_left(by_two, tmp_path):
    """Each reads its part."""
    assert_same(by_two[0]["twice"], tune("text alone", tmp_path), {"loss", "ce", "z", "balance"})


def test_a_fine_tuning_from_files_to_files(by_two, folder, tmp_path):
    log, state, stages = tune("the model teaches", tmp_path)
    model = dk.load(folder / "tuned")
    assert_same(
        (read_log(folder / "tuned.run" / "log.jsonl"), model.state_dict(), model.config.stages), (log, state, stages), ("ce", "kl")
    )
    (figures,), (others,) = model.config.stages["finetune"], stages["finetune"]
    assert figures["perplexity"] == pytest.approx(others["perplexity"], rel=1e-4)
    assert figures["teacher"] == others["teacher"]
    dk.save(model, tmp_path / "again")  # it is a model like any other
    assert_equal_tensors(tmp_path / "again", folder / "tuned")


def test_a_conversion_from_files_to_files(by_two, folder, tmp_path):
    aligning = {"alignment": ALIGNMENT, "stages": ("reconstruct", "align"), "reconstruct_steps": 2, "folder": tmp_path / "run"}
    expected = dk.convert(dense_model(tie_word_embeddings=True), TOPOLOGY, data=DATA, **aligning)
    model = dk.load(folder / "moe")
    found = (read_log(folder / "moe.run" / "log.jsonl"), model.state_dict(), model.config.stages)
    assert_same(
        found, (read_log(tmp_path / "run" / "log.jsonl"), expected.state_dict(), expected.config.stages), ("loss", "kl", "ce")
    )
    assert model.config.assignment == expected.config.assignment
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items() if "experts" in name)


def assert_equal_tensors(a, b):
    ours, theirs = dk.load(a).state_dict(), dk.load(b).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_files_that_are_no_folder_are_refused():
    with pytest.raises(ValueError) as raised:
        Files("some/name")
    assert (
        str(raised.value) == "model is some/name; allowed: a local folder of safetensors files, of which every process reads a part"
    )


def test_without_ranks_it_is_refused():
    with pytest.raises(ValueError) as raised:
        finetune(sparse_model(), DATA, FinetuneConfig(steps=1), shard=True)
    assert str(raised.value) == "shard is True; allowed: in a process group, such as torchrun's"


def test_the_result_is_saved_and_loads(tmp_path):
    """One process that has a group of its own: its part is everything."""
    (found,) = run_ranks(1, tmp_path, saved, tmp_path)
    assert found
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-0000004.pt", "step-0000005.pt"]
    found = tune("text alone", tmp_path / "run", resume=True)  # at its end: the model comes from the checkpoint
    loaded = dk.load(tmp_path / "moe").state_dict()
    for name, value in found[1].items():
        assert torch.equal(value, loaded[name]), name


def saved(folder):
    log, state, stages = tune("text alone", folder / "run")
    model = sparse_model()
    model.load_state_dict(state)
    model.config.stages = stages
    dk.save(model, folder / "moe")
    return len(log) == 5
