"""The command line end to end on a tiny model; wrong input ends with one line, status 2 and nothing written. The demo's parts."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels import cli
from dotmoe_kernels.conversion import count_parameters, demo, moe_blocks, pipeline
from dotmoe_kernels.conversion.demo import DemoSize, run_demo, split_documents, standard_library, train_tokenizer
from dotmoe_kernels.evaluation import perplexity
from dotmoe_kernels.models.inspect import describe

WORDS = [
    "the",
    "router",
    "sends",
    "every",
    "token",
    "to",
    "four",
    "experts",
    "and",
    "each",
    "neuron",
    "serves",
    "one",
    "of",
    "them",
]
V, S = 300, 16


def prose(sentences, seed=0):
    draw = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(WORDS), (sentences, 8), generator=draw).tolist()
    return "\n".join(" ".join(WORDS[i] for i in row) + "." for row in pick)


def write_model(folder, tokenizer, *, model_class=LlamaForCausalLM, **fields):
    torch.manual_seed(0)
    values = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    model = model_class(LlamaConfig(**(values | fields)))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([prose(60)], vocab_size=V)


@pytest.fixture(scope="session")
def here(tmp_path_factory, tokenizer):
    """dense/, text.txt, text.jsonl, text.parquet, held.txt; read only."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "dense", tokenizer)
    (folder / "text.txt").write_text(prose(60))
    (folder / "held.txt").write_text(prose(20, seed=1))
    rows = [prose(3, seed=n) for n in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"body": rows}), folder / "text.parquet")
    return folder


@pytest.fixture(scope="session")
def converted(here):
    """Converted once; read only."""
    assert cli.main(convert_arguments(here, here / "moe")) == 0
    return here / "moe"


def convert_arguments(here, output, *extra, data="text.txt", model="dense"):
    return [
        *("convert", str(here / model), "--data", str(here / data), "--output", str(output)),
        *("--expert-size", "8", "--sequence-length", str(S), "--batch-size", "2", "--steps", "3", "--no-progress"),
        *map(str, extra),
    ]


def contents(folder):
    """Every file with a hash of its bytes, hidden ones included."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def call(capsys, *arguments):
    """(status, stdout, stderr); argparse's exit counts as a status."""
    capsys.readouterr()
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def in_subprocess(*arguments, limit=None, code=None, cwd=None):
    """`python -m dotmoe_kernels`, under RLIMIT_FSIZE = ``limit`` bytes where given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if code is not None:
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    else:
        command = [sys.executable, "-m", "dotmoe_kernels", *map(str, arguments)]

    def lower():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=environment, cwd=cwd, preexec_fn=lower if limit else None
    )


# --- convert --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "extra"),
    [("text.txt", ()), ("text.jsonl", ("--text-field", "body")), ("text.parquet", ("--text-field", "body"))],
    ids=["text", "jsonl", "parquet"],
)
def test_convert_end_to_end(capsys, here, tmp_path, tokenizer, data, extra):
    output = tmp_path / "moe"
    before = contents(here / "dense")
    status, out, err = call(capsys, *convert_arguments(here, output, *extra, data=data))
    assert (status, err) == (0, "")
    assert contents(here / "dense") == before
    assert "every expert on = dense: relative error" in out
    assert "a permutation, exact capacities" in out
    assert "reloaded checkpoint: the same tensors" in out
    model = dk.load(output)
    assert model.config.num_experts == 8
    assert model.config.num_experts_per_tok == 2
    total, active = count_parameters(model)
    assert f"parameters: {total:,}, active a token {active:,} ({active / total:.1%})" in out
    assert model.config.assignment["steps"] == 3
    text = prose(2, seed=3)
    assert AutoTokenizer.from_pretrained(output)(text)["input_ids"] == tokenizer(text)["input_ids"]
    rows = [json.loads(line) for line in (tmp_path / "moe.run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe", "moe.run"]
    assert [p.name for p in (tmp_path / "moe.run").iterdir()] == ["log.jsonl"]  # a finished run needs no checkpoints
    card = (output / "README.md").read_text()
    assert "sparse perplexity" in card


def test_convert_measures_on_text_it_does_not_train_on(capsys, here, tmp_path, monkeypatch):
    seen = {}
    real = pipeline.align

    def record(model, layers, data, *args, **kwargs):
        seen["train"] = data.clone()
        return real(model, layers, data, *args, **kwargs)

    monkeypatch.setattr(pipeline, "align", record)
    _, out, _ = call(capsys, *convert_arguments(here, tmp_path / "moe"))
    from dotmoe_kernels.conversion import load_tokens

    tokens = load_tokens([here / "text.txt"], AutoTokenizer.from_pretrained(here / "dense"), sequence_length=S)
    held = tokens[len(seen["train"]) :]
    assert torch.equal(seen["train"], tokens[: len(seen["train"])])
    assert len(held) == max(len(tokens) // 20, 1)
    dense = AutoModelForCausalLM.from_pretrained(here / "dense").eval()
    sparse = dk.load(tmp_path / "moe")
    dense, sparse = (perplexity(model, held, batch_size=1) for model in (dense, sparse))
    found = re.search(r"held-out perplexity: dense ([0-9.]+), sparse ([0-9.]+) \(([0-9.]+)% retained\)", out)
    assert [float(value) for value in found.groups()] == pytest.approx([dense, sparse, 100 * dense / sparse], rel=2e-5, abs=0.05)


@pytest.mark.parametrize(
    ("extra", "method", "init"),
    [
        (("--method", "random"), "random", "random"),
        (("--method", "kmeans"), "kmeans", "kmeans"),
        (("--method", "activation"), "activation", "activation"),
        (("--method", "shared", "--shared", "1"), "shared", "shared"),
        (("--init", "kmeans"), "dot", "kmeans"),
        (("--init", "shared"), "dot", "shared"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_convert_options_reach_the_conversion(capsys, here, tmp_path, extra, method, init):
    options = ("--top-k", "3", "--seed", "5", "--dtype", "bfloat16", "--max-tokens", "160", "--device", "cpu")
    status, out, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *options, *extra))
    assert (status, err) == (0, "")
    model = dk.load(tmp_path / "moe")
    given = model.config.assignment
    assert (given["method"], given["init"], given["seed"]) == (method, init, 5)
    assert model.config.num_experts_per_tok == 3
    assert model.dtype == torch.bfloat16
    assert "144 tokens to train on, 16 held out" in out


def test_convert_with_a_number_of_experts(capsys, here, tmp_path):
    arguments = convert_arguments(here, tmp_path / "moe", "--num-experts", "4", "--active-fraction", "0.3")
    del arguments[arguments.index("--expert-size") : arguments.index("--expert-size") + 2]
    assert call(capsys, *arguments)[0] == 0
    assert dk.load(tmp_path / "moe").config.num_experts == 4
    assert dk.load(tmp_path / "moe").config.num_experts_per_tok == 2  # 1.2 rounds up


def test_convert_overwrites_when_asked(capsys, here, tmp_path):
    output = tmp_path / "moe"
    for seed in (0, 1):
        extra = ("--seed", seed, "--overwrite") if seed else ()
        assert call(capsys, *convert_arguments(here, output, *extra))[0] == 0
    assert dk.load(output).config.assignment["seed"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe", "moe.run"]


# --- interruption and resuming --------------------------------------------------------------------------------------------


def interrupt(monkeypatch, at, error=KeyboardInterrupt):
    real = pipeline.align

    def align(*args, **kwargs):
        def on_step(done):
            if done == at:
                raise error

        return real(*args, **kwargs, on_step=on_step)

    monkeypatch.setattr(pipeline, "align", align)


def test_an_interrupted_conversion_exits_130_and_resumes_bit_for_bit(capsys, here, tmp_path, monkeypatch):
    options = ("--steps", "6", "--checkpoint-every", "3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(capsys, *convert_arguments(here, whole, *options))[0] == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        status, _, err = call(capsys, *convert_arguments(here, parts, *options))
    assert status == 130
    assert err == "dotmoe convert: interrupted; the same command with --resume continues it\n"
    assert not parts.exists()
    run = contents(tmp_path / "parts.run")
    assert sorted(name for name in run if not name.startswith("tokens/")) == ["checkpoints/step-0000003.pt", "log.jsonl"]

    status, _, err = call(capsys, *convert_arguments(here, parts, *options))
    assert status == 2
    assert "with an interrupted run in" in err
    assert "--resume to continue it, or --overwrite to start anew" in err
    assert contents(tmp_path / "parts.run") == run

    assert call(capsys, *convert_arguments(here, parts, *options, "--resume"))[0] == 0
    a, b = dk.load(whole).state_dict(), dk.load(parts).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_overwrite_starts_an_interrupted_run_anew(capsys, here, tmp_path, monkeypatch):
    options = ("--steps", "6", "--checkpoint-every", "3")
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        call(capsys, *convert_arguments(here, tmp_path / "moe", *options))
    assert call(capsys, *convert_arguments(here, tmp_path / "moe", "--overwrite"))[0] == 0  # other options: no checkpoint is read
    assert dk.load(tmp_path / "moe").config.assignment["steps"] == 3


def test_resuming_with_other_options_is_refused(capsys, here, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        call(capsys, *convert_arguments(here, tmp_path / "moe", "--steps", "6", "--checkpoint-every", "3"))
    before = contents(tmp_path)
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", "--steps", "9", "--checkpoint-every", "3", "--resume"))
    assert_one_line(status, err, "convert", "was written with steps = 6; this run has 9")
    assert contents(tmp_path) == before


def test_a_killed_process_resumes(here, tmp_path):
    """SIGKILL in the middle of a step: nothing of the process runs any more."""
    options = convert_arguments(here, tmp_path / "moe", "--steps", "6", "--checkpoint-every", "3")
    code = f"""
        import os, signal, sys
        from dotmoe_kernels import cli
        from dotmoe_kernels.conversion import pipeline
        real = pipeline.align
        def on_step(done):
            if done == 5:
                os.kill(os.getpid(), {int(signal.SIGKILL)})
        pipeline.align = lambda *args, **kwargs: real(*args, **kwargs, on_step=on_step)
        cli.main(sys.argv[1:])
    """
    killed = in_subprocess(*options, code=code)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "moe").exists()
    assert cli.main([*options, "--resume"]) == 0
    assert cli.main(convert_arguments(here, tmp_path / "whole", "--steps", "6", "--checkpoint-every", "3")) == 0
    a, b = dk.load(tmp_path / "whole").state_dict(), dk.load(tmp_path / "moe").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("command", ["eval", "generate", "info", "demo"])
def test_every_command_exits_130_when_interrupted(capsys, here, converted, monkeypatch, tmp_path, command):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupted)
    arguments = {
        "eval": (converted, "--data", here / "held.txt"),
        "generate": (converted, "--prompt", "the"),
        "info": (converted,),
        "demo": ("--output", tmp_path / "d"),
    }[command]
    assert call(capsys, command, *arguments) == (130, "", f"dotmoe {command}: interrupted\n")


def test_a_reader_that_leaves_ends_the_command_without_a_word(capsys, converted, monkeypatch):
    """As head does; little text fails only when it is flushed."""
    for lines in (1, 100_000):
        monkeypatch.setitem(cli.COMMANDS, "info", lambda args, lines=lines: print("line\n" * lines) or 0)
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert cli.main(["info", str(converted)]) == 1
            monkeypatch.undo()
        assert capsys.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_exits_1(capsys, here, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2, FloatingPointError("non-finite loss at step 3"))
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe"))
    assert (status, err) == (1, "dotmoe convert: error: non-finite loss at step 3\n")
    assert not (tmp_path / "moe").exists()


# --- eval, generate, info -------------------------------------------------------------------------------------------------


def test_eval_as_json(capsys, here, converted):
    status, out, err = call(capsys, "eval", converted, "--data", here / "held.txt", "--sequence-length", S, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    from dotmoe_kernels.conversion import load_tokens

    tokens = load_tokens([here / "held.txt"], AutoTokenizer.from_pretrained(here / "dense"), sequence_length=S)
    dense = AutoModelForCausalLM.from_pretrained(here / "dense").eval()
    model = dk.load(converted)
    assert report["tokens"] == tokens.numel()
    assert report["perplexity_dense"] == pytest.approx(perplexity(dense, tokens), rel=1e-5)
    assert report["perplexity_sparse"] == pytest.approx(perplexity(model, tokens), rel=1e-5)
    assert report["retention"] == pytest.approx(report["perplexity_dense"] / report["perplexity_sparse"])
    assert (report["total_parameters"], report["active_parameters"]) == count_parameters(model)
    assert list(report["load"]) == list(moe_blocks(model))
    for load in report["load"].values():
        assert len(load["share"]) == 8
        assert sum(load["share"]) == pytest.approx(1)
        assert load["max"] == pytest.approx(8 * max(load["share"]))


def test_eval_as_text(capsys, here, converted):
    status, out, err = call(capsys, "eval", converted, "--data", here / "held.txt", "--sequence-length", S)
    assert (status, err) == (0, "")
    for part in ("perplexity: dense ", ", sparse ", "% retained)", "active a token", "load of the experts", "model.layers.1.mlp"):
        assert part in out


def test_eval_says_what_a_token_tells_of_its_expert(capsys, here, converted):
    arguments = ("eval", converted, "--data", here / "held.txt", "--sequence-length", S)
    _, out, _ = call(capsys, *arguments)
    report = json.loads(call(capsys, *arguments, "--json")[1])
    assert "I, the mutual information between token and expert in nats\n(0 = pruning; at most log(E / K), 1.386 here):" in out
    for name, load in report["load"].items():
        entropy = -sum(p * math.log(p) for p in load["share"] if p)
        assert report["mutual_information"][name] == pytest.approx(max(entropy - math.log(2), 0), abs=1e-9)
        row = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert row.split()[-1] == f"{report['mutual_information'][name]:.3f}"


def test_convert_says_that_the_routing_collapsed(capsys, here, tmp_path, tokenizer):
    """Embeddings that are one vector but for a little: every token goes to the same experts."""
    model = write_model(tmp_path / "dense", tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight += 20 * torch.randn(32)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(prose(300))
    arguments = convert_arguments(here, tmp_path / "moe", model=tmp_path / "dense", data=tmp_path / "text.txt")
    status, out, err = call(capsys, *arguments, "--init", "noise")
    assert status == 0
    assert err.count("\n") == 1
    assert err.startswith("dotmoe convert: warning: 2 of 2 layers leave experts without a token (the most in model.layers.")
    assert err.endswith(" on the held-out text: what those hold is pruned, not routed\n")
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "**Unused experts.** 2 layers leave experts without a token on the text that was held out" in card
    assert "## unused experts" in card


def test_hidden_and_centre_reach_the_run(capsys, here, tmp_path):
    output = tmp_path / "moe"
    status, _, err = call(capsys, *convert_arguments(here, output, "--hidden", "4", "--centre"))
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "moe.run" / "log.jsonl").read_text().splitlines()]
    assert all(row["hidden"] > 0 for row in rows)
    assert len(dk.load(output).config.stages["align"]["hidden"]) == 2
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "other", "--hidden", "-1"))
    assert_one_line(status, err, "convert", "--hidden is -1.0; allowed: a number of at least 0")
    arguments = ("--data", here / "text.txt", "--output", tmp_path / "other", "--stage", "reconstruct", "--hidden", "2")
    status, _, err = call(capsys, "convert", here / "dense", *arguments)
    assert_one_line(status, err, "convert", "--hidden is 2.0; allowed: together with --stage align")


def test_eval_of_a_fine_tuned_model_claims_nothing_of_the_dense_one(capsys, here, converted, tmp_path):
    model = dk.load(converted)
    model.config.stages = {"finetune": [{"steps": 1}]}
    dk.save(model, tmp_path / "moe", tokenizer=AutoTokenizer.from_pretrained(converted))
    arguments = ("eval", tmp_path / "moe", "--data", here / "held.txt", "--sequence-length", S)
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "which after fine-tuning is not the dense model's" in out
    assert "retained" not in out
    assert json.loads(call(capsys, *arguments, "--json")[1])["fine_tuned"] is True


def test_generate_continues_the_prompt(capsys, converted):
    arguments = ("generate", converted, "--prompt", "the router", "--max-new-tokens", "5")
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    tokenizer, model = AutoTokenizer.from_pretrained(converted), dk.load(converted)
    ids = tokenizer("the router", return_tensors="pt")["input_ids"]
    for _ in range(5):  # greedy, without a cache
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        if int(ids[0, -1]) == 0:
            break
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_generate_samples_by_its_seed(capsys, converted):
    texts = [
        call(capsys, "generate", converted, "--prompt", "the", "--temperature", "2", "--max-new-tokens", "12", "--seed", seed)[1]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the")


def test_info_of_a_converted_model(capsys, converted):
    status, out, err = call(capsys, "info", converted, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    total, active = count_parameters(dk.load(converted))
    expected = {"kind": "dotmoe", "backbone": "llama", "layers": 2, "num_experts": 8, "top_k": 2, "expert_size": 8}
    assert expected.items() <= report.items()
    assert (report["total_parameters"], report["active_parameters"]) == (total, active)
    assert report["assignment"]["method"] == "dot"
    status, out, err = call(capsys, "info", converted)
    assert (status, err) == (0, "")
    assert "num_experts: 8\n" in out
    assert "assignment: " in out
    assert "method dot" in out


def test_info_of_a_dense_model(capsys, tmp_path):
    write_model(tmp_path / "wide", None, intermediate_size=256)
    status, out, err = call(capsys, "info", tmp_path / "wide", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    expected = {"kind": "dense", "backbone": "llama", "ffns": 2, "hidden_size": 32, "ffn_width": 256, "activation": "silu"}
    assert expected.items() <= report.items()
    rows = report["topologies at 25 % of the FFN"]
    assert [(row["expert_size"], row["num_experts"], row["top_k"]) for row in rows] == [(32, 8, 2), (64, 4, 1)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert report["total_parameters"] == model.num_parameters()
    with pytest.warns(UserWarning, match="data is None"):
        sparse = dk.convert(model, dk.DotMoeConfig(num_experts=8, top_k=2), data=None)
    assert rows[0]["active_parameters"] == count_parameters(sparse)[1]  # what it promises is what the conversion gives
    status, out, _ = call(capsys, "info", tmp_path / "wide")
    assert status == 0
    assert "ffn_width: 256\n" in out
    assert "  expert_size 32, num_experts 8, top_k 2, active_parameters " in out


def test_info_of_a_dense_model_from_a_folder_named_dotmoe(capsys, wrong):
    """As the demo's is."""
    status, out, err = call(capsys, "info", wrong / "by that name", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["kind"] == "dense"


def test_describe_of_a_model_without_config(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError)):
        describe(tmp_path / "empty")


def test_help_has_examples(capsys):
    for command in ("demo", "convert", "eval", "generate", "bench", "info", "export"):
        status, out, _ = call(capsys, command, "--help")
        assert status == 0
        assert f"examples:\n  dotmoe {command}" in out
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(command in out for command in ("demo", "convert", "eval", "generate", "bench", "info", "export"))
    status, out, _ = call(capsys, "--version")
    assert (status, out) == (0, f"dotmoe_kernels {dk.__version__}\n")


def test_help_names_what_the_errors_name(capsys):
    for command in ("convert", "eval", "generate", "bench", "info"):
        assert re.search(r"^  MODEL +a ", call(capsys, command, "--help")[1], re.MULTILINE)


def test_the_examples_of_the_help_parse():
    parser = cli.build_parser()
    texts = [action.epilog for action in parser._subparsers._group_actions[0].choices.values()]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) >= 10
    for line in lines:
        said = line.replace("torchrun --nproc-per-node 8 -m dotmoe_kernels ", "dotmoe ")
        assert parser.parse_args(shlex.split(re.sub(r"  #.*", "", said))[1:]).command in line


# --- wrong input: one line, exit status 2, nothing written -------------------------------------------------------------------


def assert_one_line(status, err, command, message):
    assert status == 2, err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert err.startswith(f"dotmoe {command}: error: "), err
    assert message in err, err


@pytest.fixture(scope="session")
def wrong(here, tokenizer, tmp_path_factory):
    """Folders and files with something amiss."""
    folder = tmp_path_factory.mktemp("wrong")

    def dense(name, *, without=(), **fields):
        if fields:
            write_model(folder / name, tokenizer, **fields)
        else:
            shutil.copytree(here / "dense", folder / name, ignore=shutil.ignore_patterns(*without))
        return folder / name

    dense("no config", without=["config.json"])
    dense("no weights", without=["*.safetensors"])
    dense("no tokenizer", without=["token*", "special*"])
    (dense("config no json") / "config.json").write_text("{not json")
    (dense("config no model") / "config.json").write_text("{}")
    config = dense("wrong field") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "wide"}))
    config = dense("by that name") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "dotmoe"}))
    weights = dense("weights cut off") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    dense("narrow", vocab_size=64)
    dense("another width", intermediate_size=60)
    from safetensors.torch import load_file, save_file

    weights = dense("tensor missing") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    gpt2 = folder / "gpt2"
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    bert = BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(bert).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "empty folder").mkdir()
    (folder / "empty.txt").write_text(" \n")
    (folder / "empty.jsonl").write_text("")
    (folder / "short.txt").write_text("the router")
    (folder / "no.jsonl").write_text('{"text": "the"}\nnot json\n')
    (folder / "no.parquet").write_bytes(b"not parquet")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 9)
    (folder / "no kind").write_text("the router")
    (folder / "field.jsonl").write_text('{"body": "the"}\n')
    return folder


MODELS = {
    "no config": "MODEL is {}, without config.json",
    "no weights": "MODEL is {}, without weights",
    "no tokenizer": "{} has no tokenizer that can be read",
    "config no json": "MODEL is {}, which cannot be read (",
    "config no model": "Unrecognized model in {}",
    "wrong field": "MODEL is {}, which cannot be read (Validation error for field 'hidden_size'",
    "weights cut off": "{}/model.safetensors cannot be read (",
    "narrow": "MODEL is {}, whose tokenizer gives ids up to 299; allowed: ids below its vocabulary, 64",
    "another width": "--expert-size is 8; allowed: a divisor of F = 60",
    "tensor missing": "without the tensor model.layers.1.mlp.up_proj.weight",
    "gpt2": "MODEL is GPT2LMHeadModel, in which no FFN was recognised",
    "empty folder": "MODEL is {}, without config.json",
    "not there": "MODEL is {}, which is no folder; allowed: a Hugging Face model folder",
}


@pytest.mark.parametrize(("model", "message"), MODELS.items(), ids=MODELS)
def test_convert_a_model_that_is_none(capsys, here, wrong, tmp_path, model, message):
    arguments = convert_arguments(here, tmp_path / "moe")
    arguments[1] = str(wrong / model)
    before = contents(wrong)
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", message.format(wrong / model))
    assert list(tmp_path.iterdir()) == []
    assert contents(wrong) == before


@pytest.mark.parametrize("command", ["convert", "dry run", "info"])
def test_a_name_that_cannot_be_fetched(capsys, here, tmp_path, monkeypatch, command):
    """What transformers raises without a network, or for a name that nobody has, speaks of neither."""

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect")

    import transformers

    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", unreachable)
    arguments = {
        "convert": convert_arguments(here, tmp_path / "moe"),
        "dry run": ["convert", "", "--dry-run"],
        "info": ["info", ""],
    }[command]
    arguments[1] = "a/name"
    status, out, err = call(capsys, *arguments)
    message = "MODEL is a/name, which cannot be read (We couldn't connect); allowed: a Hugging Face model folder, or a name"
    assert_one_line(status, err, arguments[0], message)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_convert_an_encoder(capsys, here, wrong, tmp_path):
    arguments = convert_arguments(here, tmp_path / "moe")
    arguments[1] = str(wrong / "bert")
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", "without the tensor cls.predictions.bias")
    assert list(tmp_path.iterdir()) == []


def test_convert_a_folder_with_an_adapter(capsys, here, tmp_path):
    peft = pytest.importorskip("peft")
    folder = shutil.copytree(here / "dense", tmp_path / "adapted")
    model = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    arguments = convert_arguments(here, tmp_path / "moe")
    arguments[1] = str(folder)
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", "merge_and_unload() puts them into the weights")
    assert list(tmp_path.iterdir()) == [folder]


def test_convert_a_converted_model(capsys, here, converted, tmp_path):
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "again", model="moe"))
    assert_one_line(status, err, "convert", "already converted; allowed: a dense model")
    assert list(tmp_path.iterdir()) == []


SOURCES = {
    "empty.txt": "--data is {}, which is empty; allowed: files with text",
    "empty.jsonl": "--data is {}, which is empty; allowed: files with text",
    "missing.txt": "--data is {}, which does not exist; allowed: a file, a folder or a dataset's name",
    "missing.jsonl": "--data is {}, which does not exist",
    "missing": "--data is {}, which does not exist",
    "short.txt": "--data is {}, 4 tokens; allowed: at least one sequence of 16 tokens",
    "no.jsonl": "--data is {}, which is no JSON in line 2",
    "no.parquet": "--data is {}, which cannot be read (",
    "binary.txt": "--data is {}, which holds zero bytes; allowed: files with text in UTF-8",
    "no kind": "--data is {}; allowed: files ending in .txt",
    "field.jsonl": "--text-field is 'text', which line 1 of {} lacks; allowed: one of ['body']",
    "empty folder": "--data is {}, a folder without text",
    "": "--data is ''; allowed: a file, a folder or a dataset's name",
}


@pytest.mark.parametrize(("source", "message"), SOURCES.items(), ids=[name or "no name" for name in SOURCES])
@pytest.mark.parametrize("command", ["convert", "finetune", "eval"])
def test_data_that_cannot_be_read(capsys, here, converted, wrong, tmp_path, command, source, message):
    data = str(wrong / source) if source else ""
    if command == "eval":
        arguments = ["eval", converted, "--data", data, "--sequence-length", S]
    else:
        arguments = convert_arguments(here, tmp_path / "moe")
        arguments[arguments.index("--data") + 1] = data
    if command == "finetune":
        arguments[1] = str(converted)
        for flag in ("--expert-size", "--steps"):
            del arguments[arguments.index(flag) : arguments.index(flag) + 2]
        arguments += ["--stage", "finetune"]
    status, out, err = call(capsys, *arguments)
    assert_one_line(status, err, arguments[0], ": error: " + message.format(data))
    assert out == ""
    assert list(tmp_path.iterdir()) == []


FLAGS = {
    "F % E": (("--expert-size", "7"), "--expert-size is 7; allowed: a divisor of F = 64"),
    "expert-size 0": (("--expert-size", "0"), "--expert-size is 0; allowed: a divisor of F = 64"),
    "top-k > E": (("--top-k", "9"), "--top-k is 9; allowed: an integer from 1 to num_experts = 8"),
    "top-k 0": (("--top-k", "0"), "--top-k is 0; allowed: an integer from 1 to num_experts = 8"),
    "active-fraction 0": (("--active-fraction", "0"), "--active-fraction is 0.0; allowed: a number in (0, 1]"),
    "active-fraction 1.5": (("--active-fraction", "1.5"), "--active-fraction is 1.5; allowed: a number in (0, 1]"),
    "steps -1": (("--steps", "-1"), "--steps is -1; allowed: an integer of at least 0"),
    "batch-size 0": (("--batch-size", "0"), "--batch-size is 0"),
    "refresh-every 0": (("--refresh-every", "0"), "--refresh-every is 0; allowed: an integer of at least 1"),
    "micro-batch-size 3": (("--micro-batch-size", "3"), "--micro-batch-size is 3; allowed: 1 to batch_size = 2"),
    "tau-end 0": (("--tau-end", "0"), "--tau-end is 0.0; allowed: a positive number"),
    "affinity-lr nan": (("--affinity-lr", "nan"), "--affinity-lr is nan; allowed: a positive number"),
    "sequence-length 0": (("--sequence-length", "0"), "--sequence-length is 0; allowed: at least 2"),
    "sequence-length 1": (("--sequence-length", "1"), "--sequence-length is 1; allowed: at least 2"),
    "max-tokens 3": (("--max-tokens", "3"), "--max-tokens is 3; allowed: at least one sequence, 16"),
    "max-tokens -1": (("--max-tokens", "-1"), "--max-tokens is -1; allowed: at least one sequence, 16"),
    "cap of nothing": (("--cap", "nan"), "--cap is nan; allowed: a number of at least 1"),
    "seed": (("--seed", str(10**23)), f"--seed is {10**23}; allowed: an integer below 2^32"),
    "top-k given by the share": (
        ("--router", "soft", "--active-fraction", "1"),
        "top_k of --active-fraction is 8; allowed: at most num_experts - 1 = 7",
    ),
    "num-experts given by the size": (
        ("--router", "soft", "--expert-size", "64"),
        "num_experts of --expert-size is 1; allowed: at least 2",
    ),
    "top-k huge": (("--top-k", str(10**23)), f"--top-k is {10**23}; allowed: an integer from 1 to num_experts = 8"),
    "one sequence": (("--max-tokens", "16"), "at least two sequences of 16"),
    "unknown device": (("--device", "gpu"), "--device is 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
    "device xpu": (("--device", "xpu"), "--device is 'xpu'; allowed: "),
    "device meta": (("--device", "meta"), "--device is 'meta'; allowed: "),
    "unknown flag": (("--experts", "4"), "unrecognized arguments: --experts 4"),
    "unknown method": (("--method", "magic"), "argument --method: invalid choice: 'magic'"),
    "unknown init": (("--init", "zeros"), "argument --init: invalid choice: 'zeros'"),
    "unknown dtype": (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    "steps one": (("--steps", "one"), "argument --steps: invalid int value: 'one'"),
    "both sizes": (("--num-experts", "4"), "argument --num-experts: not allowed with argument --expert-size"),
    "both shares": (("--top-k", "4", "--active-fraction", "0.5"), "argument --active-fraction: not allowed with argument --top-k"),
}
if not torch.cuda.is_available():
    FLAGS["device cuda"] = (("--device", "cuda"), "--device is 'cuda'; allowed: cpu: this machine has no usable GPU")


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_convert_with_wrong_flags(capsys, here, tmp_path, flags, message):
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *flags))
    command = "" if message.startswith("unrecognized") else "convert"
    assert_one_line(status, err.replace("dotmoe: error", "dotmoe : error"), command, message)
    assert list(tmp_path.iterdir()) == []


def test_missing_arguments(capsys):
    for arguments in ((), ("convert",), ("convert", "x", "--output", "y"), ("eval", "x"), ("generate", "x"), ("info",), ("bake",)):
        status, out, err = call(capsys, *arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert ": error: " in err


@pytest.mark.parametrize("kind", ["in a file", "no permission"])
def test_output_that_cannot_be_made_ends_before_the_model_is_loaded(capsys, here, tmp_path, monkeypatch, kind):
    parent = tmp_path / "parent"
    if kind == "in a file":
        parent.write_text("mine")
        reason = "Not a directory"
    else:
        parent.mkdir()
        real, reason = os.mkdir, "Permission denied"  # the superuser, who may run these tests, can write anywhere

        def mkdir(path, *args, **kwargs):
            if os.path.dirname(path) == str(parent):
                raise PermissionError(13, reason, str(path))
            real(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", mkdir)
    output = parent / "new" / "moe"
    status, out, err = call(capsys, *convert_arguments(here, output))
    assert out == ""
    assert_one_line(status, err, "convert", f"--output is {output}, which cannot be written to ([Errno ")
    assert f"{reason}: " in err
    assert err.endswith("; allowed: a folder that can be made\n")


def test_output_never_replaces_the_model(capsys, here, tmp_path):
    shutil.copytree(here / "dense", tmp_path / "dense")
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to("dense")
    for output in (tmp_path / "dense", tmp_path / "link"):
        status, _, err = call(capsys, *convert_arguments(here, output, "--overwrite", model=tmp_path / "dense"))
        assert_one_line(status, err, "convert", f"--output is {output}, which holds MODEL; allowed: another folder")
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


def test_the_folder_of_the_run_never_replaces_the_model(capsys, here, tmp_path):
    shutil.copytree(here / "dense", tmp_path / "moe.run")
    before = contents(tmp_path)
    for extra in ((), ("--overwrite",)):
        status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *extra, model=tmp_path / "moe.run"))
        assert_one_line(status, err, "convert", f"and {tmp_path / 'moe.run'} holds MODEL; allowed: another folder")
    assert contents(tmp_path) == before


def test_the_folder_of_the_run_replaces_runs_alone(capsys, here, tmp_path):
    (tmp_path / "moe.run").mkdir()
    (tmp_path / "moe.run" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for extra in ((), ("--overwrite",), ("--resume",)):
        status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *extra))
        assert_one_line(status, err, "convert", f"and {tmp_path / 'moe.run'} holds something else than a run; allowed: ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "--output is {}, which exists; allowed: a new folder, or --overwrite"),
        ("..", "--output is {.parent}, which exists; allowed: a new folder, or --overwrite"),
        ("/", "--output is /; allowed: a folder that can be made"),
    ],
)
def test_output_without_a_name(capsys, here, tmp_path, monkeypatch, name, message):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, *convert_arguments(here, name))
    assert_one_line(status, err, "convert", message.format(tmp_path))
    assert out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", ["a model", "something else", "a file"])
def test_output_that_exists(capsys, here, converted, tmp_path, kind):
    output = tmp_path / "moe"
    if kind == "a model":
        shutil.copytree(converted, output)
    elif kind == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    status, _, err = call(capsys, *convert_arguments(here, output))
    message = "a file; allowed: a folder" if kind == "a file" else "which exists; allowed: a new folder, or --overwrite"
    assert_one_line(status, err, "convert", f"--output is {output}, {message}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["something else", "a file"])
def test_overwrite_replaces_models_alone_and_says_so_before_training(capsys, here, tmp_path, monkeypatch, kind):
    output = tmp_path / "moe"
    if kind == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.setattr(pipeline, "align", None)
    status, _, err = call(capsys, *convert_arguments(here, output, "--overwrite"))
    assert_one_line(status, err, "convert", str(output))
    assert contents(tmp_path) == before


COMMANDS = {
    "eval": ("--data", "held.txt", "--sequence-length", str(S)),
    "generate": ("--prompt", "the"),
    "export": ("--data", "held.txt", "--sequence-length", str(S), "--output", "never-written"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("empty folder", "MODEL is {}, without a config.json; allowed: a folder written by dotmoe_kernels.save"),
        ("not there", "MODEL is {}, which does not exist; allowed: a folder written by dotmoe_kernels.save"),
        ("short.txt", "MODEL is {}, which is no folder; allowed: a folder written by dotmoe_kernels.save"),
        ("config no json", "{}/config.json is not valid JSON ("),
        ("config no model", "MODEL is {}, whose model_type is None; allowed: a folder written by dotmoe_kernels.save"),
        ("a/name", "MODEL is {}, which does not exist; allowed: a folder written by dotmoe_kernels.save"),
        ("", "MODEL is '', which does not exist; allowed: a folder written by dotmoe_kernels.save"),
        ("moe without weights", "MODEL is {}, without weights"),
        ("moe cut off", "{}/model.safetensors cannot be read"),
        ("moe without tokenizer", "has no tokenizer that can be read; allowed: a MODEL saved with one, as save("),
    ],
)
def test_a_folder_that_is_no_converted_model(capsys, here, wrong, converted, tmp_path, command, model, message):
    folder = {"a/name": model, "": model}.get(model, wrong / model)
    if model.startswith("moe"):
        folder = tmp_path / "moe"
        left_out = {"moe without weights": ["*.safetensors"], "moe without tokenizer": ["token*", "special*"]}.get(model, [])
        shutil.copytree(converted, folder, ignore=shutil.ignore_patterns(*left_out))
        if model == "moe cut off":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-99])
    extra = [here / "held.txt" if part == "held.txt" else part for part in COMMANDS[command]]
    status, out, err = call(capsys, command, folder, *extra)
    assert_one_line(status, err, command, message.format(folder))
    assert out == ""


INFOS = {
    name: MODELS[name] for name in ("empty folder", "not there", "no config", "no weights", "config no json", "wrong field", "gpt2")
}
INFOS["bert"] = "MODEL is BertLMHeadModel, in which no FFN was recognised"
INFOS["short.txt"] = "which is no folder; allowed: a Hugging Face model folder, or a name"


@pytest.mark.parametrize(("model", "message"), INFOS.items(), ids=INFOS)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_info_of_what_is_no_model(capsys, wrong, model, message, form):
    status, out, err = call(capsys, "info", wrong / model, *form)
    assert_one_line(status, err, "info", message.format(wrong / model))
    assert out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_of_another_model(capsys, here, wrong, tmp_path, command):
    with pytest.warns(UserWarning, match="data is None"):
        model = dk.convert(AutoModelForCausalLM.from_pretrained(wrong / "narrow"), dk.DotMoeConfig(num_experts=8, top_k=2))
    dk.save(model, tmp_path / "moe", tokenizer=AutoTokenizer.from_pretrained(here / "dense"))
    extra = [here / "held.txt" if part == "held.txt" else part for part in COMMANDS[command]]
    status, out, err = call(capsys, command, tmp_path / "moe", *extra)
    assert_one_line(status, err, command, f"MODEL is {tmp_path / 'moe'}, whose tokenizer gives ids up to ")
    assert out == ""


@pytest.mark.parametrize(
    ("command", "advice"),
    [("eval", " A smaller --batch-size or --sequence-length takes less."), ("generate", "")],
)
def test_a_gpu_without_memory_for_it_exits_1(capsys, converted, monkeypatch, command, advice):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setitem(cli.COMMANDS, command, full)
    extra = ("--data", "x.txt") if command == "eval" else ("--prompt", "x")
    expected = f"dotmoe {command}: error: CUDA out of memory. Tried to allocate 2 GiB.{advice}\n"
    assert call(capsys, command, converted, *extra) == (1, "", expected)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("eval", ("--batch-size", "0"), "--batch-size is 0; allowed: at least 1"),
        ("eval", ("--sequence-length", "1"), "--sequence-length is 1; allowed: at least 2"),
        ("eval", ("--max-tokens", "-1"), "--max-tokens is -1; allowed: at least one sequence, 16"),
        ("eval", ("--device", "tpu"), "--device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        ("generate", ("--max-new-tokens", "0"), "--max-new-tokens is 0; allowed: at least 1"),
        ("generate", ("--temperature", "-1"), "--temperature is -1.0; allowed: at least 0"),
        ("generate", ("--temperature", "nan"), "--temperature is nan; allowed: at least 0"),
        ("generate", ("--seed", str(10**23)), f"--seed is {10**23}; allowed: an integer below 2^32"),
        ("generate", ("--prompt", ""), "--prompt is ''; allowed: text of at least one token"),
    ],
)
def test_wrong_flags_of_eval_and_generate(capsys, here, converted, command, flags, message):
    extra = [here / "held.txt" if part == "held.txt" else part for part in COMMANDS[command]]
    status, out, err = call(capsys, command, converted, *extra, *flags)
    assert_one_line(status, err, command, message)
    assert out == ""


def test_a_subprocess_prints_one_line_and_exits_2(here, tmp_path):
    done = in_subprocess(*convert_arguments(here, tmp_path / "moe", "--expert-size", "7"))
    assert_one_line(done.returncode, done.stderr, "convert", "--expert-size is 7; allowed: a divisor of F = 64")
    assert list(tmp_path.iterdir()) == []


# --- a disk that fills up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weights", "checkpoint", "tokenizer"])
def test_a_write_that_fails_half_way_leaves_the_old_folder_whole(capsys, here, converted, tmp_path, what):
    output = tmp_path / "moe"
    shutil.copytree(converted, output)
    before = contents(output)
    weights = (converted / "model.safetensors").stat().st_size
    limit = {"weights": weights // 2, "checkpoint": 20_000, "tokenizer": 0}[what]
    model = "dense"
    if what == "tokenizer":  # a model smaller than its tokenizer
        tokenizer = train_tokenizer([prose(60)], vocab_size=V)
        tokenizer.add_tokens([f"<unused {n}>" for n in range(500)])
        write_model(
            tmp_path / "dense", tokenizer, hidden_size=8, intermediate_size=16, num_hidden_layers=1, tie_word_embeddings=True
        )
        sizes = {p.name: p.stat().st_size for p in (tmp_path / "dense").iterdir()}
        limit = sizes["tokenizer.json"] - 100
        assert sizes["model.safetensors"] < limit // 2, sizes
    arguments = convert_arguments(tmp_path if what == "tokenizer" else here, output, "--overwrite", model=model)
    arguments[3] = str(here / "text.txt")
    if what == "weights":
        done = in_subprocess(*arguments, limit=limit)
        status, err = done.returncode, done.stderr
    else:  # Python ignores the signal, here as there
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            status, _, err = call(capsys, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(status, err, "convert", "File too large")
    assert contents(output) == before
    hidden = [p.name for p in tmp_path.rglob(".*")]
    assert hidden == []
    if what == "weights":  # the training is not lost
        rows = (tmp_path / "moe.run" / "log.jsonl").read_text()
        assert call(capsys, *arguments, "--resume")[0] == 0
        assert (tmp_path / "moe.run" / "log.jsonl").read_text() == rows
        assert contents(output).keys() == before.keys()
        dk.load(output)


# --- the demo's parts -------------------------------------------------------------------------------------------------------


def test_the_standard_library_has_text():
    texts = standard_library()
    assert len(texts) > 100
    assert sum(map(len, texts)) > 2_000_000
    assert all(text.strip() for text in texts)
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("class TestCase" in text and "import test.support" in text for text in texts)
    assert texts == standard_library()


def test_the_trained_tokenizer_gives_the_text_back():
    tokenizer = train_tokenizer([prose(30)], vocab_size=V)
    assert len(tokenizer) == V
    assert tokenizer.eos_token_id == 0
    for text in ("the router sends", "def f(x):\n\treturn 'é — 漢字 🙂'  \n", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the router sends every token")["input_ids"]) < 12


def test_held_out_text_is_of_other_documents():
    texts = [f"w{n:02d} " * 50 for n in range(40)]
    train, held = split_documents(texts, seed=0)
    assert sorted([*train, *held]) == sorted(texts)
    assert len(held) == 2
    assert not set(train) & set(held)
    assert split_documents(texts, seed=0) == (train, held)
    assert split_documents(texts, seed=1)[1] != held


def test_held_out_text_is_the_end_of_few_documents():
    text = " ".join(f"n{n:04d}" for n in range(4000))
    (train,), (held,) = split_documents([text], seed=0)
    assert train + held == text
    assert "n0000" in train
    assert "n3790" in train
    assert "n3810" in held
    assert len(held) == pytest.approx(len(text) / 20, rel=1e-3)


ROWS = [
    {"method": name, "perplexity": 10.0 + n, "retention": 0.9, "active_parameters": 50, "total_parameters": 100, "seconds": 1.0}
    for n, name in enumerate(["dense", "dot", "random"])
]
LOGS = {name: [{"step": n + 1, "kl": 1 / (n + 1)} for n in range(5)] for name in ("dot", "random")}


def test_the_figure_is_a_png(tmp_path):
    assert demo._write_figure(tmp_path / "a.png", ROWS, LOGS, "note") is True
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (520, 1300)
    assert len({tuple(p) for p in pixels[::5, ::5, :3].reshape(-1, 3).round(2).tolist()}) > 5  # something is drawn
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_no_figure_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert demo._write_figure(tmp_path / "a.png", ROWS, LOGS, "note") is False
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_line_a_method():
    lines = demo._table(ROWS).splitlines()
    assert lines[0].split() == ["method", "perplexity", "retention", "active", "parameters", "experts", "unused", "seconds"]
    assert lines[2].split() == ["dot", "11.00", "90.0%", "50", "(50%)", "-", "-", "1.0"]
    assert len({len(line) for line in lines}) == 1


@pytest.fixture
def tiny_demo(monkeypatch):
    size = DemoSize(dense_steps=2, align_steps=2, held_out=2)
    monkeypatch.setattr(demo, "QUICK", size)
    monkeypatch.setattr(demo, "FULL", size)
    monkeypatch.setattr(demo, "_DENSE_BATCH", 2)
    monkeypatch.setattr(demo, "_ALIGN_BATCH", 2)


@pytest.mark.parametrize("matplotlib", [True, False], ids=["with matplotlib", "without matplotlib"])
def test_the_demo_end_to_end(here, tmp_path, tiny_demo, monkeypatch, matplotlib):
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    (tmp_path / "text.txt").write_text(prose(1200))
    said = []
    folder = tmp_path / "demo"
    report = run_demo(folder, data=[str(tmp_path / "text.txt")], quick=matplotlib, progress=False, say=said.append)
    text = "\n".join(said)
    assert [row["method"] for row in report["rows"]] == ["dense", "dot", "random", "kmeans", "activation", "shared"]
    dense, *rest = report["rows"]
    assert dense["retention"] == 1
    assert all(row["retention"] == pytest.approx(dense["perplexity"] / row["perplexity"]) for row in rest)
    assert len({row["active_parameters"] for row in rest}) == 1
    assert rest[0]["active_parameters"] < dense["active_parameters"]
    assert report["reloaded_perplexity"] == pytest.approx(rest[0]["perplexity"], rel=1e-4)
    assert report["self_check"]["passed"]
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(report))
    names = {"dense", "dotmoe", "logs", "demo.json"} | ({"demo.png"} if matplotlib else set())
    assert {p.name for p in folder.iterdir()} == names
    assert ("figure: not written, matplotlib is missing" in text) != matplotlib
    assert demo._table(report["rows"]) in text
    assert ("quick: proves the path, not the ranking" in text) == matplotlib
    assert "the reloaded model writes:\n" + prose(1200)[:16] in text
    assert dk.load(folder / "dotmoe").config.num_experts_per_tok == 8
    assert AutoModelForCausalLM.from_pretrained(folder / "dense").num_parameters() == dense["total_parameters"]
    for method in ("dot", "random", "kmeans", "activation", "shared"):
        assert len((folder / "logs" / method / "log.jsonl").read_text().splitlines()) == 2


def test_the_demo_command(capsys, here, tmp_path, tiny_demo):
    (tmp_path / "text.txt").write_text(prose(1200))
    arguments = ("demo", "--quick", "--data", tmp_path / "text.txt", "--output", tmp_path / "demo")
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "held-out tokens" in out
    before = contents(tmp_path / "demo")
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "demo", "which exists; allowed: a new folder, or --overwrite")
    status, _, err = call(capsys, *arguments[:3], tmp_path / "missing.txt", *arguments[4:], "--overwrite")
    assert_one_line(status, err, "demo", "missing.txt, which does not exist")
    assert contents(tmp_path / "demo") == before
    assert call(capsys, *arguments, "--overwrite")[0] == 0
    assert contents(tmp_path / "demo").keys() == before.keys()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty.txt", "--data is {}, which is empty"),
        ("missing.txt", "--data is {}, which does not exist"),
        ("short.txt", "--data is the training part of {}, 3 tokens; allowed: at least one sequence of 128 tokens"),
    ],
)
def test_the_demo_with_text_that_does_not_do(capsys, wrong, tmp_path, source, message):
    status, _, err = call(capsys, "demo", "--quick", "--data", wrong / source, "--output", tmp_path / "demo")
    assert_one_line(status, err, "demo", message.format(wrong / source))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_reads_the_field_it_is_told(capsys, wrong, tmp_path):
    arguments = ("demo", "--quick", "--data", wrong / "field.jsonl", "--output", tmp_path / "demo")
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "demo", "--text-field is 'text', which line 1 of")
    status, _, err = call(capsys, *arguments, "--text-field", "body")
    assert_one_line(status, err, "demo", "at least one sequence of 128 tokens")


def test_the_demo_leaves_other_folders_alone(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    status, _, err = call(capsys, "demo", "--quick", "--overwrite", "--output", tmp_path)
    assert_one_line(status, err, "demo", "which holds something else than a demo; allowed: a new folder")
    assert contents(tmp_path) == before


def test_info_of_the_paths(capsys, converted):
    status, out, err = call(capsys, "info", "--paths", converted, "--dtype", "bfloat16", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["dtype"] == "bfloat16"
    rows = {(row["device"], row["tokens"]): row for row in report["paths"]}
    assert rows["cpu", 1]["path"] == rows["gpu", 1]["path"] == "decode"
    assert rows["gpu", 64]["path"] == "masked"
    assert rows["gpu", 16384]["path"] == rows["cpu", 16384]["path"] == "grouped"
    assert all(row["why"] for row in rows.values())
    status, out, err = call(capsys, "info", "--paths", converted)
    assert (status, err) == (0, "")
    assert "dtype: float32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--paths", "dense"), "MODEL is {}/dense; allowed: a converted model"),
        (("",), "MODEL is ''; allowed: a Hugging Face model folder"),
        (("moe", "--dtype", "float16"), "--dtype is float16; allowed: together with --paths"),
    ],
)
def test_info_of_paths_that_there_are_none_of(capsys, here, converted, arguments, message):
    status, out, err = call(capsys, "info", *(here / a if a in ("dense", "moe") else a for a in arguments))
    assert_one_line(status, err, "info", message.format(here))
    assert out == ""
