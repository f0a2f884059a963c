"""Alignment: gradients against autograd through the reference, schedules, order of the data, resuming, what is left alone."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from checks import error
from shapes import balanced_expert_of, generator, normal
from torch import nn

from dotmoe_kernels import reference
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.loop import align
from dotmoe_kernels.alignment.losses import distillation_losses
from dotmoe_kernels.alignment.module import AlignmentFFN, all_experts, collect_inputs
from dotmoe_kernels.alignment.transport import Transport

H, F, E, K, V = 16, 32, 4, 2, 24
FLOOR = 2e-6  # of a gradient in float32, relative to its largest entry


class Toy(nn.Module):
    """Embedding, two residual FFNs on a normalised stream, head: predicts the next token from this one alone."""

    def __init__(self, ffns, *, dtype=torch.float32, planted=False, seed=0):
        super().__init__()
        home = torch.nn.functional.one_hot(torch.arange(V) % E, H).double()
        self.embedding = nn.Parameter(((4 * home if planted else 0) + normal(V, H, seed=seed)).to(dtype))
        self.head = nn.Parameter(normal(H, V, seed=seed + 1).to(dtype))
        self.ffns = nn.ModuleList(ffns)
        self.seen = []

    def base_model(self, input_ids, use_cache):
        assert use_cache is False
        self.seen.append(input_ids)
        h = self.embedding[input_ids]
        for ffn in self.ffns:
            h = h + ffn(h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt())
        return SimpleNamespace(last_hidden_state=h)

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.head.T)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.base_model(input_ids, use_cache).last_hidden_state @ self.head)

    def trained_on(self):
        """The batches of dense and sparse passes, without the two passes that look for the head."""
        return self.seen[2:]


class Headless(Toy):
    """A toy whose loss takes the whole logits."""

    get_output_embeddings = None

    def trained_on(self):
        return self.seen


def weights(layer, planted=False):
    """gate, up [F, H] and down [H, F]; planted: neuron i fires for the tokens of one group alone, hidden by a permutation."""
    seed = 10 * layer + 3
    gate, up, down = normal(F, H, seed=seed), normal(F, H, seed=seed + 1), normal(H, F, seed=seed + 2, scale=0.5)
    if planted:
        group = balanced_expert_of(F, E, seed=seed)
        gate = 0.1 * gate
        gate[:, :E] = 4 * (2 * torch.nn.functional.one_hot(group, E) - 1).double()
    return gate, up, down


def toy(kind=Toy, *, fixed=False, planted=False, top_k=K, affinity_std=0.5, seed=0):
    """(model, layers): two layers; ``fixed`` gives every layer an assignment of its own and no affinity."""
    layers = {}
    for n in range(2):
        options = {"expert_of": balanced_expert_of(F, E, seed=n)} if fixed else {}
        if not fixed:
            options["affinity"] = normal(F, E, seed=100 + n + seed, scale=affinity_std)
        layers[f"layer.{n}"] = AlignmentFFN(
            *(w.float() for w in weights(n, planted)),
            router_weight=normal(E, H, seed=200 + n + seed, scale=0.3),
            top_k=top_k,
            activation="silu",
            **options,
        )
    return kind(layers.values(), planted=planted), layers


def tokens(rows=5, length=7, seed=4):
    return torch.randint(0, V, (rows, length), generator=generator(seed))


def config(**options):
    return AlignmentConfig(**({"steps": 4, "batch_size": 2, "num_iters": 20, "checkpoint_every": 0} | options))


def run(model, layers, options, data=None, **kwargs):
    return align(model, layers, tokens() if data is None else data, options, progress=False, **kwargs)


def state(layers):
    """Everything that a run leaves, by name."""
    found = {}
    for name, layer in layers.items():
        found[f"{name}.router"], found[f"{name}.assignment"] = layer.router_weight.detach().clone(), layer.expert_of.clone()
        if layer.affinity is not None:
            found[f"{name}.affinity"] = layer.affinity.detach().clone()
    return found


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


def lines(folder):
    """The log without the one column that a clock fills."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# --- gradients against the reference --------------------------------------------------------------------------------------


class ReferenceFFN(nn.Module):
    """The same layer by reference.py, differentiated by autograd from end to end."""

    def __init__(self, layer, options, dtype):
        super().__init__()
        self.w = [w.to(dtype) for w in (layer.gate_proj, layer.up_proj, layer.down_proj)]
        self.router = layer.router_weight.detach().to(dtype).requires_grad_()
        self.affinity = layer.affinity.detach().to(dtype).requires_grad_()
        tau = options.tau(0)
        self.plan, info = reference.sinkhorn(self.affinity, tau=tau, num_iters=options.num_iters)
        scores = self.affinity.detach() / tau + info.log_u[:, None] + info.log_v
        self.expert_of = reference.greedy_assignment(scores, [F // E] * E)
        self.dense = False

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        if self.dense:
            gate, up, down = self.w
            return ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T).view(hidden.shape)
        self.routing = reference.route_top_k(x @ self.router.T, K)
        y = reference.masked_ffn(
            x,
            *self.w,
            self.expert_of,
            self.routing.indices,
            plan=self.plan,
            probs=self.routing.probs,
            activation=torch.nn.functional.silu,
        )
        return y.view(hidden.shape)


def reference_gradients(layers, data, options, dtype):
    """Gradients of the first step's loss, a mean over its micro-batches, to affinities and routers; and the loss terms."""
    ffns = [ReferenceFFN(layer, options, dtype) for layer in layers.values()]
    model = Toy(ffns, dtype=dtype)
    total, sums = 0, torch.zeros(4, dtype=dtype)
    micros = data.split(options.micro_batch_size or options.batch_size)
    for micro in micros:
        for ffn in ffns:
            ffn.dense = True
        with torch.no_grad():
            teacher = model(micro, use_cache=False).logits
        for ffn in ffns:
            ffn.dense = False
        kl, ce = reference.distillation_losses(teacher, model(micro, use_cache=False).logits, micro)
        z = sum(f.routing.z_loss for f in ffns) / len(ffns)
        balance = sum(f.routing.balance_loss for f in ffns) / len(ffns)
        loss = options.kl * kl + options.ce * ce + options.z * z + options.balance * balance
        total = total + loss * len(micro) / len(data)
        sums += torch.stack([kl, ce, z, balance]).detach() * len(micro) / len(data)
    leaves = {f"affinity {n}": f.affinity for n, f in enumerate(ffns)} | {f"router {n}": f.router for n, f in enumerate(ffns)}
    found = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    return found, sums, [f.expert_of for f in ffns]


TERMS = {"kl": 0.0, "ce": 0.0, "z": 0.0, "balance": 0.0}


@pytest.mark.parametrize("micro", [None, 1, 2], ids=["one pass", "micro 1", "micro 2"])
@pytest.mark.parametrize(
    "terms",
    [{}, *({**TERMS, name: 1.0} for name in TERMS)],
    ids=["all four terms", *TERMS],
)
def test_a_steps_gradients_are_those_of_autograd_through_the_reference(terms, micro):
    model, layers = toy()
    data = tokens(rows=3)
    options = config(steps=1, batch_size=3, micro_batch_size=micro, tau_start=0.7, tol=0.0, clip=1e9, **terms)
    before = copy.deepcopy(layers)  # a step moves the leaves
    result = run(model, layers, options, data)
    first = model.trained_on()[::2]
    data = torch.cat(first)  # in the order of the step
    assert [len(rows) for rows in first] == {None: [3], 1: [1, 1, 1], 2: [2, 1]}[micro]
    exact, sums, assignment = reference_gradients(before, data, options, torch.float64)
    plain, _, _ = reference_gradients(before, data, options, torch.float32)
    found = {f"affinity {n}": layer.affinity.grad for n, layer in enumerate(layers.values())}
    found |= {f"router {n}": layer.router_weight.grad for n, layer in enumerate(layers.values())}
    for name, value in found.items():
        if float(exact[name].abs().max()) == 0:  # the routing losses do not see the affinity of the last layer
            assert not value.any(), name
            continue
        allowed = 2 * error(plain[name], exact[name]) + FLOOR
        assert error(value, exact[name]) <= allowed, f"{name}: {error(value, exact[name]):.2g}, allowed {allowed:.2g}"
    log = result.log[0]
    for name, value in zip(("kl", "ce", "z", "balance"), sums.tolist(), strict=True):
        assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    weighted = sum(getattr(options, name) * log[name] for name in TERMS)
    assert log["loss"] == pytest.approx(weighted, rel=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in exact.values()))
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert len(assignment) == 2


def test_the_implicit_gradient_is_the_one_of_the_fixed_point():
    model, layers = toy()
    before, data = copy.deepcopy(layers), tokens(rows=2)
    options = config(steps=1, num_iters=300, tol=0.0, backward="implicit", clip=1e9)
    run(model, layers, options, data)
    exact, _, _ = reference_gradients(before, model.trained_on()[0], options, torch.float64)
    for n, layer in enumerate(layers.values()):
        assert error(layer.affinity.grad, exact[f"affinity {n}"]) < 2e-5


def test_gradients_are_clipped_to_their_joint_norm():
    model, layers = toy()
    result = run(model, layers, config(steps=1, clip=1e-3))
    gradients = [p.grad for layer in layers.values() for p in (layer.affinity, layer.router_weight)]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert result.log[0]["grad_norm"] > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["plain", "masked", "nothing valid", "one token"])
def test_distillation_losses_equal_the_reference(kind):
    length = 1 if kind == "one token" else 5
    teacher, student = normal(3, length, V, seed=1), normal(3, length, V, seed=2)
    labels = tokens(3, length)
    mask = {
        "masked": torch.rand(3, length, generator=generator(3)) > 0.4,
        "nothing valid": torch.zeros(3, length, dtype=torch.bool),
    }.get(kind)
    found = distillation_losses(teacher, student, labels, mask)
    expected = reference.distillation_losses(teacher, student, labels, mask)
    for a, b in zip(found, expected, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12, abs=1e-14)
    if kind == "nothing valid":
        assert [float(a) for a in found] == [0, 0]


def test_the_kl_of_equal_logits_is_zero():
    logits = normal(2, 4, V, seed=1, scale=5)
    assert abs(float(distillation_losses(logits, logits, tokens(2, 4))[0])) < 1e-12


def test_logits_of_different_shapes():
    with pytest.raises(ValueError, match=r"teacher_logits is of shape \[1, 2, 3\]; allowed: \[1, 2, 4\]"):
        distillation_losses(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))


# --- schedules ------------------------------------------------------------------------------------------------------------


def test_temperature_falls_linearly_over_its_share_of_the_steps_and_stays():
    model, layers = toy()
    log = run(model, layers, config(steps=10, tau_start=1.0, tau_end=0.2, tau_decay=0.4)).log
    assert [round(row["tau"], 12) for row in log] == [1.0, 0.8, 0.6, 0.4] + [0.2] * 6


def test_a_decay_of_zero_begins_at_the_last_temperature():
    options = config(steps=10, tau_start=1.0, tau_end=0.2, tau_decay=0.0)
    assert options.tau(0) == 1.0  # the first step alone
    assert [options.tau(n) for n in (1, 5, 9)] == pytest.approx([0.2] * 3)


def test_learning_rate_rises_over_the_warm_up_and_falls_as_a_cosine():
    model, layers = toy()
    log = run(model, layers, config(steps=10, warmup=0.2, router_lr=1.0)).log
    expected = [1 / 3, 2 / 3] + [0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert [row["lr"] for row in log] == pytest.approx(expected, rel=1e-12)


def test_affinity_and_router_have_learning_rates_of_their_own():
    moved = {}
    for name in ("affinity_lr", "router_lr"):
        model, layers = toy()
        before = {n: (layer.affinity.detach().clone(), layer.router_weight.detach().clone()) for n, layer in layers.items()}
        run(model, layers, config(**({"affinity_lr": 1e-12, "router_lr": 1e-12} | {name: 0.1})))
        moved[name] = [
            max(
                float((p.detach() - before[n][i]).abs().max())
                for n, layer in layers.items()
                for p in [(layer.affinity, layer.router_weight)[i]]
            )
            for i in range(2)
        ]
    assert moved["affinity_lr"][0] > 0.05
    assert moved["affinity_lr"][1] < 1e-6
    assert moved["router_lr"][0] < 1e-6
    assert moved["router_lr"][1] > 0.05


def test_sinkhorn_starts_where_the_step_before_ended():
    model, layers = toy(affinity_std=2.0)
    options = config(steps=3, num_iters=500, tol=1e-4, tau_start=0.5, tau_end=0.5, affinity_lr=1e-9)
    log = run(model, layers, options).log
    assert log[0]["sinkhorn_iters"] > 10
    assert [row["sinkhorn_iters"] for row in log[1:]] == [1, 1]
    assert all(row["sinkhorn_error"] < 1e-3 for row in log)


def test_the_warm_start_is_rescaled_when_the_temperature_moves():
    _, layers = toy(affinity_std=2.0)
    transport = Transport(layers, config(num_iters=3, tol=0.0))
    transport.refresh(1.0)
    transport.refresh(0.5)
    for layer in layers.values():
        affinity = layer.affinity.detach().double()
        _, first = reference.sinkhorn(affinity, tau=1.0, num_iters=3)
        plan, _ = reference.sinkhorn(affinity, tau=0.5, num_iters=3, init=2 * first.log_v)
        torch.testing.assert_close(layer.plan.detach().double(), plan, rtol=1e-4, atol=1e-6)


def test_every_assignment_is_exactly_balanced():
    model, layers = toy()
    counts = []
    run(
        model,
        layers,
        config(affinity_lr=0.5),
        on_step=lambda n: counts.extend(torch.bincount(a.expert_of) for a in layers.values()),
    )
    counts.extend(torch.bincount(layer.expert_of) for layer in layers.values())
    assert len(counts) == 10
    assert all(count.tolist() == [F // E] * E for count in counts)


# --- order of the data ----------------------------------------------------------------------------------------------------


def rows_seen(model, per_step=1):
    """First tokens of the rows, in the order of training; teacher and student see the same."""
    seen = model.trained_on()
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    return [int(row[0]) for batch in seen[::2] for row in batch]


def numbered(rows):
    """Row n begins with token n."""
    data = tokens(rows)
    data[:, 0] = torch.arange(rows)
    return data


@pytest.mark.parametrize(("rows", "batch", "steps"), [(6, 2, 9), (5, 2, 5), (3, 8, 3), (1, 2, 2)])
def test_every_epoch_shows_every_sequence_once(rows, batch, steps):
    model, layers = toy()
    run(model, layers, config(steps=steps, batch_size=batch), numbered(rows))
    seen = rows_seen(model)
    assert len(seen) == steps * batch
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    rest = seen[len(seen) // rows * rows :]
    assert len(set(rest)) == len(rest)


def test_epochs_differ_in_order_and_the_seed_fixes_it():
    orders = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        model, layers = toy()
        run(model, layers, config(steps=4, batch_size=10, seed=seed), numbered(20))
        orders[name] = rows_seen(model)
    assert orders["first"] == orders["again"]
    assert orders["first"] != orders["other"]
    assert orders["first"][:20] != orders["first"][20:]
    assert orders["first"][:20] != sorted(orders["first"][:20])


# --- accumulation, determinism, what is left alone ------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_sum_to_the_whole_batch(micro):
    # the balance loss is a product of two means, so that it is taken by micro-batch; all other terms are plain means
    results = []
    for size in (None, micro):
        model, layers = toy()
        results.append((run(model, layers, config(batch_size=4, micro_batch_size=size, balance=0.0)), state(layers)))
    (whole, a), (parts, b) = results
    for x, y in zip(whole.log, parts.log, strict=True):
        for name in ("loss", "kl", "ce", "z", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-4), name
    for name in a:
        if name.endswith("assignment"):
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    results = []
    for _ in range(2):
        model, layers = toy()
        results.append((run(model, layers, config()), state(layers)))
    assert_equal(results[0][1], results[1][1])
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in result.log] for result, _ in results]
    assert strip[0] == strip[1]


def test_only_affinities_and_routers_change():
    model, layers = toy()
    dense = {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith(("affinity", "router_weight"))}
    ffns = {n: [w.clone() for w in (layer.gate_proj, layer.up_proj, layer.down_proj)] for n, layer in layers.items()}
    learned = {n: (layer.affinity.detach().clone(), layer.router_weight.detach().clone()) for n, layer in layers.items()}
    run(model, layers, config())
    assert set(dense) == {"embedding", "head"}
    for name, value in dense.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, value)
        assert parameter.grad is None
    for name, layer in layers.items():
        for a, b in zip(ffns[name], (layer.gate_proj, layer.up_proj, layer.down_proj), strict=True):
            assert torch.equal(a, b)
            assert not b.requires_grad
        assert not torch.equal(layer.affinity, learned[name][0])
        assert not torch.equal(layer.router_weight, learned[name][1])


def test_a_fixed_assignment_stays_while_its_router_trains():
    model, layers = toy(fixed=True)
    before = state(layers)
    log = run(model, layers, config(steps=6, router_lr=0.1)).log
    after = state(layers)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.endswith("assignment"), name
    assert "sinkhorn_iters" not in log[0]
    assert all(layer.plan is None for layer in layers.values())


def test_a_learned_assignment_changes():
    model, layers = toy(affinity_std=0.01)
    seen = []
    run(model, layers, config(steps=10, affinity_lr=0.1), on_step=lambda n: seen.append(state(layers)))
    for name in ("layer.0.assignment", "layer.1.assignment"):
        assert not torch.equal(seen[0][name], state(layers)[name])


def test_the_last_assignment_belongs_to_the_last_affinity():
    model, layers = toy()
    options = config(affinity_lr=0.3, num_iters=400, tol=1e-6)
    run(model, layers, options)
    for layer in layers.values():
        tau = options.tau(options.steps - 1)
        _, info = reference.sinkhorn(layer.affinity.detach().double(), tau=tau, num_iters=2000)
        scores = layer.affinity.detach().double() / tau + info.log_u[:, None] + info.log_v
        assert torch.equal(layer.expert_of, reference.greedy_assignment(scores, [F // E] * E))


def planted_run(*, fixed=False, seed=0, steps=60):
    """One layer whose neurons fire in groups: the KL at the end relative to that at the start, neurons by (group, expert), log."""
    model, layers = toy(planted=True, top_k=1, affinity_std=0.01, fixed=fixed, seed=seed)
    model.ffns, layers = model.ffns[:1], {"layer.0": layers["layer.0"]}
    if fixed:  # no group in one expert
        layers["layer.0"].expert_of = balanced_expert_of(F, E, seed=99)
    with torch.no_grad():
        model.head *= 0.03
        model.embedding[:, :E] = 4 * torch.nn.functional.one_hot(torch.arange(V) % E, E)
    # random tokens: no next token to learn, so the dense model's output is the only target
    options = config(steps=steps, batch_size=8, affinity_lr=0.1, router_lr=0.02, num_iters=50, tol=1e-3, ce=0.0)
    log = run(model, layers, options, tokens(rows=16, length=32)).log
    where = (balanced_expert_of(F, E, seed=3), layers["layer.0"].expert_of)
    table = torch.zeros(E, E).index_put_(where, torch.ones(1), accumulate=True)
    return sum(row["kl"] for row in log[-10:]) / 10 / log[0]["kl"], table, log


@pytest.fixture(scope="module")
def planted_runs():
    """Six seeds: one run of so small a model is a matter of luck."""
    return [planted_run(seed=seed) for seed in range(6)]


def test_the_loss_falls_and_the_planted_groups_begin_to_show(planted_runs):
    assert sum(left for left, _, _ in planted_runs) / 6 < 0.4
    assert sum(log[-1]["loss"] / log[0]["loss"] for _, _, log in planted_runs) / 6 < 0.5
    together = [int(table.max(1).values.sum()) for _, table, _ in planted_runs]
    assert sum(together) / 6 > 16, together  # a random assignment has 13.3 +- 1.5


def test_a_learned_assignment_beats_a_fixed_one(planted_runs):
    learned, fixed = [run[0] for run in planted_runs], [planted_run(fixed=True, seed=seed)[0] for seed in range(6)]
    assert sum(learned) < 0.9 * sum(fixed), (learned, fixed)


def test_the_teacher_is_the_dense_model_and_the_switch_is_put_back():
    model, layers = toy()
    run(model, layers, config(steps=1))
    x = tokens()
    with torch.no_grad(), all_experts(layers):
        teacher = model(x, use_cache=False).logits
    h = model.embedding[x]
    for layer in layers.values():
        n = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        h = h + (torch.nn.functional.silu(n @ layer.gate_proj.T) * (n @ layer.up_proj.T)) @ layer.down_proj.T
    torch.testing.assert_close(teacher, h @ model.head, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), all_experts(layers):
        raise KeyError
    assert not any(layer.dense for layer in layers.values())


def test_collected_inputs_are_those_of_the_dense_model():
    model, layers = toy()
    data = tokens(rows=5, length=3)
    found = collect_inputs(model, layers, data, batch_size=2)
    h = model.embedding[data]
    first = (h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(-1, H)
    assert torch.equal(found["layer.0"], first)
    assert found["layer.1"].shape == (15, H)
    assert all(layer.inputs is None and not layer.dense for layer in layers.values())


# --- log and checkpoints --------------------------------------------------------------------------------------------------


def test_the_log_has_a_line_a_step_with_every_term(tmp_path):
    model, layers = toy()
    result = run(model, layers, config(steps=5), folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == result.log
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    wanted = {"step", "tau", "loss", "kl", "ce", "z", "balance", "grad_norm", "lr", "seconds"}
    wanted |= {"sinkhorn_iters", "sinkhorn_error", "rounding_gap", "experts_in_use", "largest_load"}
    assert all(set(row) == wanted for row in rows)
    assert all(math.isfinite(v) for row in rows for v in row.values())


def test_a_new_run_starts_a_new_log(tmp_path):
    for steps in (5, 2):
        run(*toy(), config(steps=steps), folder=tmp_path)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


def test_checkpoints_are_written_every_so_many_steps_and_at_the_end(tmp_path):
    model, layers = toy()
    written = []
    run(
        model,
        layers,
        config(steps=7, checkpoint_every=2),
        folder=tmp_path,
        on_step=lambda n: written.append(sorted(p.name for p in (tmp_path / "checkpoints").glob("*"))),
    )
    names = [[int(name[5:12]) for name in step] for step in written]
    assert names == [[], [2], [2], [2, 4], [2, 4], [4, 6], [6, 7]]  # the two newest are kept


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*toy(), config(checkpoint_every=1))
    assert list(tmp_path.iterdir()) == []


class Interruption(BaseException):
    pass


def interrupt_at(step, kind=Interruption):
    def on_step(done):
        if done == step:
            raise kind

    return on_step


@pytest.mark.parametrize("fixed", [False, True], ids=["learned", "fixed assignment"])
@pytest.mark.parametrize("at", [3, 4, 5])
def test_six_steps_equal_three_and_three_bit_for_bit(tmp_path, at, fixed):
    options = config(steps=6, checkpoint_every=3, batch_size=3, micro_batch_size=2, affinity_lr=0.1, tol=1e-3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model, layers = toy(fixed=fixed)
    run(model, layers, options, folder=whole)
    expected = state(layers)
    model, layers = toy(fixed=fixed)
    with pytest.raises(Interruption):
        run(model, layers, options, folder=parts, on_step=interrupt_at(at))
    assert [row["step"] for row in lines(parts)] == list(range(1, at + 1))
    model, layers = toy(fixed=fixed)
    result = run(model, layers, options, folder=parts, resume=True)
    assert [row["step"] for row in result.log] == [4, 5, 6]
    assert_equal(state(layers), expected)
    assert lines(parts) == lines(whole)
    a, b = (torch.load(folder / "checkpoints" / "step-0000006.pt") for folder in (whole, parts))
    flat = [torch.utils._pytree.tree_flatten(x) for x in (a, b)]
    assert flat[0][1] == flat[1][1]
    for x, y in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_resuming_restores_what_the_layers_began_with(tmp_path):
    """The parameters come from the checkpoint, whatever the layers hold."""
    options = config(steps=6, checkpoint_every=3)
    model, layers = toy()
    run(model, layers, options, folder=tmp_path / "a")
    expected = state(layers)
    model, layers = toy()
    with pytest.raises(KeyboardInterrupt):
        run(model, layers, options, folder=tmp_path / "b", on_step=interrupt_at(3, KeyboardInterrupt))
    model, layers = toy(seed=7)
    run(model, layers, options, folder=tmp_path / "b", resume=True)
    assert_equal(state(layers), expected)


def test_a_log_line_cut_off_by_a_kill_is_written_again(tmp_path):
    options = config(steps=6, checkpoint_every=3)
    run(*toy(), options, folder=tmp_path / "a")
    with pytest.raises(Interruption):
        run(*toy(), options, folder=tmp_path / "b", on_step=interrupt_at(4))
    log = tmp_path / "b" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "tau": 0.')
    (tmp_path / "b" / "checkpoints" / ".step-0000006.pt.k2j3").write_bytes(b"half")  # and a checkpoint that was being written
    run(*toy(), options, folder=tmp_path / "b", resume=True)
    assert lines(tmp_path / "b") == lines(tmp_path / "a")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    options = config(steps=4, affinity_lr=0.1)
    model, layers = toy()
    run(model, layers, options, folder=tmp_path)
    expected, log = state(layers), lines(tmp_path)
    model, layers = toy()
    assert run(model, layers, options, folder=tmp_path, resume=True).log == []
    assert_equal(state(layers), expected)
    assert lines(tmp_path) == log


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    model, layers = toy()
    assert len(run(model, layers, config(), folder=tmp_path, resume=True).log) == 4


@pytest.fixture
def interrupted(tmp_path):
    with pytest.raises(Interruption):
        run(*toy(), config(steps=6, checkpoint_every=3), folder=tmp_path, on_step=interrupt_at(3))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 7}, "written with steps = 6; this run has 7"),
        ({"router_lr": 1.0}, "written with router_lr = None; this run has 1.0"),
        ({"seed": 1}, "written with seed = 0; this run has 1"),
        ({"batch_size": 3}, "written with batch_size = 2; this run has 3"),
        ({"init": "kmeans"}, "written with init = 'auto'; this run has 'kmeans'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_other_options(interrupted, change, message):
    before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"step-0000003\.pt was " + message):
        run(*toy(), config(**({"steps": 6, "checkpoint_every": 3} | change)), folder=interrupted, resume=True)
    assert {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_other_data(interrupted):
    with pytest.raises(ValueError, match=r"written with data = \[5, 7\]; this run has \[4, 7\]"):
        run(*toy(), config(steps=6, checkpoint_every=3), tokens(rows=4), folder=interrupted, resume=True)


def test_a_checkpoint_of_another_model(interrupted):
    options, mark = config(steps=6, checkpoint_every=3), {"model": "other"}
    with pytest.raises(ValueError, match="written with model = None; this run has 'other'"):
        run(*toy(), options, folder=interrupted, resume=True, fingerprint=mark)


def test_a_checkpoint_of_other_layers(interrupted):
    model, layers = toy()
    layers = {"renamed": layers["layer.0"], "layer.1": layers["layer.1"]}
    with pytest.raises(ValueError, match=r"written with layers = \['layer\.0', 'layer\.1'\]; this run has \['renamed'"):
        run(model, layers, config(steps=6, checkpoint_every=3), folder=interrupted, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "something else", "a foreign object"])
def test_a_damaged_checkpoint(interrupted, damage):
    path = interrupted / "checkpoints" / "step-0000003.pt"
    if damage == "a foreign object":
        torch.save([1, 2], path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "something else": b"text\n" * 50}[damage])
    model, layers = toy()
    before = {n: layer.router_weight.detach().clone() for n, layer in layers.items()}
    with pytest.raises(ValueError, match=r"checkpoint .*step-0000003\.pt cannot be read"):
        run(model, layers, config(steps=6, checkpoint_every=3), folder=interrupted, resume=True)
    assert all(torch.equal(layers[n].router_weight, w) for n, w in before.items())


# --- a loss that is not finite --------------------------------------------------------------------------------------------


def poison_after(step, tensor, value):
    def on_step(done):
        if done == step:
            with torch.no_grad():
                tensor.view(-1)[1] = value

    return on_step


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("weight", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("layer", ["layer.0", "layer.1"])
def test_a_non_finite_loss_names_step_layer_and_checkpoint(tmp_path, layer, weight, value):
    model, layers = toy()
    done = poison_after(4, getattr(layers[layer], weight), value)
    last = tmp_path / "checkpoints" / "step-0000003.pt"
    with pytest.raises(FloatingPointError) as raised:
        run(model, layers, config(steps=6, checkpoint_every=3), folder=tmp_path, on_step=done)
    text = str(raised.value)
    assert text.startswith(f"non-finite loss or gradient at step 5 in layer {layer} (loss nan"), text
    assert text.endswith(f"last good checkpoint: {last}")
    assert "\n" not in text
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
    assert all(bool(torch.isfinite(p).all()) for a in layers.values() for p in (a.affinity, a.router_weight))


def test_a_non_finite_loss_before_the_first_checkpoint():
    model, layers = toy()
    layers["layer.1"].down_proj[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 1 in layer layer\.1 .*last good checkpoint: none$"):
        run(model, layers, config())


def test_a_non_finite_head_is_not_blamed_on_a_layer():
    model, layers = toy()
    with torch.no_grad():
        model.head[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"at step 1 in the output head \(every FFN is finite\)"):
        run(model, layers, config())


def test_a_non_finite_gradient_is_found_where_it_begins():
    """The forward is finite; the backward of one layer is not, and flows on to every layer below."""
    model, layers = toy()
    layers["layer.1"].register_full_backward_pre_hook(lambda module, dy: tuple(g * math.nan for g in dy))
    with pytest.raises(FloatingPointError, match=r"at step 1 in layer layer\.1 \(loss \d.*norm nan\)"):
        run(model, layers, config())


def test_an_earlier_failure_is_forgotten():
    model, layers = toy()
    for name in ("layer.0", "layer.1"):
        whole = layers[name].down_proj.clone()
        layers[name].down_proj[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match=rf"at step 1 in layer {name} "):
            run(model, layers, config())
        layers[name].down_proj.copy_(whole)
    assert len(run(model, layers, config()).log) == 4


def test_a_non_finite_micro_batch_is_found_among_finite_ones():
    model, layers = toy()
    data = torch.zeros(4, 7, dtype=torch.int64)
    data[1] = 5  # the only row with this token; its embedding overflows the second layer's input
    model.ffns[1].register_forward_pre_hook(lambda module, args: (args[0].where(args[0] != 0, math.nan),))
    with torch.no_grad():
        model.embedding.fill_(1.0)
        model.embedding[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 1 in layer layer\.0 "):
        run(model, layers, config(batch_size=4, micro_batch_size=1), data)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"data is of shape \[4\]; allowed: shape \[N, S\]"),
        (torch.zeros(4, 4), "data is of dtype torch.float32; allowed: int64 or int32"),
        (torch.zeros(0, 4, dtype=torch.int64), r"data is of shape \[0, 4\]; allowed: sequences of at least 2 tokens"),
        (torch.zeros(4, 1, dtype=torch.int64), r"data is of shape \[4, 1\]; allowed: sequences of at least 2 tokens"),
        ([[1, 2]], r"data is a list; allowed: a tensor \[N, S\]"),
    ],
    ids=["rank", "dtype", "empty", "one token", "a list"],
)
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=message):
        run(*toy(), config(), data)


def test_no_layers():
    with pytest.raises(ValueError, match="layers is empty; allowed: at least one FFN"):
        run(toy()[0], {}, config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps is -1; allowed: an integer of at least 0"),
        ({"steps": 1.5}, "steps is 1.5; allowed: an integer"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"batch_size": 0}, "batch_size is 0; allowed: an integer of at least 1"),
        ({"num_iters": 0}, "num_iters is 0"),
        ({"refresh_every": 0}, "refresh_every is 0; allowed: an integer of at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; allowed: 1 to batch_size = 8"),
        ({"micro_batch_size": 9}, "micro_batch_size is 9; allowed: 1 to batch_size = 8"),
        ({"affinity_lr": 0.0}, "affinity_lr is 0.0; allowed: a positive number"),
        ({"router_lr": math.nan}, "router_lr is nan; allowed: a positive number"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"tau_start": 0.0}, "tau_start is 0.0; allowed: a positive number"),
        ({"tau_end": -0.1}, "tau_end is -0.1; allowed: a positive number"),
        ({"tau_end": math.inf}, "tau_end is inf; allowed: a positive number"),
        ({"kl": -1.0}, "kl is -1.0; allowed: a number of at least 0"),
        ({"tol": math.inf}, "tol is inf; allowed: a number of at least 0"),
        ({"warmup": 1.1}, "warmup is 1.1; allowed: a share from 0 to 1"),
        ({"tau_decay": -0.1}, "tau_decay is -0.1; allowed: a share from 0 to 1"),
        ({"backward": "exact"}, 'backward is \'exact\'; allowed: "unroll" or "implicit"'),
        ({"init": "zeros"}, r"init is 'zeros'; allowed: auto \| noise \| kmeans \| activation \| shared"),
    ],
    ids=lambda value: " ".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**options)
