"""The Triton kernels of masked_ffn and of expert_ffn's masked path: interpreted on a CPU, and on a GPU at real sizes."""

import pytest
import test_experts
import torch
from checks import SECOND, assert_finite, assert_same, compare, error, second_derivative, value_and_gradients
from shapes import generator, normal, routed_indices
from test_masked import ours, plain, problem

from dotmoe_kernels import _backend, _tiles
from dotmoe_kernels.dispatch.operators import sort_slots_op
from dotmoe_kernels.experts import activations
from dotmoe_kernels.experts.masked import operators
from dotmoe_kernels.experts.masked.gpu import autograd

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPES = [(13, 63, 7, 3, 10), (9, 296, 148, 37, 8), (70, 100, 37, 9, 6), (4, 16, 1, 1, 5), (1, 5, 5, 2, 3)]  # T, F, E, K, H
SOFT = [(), ("plan",), ("probs",), ("weights",), ("plan", "probs"), ("plan", "weights")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def there(tensors):
    return {n: t.to(DEVICE) for n, t in tensors.items()}


# --- alignment: against the reference ----------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("soft", SOFT, ids=lambda s: "+".join(s) or "hard")
@pytest.mark.parametrize(("T", "F", "E", "K", "H"), SHAPES)
def test_equals_the_reference(T, F, E, K, H, soft, dtype):
    tensors, expert_of, indices = problem(T, F, E, K, H, *soft, dtype=dtype)
    compare(ours(expert_of, indices), plain(expert_of, indices), device=DEVICE, **tensors)


@pytest.mark.parametrize("activation", sorted(activations.ACTIVATIONS))
def test_activations(activation):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=20, dtype=torch.float32)
    tensors["gate_proj"] *= 3  # where they bend
    compare(ours(expert_of, indices, activation=activation), plain(expert_of, indices, activation), device=DEVICE, **tensors)


@pytest.mark.parametrize("soft", [("plan", "probs"), ("plan", "weights")], ids="+".join)
def test_empty_and_repeated_slots(soft):
    tensors, expert_of, _ = problem(13, 63, 7, 3, 10, *soft, seed=22, dtype=torch.float32)
    indices = routed_indices(13, 3, 7, seed=23, empty=0.4)
    indices[2], indices[3], indices[4] = 7, 1, torch.tensor([5, 7, 5])
    compare(ours(expert_of, indices), plain(expert_of, indices), device=DEVICE, **tensors)
    results = value_and_gradients(ours(expert_of, indices), there(tensors))
    assert (results["output 0"][2] == 0).all()


@pytest.mark.parametrize("kind", ["uneven", "an expert without neurons", "one expert has all"])
def test_any_assignment(kind):
    tensors, _, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=25, dtype=torch.float32)
    expert_of = {
        "uneven": torch.randint(4, (24,), generator=generator(26)),
        "an expert without neurons": torch.arange(24) % 3,
        "one expert has all": torch.full((24,), 2),
    }[kind]
    compare(ours(expert_of, indices), plain(expert_of, indices), device=DEVICE, **tensors)


def test_several_programs_share_the_sums():
    """Shares of the neurons and of the tokens that end within a tile."""
    T, F, E = 150, 200, 7
    for kernel, kept, passing in (("backward", T, F), ("plan", F, T)):
        tile, _ = _tiles.masked_tile(kernel, F, E, True)
        rows, along = (tile[n] for n in (("BLOCK_T", "BLOCK_F") if kernel == "backward" else ("BLOCK_F", "BLOCK_T")))
        assert _tiles.masked_splits(kept, passing, rows, along)[0] > 1
    tensors, expert_of, indices = problem(T, F, E, 3, 8, "plan", "probs", seed=27, dtype=torch.float32)
    compare(ours(expert_of, indices), plain(expert_of, indices), device=DEVICE, **tensors)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "pytorch"])
@pytest.mark.parametrize("soft", [("plan", "probs"), ("plan", "weights")], ids="+".join)
def test_recomputing_changes_nothing_but_what_is_kept(soft, triton):
    device = DEVICE if triton else "cpu"
    tensors, expert_of, indices = problem(13, 63, 7, 3, 10, *soft, seed=30, dtype=torch.float32)
    tensors = {n: t.to(device) for n, t in tensors.items()}
    kept = {}

    def run(recompute):
        sizes = kept.setdefault(recompute, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            return value_and_gradients(ours(expert_of, indices, recompute=recompute), tensors)

    with _backend.interpreted(triton):
        assert_same(run(True), run(False))
    hidden = [(13, 63), (63, 13)]  # gate and up, tokens or neurons as rows
    assert sum(shape in hidden for shape in kept[True]) < sum(shape in hidden for shape in kept[False])


@pytest.mark.parametrize("soft", SOFT, ids=lambda s: "+".join(s) or "hard")
def test_no_tokens(soft):
    tensors, expert_of, indices = problem(0, 24, 4, 2, 6, *soft, seed=28, dtype=torch.float32)
    results = value_and_gradients(ours(expert_of, indices), there(tensors))
    assert results["output 0"].shape == (0, 6)
    assert all((results[f"gradient of {n}"] == 0).all() for n in tensors)


@pytest.mark.parametrize("name", ["x", "gate_proj", "up_proj", "down_proj", "plan", "probs"])
def test_only_one_argument_needs_a_gradient(name):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=40, dtype=torch.float32)
    expected = value_and_gradients(plain(expert_of, indices), tensors)
    fixed = {n: t for n, t in there(tensors).items() if n != name}
    found = value_and_gradients(lambda **leaf: ours(expert_of, indices)(**fixed, **leaf), {name: tensors[name].to(DEVICE)})
    assert error(found[f"gradient of {name}"], expected[f"gradient of {name}"]) < 2e-6
    assert all(t.grad is None for t in fixed.values())


def test_any_strides():
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=43, dtype=torch.float32)
    expected = value_and_gradients(ours(expert_of, indices), there(tensors))
    wide = torch.zeros(48, dtype=torch.int64)[::2].copy_(expert_of)
    transposed = there({n: t.T.contiguous().T for n, t in tensors.items()})
    found = value_and_gradients(ours(wide, indices.T.contiguous().T), transposed)
    assert all(error(found[name], expected[name]) < 2e-6 for name in expected)


@DTYPES
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(dtype):
    tensors, expert_of, _ = problem(13, 63, 7, 3, 10, "plan", "probs", seed=41, dtype=dtype)
    indices, tensors = routed_indices(13, 3, 7, seed=42, empty=0.3), there(tensors)
    first = value_and_gradients(ours(expert_of, indices), tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(ours(expert_of, indices), tensors))


@SECOND
def test_a_second_derivative_is_refused(how):
    tensors, expert_of, indices = problem(4, 9, 3, 2, 5, "plan", "probs", seed=29, dtype=torch.float32)
    tensors = there(tensors)
    x = tensors.pop("x")
    with pytest.raises(RuntimeError, match="second derivative"):
        second_derivative(lambda x: ours(expert_of, indices)(x, **tensors), x, how)


@DTYPES
def test_what_the_mask_drops_may_overflow(dtype):
    """Neurons of an expert that a token did not choose: neither its output nor its gradients to gate and up depend on them."""
    gate, up = (normal(2, 4, seed=31 + i, dtype=dtype).to(DEVICE) for i in range(2))
    r, expert_of = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=dtype, device=DEVICE), torch.tensor([0, 1, 0, 1], device=DEVICE)
    gate[0, 1], up[1, 0], gate[1, 2] = torch.inf, -torch.inf, torch.nan
    mask = r[:, expert_of]
    hidden = operators.masked_hidden_op(gate, up, r, expert_of, None, None, "silu")
    expected = torch.where(mask != 0, torch.nn.functional.silu(gate) * up * mask, 0)
    assert error(hidden, expected) < 1e-3
    arguments = (torch.ones_like(gate), gate, up, r, expert_of, "linear")
    dgate, dup, _, _ = operators.masked_hidden_backward_op(*arguments, True, False, False)
    assert error(dgate, torch.where(mask != 0, up * mask, 0)) < 1e-3
    assert error(dup, torch.where(mask != 0, gate * mask, 0)) < 1e-3


@pytest.mark.parametrize("wrong", [2, -1, 10**6])
def test_neurons_of_no_expert_are_dropped(wrong):
    """Nobody looks on a GPU; what lies beside R is not read."""
    around = torch.full((4, 2), torch.nan, device=DEVICE)
    r = around[1:3]
    r.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    gate, up = (normal(2, 4, seed=32 + i, dtype=torch.float32).to(DEVICE) for i in range(2))
    expert_of = torch.tensor([0, wrong, 1, wrong], device=DEVICE)
    hidden = operators.masked_hidden_op(gate, up, r, expert_of, None, None, "silu")
    arguments = (torch.ones_like(gate), gate, up, r, expert_of, "silu", True, True, False)
    dgate, dup, dr, _ = operators.masked_hidden_backward_op(*arguments)
    assert all((t[:, 1::2] == 0).all() for t in (hidden, dgate, dup))
    assert hidden[0, 0] != 0
    expected = torch.nn.functional.silu(gate) * up
    assert error(dr, expected[:, ::2]) < 1e-6


# --- alignment without the mask's zeros --------------------------------------------------------------------------------


EQUAL = [(13, 63, 7, 3, 10), (5, 74, 37, 9, 8), (70, 96, 12, 3, 40), (4, 16, 1, 1, 5), (9, 300, 2, 1, 6), (1, 5, 5, 2, 3)]
FROZEN = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def by_slots(monkeypatch):
    """However few tokens there are; counts the calls."""
    calls = []
    monkeypatch.setattr(autograd, "leaves_zeros_out", lambda *sizes: calls.append(sizes) or True)
    return calls


def frozen(function, tensors):
    """The arguments that learn, and the function of them alone."""
    fixed = {n: t for n, t in tensors.items() if n in FROZEN}
    return (lambda **learning: function(**learning, **{n: t.to(learning["x"]) for n, t in fixed.items()})), {
        n: t for n, t in tensors.items() if n not in FROZEN
    }


def balanced(expert_of, indices, **options):
    return ours(expert_of, indices, balanced=True, **options)


@DTYPES
@pytest.mark.parametrize(
    ("T", "F", "E", "K", "H", "soft", "recompute"),
    [(*EQUAL[0], soft, recompute) for soft in SOFT for recompute in (False, True)]
    + [(*shape, ("plan", "probs"), False) for shape in EQUAL[1:]],
    ids=str,
)
def test_by_slots_equals_the_reference(T, F, E, K, H, soft, recompute, dtype, by_slots):
    tensors, expert_of, indices = problem(T, F, E, K, H, *soft, dtype=dtype)
    run, learning = frozen(balanced(expert_of, indices, recompute=recompute), tensors)
    compare(run, frozen(plain(expert_of, indices), tensors)[0], device=DEVICE, **learning)
    assert len(by_slots) == 1


@pytest.mark.usefixtures("by_slots", "nan_filled")
@pytest.mark.parametrize(("E", "s"), [(7, 64), (2, 128), (3, 72), (20, 4)])
def test_by_slots_the_straight_through_gradients_in_several_programs(E, s):
    """One tile an expert, two, and one that is not full; several programs share the tokens."""
    T = 150
    tile, _ = _tiles.masked_tile("plan", s, E, True)
    assert tile["BLOCK_F"] == (16 if s == 4 else 64)
    assert _tiles.masked_splits(E * s, T, tile["BLOCK_F"], tile["BLOCK_T"])[0] > 1
    tensors, expert_of, indices = problem(T, E * s, E, 1, 8, "plan", "probs", seed=70, dtype=torch.float32)
    run, learning = frozen(balanced(expert_of, indices), tensors)
    compare(run, frozen(plain(expert_of, indices), tensors)[0], device=DEVICE, **learning)


@pytest.mark.usefixtures("by_slots")
@pytest.mark.parametrize("activation", sorted(activations.ACTIVATIONS))
def test_by_slots_activations(activation):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=60, dtype=torch.float32)
    tensors["gate_proj"] *= 3  # where they bend
    run, learning = frozen(balanced(expert_of, indices, activation=activation), tensors)
    compare(run, frozen(plain(expert_of, indices, activation), tensors)[0], device=DEVICE, **learning)


@pytest.mark.usefixtures("by_slots", "nan_filled")
@pytest.mark.parametrize("soft", [("plan", "probs"), ("plan", "weights")], ids="+".join)
def test_by_slots_empty_and_repeated_slots(soft):
    """Weights may be 0, and those of an expert that is named twice may cancel."""
    tensors, expert_of, _ = problem(13, 63, 7, 3, 10, *soft, seed=61, dtype=torch.float32)
    indices = routed_indices(13, 3, 7, seed=62, empty=0.4)
    indices[2], indices[3], indices[4], indices[5] = 7, 1, torch.tensor([5, 7, 5]), torch.tensor([0, 0, 6])
    if "weights" in soft:
        tensors["weights"][5] = torch.tensor([0.5, -0.5, 0.0])
    run, learning = frozen(balanced(expert_of, indices), tensors)
    compare(run, frozen(plain(expert_of, indices), tensors)[0], device=DEVICE, **learning)
    results = value_and_gradients(run, there(learning))
    assert (results["output 0"][2] == 0).all()
    assert_same(results, value_and_gradients(run, there(learning)))


@pytest.mark.usefixtures("by_slots")
def test_by_slots_any_strides():
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=63, dtype=torch.float32)
    expected = value_and_gradients(*frozen(balanced(expert_of, indices), there(tensors)))
    wide = torch.zeros(48, dtype=torch.int64)[::2].copy_(expert_of)
    transposed = there({n: t.T.contiguous().T for n, t in tensors.items()})
    found = value_and_gradients(*frozen(balanced(wide, indices.T.contiguous().T), transposed))
    assert all(error(found[name], expected[name]) < 2e-6 for name in expected)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("F", [24, 100, 5000])
def test_columns_in_another_order(F, whole, monkeypatch):
    from dotmoe_kernels.experts.masked.gpu import slots as masked_slots

    if not whole:
        monkeypatch.setattr(masked_slots, "columns_tile", lambda *_: ({"WHOLE": False, "BLOCK_F": 64}, {"num_warps": 4}))
    down = normal(5, F, seed=71, dtype=torch.float32).to(DEVICE)
    order = torch.randperm(F, generator=generator(72)).to(DEVICE)
    assert torch.equal(masked_slots.pack_columns(down, order.int()), down[:, order])
    assert torch.equal(masked_slots.pack_columns(down.T.contiguous().T, order.int()), down[:, order])


@pytest.mark.parametrize("name", ["x", "plan", "probs"])
def test_by_slots_only_one_argument_needs_a_gradient(name, by_slots):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=65, dtype=torch.float32)
    expected = value_and_gradients(plain(expert_of, indices), tensors)
    fixed = {n: t for n, t in there(tensors).items() if n != name}
    found = value_and_gradients(lambda **leaf: balanced(expert_of, indices)(**fixed, **leaf), {name: tensors[name].to(DEVICE)})
    assert error(found[f"gradient of {name}"], expected[f"gradient of {name}"]) < 2e-6
    assert all(t.grad is None for t in fixed.values())
    assert by_slots


def test_weights_that_learn_take_all_products(by_slots):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=66, dtype=torch.float32)
    compare(balanced(expert_of, indices), plain(expert_of, indices), device=DEVICE, **tensors)
    compare(ours(expert_of, indices), plain(expert_of, indices), device=DEVICE, **tensors)
    assert len(by_slots) == 1  # asked of the first call alone, and not taken


@pytest.mark.usefixtures("by_slots")
@pytest.mark.parametrize("activation", ["silu", "relu", "relu2"])
def test_unequal_experts_are_no_result(activation):
    """Where values can be seen an error, elsewhere NaN: in the output and every gradient of a token of such an expert."""
    tensors, expert_of, _ = problem(9, 24, 4, 1, 6, "plan", "probs", seed=67, dtype=torch.float32)
    indices = torch.arange(9)[:, None] % 4
    expert_of[(expert_of == 2).nonzero()[0]] = 1
    run, learning = frozen(balanced(expert_of, indices, activation=activation), tensors)
    message = r"expert_of is with 7 neurons of one expert; allowed: F / E = 6"
    for triton in (True, False):
        with _backend.interpreted(triton), pytest.raises(ValueError, match=message):
            run(**learning)
    routed = expert_of.to(DEVICE), indices.to(DEVICE)

    def unseen(x, plan, probs):
        fixed = (tensors[n].to(DEVICE) for n in FROZEN)
        return autograd.masked(x, *fixed, *routed, plan, probs, None, 4, activation, False, True)

    results = value_and_gradients(unseen, there(learning))
    wrong = (indices[:, 0] == 1) | (indices[:, 0] == 2)
    assert results["output 0"][wrong].isnan().all()
    assert results["output 0"][~wrong].isfinite().all()
    assert results["gradient of probs"][:, 1:3].isnan().all()
    if activation == "silu":  # relu stops a gradient, be it NaN
        assert results["gradient of x"][wrong].isnan().any(1).all()


@pytest.mark.usefixtures("by_slots")
def test_by_slots_what_the_mask_drops_may_overflow():
    tensors, expert_of, _ = problem(6, 12, 3, 1, 5, seed=68, dtype=torch.float32)
    tensors = there(tensors)
    indices = torch.tensor([0, 1, 0, 1, 3, 0])[:, None].to(DEVICE)  # nobody takes expert 2
    tensors["gate_proj"][expert_of.to(DEVICE) == 2] = 1e38
    tensors["x"] *= 1e3
    found = value_and_gradients(lambda x: balanced(expert_of, indices)(x, *(tensors[n] for n in FROZEN)), {"x": tensors["x"]})
    assert_finite(found)
    tensors["gate_proj"][expert_of.to(DEVICE) == 2] = 0
    assert_same(
        found, value_and_gradients(lambda x: balanced(expert_of, indices)(x, *(tensors[n] for n in FROZEN)), {"x": tensors["x"]})
    )


@SECOND
@pytest.mark.usefixtures("by_slots")
def test_by_slots_a_second_derivative_is_refused(how):
    tensors, expert_of, indices = problem(4, 9, 3, 2, 5, "plan", "probs", seed=69, dtype=torch.float32)
    tensors = there(tensors)
    x = tensors.pop("x")
    with pytest.raises(RuntimeError, match="second derivative"):
        second_derivative(lambda x: balanced(expert_of, indices)(x, **tensors), x, how)


def test_where_the_zeros_are_left_out():
    """Not where nothing is saved, and not where the copies of the weights cost more than what is."""
    takes = _tiles.leaves_zeros_out
    assert takes(8192, 112, 128, 28, 4096)
    assert takes(8192, 8, 1792, 2, 4096)
    assert not takes(256, 112, 128, 28, 4096)
    assert not takes(8192, 112, 128, 112, 4096)
    assert not takes(8192, 112, 128, 0, 4096)
    assert not takes(0, 8, 16, 2, 64)


# --- the routed FFN ----------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("storage", ["[E, s, H]", "[H, E, s]", "[E, H, s]"])
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), [(20, 7, 3, 24, 40), (17, 148, 37, 8, 10), (33, 1, 1, 86, 12)])
def test_the_masked_path_equals_the_reference(T, E, K, s, H, storage, dtype):
    indices, tensors = routed_indices(T, K, E, seed=1, empty=0.2), test_experts.problem(T, E, K, s, H, seed=2, dtype=dtype)
    dim = {"[E, s, H]": (1, 2), "[H, E, s]": (0, 1), "[E, H, s]": (0, 0)}[storage]
    tensors["down_proj"] = tensors["down_proj"].transpose(*dim).contiguous().transpose(*dim)
    exact = test_experts.plain(indices)(**{n: t.double() for n, t in tensors.items()})
    same = test_experts.plain(indices)(**tensors)
    with torch.no_grad():
        found = test_experts.ours(indices, path="masked")(**there(tensors))
    assert error(found, exact) <= 2 * error(same, exact) + (1e-6 if dtype == torch.float32 else 5e-4)


@DTYPES
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), [(70, 3, 1, 86, 40), (5, 7, 3, 8, 100), (130, 2, 1, 128, 64)])
def test_the_up_product_with_the_mask_in_its_epilogue(T, E, K, s, H, dtype):
    tensors = test_experts.problem(T, E, K, s, H, seed=5, dtype=dtype)
    r = torch.rand(T, E, generator=generator(6)) * (torch.rand(T, E, generator=generator(7)) < 0.3)
    r[:64, 0] = 0  # a whole tile avoids an expert
    gate_up = tensors["gate_up_proj"].transpose(1, 2).contiguous().transpose(1, 2) if s == 8 else tensors["gate_up_proj"]

    def plain(x, gate_up):
        gate, up = torch.einsum("th,enh->ten", x, gate_up).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up * r[:, :, None].to(x.dtype)).flatten(1)

    exact, same = plain(tensors["x"].double(), gate_up.double()), plain(tensors["x"], gate_up)
    arguments = (tensors["x"].to(DEVICE), gate_up.to(DEVICE), r.to(DEVICE), "silu")
    found = operators.masked_view_up_op(*arguments)
    assert error(found, exact) <= 2 * error(same, exact) + (1e-6 if dtype == torch.float32 else 5e-4)
    assert torch.equal(found, operators.masked_view_up_op(*arguments))
    torch.library.opcheck(operators.masked_view_up_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_the_mask_drops_is_not_read():
    product = normal(3, 16, seed=3, dtype=torch.float32).to(DEVICE)  # two experts of four neurons
    r = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]], device=DEVICE)
    product[0, 8:], product[1, :8], product[2] = torch.nan, torch.inf, torch.nan
    hidden = operators.masked_view_hidden_op(product, r, "silu")
    assert hidden.isfinite().all()
    assert error(hidden[0, :4], torch.nn.functional.silu(product[0, :4]) * product[0, 4:8]) < 1e-6
    assert (hidden[[0, 1, 2, 2], :][2:] == 0).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["unit", "weighted"])
def test_mask(weighted):
    indices = torch.tensor([[1, 1, 4], [0, 2, 0], [3, 3, 3], [4, 4, 4]])
    weights = normal(4, 3, seed=4, dtype=torch.float32) if weighted else None
    expected = torch.zeros(4, 5).scatter_add(1, indices, torch.ones(4, 3) if weights is None else weights)[:, :4]
    w = None if weights is None else weights.to(DEVICE)
    assert error(operators.expert_mask_op(indices.to(DEVICE), w, 4, torch.float32), expected) < 1e-6


# --- as torch operators ------------------------------------------------------------------------------------------------


def test_opcheck():
    gate, up, r, plan = (normal(*s, seed=5, dtype=torch.float32).to(DEVICE) for s in ((6, 12), (6, 12), (6, 4), (12, 4)))
    probs, expert_of = normal(6, 4, seed=6, dtype=torch.float32).to(DEVICE), (torch.arange(12) % 4).to(DEVICE)
    indices, weights = routed_indices(6, 2, 4, seed=7).to(DEVICE), normal(6, 2, seed=8, dtype=torch.float32).to(DEVICE)
    leaves = [t.clone().requires_grad_() for t in (gate, up, r)]
    soft = [plan.requires_grad_(), probs.requires_grad_()]
    torch.library.opcheck(operators.masked_hidden_op, (*leaves, expert_of, *soft, "silu"))
    torch.library.opcheck(operators.masked_hidden_backward_op, (gate, gate, up, r, expert_of, "silu", True, True, True))
    product = normal(6, 16, seed=9, dtype=torch.float32).to(DEVICE)  # four experts of two neurons
    torch.library.opcheck(operators.masked_view_hidden_op, (product, r, "silu"))
    torch.library.opcheck(operators.expert_mask_op, (indices, weights.requires_grad_(), 4, torch.float32))
    weights = weights.detach()
    x, dy, gate_proj, up_proj, down_proj = (
        normal(*s, seed=10, dtype=torch.float32).to(DEVICE) for s in (*[(6, 5)] * 2, *[(12, 5)] * 2, (5, 12))
    )
    order, slots = sort_slots_op(expert_of[:, None], 4)[0], sort_slots_op(indices, 4)
    starts, (token, source, *placed) = sort_slots_op(expert_of[:, None], 4)[2], slots
    routed = weights, order.int(), starts, indices, token.int(), source.int(), *placed
    torch.library.opcheck(operators.masked_slots_op, (x, gate_proj, up_proj, down_proj, *routed, "silu"))
    for needs in ((True, True, True), (False, True, False)):
        arguments = dy, x, None, gate_proj, up_proj, down_proj, r.detach(), *routed, "silu", *needs
        torch.library.opcheck(operators.masked_slots_backward_op, arguments)


@pytest.mark.usefixtures("by_slots")
@pytest.mark.parametrize("equal", [False, True], ids=["all products", "by slots"])
def test_compiles_into_one_graph(equal):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=44, dtype=torch.float32)
    expert_of, indices = expert_of.to(DEVICE), indices.to(DEVICE)
    fixed = [tensors.pop(n).to(DEVICE) for n in FROZEN]

    def function(x, plan, probs):
        return autograd.masked(x * 2, *fixed, expert_of, indices, plan, probs, None, 4, "silu", False, equal) + 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = value_and_gradients(lambda **t: compiled(**t), there(tensors))
    expected = value_and_gradients(function, there(tensors))
    assert all(error(found[name], expected[name]) < 1e-6 for name in expected)


# --- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("by_slots")
@pytest.mark.parametrize("equal", [False, True], ids=["all products", "by slots"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("F", "E", "K"), [(14336, 112, 28), (18944, 148, 37), (14336, 8, 2), (4096, 512, 64)])
def test_real_sizes(F, E, K, dtype, equal):
    T, H = 2048, 512
    tensors, expert_of, indices = problem(T, F, E, K, H, "plan", "probs", seed=50, dtype=dtype)
    tensors, expert_of, indices = there(tensors), expert_of.cuda(), indices.cuda()

    def results(function, dtype=dtype):
        wanted = {n: t.to(dtype) for n, t in tensors.items()}
        return value_and_gradients(*frozen(function, wanted)) if equal else value_and_gradients(function, wanted)

    exact, same = results(plain(expert_of, indices), torch.float32), results(plain(expert_of, indices))
    found = results(ours(expert_of, indices, balanced=equal))
    floor = 4e-3 if dtype == torch.bfloat16 else 5e-4
    for name, value in found.items():
        assert error(value, exact[name]) <= 2 * error(same[name], exact[name]) + floor, name
    assert_same(found, results(ours(expert_of, indices, balanced=equal)))


@pytest.mark.gpu
@pytest.mark.usefixtures("by_slots")
@pytest.mark.parametrize("equal", [False, True], ids=["all products", "by slots"])
def test_in_a_graph_and_without_synchronisation(equal):
    tensors, expert_of, indices = problem(512, 14336, 112, 28, 512, "plan", "probs", seed=51, dtype=torch.bfloat16)
    leaves, expert_of, indices = {n: t.cuda() for n, t in tensors.items()}, expert_of.cuda(), indices.cuda()
    learning = [t.requires_grad_() for n, t in leaves.items() if not (equal and n in FROZEN)]

    def step():
        return torch.autograd.grad(ours(expert_of, indices, balanced=equal)(**leaves).sum(), learning)

    expected = step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    T, F, E = 160_000, 14_336, 112
    gate = torch.empty(T, F, dtype=torch.bfloat16, device="cuda").fill_(0.5)
    r, expert_of = torch.ones(T, E, dtype=torch.bfloat16, device="cuda"), torch.arange(F, device="cuda") % E
    hidden = operators.masked_hidden_op(gate, gate, r, expert_of, None, None, "linear")
    assert (hidden[-1] == 0.25).all()
    dgate, _, dr, dplan = operators.masked_hidden_backward_op(gate, gate, gate, r, expert_of, "linear", True, True, True)
    assert (dgate[-1] == 0.25).all()
    assert (dr[-1] == 16).all()  # 128 neurons of 0.125
    assert error(dplan, torch.full((F, E), 0.125 * T)) < 1e-5


@pytest.mark.gpu
def test_slots_of_addresses_beyond_two_to_the_31():
    from dotmoe_kernels.experts.masked.gpu.slots import _slots_hidden

    T, F, E = 160_000, 14_336, 112
    product = torch.empty(T, 2 * F, dtype=torch.bfloat16, device="cuda").fill_(0.5)
    d = torch.full((T, F), 2.0, dtype=torch.bfloat16, device="cuda")
    indices = (torch.arange(T, device="cuda") % E)[:, None]
    token, source, offsets, _ = sort_slots_op(indices, E)
    assert (_slots_hidden(product, None, indices, token, source, offsets, "linear") == 0.25).all()
    assert (_slots_hidden(product, d, indices, token, source, offsets, "linear") == 1).all()
