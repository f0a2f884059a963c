"""One decode step of a converted model under transformers' static cache: one graph, the same values, few launches."""

import pytest
import torch
from tiny import E, K, sparse_model, tokens
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from dotmoe_kernels import _backend
from dotmoe_kernels.conversion import moe_blocks
from dotmoe_kernels.conversion.speeds import LAUNCHES
from dotmoe_kernels.models.block import DotMoeBlock

LENGTH, STEPS = 9, 3
WITH_TRITON = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


class Decode:
    """A model with a prompt in its cache; a call is a step."""

    def __init__(self, device="cpu", dtype=torch.float32, batch=1):
        self.model = sparse_model(dtype=dtype).eval().to(device)
        self.cache = StaticCache(config=self.model.config, max_cache_len=LENGTH + 8)
        self.prompt = tokens(batch, LENGTH).to(device)
        self.ids = self.prompt[:, :1].clone()
        self.fill()

    @torch.no_grad()
    def fill(self):
        self.cache.reset()
        self.model(input_ids=self.prompt, cache=self.cache, use_cache=True)

    @torch.no_grad()
    def __call__(self, run=None):
        return (run or self.step)(self.ids, self.cache)

    def step(self, ids, cache):
        return self.model(input_ids=ids, cache=cache, use_cache=True).logits

    def logits(self, run=None):
        """Of steps, each with the likeliest token of the one before it."""
        self.fill()
        self.ids.copy_(self.prompt[:, :1])
        found = []
        for _ in range(STEPS):
            found.append(self(run).clone())
            self.ids.copy_(found[-1][:, -1:].argmax(-1))
        return torch.cat(found, 1)


def operators(graphs):
    """How often each of ours is called, by name."""
    names = [str(n.target).removeprefix("dotmoe_kernels.") for g in graphs for n in g.graph.nodes if "dotmoe" in str(n.target)]
    return {name.split(".")[0]: names.count(name) for name in names}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("route", ["pytorch", pytest.param("kernels", marks=WITH_TRITON)])
def test_a_step_is_one_graph_with_the_values_of_the_model(route, batch):
    """ "kernels": the graph that a GPU gets, with its kernels interpreted where there is none."""
    decode, graphs = Decode(batch=batch), []
    expected = decode.logits()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    counters.clear()
    with _backend.interpreted(route == "kernels"):
        compiled = torch.compile(decode.step, fullgraph=True, backend=backend)
        torch.testing.assert_close(decode.logits(compiled), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == counters["stats"]["unique_graphs"] == 1  # the steps after the first need no other
    layers = len(moe_blocks(decode.model))
    found = operators(graphs)
    assert found.pop("expert_ffn") == layers
    assert found == ({"choose_top_k": layers} if route == "kernels" else {})
    for node in graphs[0].graph.nodes:
        tags = getattr(node.target, "tags", ())
        assert torch.Tag.data_dependent_output not in tags, node.target
        assert torch.Tag.dynamic_output_shape not in tags, node.target


# --- launches -----------------------------------------------------------------------------------------------------------


class Called(TorchDispatchMode):
    """The operators that compute something: not those that allocate or make a view."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        if not function.is_view and space != "prim" and name not in self.FREE:  # prim: which device is it on
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def block_of(dtype, num_zero_experts=0):
    torch.manual_seed(0)
    block = DotMoeBlock(E, K, 32, 16, "silu", num_zero_experts=num_zero_experts).to(dtype).requires_grad_(False).eval()
    block.reset_parameters(0.3)
    return block


def launches_of(call, monkeypatch):
    """How many kernels a call launches, interpreted."""
    from triton.runtime.interpreter import GridExecutor

    launched, run = [], GridExecutor.__call__

    def count(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(GridExecutor, "__call__", count)
        call()
    return launched


@WITH_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter launches; a test on a GPU asks its profiler")
@pytest.mark.parametrize("num_zero_experts", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 8])
def test_five_launches_a_layer_and_step(T, dtype, num_zero_experts, monkeypatch):
    """On fake tensors of a GPU: which operators run; interpreted on a CPU: how many kernels each of those launches."""
    block = block_of(dtype, num_zero_experts)
    x = torch.randn(T, 32).to(dtype)
    block.path = "decode"  # what a GPU picks
    with _backend.interpreted(), torch.no_grad():
        block(x)  # imports and decorates
        kernels = launches_of(lambda: block(x), monkeypatch)
    assert kernels == ["_route_top_k_kernel", "_decode_up_kernel", "_decode_down_kernel", "_decode_sum_kernel"]
    there = block_of(dtype, num_zero_experts)
    with torch.no_grad(), FakeTensorMode(), Called() as called:
        for module in there.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(made, requires_grad=False) if tensors is module._parameters else made
        given = torch.empty(T, 32, dtype=dtype, device="cuda")
        called.names.clear()
        y = there(given)
    assert (y.shape, y.dtype, y.device.type) == (given.shape, dtype, "cuda")
    assert called.names == ["mm", "choose_top_k", "decode_ffn"]
    assert 1 + len(kernels) == LAUNCHES["router"] + LAUNCHES["decode"] <= 5


# --- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_captures_whole(batch, dtype):
    decode = Decode("cuda", dtype, batch)
    expected = decode.logits()  # compiles
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        logits = decode()

    def replay(ids, cache):
        graph.replay()
        return logits

    torch.testing.assert_close(decode.logits(replay), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_compiles_into_one_cuda_graph(batch, dtype):
    decode = Decode("cuda", dtype, batch)
    expected = decode.logits()
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(decode.step, fullgraph=True, mode="reduce-overhead")

    def run(ids, cache):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(ids, cache)

    for _ in range(2):  # the first passes warm up and record
        found = decode.logits(run)
    error = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found[:, :1], expected[:, :1], rtol=error, atol=error)  # later tokens may differ where two are close
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 8])
def test_five_launches_by_the_profiler(T, dtype):
    block = block_of(dtype).cuda()
    x = torch.randn(T, 32, device="cuda").to(dtype)
    with torch.no_grad():
        block(x)  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            block(x)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= 5, kernels
