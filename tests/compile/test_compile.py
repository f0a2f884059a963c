"""Every registered kernel compiles for every target, fits it, and keeps to registers on sm_90: no GPU needed.

One tile a kernel and target; ``python -m bench.kernels`` goes through all of them. The compiler runs in processes of its
own, since this one may interpret its kernels.
"""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from shapes import expert_weights, normal, routed_indices, uniform

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed with the package

from bench.experts import layouts, stock_experts
from bench.kernels import KERNELS, forms, predictions_token
from bench.kernels.compile_report import TARGETS, around_products
from bench.kernels.predictions import experts_against_dense, grouped_mm_kept_bytes, reductions, training_against_dense
from bench.machine import ROOT
from bench.memory import kept_bytes
from bench.shapes import L3, Shape
from dotmoe_kernels._tiles import grouped
from dotmoe_kernels._tiles.hardware import GPUS, H200
from dotmoe_kernels.conversion.speeds import grouped_span

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}

    def compile_for(target):
        path = folder / f"{target}.json"
        command = [sys.executable, "-m", "bench.kernels", "--first", "--target", target, "--output", str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert path.exists(), done.stderr
        return json.loads(path.read_text())["compiled"]

    with ThreadPoolExecutor(max_workers=2) as pool:
        return {(row["kernel"], row["target"]): row for found in pool.map(compile_for, TARGETS) for row in found}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(rows, kernel, target):
    row = rows[kernel, target]
    assert "error" not in row, row["error"]
    assert row["shared_bytes"] <= row["shared_limit"]
    if target == "sm_90":
        assert row["spill_bytes"] == 0
        assert not row["instructions"].get("local", 0)
    for instruction in KERNELS[kernel].needs.get(target, ()):
        assert row["instructions"].get(instruction), f"no {instruction} among {row['instructions']}"


def test_what_a_program_waits_for_before_its_products_is_counted(rows):
    """The table of row tiles spares the search among the offsets, which predictions take for what older compilers make of it."""
    older, newer = (rows[kernel, "sm_90"]["prologue"] for kernel in ("grouped_up", "grouped_joint_up"))
    assert newer.get("barrier", 0) <= 2
    assert newer.get("shuffle", 0) == 0
    searched = older["barrier"] - newer.get("barrier", 0)
    assert 0.5 * grouped._PICK.barriers <= searched <= 1.5 * grouped._PICK.barriers
    assert rows["grouped_joint_up", "sm_90"]["instructions"]["barrier"] <= 6  # nothing is moved through shared memory to be split


@pytest.mark.parametrize("unit", ["HGMMA", "HMMA"])
def test_waits_are_counted_on_both_sides_of_the_products(unit):
    middle = [f"{unit}.16816 R0, R2, R4 ;", "BAR.SYNC 0x0 ;", f"{unit}.16816 R0, R2, R4 ;"]
    sass = ["BAR.SYNC 0x0 ;", "SHFL.BFLY PT, R1 ;", "LDG.E R2 ;", *middle, "BAR.SYNC 0x0 ;", "STG.E.128 R2 ;", "EXIT ;"]
    found = around_products("\n".join(f"        /*{16 * i:04x}*/                   {line}" for i, line in enumerate(sass)))
    assert found["prologue"] == {"instructions": 3, "barrier": 1, "shuffle": 1, "load": 1}
    assert found["epilogue"] == {"instructions": 3, "barrier": 1, "store": 1}
    assert around_products("        /*0000*/   EXIT ;") == {}


def test_older_and_newer_forms_stand_beside_each_other():
    rows = forms.forms()
    for what in forms.OLDER:
        found = [row for row in rows if row["what"] == what]
        for shape in {row["shape"] for row in found}:
            here = [row for row in found if row["shape"] == shape]
            assert len({row["form"] for row in here}) == len(here) >= 2
            assert sum(row["older"] for row in here) == sum(row["chosen"] for row in here) == 1
        assert {row["shape"].split()[0] for row in found} == {"L3", "Q25", "coarse", "mid"}
    for row in rows:
        for gpu in GPUS:
            assert 0 < row[f"{gpu.name}_predicted_low_seconds"] < row[f"{gpu.name}_predicted_high_seconds"] < 0.1
    assert {len(cells) for cells in forms.table()} == {len(forms.table()[0])}


def test_the_range_of_the_grouped_path_holds_what_a_review_expects_of_the_older_forms():
    """2.1 to 2.7 ms at L3 and T = 8192 on an H200."""
    older = grouped_span(8192, L3, H200, "halves", "tiles")
    assert older.low * 1e3 < 2.1 < older.middle * 1e3 < 2.7 < older.high * 1e3
    assert grouped_span(8192, L3, H200).middle < older.middle


def is_jit(decorator):
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(target, ast.Attribute) and target.attr == "jit"


def test_every_kernel_is_registered():
    registered = {kernel.function for kernel in KERNELS.values()}
    for path in sorted((ROOT / "dotmoe_kernels").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and any(map(is_jit, node.decorator_list)):
                assert f"{module}:{node.name}" in registered, f"bench/kernels has no entry for {module}:{node.name}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_predictions_are_positive_and_finite(kernel):
    for cost in KERNELS[kernel].costs.values():
        for gpu in GPUS:
            assert 0 < cost.seconds(gpu).low < cost.seconds(gpu).high < 10


def test_predicted_times_lie_above_the_limit():
    for row in experts_against_dense():
        assert 0 < row["limit_seconds"] <= row["predicted_seconds"] < 1
        assert row["predicted_times_dense"] == row["dense_predicted_seconds"] / row["predicted_seconds"]
        for whose in ("", "dense_"):
            low, high = row[f"H200_{whose}predicted_seconds"]
            assert low < row[f"{whose}predicted_seconds"] < high
            assert row[f"H100_{whose}predicted_seconds"][1] >= high
    limits = {row["shape"]: row["limit_seconds"] for row in experts_against_dense()}
    assert all(row["predicted_seconds"] > limits[row["shape"]] for row in reductions())


def test_predicted_tokens_of_whole_models():
    rows = {row["shape"]: row for row in predictions_token.tokens()}
    assert set(rows) == {f"{name} T {T}" for name in ("L3", "Q25", "SmolLM2") for T in (1, 8)}
    for row in rows.values():
        for name in ("sparse", "dense"):
            assert 0 < row[f"{name}_limit_seconds"] <= row[f"{name}_predicted_seconds"] < 0.1
        assert row["limit_times_dense"] > 1
        assert row["predicted_times_dense"] == row["dense_predicted_seconds"] / row["sparse_predicted_seconds"]
    parameters = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # of LLaMA-3-8B without the embedding and the norms
    assert predictions_token.BACKBONES[0].read(112) == parameters
    assert rows["SmolLM2 T 1"]["sparse_launches"] == 30 * (8 + 5) + 3
    assert all(len(row) == len(predictions_token.table()[0]) for row in predictions_token.table())


def test_predicted_training_lies_above_its_limit_and_above_the_forward_pass():
    forward = {row["shape"]: row["predicted_seconds"] for row in experts_against_dense()}
    for row in training_against_dense():
        assert 0 < row["limit_seconds"] <= row["predicted_seconds"] < 1
        assert 2 * forward[row["shape"]] < row["predicted_seconds"]
        assert row["predicted_times_dense"] == row["dense_predicted_seconds"] / row["predicted_seconds"]
        assert 0 < row["kept_bytes"] < row["grouped_mm_kept_bytes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_transformers_grouped_mm_keeps_is_counted(dtype):
    """All but the routing: at most four 64-bit numbers a slot."""
    T, shape = 64, Shape("", 64, 4, 32, 3)
    w = layouts(shape, *expert_weights(shape.E, shape.s, shape.H, seed=0, dtype=dtype))
    x, routing = normal(T, shape.H, seed=1, dtype=dtype), uniform(T, shape.K, seed=2, dtype=dtype)
    indices = routed_indices(T, shape.K, shape.E, seed=3)
    module = stock_experts(shape, w, "grouped_mm").requires_grad_(True)
    inputs = x.requires_grad_(), indices, routing.requires_grad_()
    routed = kept_bytes(lambda: module(*inputs), [*inputs, *w.values()]) - grouped_mm_kept_bytes(T, shape, dtype.itemsize)
    assert 0 <= routed <= 32 * T * shape.K
