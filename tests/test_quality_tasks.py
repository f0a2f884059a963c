"""bench.quality tasks on made-up requests: log-likelihoods against one request at a time, the metrics, the subset, broken files."""

import gzip
import json
import math
import random

import pytest
import tiny
import torch
from test_cli import V, prose, write_model

from bench.quality import __main__ as command
from bench.quality import fetch, tasks
from dotmoe_kernels.conversion import save
from dotmoe_kernels.conversion.demo import train_tokenizer

WORDS = prose(60).split()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([prose(60)], vocab_size=V)


@pytest.fixture(scope="module")
def model():
    return tiny.dense_model(vocab_size=V, max_position_embeddings=128)


def row(document, choice, label, context, answer, **more):
    request = {"context": context, "continuation": answer}
    return {"doc_id": document, "idx": choice, "label": label, "request": request, "request_type": "loglikelihood", **more}


def made(seed, documents=5, choices=3):
    """Contexts and answers of different lengths, the last answer of every question of one word; unconditional requests too."""
    draw = random.Random(seed)
    rows = []
    for document in range(documents):
        context, label = " ".join(draw.choices(WORDS, k=draw.randint(2, 20))), draw.randrange(choices)
        for choice in range(choices):
            answer = " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 9) if choice < choices - 1 else 1))
            rows.append(row(document, choice, label, context, answer))
            rows.append(row(document + 1_000_000, choice, label, "Answer:", answer))
    return rows


def write_task(folder, rows, metric="acc_raw"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"task_config": {"primary_metric": metric}}))
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As fetch leaves it; read only."""
    folder = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate(fetch.TASK_NAMES):
        write_task(folder / fetch.TASKS / name, made(seed, documents=7), tasks.METRICS[seed % 2])
    return folder


def one_at_a_time(model, tokenizer, context, answer):
    """log p(answer | context), nothing shared."""
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + answer)["input_ids"]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(chances[n - 1, whole[n]]) for n in range(len(before), len(whole)))


# --- what a model is worth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "converted"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_as_one_request_at_a_time(data, tokenizer, kind, batch_tokens):
    """Batched, padded and with shared rows, dense and converted."""
    make = tiny.dense_model if kind == "dense" else tiny.sparse_model
    model = make(vocab_size=V, max_position_embeddings=128)
    scores = tasks.score(model, tokenizer, data / fetch.TASKS, documents=4, batch_tokens=batch_tokens)
    assert list(scores) == list(fetch.TASK_NAMES)
    for name, found in scores.items():
        metric, questions = tasks.read_task(data / fetch.TASKS / name)
        assert (found.metric, found.n) == (metric, 4)
        by_document = {question.document: question for question in questions}
        assert len(by_document) == 7  # none of the unconditional ones
        for document, correct, value in zip(found.documents, found.correct, found.log_likelihoods, strict=True):
            question = by_document[document]
            sums = [one_at_a_time(model, tokenizer, *request) for request in question.requests]
            each = [total / len(request.answer) for total, request in zip(sums, question.requests, strict=True)]
            assert value == pytest.approx(each[question.label], rel=1e-4)
            judged = sums if metric == "acc_raw" else each
            assert correct == (judged.index(max(judged)) == question.label)
        assert found.accuracy == sum(found.correct) / 4
        assert found.log_likelihood == pytest.approx(sum(found.log_likelihoods) / 4)


def test_the_metrics_choose_differently(tmp_path, model, tokenizer):
    """A long answer has the smaller sum and may have the larger mean: as the config says."""
    context = prose(1)
    long, short = " " + prose(1, seed=4), " " + WORDS[0]
    sums = [one_at_a_time(model, tokenizer, context, answer) for answer in (long, short)]
    assert sums[0] < sums[1]
    assert sums[0] / len(long) > sums[1] / len(short)
    rows = [row(document, choice, 0, context, answer) for document in range(2) for choice, answer in enumerate((long, short))]
    for metric, right in (("acc_raw", 0.0), ("acc_per_char", 1.0)):
        write_task(tmp_path / metric, rows, metric)
        found = tasks.score_task(model, tokenizer, tmp_path, metric)
        assert (found.metric, found.accuracy) == (metric, right)
        assert found.log_likelihood == pytest.approx(sums[0] / len(long), rel=1e-4)  # the space before it counts


def test_one_row_for_answers_of_one_token(model, tokenizer):
    """Each differs in its last token alone, which is no input."""
    requests = [tasks._Tokens((5, 6, 7), (n,)) for n in (8, 9, 10)]
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    found = tasks.log_likelihoods(model, requests)
    handle.remove()
    assert calls == [(1, 3)]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    assert found == pytest.approx(chances[[8, 9, 10]].tolist(), rel=1e-5)


def test_intervals_and_means():
    assert tasks._wilson(30, 60) == pytest.approx((0.3773, 0.6227), abs=1e-4)  # R: prop.test(30, 60, correct=FALSE)
    assert tasks._wilson(0, 60) == pytest.approx((0.0, 0.0602), abs=1e-4)
    assert tasks._normal(1.0, 0.25) == pytest.approx((1 - 0.98, 1 + 0.98), abs=1e-3)

    def made_up(correct, nats):
        interval = (0.0, 1.0)
        share, mean = sum(correct) / len(correct), sum(nats) / len(nats)
        return tasks.TaskScore("acc_raw", len(nats), share, interval, mean, interval, tuple(range(len(nats))), correct, nats)

    scores = {"a": made_up((True, False), (-1.0, -3.0)), "b": made_up((True, True, True), (-1.0, -1.0, -1.0))}
    assert tasks.mean_accuracy(scores) == 0.75  # a task counts once, whatever its documents
    assert tasks.mean_log_likelihood(scores) == -1.5
    found = json.loads(json.dumps(tasks.summary(scores)))
    assert found["tasks"]["a"]["correct"] == [True, False]
    assert found["mean"]["accuracy"] == 0.75
    low, high = found["mean"]["log_likelihood_interval"]  # the variance of a's mean is 1, b's 0; halved: a deviation of 0.5
    assert (low, high) == pytest.approx((-1.5 - 0.98, -1.5 + 0.98), abs=1e-3)


def test_nan_is_no_answer(data, tokenizer):
    model = tiny.dense_model(vocab_size=V, max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = tasks.score_task(model, tokenizer, data / fetch.TASKS, "boolq", documents=3)
    assert found.accuracy == 0.0
    assert math.isnan(found.log_likelihood)


# --- which questions, which tokens ----------------------------------------------------------------------------------------


def test_the_subset_is_the_same_for_every_model_and_grows(data):
    questions = tasks.read_task(data / fetch.TASKS / "sciq")[1]
    few, more = (tasks.subset(questions, "sciq", n) for n in (3, 5))
    assert few == tasks.subset(questions, "sciq", 3)
    assert len(few) == 3
    assert set(few) < set(more)
    assert few == sorted(few)
    assert tasks.subset(questions, "sciq", 100) == tasks.subset(questions, "sciq", None) == questions
    many = [question._replace(document=n) for n, question in enumerate(questions[:1] * 1000)]
    assert [q.document for q in tasks.subset(many, "sciq", 4)] == [23, 191, 428, 822]  # in every version
    for wrong in (0, 1, -3, True, 2.0):
        with pytest.raises(ValueError, match=r"documents is .*; allowed: an integer of at least 2"):
            tasks.subset(questions, "sciq", wrong)


def test_a_request_longer_than_the_positions_loses_its_beginning(tmp_path, tokenizer):
    context, answers = prose(30), (" the router", " of them and each")
    model = tiny.dense_model(vocab_size=V, max_position_embeddings=32)
    rows = [row(document, choice, 0, context, answer) for document in range(2) for choice, answer in enumerate(answers)]
    write_task(tmp_path / "long", rows)
    found = tasks.score_task(model, tokenizer, tmp_path, "long")
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + answers[0]))
    assert len(before) > 32
    kept = whole[:-1][-32:]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([kept])).logits[0].log_softmax(-1)
    targets = whole[len(before) :]
    expected = sum(float(chances[n - len(targets), t]) for n, t in enumerate(targets))
    assert found.log_likelihood == pytest.approx(expected / len(answers[0]), rel=1e-4)
    write_task(tmp_path / "longer", [row(d, c, 0, "the", " " + prose(30, seed=c)) for d in range(2) for c in range(2)])
    with pytest.raises(ValueError, match=r"model is one of 32 positions, and an answer has .* tokens; allowed: positions for"):
        tasks.score_task(model, tokenizer, tmp_path, "longer")


class Marking:
    """Puts <s> before a text where special tokens are asked for, as LLaMA's does; a word is a token, with the space before it."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, marks=True):
        self.marks = marks

    def __call__(self, text, add_special_tokens=True, verbose=True):
        words = [3 + hash_of(word) for word in text.replace(" ", "| ").split("|") if word]
        return {"input_ids": [1] * (add_special_tokens and self.marks) + words}


def hash_of(word):
    return sum(word.encode()) % 50


@pytest.mark.parametrize("marks", [True, False])
def test_special_tokens_as_the_tokenizer_puts_them(marks):
    encode = Marking(marks)
    start = tasks._start(encode)
    assert start == [1] * marks
    a, b, c = (3 + hash_of(word) for word in ("a", " b", " c"))
    assert tasks._tokens(encode, start, tasks.Request("a b", " c"), None) == ((*start, a, b), (c,))
    # the space at the end of a context begins the answer's first word
    assert tasks._tokens(encode, start, tasks.Request("a b ", "c"), None) == ((*start, a, b), (c,))
    # and an empty context is one special token, whether or not the tokenizer puts one
    assert tasks._tokens(encode, start, tasks.Request("", " b c"), None) == ((1, b), (b, c))


def test_an_empty_context_needs_a_first_token():
    encode = Marking(False)
    encode.bos_token_id = encode.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer is one without a first token, and a context is empty; allowed: one with bos"):
        tasks._tokens(encode, [], tasks.Request("", "b"), None)


def test_a_tokenizer_of_another_model(data, tokenizer):
    small = tiny.dense_model(vocab_size=64)
    with pytest.raises(ValueError, match=r"tokenizer is one that gives ids up to .*; allowed: ids below 64"):
        tasks.score(small, tokenizer, data / fetch.TASKS, documents=2)


# --- files ----------------------------------------------------------------------------------------------------------------

GOOD = [row(d, c, 0, "the", " token") for d in range(2) for c in range(2)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*GOOD, row(2, 0, 0, "the", "")], "line 5, with an empty continuation; allowed: an answer of at least a character"),
        ([*GOOD, {"doc_id": 3}], "line 5, without a request (KeyError: 'idx'); allowed: a folder made by"),
        ([*GOOD, [1]], "line 5, without a request (TypeError: "),
        ([*GOOD, row(2, 0, None, "the", "a")], "line 5, of doc_id 2, idx 0, label None; allowed: integers"),
        ([*GOOD, row(2, 0, 0, "the", 3)], "line 5, whose request is no text"),
        ([*GOOD, row(1, 1, 0, "the", "a")], "line 5, where document 1 contradicts an earlier line"),
        ([*GOOD, row(1, 2, 1, "the", "a")], "line 5, where document 1 contradicts an earlier line"),
        ([*GOOD, row(2, 0, 0, "the", "a")], "whose document 2 has the answers [0] and the label 0; allowed: two answers"),
        ([*GOOD, *(row(2, c, 2, "the", "a") for c in range(2))], "the answers [0, 1] and the label 2"),
        ([*GOOD, *(row(2, c, 0, "the", "a") for c in (0, 2))], "the answers [0, 2] and the label 0"),
        (GOOD[:2], "with 1 documents; allowed: at least 2"),
        ([], "with 0 documents"),
    ],
)
def test_requests_that_are_none(tmp_path, rows, said):
    folder = write_task(tmp_path / "task", rows)
    with pytest.raises(ValueError) as error:
        tasks.read_task(folder)
    assert str(error.value).startswith(f"folder is {folder / 'requests.jsonl.gz'}, ")
    assert said in str(error.value)


@pytest.mark.parametrize("case", ["cut off", "plain", "not json", "not text", "missing", "corrupt"])
def test_a_broken_file(tmp_path, case):
    folder = write_task(tmp_path / "task", made(0, documents=200))
    path = folder / "requests.jsonl.gz"
    whole = path.read_bytes()
    broken = {
        "cut off": whole[: len(whole) // 2],
        "plain": json.dumps(GOOD[0]).encode(),
        "not json": gzip.compress(b"{}\n{"),
        "not text": gzip.compress(b"\xff\xfe\n"),
        "corrupt": whole[:100] + bytes(200) + whole[300:],
    }
    path.unlink()
    if case != "missing":
        path.write_bytes(broken[case])
    with pytest.raises(ValueError) as error:
        tasks.read_task(folder)
    line = str(error.value)
    assert line.startswith(f"folder is {path}, ")
    assert "\n" not in line
    assert line.endswith("; allowed: a folder made by `python -m bench.quality fetch`")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"task_config": {"primary_metric": "f1"}}', None])
def test_a_broken_config(tmp_path, text):
    folder = write_task(tmp_path / "task", GOOD)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"folder is .*config\.json, "):
        tasks.read_task(folder)


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory, tokenizer):
    """dense/ and moe/; read only."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "dense", tokenizer)
    save(tiny.sparse_model(vocab_size=V, max_position_embeddings=128), folder / "moe", tokenizer=tokenizer)
    return folder


def call(capsys, *arguments):
    capsys.readouterr()
    status = command.main(["tasks", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_command(capsys, here, data, tmp_path, kind):
    out = tmp_path / "tasks.json"
    status, shown, err = call(capsys, here / kind, "--documents", 3, "--data", data, "--json", out)
    assert (status, err) == (0, "")
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines] == ["task", *fetch.TASK_NAMES, "mean"]
    report = json.loads(out.read_text())
    assert (report["model"], report["dtype"], report["documents"]) == (str(here / kind), "float32", 3)
    assert list(report["tasks"]) == list(fetch.TASK_NAMES)
    assert {task["n"] for task in report["tasks"].values()} == {3}
    assert f"{report['mean']['accuracy']:.3f}" in lines[-1]
    assert f"{report['tasks']['piqa']['log_likelihood']:.4f}" in lines[3]
    status, shown, err = call(capsys, here / kind, "--documents", 0, "--data", data, "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert "7 documents" in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--documents": "1"}, "--documents is 1; allowed: at least 2, or 0 for all"),
        ({"--documents": "-2"}, "--documents is -2; allowed: at least 2, or 0 for all"),
        ({"--data": "{tmp}"}, "--data is {tmp}/tasks/boolq/config.json, which cannot be read (FileNotFoundError"),
        ({"--json": "{tmp}/no/x.json"}, "--json is {tmp}/no/x.json; allowed: a file in a folder that is there"),
        ({"--json": "{tmp}"}, "--json is {tmp}; allowed: a file in a folder that is there"),
        ({"model": "{tmp}"}, "MODEL is {tmp}, without config.json; allowed: a Hugging Face model folder"),
        ({"model": "{tmp}/no"}, "MODEL is {tmp}/no, which is no folder; allowed: a Hugging Face model folder, or a name"),
    ],
)
def test_wrong_arguments(capsys, here, data, tmp_path, change, said):
    arguments = {"model": here / "dense", "--data": data, "--documents": "2"}
    arguments |= {name: value.format(tmp=tmp_path) for name, value in change.items()}
    model = arguments.pop("model")
    status, out, err = call(capsys, model, *(part for pair in arguments.items() for part in pair))
    assert status == 2
    assert err.startswith("bench.quality tasks: error: " + said.format(tmp=tmp_path))
    assert err.count("\n") == 1
    assert out == ""
