"""A step of the alignment: what it asks the device for, what it allocates, and the interval of the rounding."""

import copy
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checks import error
from test_alignment import (
    E,
    F,
    Headless,
    Interruption,
    Toy,
    V,
    assert_equal,
    config,
    interrupt_at,
    lines,
    reference_gradients,
    run,
    state,
    tokens,
    toy,
)
from test_alignment_loss import Largest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dotmoe_kernels import _backend, alignment, balanced_assignment, reference
from dotmoe_kernels.alignment import chunked, loop
from dotmoe_kernels.alignment.transport import Transport

HERE = str(Path(alignment.__file__).parent)
WAITING = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__", "unique"}


class HostReads(TorchFunctionMode):
    """Counts where the code of the alignment itself asks for a tensor's values: on a GPU each is a wait."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in WAITING:
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(HERE):
                self.found[f"{Path(caller.f_code.co_filename).name} {caller.f_code.co_name}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Toy, Headless])
@pytest.mark.parametrize("router", ["top_k", "soft"])
def test_a_step_asks_for_values_once(router, kind):
    """The soft router once more: its budgets set the number of slots."""
    model, layers = toy(kind)
    for layer in layers.values():
        layer.router = router
    reads = []
    with warnings.catch_warnings(), HostReads() as mode:
        warnings.simplefilter("ignore")
        run(
            model,
            layers,
            config(steps=5, batch_size=4, micro_batch_size=2),
            on_step=lambda n: reads.append(mode.found.copy()),
        )
    once = {"loop.py _fetch": 1} | ({"soft.py refresh": 1} if router == "soft" else {})
    assert [after - before for before, after in pairwise(reads)] == [once] * 4


def test_the_count_sees_a_read():
    """That the test above can fail."""
    with HostReads() as mode:
        loop._fetch({"a": torch.ones(())})
        bool(torch.ones(()))  # not in the alignment
    assert mode.found == {"loop.py _fetch": 1}


@pytest.mark.parametrize("rounding", [True, False])
def test_transport_and_rounding_ask_for_no_values(monkeypatch, rounding):
    """A fake tensor has none: asking raises. The operators of the kernels stand for a GPU; checks of values are a CPU's alone."""
    _, layers = toy()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as under torch.compile, which leaves out those checks
    with _backend.interpreted(), FakeTensorMode():
        for layer in layers.values():
            layer.affinity = torch.nn.Parameter(torch.empty(F, E))
            layer.expert_of = None
        transport = Transport(layers, config(tol=1e-3))
        for tau in (1.0, 0.5):
            found = transport.refresh(tau, rounding=rounding)
            for layer in layers.values():
                layer.plan.sum().backward()
            transport.backward()
    assert {name: t.shape for name, t in found.items()} == dict.fromkeys(
        ["sinkhorn_iters", "sinkhorn_error"] + rounding * ["rounding_gap"], torch.Size([])
    )
    for layer in layers.values():
        assert layer.affinity.grad.shape == (F, E)
        assert (layer.expert_of is not None) == rounding


@pytest.mark.gpu
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_a_step_waits_for_the_gpu_once(monkeypatch, refresh_every):
    model, layers = toy()
    model.cuda()
    for layer in layers.values():
        layer.cuda()
        layer.gate_proj, layer.up_proj, layer.down_proj = (t.cuda() for t in (layer.gate_proj, layer.up_proj, layer.down_proj))
    fetch, waits = loop._fetch, []

    def waiting(values):
        torch.cuda.set_sync_debug_mode("default")
        waits.append(len(values))
        found = fetch(values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(loop, "_fetch", waiting)
    try:
        # the first step compiles
        run(
            model,
            layers,
            config(steps=4, refresh_every=refresh_every),
            on_step=lambda n: torch.cuda.set_sync_debug_mode("error" if n < 4 else "default"),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 4


def test_a_step_never_holds_whole_logits(monkeypatch):
    monkeypatch.setattr(chunked, "LOSS_CHUNK", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(chunked, "_LEAST_ROWS", 5)
    model, layers = toy()
    data = tokens(rows=4, length=40)
    with Largest(V) as seen:
        run(model, layers, config(steps=2, batch_size=4), data)
    assert seen.rows <= max(5, loop._PROBE)  # of 160 tokens; the tokens that the head is found on
    assert seen.count > 2 * 2 * 160 / 5


def test_an_unknown_head_is_said_and_changes_nothing():
    model, layers = toy(Headless)
    options = config(steps=1, batch_size=3, tau_start=0.7, tol=0.0, clip=1e9)
    data = tokens(rows=3)
    with pytest.warns(UserWarning, match="the logits of Headless are not its output embedding of the backbone's last hidden state"):
        result = run(model, layers, options, data)
    model, known = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(model, known, options, data)
    for name, layer in layers.items():
        for ours, theirs in ((layer.affinity, known[name].affinity), (layer.router_weight, known[name].router_weight)):
            assert error(ours.grad, theirs.grad) < 1e-5
    for name in ("loss", "kl", "ce"):
        assert result.log[0][name] == pytest.approx(expected.log[0][name], rel=1e-5)


# --- the interval of the rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "roundings"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (100, [1])])
def test_the_assignment_is_held_between_roundings(every, roundings):
    model, layers = toy()
    seen = []

    def keep(done):
        seen.append({name: (layer.expert_of, layer.affinity.detach().clone()) for name, layer in layers.items()})

    result = run(model, layers, config(steps=7, refresh_every=every, affinity_lr=0.5, tau_start=0.3, warmup=0.0), on_step=keep)
    for name, layer in layers.items():
        assignments, affinities = ([step[name][i] for step in seen] for i in range(2))
        changed = [n + 2 for n, (a, b) in enumerate(pairwise(assignments)) if not torch.equal(a, b)]
        assert set(changed) <= set(roundings[1:]), name
        assert bool(changed) == (every < 100), name
        assert all(not torch.equal(a, b) for a, b in pairwise(affinities))  # the plan's gradient arrives in every step
        if every == 100:  # the last assignment is of the last affinity
            assert not torch.equal(layer.expert_of, assignments[-1])
    assert [row["step"] for row in result.log if "rounding_gap" in row] == roundings
    assert all("sinkhorn_iters" in row for row in result.log)


def test_a_held_assignment_has_the_gradients_of_the_new_plan(monkeypatch):
    """Between roundings the hard assignment is the old one, and the straight-through gradient goes to the plan of the step."""
    model, layers = toy()
    options = config(
        steps=2, batch_size=3, refresh_every=2, tau_start=0.7, tau_end=0.7, tol=0.0, clip=1e9, num_iters=60, affinity_lr=0.5
    )
    between = {}

    def keep(done):
        if done == 1:
            for layer in layers.values():
                layer.routing = layer.plan = layer.finite = None  # of the graph of the step before
            between.update(copy.deepcopy(layers))

    run(model, layers, options, tokens(rows=3), on_step=keep)
    assignments = iter([layer.expert_of for layer in between.values()])
    monkeypatch.setattr(reference, "greedy_assignment", lambda scores, capacity: next(assignments))
    exact, _, used = reference_gradients(between, model.trained_on()[2], options, torch.float64)
    fresh = [balanced_assignment(layer.affinity.detach() / 0.7) for layer in between.values()]
    assert not any(torch.equal(a, b) for a, b in zip(used, fresh, strict=True))  # a rounding would have changed it
    for n, layer in enumerate(layers.values()):
        assert error(layer.affinity.grad, exact[f"affinity {n}"]) < 1e-4
        assert error(layer.router_weight.grad, exact[f"router {n}"]) < 1e-4


@pytest.mark.parametrize("at", [3, 4, 5])
def test_resuming_between_refreshes_is_bit_for_bit(tmp_path, at):
    options = config(steps=7, checkpoint_every=3, refresh_every=4, affinity_lr=0.5, batch_size=3, micro_batch_size=2)
    model, layers = toy()
    run(model, layers, options, folder=tmp_path / "whole")
    expected = state(layers)
    with pytest.raises(Interruption):
        run(*toy(), options, folder=tmp_path / "parts", on_step=interrupt_at(at))
    model, layers = toy(seed=7)  # other parameters: what counts is in the checkpoint
    run(model, layers, options, folder=tmp_path / "parts", resume=True)
    assert_equal(state(layers), expected)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
