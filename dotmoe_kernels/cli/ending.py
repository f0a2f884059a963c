"""The end of `dotmoe convert`: the model is saved, read again, checked, and its figures are printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import clear_run, clear_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..alignment.ranks import Ranks
    from ..models.config import DotMoeConfig


def failed(checks: dict[str, Any]) -> int:
    print(f"dotmoe convert: error: a self-check failed: {checks}", file=sys.stderr)
    return 1


def save_and_report(
    args: argparse.Namespace,
    job: Any,
    tokenizer: Any,
    held: Tensor,
    figures: dict[str, Any],
    dense: tuple[float | None, Tensor | None],
    measured: tuple[float, Any],
    output: Path,
    run: Path,
    ranks: Ranks,
) -> int:
    """``job``: of ``jobs``; ``held``: the text held out; ``dense``: perplexity and logits of the dense model; ``measured``: the
    sparse one's perplexity and the load of its experts."""
    from ..conversion import check_lines, count_parameters
    from ..evaluation import COLLAPSE, retention, unused_experts, unused_line

    (dense_perplexity, dense_logits), (value, counts) = dense, measured
    means, unused = counts.mean_active(), unused_experts(counts.slots)
    mean = sum(means.values()) / len(means)
    figures |= {"sparse perplexity": value, "active experts a token": round(mean, 4)}
    if unused:
        figures["unused experts"] = {name: f"{count} of {job.model.config.num_experts}" for name, count in unused.items()}
    job.save(output, tokenizer=tokenizer, overwrite=args.overwrite, card=figures)
    checks, model = job.check(dense_logits, held[:1], folder=output), job.model
    if not ranks.first:
        return 0
    total, active = count_parameters(model, means)
    for line in [*check_lines(checks), *_stage_lines(model.config)]:
        print(line)
    print(f"parameters: {total:,}, active a token {active:,} ({active / total:.1%}) at {mean:.2f} experts a token")
    if dense_perplexity is not None:
        kept = f"({retention(dense_perplexity, value):.1%} retained)"
        print(f"held-out perplexity: dense {dense_perplexity:.3f}, sparse {value:.3f} {kept}")
    if unused:
        print(f"dotmoe convert: warning: {unused_line(unused, counts.slots)} on the held-out text: {COLLAPSE}", file=sys.stderr)
    if not checks["passed"]:
        return failed(checks)
    clear_tokens(run)
    clear_run(run, logs=False)
    logs = [str(log) for log in (run / "log.jsonl", run / "finetune" / "log.jsonl") if log.is_file()]
    ending = f"; log of the training: {', '.join(logs)}" if logs else ""
    print(f"saved: {output}" + (ending if model.config.stages else "; nothing was trained (--steps 0)"))
    return 0


def _stage_lines(config: DotMoeConfig) -> list[str]:
    """What the stages beside the alignment reached."""
    lines, stages = [], config.stages or {}
    if "reconstruct" in stages:
        errors = stages["reconstruct"]["relative_error"]
        lines = ["reconstruct, relative error of an FFN's output on tokens held out:"]
        lines += [f"  {name:<28}{before:>8.3f} -> {after:.3f}" for name, (before, after) in errors.items()]
    for n, figures in enumerate(config.finetune_runs, 1):
        curves = sorted(
            ((key, ends) for key, ends in figures.items() if isinstance(ends, list)), key=lambda curve: curve[0] != "loss"
        )
        pairs = [f"{key} {ends[0]:.3f} -> {ends[1]:.3f}" for key, ends in curves]
        taught = [f"teacher {figures['teacher']}"] if "teacher" in figures else []
        lines.append(f"finetune, run {n}: {', '.join(pairs + taught)}")
    return lines
