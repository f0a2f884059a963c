"""torch.compile(fullgraph=True) of every public op on CPU tensors, without Triton: values and gradients are those of the op."""

import pytest
import torch
from checks import SECOND, assert_no_wrong_second_derivative, value_and_gradients
from shapes import balanced_expert_of, dense_ffn, expert_weights, normal, routed_indices, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels.experts import operators as of_paths
from dotmoe_kernels.experts.grouped import operators

OUTPUTS = ("test_schema", "test_faketensor")
T, H, E, K, S = 6, 8, 4, 2, 4  # tokens, hidden, experts, experts a token, neurons an expert
INDICES = routed_indices(T, K, E, seed=0, empty=0.2)
SLOTS = dk.dispatch_tokens(INDICES, E)
EXPERT_OF = balanced_expert_of(E * S, E, seed=1)


def float32(*shape, seed):
    return normal(*shape, seed=seed, dtype=torch.float32)


def named(names, tensors):
    return dict(zip(names.split(), tensors, strict=True))


def dispatched(x, weights, indices):
    slots = dk.dispatch_tokens(indices, E)
    return dk.gather_tokens(2 * dk.scatter_tokens(x, slots), slots, weights)


LOGITS = {"logits": float32(T, E, seed=2)}
MASK = torch.tensor([True, True, False, True, True, False])
AFFINITY = {"affinity": float32(E * S, E, seed=3), "tau": torch.tensor(0.5)}
TOKENS = {"x": float32(T, H, seed=4)}
ROUTED = {"indices": INDICES, "weights": uniform(T, K, seed=5, dtype=torch.float32)}
MASKED = {
    **TOKENS,
    **named("gate_proj up_proj down_proj", dense_ffn(E * S, H, seed=6, dtype=torch.float32)),
    "plan": uniform(E * S, E, seed=8, dtype=torch.float32),
    "probs": uniform(T, E, seed=9, dtype=torch.float32),
}
EXPERTS = {**TOKENS, **named("gate_up_proj down_proj", expert_weights(E, S, H, seed=12, dtype=torch.float32)), **ROUTED}
UNWEIGHTED = {name: tensor for name, tensor in EXPERTS.items() if name != "weights"}
ROWS = float32(T * K, H, seed=13)
CASES = {
    "sinkhorn": (lambda affinity, tau: dk.sinkhorn(affinity, tau=tau, num_iters=4), AFFINITY),
    "sinkhorn, to a tolerance": (lambda affinity, tau: dk.sinkhorn(affinity, tau=tau, tol=0.1, final="column"), AFFINITY),
    "sinkhorn, implicit": (lambda affinity, tau: dk.sinkhorn(affinity, tau=tau, backward="implicit"), AFFINITY),
    "balanced_assignment": (lambda scores: scores.amax(1) * dk.balanced_assignment(scores), {"scores": AFFINITY["affinity"]}),
    "neuron_order": (lambda x: x * dk.neuron_order(EXPERT_OF), {"x": float32(E * S, seed=10)}),
    "straight_through": (lambda soft: dk.straight_through(torch.zeros_like(soft), soft), {"soft": MASKED["plan"]}),
    "route_top_k": (lambda logits: dk.route_top_k(logits, K, weights="renormalized")[1:], LOGITS),
    "route_top_k, masked": (lambda logits: dk.route_top_k(logits, K, weights="softmax", mask=MASK)[1:], LOGITS),
    "soft_top_k": (lambda logits, k: dk.soft_top_k(logits, k), {**LOGITS, "k": torch.tensor(1.5)}),
    "route_soft_top_k": (
        lambda logits: dk.route_soft_top_k(logits, 1.5, temperature=0.5, threshold=0.1, max_active=3, mask=MASK)[1:],
        LOGITS,
    ),
    "dispatch, scatter, gather": (dispatched, {**TOKENS, **ROUTED}),
    "gather without weights": (lambda ys: dk.gather_tokens(ys, SLOTS, num_tokens=T), {"ys": float32(T * K, H, seed=11)}),
    **{
        f"expert_ffn, {path}": (lambda path=path, **tensors: dk.expert_ffn(path=path, **tensors), EXPERTS)
        for path in ("grouped", "decode", "masked")
    },
    "expert_ffn without weights": (lambda **tensors: dk.expert_ffn(path="auto", activation="gelu", **tensors), UNWEIGHTED),
    "grouped_mm": (lambda a, b: dk.grouped_mm(a, b, SLOTS.offsets), {"a": ROWS, "b": EXPERTS["gate_up_proj"].transpose(1, 2)}),
    "masked_ffn": (lambda **tensors: dk.masked_ffn(expert_of=EXPERT_OF, indices=INDICES, **tensors), MASKED),
}


@pytest.mark.parametrize("name", CASES)
def test_compiles_into_one_graph(name):
    function, tensors = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (value_and_gradients(run, tensors) for run in (compiled, function))
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize(("path", "tokens"), [("grouped", T), ("decode", T), ("decode", 1), ("auto", 0)])
def test_experts_without_a_gradient(path, tokens):
    """A decode path with one would be the grouped one."""
    given = {name: t[:tokens] if name in ("x", "indices", "weights") else t for name, t in EXPERTS.items()}
    torch.compiler.reset()
    compiled = torch.compile(lambda **tensors: dk.expert_ffn(path=path, **tensors), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), dk.expert_ffn(path=path, **given), rtol=0, atol=0)
    if tokens == T:
        with pytest.raises(ValueError, match="indices is in"):  # the operator looks at the values that the graph has not
            compiled(**given | {"indices": INDICES + E})


@pytest.mark.parametrize("weighted", [True, False])
def test_the_operators_of_the_experts(weighted):
    given = EXPERTS if weighted else {**UNWEIGHTED, "weights": None}
    given = {n: t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for n, t in given.items()}
    torch.library.opcheck(of_paths.expert_ffn_op, (*given.values(), "silu", "grouped"))
    fixed = [t if t is None else t.detach() for t in given.values()]
    torch.library.opcheck(
        of_paths.expert_ffn_backward_op, (fixed[0], *fixed, "silu", [True, False, True, weighted]), test_utils=OUTPUTS
    )
    a, b = (t.clone().requires_grad_() for t in (ROWS, EXPERTS["gate_up_proj"].transpose(1, 2)))
    torch.library.opcheck(operators.grouped_mm_op, (a, b, SLOTS.offsets), test_utils=OUTPUTS)


@SECOND
def test_no_second_derivative_in_a_graph(how):
    def run(function):
        return lambda x: function(x, *list(EXPERTS.values())[1:])

    torch.compiler.reset()
    compiled = torch.compile(run(dk.expert_ffn), fullgraph=True, backend="eager")
    assert_no_wrong_second_derivative(compiled, run(reference.expert_ffn), EXPERTS["x"], how)
