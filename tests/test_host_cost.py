"""What a call does before its kernels run: checks once a signature, no dispatcher where it has nothing to do, kept launches.

By structure; times are ``python -m bench.host_cost``'s."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import expert_weights, normal, routed_indices
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _checks
from dotmoe_kernels._backend import Launch, aligned, is_direct, is_plain

ROOT = Path(__file__).resolve().parents[1]
WITH_TRITON = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets its kernels")
T, H, E, K, S = 2, 16, 5, 2, 8


def experts(T=T, dtype=torch.float32):
    gate_up, down = expert_weights(E, S, H, seed=0, dtype=dtype)
    tensors = {"x": normal(T, H, seed=1, dtype=dtype), "gate_up_proj": gate_up, "down_proj": down}
    return {**tensors, "indices": routed_indices(T, K, E, seed=2), "weights": torch.full((T, K), 0.5)}


# --- where the dispatcher has nothing to do -------------------------------------------------------------------------------


class Logged(TorchDispatchMode):
    """The operators of this package that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dotmoe_kernels":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


class Named(TorchFunctionMode):
    pass


class Quiet(torch.Tensor):
    """A subclass by name alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Dispatched(torch.Tensor):
    seen = []  # noqa: RUF012
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        args = [a.inner if isinstance(a, Dispatched) else a for a in args]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensor", [torch.ones(3), nn.Parameter(torch.ones(3)), torch.ones(3).as_subclass(Quiet)], ids=repr)
def test_plain(tensor):
    assert is_plain(tensor, None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert is_direct(tensor, None)
    with torch.inference_mode():
        assert is_direct(torch.ones(3), tensor)
    assert is_direct(tensor) == (not tensor.requires_grad)


NOT_PLAIN = {
    "a function's subclass": lambda: torch.ones(3).as_subclass(Wrapped),
    "a dispatched subclass": lambda: Dispatched(torch.ones(3)),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3)]),
    "negated on paper": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "zeros on paper": lambda: torch._efficientzerotensor(3),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "an array": lambda: torch.ones(3).numpy(),
    "a list": lambda: [1.0],
    "a number": lambda: 3,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", NOT_PLAIN)
def test_not_plain(what):
    assert not is_plain(torch.ones(3), NOT_PLAIN[what]())


@pytest.mark.parametrize(
    "mode", [Logged, Named, FakeTensorMode, lambda: torch.device("cpu")], ids=["dispatch", "function", "fake", "device"]
)
def test_nothing_is_plain_under_a_mode(mode):
    tensor = torch.ones(3)
    with mode():
        assert not is_plain(tensor)
    assert is_plain(tensor)


def test_nothing_is_plain_in_a_transform_or_a_graph():
    seen, other = [], torch.ones(3)

    def note(x):
        seen.append(is_plain(x) or is_plain(other))
        return x.sum()

    torch.vmap(note)(torch.ones(2, 3))
    torch.func.grad(note)(torch.ones(3))
    torch.func.functionalize(note)(torch.ones(3))
    torch.func.jvp(note, (torch.ones(3),), (torch.ones(3),))
    make_fx(note)(torch.ones(3))
    torch.jit.trace(note, torch.ones(3), check_trace=False)
    assert seen == [False] * 6
    assert is_plain(other)

    def direct(x):
        return x + 1 if is_plain(x) else x - 1

    torch.compiler.reset()
    assert torch.compile(direct, fullgraph=True, backend="eager")(torch.zeros(1)) == -1


def test_a_gradient_is_not_direct():
    leaf, constant = torch.ones(3, requires_grad=True), torch.ones(3)
    assert is_plain(leaf, constant)
    assert not is_direct(constant, None, leaf)
    with torch.no_grad():
        assert is_direct(constant, leaf)


# --- ops by the dispatcher only where it is needed ------------------------------------------------------------------------

LOGITS = normal(3, 7, seed=3, dtype=torch.float32)
AFFINITY = normal(10, 5, seed=4, dtype=torch.float32)
INDICES = routed_indices(3, 2, 4, seed=5)
SLOTS = dk.dispatch_tokens(INDICES, 4)
ROWS, TOKENS = normal(6, 8, seed=6, dtype=torch.float32), normal(3, 8, seed=7, dtype=torch.float32)
EXPERTS = {name: tensor for name, tensor in experts().items() if name != "x"}
OPS = {  # the operator's name: a call, and a tensor of it that a gradient may be wanted to
    "decode_ffn": (lambda x: dk.expert_ffn(x, **EXPERTS, path="decode"), experts()["x"]),
    "grouped_ffn": (lambda x: dk.expert_ffn(x, **EXPERTS, path="grouped"), experts()["x"]),
    "route_top_k": (lambda z: dk.route_top_k(z, 2), LOGITS),
    "choose_top_k": (lambda z: dk.routing.choose(z, 2, None), LOGITS),
    "route_soft_top_k": (lambda z: dk.route_soft_top_k(z, 2.0, temperature=1.0, threshold=0.1, max_active=3), LOGITS),
    "soft_top_k": (lambda z: dk.soft_top_k(z, 2.5), LOGITS),
    "sort_slots": (lambda i: dk.dispatch_tokens(i, 4), INDICES),
    "scatter_rows": (lambda x: dk.scatter_tokens(x, SLOTS), TOKENS),
    "gather_rows": (lambda ys: dk.gather_tokens(ys, SLOTS, torch.ones(3, 2)), ROWS),
    "sinkhorn": (lambda a: dk.sinkhorn(a, num_iters=3), AFFINITY),
}
ON_CPU = WITH_TRITON, INTERPRETED


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def passing(monkeypatch):
    """The operators of this package that are called, by name."""
    names, call = [], CustomOpDef.__call__
    monkeypatch.setattr(CustomOpDef, "__call__", lambda self, *a: (names.append(self._name), call(self, *a))[1])
    return names


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_CPU) for name in OPS])
def test_an_op_skips_the_dispatcher(name, passing):
    """And goes there under a mode, to the same values."""
    call, given = OPS[name]
    with _backend.interpreted():
        found = tensors_of(call(given))
        assert passing == (["sort_slots"] if name == "grouped_ffn" else [])
        with Logged() as logged:
            expected = tensors_of(call(given))
        assert name in passing
        assert name in logged.names
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride(), ours.requires_grad) == (theirs.dtype, theirs.stride(), False)


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_CPU) for name in OPS if name not in ("choose_top_k", "sort_slots")])
def test_a_gradient_flows_after_a_call_without(name):
    """Of the same signature: nothing is remembered that keeps it away. And none where nobody wants it."""
    call, given = OPS[name]
    with _backend.interpreted():
        expected = next(t for t in tensors_of(call(given)) if t.is_floating_point())
        leaf = given.clone().requires_grad_()
        found = next(t for t in tensors_of(call(leaf)) if t.is_floating_point())
        torch.testing.assert_close(found.detach(), expected)
        (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
        assert bool(gradient.isfinite().all())
        assert gradient.shape == leaf.shape
        with torch.no_grad():
            assert not any(t.requires_grad for t in tensors_of(call(leaf)))


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_CPU) for name in OPS if name != "sort_slots"])
def test_autocast_changes_nothing(name):
    call, given = OPS[name]
    with _backend.interpreted():
        expected = tensors_of(call(given))
        with torch.autocast("cpu", torch.bfloat16):
            found = tensors_of(call(given))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_CPU) for name in OPS])
def test_a_graph_holds_the_operator(name):
    """Of a call whose signature has gone by without it: compiled, and traced with and without fake tensors."""
    call, given = OPS[name]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with _backend.interpreted():
        expected = tensors_of(call(given))
        torch.compiler.reset()
        found = tensors_of(torch.compile(call, fullgraph=True, backend=keep)(given))
        if name in ("route_top_k", "choose_top_k"):  # the others look at a CPU's values, which a tracer does not give
            graphs += [make_fx(call, tracing_mode=mode)(given) for mode in ("real", "fake")]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    inside = {"decode_ffn": "expert_ffn"}.get(name, name)
    for graph in graphs:
        targets = " ".join(str(node.target) for node in graph.graph.nodes)
        assert f"dotmoe_kernels.{inside}" in targets or f"dotmoe_kernels.{name}" in targets


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_CPU) for name in OPS if name != "choose_top_k"])
def test_a_transform_is_refused_after_a_call_without(name):
    call, given = OPS[name]
    with _backend.interpreted():
        call(given)
        with pytest.raises(ValueError, match=r"torch\.func"):
            torch.vmap(call)(given[None])


@WITH_TRITON
@INTERPRETED
def test_a_subclass_has_its_say():
    with _backend.interpreted():
        dk.route_top_k(LOGITS, 2)
        Dispatched.seen.clear()
        dk.route_top_k(Dispatched(LOGITS), 2)
    assert any("route_top_k" in name for name in Dispatched.seen)


@WITH_TRITON
@INTERPRETED
def test_what_is_negative_on_paper_is_negative():
    numbers = torch.complex(torch.zeros(3, 7), LOGITS).conj().imag
    assert numbers.is_neg()
    with _backend.interpreted():
        assert torch.equal(dk.route_top_k(numbers, 2).indices, dk.route_top_k(-LOGITS, 2).indices)


# --- checks, once a signature ---------------------------------------------------------------------------------------------


def counted(monkeypatch, module, name):
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: (calls.append(name), real(*a))[1])
    return calls


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setattr(dk.experts, "_passed", _checks.Passed())
    return counted(monkeypatch, dk.experts, "_check")


def test_experts_are_checked_once_a_signature(checks):
    given = experts()
    for _ in range(3):
        dk.expert_ffn(**given)
    assert len(checks) == 1
    dk.expert_ffn(**{**given, "x": given["x"] + 1, "gate_up_proj": nn.Parameter(given["gate_up_proj"].clone())})
    assert len(checks) == 1  # other tensors of that kind
    dk.expert_ffn(**experts(T=3))
    dk.expert_ffn(**experts(dtype=torch.float64))
    dk.expert_ffn(**{**given, "weights": None})
    dk.expert_ffn(**{**given, "indices": given["indices"].int()})
    dk.expert_ffn(**given, activation="gelu")
    dk.expert_ffn(**given, path="grouped")
    assert len(checks) == 7


WRONG = {
    "shape of x": ("x", lambda x: x[:, :-1], "gate_up_proj is of shape"),
    "rank of x": ("x", lambda x: x[0], "x is of shape"),
    "dtype of x": ("x", lambda x: x.double(), "gate_up_proj is of dtype torch.float32"),
    "device of x": ("x", lambda x: x.to("meta"), "gate_up_proj is on cpu"),
    "no tensor": ("x", lambda x: x.numpy(), "x is a ndarray"),
    "integers": ("x", lambda x: x.int(), "x is of dtype torch.int32"),
    "shape of gate_up_proj": ("gate_up_proj", lambda w: w[:, 1:], "gate_up_proj is of shape"),
    "shape of down_proj": ("down_proj", lambda w: w[:, :, 1:], "down_proj is of shape"),
    "dtype of down_proj": ("down_proj", lambda w: w.half(), "down_proj is of dtype torch.float16"),
    "device of down_proj": ("down_proj", lambda w: w.to("meta"), "down_proj is on meta"),
    "tokens of indices": ("indices", lambda i: i[:1], "indices is of shape"),
    "dtype of indices": ("indices", lambda i: i.float(), "indices is of dtype torch.float32"),
    "values of indices": ("indices", lambda i: i + E, "indices is in"),
    "shape of weights": ("weights", lambda w: w[:, :1], "weights is of shape"),
    "dtype of weights": ("weights", lambda w: w.int(), "weights is of dtype torch.int32"),
    "activation": ("activation", lambda _: "silo", "activation is 'silo'"),
    "activation without a hash": ("activation", lambda _: ["silu"], "activation is \\['silu'\\]"),
    "path": ("path", lambda _: "fast", "path is 'fast'"),
    "workspace": ("workspace", lambda _: 0, "workspace is 0"),
    "true for one": ("workspace", lambda _: True, "workspace is True"),
    "one as a float": ("workspace", lambda _: 1.0, "workspace is 1.0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_differs_from_a_passed_call_is_refused(what):
    given = {**experts(), "activation": "silu", "path": "grouped", "workspace": 1}
    argument, change, message = WRONG[what]
    dk.expert_ffn(**given)
    for _ in range(2):  # nor is what was refused remembered
        with pytest.raises(ValueError, match=message):
            dk.expert_ffn(**{**given, argument: change(given[argument])})
    dk.expert_ffn(**given)


@pytest.mark.parametrize("top_k", [True, 1.0, "1", [1], None, torch.tensor(1), 0, 8])
def test_a_number_of_experts_that_equals_an_allowed_one(top_k):
    dk.route_top_k(LOGITS, 1)
    with pytest.raises(ValueError, match="top_k is"):
        dk.route_top_k(LOGITS, top_k)


@pytest.mark.parametrize(
    ("argument", "value"), [("num_zero_experts", True), ("num_zero_experts", 1.0), ("zero_share", True), ("weights", "one")]
)
def test_an_option_of_routing_that_equals_an_allowed_one(argument, value):
    dk.route_top_k(LOGITS, 1, num_zero_experts=1, zero_share=1)
    with pytest.raises(ValueError, match=f"{argument} is"):
        dk.route_top_k(LOGITS, 1, **{"num_zero_experts": 1, "zero_share": 1, argument: value})


def test_values_are_checked_in_every_call():
    given = experts()
    dk.expert_ffn(**given)
    given["indices"][0, 0] = E + 1
    with pytest.raises(ValueError, match=f"indices is in .* from 0 to {E}"):
        dk.expert_ffn(**given)
    logits = LOGITS.clone()
    dk.route_top_k(logits, 2)
    logits[0, 0] = float("nan")
    with pytest.raises(ValueError, match="router_logits holds NaN"):
        dk.route_top_k(logits, 2)


@WITH_TRITON
def test_slots_are_checked_once_a_signature_where_values_are_not_looked_at(monkeypatch):
    """As on a GPU; what they are launched with does not matter here."""
    monkeypatch.setattr(dk.dispatch, "_passed", _checks.Passed())
    calls = counted(monkeypatch, dk.dispatch, "_check_slots")
    weights, short = torch.ones(3, 2), SLOTS._replace(source=SLOTS.source[1:])
    with _backend.interpreted():
        monkeypatch.setattr(dk.dispatch, "has_values", lambda tensor: False)
        for _ in range(3):
            dk.scatter_tokens(TOKENS, SLOTS)
            dk.gather_tokens(ROWS, SLOTS, weights)
        assert len(calls) == 2
        for wrong, message in (
            (lambda: dk.scatter_tokens(TOKENS, short), "slots.source is of shape"),
            (lambda: dk.scatter_tokens(TOKENS.int(), SLOTS), "x is of dtype"),
            (lambda: dk.gather_tokens(ROWS, short, weights), "slots.source is of shape"),
            (lambda: dk.gather_tokens(ROWS[1:], SLOTS, weights), "ys is of shape"),
            (lambda: dk.gather_tokens(ROWS, SLOTS, weights, num_tokens=4), "num_tokens is 4"),
            (lambda: dk.gather_tokens(ROWS, SLOTS), "num_tokens is None"),
        ):
            with pytest.raises(ValueError, match=message):
                wrong()


def test_few_signatures_are_kept():
    passed = _checks.Passed()
    for n in range(3 * _backend.MOST_PLANS):
        passed.add((n,))
    assert len(passed.seen) <= _backend.MOST_PLANS
    assert (3 * _backend.MOST_PLANS - 1,) in passed
    assert ([],) not in passed


# --- launches, once a signature -------------------------------------------------------------------------------------------


class Compiled:
    """What a compiled kernel of Triton's offers: ``compiled[grid](*arguments)``."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append(("kept", grid, arguments, {}))


class Jitted:
    """What ``triton.jit`` makes, as far as a launch asks."""

    arg_names = ("x_ptr", "y_ptr", "n", "stride", "MODE", "BLOCK")

    def __init__(self, interpreted=False):
        self.calls, self.interpreted = [], interpreted

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls.append(("bound", grid, arguments, options))
            return None if self.interpreted else Compiled(self.calls)

        return run


@pytest.mark.skipif(torch.version.hip is not None, reason="nothing is kept there")
def test_a_launch_is_bound_once():
    kernel = Jitted()
    launch = Launch(kernel, (3, 2), (5, 1), {"BLOCK": 16, "MODE": "a"}, {"num_warps": 4}, keep=True)
    for x in "abc":
        launch(x, None)
    last = (5, 1, "a", 16)
    assert kernel.calls == [
        ("bound", (3, 2), ("a", None, *last), {"num_warps": 4}),
        ("kept", (3, 2, 1), ("b", None, *last), {}),
        ("kept", (3, 2, 1), ("c", None, *last), {}),
    ]


@pytest.mark.parametrize(("interpreted", "keep"), [(True, True), (False, False)])
def test_a_launch_is_bound_anew(interpreted, keep):
    kernel = Jitted(interpreted)
    launch = Launch(kernel, (1,), (5, 1), {"BLOCK": 16, "MODE": "a"}, keep=keep)
    launch("a", "b")
    launch("a", "b")
    assert [call[0] for call in kernel.calls] == ["bound", "bound"]


def test_aligned():
    x = torch.zeros(64)
    assert aligned(x, None, x[4:], torch.empty(0))
    assert not aligned(x, x[1:])


@WITH_TRITON
@INTERPRETED
def test_one_lookup_a_call():
    from dotmoe_kernels.experts.decode import gpu

    given = experts()
    gpu._plan.cache_clear()
    with _backend.interpreted(), torch.no_grad():
        expected = dk.expert_ffn(**given, path="decode")
        for hits in range(1, 4):
            assert torch.equal(dk.expert_ffn(**given, path="decode"), expected)
            assert gpu._plan.cache_info()[:2] == (hits, 1)
        other = {
            **given,
            "x": torch.stack([given["x"], given["x"]], -1)[..., 0],  # strides
            "gate_up_proj": given["gate_up_proj"].transpose(1, 2).contiguous().transpose(1, 2),
            "down_proj": given["down_proj"].contiguous(),
            "indices": given["indices"].int(),
            "weights": given["weights"].double(),
        }
        for misses, name in enumerate(other, 2):
            found = dk.expert_ffn(**{**given, name: other[name]}, path="decode")
            torch.testing.assert_close(found, expected)
            assert gpu._plan.cache_info().misses == misses, name
        shifted = torch.empty(T * H + 1)[1:].view(T, H).copy_(given["x"])  # not aligned to 16 bytes
        assert torch.equal(dk.expert_ffn(**{**given, "x": shifted}, path="decode"), expected)
        assert gpu._plan.cache_info().misses == misses + 1


@pytest.mark.gpu
def test_kept_launches_repeat_on_a_gpu():
    """The second call takes the kept kernels; a tensor that is not aligned to 16 bytes must not."""
    given = {name: tensor.cuda() for name, tensor in experts().items()}
    logits = LOGITS.cuda()
    for call, x in (
        (lambda x: dk.expert_ffn(**{**given, "x": x}, path="decode"), given["x"]),
        (lambda z: dk.route_top_k(z, 2), logits),
    ):
        first = tensors_of(call(x))
        shifted = torch.empty(x.numel() + 1, device="cuda")[1:].view(x.shape).copy_(x)
        for again in (x, x, shifted, x):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors_of(call(again)), first, strict=True))


EXPECTED = {
    "expert_ffn decode T=1": ["_decode_up_kernel", "_decode_down_kernel", "_decode_sum_kernel"],
    "route_top_k T=1": ["_route_top_k_kernel", "_route_finish_kernel"],
    "a model's router T=1": ["_route_top_k_kernel"],
    "sinkhorn 50 steps": [
        "_sinkhorn_first_step_kernel",
        *["_sinkhorn_step_kernel"] * 49,
        "_sinkhorn_plan_kernel",
        "_sinkhorn_error_kernel",
    ],
}


@WITH_TRITON
@pytest.mark.skipif(not (ROOT / "bench").exists(), reason="bench is not installed with the package")
def test_kept_launches_are_those_of_the_jit():
    """Through Triton itself, in a process of its own: its compiled kernels are handed what its JIT would hand them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.host_cost", "--json", *EXPECTED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["op"]: row for row in json.loads(done.stdout)["rows"]}
    assert {name: row["launches"] for name, row in rows.items()} == EXPECTED
    assert all(row["alike"] for row in rows.values())
    assert not any(row["bound"] for row in rows.values())
