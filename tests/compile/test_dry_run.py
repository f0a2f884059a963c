"""Every public op, forward and backward, through Triton's real JIT at the sizes of real models: ``dry_run.py``, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from known import allowed_spill

from dotmoe_kernels import _backend

pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
OPS = {  # a kernel that each of them must have launched
    "sinkhorn": (
        "_sinkhorn_persistent_kernel",
        "_sinkhorn_step_kernel",
        "_sinkhorn_plan_kernel",
        "_sinkhorn_adjoint_step_kernel",
        "_sinkhorn_apply_kernel",
    ),
    "balanced_assignment": ("_deferred_acceptance_kernel",),
    "route_top_k": ("_route_top_k_kernel", "_route_top_k_backward_kernel"),
    "route_soft_top_k": ("_route_soft_top_k_kernel", "_route_soft_top_k_backward_kernel"),
    "soft_top_k": ("_soft_top_k_kernel", "_soft_top_k_backward_kernel"),
    "dispatch_tokens": ("_dispatch_place_kernel",),
    "scatter_tokens": ("_scatter_rows_kernel",),
    "gather_tokens": ("_gather_rows_kernel", "_gather_rows_bwd_kernel"),
    "grouped_mm": ("_grouped_mm_kernel", "_grouped_weight_kernel"),
    "expert_ffn": ("_decode_up_kernel", "_decode_down_kernel", "_masked_hidden_kernel", "_grouped_hidden_bwd_kernel"),
    "masked_ffn": ("_slots_soft_kernel", "_masked_hidden_bwd_kernel", "_plan_gradient_kernel"),
}


@pytest.mark.parametrize("how", ["one binary a kernel", pytest.param("every binary", marks=pytest.mark.slow)])
def test_every_op_compiles_at_real_sizes(how, tmp_path):
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("dry_run.py")), str(tmp_path)]
    more = ["--all", "--jobs", str(os.cpu_count())] if how == "every binary" else []
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["wrong"] == []
    for op, kernels in OPS.items():
        assert set(kernels) <= set(report["binaries"]), op
    assert len(report["compiled"]) == (sum(report["binaries"].values()) if more else len(report["binaries"]))
    wrong = [row for row in report["compiled"] if "error" in row]
    for row in report["compiled"]:
        if row not in wrong and (
            row["spill_bytes"] > allowed_spill(row["kernel"], report["triton"]) or row["shared_bytes"] > report["shared_limit"]
        ):
            wrong.append(row)
    assert wrong == []
