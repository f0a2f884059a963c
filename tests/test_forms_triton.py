"""The newer forms of kernels beside their older ones: the table of row tiles, gate and up in one tile, weights at rest, all
Sinkhorn steps in one launch. Interpreted on a CPU, and on a GPU at real sizes."""

from itertools import pairwise

import pytest
import torch
from checks import error
from hypothesis import given
from hypothesis import strategies as st
from shapes import generator, normal, routed_indices
from test_experts import plain, problem

from dotmoe_kernels import _backend, _tiles, reference
from dotmoe_kernels._tiles import grouped, launches
from dotmoe_kernels._tiles.hardware import GPUS, H100, H200
from dotmoe_kernels._tiles.launches import Floor, Launch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
UP, DOWN = ["halves", "joint"], ["tiles", "table", "stationary"]
FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def run(tensors, indices, up="joint", down="stationary", workspace=None):
    from dotmoe_kernels.experts.grouped.gpu.forward import grouped_ffn

    there = {n: t.to(DEVICE) for n, t in tensors.items()}  # keeps the strides
    arguments = (there["x"], there["gate_up_proj"], there["down_proj"], indices.to(DEVICE), there["weights"])
    with torch.no_grad():
        return grouped_ffn(*arguments, "silu", "rows", workspace, up, down).cpu()


def check(tensors, indices, up="joint", down="stationary"):
    """error <= 2 error of plain PyTorch in the same dtype + a floor, against float64"""
    exact = plain(indices)(**{n: t.double() for n, t in tensors.items()})
    same = plain(indices)(**tensors)
    found = run(tensors, indices, up, down)
    assert found.dtype == tensors["x"].dtype
    assert error(found, exact) <= 2 * error(same, exact) + FLOOR[found.dtype]
    return found


def uneven(T, E, K, *, seed):
    """Half of the experts without a row, one with most of them."""
    indices = routed_indices(T, K, E, seed=seed, empty=0.1)
    indices = torch.where(indices < E, indices // 2 * 2 % E, indices)
    indices[: T // 2, 0] = E - 1 if E % 2 else E - 2
    return indices


# --- the table of row tiles -----------------------------------------------------------------------------------------------


def table_by_hand(offsets, rows, block_m, group_m):
    from dotmoe_kernels.dispatch.gpu.tiles import most_row_tiles

    entries = []
    for e, (begin, end) in enumerate(pairwise(offsets)):
        before = len(entries)
        for r in range(-(-(end - begin) // block_m)):
            band = r // group_m * group_m
            entries.append([e, begin + band * block_m, end, before + band])
    most = most_row_tiles(rows, len(offsets) - 1, block_m)
    assert len(entries) <= most
    return entries, most - len(entries)


def assert_table(table, offsets, rows, block_m, group_m):
    expected, unused = table_by_hand(offsets.tolist(), rows, block_m, group_m)
    found = table.cpu().tolist()
    assert found[: len(expected)] == expected
    assert [row[0] for row in found[len(expected) :]] == [-1] * unused


@pytest.mark.parametrize("sizes", [[3, 0, 70, 1], [0, 0], [5], [0, 16, 0, 33, 0], [1] * 150], ids=str)
def test_the_table_from_offsets(sizes, nan_filled):
    from dotmoe_kernels.dispatch.gpu.tiles import row_tiles

    offsets, rows = torch.tensor([0, *sizes]).cumsum(0).int(), sum(sizes) + 5  # empty slots behind
    for block_m, group_m in ((16, 2), (16, 1), (32, 16)):
        assert_table(row_tiles(offsets.to(DEVICE), rows, block_m, group_m).table, offsets, rows, block_m, group_m)


@pytest.mark.parametrize("small", [True, False], ids=["many blocks", "one block"])
@pytest.mark.parametrize(("T", "E", "K"), [(50, 37, 5), (300, 3, 2), (1, 1, 1), (7, 148, 37), (0, 4, 2)])
def test_the_sort_leaves_the_same_table(T, E, K, small, monkeypatch, nan_filled):
    from dotmoe_kernels.dispatch.gpu import sort

    tile, scan, options = _tiles.dispatch_tile(T * K, E)
    if small:
        monkeypatch.setattr(sort, "dispatch_tile", lambda S, E: ({**tile, "BLOCK_S": 16}, {"BLOCK_B": 4}, options))
    indices = uneven(T, E, K, seed=1) if T else torch.zeros(0, K, dtype=torch.int64)
    *slots, tiles = sort.sort_into_tiles(indices.to(DEVICE), E, 16, 2)
    for ours, theirs in zip(slots, sort.sort_slots(indices.to(DEVICE), E), strict=True):
        assert torch.equal(ours, theirs)
    assert (tiles.block_m, tiles.group_m) == (16, 2)
    assert_table(tiles.table, slots[2].cpu(), T * K, 16, 2)


# --- the experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("up", "down"), [("joint", "tiles"), ("halves", "table"), ("joint", "table"), ("joint", "stationary")])
@pytest.mark.parametrize(
    ("T", "E", "K", "s", "H"), [(13, 7, 3, 24, 40), (9, 37, 9, 8, 64), (150, 2, 1, 86, 136), (1, 16, 16, 8, 40), (5, 2, 1, 1, 3)]
)
def test_every_form_equals_the_reference(T, E, K, s, H, up, down, dtype, nan_filled):
    check(problem(T, E, K, s, H, dtype=dtype), uneven(T, E, K, seed=2), up, down)


@pytest.mark.parametrize("kind", ["all empty", "one expert", "twice"])
@pytest.mark.parametrize("down", DOWN[1:])
def test_special_routings(kind, down, nan_filled):
    T, E, K = 11, 5, 2
    tensors, indices = problem(T, E, K, 8, 24, dtype=torch.float32), routed_indices(T, K, E, seed=3)
    if kind == "all empty":
        assert bool((run(tensors, torch.full((T, K), E), down=down) == 0).all())
        return
    if kind == "one expert":
        indices = torch.full((T, K), E).index_fill(1, torch.tensor([0]), 3)
    elif kind == "twice":
        indices[:, 1] = indices[:, 0]
    check(tensors, indices, down=down)


def test_more_experts_than_the_kernels_sort(nan_filled):
    """The table is made from the offsets that PyTorch's sort left."""
    check(problem(11, 1030, 2, 8, 24, dtype=torch.float32), routed_indices(11, 2, 1030, seed=3), down="table")


@pytest.mark.parametrize("storage", ["[E, H, s]", "[H, E, s]", "every second"])
@pytest.mark.parametrize("down", DOWN[1:])
def test_every_storage_of_the_weights(storage, down):
    tensors = problem(9, 5, 2, 8, 24, dtype=torch.float32)
    weight = tensors["down_proj"]
    tensors["down_proj"] = {
        "[E, H, s]": weight.contiguous(),
        "[H, E, s]": weight.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": torch.stack((weight, weight + 1), -1)[..., 0],
    }[storage]
    if storage == "every second":
        tensors["gate_up_proj"] = torch.stack([tensors["gate_up_proj"]] * 2, 1)[:, 0]
        tensors["x"] = tensors["x"].T.contiguous().T
    check(tensors, routed_indices(9, 2, 5, seed=4), down=down)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 10**6))
def test_any_routing(T, E, seed):
    with _backend.interpreted():
        indices = torch.randint(0, E + 1, (T, 2), generator=generator(seed))
        check(problem(T, E, 2, 8, 16, dtype=torch.float32), indices)


def test_programs_that_share_an_experts_rows(monkeypatch, nan_filled):
    from dotmoe_kernels.experts.grouped.gpu import down

    real = _tiles.grouped_stationary_tile

    def shared(*arguments, **options):
        tile = real(*arguments, **options)
        return tile._replace(block=tile.block | {"BLOCK_M": 16, "SHARE": 3})

    monkeypatch.setattr(down, "grouped_stationary_tile", shared)
    check(problem(70, 3, 2, 24, 40, dtype=torch.float32), uneven(70, 3, 2, seed=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_no_bit_hangs_on_the_workspace(dtype):
    tensors, indices = problem(12, 6, 3, 24, 300, dtype=dtype), uneven(12, 6, 3, seed=6)
    whole = run(tensors, indices)
    assert torch.equal(whole, run(tensors, indices))
    assert torch.equal(whole, run(tensors, indices, workspace=1))  # 128 columns at a time


def test_the_rows_before_the_activation_are_the_older_forms():
    from dotmoe_kernels.dispatch.gpu.sort import sort_into_tiles
    from dotmoe_kernels.experts.grouped.gpu.up import up_product

    tensors, indices = problem(21, 5, 2, 24, 40, dtype=torch.float32), uneven(21, 5, 2, seed=7)
    x, gate_up = tensors["x"].to(DEVICE), tensors["gate_up_proj"].to(DEVICE)
    block = _tiles.grouped_up_tile(42, 5, 24, x.dtype, keep=True).block
    token, _, offsets, _, tiles = sort_into_tiles(indices.to(DEVICE), 5, block["BLOCK_M"], block["GROUP_M"])
    older = up_product(x, gate_up, token, offsets, "silu", keep=True)
    newer = up_product(x, gate_up, token, offsets, "silu", keep=True, tiles=tiles)
    used = int(offsets[-1])
    assert 0 < used < 42
    for a, b in zip(older, newer, strict=True):
        torch.testing.assert_close(a[:used], b[:used])


# --- which one runs -------------------------------------------------------------------------------------------------------


def test_the_forms_of_real_sizes_are_predicted():
    for T, E, s, K, H in (
        (8192, 112, 128, 28, 4096),
        (8192, 148, 128, 37, 3584),
        (8192, 32, 448, 8, 4096),
        (600, 8, 1792, 2, 4096),
    ):
        assert grouped.grouped_up_form(T * K, E, s, H, torch.bfloat16, "cuda") == "joint"
        down = grouped.grouped_mm_form(T * K, E, s, H, torch.bfloat16, "cuda")
        assert down == ("stationary" if s <= 256 else "table")
        for dtype, backend in ((torch.float32, "cuda"), (torch.bfloat16, "hip")):
            assert grouped.grouped_up_form(T * K, E, s, H, dtype, backend) == "halves"
            assert grouped.grouped_mm_form(T * K, E, s, H, dtype, backend) == "tiles"


def test_a_predicted_time_is_a_range_that_holds_its_parts():
    launch = Launch(1e9, 1e12, 2000, 1, Floor(10, 10, 3), 3e9)
    for gpu in GPUS:
        found = launch.seconds(gpu)
        assert gpu.launch.low < found.low < found.middle < found.high
        assert found.low >= max(1e9 / gpu.bandwidth.high, 1e12 / gpu.bf16.high)
        assert launch._replace(floor=Floor(100, 100, 30)).seconds(gpu).high > found.high
        # programs that just begin another wave
        assert launch._replace(programs=133 * 15).seconds(gpu).high > launch._replace(programs=132 * 15).seconds(gpu).high
    assert Launch(1e9).seconds(H100).low > Launch(1e9).seconds(H200).high
    assert launches.together(launch.seconds(H200), gpu.launch).low == launch.seconds(H200).low + gpu.launch.low


# --- all Sinkhorn steps in one launch -------------------------------------------------------------------------------------


def solve(affinity, form, *, num_iters=9, tol=0.0, tau=1.0, exact_rows=True, init=None):
    from dotmoe_kernels.transport.gpu.streaming import solve

    L, F, E = affinity.shape
    new = affinity.new_full
    start = new((L, E), 0.0, dtype=torch.float32) if init is None else init
    tensors = (affinity, new((L, E), F / E, dtype=torch.float32), new((L,), tau, dtype=torch.float32), start)
    return [t.cpu() for t in solve(*(t.to(DEVICE) for t in tensors), num_iters, tol, exact_rows, form)]


@pytest.mark.parametrize("exact_rows", [True, False], ids=["row", "column"])
@pytest.mark.parametrize("num_iters", [1, 2, 9])
@pytest.mark.parametrize(("L", "F", "E"), [(2, 97, 53), (1, 130, 148), (3, 9, 3), (1, 1, 1)])
def test_one_launch_takes_the_steps_of_many(L, F, E, num_iters, exact_rows, nan_filled):
    affinity = normal(L, F, E, seed=20, dtype=torch.float32)
    options = {"num_iters": num_iters, "exact_rows": exact_rows, "tau": 0.3}
    found, expected = solve(affinity, "persistent", **options), solve(affinity, "streaming", **options)
    exact, _ = reference.sinkhorn(affinity.double(), tau=0.3, num_iters=num_iters, final="row" if exact_rows else "column")
    assert error(found[0], exact) < 2e-6
    for ours, theirs in zip(found, expected, strict=True):  # plan, log_u, log_v, history, count, error
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_layer_stops_by_itself_in_one_launch():
    affinity = torch.stack([normal(40, 8, seed=60, scale=s, dtype=torch.float32) for s in (0.01, 1.0, 3.0)])
    found, expected = (solve(affinity, form, num_iters=40, tol=1e-3) for form in ("persistent", "streaming"))
    assert found[4].tolist() == expected[4].tolist()
    assert len(set(found[4].tolist())) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(HAS_GPU, reason="changes a constant of a kernel, which compiled ones keep")
def test_a_lost_layer_shows(monkeypatch):
    """A barrier that is not kept makes the layer NaN instead of a hang: here a counter that lies far below."""
    from dotmoe_kernels.transport.gpu import persistent, streaming

    real = persistent.take_steps

    def late(*arguments):
        arguments[6].fill_(-(2**40))
        real(*arguments)

    monkeypatch.setattr(streaming, "take_steps", late)
    monkeypatch.setattr(persistent, "MOST_LOOKS", 3)
    found = solve(normal(1, 12, 3, seed=21, dtype=torch.float32), "persistent")
    assert bool(found[0].isnan().all())
    assert bool(found[5].isnan().all())


def test_the_form_of_the_steps_is_the_streaming_one_off_nvidias_gpus():
    assert _tiles.transport_form(1, 14336, 112, 50, torch.device("cpu")) == "streaming"


def test_one_launch_is_predicted_faster_where_a_step_is_short():
    from dotmoe_kernels._tiles.transport import steps_seconds

    for gpu in GPUS:
        streaming, persistent = (steps_seconds(form, 1, 18944, 148, 50, gpu) for form in ("streaming", "persistent"))
        assert persistent.middle < streaming.middle
        whole = steps_seconds("streaming", 28, 18944, 148, 50, gpu)
        assert whole.low > 50 * 4 * 28 * 18944 * 148 / gpu.bandwidth.high


def test_the_plan_has_a_grid_that_fits(monkeypatch, request):
    """Its programs hold more registers than a step's: fewer run at once."""
    from dotmoe_kernels.transport.gpu import streaming

    streaming._plan.cache_clear()
    request.addfinalizer(streaming._plan.cache_clear)

    launched = {}

    class Recorder:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(streaming, f"_sinkhorn_{name}_kernel")
            self.arg_names = self.kernel.arg_names

        def __getitem__(self, grid):
            launched[self.name] = grid[0] * grid[1]
            return self.kernel[grid]

    for name in ("step", "plan"):
        monkeypatch.setattr(streaming, f"_sinkhorn_{name}_kernel", Recorder(name))
    L, F = (3, 18944) if HAS_GPU else (1, 1000)
    solve(normal(L, F, 37, seed=23, dtype=torch.float32), "streaming", num_iters=2)
    waves = {name: _tiles.transport_tiles(37, name, device=torch.device(DEVICE)).wave for name in launched}
    assert launched["plan"] <= waves["plan"] < launched["step"] <= waves["step"]


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("up", "down"), [(u, d) for u in UP for d in DOWN])
@pytest.mark.parametrize(("E", "s", "K"), [(112, 128, 28), (148, 120, 37), (32, 448, 8)])
def test_every_form_at_real_sizes(E, s, K, up, down):
    if down == "stationary" and s > 256:
        pytest.skip("an expert's columns of 448 do not stay on the chip")
    tensors = problem(600, E, K, s, 1000, dtype=torch.bfloat16)
    check(tensors, routed_indices(600, K, E, seed=8, empty=0.05), up, down)


@pytest.mark.gpu
@pytest.mark.parametrize("tol", [0.0, 1e-3])
@pytest.mark.parametrize(("L", "F", "E"), [(1, 18944, 148), (1, 14336, 112), (28, 18944, 148), (2, 14336, 512), (200, 300, 8)])
def test_one_launch_at_real_sizes(L, F, E, tol):
    affinity = normal(1, F, E, seed=22, dtype=torch.float32).cuda().expand(L, -1, -1)
    found, expected = (solve(affinity, form, num_iters=50, tol=tol, tau=0.5) for form in ("persistent", "streaming"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    again = solve(affinity, "persistent", num_iters=50, tol=tol, tau=0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
