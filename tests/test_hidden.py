"""The distillation of the blocks' outputs against plain autograd, centred routers, and what tells a routing that collapsed."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from checks import DEVICES, FLOOR, SECOND, assert_no_wrong_second_derivative, error
from shapes import normal
from test_alignment import (
    H,
    Interruption,
    Toy,
    assert_equal,
    config,
    interrupt_at,
    lines,
    run,
    state,
    tokens,
    toy,
)
from tiny import BACKBONES, dense_model
from torch import nn

import dotmoe_kernels as dk
from dotmoe_kernels.alignment import loop
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.hidden import CAP, HiddenStates, block_error, find_blocks
from dotmoe_kernels.alignment.loop import align
from dotmoe_kernels.alignment.module import all_experts, centred_routers, collect_inputs
from dotmoe_kernels.alignment.reconstruction import reconstruct
from dotmoe_kernels.alignment.transport import Transport
from dotmoe_kernels.conversion import DotMoeConfig, find_ffns, pipeline
from dotmoe_kernels.models.card import model_card


class Block(nn.Module):
    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, h):
        return h + self.ffn(h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt())


class Tuples(Block):
    """As the blocks of some architectures, which give attention's weights as well."""

    def forward(self, h):
        return super().forward(h), None


class Blocked(Toy):
    """The toy, its FFNs inside blocks; the same numbers."""

    block = Block

    def __init__(self, ffns, **options):
        super().__init__([], **options)
        self.blocks = nn.ModuleList(map(self.block, ffns))

    def base_model(self, input_ids, use_cache):
        self.seen.append(input_ids)
        self.outputs, h = [], self.embedding[input_ids]
        for block in self.blocks:
            out = block(h)
            h = out[0] if isinstance(out, tuple) else out
            self.outputs.append(h)
        return SimpleNamespace(last_hidden_state=h)


class BlockedTuples(Blocked):
    block = Tuples


def plain_error(student, teacher):
    ratio = (student - teacher).square().sum(-1) / teacher.square().sum(-1)
    return ratio.clamp(max=CAP).mean()


def pair(dtype=torch.float64, scale=0.5):
    teacher = normal(3, 5, H, seed=1)
    return (teacher + scale * normal(3, 5, H, seed=2)).to(dtype), teacher.to(dtype)


# --- one block ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(FLOOR))
def test_value_and_gradient_of_a_block(dtype, device):
    student, teacher = (h.to(device) for h in pair(dtype))
    leaf = student.clone().requires_grad_()
    loss = block_error(leaf, teacher)
    (3 * loss).backward()
    exact = student.double().requires_grad_()
    expected = plain_error(exact, teacher.double())
    (3 * expected).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=10 * torch.finfo(loss.dtype).eps)
    assert leaf.grad.dtype == dtype
    assert error(leaf.grad, exact.grad) < 2 * FLOOR[dtype]


def test_a_token_beyond_the_cap_counts_four_and_pulls_nothing():
    student, teacher = pair()
    student[0, 1] = teacher[0, 1] * 4  # 9 times the square of the teacher
    student[2, 2] = teacher[2, 2] * 2.9  # 3.61
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(block_error(leaf, teacher), leaf)
    assert not gradient[0, 1].any()
    assert gradient[2, 2].abs().sum() > 0
    others = torch.ones(3, 5, dtype=torch.bool)
    others[0, 1] = False
    ratio = (student.detach() - teacher).square().sum(-1) / teacher.square().sum(-1)
    assert ratio[0, 1] == pytest.approx(9)
    assert block_error(leaf, teacher).item() == pytest.approx((4 + ratio[others].clamp(max=4).sum().item()) / 15)


def test_the_same_states_have_no_error():
    _, teacher = pair()
    leaf = teacher.clone().requires_grad_()
    loss = block_error(leaf, teacher)
    loss.backward()
    assert loss.item() == 0
    assert not leaf.grad.any()


def test_a_dense_state_of_zero_is_no_division_by_zero():
    student, teacher = pair()
    teacher[0, 0] = 0
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(block_error(leaf, teacher), leaf)
    assert bool(torch.isfinite(gradient).all())


def test_the_teacher_gets_no_gradient():
    student, teacher = (h.requires_grad_() for h in pair())
    block_error(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@SECOND
def test_a_second_derivative_is_refused(how):
    student, teacher = pair()
    ours, plain = (lambda x, f=f: f(x, teacher)[None] for f in (block_error, plain_error))
    assert_no_wrong_second_derivative(ours, plain, student, how)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4), "student is of dtype torch.int64"),
        (torch.zeros(3, 4), torch.zeros(3, 5), r"teacher is of shape \[3, 5\]; allowed: \[\.\.\., H\] = \[3, 4\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4).double(), "teacher is of dtype torch.float64; allowed: the dtype of student"),
    ],
    ids=["dtype", "shape", "other dtype"],
)
def test_states_that_do_not_fit(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        block_error(student, teacher)


# --- finding the blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_blocks_of_every_backbone(kind):
    model = dense_model(kind)
    layers = pipeline._build_layers(model, find_ffns(model), DotMoeConfig(num_experts=8, top_k=2), "dot", AlignmentConfig(), None)
    blocks = list(model.model.layers)
    assert find_blocks(model, layers) == blocks
    states = HiddenStates(model, layers)
    x, seen = tokens(), []
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in blocks]
    with torch.no_grad(), all_experts(layers), states.dense_pass():
        model.model(x, use_cache=False)
    for handle in handles:
        handle.remove()
    assert [h.shape for h in states.expected] == [(*x.shape, 32)] * 2
    assert all(torch.equal(a, b) for a, b in zip(states.expected, seen, strict=True))


def test_an_ffn_that_is_itself_the_child_of_a_list_has_no_block():
    message = r"hidden is set, and layer\.0 is inside no child of a module list; allowed: 0: the blocks cannot be found"
    with pytest.raises(ValueError, match=message):
        run(*toy(), config(hidden=1.0))
    run(*toy(), config())


def test_two_ffns_of_a_block_are_one_block():
    _, layers = toy()
    pair_block = nn.Module()
    pair_block.ffns = nn.ModuleList(layers.values())  # the nearer list holds the FFNs themselves
    model = nn.Module()
    model.blocks = nn.ModuleList([pair_block])
    assert find_blocks(model, layers) == [pair_block]


# --- in the loop ----------------------------------------------------------------------------------------------------------


ALONE = {"kl": 0.0, "ce": 0.0, "z": 0.0, "balance": 0.0, "hidden": 1.0}


@pytest.mark.parametrize("micro", [None, 1, 2], ids=["one pass", "micro 1", "micro 2"])
@pytest.mark.parametrize("kind", [Blocked, BlockedTuples])
def test_a_steps_gradients_are_those_of_plain_autograd(kind, micro):
    """Of a step whose loss is that term alone."""
    options = config(steps=1, batch_size=3, micro_batch_size=micro, tau_start=0.7, tol=0.0, clip=1e9, **ALONE)
    model, layers = toy(kind)
    before = copy.deepcopy(layers)  # a step moves the leaves
    result = run(model, layers, options, tokens(rows=3))
    batches = model.trained_on()[::2]
    assert [len(b) for b in batches] == {None: [3], 1: [1, 1, 1], 2: [2, 1]}[micro]

    plain = kind(before.values())
    for layer in before.values():
        layer.router_weight.requires_grad_()
        layer.affinity.requires_grad_()
    transport = Transport(before, options)
    transport.refresh(0.7)
    total = 0
    for batch in batches:
        with torch.no_grad(), all_experts(before):
            plain.base_model(batch, False)
        expected = plain.outputs
        plain.base_model(batch, False)
        errors = [plain_error(a, b) for a, b in zip(plain.outputs, expected, strict=True)]
        total = total + torch.stack(errors).mean() * len(batch) / 3
    total.backward()
    transport.backward()
    for term in ("hidden", "loss"):
        assert result.log[0][term] == pytest.approx(total.item(), rel=1e-5)
    for name, layer in layers.items():
        for parameter in ("affinity", "router_weight"):
            ours, theirs = (getattr(found[name], parameter).grad for found in (layers, before))
            assert theirs.abs().max() > 0, (name, parameter)
            assert error(ours, theirs) < 1e-5, (name, parameter)
        assert layer.gate_proj.grad is None


def test_it_joins_the_other_terms():
    model, layers = toy(Blocked)
    log = run(model, layers, config(steps=2, hidden=3.0)).log
    options = AlignmentConfig()
    for entry in log:
        weighted = sum(getattr(options, n) * entry[n] for n in ("kl", "ce", "z", "balance")) + 3 * entry["hidden"]
        assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
        assert math.isfinite(entry["hidden"])
        assert entry["hidden"] > 0


def test_off_by_default_and_then_nothing_is_different(monkeypatch):
    """Without it no block is looked for and no output watched; the run is that of the toy without blocks, bit for bit."""
    model, plain = toy()
    expected = run(model, plain, config(steps=4))
    monkeypatch.setattr(loop, "HiddenStates", None)
    model, layers = toy(Blocked)
    found = run(model, layers, config(steps=4))
    assert_equal(state(layers), state(plain))
    for a, b in zip(found.log, expected.log, strict=True):
        assert "hidden" not in a
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_it_changes_what_is_learned():
    model, with_it = toy(Blocked)
    run(model, with_it, config(steps=4, hidden=4.0, affinity_lr=0.1))
    model, without = toy(Blocked)
    run(model, without, config(steps=4, affinity_lr=0.1))
    assert not torch.equal(with_it["layer.0"].router_weight, without["layer.0"].router_weight)
    assert not torch.equal(with_it["layer.0"].affinity, without["layer.0"].affinity)


@pytest.mark.parametrize("at", [3, 5])
def test_resuming_is_bit_for_bit(tmp_path, at):
    options = config(steps=6, checkpoint_every=3, batch_size=3, micro_batch_size=2, affinity_lr=0.1, hidden=4.0)
    model, layers = toy(Blocked)
    run(model, layers, options, folder=tmp_path / "whole")
    expected = state(layers)
    with pytest.raises(Interruption):
        run(*toy(Blocked), options, folder=tmp_path / "parts", on_step=interrupt_at(at))
    model, layers = toy(Blocked, seed=7)
    run(model, layers, options, folder=tmp_path / "parts", resume=True)
    assert_equal(state(layers), expected)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_run_without_it_is_not_resumed_with_it(tmp_path):
    with pytest.raises(Interruption):
        run(*toy(Blocked), config(steps=6, checkpoint_every=3), folder=tmp_path, on_step=interrupt_at(3))
    with pytest.raises(ValueError, match=r"written with hidden = 0\.0; this run has 4\.0"):
        run(*toy(Blocked), config(steps=6, checkpoint_every=3, hidden=4.0), folder=tmp_path, resume=True)


def test_no_hook_and_no_state_is_left():
    model, layers = toy(Blocked)
    with pytest.raises(KeyError):
        run(model, layers, config(hidden=1.0), on_step=interrupt_at(2, KeyError))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_dense_states_are_dropped_as_the_sparse_pass_meets_them():
    model, layers = toy(Blocked)
    for layer in layers.values():
        layer.expert_of = torch.arange(32) % 4
    states = HiddenStates(model, layers)
    with torch.no_grad(), all_experts(layers), states.dense_pass():
        model.base_model(tokens(), False)
    assert len(states.expected) == 2
    left = []
    model.blocks[1].register_forward_pre_hook(lambda m, a: left.append(len(states.expected)))
    with states.sparse_pass():
        model.base_model(tokens(), False)
    assert left == [1]
    assert states.expected == []


def test_a_non_finite_state_is_named():
    model, layers = toy(Blocked)
    layers["layer.1"].down_proj[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 1 in layer layer\.1 .*hidden nan"):
        run(model, layers, config(hidden=1.0))


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_bad_weights(value):
    with pytest.raises(ValueError, match=r"hidden is .*; allowed: a number of at least 0"):
        AlignmentConfig(hidden=value)


# --- a routing that lives -------------------------------------------------------------------------------------------------


def shared_constant(share=1.0, layers=4, seed=0):
    """A random LLaMA whose token embeddings share one vector of ``share`` times their own size, as trained models' inputs do."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": layers, "vocab_size": 256, "head_dim": 16}
    model = dense_model("llama", seed=seed, initializer_range=0.1, **sizes)
    with torch.no_grad():
        model.model.embed_tokens.weight += share * 0.1 * torch.randn(64)
    return model


def forty_steps(share, init="noise", **options):
    """Experts in use by layer, of 24, at the end; and the share of the mean in the square of what enters each FFN."""
    model = shared_constant(share)
    data = torch.randint(3, 256, (64, 64), generator=torch.Generator().manual_seed(1))
    options = AlignmentConfig(steps=40, batch_size=4, checkpoint_every=0, init=init, **options)
    layers = pipeline._build_layers(
        model.requires_grad_(False), find_ffns(model), DotMoeConfig(num_experts=24, top_k=6), "dot", options, data
    )
    inputs = collect_inputs(model, layers, data[:8])
    shares = [(x.mean(0).square().sum() / x.square().sum(-1).mean()).item() for x in inputs.values()]
    result = align(model, layers, data, options, progress=False)
    return [int((load > 0).sum()) for load in result.loads.values()], shares, result.log


def test_a_shared_constant_collapses_the_routing_and_centred_routers_keep_it():
    """Of 24 experts a layer, K = 6. Without the vector nothing collapses; with it the balance loss sees nothing."""
    free, shares, _ = forty_steps(0.0)
    assert max(shares) < 0.1
    assert min(free) == 24
    used, shares, log = forty_steps(2.0)
    assert min(shares) > 0.6
    assert all(10 <= n <= 18 for n in used), used
    assert log[-1]["experts_in_use"] == pytest.approx(sum(used) / 96)
    assert log[-1]["largest_load"] > 3.9  # of at most E / K = 4: chosen by every token
    assert log[-1]["balance"] < 1.7
    kept, _, log = forty_steps(2.0, centre=True)
    assert sum(kept) >= sum(used) + 10, (used, kept)
    assert kept[0] == 24  # its input is the dense model's in the sparse one too
    assert log[-1]["experts_in_use"] == pytest.approx(sum(kept) / 96)


def test_the_shared_start_keeps_the_routing_and_is_nearer_to_the_dense_model():
    used, _, noise = forty_steps(2.0)
    kept, _, ours = forty_steps(2.0, init="shared")
    assert sum(kept) >= sum(used) + 12, (used, kept)  # of 96
    assert ours[0]["kl"] < noise[0]["kl"]
    assert ours[-1]["kl"] < noise[-1]["kl"]


# --- centred routers ------------------------------------------------------------------------------------------------------


def test_a_centred_router_does_not_see_the_mean_of_its_inputs():
    model, layers = toy(Blocked)
    before = {name: layer.router_weight.detach().clone() for name, layer in layers.items()}
    inputs = collect_inputs(model, layers, tokens())
    with centred_routers(model, layers, tokens()):
        for name, layer in layers.items():
            mean = inputs[name].mean(0)
            acts = layer.seen_weight()
            assert (acts @ mean).abs().max() < 1e-6 * before[name].norm() * mean.norm()
            off = torch.randn(H, generator=torch.Generator().manual_seed(0))
            off -= (off @ mean) * mean / mean.square().sum()
            torch.testing.assert_close(acts @ off, before[name] @ off, rtol=1e-5, atol=1e-5)  # and all else
            assert torch.equal(layer.router_weight, before[name])
    for name, layer in layers.items():
        assert layer.centre is None
        assert (layer.router_weight @ inputs[name].mean(0)).abs().max() < 1e-5


@pytest.mark.parametrize("stage", [align, reconstruct])
def test_what_a_centred_run_leaves_is_centred(stage):
    model, layers = toy(Blocked)
    means = {name: x.mean(0) for name, x in collect_inputs(model, layers, tokens()).items()}
    stage(model, layers, tokens(), config(centre=True), progress=False)
    for name, layer in layers.items():
        assert (layer.router_weight @ means[name]).abs().max() < 1e-5
        assert layer.router_weight.abs().max() > 0.1
    model, plain = toy(Blocked)
    stage(model, plain, tokens(), config(), progress=False)
    assert all((plain[name].router_weight @ means[name]).abs().max() > 1e-2 for name in plain)


def test_the_gradient_of_a_centred_router_is_projected():
    model, layers = toy(Blocked)
    means = {name: x.mean(0) for name, x in collect_inputs(model, layers, tokens()).items()}
    run(model, layers, config(steps=1, centre=True))
    for name, layer in layers.items():
        gradient = layer.router_weight.grad
        assert gradient.abs().max() > 0
        assert (gradient @ means[name]).abs().max() < 1e-5 * gradient.norm() * means[name].norm()


def test_a_centred_run_resumes_bit_for_bit(tmp_path):
    options = config(steps=6, checkpoint_every=3, centre=True, hidden=1.0)
    model, layers = toy(Blocked)
    run(model, layers, options, folder=tmp_path / "whole")
    expected = state(layers)
    with pytest.raises(Interruption):
        run(*toy(Blocked), options, folder=tmp_path / "parts", on_step=interrupt_at(4))
    model, layers = toy(Blocked, seed=7)
    run(model, layers, options, folder=tmp_path / "parts", resume=True)
    assert_equal(state(layers), expected)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_bad_centre():
    with pytest.raises(ValueError, match="centre is 1; allowed: True or False"):
        AlignmentConfig(centre=1)


# --- how the experts are used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 1])
def test_the_log_counts_the_experts_of_the_whole_step(micro):
    model, layers = toy(top_k=1)
    chosen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda m, args, out, name=name: None if m.dense else chosen[name].append(m.routing.indices.flatten())
        )
    result = run(model, layers, config(steps=1, batch_size=3, micro_batch_size=micro), tokens(rows=3))
    counts = {name: torch.bincount(torch.cat(found), minlength=4) for name, found in chosen.items()}
    assert all(count.sum() == 21 for count in counts.values())
    both = torch.stack(list(counts.values()))
    assert result.log[0]["experts_in_use"] == pytest.approx((both > 0).float().mean().item())
    assert result.log[0]["largest_load"] == pytest.approx(4 * both.max().item() / 21)
    for name, load in result.loads.items():
        torch.testing.assert_close(load, counts[name] / 21)


def test_the_bar_shows_the_use(capsys):
    model, layers = toy()
    result = align(model, layers, tokens(), config(steps=2), progress=True)
    last = result.log[-1]
    assert f"in_use={last['experts_in_use']:.0%}, most={last['largest_load']:.1f}x" in capsys.readouterr().err


# --- what a conversion says of it -----------------------------------------------------------------------------------------


def test_a_conversion_that_collapses_says_so(recwarn):
    options = AlignmentConfig(steps=2, batch_size=4, checkpoint_every=0, init="noise")
    data = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    message = r"2 of 2 layers leave experts without a token \(the most in model\.layers\.\d\.mlp, \d+ of 24\) in the last step of "
    with pytest.warns(UserWarning, match=message) as found:
        model = dk.convert(shared_constant(4.0, 2), DotMoeConfig(num_experts=24, top_k=6), data=data, alignment=options)
    assert found[0].filename == __file__
    first, last = model.config.stages["align"]["experts_in_use"]
    assert 0 < last < 1
    card = model_card(model, "title", {})
    assert f"**Unused experts.** {1 - last:.1%} of the experts saw no token at the end of the training: what those hold is" in card
    unused = {"unused experts": {"model.layers.1.mlp": "7 of 24"}, "held-out tokens": 9}
    card = model_card(model, "title", unused)
    assert "**Unused experts.** 1 layers leave experts without a token on the text that was held out" in card
    assert "| model.layers.1.mlp | 7 of 24 |" in card
    assert "Unused" not in model_card(model, "title", {"held-out tokens": 9})


def test_too_few_tokens_say_nothing():
    options = AlignmentConfig(steps=1, batch_size=1, checkpoint_every=0)
    data = torch.randint(3, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.convert(shared_constant(4.0, 2), DotMoeConfig(num_experts=24, top_k=6), data=data, alignment=options)
