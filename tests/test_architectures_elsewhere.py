"""Every backbone that converts, where this package is not: as every stock architecture, equal within the reported error or refused
by name and reason, and by its own modelling file, equal."""

import os
import subprocess
import sys

import pytest
import torch
from architectures import expected_outcomes, tiny_model
from test_architectures import attempt, generated, logits
from test_architectures import tokens as prompt
from tiny import tokens

import dotmoe_kernels as dk
from dotmoe_kernels.conversion import DotMoeConfig, find_ffns, materialize
from dotmoe_kernels.exports import stock
from dotmoe_kernels.models.layerwise import converted_layers

E = 4
ARCHITECTURES = [architecture.name for architecture in stock.ARCHITECTURES]
_LLAMA = ("mixtral", "qwen2_moe", "granite_moe", "glm4_moe")
EXPORTED = {  # all others are refused
    **dict.fromkeys(("llama", "smollm3", "phi3"), _LLAMA),
    **dict.fromkeys(("exaone", "internlm3", "iquestcoder"), _LLAMA),  # LLaMA's class, in files of other names the first
    **dict.fromkeys(("mistral", "ministral"), ("mixtral",)),  # with a window
    **dict.fromkeys(("qwen2", "seed_oss"), ("qwen2_moe", "granite_moe", "glm4_moe")),
    "qwen3": ("qwen3_moe", "glm4_moe"),
    "granite": ("granite_moe",),
}
KINDS = sorted(kind for kind, outcome in expected_outcomes()[1].items() if outcome == "equal")
# names that differ; buffers that another module fills; images, and a refusal; rotary embeddings in some layers
QUICK = ["exaone", "falcon_h1", "gemma3", "smollm3"]
X = tokens(4, 24)

STRANGER = """
import sys, torch
sys.modules["dotmoe_kernels"] = None
from transformers import AutoModelForCausalLM
given, found = torch.load(sys.argv[1]), {}

def tried(act):
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def logits(model):
    with torch.no_grad():
        return model(input_ids=given["tokens"], use_cache=False).logits

def generated(model):
    return model.generate(given["prompt"], max_new_tokens=4, do_sample=False, pad_token_id=0)

def load(folder, own):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own)
    return model, logits(model)

for name, (folder, own) in given["folders"].items():
    loaded = tried(lambda: load(folder, own))
    if isinstance(loaded, str):
        found[name] = (loaded, None, None)
        continue
    model, values = loaded
    found[name] = (type(model).__module__, values, own and tried(lambda: generated(model)))
torch.save(found, sys.argv[2])
"""


def lively(kind):
    """A converted model whose biases and norms are not those of a fresh one, which any class would get right."""
    model = tiny_model(kind)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw).mul(0.3).to(parameter))
    layers = {
        name: (torch.randperm(len(ffn.gate_proj), generator=draw) % E, torch.randn(E, ffn.gate_proj.shape[1], generator=draw))
        for name, ffn in find_ffns(model).items()
    }
    return materialize(model, DotMoeConfig(num_experts=E, top_k=2), layers)


def export(folder, out, architecture):
    """The report, or the refusal."""
    try:
        return dk.export(folder, out, architecture, data=X)
    except ValueError as error:
        assert not out.exists()
        return str(error)


def by_layers(folder, config):
    return logits(converted_layers(folder, config).model)


def elsewhere(kinds, root):
    """By kind: what the model gives here, what became of its exports, and what the other process finds."""
    here, folders = {}, {}
    for kind in kinds:
        model = lively(kind)
        dk.save(model, root / kind)
        model = dk.load(root / kind)
        with torch.no_grad():
            exact = attempt(lambda model=model: model(input_ids=X, use_cache=False).logits)
        here[kind] = {"exact": exact, "text": attempt(generated, model), "reports": {}}
        if exact is None:
            continue
        here[kind]["whole"], here[kind]["layers"] = logits(model), attempt(by_layers, root / kind, model.config)
        folders[kind] = (str(root / kind), True)
        for architecture in ARCHITECTURES:
            out = root / f"{kind} {architecture}"
            here[kind]["reports"][architecture] = export(root / kind, out, architecture)
            if out.exists():
                folders[out.name] = (str(out), False)
    torch.save({"tokens": X, "prompt": prompt(), "folders": folders}, root / "given")
    (root / "stranger.py").write_text(STRANGER)
    command = [sys.executable, root / "stranger.py", root / "given", root / "found"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return here, torch.load(root / "found")


def check(kind, here, found):
    exact, text, reports = (here[kind][key] for key in ("exact", "text", "reports"))
    if exact is None:
        pytest.skip("the dense model does not run on text alone")
    assert here[kind]["layers"] is not None
    assert torch.equal(here[kind]["layers"], here[kind]["whole"])
    most = float(exact.abs().max())
    module, values, again = found[kind]
    assert module.startswith("transformers_modules.")
    torch.testing.assert_close(values, exact, rtol=0, atol=1e-5 * most)
    if text is not None:
        assert torch.equal(again, text)
    for architecture, report in reports.items():
        if architecture not in EXPORTED.get(kind, ()):
            assert report.startswith(f"architecture is {architecture!r} of a model ")
            assert "; allowed: " in report
            continue
        assert report["parity"] < 1e-5
        module, values, _ = found[f"{kind} {architecture}"]
        assert module.startswith("transformers.models.")
        assert float((values - exact).abs().max()) / most <= 1.01 * report["logit_error"] + 1e-6
        assert report["logit_error_rms"] < 0.01


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return elsewhere(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return elsewhere([kind for kind in KINDS if kind not in QUICK], tmp_path_factory.mktemp("every"))


@pytest.mark.parametrize("kind", QUICK)
def test_interesting_backbones(kind, quick):
    check(kind, *quick)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK])
def test_every_backbone(kind, every):
    check(kind, *every)
