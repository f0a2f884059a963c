"""The comparison of bench.serving with a made-up engine: what is a tie, what is a divergence, what a missing environment says."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import sparse_model

import dotmoe_kernels as dk
from bench.serving import __main__ as serving
from bench.serving.compare import Exact, continuations, divergence, greedy, positions
from bench.serving.process import MODULES, PACKAGES, Worker, environment


def exact():
    logits = torch.zeros(3, 2, 5)
    logits[:, :, 1] = 2.0
    logits[1, 1, 2] = 1.9995
    logits[2, 0, 3] = 1.0
    return Exact([[0, 0]] * 3, logits)


def test_continuations_identical_tied_and_different():
    found = continuations(exact(), [[1, 1], [1, 2], [3, 1]], 1e-3)
    assert {k: found[k] for k in ("prompts", "identical", "ties", "different")} == {
        "prompts": 3,
        "identical": 1,
        "ties": 1,
        "different": 1,
    }
    assert found["gaps"] == [pytest.approx(5e-4, abs=1e-5), 1.0]
    assert found["same_until"] == 0.5


def test_divergence_of_the_same_and_of_other_probabilities():
    logits = torch.randn(50)
    log_p = torch.log_softmax(logits, -1)
    top = dict(enumerate(log_p[:20].tolist()))
    assert divergence(logits, top) == pytest.approx(0.0, abs=1e-6)
    log_q = torch.log_softmax(logits + torch.randn(50), -1)
    whole = float((log_p.exp() * (log_p - log_q)).sum())
    assert divergence(logits, dict(enumerate(log_q.tolist()))) == pytest.approx(whole, rel=1e-4)
    assert 0 < divergence(logits, dict(enumerate(log_q[:20].tolist()))) <= whole + 1e-6


def test_positions():
    given = exact()
    log_p = torch.log_softmax(given.logits, -1)
    scores = [[dict(enumerate(row.tolist())) for row in rows] for rows in log_p]
    found = positions(given, scores)
    assert found["positions"] == 6
    assert found["agree"] == 1.0
    assert found["kl_largest"] < 1e-6


def test_greedy_is_what_generate_gives():
    model, prompts = sparse_model(), [[5, 6, 7], [9, 8, 7]]
    expected = model.generate(torch.tensor(prompts), max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 3:]
    logits = greedy(model, prompts, 6)
    assert logits.shape == (2, 6, 64)
    rows = [(a, b) for a, b in zip(logits.argmax(-1).tolist(), expected.tolist(), strict=True) if 2 not in a]  # no end of text
    assert rows
    assert all(a == b for a, b in rows)


@pytest.mark.parametrize("engine", list(MODULES))
def test_no_environment_says_how_to_make_it(engine, tmp_path, capsys):
    assert serving.main([engine, str(tmp_path), "--environment", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert f"python3 -m venv {tmp_path / 'none'}" in told
    assert all(f"{tmp_path / 'none'}/bin/pip {line}" in told for line in PACKAGES[engine])
    assert environment(engine).parts[-3:] == (".venv", "serving", engine)


def test_what_cannot_be_served_is_refused(tmp_path, capsys):
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    common = ["--environment", str(tmp_path / "environment")]
    dk.save(sparse_model(), tmp_path / "m")
    assert serving.main(["llama.cpp", str(tmp_path / "m"), *common]) == 2
    assert "llama.cpp knows no DotMoE" in capsys.readouterr().err
    dk.export(tmp_path / "m", tmp_path / "dense")
    assert serving.main(["transformers", str(tmp_path / "dense"), *common]) == 2
    assert "--exact MODEL says what it was exported from" in capsys.readouterr().err


def test_a_worker_serves_a_folder_without_the_package(tmp_path):
    model, prompts = sparse_model(), [[5, 6, 7]]
    dk.save(model, tmp_path / "m")
    given = Exact(prompts, greedy(model, prompts, 4))
    options = {"type": "float32", "threads": 1}
    with Worker("transformers", Path(sys.executable), str(tmp_path / "m"), options, tmp_path / "log") as worker:
        assert set(worker.ask("about")) == {"version"}
        assert worker.ask("generate", prompts=prompts, new=4) == given.tokens
        found = positions(given, worker.scores(given.sequences, given.start, 20))
        taken = worker.time(prompts, 2)
    assert found["agree"] == 1.0
    assert found["kl_largest"] < 1e-4
    assert taken["wall"] > 0
    assert json.dumps(found)


def test_a_worker_that_ends_is_an_error(tmp_path):
    options = {"type": "float32", "threads": 1}
    worker = Worker("transformers", Path(sys.executable), str(tmp_path / "none"), options, tmp_path / "log")
    with worker, pytest.raises(RuntimeError, match="the engine ended"):
        worker.ask("about")
