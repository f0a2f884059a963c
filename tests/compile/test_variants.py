"""Variants of kernels beside the first, which ``test_compile.py`` compiles: what a launch makes of it, and with --slow all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed with the package

from known import allowed_spill

from bench.kernels import KERNELS
from bench.machine import ROOT

pytest.importorskip("triton")
FORMS = ("TF32", "one column")
COMPILE = """
import json, sys
from bench.kernels import KERNELS
from bench.kernels.compile_report import compile_variant
import triton
rows = []
for kernel in KERNELS.values():
    for one in kernel.variants("cuda"):
        if one.name.endswith(tuple(sys.argv[1:])) and "sm_90" in (one.targets or ("sm_90",)):
            try:
                rows.append(compile_variant(kernel, one, "sm_90") | {"function": kernel.function.split(":")[1]})
            except Exception as problem:
                rows.append({"kernel": kernel.name, "variant": one.name, "error": str(problem)})
print(json.dumps({"triton": triton.__version__, "rows": rows}))
"""


def test_what_a_launch_makes_of_a_variant_is_registered():
    names = {name: [one.name for one in kernel.variants("cuda")] for name, kernel in KERNELS.items()}
    tf32 = {name for name, found in names.items() if any(one.endswith("TF32") for one in found)}
    assert tf32 >= {
        "grouped_up",
        "grouped_mm",
        "grouped_hidden_bwd",
        "grouped_weight",
        "decode_up",
        "decode_down",
        "masked_hidden_bwd",
    }
    one_column = {name for name, found in names.items() if any(one.endswith("one column") for one in found)}
    assert one_column >= {"grouped_up", "grouped_mm"}
    for found in names.values():
        assert not found[0].endswith(FORMS)
    assert not any(one.name.endswith("TF32") for one in KERNELS["grouped_mm"].variants("hip"))


@pytest.mark.parametrize("which", [FORMS, pytest.param(("",), marks=pytest.mark.slow)], ids=["forms", "all"])
def test_variants_keep_to_registers(which):
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE, *which], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["rows"]) >= 12
    wrong = [
        row
        for row in report["rows"]
        if "error" in row
        or row["shared_bytes"] > row["shared_limit"]
        or row["spill_bytes"] > allowed_spill(row["function"], report["triton"])
    ]
    assert wrong == []
