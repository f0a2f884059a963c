"""The chunked KL and CE against the whole logits with gradients, what it allocates and keeps, and finding a model's head."""

import math
from types import SimpleNamespace

import pytest
import torch
from checks import DEVICES, FLOOR, SECOND, assert_no_wrong_second_derivative, error
from shapes import generator, normal
from tiny import BACKBONES, dense_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dotmoe_kernels import reference
from dotmoe_kernels.alignment.chunked import chunk_rows, chunked_distillation
from dotmoe_kernels.alignment.head import Head, find_head
from dotmoe_kernels.alignment.losses import distillation_losses

B, N, H, V = 3, 7, 12, 33
WEIGHTS = {"kl_weight": 2.0, "ce_weight": 0.7}
HEADS = {"plain": (False, 1.0, None), "bias and scale": (True, 0.3, None), "cap": (True, 1.5, 2.0)}


def make_head(kind="plain", dtype=torch.float64, H=H, V=V):
    bias, scale, cap = HEADS[kind]
    weight = normal(V, H, seed=1, scale=0.7, dtype=dtype)
    return Head(nn.Identity(), weight, normal(V, seed=2, dtype=dtype) if bias else None, scale, cap)


def states(dtype=torch.float64, B=B, N=N, H=H):
    """(teacher, hidden): [B, N, H], the student near the teacher."""
    teacher = normal(B, N, H, seed=3)
    return teacher.to(dtype), (teacher + normal(B, N, H, seed=4, scale=0.3)).to(dtype)


def token_ids(B=B, N=N, V=V):
    return torch.randint(0, V, (B, N), generator=generator(5))


MASKS = {
    "no mask": None,
    "mask": torch.rand(B, N, generator=generator(6)) > 0.3,
    "nothing valid": torch.zeros(B, N, dtype=torch.bool),
    "one valid": torch.arange(B * N).view(B, N) == 4,
}


def whole_logits(hidden, head):
    """The formula of ``Head`` in plain PyTorch."""
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * head.scale
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def whole(teacher, hidden, head, labels, mask=None, losses=reference.distillation_losses):
    kl, ce = losses(whole_logits(teacher, head), whole_logits(hidden, head), labels, mask)
    return WEIGHTS["kl_weight"] * kl + WEIGHTS["ce_weight"] * ce, kl, ce


def with_gradient(function, hidden, factor=1.5):
    leaf = hidden.detach().clone().requires_grad_()
    total, kl, ce = function(leaf)
    (gradient,) = torch.autograd.grad(factor * total, leaf)
    return {"total": total, "kl": kl, "ce": ce, "gradient": gradient}


# --- the chunked loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, 100, None])
def test_values_and_gradient_are_those_of_the_whole_logits(kind, mask, chunk):
    head, (teacher, hidden), labels = make_head(kind), states(), token_ids()
    found = with_gradient(lambda x: chunked_distillation(teacher, x, head, labels, mask, chunk=chunk, **WEIGHTS), hidden)
    expected = with_gradient(lambda x: whole(teacher, x, head, labels, mask), hidden)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_less_accurate_than_the_whole_logits(device, kind, dtype):
    B, N, H, V = 4, 40, 64, 500
    head = make_head(kind, dtype, H, V)
    head = head._replace(weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
    teacher, hidden, labels = (t.to(device) for t in (*states(dtype, B, N, H), token_ids(B, N, V)))
    head64 = head._replace(weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
    exact = with_gradient(lambda x: whole(teacher.double(), x, head64, labels), hidden.double())
    plain = with_gradient(lambda x: whole(teacher, x, head, labels, losses=distillation_losses), hidden)
    found = with_gradient(lambda x: chunked_distillation(teacher, x, head, labels, chunk=48, **WEIGHTS), hidden)
    assert found["gradient"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in ("total", "kl", "ce"))
    for name, value in exact.items():
        allowed = 2 * error(plain[name], value) + FLOOR[dtype]
        assert error(found[name], value) <= allowed, f"{name}: {error(found[name], value):.2g}, allowed {allowed:.2g}"


def test_a_16_bit_gradient_of_many_tokens_does_not_vanish():
    """1 / T of 16384 tokens would push every small entry of dz below the smallest number of float16."""
    B, N, H, V = 8, 2048, 8, 16
    head, (teacher, hidden), labels = make_head("plain", torch.float16, H, V), states(torch.float16, B, N, H), token_ids(B, N, V)
    head = head._replace(weight=head.weight / 64)
    found = with_gradient(lambda x: chunked_distillation(teacher, x, head, labels, **WEIGHTS), hidden, factor=2.0**20)
    head64 = head._replace(weight=head.weight.double())
    exact = with_gradient(lambda x: whole(teacher.double(), x, head64, labels), hidden.double(), factor=2.0**20)
    assert error(found["gradient"], exact["gradient"]) < 2e-3


@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck(kind):
    head, (teacher, hidden), labels = make_head(kind), states(), token_ids()

    def total(x):
        return chunked_distillation(teacher, x, head, labels, MASKS["mask"], chunk=5, **WEIGHTS)[0]

    assert torch.autograd.gradcheck(total, hidden.requires_grad_())


@SECOND
def test_second_derivative(how):
    head, (teacher, hidden), labels = make_head(), states(), token_ids()
    assert_no_wrong_second_derivative(
        lambda x: chunked_distillation(teacher, x, head, labels, chunk=5, **WEIGHTS)[0],
        lambda x: whole(teacher, x, head, labels)[0],
        hidden,
        how,
    )


def test_only_the_sum_has_a_gradient():
    head, (teacher, hidden), labels = make_head(), states(), token_ids()
    total, kl, ce = chunked_distillation(teacher, hidden.requires_grad_(), head, labels, **WEIGHTS)
    assert total.requires_grad
    assert not kl.requires_grad
    assert not ce.requires_grad
    with torch.no_grad():
        again = chunked_distillation(teacher, hidden, head, labels, **WEIGHTS)
    assert [v.item() for v in again] == [total.item(), kl.item(), ce.item()]


def test_a_teacher_with_a_gradient_gets_none():
    head, (teacher, hidden), labels = make_head(), states(), token_ids()
    teacher.requires_grad_()
    total, _, _ = chunked_distillation(teacher, hidden.requires_grad_(), head, labels)
    total.backward()
    assert teacher.grad is None
    assert hidden.grad.any()


def test_a_second_backward_pass_gives_the_same():
    head, (teacher, hidden), labels = make_head(), states(), token_ids()
    total, _, _ = chunked_distillation(teacher, hidden.requires_grad_(), head, labels)
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])


def test_one_token_a_sequence_has_no_target():
    head, (teacher, hidden), labels = make_head(), states(N=1), token_ids(N=1)
    found = with_gradient(lambda x: chunked_distillation(teacher, x, head, labels, **WEIGHTS), hidden)
    expected = with_gradient(lambda x: whole(teacher, x, head, labels), hidden)
    assert float(found["ce"]) == 0
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=1e-12, atol=1e-14)


def test_padding_may_hold_anything():
    head, (teacher, hidden), labels, mask = make_head(), states(), token_ids(), MASKS["mask"]
    clean = with_gradient(lambda x: chunked_distillation(teacher, x, head, labels, mask, **WEIGHTS), hidden)
    for tensor, value in ((teacher, math.nan), (hidden, math.inf)):
        tensor[~mask] = value
    found = with_gradient(lambda x: chunked_distillation(teacher, x, head, labels, mask, **WEIGHTS), hidden)
    for name, value in clean.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_nan_in_a_valid_token_reaches_the_loss(which):
    head, (teacher, hidden), labels = make_head(), states(), token_ids()
    (teacher if which == "teacher" else hidden)[1, 2, 3] = math.nan
    total, kl, _ = chunked_distillation(teacher, hidden, head, labels)
    assert math.isnan(total)
    assert math.isnan(kl)


class Largest(TorchDispatchMode):
    """Of the outputs of all operators: the most rows of a matrix of vocabulary width, and how many were seen."""

    def __init__(self, V):
        super().__init__()
        self.V, self.rows, self.count = V, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.V:
                self.rows, self.count = max(self.rows, tensor.numel() // self.V), self.count + 1
        return out


def test_logits_are_never_whole():
    B, N, H, V = 4, 50, 12, 301
    head, (teacher, hidden), labels = make_head("cap", torch.float32, H, V), states(torch.float32, B, N, H), token_ids(B, N, V)
    kept = []
    with Largest(V) as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        total, _, _ = chunked_distillation(teacher, hidden.requires_grad_(), head, labels, chunk=16)
        total.backward()
    assert seen.count >= 2 * math.ceil(B * N / 16)  # the mode did see the logits
    assert seen.rows == 16
    assert kept
    assert all(V not in shape for shape in kept), kept


def test_chunks_hold_a_budget_and_at_least_some_rows():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows(2048, cpu) * 2048 * 4 == 1 << 20
    assert chunk_rows(151936, cpu) == 64  # a chunk reads the whole head
    assert chunk_rows(151936, cuda) * 151936 * 4 <= 1 << 28 < (chunk_rows(151936, cuda) + 1) * 151936 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(B, N)}, r"hidden is of shape \[3, 7\]; allowed: shape \[B, N, H\]"),
        ({"hidden": torch.zeros(B, N, 5)}, r"hidden is of shape \[3, 7, 5\]; allowed: \[B, N, H\] = \[3, 7, 12\]"),
        ({"hidden": torch.zeros(B, N, H).double()}, "hidden is of dtype torch.float64; allowed: the dtype of head.weight"),
        ({"teacher": torch.zeros(B, 6, H)}, r"teacher is of shape \[3, 6, 12\]; allowed: \[B, N, H\] = \[3, 7, 12\]"),
        ({"teacher": torch.zeros(B, N, H, dtype=torch.int64)}, "teacher is of dtype torch.int64; allowed: float64"),
        ({"labels": torch.zeros(B, 6, dtype=torch.int64)}, r"labels is of shape \[3, 6\]; allowed: \[B, N\] = \[3, 7\]"),
        ({"labels": torch.zeros(B, N)}, "labels is of dtype torch.float32; allowed: int64 or int32"),
        ({"labels": torch.full((B, N), V)}, r"labels is in \[33, 33\]; allowed: entries from 0 to 32"),
        ({"mask": torch.ones(B, 6)}, r"mask is of shape \[3, 6\]; allowed: \[B, N\] = \[3, 7\]"),
        ({"chunk": 0}, "chunk is 0; allowed: an integer of at least 1"),
    ],
    ids=["rank", "width", "dtype", "teacher", "integers", "labels", "label dtype", "no token", "mask", "chunk"],
)
def test_bad_arguments(change, message):
    given = {"teacher": torch.zeros(B, N, H), "hidden": torch.zeros(B, N, H), "labels": token_ids()} | change
    with pytest.raises(ValueError, match=message):
        chunked_distillation(head=make_head(dtype=torch.float32), **given)


# --- finding the head -----------------------------------------------------------------------------------------------------

FIELDS = {
    "gemma2": {"final_logit_softcapping": 0.7},
    "gemma3_text": {"final_logit_softcapping": 0.7},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.4},
}
EXPECTED = {"gemma2": (1.0, 0.7), "gemma3_text": (1.0, 0.7), "granite": (1 / 3, None), "cohere": (0.4, None)}


def head_of(model, seed=0):
    return find_head(model, torch.randint(0, 64, (2, 5), generator=generator(seed)))


@pytest.mark.parametrize("kind", [*BACKBONES, "cohere", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_of_a_transformers_model(kind, dtype):
    model = dense_model(kind, dtype=dtype, **FIELDS.get(kind, {}))
    if kind == "phi":
        nn.init.normal_(model.lm_head.bias)
    head = head_of(model)
    assert head is not None
    assert (head.scale, head.cap) == EXPECTED.get(kind, (1.0, None))
    assert (head.bias is not None) == (kind == "phi")
    ids = torch.randint(0, 64, (2, 9), generator=generator(1))  # other tokens than it was found on
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        logits = head.logits(head.hidden(ids))
    assert error(logits, expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_cap_that_the_config_does_not_apply_is_not_applied():
    model = dense_model("llama")
    model.config.final_logit_softcapping, model.config.logit_scale = 0.5, 3.0
    head = head_of(model)
    assert (head.scale, head.cap) == (1.0, None)


class Model(nn.Module):
    """A causal LM of an embedding and a head, whose logits are what ``finish`` makes of the head's."""

    def __init__(self, finish=lambda z: z, **config):
        super().__init__()
        self.embedding, self.lm_head, self.finish = nn.Embedding(64, 8), nn.Linear(8, 64), finish
        self.config = SimpleNamespace(**config)

    def base_model(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.finish(self.lm_head(self.embedding(input_ids))))


def test_scale_and_cap_together():
    head = head_of(Model(lambda z: 0.5 * torch.tanh(z / 4 / 0.5), logits_scaling=4.0, final_logit_softcapping=0.5))
    assert (head.scale, head.cap) == (0.25, 0.5)


@pytest.mark.parametrize(
    "finish",
    [torch.sin, lambda z: z / 4, lambda z: z[..., :-1], lambda z: z.clone().index_fill(-1, torch.tensor([3]), -1e4)],
    ids=["a function", "a scale that no field names", "fewer logits", "a banned token"],
)
def test_other_logits_are_no_known_heads(finish):
    assert head_of(Model(finish, logits_scaling=3.0)) is None


@pytest.mark.parametrize("what", ["no backbone", "no embeddings", "the backbone is the model", "other arguments", "meta", "packed"])
def test_a_model_in_other_parts(what):
    class Other(Model):
        base_model = {"no backbone": None}.get(what, Model.base_model)
        get_output_embeddings = (lambda self: None) if what == "no embeddings" else Model.get_output_embeddings

    model = Other()
    if what == "the backbone is the model":
        Other.base_model = property(lambda self: self)
    elif what == "other arguments":
        Other.base_model = lambda self, ids: SimpleNamespace(last_hidden_state=self.embedding(ids))
        Other.forward = lambda self, input_ids, use_cache: SimpleNamespace(logits=self.lm_head(self.embedding(input_ids)))
    elif what in ("meta", "packed"):
        weight = model.lm_head.weight
        model.lm_head.forward = lambda h: h @ weight.T  # as a hook that loads or unpacks it would
        other = weight.detach().to("meta") if what == "meta" else weight.detach().to(torch.int8)
        model.lm_head.weight = nn.Parameter(other, requires_grad=False)
    assert head_of(model) is None


def test_a_head_is_frozen():
    head = head_of(dense_model("llama"))
    assert not head.weight.requires_grad
