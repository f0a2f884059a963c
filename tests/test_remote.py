"""A saved model's own modelling file: the same model where dotmoe_kernels cannot be imported, in the form that engines expect."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import E, K, dense_model, random_layers, sparse_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import dotmoe_kernels as dk
from dotmoe_kernels.conversion import DotMoeConfig, materialize
from dotmoe_kernels.conversion.zero_experts import add_zero_experts
from dotmoe_kernels.models.config import MODELING

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# bfloat16: a bit of a logit from 2 on is 1 / 64, and either side is 0.1 to 0.3 from what float64 gives
TOLERANCE = {"float32": 5e-6, "bfloat16": 0.04}
CASES = [(kind, dtype) for kind in ("llama", "qwen3", "gemma3_text", "phi3", "soft", "zeros") for dtype in DTYPES]
SHARDED = ("qwen3", "gemma3_text", "soft")  # in several files, untied and tied
NEW = 6

# One process for all cases: what it prints is a JSON dictionary by case.
LOADER = """
import inspect, json, sys
if sys.argv[2] == "alone":
    sys.modules["dotmoe_kernels"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

seen = []
def engine(module, query, key, value, attention_mask, **kwargs):
    seen.append(kwargs.get("attention_instances"))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, is_causal=True, **kwargs)
for name in ("vllm", "sglang"):
    ALL_ATTENTION_FUNCTIONS.register(name, engine)

def served(folder, engine, block, x, hidden):
    seen.clear()
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", attn_implementation=engine)
    with torch.no_grad():
        out = model(x, use_cache=False, return_dict=False, attention_instances=folder)[0]
    experts = model.get_submodule(block.removeprefix("model.")).experts
    return {
        "error": float((out - hidden).abs().max() / hidden.abs().max()),
        "kwargs": seen == [folder] * len(seen) and len(seen) > 0,
        "dimensions": [p.ndim for p in experts.parameters()],
        "compatible": type(model).is_backend_compatible(),
        "decoder": model.get_decoder() is model,
        "plan": sorted(model._pp_plan),
    }

def check(folder):
    expected = torch.load(folder + "/expected.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    x = expected["x"]
    options = {"max_new_tokens": expected["tokens"].shape[1] - x.shape[1], "do_sample": False}
    with torch.no_grad():
        logits = model(x).logits
        hidden = model.get_decoder()(x)[0]
    block = next(iter(model.config.ffn_modules))
    source = inspect.getsource(type(model.get_submodule(block).gate).forward)
    model.save_pretrained(folder + "/again")
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    result = {
        "class": type(model).__module__.split(".")[0],
        "dtype": str(model.dtype),
        "error": float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()),
        "generated": [model.generate(x, use_cache=cached, **options).tolist() for cached in (True, False)],
        "expected": expected["tokens"].tolist(),
        "scoring": [word for word in ("softmax", "sigmoid") if word in source],
        "vllm": served(folder, "vllm", block, x, hidden),
        "sglang": served(folder, "sglang", block, x, hidden),
        "training": float(model.train()(x, labels=x).loss) > 0,
        "drawn": float(fresh.get_submodule(block).gate.weight.std()) > 0 and bool(torch.isfinite(fresh(x).logits).all()),
    }
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(x).logits
    result["eager"] = [model.config.dense_config._attn_implementation, float((eager - logits).abs().max() / logits.abs().max())]
    return result

print(json.dumps({folder: check(folder) for folder in sys.argv[3:]}))
"""


def load_alone(folders, tmp_path, mode="alone"):
    """What the loader finds in these folders, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, "-", mode, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def converted(kind, dtype):
    if kind == "zeros":
        model = sparse_model(dtype=dtype)
        add_zero_experts(model, 3)
        return model
    if kind != "soft":
        return sparse_model(kind, dtype=dtype)
    model = dense_model(dtype=dtype)
    config = DotMoeConfig(num_experts=E, top_k=K, router="soft", router_k=[1.5, 2.75], router_threshold=0.05)
    return materialize(model, config, random_layers(model))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    names = []
    for kind, dtype in CASES:
        model, x = converted(kind, DTYPES[dtype]), tokens()
        path = folder / f"{kind}-{dtype}"
        dk.save(model, path, max_shard_size="20KB" if kind in SHARDED else "2GB")
        assert (len(list(path.glob("*.safetensors"))) > 1) is (kind in SHARDED)
        with torch.no_grad():
            expected = {"x": x, "logits": model(x).logits, "tokens": model.generate(x, max_new_tokens=NEW, do_sample=False)}
        torch.save(expected, path / "expected.pt")
        names.append(path)
    return {name.rsplit("/", 1)[-1]: result for name, result in load_alone(names, folder).items()} | {"folder": folder}


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_same_model_without_the_package(found, kind, dtype):
    result = found[f"{kind}-{dtype}"]
    assert result["class"] == "transformers_modules"
    assert result["dtype"] == f"torch.{dtype}"
    assert result["error"] < TOLERANCE[dtype]
    assert [len(row) for tokens in result["generated"] for row in tokens] == [9 + NEW] * 4
    if dtype == "float32":  # in bfloat16 the largest of 64 logits is often a tie
        assert result["generated"] == [result["expected"]] * 2
    assert result["training"]
    assert result["drawn"]
    assert result["eager"][0] == "eager"
    assert result["eager"][1] < 5e-6 or dtype == "bfloat16"  # there another attention moves tokens to other experts


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_form_for_engines(found, kind, dtype, engine):
    """Packed experts of three dimensions where vLLM's fused experts are this model: SiLU, K experts a token."""
    result = found[f"{kind}-{dtype}"]
    assert result["scoring"] == []
    served = result[engine]
    assert served["error"] < TOLERANCE[dtype]
    assert served["kwargs"]
    assert served["compatible"]
    assert served["decoder"]
    assert served["plan"] == ["embed_tokens", "layers", "norm"]
    fusible = engine == "vllm" and kind not in ("gemma3_text", "soft", "zeros")
    assert served["dimensions"] == ([3, 3] if fusible else [])


def test_saved_again_by_the_file_itself(found):
    """What transformers saves without the package is a model of this package still."""
    before = dk.load(found["folder"] / "phi3-float32")
    after = dk.load(found["folder"] / "phi3-float32" / "again")
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))
    assert (found["folder"] / "phi3-float32" / "again" / MODELING.name).read_text() == MODELING.read_text()


def test_with_the_package_it_runs_on_its_kernels(found, tmp_path):
    folder = found["folder"] / "llama-float32"
    result = load_alone([folder], tmp_path, "beside")[str(folder)]
    assert result["class"] == "transformers_modules"
    assert result["error"] < 5e-6
    assert result["generated"] == [result["expected"]] * 2


def test_every_way_of_saving(tmp_path):
    model = sparse_model()
    dk.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    dk.load(tmp_path / "b").save_pretrained(tmp_path / "c", max_shard_size="20KB")
    arguments = TrainingArguments(tmp_path, max_steps=1, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens()]).train()
    for name in ("a", "b", "c", "checkpoint-1"):
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert values["auto_map"] == {
            "AutoConfig": "modeling_dotmoe.DotMoeConfig",
            "AutoModel": "modeling_dotmoe.DotMoeModel",
            "AutoModelForCausalLM": "modeling_dotmoe.DotMoeForCausalLM",
        }
        assert values["ffn_modules"] == {f"model.layers.{layer}.mlp": "silu" for layer in range(2)}
        assert (tmp_path / name / MODELING.name).read_text() == MODELING.read_text()
    dk.export(tmp_path / "a", tmp_path / "dense")
    assert not (tmp_path / "dense" / MODELING.name).exists()


@pytest.mark.parametrize("trust", [None, True])
def test_this_package_runs_no_code_of_the_folder(tmp_path, trust, monkeypatch):
    dk.save(sparse_model(), tmp_path / "m")
    (tmp_path / "m" / MODELING.name).write_text("raise SystemExit('executed')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert type(dk.load(tmp_path / "m")) is dk.DotMoeForCausalLM
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options)) is dk.DotMoeForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path / "m", **options)) is DotMoeConfig


# AutoTokenizer reads the config first, and with it what auto_map says: what it gives, and whether somebody was asked
TOKENIZING = """
import json, sys
if sys.argv[2] == "alone":
    sys.modules["dotmoe_kernels"] = None
else:
    import dotmoe_kernels
    dotmoe_kernels.DotMoeForCausalLM
import builtins
from transformers import AutoTokenizer

asked = []
def nobody(*words):
    asked.append(words)
    raise EOFError
builtins.input = nobody
found = {}
for trust in (False, True, None):
    asked.clear()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)
    found[str(trust)] = [type(tokenizer).__name__, tokenizer("a b a")["input_ids"], tokenizer.eos_token_id, len(asked)]
print(json.dumps(found))
"""


def test_the_tokenizer_needs_no_code_of_the_folder(tmp_path):
    """Without this package transformers asks whether the config's code may run, unless it is told: the card says so."""
    from test_checkpoint import word_tokenizer

    dk.save(sparse_model(), tmp_path / "m", tokenizer=word_tokenizer())
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    for mode in ("alone", "beside"):
        command = [sys.executable, "-c", TOKENIZING, str(tmp_path / "m"), mode]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        name = type(word_tokenizer()).__name__
        asked = {trust: row.pop() for trust, row in found.items()}
        assert list(found.values()) == [[name, [2, 3, 2], 0]] * 3
        assert asked == {"False": 0, "True": 0, "None": int(mode == "alone")}
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=False)' in card


def test_the_file_imports_torch_and_transformers_alone():
    names = set()
    for node in ast.walk(ast.parse(MODELING.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers", "dotmoe_kernels"}
