"""Fine-tuning by distillation: the chunked loss whose head trains, and the teacher, with every weight and with adapters."""

import copy
import importlib.util
import json

import pytest
import torch
from checks import DEVICES, FLOOR, error
from shapes import normal
from test_alignment_loss import HEADS, MASKS, WEIGHTS, B, H, Largest, N, make_head, states, token_ids
from test_cli import call, convert_arguments, prose, write_model
from test_stages import SHORT, finetune_arguments, progressions, soft_model, stages_of, states_equal
from tiny import E, dense_model, sparse_model
from tiny import V as VOCABULARY
from torch import nn

import dotmoe_kernels as dk
from dotmoe_kernels.alignment.chunked import chunk_rows, chunked_distillation
from dotmoe_kernels.alignment.head import find_head
from dotmoe_kernels.alignment.losses import distillation_losses
from dotmoe_kernels.conversion import teacher as module
from dotmoe_kernels.conversion.adapters import adapters
from dotmoe_kernels.conversion.demo import train_tokenizer
from dotmoe_kernels.conversion.finetuning import FinetuneConfig, finetune
from dotmoe_kernels.models.card import model_card

LORA = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install '.[lora]'")
RANKS = pytest.mark.parametrize("rank", [0, pytest.param(2, marks=LORA)], ids=["every weight", "adapters"])

# --- the chunked loss, where the head trains ------------------------------------------------------------------------------


def gradients(function, head, hidden, tied):
    """Of 1.5 times the sum of the terms, to the hidden states and to the head's weight and bias. ``tied``: the weight is looked up
    as well, as an embedding's."""
    leaf = hidden.detach().clone().requires_grad_()
    weight, bias = (None if t is None else t.detach().clone().requires_grad_() for t in (head.weight, head.bias))
    x = leaf + 0.1 * weight[token_ids(*hidden.shape[:2], V=len(weight))] if tied else leaf
    total, kl, ce = function(x, head._replace(weight=weight, bias=bias))
    (1.5 * total).backward()
    found = {"total": total, "kl": kl, "ce": ce, "hidden": leaf.grad, "weight": weight.grad}
    return found if bias is None else found | {"bias": bias.grad}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_gradients_of_a_head_that_trains(kind, mask, chunk, tied):
    head, (teacher, hidden), labels = make_head(kind), states(), token_ids()

    def ours(x, student):
        return chunked_distillation(teacher, x, student, labels, mask, teacher_head=head, chunk=chunk, **WEIGHTS)

    def plain(x, student):
        return _plain(teacher, head, x, student, labels, mask)

    found, expected = gradients(ours, head, hidden, tied), gradients(plain, head, hidden, tied)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


def _logits(hidden, head):
    product = nn.functional.linear(hidden, head.weight, head.bias)
    product = product if product.dtype == torch.float64 else product.float()
    return product * head.scale if head.cap is None else head.cap * torch.tanh(product * head.scale / head.cap)


def _plain(teacher, teacher_head, hidden, head, labels, mask=None):
    kl, ce = distillation_losses(_logits(teacher, teacher_head), _logits(hidden, head), labels, mask)
    return WEIGHTS["kl_weight"] * kl + WEIGHTS["ce_weight"] * ce, kl, ce


@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck_of_a_head_that_trains(kind):
    head, (teacher, hidden), labels = make_head(kind), states(), token_ids()
    given = [t.clone().requires_grad_() for t in (hidden, head.weight, head.bias) if t is not None]

    def total(x, weight, bias=None):
        student = head._replace(weight=weight, bias=bias)
        return chunked_distillation(teacher, x, student, labels, MASKS["mask"], teacher_head=head, chunk=5, **WEIGHTS)[0]

    assert torch.autograd.gradcheck(total, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_less_accurate_than_the_whole_logits(device, kind, dtype):
    """bfloat16: of products under autocast, the weights in float32."""
    B, N, H, V = 4, 40, 64, 500
    head, (teacher, hidden), labels = make_head(kind, torch.float32, H, V), states(torch.float32, B, N, H), token_ids(B, N, V)
    head = head._replace(weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
    teacher, hidden, labels = (t.to(device) for t in (teacher, hidden, labels))
    half, wide = (
        dtype == torch.bfloat16,
        head._replace(weight=head.weight.double(), bias=None if head.bias is None else head.bias.double()),
    )

    def plain(x, student):
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return _plain(teacher, head, x, student, labels)

    def ours(x, student):
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return chunked_distillation(
                teacher, x, student, labels, teacher_head=head, dtype=dtype if half else None, chunk=48, **WEIGHTS
            )

    exact = gradients(lambda x, student: _plain(teacher.double(), wide, x, student, labels), wide, hidden.double(), False)
    expected, found = gradients(plain, head, hidden, False), gradients(ours, head, hidden, False)
    assert found["weight"].dtype == found["hidden"].dtype == torch.float32
    for name, value in exact.items():
        allowed = 2 * error(expected[name], value) + FLOOR[dtype]
        assert error(found[name], value) <= allowed, f"{name}: {error(found[name], value):.2g}, allowed {allowed:.2g}"


def test_a_teacher_of_another_width():
    head, (_, hidden), labels = make_head(), states(), token_ids()
    theirs, teacher = make_head(H=20), states(H=20)[0]
    found = gradients(
        lambda x, h: chunked_distillation(teacher, x, h, labels, teacher_head=theirs, chunk=4, **WEIGHTS), head, hidden, False
    )
    expected = gradients(lambda x, h: _plain(teacher, theirs, x, h, labels), head, hidden, False)
    assert all(error(found[name], value) < 1e-12 for name, value in expected.items())


def test_logits_are_never_whole_where_the_head_trains():
    B, N, H, V = 4, 50, 12, 301
    head, (teacher, hidden), labels = make_head("cap", torch.float32, H, V), states(torch.float32, B, N, H), token_ids(B, N, V)
    with Largest(V) as seen:
        gradients(lambda x, h: chunked_distillation(teacher, x, h, labels, teacher_head=head, chunk=16), head, hidden, False)
    assert seen.count
    assert seen.rows == 16  # W itself is [V, H]


def test_chunks_of_a_head_that_trains_are_worth_reading_its_gradient():
    assert chunk_rows(151936, torch.device("cpu"), 4096) == 1024
    assert chunk_rows(151936, torch.device("cpu"), 64) == 64


def test_no_second_derivative_of_the_weight():
    head, (teacher, hidden), labels = make_head(), states(), token_ids()
    weight = head.weight.clone().requires_grad_()
    total = chunked_distillation(teacher, hidden, head._replace(weight=weight), labels, teacher_head=head)[0]
    (gradient,) = torch.autograd.grad(total, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + weight.square().sum(), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(B, N, 5)}, r"teacher is of shape \[3, 7, 5\]; allowed: \[B, N, H\] = \[3, 7, 12\]"),
        ({"teacher": torch.zeros(B, N, H).double()}, "teacher is of dtype torch.float64; allowed: the dtype of head.weight"),
        ({"teacher_head": make_head(dtype=torch.float32, V=40)}, "teacher_head is of 40 tokens; allowed: the 33 of head"),
    ],
    ids=["width", "dtype", "vocabulary"],
)
def test_bad_teachers_of_the_loss(change, message):
    given = {"teacher": torch.zeros(B, N, H), "hidden": normal(B, N, H, seed=1), "labels": token_ids()} | change
    with pytest.raises(ValueError, match=message):
        chunked_distillation(head=make_head(dtype=torch.float32), dtype=torch.bfloat16, **given)


# --- the teacher ----------------------------------------------------------------------------------------------------------


def make(kind="llama", **kwargs):
    return sparse_model(kind, initializer_range=0.1, **kwargs)


def tune(model=None, *, teacher="itself", data=None, **kwargs):
    fields = {n: kwargs.pop(n) for n in list(kwargs) if n in FinetuneConfig.__dataclass_fields__}
    config = FinetuneConfig(**({"steps": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 0} | fields))
    model = make() if model is None else model
    return finetune(
        model, progressions() if data is None else data, config, teacher=model if teacher == "itself" else teacher, **kwargs
    )


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@RANKS
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_that_is_its_teacher_has_no_kl(kind, rank, tmp_path):
    """With K = E the sparse model is the dense one, before the first step."""
    tune(make(kind, top_k=E), lora_rank=rank, steps=1, folder=tmp_path)
    assert abs(read_log(tmp_path)[0]["kl"]) < 1e-6


@RANKS
@pytest.mark.parametrize("model", [make, soft_model], ids=["top_k", "soft"])
def test_the_kl_falls(model, rank, tmp_path):
    run = {"lora_rank": rank, "lr": 1e-2 if rank else 3e-3, "z": 0.0, "balance": 0.0}
    model = tune(model(), data=progressions(4), steps=30, folder=tmp_path, **run)
    log = read_log(tmp_path)
    (figures,) = model.config.stages["finetune"]
    assert log[-1]["kl"] < 0.8 * log[0]["kl"]
    assert figures["kl"][1] < 0.95 * figures["kl"][0]
    assert all(entry["loss"] == pytest.approx(entry["kl"], rel=1e-6) for entry in log)
    assert figures["teacher"] == "the model itself, every expert on"
    text = model_card(model, "title", {})
    columns = (
        "| run | steps | tokens | lora_rank | teacher | loss | kl |" if rank else "| run | steps | tokens | teacher | loss | kl |"
    )
    assert columns in text


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "granite", "gemma2"])
def test_cross_entropy_alone_is_that_of_the_model(kind, tied):
    """kl 0, ce 1: the same steps as without a teacher, whose loss is in float32 in any dtype."""
    fields = {"tie_word_embeddings": tied, "dtype": torch.float64}
    found, expected = tune(make(kind, **fields), kl=0.0, ce=1.0), tune(make(kind, **fields), teacher=None)
    there = expected.state_dict()
    for name, value in found.state_dict().items():
        assert error(value, there[name]) < 1e-4, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_those_of_whole_logits(tied, monkeypatch):
    fields = {"tie_word_embeddings": tied, "dtype": torch.float64}
    found = tune(make(**fields), kl=1.0, ce=0.5)
    monkeypatch.setattr(module, "find_head", lambda *_: None)
    with pytest.warns(UserWarning, match="the loss takes the whole logits of both passes"):
        expected = tune(make(**fields), kl=1.0, ce=0.5)
    there = expected.state_dict()
    for name, value in found.state_dict().items():
        assert error(value, there[name]) < 1e-6, name


def _teacher(model, rank, half=False):
    return module.teaching(model, model, progressions(), kl=1.0, ce=0.0, adapters=bool(rank), half=half)


@LORA
def test_with_adapters_the_teacher_is_the_dense_model_without_a_copy():
    """Whatever adapters and routers have become."""
    dense, model, x = dense_model(initializer_range=0.1), make(), progressions(4)
    with torch.no_grad():
        expected = dense(x).logits
    config = FinetuneConfig(lora_rank=4)
    with _teacher(model, 4) as teacher:
        assert [p.data_ptr() for p in teacher.model.parameters()] == [p.data_ptr() for p in model.parameters()]
        with adapters(model, config), torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
            found, student = teacher.model(x).logits, model(x).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (student - expected).abs().max() > 0.1


def test_without_adapters_what_trains_alone_is_copied():
    dense, model, x = dense_model(initializer_range=0.1), make(), progressions(4)
    model.model.embed_tokens.weight.requires_grad_(False)
    with torch.no_grad():
        expected = dense(x).logits
    with _teacher(model, 0) as teacher, torch.no_grad():
        pairs = zip(teacher.model.named_parameters(), model.parameters(), strict=True)
        shared = {name for (name, p), q in pairs if p.data_ptr() == q.data_ptr()}
        assert shared == {"model.embed_tokens.weight", *(f"model.layers.{n}.mlp.gate.weight" for n in (0, 1))}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        torch.testing.assert_close(teacher.model(x).logits, expected, rtol=1e-4, atol=1e-4)
        assert not teacher.model.training


@RANKS
def test_a_folder_and_a_model_teach_as_the_model_itself(rank, tmp_path):
    dense = dense_model(initializer_range=0.1).train()
    dense.save_pretrained(tmp_path / "dense")
    before = copy.deepcopy(dense.state_dict())
    runs = {"itself": "itself", "folder": str(tmp_path / "dense"), "model": dense}
    logs, names = {}, {}
    for name, teacher in runs.items():
        model = tune(teacher=teacher, lora_rank=rank, folder=tmp_path / name)
        logs[name] = torch.tensor([[entry["kl"], entry["ce"]] for entry in read_log(tmp_path / name)])
        names[name] = model.config.stages["finetune"][0]["teacher"]
    assert torch.equal(logs["folder"], logs["model"])
    assert (logs["folder"] - logs["itself"]).abs().max() < 1e-4
    assert names["folder"] == str(tmp_path / "dense")
    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_a_converted_folder_teaches_as_it_is(tmp_path):
    dk.save(make(), tmp_path / "moe")
    tune(teacher=tmp_path / "moe", steps=1, folder=tmp_path / "run")
    assert abs(read_log(tmp_path / "run")[0]["kl"]) < 1e-6


@RANKS
def test_a_taught_run_resumes_bit_for_bit(tmp_path, rank):
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
    logs = [[{k: v for k, v in e.items() if k != "seconds"} for e in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    for change, message in (
        ({"kl": 2.0}, r"was written with kl = 1\.0; this run has 2\.0"),
        ({"teacher": None}, r"was written with kl = 1\.0; this run has None"),
        ({"teacher": dense_model(seed=4)}, r"was written with teacher = -?\d+; this run has -?\d+"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(**run, folder=tmp_path / "parts", resume=True, **change)


def test_a_run_without_a_teacher_resumes_one_from_before_there_were_any(tmp_path):
    run = {"steps": 4, "checkpoint_every": 2, "folder": tmp_path, "teacher": None}

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(**run, on_step=stop)
    (path,) = (tmp_path / "checkpoints").iterdir()
    state = torch.load(path, weights_only=True)
    for key in ("kl", "ce", "teacher"):
        del state["fingerprint"][key]
    torch.save(state, path)
    tune(**run, resume=True)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]


@RANKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(rank, dtype, tmp_path):
    """The KL is that of float32, as near as the dtype allows; weights stay narrow, with adapters the teacher's too."""
    model, exact = make(dtype=dtype), make(dtype=dtype).float()
    flags = [p.requires_grad for p in model.parameters()]
    tune(model, lora_rank=rank, steps=2, folder=tmp_path / "narrow")
    tune(exact, lora_rank=rank, steps=2, folder=tmp_path / "exact")
    found, expected = (read_log(tmp_path / name)[0] for name in ("narrow", "exact"))
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.05 if dtype == torch.bfloat16 else 0.01)
    assert found["ce"] == pytest.approx(expected["ce"], rel=0.01)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [p.requires_grad for p in model.parameters()] == flags


def test_passes_of_a_step_add_up():
    a, b = (tune(micro_batch_size=micro, steps=3, balance=0.0).state_dict() for micro in (None, 1))
    assert all(torch.allclose(a[n].double(), b[n].double(), atol=2e-4) for n in a)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl": -1.0}, "kl is -1.0; allowed: a number of at least 0"),
        ({"ce": float("nan")}, "ce is nan; allowed: a number of at least 0"),
    ],
)
def test_bad_weights(fields, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**fields)


def test_bad_teachers(tmp_path):
    other = dense_model(vocab_size=VOCABULARY + 8)
    with pytest.raises(
        ValueError, match=r"teacher is LlamaForCausalLM, of 72 tokens; allowed: a causal LM of the same vocabulary, 64"
    ):
        tune(teacher=other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"teacher is .*other, of 72 tokens; allowed: a causal LM of the same vocabulary, 64 tokens"
    ):
        tune(teacher=tmp_path / "other")
    with pytest.raises(ValueError, match=r"teacher is .*none, which cannot be read \(.*\); allowed: the folder of a causal LM"):
        tune(teacher=tmp_path / "none")
    with pytest.raises(ValueError, match="teacher is a Linear; allowed: a causal LM of transformers, a folder or a name"):
        tune(teacher=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"teacher is LlamaModel, of None tokens; allowed: a causal LM of the same vocabulary"):
        tune(teacher=dense_model().model)
    with pytest.raises(ValueError, match="teacher is on meta; allowed: the device of model, cpu"):
        tune(teacher=dense_model().to("meta"))
    with pytest.raises(ValueError, match=r"kl is 1\.0; allowed: together with a teacher"):
        tune(teacher=None, kl=1.0)
    with pytest.raises(ValueError, match=r"kl is 0; allowed: a positive number where ce is 0\.0"):
        tune(kl=0)


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """dense/, other/ of another tokenizer, moe/, text.txt; read only."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder / "dense", train_tokenizer([prose(60)], vocab_size=300))
    write_model(folder / "other", train_tokenizer([prose(60)[::-1]], vocab_size=300))
    (folder / "text.txt").write_text(prose(60))
    return folder


@pytest.fixture(scope="module")
def moe(here, tmp_path_factory):
    """A folder converted by the command."""
    from dotmoe_kernels.cli import main

    folder = tmp_path_factory.mktemp("moe") / "moe"
    assert main([str(a) for a in convert_arguments(here, folder)]) == 0
    return folder


def test_the_dense_model_teaches_by_default(capsys, here, tmp_path):
    for name, flags in (("on", ()), ("off", ("--no-teacher",)), ("named", ("--teacher", here / "dense"))):
        arguments = convert_arguments(here, tmp_path / name, "--stage", "align,finetune", *SHORT[2:], *flags)
        status, out, err = call(capsys, *arguments)
        assert (status, err) == (0, "")
        (figures,) = stages_of(tmp_path / name)["finetune"]
        given = {"on": module.ITSELF, "off": None, "named": str(here / "dense")}[name]
        assert figures.get("teacher") == given
        assert ("kl" in figures) == (given is not None)
        assert (f", teacher {given}" in out) == (given is not None)
    assert not states_equal(dk.load(tmp_path / "on"), dk.load(tmp_path / "off"))


def test_a_converted_model_teaches_itself_once(capsys, here, moe, tmp_path):
    status, out, err = call(capsys, *finetune_arguments(moe, here / "text.txt", tmp_path / "once", *SHORT[2:]))
    assert (status, err) == (0, "")
    assert stages_of(tmp_path / "once")["finetune"][0]["teacher"] == module.ITSELF
    assert "teacher: none" not in out
    status, out, err = call(capsys, *finetune_arguments(tmp_path / "once", here / "text.txt", tmp_path / "twice", *SHORT[2:]))
    assert (status, err) == (0, "")
    assert "teacher: none, since MODEL was fine-tuned before" in out
    assert "teacher" not in stages_of(tmp_path / "twice")["finetune"][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--teacher", "{}/other"), "--teacher is {}/other, of another tokenizer; allowed: a model of the same tokens"),
        (("--teacher", "{}/none"), "--teacher is {}/none, which is no folder; allowed: a Hugging Face model folder, or a name"),
        (("--teacher", "{}/dense", "--no-teacher"), "argument --no-teacher: not allowed with argument --teacher"),
    ],
    ids=["tokenizer", "no folder", "both"],
)
def test_bad_teachers_of_the_command(capsys, here, moe, tmp_path, flags, message):
    flags = [flag.format(here) for flag in flags]
    status, out, err = call(capsys, *finetune_arguments(moe, here / "text.txt", tmp_path / "tuned", *flags))
    assert (status, out) == (2, "")
    assert err == f"dotmoe convert: error: {message.format(here)}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [("--teacher", "x"), ("--no-teacher",)])
def test_a_teacher_needs_the_stage(capsys, here, tmp_path, flags):
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *flags))
    assert status == 2
    assert "allowed: together with --stage finetune" in err


def test_the_output_may_not_replace_the_teacher(capsys, here, moe, tmp_path):
    write_model(tmp_path / "dense", train_tokenizer([prose(60)], vocab_size=300))
    flags = ("--teacher", tmp_path / "dense", "--overwrite")
    status, _, err = call(capsys, *finetune_arguments(moe, here / "text.txt", tmp_path / "dense", *flags))
    assert status == 2
    assert "--teacher" in err


def test_find_head_of_a_copy():
    """The parts of the formula are those of the model it was copied from."""
    model = make("granite")
    with _teacher(model, 0) as teacher:
        ours, theirs = teacher.heads
        assert ours[3:] == theirs[3:] == find_head(model, progressions(1))[3:]
        assert theirs.backbone is teacher.model.base_model
