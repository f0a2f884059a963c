"""Importing the package is cheap and has no side effects."""

import json
import os
import subprocess
import sys

import pytest

import dotmoe_kernels as dk

NAMES = [
    "sinkhorn",
    "balanced_assignment",
    "neuron_order",
    "straight_through",
    "route_top_k",
    "soft_top_k",
    "route_soft_top_k",
    "dispatch_tokens",
    "scatter_tokens",
    "gather_tokens",
    "grouped_mm",
    "expert_ffn",
    "masked_ffn",
]


def fresh(code):
    """What ``code`` prints as JSON in an interpreter of its own, with no GPU and no interpreted kernels."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_public_name(name):
    assert name in dir(dk)
    function = getattr(dk, name)
    assert callable(function)
    assert function.__doc__, "a public function documents itself"


def test_typed():
    assert os.path.exists(os.path.join(os.path.dirname(dk.__file__), "py.typed"))


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        dk.no_such_name  # noqa: B018


def test_import_leaves_the_heavy_packages_alone():
    code = """
import json, sys, torch
before = set(sys.modules)
import dotmoe_kernels as dk
dir(dk), dk.sinkhorn, dk.expert_ffn
print(json.dumps(sorted({m.split(".")[0] for m in set(sys.modules) - before})))
"""
    loaded = fresh(code)
    assert "dotmoe_kernels" in loaded
    assert not {"transformers", "datasets", "safetensors", "accelerate", "pyarrow", "matplotlib", "tqdm"} & set(loaded)


def test_import_has_no_side_effects():
    code = """
import json, os, random, sys, warnings, torch
def state():
    return {
        "environment": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch seed": torch.initial_seed(),
        "random": hash(random.getstate()),
        "hooks": [str(sys.excepthook), str(warnings.showwarning)],
        "path": sys.path,
        "cuda": torch.cuda.is_initialized(),
    }
torch.manual_seed(0); random.seed(0)
before = state()
import dotmoe_kernels
print(json.dumps([before, state()]))
"""
    before, after = fresh(code)
    assert before == after


def test_import_is_fast():
    """At most half a second on top of torch; of CPU time, the best of three, since a busy machine only adds."""
    code = """
import json, time, torch
start = time.process_time()
import dotmoe_kernels
print(json.dumps(time.process_time() - start))
"""
    assert min(fresh(code) for _ in range(3)) < 0.5
