"""Config and surgery: which FFNs are recognised, which models and topologies are refused, and how the refusal reads."""

import json

import pytest
import torch
from tiny import E, F, H, K, V, dense_model, random_layers, sparse_model, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, find_ffns, materialize, self_check, swap_ffn

# --- config ----------------------------------------------------------------------------------------------------------------


def test_config_round_trip():
    config = DotMoeConfig(num_experts=4, top_k=2, dense_config=LlamaConfig(hidden_size=64, intermediate_size=64))
    assert (config.num_experts_per_tok, config.top_k, config.moe_intermediate_size) == (2, 2, 16)
    assert (config.hidden_size, config.vocab_size, config.dense_width) == (64, 32000, 64)
    again = DotMoeConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert type(again.dense_config) is LlamaConfig
    assert again.get_text_config(decoder=True) is again.dense_config


def test_config_sets_the_dense_attribute():
    config = DotMoeConfig(dense_config=LlamaConfig(intermediate_size=128))
    config.use_cache = False
    config.top_k = 3
    assert config.dense_config.use_cache is False
    assert config.num_experts_per_tok == 3
    with pytest.raises(AttributeError, match="no_such_field"):
        config.no_such_field  # noqa: B018


def test_config_for_dense():
    llama2 = LlamaConfig(hidden_size=4096, intermediate_size=11008)
    config = DotMoeConfig.for_dense(llama2, expert_size=128, active_fraction=0.25)
    assert (config.num_experts, config.top_k) == (86, 22), "21.5 rounds up"
    assert DotMoeConfig.for_dense(LlamaConfig(intermediate_size=12800), active_fraction=0.28).top_k == 28
    assert DotMoeConfig.for_dense(llama2, num_experts=32, top_k=8).moe_intermediate_size == 344


BAD_CONFIGS = {
    "num_experts": ({"num_experts": 0}, r"num_experts is 0; allowed: an integer of at least 1"),
    "bool": ({"num_experts": True}, r"num_experts is True"),
    "top_k_low": ({"top_k": 0}, r"top_k is 0; allowed: an integer from 1 to num_experts = 16"),
    "top_k_high": ({"top_k": 17}, r"top_k is 17; allowed"),
    "top_k_fraction": ({"top_k": 2.5}, r"top_k is 2.5; allowed: an integer"),
    "router": ({"router": "hard"}, r"router is 'hard'; allowed: top_k \| soft"),
    "version": ({"format_version": 99}, r"format_version is 99; allowed: at most 3"),
    "divisor": ({"num_experts": 7, "dense_config": LlamaConfig(intermediate_size=64)}, r"num_experts is 7.*F = 64, such as 8"),
    "expert_size": (
        {"num_experts": 8, "moe_intermediate_size": 4, "dense_config": LlamaConfig(intermediate_size=64)},
        r"moe_intermediate_size is 4; allowed: F / num_experts = 8",
    ),
    "nested": ({"dense_config": DotMoeConfig(dense_config=LlamaConfig(intermediate_size=128))}, r"dense_config is of type dotmoe"),
    "dense_type": ({"dense_config": {"model_type": "nonsense"}}, r"nonsense"),
}


@pytest.mark.filterwarnings("ignore:num_experts")
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case):
    fields, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        DotMoeConfig(**fields)


def test_bad_for_dense():
    dense = LlamaConfig(intermediate_size=11008)
    with pytest.raises(ValueError, match=r"expert_size is 100; allowed: a divisor of F = 11008, such as"):
        DotMoeConfig.for_dense(dense, expert_size=100)
    with pytest.raises(ValueError, match=r"active_fraction is 1.5; allowed"):
        DotMoeConfig.for_dense(dense, active_fraction=1.5)
    with pytest.raises(ValueError, match="expert_size is 128; allowed: None when num_experts"):
        DotMoeConfig.for_dense(dense, expert_size=128, num_experts=4)


def test_narrow_experts_warn_with_the_next_fitting_topology():
    with pytest.warns(UserWarning, match=r"num_experts = 16 gives experts of s = 4 neurons.*num_experts = 8 \(s = 8\) fits"):
        DotMoeConfig(num_experts=16, dense_config=LlamaConfig(intermediate_size=64))


# --- what is refused -------------------------------------------------------------------------------------------------------


def test_refuses_sparse_models():
    for kind in ("mixtral", "qwen3_moe"):
        extra = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
        model = dense_model(kind, **extra)
        with pytest.raises(ValueError, match=f"model is {type(model).__name__}, which is already sparse"):
            find_ffns(model)
    with pytest.raises(ValueError, match="model is DotMoeForCausalLM, which is already converted"):
        find_ffns(sparse_model())


def test_refuses_unknown_ffn_by_name():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    message = r"GPT2LMHeadModel, in which no FFN was recognised: the nearest is transformer.h.0.mlp .*looked for: .*three linear"
    with pytest.raises(ValueError, match=message):
        find_ffns(model)


def test_refuses_biases():
    with pytest.raises(ValueError, match=r"model.layers.0.mlp has biases in gate_proj, up_proj, down_proj; allowed"):
        find_ffns(dense_model(mlp_bias=True))


def test_refuses_an_ffn_that_computes_something_else():
    model = dense_model()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp has three projections and silu, but its output differs"):
        find_ffns(model)


def test_gate_and_up_are_told_apart_without_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w3, self.w1 = nn.Linear(H, F, bias=False), nn.Linear(H, F, bias=False)
            self.w2, self.f = nn.Linear(F, H, bias=False), nn.GELU(approximate="tanh")

        def forward(self, x):
            return self.w2(self.f(self.w1(x)) * self.w3(x))

    model = nn.Sequential(Odd())
    (ffn,) = find_ffns(model).values()
    assert ffn.gate_proj is model[0].w1.weight
    assert ffn.up_proj is model[0].w3.weight
    assert ffn.activation == "gelu_pytorch_tanh"


def test_bad_materialize():
    config = DotMoeConfig(num_experts=E, top_k=K)
    model, name = dense_model(), "model.layers.0.mlp"
    layers = random_layers(model)
    expert_of, router = layers[name]
    with pytest.raises(ValueError, match=r"layers is without model.layers.0.mlp; allowed: an entry for every FFN"):
        materialize(model, config, {k: v for k, v in layers.items() if k != name})
    with pytest.raises(ValueError, match=r"layers is with nowhere; allowed"):
        materialize(model, config, layers | {"nowhere": layers[name]})
    uneven = expert_of.clone()
    uneven[uneven == 0] = 1
    with pytest.raises(ValueError, match=r"expert_of of model.layers.0.mlp is 0 neurons for expert 0; allowed: exactly s = 8"):
        materialize(model, config, layers | {name: (uneven, router)})
    beyond = torch.where(expert_of == 7, 8, expert_of)
    with pytest.raises(ValueError, match=r"expert_of of model.layers.0.mlp is in \[0, 8\]; allowed: experts from 0 to 7"):
        materialize(model, config, layers | {name: (beyond, router)})
    with pytest.raises(
        ValueError, match=r"router_weight of model.layers.0.mlp is \[4, 32\]; allowed: \[num_experts, H\] = \[8, 32\]"
    ):
        materialize(model, config, layers | {name: (expert_of, router[:4])})
    with pytest.raises(ValueError, match="num_experts is 7; allowed: a divisor of F = 64"):
        materialize(model, DotMoeConfig(num_experts=7, top_k=2), layers)
    assert model(tokens()).logits.shape == (2, 9, V), "a refused model stays usable"


def test_bad_names():
    with pytest.raises(ValueError, match=r"name is 'model.nowhere'; allowed: a module path of LlamaForCausalLM"):
        swap_ffn(dense_model(), "model.nowhere", nn.Identity())
    with pytest.raises(ValueError, match=r"config.dense_config is None; allowed"):
        DotMoeForCausalLM(DotMoeConfig())
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM without experts"):
        self_check(dense_model(), None, tokens())
