"""A few tokens through a model's block on a CPU: a way of their own, and the same values as by router and experts apart."""

import copy
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dotmoe_kernels import _backend
from dotmoe_kernels.experts.decode.cpu.token import TokenExperts
from dotmoe_kernels.models import block as block_module
from dotmoe_kernels.models.block import DotMoeBlock, all_experts
from dotmoe_kernels.routing.budgets import SoftRouter
from dotmoe_kernels.routing.cpu import largest

E, K, H, S = 6, 2, 32, 16
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", list(ERRORS), ids=str)


def block_of(dtype=torch.float32, num_experts=E, top_k=K, width=S, seed=0, **options):
    torch.manual_seed(seed)
    block = DotMoeBlock(num_experts, top_k, H, width, "silu", **options)
    block.reset_parameters(0.3)
    return block.to(dtype).requires_grad_(False).eval()


def tokens(count, dtype=torch.float32, seed=1):
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def apart(block, x):
    """By the modules, as somebody who looks at them makes it; what the router gives."""
    seen = []
    handle = block.gate.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs))
    try:
        return block(x), seen[0]
    finally:
        handle.remove()


@pytest.fixture
def ways(monkeypatch):
    """Which way was taken, in turn."""
    taken = []

    def watch(owner, name, label):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (taken.append(label), function(*a, **k))[1])

    watch(TokenExperts, "__call__", "alone")
    watch(block_module, "few_ffn", "few")
    watch(block_module, "routed_ffn", "apart")
    return taken


@torch.no_grad()
def check(block, x, ways, way, times=1):
    expected, _ = apart(block, x)
    ways.clear()
    found = block(x)
    assert ways == [way] * times
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    error = ERRORS[x.dtype]
    torch.testing.assert_close(found, expected, rtol=error, atol=error * float(expected.abs().max()))
    return found


@DTYPES
@pytest.mark.parametrize("num_zero_experts", [0, 4])
@pytest.mark.parametrize(("num_experts", "top_k", "width"), [(6, 2, 16), (6, 6, 16), (20, 14, 8), (1, 1, 8)])
@pytest.mark.parametrize("T", [1, 2, 8, 16])
def test_the_same_values(T, num_experts, top_k, width, num_zero_experts, dtype, ways):
    block = block_of(dtype, num_experts, top_k, width, num_zero_experts=num_zero_experts)
    for seed in range(2):
        block.path = "masked"  # what "auto" takes in 16 bits with matrix units
        check(block, tokens(T, dtype, seed), ways, "few")
        block.path = "decode"
        check(block, tokens(T, dtype, seed), ways, "alone", T)


def test_which_sizes_go_alone(ways):
    block = block_of()
    with torch.no_grad():
        for way, path, *counts in (
            ("alone", "auto", 1),
            ("alone", "decode", 1),
            ("apart", "decode", 0, 17),
            ("few", "masked", 1, 2, 16),
            ("apart", "masked", 0, 17),
            ("apart", "grouped", 1, 2),
            ("apart", "auto", 0, 2),
        ):
            block.path = path
            for T in counts:
                ways.clear()
                block(tokens(T))
                assert ways == [way]


def test_shapes_and_strides(ways):
    block = block_of()
    x = tokens(1)
    expected = check(block, x, ways, "alone")
    wide = torch.zeros(1, 2 * H)
    wide[:, ::2] = x
    with torch.no_grad():
        for given in (x.view(1, 1, H), x[0], wide[:, ::2]):
            assert torch.equal(block(given), expected.view(given.shape))


def test_ties_go_to_the_lower_expert():
    block = block_of()
    block.gate.weight.zero_()
    _, (_, _, indices) = apart(block, tokens(1))
    assert indices.tolist() == [largest([0.0] * E, K)] == [[0, 1]]


def test_all_slots_empty(ways):
    block = block_of(top_k=2, num_zero_experts=3)
    x = tokens(1)
    block.gate.weight[:E] = -x
    block.gate.weight[E:] = x
    assert torch.equal(check(block, x, ways, "alone"), torch.zeros(1, H))
    block.path = "masked"
    assert torch.equal(check(block, x.expand(3, -1), ways, "few"), torch.zeros(3, H))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_itself_alone(value):
    block = block_of()
    block.path = "masked"
    x = tokens(3)
    with torch.no_grad():
        expected = block(x)
        x[1, 5] = value
        found = block(x)
        assert not found[1].isfinite().all()
        assert torch.equal(found[::2], expected[::2])
        block.path = "auto"
        assert not block(x[1:2]).isfinite().all()
        assert block(x[:1]).isfinite().all()  # nothing of it stays


# --- who looks, changes or replaces -------------------------------------------------------------------------------------


def test_hooks_see_router_and_experts(ways):
    block, x = block_of(), tokens(1)
    expected = check(block, x, ways, "alone")
    for module in (block.gate, block.experts):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            seen = []
            handle = register(lambda *given, seen=seen: seen.append(len(given)))
            ways.clear()
            with torch.no_grad():
                torch.testing.assert_close(block(x), expected)
            assert (len(seen), ways) == (1, ["apart"])
            handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        ways.clear()
        with torch.no_grad():
            block(x)
        assert ways == ["apart"]
    finally:
        handle.remove()
    check(block, x, ways, "alone")


def test_what_replaces_a_forward_is_called(ways):
    block, x = block_of(), tokens(1)
    forward = block.gate.forward
    block.gate.forward = lambda x: (forward(x)[0], *(t.flip(0) * 0 for t in forward(x)[1:]))
    with torch.no_grad():
        assert torch.equal(block(x), torch.zeros(1, H))
    del block.gate.forward
    check(block, x, ways, "alone")

    class Other(type(block.experts)):
        def forward(self, x, indices, weights):
            return x + 1

    block.experts.__class__ = Other
    with torch.no_grad():
        assert torch.equal(block(x), x + 1)


def test_gradients_autocast_and_every_expert(ways):
    block, x = block_of(), tokens(1)
    check(block, x, ways, "alone")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ways.clear()
        assert block(x).dtype == torch.bfloat16
        assert ways == ["apart"]
    with torch.no_grad(), all_experts(block):
        ways.clear()
        assert not torch.equal(block(x), block(-x))
        assert ways == ["apart", "apart"]
    given = x.clone().requires_grad_()
    block(given).sum().backward()
    assert given.grad.abs().sum() > 0
    soft = block_of(soft=SoftRouter(2.0, 0.5, 0.05, 3))
    check(soft, x, ways, "apart")


def test_parameters_of_another_kind(ways):
    class Elsewhere(torch.nn.Parameter):
        def data_ptr(self):
            raise RuntimeError("lies nowhere")

    block, x = block_of(), tokens(1)
    block.experts.down_rows = Elsewhere(block.experts.down_rows.data, requires_grad=False)
    check(block, x, ways, "apart")


def test_other_dtypes_are_refused_as_ever():
    block = block_of(torch.bfloat16)
    with torch.no_grad(), pytest.raises(ValueError, match="hidden_states"):
        block(tokens(1))


@pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
def test_kernels_are_not_passed_by(ways):
    block, x = block_of(), tokens(1)
    with torch.no_grad(), _backend.interpreted():
        block(x)
    assert ways == ["apart"]


# --- weights that move --------------------------------------------------------------------------------------------------


def test_weights_that_moved_are_seen(ways):
    block, other, x = block_of(), block_of(seed=5), tokens(1)
    check(block, x, ways, "alone")
    block.experts.gate_up_proj.data = other.experts.gate_up_proj.data.clone()
    check(block, x, ways, "alone")
    block.experts.down_rows.copy_(other.experts.down_rows)
    check(block, x, ways, "alone")
    block.load_state_dict(block_of(seed=6).state_dict(), assign=True)
    check(block, x, ways, "alone")
    block.to(torch.bfloat16)
    check(block, tokens(1, torch.bfloat16), ways, "alone")
    block.experts.down_rows.data = block.experts.down_rows.data.transpose(0, 1).contiguous().transpose(0, 1)
    check(block, tokens(1, torch.bfloat16), ways, "apart")
    block.experts.interleave_storage()
    check(block, tokens(1, torch.bfloat16), ways, "alone")


def _moved(block):
    block.to(torch.bfloat16)


def _given_up(block):
    """As by who brings weights for a call and takes them away again."""
    for name, parameter in block.experts._parameters.items():
        block.experts._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


def _loaded(block):
    block.load_state_dict(block_of(seed=6).state_dict(), assign=True)


@pytest.mark.parametrize("path", ["decode", "masked"])
@pytest.mark.parametrize("change", [_moved, _given_up, _loaded, None], ids=["moved", "given up", "loaded", "gone"])
def test_old_weights_are_let_go(change, path):
    blocks = [block_of()]
    blocks[0].path = path
    with torch.no_grad():
        blocks[0](tokens(1))
        old = [weakref.ref(t.untyped_storage()) for t in (blocks[0].experts.gate_up_proj, blocks[0].experts.down_rows)]
        assert all(storage() is not None for storage in old)
        if change is None:
            blocks.clear()
        else:
            change(blocks[0])
    assert all(storage() is None for storage in old)


def test_a_copy_is_on_its_own(ways):
    block, x = block_of(), tokens(1)
    expected = check(block, x, ways, "alone")
    twin = copy.deepcopy(block)
    twin.experts.down_rows.zero_()
    assert torch.equal(check(twin, x, ways, "alone"), torch.zeros(1, H))
    assert torch.equal(check(block, x, ways, "alone"), expected)
    weights = sum(t.numel() * t.element_size() for t in block.state_dict().values())
    file = io.BytesIO()
    torch.save(block, file)
    assert len(file.getvalue()) < weights + 20_000
    assert torch.equal(check(pickle.loads(pickle.dumps(block)), x, ways, "alone"), expected)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad], ids=lambda f: f.__name__)
def test_inference_mode_and_back(first):
    _, width = block_of(), 3 if first is torch.no_grad else 5  # sizes that no other test has
    block = block_of(width=width)
    x = tokens(1)
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with first():
        expected = block(x).clone()
    with second():
        assert torch.equal(block(x), expected)
        inside = block_of(width=width)  # its parameters are made in that mode
        assert torch.equal(inside(x), expected)
    with torch.no_grad():
        assert torch.equal(inside(x), expected)


def test_threads_have_room_of_their_own():
    blocks = [block_of(seed=n) for n in range(4)]
    with torch.no_grad():
        expected = [[block(tokens(1, seed=n)) for n in range(50)] for block in blocks]
    wrong = []

    def run(number):
        with torch.no_grad():
            for _ in range(4):
                for n in range(50):
                    if not torch.equal(blocks[number](tokens(1, seed=n)), expected[number][n]):
                        wrong.append((number, n))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- calls --------------------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """The operators that compute, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_takes_few_calls(dtype, ways):
    block, x = block_of(dtype), tokens(1, dtype)
    with torch.no_grad():
        block(x)
        with Counted() as counted:
            block(x)
    assert ways == ["alone", "alone"]
    router = ["mm"] if dtype == torch.float32 else ["_to_copy", "_to_copy", "mm"]
    down = ["mv", "addmv_"] if dtype == torch.float32 else ["cat", "_embedding_bag_forward_only"]
    assert counted.names == [*router, *["mv"] * K, "silu", "mul_", *down]
