"""Stock MoE models on expert_ffn: every experts class of transformers is served as its own forward computes, or refused."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.models
from checks import error
from shapes import normal, routed_indices, uniform
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dotmoe_kernels import experts
from dotmoe_kernels.conversion import register_experts
from dotmoe_kernels.models import registry

H, S, E, K, V = 32, 16, 8, 3, 64
SMALL = {
    "hidden_size": H,
    "intermediate_size": S,
    "moe_intermediate_size": S,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MODELS = {
    "mixtral": {"num_local_experts": E},
    "qwen2_moe": {"num_experts": E, "shared_expert_intermediate_size": S, "norm_topk_prob": True},
    "qwen3_moe": {"num_experts": E, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": E},
    "deepseek_v3": {
        "n_routed_experts": E,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "granitemoe": {"num_local_experts": E},
}


@pytest.fixture(autouse=True)
def _registered():
    register_experts()


def stock(kind, *, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | MODELS.get(kind, {}) | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model


def ids():
    return torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model, implementation):
    """Logits, and the gradients to the embeddings and every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
    out = model(inputs_embeds=embedded, labels=ids(), use_cache=False)
    out.loss.backward()
    results = {"logits": out.logits.detach(), "inputs": embedded.grad}
    return results | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def served(monkeypatch):
    """Counts the calls of expert_ffn."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return experts.expert_ffn(*arguments, **options)

    monkeypatch.setattr(registry, "expert_ffn", counted)
    return calls


@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_eager(kind, monkeypatch):
    model = stock(kind, dtype=torch.float64)
    expected = logits_and_gradients(model, "eager")
    calls = served(monkeypatch)
    found = logits_and_gradients(model, "dotmoe")
    assert len(calls) == (1 if kind == "deepseek_v3" else 2)
    assert found.keys() == expected.keys()
    assert any("experts.gate_up_proj" in n for n in found)
    assert any(re.search(r"\.(gate|router)(\.\w+)?\.weight$", n) for n in found)
    for name, value in found.items():
        assert error(value, expected[name]) < 1e-10, name
        assert value.count_nonzero() > 0, name


@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_eager_in_float32(kind):
    """Both errors against float64: at most twice that of eager."""
    exact = logits_and_gradients(stock(kind, dtype=torch.float64), "eager")
    model = stock(kind).double().float()
    model.load_state_dict(stock(kind, dtype=torch.float64).state_dict())
    expected, found = (logits_and_gradients(model, name) for name in ("eager", "dotmoe"))
    for name, value in found.items():
        assert error(value, exact[name]) <= 2 * error(expected[name], exact[name]) + 2e-6, name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_autocast(kind):
    model = stock(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (logits_and_gradients(model, name) for name in ("eager", "dotmoe"))
    exact = logits_and_gradients(model, "eager")

    def distance(values, name):  # of the whole tensor: its worst entry moves with the order of sums in 16 bits
        return float((values[name].double() - exact[name].double()).norm() / exact[name].double().norm())

    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert distance(found, name) <= 2 * distance(expected, name) + 2**-7, name


def test_generate():
    model = stock("qwen3_moe")
    prompt, generated = ids(), []
    for name in ("eager", "dotmoe"):
        model.set_experts_implementation(name)
        generated.append(model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert torch.equal(*generated)


def test_frozen_experts_train_the_router():
    model = stock("mixtral", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    expected, found = (logits_and_gradients(model, name) for name in ("eager", "dotmoe"))
    assert found.keys() == expected.keys()
    assert any(n.endswith("gate.weight") for n in found)
    assert all(error(found[n], expected[n]) < 1e-10 for n in found)


# --- the experts alone ------------------------------------------------------------------------------------------------


class Config:
    """What the constructors of experts read."""

    _experts_implementation = "dotmoe"
    hidden_act = hidden_activation = mlp_hidden_act = "silu"
    moe_latent_size = None

    def __getattr__(self, name):
        sizes = (("inter", 12), ("expert", 6), ("hidden", 8), ("limit", 1.5), ("alpha", 1.5), ("eps", 1e-6))
        if name.startswith("__"):
            raise AttributeError(name)
        return next((size for part, size in sizes if part in name), None)


def experts_classes():
    found = []
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation[^\n]*\nclass (\w+)", file.read_text()):
            found.append((f"transformers.models.{file.parent.name}.{file.stem}", name))
    return found


def make(module, name):
    torch.manual_seed(0)
    made = getattr(importlib.import_module(module), name)(Config()).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def routed(made, empty=0.2):
    T, num = 7, made.num_experts
    return normal(T, 8, seed=1), routed_indices(T, K, num, seed=2, empty=empty), uniform(T, K, seed=3)


def test_every_experts_class_is_served_right_or_refused():
    results = {"equal": [], "refused": []}
    for module, name in experts_classes():
        made = make(module, name)
        arguments = routed(made)
        try:
            found = made(*arguments)
        except ValueError as refusal:
            assert name in str(refusal)  # noqa: PT017
            assert "allowed" in str(refusal)  # noqa: PT017
            results["refused"].append(name)
            continue
        assert error(found, type(made).forward.__wrapped__(made, *arguments)) < 1e-12, name
        results["equal"].append(name)
    assert {"MixtralExperts", "AriaExperts", "DeepseekV3Experts", "GraniteMoeExperts"} <= set(results["equal"])
    assert {"GptOssExperts", "DeepseekV4Experts", "MuseSparkExperts", "NemotronHExperts"} <= set(results["refused"])


def mixtral_experts():
    return make("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")


def test_empty_slots_of_expert_parallelism():
    """Ids of num_experts give nothing, whatever their weight, and take no gradient."""
    made = mixtral_experts()
    made._is_expert_parallel = True
    x, indices, weights = routed(made, empty=0.5)
    assert bool((indices == made.num_experts).any())
    weights.requires_grad_()
    y = registry.dotmoe_experts_forward(made, x, indices, weights)
    y.sum().backward()
    there = indices < made.num_experts
    expected = registry.dotmoe_experts_forward(made, x, torch.where(there, indices, 0), torch.where(there, weights.detach(), 0))
    assert error(y, expected) < 1e-12
    assert weights.grad[~there].count_nonzero() == 0
    assert weights.grad[there].count_nonzero() == there.sum()
    nowhere = torch.full_like(indices, made.num_experts)
    assert registry.dotmoe_experts_forward(made, x, nowhere, weights).count_nonzero() == 0


def test_autocast_gives_the_dtype_of_the_hidden_states():
    made = mixtral_experts().float()
    x, indices, weights = routed(made)
    exact = made(x.float(), indices, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x.float(), indices, weights)
    assert y.dtype == torch.float32
    assert 1e-5 < error(y, exact) < 2e-2


def test_transposed_weights_and_their_gradients():
    made = make("transformers.models.aria.modeling_aria", "AriaExperts")
    arguments = routed(made)
    gradients = []
    for forward in (type(made).forward.__wrapped__, registry.dotmoe_experts_forward):
        made.zero_grad()
        forward(made, *arguments).square().sum().backward()
        gradients.append([p.grad.clone() for p in made.parameters()])
    assert all(error(a, b) < 1e-12 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2"])
def test_the_activation_is_that_of_the_module_not_of_the_config(act):
    made = mixtral_experts()
    made.act_fn = transformers.activations.ACT2FN[act]  # its config still says silu
    arguments = routed(made)
    assert error(made(*arguments), type(made).forward.__wrapped__(made, *arguments)) < 1e-12


class _Scaled(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x) * 1.01


class _Learned(nn.PReLU):
    pass


def _with(**attributes):
    def change(made):
        for name, value in attributes.items():
            setattr(made, name, value)

    return change


def _own_gate(made):
    made._apply_gate = lambda gate_up: gate_up[..., ::2] * gate_up[..., 1::2]


def _quantised(made):
    made.down_proj = nn.Parameter(made.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(has_bias=True), "MixtralExperts has biases"),
        (_with(down_proj_bias=nn.Parameter(torch.zeros(6, 8))), "MixtralExperts has biases"),
        (_with(has_gate=False), "MixtralExperts has no gate"),
        (_with(is_concatenated=False), "MixtralExperts has gate and up rows interleaved"),
        (_with(has_post_expert_norm=True), "MixtralExperts has a norm after each expert"),
        (_own_gate, "MixtralExperts has an _apply_gate of their own"),
        (_with(act_fn=_Scaled()), "MixtralExperts has the activation _Scaled"),
        (_with(act_fn=_Learned()), "MixtralExperts has the activation _Learned"),
        (_with(act_fn=transformers.activations.ACT2FN["mish"]), "MixtralExperts has the activation 'mish'"),
        (_quantised, "MixtralExperts has a quantised down_proj of dtype torch.float8_e4m3fn"),
    ],
)
def test_refused(change, message):
    made = mixtral_experts()
    change(made)
    with pytest.raises(ValueError, match=re.escape(message)):
        made(*routed(made))


def test_a_model_that_is_refused():
    model = stock("gpt_oss", num_local_experts=E, layer_types=["full_attention"] * 2)
    model.set_experts_implementation("dotmoe")
    with pytest.raises(ValueError, match="GptOssExperts has biases"):
        model(ids())
    model.set_experts_implementation("eager")
    assert torch.isfinite(model(ids()).logits).all()


# --- registering ------------------------------------------------------------------------------------------------------


def test_idempotent_and_undone_by_setting_back():
    assert register_experts() == register_experts() == "dotmoe"
    assert ALL_EXPERTS_FUNCTIONS["dotmoe"] is registry.dotmoe_experts_forward
    model = stock("mixtral")
    before = model(ids()).logits
    model.set_experts_implementation("dotmoe")
    model.set_experts_implementation("eager")
    assert torch.equal(model(ids()).logits, before)


def test_a_taken_name_is_refused(monkeypatch):
    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "dotmoe", print)
    with pytest.raises(ValueError, match="already"):
        register_experts()


def test_nothing_is_registered_by_an_import():
    code = (
        "import dotmoe_kernels.models.registry as r;"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as a;"
        "assert 'dotmoe' not in a; r.register_experts(); assert 'dotmoe' in a"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
