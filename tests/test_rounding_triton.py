"""The Triton kernel of balanced_assignment: interpreted on a CPU, and on a GPU at the sizes of real models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import clustered, integer_capacities, normal

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, reference
from dotmoe_kernels.rounding import _balanced_assignment

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def even(F, E):
    return [F // E + (e < F % E) for e in range(E)]


def check(scores, capacity=None):
    """The kernel's answer is the greedy one, in every layer."""
    F, E = scores.shape[-2:]
    given_capacity = capacity.to(DEVICE) if isinstance(capacity, torch.Tensor) else capacity
    found = dk.balanced_assignment(scores.to(DEVICE), given_capacity).cpu()
    limits = torch.as_tensor(even(F, E) if capacity is None else capacity).expand(*scores.shape[:-2], E).reshape(-1, E)
    for layer, row, limit in zip(scores.reshape(-1, F, E), found.reshape(-1, F), limits, strict=True):
        assert row.tolist() == reference.greedy_assignment(layer, limit.tolist()).tolist()


# --- the greedy answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("F", "E"), [(1, 1), (63, 7), (97, 53), (130, 148), (296, 148), (600, 3), (16, 1)])
def test_equals_greedy(F, E):
    scores = normal(F, E, seed=0, dtype=torch.float32)
    check(scores, None if E <= F else integer_capacities(F, E, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    check(normal(130, 20, seed=1, dtype=dtype))  # sixteen bits make many ties


def test_float64_is_not_rounded_to_float32():
    check(1 + 1e-12 * normal(40, 5, seed=2))


@pytest.mark.parametrize("levels", [1, 2, 10])
def test_ties_go_to_the_first_pair_in_row_major_order(levels):
    scores = torch.randint(levels, (63, 7), generator=torch.Generator().manual_seed(levels)).float()
    check(scores)
    check(scores, integer_capacities(63, 7, seed=levels))


def test_the_two_zeros_tie():
    check(torch.tensor([[-0.0, 0.0], [0.0, -0.0], [0.0, 0.0], [-0.0, -0.0]]))


@pytest.mark.parametrize(("F", "E"), [(90, 8), (53, 53)])
def test_all_rows_equal(F, E):
    check(normal(1, E, seed=3, dtype=torch.float32).expand(F, E))


def test_every_row_prefers_one_expert_the_last_row_most():
    """Every sweep brings only better ones: what is held is refused again and again."""
    scores = normal(1100, 5, seed=4, dtype=torch.float32)
    scores[:, 2] = 50 + torch.arange(1100.0)
    check(scores)


def test_a_long_list_is_read_in_several_blocks():
    scores = normal(1500, 2, seed=5, dtype=torch.float32)
    scores[:, 1] = scores[:, 1].round()
    check(scores, [1300, 200])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    check(normal(50, 6, seed=6, dtype=torch.float32) * scale)


def test_denormals_and_infinities():
    """The order of the values, not their arithmetic: all that a GPU tensor may hold, since it is not checked."""
    choices = torch.tensor([-torch.inf, -1e-42, 0.0, 1e-42, 3e38, torch.inf])
    scores = choices[torch.randint(6, (60, 5), generator=torch.Generator().manual_seed(7))]
    found = _balanced_assignment(scores.to(DEVICE)[None], torch.tensor([even(60, 5)], device=DEVICE))[0]
    assert found.tolist() == reference.greedy_assignment(scores, even(60, 5)).tolist()


@settings(max_examples=10)
@given(F=st.integers(1, 40), E=st.integers(1, 9), levels=st.integers(1, 50), seed=st.integers(0, 999))
def test_exact_capacities_and_greedy(F, E, levels, seed):
    scores = torch.randint(levels, (F, E), generator=torch.Generator().manual_seed(seed)).float() / levels
    check(scores, integer_capacities(F, E, seed=seed))


# --- capacities, batches, layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [[12, 0, 0, 0], [0, 0, 0, 12], [0, 6, 6, 0], [5, 0, 1, 6]], ids=str)
def test_zero_capacities(capacity):
    check(normal(12, 4, seed=10), capacity)


def test_a_batch_with_its_own_capacities():
    scores = normal(2, 3, 30, 4, seed=11, dtype=torch.float32)
    check(scores)
    check(scores, torch.stack([integer_capacities(30, 4, seed=s) for s in range(6)]).view(2, 3, 4))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout):
    scores = normal(2, 30, 4, seed=12, dtype=torch.float32)
    if layout == "transposed":
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        scores = torch.zeros(4, 60, 9)[::2, ::2, 1::2].copy_(scores)
    else:
        scores = scores[:1, :, :1].expand(2, 30, 4)
    assert not scores.is_contiguous()
    check(scores)


def test_an_empty_batch():
    assert dk.balanced_assignment(torch.zeros(0, 12, 4, device=DEVICE)).shape == (0, 12)


@pytest.mark.usefixtures("nan_filled")
def test_repeatable():
    scores = normal(2, 97, 53, seed=13, dtype=torch.float32).to(DEVICE)
    first, second = (dk.balanced_assignment(scores, return_gap=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_gap():
    scores = normal(3, 40, 5, seed=14, dtype=torch.float32)
    expert_of, gap = dk.balanced_assignment(scores.to(DEVICE), return_gap=True)
    expected = (scores.amax(-1) - scores.gather(-1, expert_of.cpu()[..., None])[..., 0]).sum(-1)
    torch.testing.assert_close(gap.cpu(), expected)
    assert dk.balanced_assignment(clustered(96, 8, seed=41, strength=20.0).to(DEVICE), return_gap=True)[1].item() == 0


# --- values that cannot be checked on a GPU stay within bounds ---------------------------------------------------------


def unchecked(scores, capacity):
    return _balanced_assignment(scores.to(DEVICE)[None], torch.tensor([capacity], device=DEVICE))[0].cpu()


@pytest.mark.parametrize("capacity", [[2, 3, 1], [9, 9, 9], [-4, 30, 2], [0, 0, 0]], ids=str)
def test_capacities_that_do_not_sum_to_the_rows(capacity):
    found = unchecked(normal(12, 3, seed=20, dtype=torch.float32), capacity)
    assert found.min() >= -1
    assert found.max() < 3
    held = torch.bincount(found[found >= 0], minlength=3)
    assert (held <= torch.tensor(capacity).clamp(min=0)).all()
    assert held.sum() == min(12, sum(c for c in capacity if c > 0))


def test_nan_counts_as_the_lowest():
    scores = normal(12, 3, seed=21, dtype=torch.float32)
    scores[::2, 1] = torch.nan
    scores[5] = torch.nan
    expected = reference.greedy_assignment(torch.where(scores.isnan(), -torch.inf, scores), [4, 4, 4])
    assert unchecked(scores, [4, 4, 4]).tolist() == expected.tolist()


# --- as an operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 2])
def test_opcheck(layers):
    scores = normal(layers, 12, 4, seed=30, dtype=torch.float32).to(DEVICE)
    torch.library.opcheck(_balanced_assignment, (scores, torch.full((layers, 4), 3, device=DEVICE)))


@pytest.mark.parametrize("kind", ["none", "list", "tensor"])
def test_compiles_without_a_break(kind):
    scores = normal(2, 14, 4, seed=31, dtype=torch.float32).to(DEVICE)
    capacity = {"none": None, "list": [5, 0, 3, 6], "tensor": torch.tensor([5, 0, 3, 6], device=DEVICE)}[kind]

    def function(scores, capacity):
        expert_of, gap = dk.balanced_assignment(scores * 2, capacity, return_gap=True)
        return expert_of + 1, gap

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    for found, expected in zip(compiled(scores, capacity), function(scores, capacity), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["none", "list"])
def test_the_host_path_compiles_without_a_break(kind):
    scores = normal(2, 14, 4, seed=32, dtype=torch.float32)
    capacity = {"none": None, "list": [5, 0, 3, 6]}[kind]
    compiled = torch.compile(dk.balanced_assignment, fullgraph=True, backend="aot_eager")
    with _backend.interpreted(False):
        assert torch.equal(compiled(scores, capacity), dk.balanced_assignment(scores, capacity))


# --- on a GPU ----------------------------------------------------------------------------------------------------------

Q25, L3, COARSE = (18944, 148), (14336, 112), (14336, 8)


def potentials(F, E, *, seed, tau=0.1):
    """Scores as training ranks them: an affinity and its converged potentials. [F, E] float32"""
    affinity = clustered(F, E, seed=seed, dtype=torch.float32).cuda()
    info = dk.sinkhorn(affinity, tau=tau, num_iters=50, return_info=True)[1]
    return affinity / tau + info.log_u[:, None] + info.log_v


@pytest.mark.gpu
@pytest.mark.parametrize(("F", "E"), [Q25, L3, COARSE], ids=["Q25", "L3", "coarse"])
@pytest.mark.parametrize("kind", ["normal", "potentials", "ties"])
def test_real_sizes(F, E, kind):
    if kind == "potentials":
        scores = potentials(F, E, seed=40)
    else:
        scores = normal(F, E, seed=41, dtype=torch.float32 if kind == "normal" else torch.bfloat16).cuda()
    expert_of = dk.balanced_assignment(scores)
    assert torch.bincount(expert_of, minlength=E).tolist() == even(F, E)
    assert torch.equal(expert_of.cpu(), dk.balanced_assignment(scores.cpu())), "the CPU's answer, which is the greedy's"


@pytest.mark.gpu
def test_all_rows_equal_at_a_real_size():
    scores = normal(1, 148, seed=42, dtype=torch.float32).expand(18944, 148)
    order = scores[0].argsort(descending=True, stable=True)  # the best expert takes the first rows, and so on
    assert torch.equal(dk.balanced_assignment(scores.cuda()).cpu(), order.repeat_interleave(128))


@pytest.mark.gpu
def test_many_layers_many_times():
    """A race would show as a difference between layers or calls."""
    scores = normal(18944, 148, seed=43, dtype=torch.float32).cuda().expand(28, 18944, 148)
    expected = dk.balanced_assignment(scores[0].cpu()).cuda().expand(28, 18944)
    for _ in range(10):
        assert torch.equal(dk.balanced_assignment(scores), expected)


@pytest.mark.gpu
def test_without_synchronisation():
    scores = normal(4, *L3, seed=44, dtype=torch.float32).cuda()
    capacity = torch.full((112,), 128, device="cuda")
    dk.balanced_assignment(scores, capacity, return_gap=True)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given_capacity in (None, capacity, [128] * 112):
            dk.balanced_assignment(scores, given_capacity, return_gap=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True])
def test_in_a_graph(own):
    scores = normal(28, *Q25, seed=45, dtype=torch.float32).cuda()
    capacity = torch.full((148,), 128, device="cuda") if own else None
    dk.balanced_assignment(scores, capacity, return_gap=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        expert_of, gap = dk.balanced_assignment(scores, capacity, return_gap=True)
    for seed in (46, 47):
        scores.copy_(normal(1, *Q25, seed=seed, dtype=torch.float32).roll(seed, 1))
        graph.replay()
        expected, expected_gap = dk.balanced_assignment(scores, capacity, return_gap=True)
        assert torch.equal(expert_of, expected)
        assert torch.equal(gap, expected_gap)


@pytest.mark.gpu
def test_int64_addresses():
    """Scores of more than 2^31 elements apart."""
    F, E = 3000, 148
    storage = torch.zeros(F, 800_000, dtype=torch.bfloat16, device="cuda")[:, :E]  # 4.8 GB
    storage.copy_(normal(F, E, seed=48, dtype=torch.bfloat16))
    assert torch.equal(dk.balanced_assignment(storage).cpu(), dk.balanced_assignment(storage.cpu()))


def test_sweeps_are_bounded():
    """Who still waits after the last of them has no place; nobody else lost theirs, and no expert has too many."""
    from dotmoe_kernels.rounding.gpu import deferred_acceptance

    scores, limit = normal(1, 130, 20, seed=4, dtype=torch.float32).to(DEVICE), torch.tensor([even(130, 20)], device=DEVICE)
    whole, cut = deferred_acceptance(scores, limit).cpu(), deferred_acceptance(scores, limit, most=1).cpu()
    assert (whole >= 0).all()
    assert 0 < (cut < 0).sum() < 130
    assert (torch.bincount(cut[cut >= 0], minlength=20) <= limit[0].cpu()).all()
    assert (deferred_acceptance(scores, limit, most=0) == -1).all()
