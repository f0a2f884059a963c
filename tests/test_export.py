"""Stock architectures: another process, in which this package cannot be imported, gives logits within the reported error."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import E, dense_model, random_layers, sparse_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import dotmoe_kernels as dk
from dotmoe_kernels.cli import build_parser, main
from dotmoe_kernels.conversion import DotMoeConfig, materialize
from dotmoe_kernels.exports import ARCHITECTURES, stock
from dotmoe_kernels.exports.calibration import choose_shifts, stock_weights

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
GRANITE = {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 3.0}
SOURCES = {  # name -> (backbone, fields, architectures); every one has 4 heads and 2 of keys and values
    "llama": ("llama", {}, ("mixtral", "qwen2_moe", "granite_moe", "glm4_moe")),
    "tied": ("llama", {"tie_word_embeddings": True}, ("mixtral", "qwen2_moe", "granite_moe", "glm4_moe")),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, ("mixtral", "qwen2_moe", "granite_moe", "glm4_moe")),
    "biases": ("llama", {"attention_bias": True}, ("granite_moe",)),
    "wide heads": ("mistral", {"head_dim": 16, "sliding_window": None}, ("mixtral", "qwen2_moe", "granite_moe", "glm4_moe")),
    "window": ("mistral", {"sliding_window": 4}, ("mixtral",)),
    "qwen2": ("qwen2", {}, ("qwen2_moe", "granite_moe", "glm4_moe")),
    "qwen3": ("qwen3", {"head_dim": 16}, ("qwen3_moe", "glm4_moe")),
    "granite": ("granite", GRANITE, ("granite_moe",)),
    "phi3": ("phi3", {}, ("mixtral", "glm4_moe")),
    "phi3 half": ("phi3", {"partial_rotary_factor": 0.5}, ("glm4_moe",)),
}
SHARDED = ("tied", "llama3", "qwen3", "granite")  # written in several files, tied and untied
DTYPES = ["float32", "bfloat16"]
CASES = [(name, architecture) for name, (_, _, known) in SOURCES.items() for architecture in known]
X = tokens(4, 24)

STRANGER = """
import sys, torch
sys.modules["dotmoe_kernels"] = None
from transformers import AutoModelForCausalLM
given, found = torch.load(sys.argv[1]), {}
for name, folder in given["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found[name] = (type(model).__module__, model(given["tokens"]).logits)
torch.save(found, sys.argv[2])
"""


def lively(kind, **fields):
    """A sparse model whose biases and norms are not those of a fresh one, which any class would get right."""
    model = dense_model(kind, **fields)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw).mul(0.3).to(parameter))
    return materialize(model, DotMoeConfig(num_experts=E, top_k=4), random_layers(model))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By case: the exact logits, the report, and the logits of the other process."""
    root = tmp_path_factory.mktemp("exported")
    folders, exact = {}, {}
    for name, (kind, fields, architectures) in SOURCES.items():
        for dtype in DTYPES:
            model = lively(kind, dtype=getattr(torch, dtype), **fields)
            source = root / f"{name} {dtype}"
            dk.save(model, source)
            with torch.no_grad():
                logits = dk.load(source)(X).logits
            for architecture in architectures:
                case = f"{name} {architecture} {dtype}"
                small = {"max_shard_size": "20KB"} if name in SHARDED else {}
                exact[case] = (logits, dk.export(source, root / case, architecture, data=X, **small))
                folders[case] = str(root / case)
    torch.save({"tokens": X, "folders": folders}, root / "given")
    (root / "stranger.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, root / "stranger.py", root / "given", root / "found"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    return root, exact, torch.load(root / "found")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_logits_within_the_reported_error(name, architecture, dtype, exported):
    root, exact, found = exported
    case = f"{name} {architecture} {dtype}"
    (logits, report), (module, values) = exact[case], found[case]
    assert module.startswith("transformers.models.")
    assert report["architecture"] == architecture
    error = float((values - logits).abs().max() / logits.abs().max())
    assert error <= 1.01 * report["logit_error"] + 1e-6
    assert report["parity"] < 1e-5
    assert report["fold"]["lossless"]  # K = 4, E = 8
    assert report["gate_error"] < (0.01 if dtype == "float32" else 0.05)
    assert report["swapped"] < (0.005 if dtype == "float32" else 0.03)
    assert report["kl"] < 0.05
    assert (len(list((root / case).glob("*.safetensors"))) > 1) is (name in SHARDED)
    assert ((root / case / "model.safetensors.index.json").exists()) is (name in SHARDED)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "granite_moe", "glm4_moe"])
def test_a_smaller_eps_than_the_chosen_is_worse(architecture):
    """Both ends of the range lose: what is chosen is a balance, and close to the exact router."""
    model = sparse_model(dtype=torch.float32)
    scores = next(a.scores for a in stock.ARCHITECTURES if a.name == architecture)
    shifts = choose_shifts(model, tokens(16, 64), scores)
    assert all(4 < shift < 22 for shift in shifts.values())
    gate = next(m for n, m in model.named_modules() if n.endswith("mlp.gate"))
    x = torch.randn(4096, gate.hidden_size)
    _, _, exact = gate(x)

    def swapped(shift):
        _, indices = stock_weights(x, gate.weight * 2.0**-shift, gate.top_k, scores)
        return float((indices.sort(-1).values != exact.sort(-1).values).any(-1).float().mean())

    def bent(shift):
        weights, _ = stock_weights(x, gate.weight * 2.0**-shift, gate.top_k, scores)
        return float((weights.detach() - 1).abs().max())

    chosen = max(shifts.values())
    assert swapped(chosen) < 0.01
    assert swapped(chosen + 8) > 5 * swapped(chosen)
    assert bent(chosen) < 0.01
    assert bent(chosen - 8) > 50 * bent(chosen)


def test_top_k_refolds(tmp_path):
    dk.save(sparse_model(), tmp_path / "m")
    report = dk.export(tmp_path / "m", tmp_path / "out", "mixtral", data=X, top_k=6)
    assert (report["top_k"], report["fold"]) == (6, {"factor": 6, "lossless": False})
    with torch.no_grad():
        exact = dk.load(tmp_path / "m", top_k=6)(X).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(X).logits
    assert float((found - exact).abs().max() / exact.abs().max()) <= 1.01 * report["logit_error"]
    assert report["logit_error_rms"] < 1e-2
    with pytest.raises(ValueError, match="top_k is 9; allowed: an integer from 1 to"):
        dk.export(tmp_path / "m", tmp_path / "other", "mixtral", top_k=9)
    with pytest.raises(ValueError, match=r"top_k is 3; allowed: None with architecture \"dense\""):
        dk.export(tmp_path / "m", tmp_path / "other", top_k=3)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("kind", "dtype", "top_k", "best"),
    [
        ("llama", torch.float32, 3, "mixtral"),
        ("llama", torch.bfloat16, 4, "mixtral"),
        ("mistral", torch.float32, 2, "mixtral"),
        ("qwen2", torch.bfloat16, 3, "qwen2_moe"),  # E is folded, a power of two
        ("qwen3", torch.float32, 2, "qwen3_moe"),
        ("qwen3", torch.bfloat16, 3, "glm4_moe"),
        ("granite", torch.float32, 2, "granite_moe"),
    ],
)
def test_auto(kind, dtype, top_k, best, tmp_path):
    dk.save(sparse_model(kind, dtype=dtype, top_k=top_k), tmp_path / "m")
    report = dk.export(tmp_path / "m", tmp_path / "out", "auto", data=X)
    assert report["architecture"] == best
    assert f"backbone {kind}: " in report["reason"]
    assert ("would round bfloat16 weights times 3" in report["reason"]) is (best == "glm4_moe")


def test_own_samples_card_and_kept_files(tmp_path):
    from test_checkpoint import word_tokenizer

    model = sparse_model()
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    dk.save(model, tmp_path / "m", tokenizer=tokenizer)
    (tmp_path / "m" / "modeling_theirs.py").write_text("raise SystemExit")
    state = torch.get_rng_state()
    report = dk.export(tmp_path / "m", tmp_path / "out", "auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert report["calibration"] == {"tokens": 512, "source": "the model's own samples"}
    stock_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock_model.generation_config.temperature == 0.25
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("a b")["input_ids"] == [2, 3]
    assert again.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| architecture | mixtral |" in card
    assert "| folded | 2 into the down projections: lossless |" in card
    assert f"| perplexity, this model | {report['perplexity']:.4g} |" in card
    assert report == dk.export(tmp_path / "m", tmp_path / "out", "auto", overwrite=True)


REFUSED = [
    ("llama", {"attention_bias": True}, "mixtral", r"with model\.layers\.\*\.self_attn\.q_proj\.bias"),
    ("llama", {"attention_bias": True}, "glm4_moe", r"with model\.layers\.\*\.self_attn\.o_proj\.bias"),
    ("llama", {}, "qwen3_moe", r"of backbone llama, without .*q_norm\.weight.*; allowed: backbone qwen3"),
    ("qwen2", {}, "mixtral", r"of backbone qwen2, with .*q_proj\.bias"),
    ("qwen3", {}, "mixtral", r"of backbone qwen3, with .*q_norm\.weight"),
    ("mistral", {"sliding_window": 4}, "glm4_moe", r"with a sliding window of 4 tokens; allowed: attention without a window"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "qwen2_moe", r"in some layers"),
    ("granite", GRANITE, "mixtral", r"with embedding_multiplier, attention_multiplier, residual_multiplier, logits_scaling"),
    ("llama", {"hidden_act": "gelu"}, "mixtral", r"of activation gelu; allowed: silu"),
    ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}, "mixtral", r"with layers without rotary embeddings"),
    ("phi3", {"partial_rotary_factor": 0.5}, "mixtral", r"with partial_rotary_factor 0\.5"),
    ("gemma2", {}, "glm4_moe", r"of activation gelu_pytorch_tanh"),
    ("olmo2", {}, "mixtral", r"of backbone olmo2, with .*post_feedforward_layernorm"),
    ("glm", {}, "glm4_moe", r"of backbone glm, whose layers compute something else"),
    ("gemma2", {}, "auto", r"'auto' of a model that none takes \(qwen3_moe: .*; allowed: 'dense'"),
]


@pytest.mark.parametrize(("kind", "fields", "architecture", "reason"), REFUSED)
def test_refused_by_name_and_reason(kind, fields, architecture, reason, tmp_path):
    dk.save(sparse_model(kind, **fields), tmp_path / "m")
    with pytest.raises(ValueError, match=reason) as error:
        dk.export(tmp_path / "m", tmp_path / "out", architecture, data=X)
    assert str(error.value).startswith(f"architecture is {architecture!r}")
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_the_soft_router_is_refused(tmp_path):
    model = dense_model()
    dk.save(materialize(model, DotMoeConfig(num_experts=E, top_k=2, router="soft"), random_layers(model)), tmp_path / "m")
    with pytest.raises(ValueError, match=r"architecture is 'mixtral' of a model of router \"soft\"; allowed: router \"top_k\""):
        dk.export(tmp_path / "m", tmp_path / "out", "mixtral")


@pytest.mark.parametrize("field", ["rope_parameters", "rms_norm_eps", "hidden_act"])
def test_what_no_list_names_is_found_by_computing(field, tmp_path, monkeypatch):
    """A field of the target's config that is wrong, as of a backbone with a feature nobody listed: nothing is left in its place."""
    wrong = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rms_norm_eps": 0.1, "hidden_act": "gelu"}
    before = stock.target_fields
    monkeypatch.setattr(stock, "target_fields", lambda *args: before(*args) | {field: wrong[field]})
    dk.save(sparse_model(), tmp_path / "m")
    with pytest.raises(ValueError, match=r"architecture is 'mixtral', which computes something else: .*; allowed: a relative"):
        dk.export(tmp_path / "m", tmp_path / "out", "mixtral", data=X)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_data(tmp_path):
    dk.save(sparse_model(), tmp_path / "m")
    for data, words in ((torch.zeros(3, dtype=torch.int64), r"data is of shape \[3\]"), (X + 1000, "data is with ids up to")):
        with pytest.raises(ValueError, match=words):
            dk.export(tmp_path / "m", tmp_path / "out", "mixtral", data=data)


def test_command(tmp_path, capsys):
    from test_checkpoint import word_tokenizer

    dk.save(sparse_model(), tmp_path / "m", tokenizer=word_tokenizer())
    (tmp_path / "a.txt").write_text("a b b a " * 200)
    given = ["export", str(tmp_path / "m"), "--data", str(tmp_path / "a.txt"), "--sequence-length", "16", "--max-tokens", "256"]
    assert main([*given, "--output", str(tmp_path / "out"), "--json", "--top-k", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["architecture"], report["top_k"], report["calibration"]["tokens"]) == ("mixtral", 3, 256)
    assert main([*given, "--output", str(tmp_path / "half"), "--json", "--dtype", "float16", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16
    assert main([*given, "--output", str(tmp_path / "o"), "--device", "tpu"]) == 2
    assert "error: --device is 'tpu'; allowed: auto, cpu, cuda, cuda:N" in capsys.readouterr().err
    assert main([*given, "--output", str(tmp_path / "out")]) == 2
    assert "error: --output is " in capsys.readouterr().err
    assert main([*given, "--output", str(tmp_path / "o"), "--architecture", "qwen3_moe"]) == 2
    assert capsys.readouterr().err.startswith("dotmoe export: error: --architecture is 'qwen3_moe' of a model of backbone llama")
    assert main(["export", str(tmp_path / "m"), "--output", str(tmp_path / "d"), "--architecture", "dense"]) == 0
    assert "dense" in capsys.readouterr().out
    assert main([*given, "--output", str(tmp_path / "e"), "--architecture", "dense"]) == 2
    assert "error: --data is " in capsys.readouterr().err


def test_the_parser_knows_every_architecture():
    export = build_parser().parse_args(["export", "m", "--output", "o"])
    assert export.architecture == "auto"
    for architecture in ARCHITECTURES:
        assert build_parser().parse_args(["export", "m", "--output", "o", "--architecture", architecture])


@pytest.mark.parametrize("architecture", ["mixtral", "granite_moe"])
def test_rounding_by_the_fold_is_reported_and_no_other_fault(architecture, tmp_path):
    """K = 3 in bfloat16: every folded weight is rounded, which parity must not take for another feature."""
    dk.save(sparse_model(dtype=torch.bfloat16, top_k=3), tmp_path / "m")
    report = dk.export(tmp_path / "m", tmp_path / "out", architecture, data=X)
    assert report["fold"] == {"factor": 3, "lossless": False}
    assert report["parity"] < 1e-5
    assert "| folded | 3 into the down projections: rounded |" in (tmp_path / "out" / "README.md").read_text()
