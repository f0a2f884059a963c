"""bench.quality run and report: the intervals, what is there already, what was interrupted, what is broken."""

import json
import math

import numpy as np
import pytest

from bench.quality import __main__ as command
from bench.quality import intervals
from bench.quality.presets import Part
from bench.quality.report import report
from bench.quality.run import Task, differing, is_done, read_result, run_parts
from bench.quality.settings import Plan, Topology
from bench.quality.tuning import mark_of
from dotmoe_kernels.alignment.config import AlignmentConfig

SMALL = Plan(
    "small",
    Topology(4, 2),
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    dense_steps=2,
    vocabulary=300,
    sequence=32,
    windows=2,
    texts=40,
    options={"steps": 2, "batch_size": 2},
    tuning={"steps": 3, "batch_size": 2},
)
TUNED = ("dot-distilled", "dot-text", "dot-zero")
QUICK = ("dense", "dot", "shared-rate", "masks", "prune-wanda", "2to4-wanda", "no-capacity", "soft-router", *TUNED)

# --- statistics ---


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    """Documents of one token each: log perplexity is a mean, whose standard error is known."""
    values = np.random.default_rng(0).normal(3.0, 0.5, 400)
    weights = intervals.draw_documents(400)
    found = intervals.estimate(np.log(intervals.perplexities(values, np.ones(400), weights)))
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_pairs_remove_what_documents_share():
    generator = np.random.default_rng(0)
    tokens, hard = np.full(60, 100.0), generator.normal(400, 80, 60)
    weights = intervals.draw_documents(60)
    base, ours = (intervals.perplexities(hard + extra, tokens, weights) for extra in (0.0, 100 * math.log(1.2)))
    ratio = intervals.estimate(intervals.mean_ratio([ours], base))
    assert ratio.low == pytest.approx(1.2) == ratio.high, "every document is 1.2 times as hard: nothing is left to vary"
    own = intervals.estimate(ours)
    assert own.high / own.low > 1.3, "though documents differ widely"


def test_the_best_other_is_found_anew_in_every_draw():
    ours, others = np.array([0.1, 0.1, 0.1]), [np.array([0.2, 0.4, 0.2]), np.array([0.4, 0.2, 0.5])]
    assert intervals.reduction(ours, others) == pytest.approx([0.5, 0.5, 0.5])


# --- runs ---


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("quality")
    part = Part(SMALL, (0, 1), ablations=True)
    said = []
    run_parts([part], place / "out", place / "data", only=QUICK, say=said.append)
    return place, part, said


def times(place):
    return {path.name: path.stat().st_mtime_ns for path in (place / "out" / "small").glob("*.json")}


def test_a_result_holds_what_a_report_needs(results):
    place, _, said = results
    found = read_result(place / "out" / "small" / "dot.1.json")
    assert found["seed"] == 1
    assert found["kind"] == "dot"
    assert found["source"]
    assert len(found["nll"]) == len(found["tokens"]) >= 2
    assert found["perplexity"] == pytest.approx(math.exp(sum(found["nll"]) / sum(found["tokens"])))
    assert found["trained_tokens"] == 2 * 2 * 32
    assert found["curve"][-1][0] == found["trained_tokens"]
    assert {"torch", "transformers"} <= set(found["machine"]["versions"])
    assert 0 <= found["mutual_information"] <= found["most_information"]
    # what does not depend on the seed is there once
    assert "dense.1.json" not in times(place)
    assert "prune-wanda.1.json" not in times(place)
    assert len(said) == 1 + len(times(place))


def test_a_second_run_makes_nothing_again(results):
    place, part, _ = results
    before, said = times(place), []
    run_parts([part], place / "out", place / "data", only=QUICK, say=said.append)
    assert times(place) == before
    assert len(said) == 1
    assert f"{len(before)} of {len(before)} results are there" in said[0]


def test_an_interrupted_run_goes_on_with_the_next(results):
    place, part, _ = results
    before, gone = times(place), place / "out" / "small" / "masks.0.json"
    first = json.loads(gone.read_text())
    gone.unlink()
    run_parts([part], place / "out", place / "data", only=QUICK, say=lambda line: None)
    after = times(place)
    assert {name for name in after if after[name] != before[name]} == {gone.name}
    assert json.loads(gone.read_text())["nll"] == first["nll"], "the same again"


@pytest.mark.slow
def test_two_processes_find_what_one_does(results, tmp_path):
    place, part, _ = results
    run_parts([part], tmp_path, place / "data", only=["dot", "shared-rate"], jobs=2, say=lambda line: None)
    for name in ("dot.0.json", "dot.1.json", "shared-rate.1.json"):
        ours, theirs = (json.loads((folder / "small" / name).read_text()) for folder in (tmp_path, place / "out"))
        assert ours["nll"] == theirs["nll"]
        assert ours["depends"] == theirs["depends"]


@pytest.mark.parametrize("text", ['{"arm": "dot", ', "[]", "{}", "", "\udcff", "3"])
def test_what_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / "dot.0.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"dot\.0\.json cannot be read as a result: "):
        read_result(tmp_path / "dot.0.json")


def test_a_broken_result_is_named_and_made_again(results):
    place, part, _ = results
    broken, said = place / "out" / "small" / "dot.0.json", []
    whole = broken.read_text()
    broken.write_text(whole[:200])
    report(place / "out", said.append)
    assert any(str(broken) in line and "left out" in line for line in said)
    run_parts([part], place / "out", place / "data", only=["dot"], say=said.append)
    assert any(str(broken) in line and "made again" in line for line in said)
    assert json.loads(broken.read_text())["nll"] == json.loads(whole)["nll"]


def test_tasks_that_were_not_scored_are_asked_for(results, tmp_path):
    place, part, _ = results
    path, said = place / "out" / "small" / "dot.0.json", []
    found = read_result(path)
    options = AlignmentConfig(**(SMALL.options | {"seed": 0}))
    task = Task(next(arm for arm in part.arms() if arm.name == "dot"), 0, options, path, found["depends"])
    assert is_done(task, said.append)
    assert not is_done(task, said.append, 60)
    assert said == [f"{path} is without 60 documents of each task; it is made again"]
    scores = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "log_likelihood": -1.0, "log_likelihood_interval": [-1.2, -0.8]}
    task = task._replace(path=tmp_path / "small" / "dot.0.json")
    task.path.parent.mkdir()
    task.path.write_text(json.dumps(found | {"tasks": {"documents": 60, "mean": scores}}))
    assert is_done(task, said.append, 60)
    (task.path.parent / "dense.0.json").write_text((path.parent / "dense.0.json").read_text())
    assert "| dot | 50.0% [40.0%, 60.0%] | -1.000 [-1.200, -0.800] |" in report(tmp_path, said.append)


def test_other_options_are_made_again(results):
    place, part, _ = results
    said, before = [], times(place)
    changed = Part(SMALL, (0,), ablations=True, options={"router_lr": 1e-3})
    run_parts([changed], place / "out", place / "data", only=["dot", "dense"], say=said.append)
    assert [line for line in said if "made again" in line] == [
        f"{place / 'out' / 'small' / 'dot.0.json'} was made with another router_lr; it is made again"
    ]
    assert times(place)["dense.0.json"] == before["dense.0.json"], "which trains nothing"
    run_parts([part], place / "out", place / "data", only=["dot"], say=lambda line: None)


def test_an_option_newer_than_a_result_is_alike_at_its_default():
    ours = {"seed": 0, "options": {"steps": 2, "hidden": 0.0}}
    assert differing({"seed": 0, "options": {"steps": 2}}, ours) == []
    assert differing({"seed": 0, "options": {"steps": 2}}, {"seed": 0, "options": {"steps": 2, "hidden": 1.0}}) == ["hidden"]
    assert differing({"seed": 1, "options": {"steps": 3, "gone": 1}}, ours) == ["seed", "steps", "gone"]


def test_an_arm_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """Interrupted inside an arm, the result is that of an uninterrupted run."""
    plan = Plan(**(vars(SMALL) | {"options": {"steps": 4, "batch_size": 2, "checkpoint_every": 1}}))
    part = Part(plan, (0,))
    run_parts([part], tmp_path / "whole", tmp_path / "first", only=["dense", "dot"], say=lambda line: None)
    from dotmoe_kernels.alignment import loop

    step, taken = loop._Run.step, []

    def stop_at_third(self, number):
        taken.append(number)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(loop._Run, "step", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_parts([part], tmp_path / "out", tmp_path / "data", only=["dot"], say=lambda line: None)
    assert not (tmp_path / "out" / "small" / "dot.0.json").exists()
    assert list((tmp_path / "data" / "runs").iterdir())
    run_parts([part], tmp_path / "out", tmp_path / "data", only=["dot"], say=lambda line: None)
    assert taken == [0, 1, 2, 2, 3]
    whole, resumed = (json.loads((tmp_path / place / "small" / "dot.0.json").read_text()) for place in ("whole", "out"))
    assert whole["nll"] == resumed["nll"]
    assert whole["curve"] == resumed["curve"]
    assert len(whole["curve"]) == 4
    assert not list((tmp_path / "data" / "runs").iterdir()), "the checkpoints go with the result"


def test_a_tuned_arm_begins_with_the_aligned_model(results):
    place, _, _ = results
    found = {name: read_result(place / "out" / "small" / f"{name}.1.json") for name in ("dot", *TUNED)}
    marks = {mark_of(one["depends"]) for one in found.values()}
    assert len(marks) == 1, "one for all of them"
    assert (place / "data" / "aligned" / marks.pop() / "config.json").exists()
    assert not list((place / "data" / "runs").iterdir())
    each = 2 * SMALL.sequence  # tokens of a step
    for name in TUNED:
        assert found[name]["trained_tokens"] == 5 * each, "both trainings"
        assert found[name]["nll"] != found["dot"]["nll"], name
        assert found[name]["tokens"] == found["dot"]["tokens"]
        assert found[name]["depends"]["tuning"]["taught"] == (name != "dot-text")
    assert [tokens for tokens, _ in found["dot-distilled"]["curve"]] == [3 * each, 4 * each, 5 * each]
    assert found["dot-text"]["curve"] == [], "a cross-entropy is not a KL"
    assert found["dot-distilled"]["active_parameters"] == found["dot"]["active_parameters"]
    assert found["dot-distilled"]["mean_active"] == SMALL.topology.top_k > found["dot-zero"]["mean_active"]
    zeros = 4 * 16 * 2  # rows of the routers
    assert found["dot-zero"]["active_parameters"] < found["dot"]["active_parameters"] + zeros


def test_a_converted_model_measures_what_its_layers_do(tmp_path):
    """Where a setting trains weights dot is measured as the model that it became, elsewhere as the layers under alignment."""
    plans = {"layers": {"tuning": {}}, "model": {"tuning": {"steps": 1, "batch_size": 2, "lr": 1e-12}}}
    for name, change in plans.items():
        part = Part(Plan(**(vars(SMALL) | change)), (0,))
        arms = ["dense", "dot", *(["dot-distilled"] if name == "model" else [])]
        run_parts([part], tmp_path / name, tmp_path / "data", only=arms, say=lambda line: None)
    assert (tmp_path / "data" / "aligned").exists()
    layers = read_result(tmp_path / "layers" / "small" / "dot.0.json")
    for arm in ("dot", "dot-distilled"):  # the second as good as untrained
        same = read_result(tmp_path / "model" / "small" / f"{arm}.0.json")
        assert same["nll"] == pytest.approx(layers["nll"], rel=1e-4), arm
        for name in ("unused", "experts_in_use", "mutual_information", "most_information", "mean_active", "active_parameters"):
            assert same[name] == pytest.approx(layers[name], rel=1e-3), (arm, name)


def test_the_report_has_every_arm_and_a_figure(results):
    place, _, _ = results
    text = report(place / "out", lambda line: None)
    for name in QUICK:
        assert f"\n| {name} | " in text
    assert "lower than that of the best of routed, same tokens (" in text
    assert "lower than that of the best of structured pruning (" in text
    found = json.loads((place / "out" / "report.json").read_text())[0]
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows["dot"]["seeds"] == [0, 1]
    assert rows["dense"]["excess"]["value"] == 0
    for row in found["rows"]:
        if row["arm"] != "dense":
            assert row["excess"]["low"] <= row["excess"]["value"] <= row["excess"]["high"]
    assert (place / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "out" / "report.md").read_text() == text


def test_results_of_another_model_are_left_out(results, tmp_path):
    place, _, _ = results
    (tmp_path / "small").mkdir()
    for name in ("dense.0.json", "dot.0.json", "dot.1.json"):
        found = json.loads((place / "out" / "small" / name).read_text())
        if name == "dot.1.json":
            found["depends"]["weights"] += 1
        (tmp_path / "small" / name).write_text(json.dumps(found))
    said = []
    report(tmp_path, said.append)
    assert said == ["left out: dot, seed 1: not of the dense result's weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "all"], "--preset is 'all'; allowed: ci | cpu | real | gpu"),
        (["run", "--only", "dott"], "--only is dott; allowed: dense dot "),
        (["run", "--preset", "cpu", "--setting", "big"], "--setting is big; allowed: demo | 7m"),
        (["run", "--preset", "real", "--data", "nowhere"], "--data is nowhere, without smollm2-135m-instruct; allowed: a folder"),
        (["report", "--out", "nowhere"], "--out is nowhere, without results; allowed: a folder"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
