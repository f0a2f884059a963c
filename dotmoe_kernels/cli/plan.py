"""`dotmoe plan`: the topologies that fit a dense model."""

from __future__ import annotations

import argparse
import json

from .inputs import reading, require_model_folder


def run_plan(args: argparse.Namespace) -> int:
    require_model_folder(args.model, weights=False)
    from ..conversion.dryrun import dense_config
    from ..conversion.plans import plan_lines, plan_topologies

    with reading(args.model):
        report = plan_topologies(dense_config(args.model, None), args.budget)
    if args.json:
        print(json.dumps({"model": args.model, **report}, indent=2))
        return 0
    for line in plan_lines(report):
        print(line)
    return 0
