"""neuron_order: assignment -> the order in which the neurons are stored."""

import pytest
import torch
from checks import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from shapes import balanced_expert_of, dense_ffn, integer_capacities, normal

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels.permutation import dense_storage, has_dense_view


def test_small_example():
    assert dk.neuron_order(torch.tensor([2, 0, 1, 0, 2, 1])).tolist() == [1, 3, 2, 5, 0, 4]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("F", "E"), [(63, 7), (1000, 37), (296, 148), (16, 1)])
def test_sorted_by_expert_and_stable(F, E, device):
    expert_of = torch.arange(E).repeat_interleave(integer_capacities(F, E, seed=0))
    expert_of = expert_of[torch.randperm(F, generator=torch.Generator().manual_seed(1))].to(device)
    order = dk.neuron_order(expert_of)
    assert order.dtype == torch.int64
    assert order.tolist() == sorted(range(F), key=lambda i: (expert_of[i].item(), i))


@given(F=st.integers(0, 60), E=st.integers(1, 9), seed=st.integers(0, 999))
def test_the_inverse_restores_the_neurons(F, E, seed):
    expert_of = torch.randint(E, (F,), generator=torch.Generator().manual_seed(seed))
    order = dk.neuron_order(expert_of)
    assert order.sort().values.tolist() == list(range(F))
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(F))
    assert torch.equal(order[inverse], torch.arange(F))
    assert torch.equal(inverse[order], torch.arange(F))
    assert torch.equal(expert_of[order][inverse], expert_of)


def test_a_batch_equals_its_layers():
    expert_of = torch.stack([balanced_expert_of(24, 4, seed=s) for s in range(6)]).view(2, 3, 24)
    order = dk.neuron_order(expert_of)
    assert order.shape == (2, 3, 24)
    for i in range(2):
        for j in range(3):
            assert torch.equal(order[i, j], dk.neuron_order(expert_of[i, j]))


def test_any_strides():
    expert_of = torch.stack([balanced_expert_of(24, 4, seed=s) for s in range(3)])
    assert torch.equal(dk.neuron_order(expert_of.T.contiguous().T), dk.neuron_order(expert_of))


def test_no_neurons():
    assert dk.neuron_order(torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert dk.neuron_order(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


# --- weights to expert blocks and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("F", "E", "H"), [(24, 4, 5), (296, 148, 3), (16, 1, 8), (5, 5, 2)])
def test_blocks_are_the_dense_weights_in_order(F, E, H, dtype):
    gate, up, down = dense_ffn(F, H, seed=2, dtype=dtype)
    expert_of = balanced_expert_of(F, E, seed=3)
    order = dk.neuron_order(expert_of)
    gate_up_proj, down_proj = dk.pack_experts(gate, up, down, order, E)
    for e in range(E):
        mine = (expert_of == e).nonzero()[:, 0]
        assert torch.equal(gate_up_proj[e], torch.cat((gate[mine], up[mine])))
        assert torch.equal(down_proj[e], down[:, mine])
    expected = reference.expert_blocks(gate, up, down, order, E)
    assert torch.equal(gate_up_proj, expected[0])
    assert torch.equal(down_proj, expected[1])


def test_one_set_of_weights_serves_every_path():
    """In memory the blocks are the dense FFN too: a view, no copy."""
    F, E, H, T = 24, 4, 5, 7
    gate, up, down = dense_ffn(F, H, seed=4)
    order = dk.neuron_order(balanced_expert_of(F, E, seed=5))
    gate_up_proj, down_proj = dk.pack_experts(gate, up, down, order, E)
    assert gate_up_proj.is_contiguous()
    assert down_proj.transpose(1, 2).is_contiguous()
    x = normal(T, H, seed=6)
    gate_x, up_x = (x @ gate_up_proj.view(2 * F, H).T).view(T, E, 2, F // E).unbind(2)
    y = (torch.nn.functional.silu(gate_x) * up_x).reshape(T, F) @ down_proj.transpose(1, 2).view(F, H)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@given(E=st.integers(1, 6), s=st.integers(1, 6), H=st.integers(1, 5), seed=st.integers(0, 99))
def test_unpacking_restores_the_dense_weights(E, s, H, seed):
    weights = dense_ffn(E * s, H, seed=seed)
    order = dk.neuron_order(balanced_expert_of(E * s, E, seed=seed))
    blocks = dk.pack_experts(*weights, order, E)
    for down_proj in (blocks[1], blocks[1].contiguous()):
        restored = dk.unpack_experts(blocks[0], down_proj, order)
        assert all(torch.equal(a, b) for a, b in zip(restored, weights, strict=True))


def test_blocks_are_new_and_the_dense_weights_stay():
    weights = dense_ffn(12, 3, seed=7)
    before = [w.clone() for w in weights]
    for block in dk.pack_experts(*weights, torch.arange(12), 3):  # an order that moves nothing must not give views either
        block.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_experts_of_unequal_size_cannot_be_packed():
    with pytest.raises(ValueError, match=r"\b(num_experts|F)\b"):
        dk.pack_experts(*dense_ffn(10, 3, seed=8), torch.arange(10), 4)


# --- bad inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.tensor(3)], ids=["float", "rank 0"])
def test_bad_input(bad):
    with pytest.raises(ValueError, match=r"\bexpert_of\b"):
        dk.neuron_order(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_storage_is_the_dense_matrix_and_keeps_the_values(dtype):
    E, H, s = 3, 10, 8
    stock = torch.randn(E, H, s).to(dtype)
    assert not has_dense_view(stock)
    stored = dense_storage(stock)
    assert torch.equal(stored, stock)
    assert has_dense_view(stored)
    assert dense_storage(stored).data_ptr() == stored.data_ptr()
    x, indices = torch.randn(5, H).to(dtype), torch.randint(E, (5, 2))
    gate_up = (torch.randn(E, 2 * s, H) * 0.3).to(dtype)
    for path in ("masked", "grouped"):
        y, expected = (dk.expert_ffn(x, gate_up, down, indices, path=path) for down in (stored, stock))
        torch.testing.assert_close(y, expected)
