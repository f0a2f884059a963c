"""dot's model, and what it becomes when its weights train as well: from the dense model's distribution, or on the text alone.

Every tuned arm begins with dot's own aligned model, which the first that needs it leaves in the data folder:

    <data>/aligned/<mark>/, <mark>.jsonl        the model and the log of its alignment
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from dotmoe_kernels import DotMoeConfig, FinetuneConfig, convert, finetune, load, save
from dotmoe_kernels._files import write_file
from dotmoe_kernels.alignment.checkpoints import read_log
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.models.modeling import DotMoeForCausalLM

from .methods import Job, Made, Method
from .settings import Setting, Topology

LORA_RANK = 16
_DISTILLED = "DOT-MoE's alignment loss, arXiv 2606.01666, on every weight"


def _aligned_elsewhere(job: Job) -> Made:
    raise AssertionError("a tuned arm begins with an aligned model")


def tuned(options: dict[str, Any], longer: int = 0) -> list[Method]:
    """The arms of a setting with the options ``options`` of FinetuneConfig; one with so many times the steps, unless 0."""
    source, zero = _DISTILLED, "ZEDA, arXiv 2605.18643"

    def arm(name: str, about: str, source: str = source, **rest: Any) -> Method:
        return Method(name, "tuned", source, about, _aligned_elsewhere, tuning={**options, **rest})

    arms = [
        arm("dot-distilled", "dot, then every weight trained on the dense model's distribution"),
        arm("dot-text", "dot, then every weight trained on the text alone", "next-token cross-entropy", taught=False),
        arm("dot-adapters", f"dot, then adapters of rank {LORA_RANK}, distilled", lora_rank=LORA_RANK),
        arm("dot-zero", "dot-distilled with as many zero experts as experts", zero, zero=True),
    ]
    if longer:
        about = f"dot-distilled on {longer} times the tokens"
        arms.append(arm("dot-distilled-long", about, steps=longer * options["steps"]))
    return arms


def mark_of(depends: dict[str, Any]) -> str:
    """Of the aligned model that an arm begins with: what it depends on is what dot does."""
    of_dot = {key: value for key, value in depends.items() if key != "tuning"} | {"arm": "dot"}
    return hashlib.sha256(json.dumps(of_dot, sort_keys=True).encode()).hexdigest()[:16]


def aligned_model(
    setting: Setting, options: AlignmentConfig, mark: str, data: Path, progress: bool
) -> tuple[DotMoeForCausalLM, list[dict[str, float]]]:
    """dot's model of these options and the log of its alignment, from the data folder; made where they are not there."""
    folder, run = data / "aligned" / mark, data / "runs" / f"aligned-{mark}"
    log = folder.with_suffix(".jsonl")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another process may want the same one
        if not folder.exists():
            config = DotMoeConfig(num_experts=setting.plan.topology.num_experts, top_k=setting.plan.topology.top_k)
            shared: dict[str, Any] = {"data": setting.train, "alignment": options, "folder": run, "resume": True}
            model = convert(copy.deepcopy(setting.dense), config, **shared, progress=progress)
            written = (run / "log.jsonl").read_bytes()
            write_file(log, lambda file: file.write(written))
            save(model, folder)
            shutil.rmtree(run)
    return load(folder, device=setting.dense.device), read_log(log)


def options_of(arm: Method, topology: Topology, seed: int) -> tuple[FinetuneConfig, bool]:
    """The options, and whether the dense model teaches. Another seed than the alignment's: another order of the data."""
    given = {"taught": True, **(arm.tuning or {})}
    taught = given.pop("taught")
    if given.pop("zero", False):
        given["zero_experts"] = topology.num_experts
    return FinetuneConfig(seed=seed + 1, **given), taught


def tune(
    model: DotMoeForCausalLM, setting: Setting, arm: Method, seed: int, folder: Path, progress: bool
) -> tuple[list[dict[str, float]], int]:
    """Trains ``model`` in place, going on where ``folder`` says; the log, and the tokens of a step."""
    options, taught = options_of(arm, setting.plan.topology, seed)
    teacher = setting.dense if taught else None
    finetune(model, setting.train, options, teacher=teacher, folder=folder, resume=True, progress=progress)
    return read_log(folder / "log.jsonl"), options.batch_size * setting.train.shape[1]
