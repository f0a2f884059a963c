"""`dotmoe plan`: the topologies that fit, from config.json alone."""

import json

import pytest
import torch
from transformers import AutoConfig

from dotmoe_kernels import cli
from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, count_parameters
from dotmoe_kernels.conversion.plans import Topology, fast_paths, lossless_exports, plan_topologies
from dotmoe_kernels.conversion.speeds import dense_seconds, routed_seconds

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
L3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def config(kind="llama", **fields):
    return AutoConfig.for_model(kind, **(SIZES | fields))


@pytest.fixture(scope="module")
def l3():
    return {budget: plan_topologies(config(**L3), budget) for budget in (None, 0.5)}


def row_of(report, E, K):
    (row,) = [r for r in report["topologies"] if (r["num_experts"], r["top_k"]) == (E, K)]
    return row


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}])
def test_parameters_are_those_of_the_model(fields):
    dense = config(**fields)
    for row in plan_topologies(dense, 0.7)["topologies"][::3]:
        with torch.device("meta"):
            model = DotMoeForCausalLM(DotMoeConfig.for_dense(dense, num_experts=row["num_experts"], top_k=row["top_k"]))
        assert (row["total_parameters"], row["active_parameters"]) == count_parameters(model)
        experts = 3 * 2 * row["top_k"] * row["expert_size"] * 64
        assert row["active_ffn_parameters"] == experts + 2 * row["num_experts"] * 64


def test_the_largest_k_within_the_budget(l3):
    report = l3[0.5]
    largest = {}
    for row in report["topologies"]:
        assert row["active_parameters"] <= 0.5 * row["total_parameters"]
        largest[row["num_experts"]] = row
    assert set(largest) == {E for E in range(4, 449) if 14336 % E == 0}
    for E, row in largest.items():
        assert row["active_parameters"] + 32 * 3 * row["expert_size"] * 4096 > 0.5 * row["total_parameters"], E
        K = 1 << (row["top_k"].bit_length() - 1)  # and the power of two in it, whose fold is lossless
        rounded = [] if E & (E - 1) == 0 else ["qwen2_moe"]  # whose fold is E
        assert [name for name in report["exports"] if name not in row_of(report, E, K)["lossless_exports"]] == rounded


def test_without_a_budget_a_quarter_of_the_ffn(l3):
    assert {r["top_k"] for r in l3[None]["topologies"] if r["num_experts"] == 112} == {16, 28}
    assert {r["top_k"] for r in l3[None]["topologies"] if r["num_experts"] == 128} == {32}


@pytest.mark.parametrize(
    ("kind", "E", "K", "expected"),
    [
        ("llama", 128, 32, ["mixtral", "qwen2_moe", "granite_moe", "glm4_moe"]),
        ("llama", 112, 28, ["glm4_moe"]),
        ("llama", 112, 16, ["mixtral", "granite_moe", "glm4_moe"]),
        ("qwen2", 64, 12, ["qwen2_moe", "glm4_moe"]),  # not renormalised: the weights become 1 / E
        ("qwen3", 64, 12, ["glm4_moe"]),
        ("qwen3", 96, 16, ["qwen3_moe", "glm4_moe"]),
        ("gemma2", 64, 16, []),
    ],
)
def test_lossless_exports(kind, E, K, expected):
    assert lossless_exports(kind, Topology(64, 768 * E, E, K)) == expected


@pytest.mark.parametrize(
    ("F", "E", "K", "missed"),
    [
        (14336, 128, 32, ["k-quants"]),
        (14336, 112, 28, ["k-quants", "fused top-k", "fast prefill"]),
        (11008, 128, 32, ["k-quants", "grouped product"]),  # s = 86
        (18944, 148, 37, ["k-quants", "fused top-k", "fast prefill"]),
        (1024 * 16, 1024, 6, ["at most 512", "k-quants"]),
        (8192, 32, 10, []),
    ],
)
def test_fast_paths(F, E, K, missed):
    found = [name for name, met in fast_paths(Topology(64, F, E, K)).items() if not met]
    assert len(found) == len(missed)
    assert all(word in name for word, name in zip(missed, found, strict=True))


def test_predicted_speed_is_arithmetic_on_the_tables(l3):
    row = row_of(l3[None], 112, 28)
    for T in (1, 8, 512, 8192):
        c = Topology(4096, 14336, 112, 28)
        phase = "decode" if T <= 8 else "prefill"
        predicted = row["predicted"][f"{phase} {T}"]
        assert predicted["ffn_times_dense"] == pytest.approx(dense_seconds(T, c) / routed_seconds(T, c), abs=1e-3)
        whole = l3[None]["predicted_dense_seconds"][f"{phase} {T}"]
        assert predicted["times_dense"] == pytest.approx(whole / predicted["seconds"], abs=1e-3)
    weights = 2 * (8_030_261_248 - 32 * 2 * 4096 - 4096 - 128256 * 4096)  # of the products, in bfloat16
    assert l3[None]["predicted_dense_seconds"]["decode 1"] == pytest.approx(weights / 4.3e12, rel=0.2)
    assert "nobody measured it" in l3[None]["predicted_for"]


def write(folder, **fields):
    folder.mkdir()
    config(**fields).save_pretrained(folder)
    return str(folder)


def test_the_command(capsys, tmp_path):
    model = write(tmp_path / "dense")
    assert cli.main(["plan", model, "--budget", "0.7"]) == 0
    text = capsys.readouterr().out
    assert "PREDICTED" in text
    assert "active / total parameters at most 0.7" in text
    assert cli.main(["plan", model, "--budget", "0.7", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = [line.split() for line in text.splitlines()[3:] if line.strip()[:1].isdigit()]
    assert [tuple(map(int, row[:3])) for row in rows] == [
        (r["num_experts"], r["expert_size"], r["top_k"]) for r in report["topologies"]
    ]
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (None, [], "MODEL is {model}, which is no folder; allowed: a Hugging Face model folder, or a name"),
        (
            {},
            ["--budget", "0.1"],
            "--budget is 0.1, which no topology fits; allowed: at least 0.1586, the nearest: E 48, s 32, K 1",
        ),
        ({}, ["--budget", "1.5"], "--budget is 1.5; allowed: a number between 0 and 1"),
        ({}, ["--budget", "nan"], "--budget is nan; allowed: a number between 0 and 1"),
        ({"kind": "mixtral"}, [], "MODEL is MixtralForCausalLM, which is already sparse"),
        ({"intermediate_size": 62}, [], "MODEL is with FFNs of 62 neurons; allowed: F with a divisor E"),
        ("dotmoe", [], "which is already converted; allowed: a dense model"),
    ],
)
def test_bad_input_ends_with_one_line(capsys, tmp_path, make, flags, message):
    model = str(tmp_path / "m")
    if make == "dotmoe":
        DotMoeConfig.for_dense(config(), num_experts=16, top_k=4).save_pretrained(model)
    elif make is not None:
        write(tmp_path / "m", **make)
    assert cli.main(["plan", model, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.format(model=model) in error
