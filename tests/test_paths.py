"""Which path expert_ffn picks, what the padded products of a CPU give, and what `dotmoe info --paths` says of both."""

import pytest
import torch
from checks import compare
from hypothesis import given
from hypothesis import strategies as st
from shapes import expert_weights, generator, normal, routed_indices, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import _tiles, reference
from dotmoe_kernels._tiles import batched_call, dense_rows, pick_path, product_rows
from dotmoe_kernels.dispatch import sort_slots
from dotmoe_kernels.experts.grouped.cpu import padded
from dotmoe_kernels.experts.grouped.cpu import runs as running
from dotmoe_kernels.experts.grouped.cpu.runs import Run, best_runs, even_runs, lay_out, worth_padding

HALF = [torch.bfloat16, torch.float16]


def pick(T, device="cuda", *, E=112, s=128, K=28, H=4096, dtype=torch.bfloat16, dense_view=True, needs_grad=False, units=False):
    choice = pick_path(T, E, s, K, H, dtype, device, dense_view=dense_view, needs_grad=needs_grad, matrix_units=units)
    assert choice.why
    return choice.path


# --- the table -----------------------------------------------------------------------------------------------------------


def test_a_gpu_goes_from_decode_by_the_dense_view_to_grouped():
    paths = [pick(T) for T in (1, 16, 17, 256, 511, 512, 8192)]
    assert paths == ["decode", "decode", "masked", "masked", "masked", "grouped", "grouped"]


def test_without_a_dense_view_nothing_is_masked():
    assert [pick(T, dense_view=False) for T in (16, 64, 65, 300)] == ["decode", "decode", "grouped", "grouped"]


def test_few_chosen_experts_are_not_multiplied_with_all_the_others():
    assert pick(64, E=512, K=2) == "grouped"


def test_float64_has_no_kernels():
    assert pick(1, dtype=torch.float64) == "grouped"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("T", [1, 64, 4096])
def test_a_gradient_takes_the_grouped_path(T, device):
    assert pick(T, device, needs_grad=True) == "grouped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cpu_decodes_a_token_or_two_and_groups_more(dtype):
    few = "decode" if dtype in HALF else "grouped"
    assert [pick(T, "cpu", dtype=dtype) for T in (1, 2, 3, 4096)] == ["decode", few, "grouped", "grouped"]


SMALL, LARGE = {"E": 24, "s": 64, "K": 6, "H": 576}, {"E": 64, "s": 128, "K": 16, "H": 2048}


def test_a_cpu_with_matrix_units_multiplies_the_dense_ffn_where_rows_are_few():
    """Between what a token's own experts read, by the weights' size, and what the arithmetic of grouped products saves."""
    there = {"device": "cpu", "units": True}
    assert [pick(T, **there, **SMALL) for T in (1, 2, 191, 192, 512)] == ["decode", "masked", "masked", "grouped", "grouped"]
    assert [pick(T, **there, **LARGE) for T in (1, 2, 3, 191, 192)] == ["decode", "decode", "masked", "masked", "grouped"]
    assert pick(8, **there, **{**LARGE, "K": 1}) == "decode"
    assert pick(8, **there, **LARGE, dense_view=False) == "grouped"
    assert pick(8, **there, **SMALL, needs_grad=True) == "grouped"


def test_matrix_units_are_those_of_this_machine():
    for dtype in (torch.float32, torch.float64):
        assert not _tiles.has_matrix_units(dtype)
    assert pick(8, "cpu", **SMALL, units=None) == pick(8, "cpu", **SMALL, units=_tiles.has_matrix_units(torch.bfloat16))


@pytest.mark.parametrize("T", [1, 2, 40, 300])
def test_auto_runs_what_the_table_says(T, monkeypatch):
    taken = []

    def noted(name, call):
        return lambda *arguments: (taken.append(name), call(*arguments))[1]

    for name, call in dk.experts._PATHS.items():
        monkeypatch.setitem(dk.experts._PATHS, name, noted(name, call))
    monkeypatch.setattr(dk.experts, "grouped_ffn", noted("grouped", dk.experts.grouped_ffn))
    gate_up, down = expert_weights(6, 8, 16, seed=0, dtype=torch.float32)
    dk.expert_ffn(normal(T, 16, seed=1, dtype=torch.float32), gate_up, down, routed_indices(T, 2, 6, seed=2))
    assert taken == [pick(T, "cpu", E=6, s=8, K=2, H=16, dtype=torch.float32)]


# --- the paths of few tokens in 16 bits ---------------------------------------------------------------------------------------


def few(T, E, s, K, H, weights):
    """With a slot that is empty, and a token that has no expert at all."""
    gate_up, down = expert_weights(E, s, H, seed=0, dtype=torch.bfloat16)
    down = down.transpose(1, 2).contiguous().transpose(1, 2)  # as a model has it
    indices = routed_indices(T, K, E, seed=3)
    indices[0, 1], indices[-1] = E, E
    w = uniform(T, K, seed=2, dtype=torch.float32) if weights else torch.ones(T, K)
    return normal(T, H, seed=1, dtype=torch.bfloat16), gate_up, down, indices, w


def assert_near(y, expected):
    """Within what bfloat16 leaves: 8 bits, in the hidden layer, its sums and the result."""
    assert (y.double() - expected).norm() <= 0.008 * expected.norm()


ROWS = pytest.mark.parametrize("rows", [128, 0], ids=["neurons as rows", "tokens as rows"])  # of the masked path


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("path", ["decode", "masked"])
@pytest.mark.parametrize("T", [2, 5, 40])  # token after token and all at once
@pytest.mark.parametrize("packed", [0, 2**22])  # the masked path's down product by expert, or as one
@ROWS
def test_few_tokens_in_16_bits(rows, packed, T, path, weights, monkeypatch):
    monkeypatch.setattr(_tiles.paths, "_CPU_PACKED", packed)
    monkeypatch.setattr(_tiles.paths, "_CPU_TOKENS_FIRST", rows)
    x, gate_up, down, indices, w = few(T, 64, 16, 3, 512, weights)
    assert _tiles.decodes_each(T, 64, 16, 3, 512, torch.bfloat16) == (T == 2)
    y = dk.expert_ffn(x, gate_up, down, indices, w if weights else None, path=path)
    assert not y[-1].any()
    wide = [tensor.double() for tensor in (x, gate_up, down)]
    assert_near(y, reference.expert_ffn(*wide, indices, w.double(), activation=torch.nn.functional.silu))


@ROWS
def test_an_overflow_in_an_expert_that_nobody_chose_is_not_seen(rows, monkeypatch):
    monkeypatch.setattr(_tiles.paths, "_CPU_TOKENS_FIRST", rows)
    x, gate_up, down, indices, _ = few(4, 8, 16, 2, 64, False)
    expected = dk.expert_ffn(x, gate_up, down, indices % 7, path="masked")
    gate_up[7] = 3e38
    assert torch.equal(dk.expert_ffn(x, gate_up, down, indices % 7, path="masked"), expected)


@ROWS
@pytest.mark.parametrize("weights", [False, True])
def test_an_expert_named_twice_counts_twice(weights, rows, monkeypatch):
    monkeypatch.setattr(_tiles.paths, "_CPU_TOKENS_FIRST", rows)
    x, gate_up, down, _, w = few(4, 8, 16, 2, 64, weights)
    indices = torch.tensor([[3, 3], [1, 2], [8, 8], [7, 7]])
    expected = reference.expert_ffn(
        x.double(), gate_up.double(), down.double(), indices, w.double(), activation=torch.nn.functional.silu
    )
    for path in ("masked", "grouped"):
        y = dk.expert_ffn(x, gate_up, down, indices, w if weights else None, path=path)
        assert_near(y, expected)


# --- many experts in one batched product -----------------------------------------------------------------------------------


def problem(T, E, s, H, dtype, *, weights):
    gate_up, down = expert_weights(E, s, H, seed=0, dtype=dtype)
    w = uniform(T, weights, seed=2, dtype=torch.float32) if weights else torch.ones(T, 1)
    return {"x": normal(T, H, seed=1, dtype=dtype), "gate_up_proj": gate_up, "down_proj": down, "weights": w}


@pytest.fixture
def taken(monkeypatch):
    """The padded rows of every call that went through the padded products, on a processor without matrix units."""
    rows, call = [], padded.padded_ffn
    monkeypatch.setattr("dotmoe_kernels._tiles.paths.has_matrix_units", lambda dtype: False)
    monkeypatch.setattr(dk.experts.grouped.cpu, "has_matrix_units", lambda dtype: False)
    monkeypatch.setattr(dk.experts.grouped.cpu, "padded_ffn", lambda *a: (rows.append(padded_rows(a[7])), call(*a))[1])
    return rows


def padded_rows(runs):
    return sum(run.rows * (1 if run.span else run.experts) for run in runs)


def forward_only(function):
    """``compare`` takes gradients, which go another way: the values alone, times one leaf of value 1."""

    def call(x, gate_up_proj, down_proj, weights):
        with torch.no_grad():
            y = function(x, gate_up_proj, down_proj, weights)
        return y + 0 * (x.sum() + gate_up_proj.sum() + down_proj.sum() + weights.sum())

    return call


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("unit", [True, False], ids=["unit weights", "weights"])
@pytest.mark.parametrize(("T", "E", "K"), [(50, 7, 3), (40, 148, 37), (9, 1, 1), (64, 16, 16)])
@pytest.mark.parametrize("rows", [2048, 16], ids=["one run", "many runs"])
def test_padded_products_equal_the_reference(T, E, K, unit, dtype, rows, taken, monkeypatch):
    monkeypatch.setattr("dotmoe_kernels._tiles.paths._CPU_PADDED_ROWS", rows)
    tensors = problem(T, E, 8, 24, dtype, weights=K)
    if unit:
        tensors["weights"] = torch.ones(T, K)
    indices = routed_indices(T, K, E, seed=3, empty=0.1)
    ours = forward_only(lambda x, g, d, w: dk.expert_ffn(x, g, d, indices, w, path="grouped"))
    plain = forward_only(lambda x, g, d, w: reference.expert_ffn(x, g, d, indices, w, activation=torch.nn.functional.silu))
    compare(ours, plain, **tensors)
    assert len(taken) == 1
    assert taken[0] >= int((indices < E).sum())


@pytest.fixture
def units(taken, monkeypatch):
    """``taken``, on a processor with matrix units."""
    monkeypatch.setattr("dotmoe_kernels._tiles.paths.has_matrix_units", lambda dtype: True)
    monkeypatch.setattr(dk.experts.grouped.cpu, "has_matrix_units", lambda dtype: True)
    return taken


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kind", ["equal", "one expert has everything", "a span", "as good as dense", "most idle"])
@pytest.mark.parametrize("view", [False, True])
def test_with_matrix_units_runs_or_the_dense_product(view, kind, weights, units, monkeypatch):
    """Whichever costs less; without a dense view always runs."""
    masked, spans, grouped = [], [], dk.experts.grouped.cpu
    monkeypatch.setattr(padded, "token_rows", lambda *a, call=padded.token_rows: (spans.append(a), call(*a))[1])
    monkeypatch.setattr(grouped, "view_ffn", lambda *a, call=grouped.view_ffn: (masked.append(a), call(*a))[1])
    monkeypatch.setattr("dotmoe_kernels._tiles.paths._CPU_CALL_ELEMENTS", 0)  # experts of 8 neurons would be one run always
    tensors = problem(300, 7, 8, 24, torch.bfloat16, weights=2)
    if not weights:
        tensors["weights"] = torch.ones(300, 2)
    down = tensors["down_proj"]
    tensors["down_proj"] = down.transpose(1, 2).contiguous().transpose(1, 2) if view else down.contiguous()
    indices = routed_indices(300, 2, 7, seed=3, empty=0.1)
    if kind == "one expert has everything":
        indices[:, 0], indices[:, 1] = 5, torch.where(indices[:, 1] == 5, 7, indices[:, 1])
    elif kind == "a span":
        indices = torch.stack([torch.full((300,), 1), torch.where(torch.arange(300) % 40 > 0, 2, 6)], 1)
        indices[7] = torch.tensor([2, 2])
    elif kind == "as good as dense":
        indices = torch.arange(7).expand(300, 7).contiguous()
        tensors["weights"] = uniform(300, 7, seed=2, dtype=torch.float32)
    elif kind == "most idle":
        indices = torch.where(indices < 6, 6, indices)
    found = dk.expert_ffn(**tensors, indices=indices, path="grouped")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    assert_near(found, reference.expert_ffn(**wide, indices=indices, activation=torch.nn.functional.silu))
    dense = view and kind == "as good as dense"
    assert (len(units), len(masked)) == ((0, 1) if dense else (1, 0))
    assert len(spans) == (view and kind in ("a span", "one expert has everything", "most idle"))


@pytest.mark.parametrize("kind", ["one expert has everything", "most experts idle", "down_proj stored by rows of all experts"])
def test_where_padding_would_waste_it_is_not_done(kind, taken):
    T, E, K = 40, 12, 2
    tensors = problem(T, E, 8, 24, torch.bfloat16, weights=K)
    indices = routed_indices(T, K, E, seed=3)
    if kind == "one expert has everything":
        indices[:, 0], indices[:, 1] = 5, torch.arange(T) % 4 + 6
    elif kind == "most experts idle":
        indices = torch.tensor([[0, 1]]).expand(T, K)
    else:
        tensors["down_proj"] = tensors["down_proj"].transpose(0, 1).contiguous().transpose(0, 1)
    found = dk.expert_ffn(**tensors, indices=indices, path="grouped")
    assert taken == []
    wide = {name: t.double() for name, t in tensors.items()}
    exact = reference.expert_ffn(**wide, indices=indices, activation=torch.nn.functional.silu)
    assert (found.double() - exact).abs().max() < 2e-2 * exact.abs().max()


ROUTINGS = given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 3))


def some_slots(T, E, K, seed, skew):
    """Slots of experts of which some are as many times likelier as ``skew`` says."""
    g = generator(seed)
    chances = torch.exp(skew * torch.randn(E + 1, generator=g))
    indices = torch.multinomial(chances, T * K, replacement=True, generator=g).view(T, K)
    return sort_slots(indices, E)


def assert_runs(runs, slots, E):
    """Every expert once and in order, with room for its rows; every slot has a row of its own there."""
    experts = [e for run in runs for e in range(run.first, run.first + run.experts)]
    counts = slots.offsets.diff().tolist()
    assert experts == list(range(E))
    assert all(run.rows >= max(counts[run.first : run.first + run.experts]) for run in runs if not run.span)
    layout, starts, first = lay_out(slots.offsets, runs), [], 0
    for run in runs:
        starts += [None if run.span else first + n * run.rows for n in range(run.experts)]
        first += run.rows if run.span else run.experts * run.rows
    assert layout.total == padded_rows(runs) == first
    expected = [first if starts[e] is None else starts[e] + n for e, count in enumerate(counts) for n in range(count)]
    assert layout.place.tolist() == expected
    spread, own = layout.spread(slots.token, -1), layout.place < first
    assert torch.equal(spread[layout.place[own]], slots.token[: len(expected)][own])
    assert int((spread == -1).sum()) == layout.total - int(own.sum())
    slot_of = layout.slot_of(slots.source)
    assert torch.equal(slot_of[slots.source[: len(expected)]], layout.place)
    assert (slot_of[slots.source[len(expected) :]] == layout.total).all()


@ROUTINGS
def test_even_runs_hold_every_expert(T, E, K, seed, skew):
    slots = some_slots(T, E, K, seed, skew)
    runs, count = even_runs(slots.offsets, torch.zeros(E, 3, 2)), slots.offsets.diff()
    if runs:
        assert_runs(runs, slots, E)
        assert len({run.experts for run in runs[:-1]}) <= 1
        assert worth_padding(int(count.sum()), padded_rows(runs), int(count.max()), float((count == 0).double().mean()), 2, 2.0)


def cheapest(rows, call, tokens, e=0):
    """By trying all partitions."""
    if e == len(rows):
        return 0.0
    found = []
    for length in range(1, len(rows) - e + 1):
        most, rest = max(rows[e : e + length]), cheapest(rows, call, tokens, e + length)
        if length == 1 or (length.bit_count() == 1 and length * most <= 2048):
            found.append((call + length * most if most else 0) + rest)
        if tokens:
            found.append(call + length * dense_rows(tokens) + rest)
    return min(found)


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("H", [1, 4096])
@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 3))
def test_the_best_runs_are_the_cheapest(H, spans, T, E, K, seed, skew):
    slots, down = some_slots(T, E, K, seed, skew), torch.zeros(E, H, 64, dtype=torch.bfloat16)
    tokens = T if spans else 0
    runs = best_runs(slots.offsets, down, tokens)
    assert_runs(runs, slots, E)
    assert all(run.rows == (T if run.span else product_rows(run.rows, down)) for run in runs)
    assert all(run.span or run.experts.bit_count() == 1 for run in runs)
    call = batched_call(64 * H, down.dtype)
    rows = [product_rows(count, down) for count in slots.offsets.diff().tolist()]
    each = [call + run.experts * (dense_rows(T) if run.span else run.rows) for run in runs if run.rows]
    assert sum(each) == pytest.approx(cheapest(rows, call, tokens))


def test_experts_that_every_token_visits_are_a_span():
    """As those are that alignment makes of the most important neurons: three, and the others share what is left."""
    counts = torch.tensor([0, 512, 512, 510, *[75] * 21])
    runs = best_runs(counts.cumsum(0).int(), torch.zeros(24, 576, 64, dtype=torch.bfloat16), 512)
    assert runs[0].span
    assert 3 <= runs[0].experts <= 4  # another may go along
    assert not any(run.span for run in runs[1:])


def test_weights_stored_by_rows_of_all_experts_are_not_batched():
    down = torch.zeros(24, 6, 8, dtype=torch.bfloat16).transpose(0, 1)  # [E, H, s] stored as [H, E, s]
    offsets = torch.arange(7, dtype=torch.int32) * 20
    assert best_runs(offsets, down) == [Run(e, 1, 20) for e in range(6)]
    assert even_runs(offsets, down) == []


def test_products_come_in_few_sizes():
    """Each is compiled once, and a processor keeps 1,024 of them."""
    half, sizes = torch.zeros(0, dtype=torch.bfloat16), range(4097)
    rows = [product_rows(n, half) for n in sizes]
    assert all(n <= m <= 1.2 * n for n, m in zip(sizes, rows, strict=True))
    assert rows == sorted(rows)
    assert len(set(rows)) < 80
    assert [product_rows(n, torch.zeros(0)) for n in sizes] == list(sizes)  # a float32 product is not compiled


def test_a_run_of_one_expert_is_a_plain_product():
    a, b = normal(5, 8, seed=0, dtype=torch.bfloat16), normal(3, 8, 6, seed=1, dtype=torch.bfloat16)
    assert torch.equal(running.batched(Run(1, 1, 5), a, b), a @ b[1])
    both = running.batched(Run(1, 2, 3), a[[0, 1, 2, 2, 3, 4]], b)
    assert_near(both, torch.cat([a[:3].double() @ b[1].double(), a[2:].double() @ b[2].double()]))


def test_a_padding_row_may_hold_nan(taken):
    """Token 0 fills the padding rows: what it holds must not reach the others."""
    tensors = problem(30, 5, 8, 24, torch.bfloat16, weights=2)
    indices = routed_indices(30, 2, 5, seed=4)
    clean = dk.expert_ffn(**tensors, indices=indices, path="grouped")
    tensors["x"][0] = torch.nan
    found = dk.expert_ffn(**tensors, indices=indices, path="grouped")
    assert len(taken) == 2
    assert found[0].isnan().all()
    assert torch.equal(found[1:], clean[1:])
