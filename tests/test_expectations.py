"""What users of other libraries take for granted: numbers of NumPy, masks, torch.func, generation settings, export and NaN rows."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from shapes import balanced_expert_of, dense_ffn, expert_weights, normal, routed_indices
from tiny import dense_model, sparse_model, tokens
from torch.func import grad
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import dotmoe_kernels as dk
from dotmoe_kernels.alignment import AlignmentConfig
from dotmoe_kernels.alignment.losses import distillation_losses
from dotmoe_kernels.conversion import DotMoeConfig, register_experts
from dotmoe_kernels.conversion.finetuning import FinetuneConfig

A, Z = normal(12, 3, seed=0, dtype=torch.float32), normal(5, 6, seed=1, dtype=torch.float32)
X, (GATE_UP, DOWN) = normal(4, 8, seed=2, dtype=torch.float32), expert_weights(3, 4, 8, seed=3, dtype=torch.float32)
INDICES = routed_indices(4, 2, 3, seed=4)
SOFT = {"temperature": 0.5, "threshold": 0.1, "max_active": 3}
INTEGERS = {
    "num_iters": lambda v: dk.sinkhorn(A, num_iters=v),
    "top_k": lambda v: dk.route_top_k(Z, v).weights,
    "max_active": lambda v: dk.route_soft_top_k(Z, 1.5, **SOFT | {"max_active": v}).weights,
    "num_experts": lambda v: dk.dispatch_tokens(INDICES.clamp(max=0), v).token,
    "workspace": lambda v: dk.expert_ffn(X, GATE_UP, DOWN, INDICES, workspace=v),
}
NUMBERS = {
    "tau": lambda v: dk.sinkhorn(A, tau=v),
    "tol": lambda v: dk.sinkhorn(A, tol=v),
    "k": lambda v: dk.soft_top_k(Z, v),
    "temperature": lambda v: dk.soft_top_k(Z, 1.5, temperature=v),
    "threshold": lambda v: dk.route_soft_top_k(Z, 1.5, **SOFT | {"threshold": v / 2}).weights,
}


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_numbers_of_numpy(name):
    call = {**INTEGERS, **NUMBERS}[name]
    kinds = (np.int32, np.int64, np.uint8) if name in INTEGERS else (np.float32, np.float64, np.float16, np.int64)
    for kind in kinds:
        assert torch.equal(call(kind(1)), call(1))
    wrong = (True, 1.5, "1", np.bool_(True)) if name in INTEGERS else (float("nan"), np.float32("nan"))
    for value in wrong if name == "threshold" or name in INTEGERS else (*wrong, True, "1", np.bool_(True)):
        with pytest.raises(ValueError, match=f"{name} is"):
            call(value)


@pytest.mark.parametrize("config", [AlignmentConfig, FinetuneConfig])
def test_numbers_of_numpy_in_a_config(config):
    for field in dataclasses.fields(config):
        value = getattr(config(), field.name)
        if type(value) in (int, float):
            made = getattr(config(**{field.name: np.array(value)[()]}), field.name)
            assert type(made) is type(value)
            if field.name != "seed":
                for wrong in (True, float("nan")):
                    with pytest.raises(ValueError, match=f"{field.name} is"):
                        config(**{field.name: wrong})


def test_numbers_of_numpy_in_the_model_config():
    config = DotMoeConfig(num_experts=np.int64(8), top_k=np.int32(2))
    assert '"num_experts": 8' in config.to_json_string()


@pytest.mark.parametrize(
    "call",
    [
        lambda mask: dk.route_top_k(Z, 2, mask=mask),
        lambda mask: dk.route_soft_top_k(Z, 1.5, mask=mask, **SOFT),
        lambda mask: distillation_losses(Z[None], Z[None], torch.zeros(1, 5, dtype=torch.int64), mask[None]),
    ],
)
def test_only_a_mask_of_truth_values_is_one(call):
    valid = torch.tensor([True, True, False, True, True])
    for kind in (torch.int64, torch.int32, torch.uint8):
        for a, b in zip(call(valid), call(valid.to(kind)), strict=True):
            assert torch.equal(a, b)
    for mask in (torch.where(valid, 0.0, float("-inf")), valid.float(), 2 * valid.long(), valid.long() - 1):
        with pytest.raises(ValueError, match=r"mask is .*; allowed: bool, or integers 0 and 1"):
            call(mask)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: dk.sinkhorn(A * w).sum(),
        lambda w: dk.route_top_k(Z * w, 2).z_loss,
        lambda w: dk.soft_top_k(Z * w, 1.5).square().sum(),
        lambda w: dk.expert_ffn(X * w, GATE_UP, DOWN, INDICES).sum(),
        lambda w: dk.expert_ffn(X * w, GATE_UP, DOWN, INDICES, path="masked").sum(),
        lambda w: dk.masked_ffn(
            X * w, *dense_ffn(6, 8, seed=5, dtype=torch.float32), balanced_expert_of(6, 3, seed=6), INDICES
        ).sum(),
    ],
)
def test_torch_func_is_refused(call):
    with pytest.raises(ValueError, match=r"is inside a transform of torch\.func .*; allowed: torch\.autograd"):
        grad(call)(torch.ones(()))


def test_generation_settings_come_along(tmp_path):
    dense = dense_model()
    dense.generation_config = GenerationConfig(eos_token_id=[2, 5], do_sample=True, temperature=0.6, pad_token_id=0)
    sparse = dk.convert(dense, DotMoeConfig(num_experts=8, top_k=2), method="random")
    for step in range(2):  # once converted, once loaded
        assert sparse.backbone.generation_config is sparse.generation_config
        dk.save(sparse, tmp_path / f"sparse{step}")
        dk.export(tmp_path / f"sparse{step}", tmp_path / f"dense{step}")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"dense{step}").generation_config
        assert (found.eos_token_id, found.do_sample, found.temperature) == ([2, 5], True, 0.6)
        sparse = dk.load(tmp_path / f"sparse{step}")
    sparse.generation_config = GenerationConfig(eos_token_id=7)
    assert sparse.backbone.generation_config.eos_token_id == 7


def test_the_older_name_of_dtype(tmp_path):
    dk.save(sparse_model(), tmp_path / "m")
    assert dk.load(tmp_path / "m").dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        assert dk.load(tmp_path / "m", **{name: torch.bfloat16}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch_dtype is .* beside dtype"):
        dk.load(tmp_path / "m", dtype=torch.float32, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_the_signature_is_the_backbones_and_embeddings_generate(kind):
    model = sparse_model(kind)
    assert inspect.signature(model.forward) == inspect.signature(model.backbone.forward)
    embedded = model.get_input_embeddings()(tokens())
    made = model.generate(inputs_embeds=embedded, max_new_tokens=3, do_sample=False)
    if kind == "llama":
        assert torch.equal(made, model.generate(tokens(), max_new_tokens=3, do_sample=False)[:, -made.shape[1] :])


def exported(model):
    dynamic = {"input_ids": {1: torch.export.Dim("n", max=60)}, "use_cache": None}
    given = {"input_ids": tokens(), "use_cache": False}
    return torch.export.export(model, (), given, dynamic_shapes=dynamic).module()


def stock():
    register_experts()
    small = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    more = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **small, **more)).eval()
    model.set_experts_implementation("dotmoe")
    return model


@pytest.mark.parametrize("make", [sparse_model, stock])
def test_a_first_call_may_be_export_or_compile(make):
    with torch.no_grad():
        model = make()
        graph, longer = exported(model), tokens(2, 31)
        torch.testing.assert_close(graph(input_ids=longer, use_cache=False).logits, model(longer).logits)
        model = make()
        torch.compiler.reset()
        logits = torch.compile(model, fullgraph=True, backend="eager")(longer, use_cache=False).logits
        torch.testing.assert_close(logits, model(longer).logits)


def test_a_nan_row_stays_one():
    model, dense = sparse_model(), dense_model()
    embedded = dense.get_input_embeddings()(tokens()).detach().clone()
    embedded[0, 3] = float("nan")
    with torch.no_grad():
        lost, found = (m(inputs_embeds=embedded, use_cache=False).logits.isnan().any(-1) for m in (dense, model))
    assert torch.equal(lost, found)
    assert not found[1].any()
    with pytest.raises(ValueError, match="router_logits holds NaN"):
        dk.route_top_k(torch.full((1, 3), float("nan")), 1)


@pytest.mark.parametrize("strict", [True, False])
def test_export_leaves_the_length_open(strict):
    """A strict export traces what errors would say as well: words with a length in them made it a constant."""

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    wrapped, x = Logits(sparse_model().eval()), tokens()
    program = torch.export.export(wrapped, (x,), dynamic_shapes={"ids": {1: torch.export.Dim("n", max=60)}}, strict=strict)
    longer = torch.cat((x, x, x), 1)
    torch.testing.assert_close(program.module()(longer), wrapped(longer))
