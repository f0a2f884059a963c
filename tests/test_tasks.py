"""dotmoe eval --tasks on local tasks of lm-evaluation-harness, without network; what is said where it is missing."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_cli import V, assert_one_line, call, convert_arguments, prose, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dotmoe_kernels as dk
from dotmoe_kernels import cli
from dotmoe_kernels.cli.tasks import task_lines
from dotmoe_kernels.conversion import tasks
from dotmoe_kernels.conversion.demo import train_tokenizer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {rows}
  cache_dir: {cache}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{{field}}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def rows(seed, count=6):
    answers = [prose(2, seed=seed + 100).splitlines()[0], prose(1, seed=seed + 200).split()[0]]  # a long one and a word
    return [{"question": prose(1, seed=seed + n), "choices": answers, "label": n % 2} for n in range(count)]


def write_task(folder, name, seed, *, field="question", lines=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(seed)) if lines is None else lines)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=path, cache=folder / "cache", field=field))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """dense/, moe/, held.txt, tasks/ with colours, days and the paper's six under their names; read only."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = train_tokenizer([prose(60)], vocab_size=V)
    write_model(folder / "dense", tokenizer)
    (folder / "text.txt").write_text(prose(60))
    (folder / "held.txt").write_text(prose(20, seed=1))
    assert cli.main(convert_arguments(folder, folder / "moe")) == 0
    for seed, name in enumerate(("colours", "days", *tasks.PAPER_TASKS)):
        write_task(folder / "tasks", name, 10 * seed)
    write_task(folder / "tasks", "no_field", 0, field="question.a.b")
    write_task(folder / "tasks", "no_rows", 0, lines="{\n")
    write_task(
        folder / "tasks", "no_choices", 0, lines="".join(json.dumps(r) + "\n" for r in [*rows(0), rows(0)[0] | {"choices": []}])
    )
    return folder


@pytest.fixture
def harness(monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def evaluate(here, *names, model="moe", more=()):
    return ("eval", here / model, "--tasks", *names, "--include-path", here / "tasks", *more)


def accuracies(folder, found):
    """acc and acc_norm, one answer at a time; a space stands between question and answer, and is no part of its length."""
    model = (dk.load if folder.name == "moe" else AutoModelForCausalLM.from_pretrained)(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = {"acc": 0, "acc_norm": 0}
    for row in found:
        sums = []
        for answer in row["choices"]:
            before, whole = tokenizer(row["question"])["input_ids"], tokenizer(f"{row['question']} {answer}")["input_ids"]
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(chances[n - 1, whole[n]]) for n in range(len(before), len(whole))))
        each = [total / len(answer) for total, answer in zip(sums, row["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == row["label"]
        right["acc_norm"] += each.index(max(each)) == row["label"]
    return {name: count / len(found) for name, count in right.items()}


# --- with lm-eval ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_local_task_as_json(capsys, here, harness, model):
    status, out, err = call(capsys, *evaluate(here, "colours,days", model=model, more=("--limit", 5, "--json")))
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["model"], report["kind"]) == (str(here / model), "dense" if model == "dense" else "dotmoe")
    assert set(report) == {"model", "kind", "tasks", "lm_eval", "limit"}  # no perplexity and no loads without text
    assert list(report["tasks"]) == ["colours", "days"]
    for name, seed in (("colours", 0), ("days", 10)):
        found = report["tasks"][name]
        assert (found["n"], found["few_shot"]) == (5, 0)
        expected = accuracies(here / model, rows(seed)[:5])
        assert {metric: values["value"] for metric, values in found["metrics"].items()} == pytest.approx(expected)
        for values in found["metrics"].values():
            share = values["value"]
            assert values["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 4))


def test_the_six_of_the_paper_and_their_mean(capsys, here, harness):
    """Under their own names in a folder, so that no data is fetched."""
    status, out, err = call(capsys, *evaluate(here, "paper", "days", more=("--json",)))
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert list(report["tasks"]) == [*tasks.PAPER_TASKS, "days"]
    parts = [report["tasks"][name]["metrics"][metric] for name, metric in tasks.PAPER_TASKS.items()]
    assert report["paper"]["metrics"] == tasks.PAPER_TASKS
    assert report["paper"]["value"] == pytest.approx(sum(part["value"] for part in parts) / 6)
    assert report["paper"]["stderr"] == pytest.approx(math.sqrt(sum(part["stderr"] ** 2 for part in parts)) / 6)
    assert (report["limit"], report["tasks"]["piqa"]["n"]) == (None, 6)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_beside_the_perplexity(capsys, here, harness, model):
    text = ("--data", here / "held.txt", "--sequence-length", "16")
    plain = call(capsys, "eval", here / model, *text)[1]
    status, out, err = call(capsys, *evaluate(here, "days", "colours", model=model, more=text))
    assert (status, err) == (0, "")
    assert out.startswith(plain)
    lines = out.removeprefix(plain).splitlines()
    assert lines[0].startswith("tasks (lm-evaluation-harness 0.")
    assert [line.split()[:2] for line in lines[2:]] == [[n, m] for n in ("days", "colours") for m in ("acc", "acc_norm")]
    assert all(line.endswith(" 6") for line in lines[2:])
    report = json.loads(call(capsys, *evaluate(here, "days", model=model, more=(*text, "--json")))[1])
    assert {"perplexity_dense", "tokens", "tasks", "lm_eval"} <= set(report)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_rows", "--tasks is no_rows, which lm-eval cannot load ("),
        ("no_field", "--tasks is no_field, which lm-eval cannot load (UndefinedError: "),
        ("days,no_choices", "--tasks is days,no_choices, which lm-eval cannot run (ValueError: "),
        ("colors", "--tasks is colors; allowed: paper, or a task of lm-eval or of --include-path (near: colours)"),
    ],
)
def test_tasks_that_are_none(capsys, here, harness, monkeypatch, name, said):
    import lm_eval.tasks

    small = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # lm-eval's own files take ten seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    status, out, err = call(capsys, *evaluate(here, name))
    assert_one_line(status, err, "eval", said)
    assert out == ""


def test_a_tokenizer_of_another_model(capsys, here, harness, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(here / "dense")
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(tmp_path / "tokens")
    status, out, err = call(capsys, *evaluate(here, "days", more=("--tokenizer", tmp_path / "tokens")))
    assert_one_line(status, err, "eval", f"--tokenizer is one whose tokens have ids up to {V}; allowed: ids below the model's {V}")
    assert out == ""


# --- and without ----------------------------------------------------------------------------------------------------------


def test_without_lm_eval_it_says_how_to_install_it(capsys, here, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, out, err = call(capsys, "eval", here / "dense", "--tasks", "paper")
    assert_one_line(status, err, "eval", "--tasks needs lm-evaluation-harness (")
    assert err.endswith("): pip install 'dotmoe_kernels[eval]'\n")
    assert out == ""


def test_lm_eval_is_imported_once_it_is_needed():
    code = "import sys, dotmoe_kernels.conversion.tasks, dotmoe_kernels.cli.commands; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--data is not given; allowed: text to measure on, or --tasks"),
        (("--tasks", "days", "--sequence-length", "16"), "--sequence-length is 16; allowed: together with --data"),
        (("--tasks", "days", "--max-tokens", "64"), "--max-tokens is 64; allowed: together with --data"),
        (("--tasks", "days", "--limit", "0"), "--limit is 0; allowed: at least 1"),
        (("--tasks", "days,", "--include-path", "{here}"), "--tasks is 'days,'; allowed: paper, or names of lm-eval's tasks"),
        (("--tasks", "days", "--include-path", "{here}/no"), "--include-path is {here}/no, which is no folder; allowed: a folder"),
        (("--tasks", "days", "--batch-size", "0"), "--batch-size is 0; allowed: at least 1"),
        (("--data", "{here}/held.txt", "--limit", "5"), "--limit is 5; allowed: together with --tasks"),
        (("--data", "{here}/held.txt", "--include-path", "x"), "--include-path is x; allowed: together with --tasks"),
    ],
)
def test_wrong_flags(capsys, here, flags, said):
    status, out, err = call(capsys, "eval", here / "dense", *(flag.format(here=here) for flag in flags))
    assert_one_line(status, err, "eval", said.format(here=here))
    assert out == ""


def test_a_model_that_is_none_ends_before_tasks_are_fetched(capsys, here, monkeypatch):
    monkeypatch.setattr(tasks, "find_tasks", lambda *args: pytest.fail("looked for tasks"))
    status, out, err = call(capsys, "eval", here / "nothing", "--tasks", "paper")
    assert_one_line(status, err, "eval", f"MODEL is {here / 'nothing'}, which is no folder; allowed: a Hugging Face model folder")


def test_what_lm_eval_says_in_plain_numbers():
    found = tasks._metrics(
        {
            "name": "x",
            "alias": "x",
            "sample_len": 4,
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": 0.1,
            "perplexity,none": 3,
            "perplexity_stderr,none": "N/A",
            "bleu,none": math.nan,
        }
    )
    assert found == {
        "exact_match,strict": {"value": 0.5, "stderr": 0.1},
        "perplexity": {"value": 3.0, "stderr": None},
        "bleu": {"value": None, "stderr": None},
    }
    lines = task_lines({"lm_eval": "1", "tasks": {"x": {"n": None, "few_shot": 0, "metrics": found}}})
    assert lines[-1].split() == ["x", "bleu", "-", "-", "-"]
    assert task_lines({"perplexity_dense": 1.0}) == []
