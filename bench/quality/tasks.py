"""The paper's six tasks, zero-shot, from requests that are ready: a context, the answers to choose from, the right one.

    log p(answer | context)                         of every answer, in nats; the model chooses the largest
    acc_raw: the sum itself                         BoolQ, SciQ, WinoGrande, where the answers are as long as each other
    acc_per_char: over the answer's characters      PIQA, ARC-Challenge, HellaSwag

Beside the accuracy stands the log-likelihood a character of the right answer, which moves long before another answer is chosen.
Text becomes tokens as lm-evaluation-harness does it: an answer's are those of context and answer together without the context's.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, variance
from typing import Any, NamedTuple

import torch

from dotmoe_kernels._checks import is_integer, refuse, require
from dotmoe_kernels._files import write_file

from .fetch import TASK_NAMES, TASKS

METRICS = ("acc_raw", "acc_per_char")
_UNCONDITIONAL = 1_000_000  # a doc_id from there on: the answers without their question, which neither metric needs
_WIDTH = NormalDist().inv_cdf(0.975)  # of a 95 % interval, in standard errors
_MADE = "a folder made by `python -m bench.quality fetch`"


class Request(NamedTuple):
    context: str
    answer: str


class Question(NamedTuple):
    document: int
    requests: tuple[Request, ...]
    label: int  # the right one


class TaskScore(NamedTuple):
    """Of one task. Intervals are of 95 %, over documents: Wilson's of the accuracy, the normal one of the log-likelihood. The last
    three hold a value a document, for comparisons of models in pairs."""

    metric: str
    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    log_likelihood: float  # mean nats a character of the right answer
    log_likelihood_interval: tuple[float, float]
    documents: tuple[int, ...]
    correct: tuple[bool, ...]
    log_likelihoods: tuple[float, ...]


# --- what is asked ------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a requests.jsonl.gz with the number of their line."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield number, json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        where = f"behind line {number}" if isinstance(error, EOFError | zlib.error) else f"line {max(number, 1)}"
        refuse("folder", f"{path}, which cannot be read ({where}: {error})", _MADE)


def _metric(path: Path) -> str:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        metric = config["task_config"]["primary_metric"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse("folder", f"{path}, which cannot be read ({type(error).__name__}: {error})", _MADE)
    require(metric in METRICS, "folder", f"{path}, whose primary_metric is {metric!r}", " or ".join(METRICS))
    return metric


def read_task(folder: Path) -> tuple[str, list[Question]]:
    """The metric of a task's folder, and its questions by document.

    Raises:
        ValueError: a file that is not there or is broken, an empty answer, a question whose answers or label are incomplete. Each
            names file and line.
    """
    path = folder / "requests.jsonl.gz"
    metric = _metric(folder / "config.json")
    found: dict[int, dict[int, Request]] = {}
    labels: dict[int, int] = {}
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        try:
            document, choice, label = row["doc_id"], row["idx"], row["label"]
            request = Request(row["request"]["context"], row["request"]["continuation"])
        except (KeyError, TypeError) as error:
            refuse("folder", f"{where}, without a request ({type(error).__name__}: {error})", _MADE)
        if is_integer(document) and document >= _UNCONDITIONAL:
            continue
        whole = all(is_integer(value) and value >= 0 for value in (document, choice, label))
        require(whole, "folder", f"{where}, of doc_id {document!r}, idx {choice!r}, label {label!r}", "integers of at least 0")
        require(all(isinstance(part, str) for part in request), "folder", f"{where}, whose request is no text", _MADE)
        require(bool(request.answer), "folder", f"{where}, with an empty continuation", "an answer of at least a character")
        same = labels.setdefault(document, label) == label and choice not in found.setdefault(document, {})
        require(same, "folder", f"{where}, where document {document} contradicts an earlier line", _MADE)
        found[document][choice] = request
    questions = []
    for document, choices in sorted(found.items()):
        label, count = labels[document], len(choices)
        whole = sorted(choices) == list(range(count)) and count >= 2 and label < count
        given = f"{path}, whose document {document} has the answers {sorted(choices)} and the label {label}"
        require(whole, "folder", given, "two answers or more, counted from 0, and the label of one")
        questions.append(Question(document, tuple(choices[n] for n in range(count)), label))
    require(len(questions) >= 2, "folder", f"{path}, with {len(questions)} documents", "at least 2")
    return metric, questions


def subset(questions: Sequence[Question], name: str, documents: int | None) -> list[Question]:
    """``documents`` of them, for every model the same; a smaller number is a part of a larger one. None: all."""
    if documents is None:
        return list(questions)
    require(is_integer(documents) and documents >= 2, "documents", documents, "an integer of at least 2, or None for all")
    order = list(range(len(questions)))
    random.Random(name).shuffle(order)  # seeded by a text, it is the same in every version of Python
    return [questions[n] for n in sorted(order[:documents])]


# --- tokens -------------------------------------------------------------------------------------------------------------------


class _Tokens(NamedTuple):
    inputs: tuple[int, ...]  # all but the last
    targets: tuple[int, ...]  # of the answer, the last ones


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    where = (n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain)
    return full[: next(where, 0)]


def _instead(tokenizer: Any) -> list[int]:
    """What stands before an answer without a context."""
    return [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]


def _tokens(tokenizer: Any, start: list[int], request: Request, limit: int | None) -> _Tokens:
    """Spaces at the end of a context go to the answer, as a tokenizer has them at a word's beginning. What is longer than ``limit``
    loses its beginning."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    context = request.context.rstrip()
    before = encode(context) if context else []
    whole = encode(request.context + request.answer)
    targets = tuple(whole[len(before) :])
    require(bool(targets), "tokenizer", f"one that makes no token of {request.answer!r}", "a token or more for every answer")
    first = start or ([] if before else _instead(tokenizer))
    inputs = (*first, *whole)[:-1]
    require(len(inputs) >= len(targets), "tokenizer", "one without a first token, and a context is empty", "one with bos or eos")
    if limit is not None:
        given = f"one of {limit} positions, and an answer has {len(targets)} tokens"
        require(len(targets) <= limit, "model", given, "positions for the longest answer")
        inputs = inputs[-limit:]
    return _Tokens(inputs, targets)


# --- the model's answers ------------------------------------------------------------------------------------------------------


def _batches(inputs: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """The longest first, so that what does not fit in memory shows at once; at most batch_tokens with their padding, or one."""
    batch: list[tuple[int, ...]] = []
    for row in sorted(inputs, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def log_likelihoods(model: Any, requests: Sequence[_Tokens], *, batch_tokens: int = 4096) -> list[float]:
    """The sum of the log-probabilities of every request's targets, in nats. Requests with the same inputs share a row: where every
    answer is one token, the context is computed once."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        rows.setdefault(request.inputs, []).append(number)
    device = next(model.parameters()).device
    found = [math.nan] * len(requests)
    for batch in _batches(list(rows), batch_tokens):
        length = len(batch[0])
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(batch):
            ids[n, : len(row)] = torch.tensor(row)
            mask[n, : len(row)] = 1
        first = min(len(row) - len(requests[number].targets) for row in batch for number in rows[row])
        keep = torch.arange(first, length, device=device)  # the head of earlier positions is the better part of a small model
        logits = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=keep
        ).logits  # [B, length - first, V]
        for n, row in enumerate(batch):
            for number in rows[row]:
                targets = torch.tensor(requests[number].targets, device=device)
                end = len(row) - first
                chances = logits[n, end - len(targets) : end].float().log_softmax(-1)
                found[number] = float(chances.gather(-1, targets[:, None]).double().sum())
    return found


def _wilson(right: int, n: int) -> tuple[float, float]:
    share, z = right / n, _WIDTH * _WIDTH / n
    middle, half = share + z / 2, math.sqrt(z * (share * (1 - share) + z / 4))
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


def _normal(value: float, variance: float) -> tuple[float, float]:
    half = _WIDTH * math.sqrt(variance)
    return value - half, value + half


def score_task(
    model: Any, tokenizer: Any, folder: Path, name: str, *, documents: int | None = 60, batch_tokens: int = 4096
) -> TaskScore:
    """One task of ``score``."""
    require(is_integer(batch_tokens) and batch_tokens >= 1, "batch_tokens", batch_tokens, "an integer of at least 1")
    metric, questions = read_task(folder / name)
    questions = subset(questions, name, documents)
    config = model.config.get_text_config()
    start, limit = _start(tokenizer), getattr(config, "max_position_embeddings", None)
    requests = [_tokens(tokenizer, start, request, limit) for question in questions for request in question.requests]
    most = max(max(request.inputs + request.targets) for request in requests)
    require(most < config.vocab_size, "tokenizer", f"one that gives ids up to {most}", f"ids below {config.vocab_size}")
    sums = iter(log_likelihoods(model, requests, batch_tokens=batch_tokens))
    correct, right = [], []
    for question in questions:
        values = [next(sums) for _ in question.requests]
        by_character = [value / len(request.answer) for value, request in zip(values, question.requests, strict=True)]
        judged = values if metric == "acc_raw" else by_character
        best = max(judged)  # NaN is neither more nor less, and no answer is right then
        correct.append(not math.isnan(sum(judged)) and judged.index(best) == question.label)
        right.append(by_character[question.label])
    n, mean = len(questions), fmean(right)
    return TaskScore(
        metric=metric,
        n=n,
        accuracy=sum(correct) / n,
        accuracy_interval=_wilson(sum(correct), n),
        log_likelihood=mean,
        log_likelihood_interval=_normal(mean, variance(right) / n),
        documents=tuple(question.document for question in questions),
        correct=tuple(correct),
        log_likelihoods=tuple(right),
    )


def score(
    model: Any,
    tokenizer: Any,
    folder: Path,
    documents: int | None = 60,
    batch_tokens: int = 4096,
    *,
    names: Sequence[str] = TASK_NAMES,
) -> dict[str, TaskScore]:
    """The six tasks, by name.

    Args:
        model: a causal LM in eval mode, dense or converted.
        tokenizer: the model's own.
        folder: with a folder of config.json and requests.jsonl.gz a task, as DATA / TASKS of fetch.py.
        documents: of each task, for every model the same; None takes all.
        batch_tokens: most tokens of a forward pass, padding counted.

    Raises:
        ValueError: a file that is not there or is broken, a tokenizer that knows more ids than the model.
    """
    return {
        name: score_task(model, tokenizer, Path(folder), name, documents=documents, batch_tokens=batch_tokens) for name in names
    }


def mean_accuracy(scores: dict[str, TaskScore]) -> float:
    """Over tasks, each counted alike."""
    return fmean(task.accuracy for task in scores.values())


def mean_log_likelihood(scores: dict[str, TaskScore]) -> float:
    """Over tasks, each counted alike; nats a character of the right answers."""
    return fmean(task.log_likelihood for task in scores.values())


def summary(scores: dict[str, TaskScore]) -> dict[str, Any]:
    """As JSON holds it: every task, and the means with the normal 95 % interval over documents, tasks being independent."""
    count = len(scores)
    accuracy = sum(variance(map(float, task.correct)) / task.n for task in scores.values()) / count**2
    nats = sum(variance(task.log_likelihoods) / task.n for task in scores.values()) / count**2
    mean = {
        "accuracy": mean_accuracy(scores),
        "accuracy_interval": _normal(mean_accuracy(scores), accuracy),
        "log_likelihood": mean_log_likelihood(scores),
        "log_likelihood_interval": _normal(mean_log_likelihood(scores), nats),
    }
    return {"tasks": {name: task._asdict() for name, task in scores.items()}, "mean": mean}


# --- the command --------------------------------------------------------------------------------------------------------------


def _read_model(name: str, dtype: str | None) -> tuple[Any, Any]:
    """The model, dense or converted, and its tokenizer."""
    from dotmoe_kernels.cli.inputs import find_device, reading, require_model_folder
    from dotmoe_kernels.conversion import load
    from dotmoe_kernels.conversion.sources import read_dense, read_tokenizer
    from dotmoe_kernels.models.inspect import is_converted

    require_model_folder(name)
    weights = getattr(torch, dtype) if dtype else None
    with reading(name):
        model: Any = load(name, dtype=weights) if is_converted(name) else read_dense(name, weights or "auto")
        return model.to(find_device("auto")).eval(), read_tokenizer(name)


def _line(name: str, values: dict[str, Any]) -> str:
    (low, high), (least, most) = values["accuracy_interval"], values["log_likelihood_interval"]
    share = f"{values['accuracy']:>9.3f}  [{low:.3f}, {high:.3f}]"
    return f"{name:<14}{share}{values['log_likelihood']:>10.4f}  [{least:.4f}, {most:.4f}]"


def run_tasks(name: str, data: Path, *, documents: int | None = 60, dtype: str | None = None, out: Path | None = None) -> None:
    """Scores the model of a folder on the tasks of ``fetch`` in ``data``, prints a line a task, and writes all of it to ``out``.

    Raises:
        ValueError: see ``score``; a folder that holds no model, a place that cannot be written to.
    """
    from dotmoe_kernels.cli.inputs import named

    if out is not None:
        require(not out.is_dir() and out.parent.is_dir(), "--json", out, "a file in a folder that is there")
    with named(folder="--data", documents="--documents", model="MODEL", tokenizer="MODEL"):
        for task in TASK_NAMES:  # before the model, which takes longer to read
            _metric(data / TASKS / task / "config.json")
        model, tokenizer = _read_model(name, dtype)
        print(f"{'task':<14}{'accuracy':>9}  {'95 % interval':<14}{'nats/char':>10}  95 % interval")
        scores = {}
        for task in TASK_NAMES:
            scores[task] = score_task(model, tokenizer, data / TASKS, task, documents=documents)
            print(f"{_line(task, scores[task]._asdict())}  {scores[task].metric}, {scores[task].n} documents", flush=True)
    found = summary(scores)
    print(_line("mean", found["mean"]))
    if out is not None:
        report = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "documents": documents, **found}
        write_file(out, lambda file: file.write((json.dumps(report, indent=2) + "\n").encode()))
