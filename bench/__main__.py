"""Record: run the benches and keep the result.

    python -m bench [PYTEST ARGUMENT ...]

writes ``bench/results/<machine>/<date>-<commit>.json`` with its table and figure. Without arguments it runs everything;
``python -m bench -k rounding`` runs a part, ``python -m bench bench/bench_experts.py --backward`` a file's backward passes. The
quick variants run only where ``-k`` asks for them. Parts of one commit on one day go into one file: a group that is measured again
replaces the earlier one.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

import pytest

from bench import machine, report


def chosen(arguments: list[str]) -> list[str]:
    """What pytest gets: all of bench/ unless a file is named, and not the quick variants: of two -k it takes the last."""
    named = any(one.split("::")[0].endswith(".py") for one in arguments)
    return [*([] if named else [str(machine.ROOT / "bench")]), "-k", "not quick", *arguments]


def join(path: Path, draft: Path) -> None:
    """The draft takes the place of ``path`` and keeps that one's other groups; each file is whole at every moment."""
    result = json.loads(draft.read_text())
    if path.exists():
        measured = {one["group"] for one in result["benchmarks"]}
        earlier = json.loads(path.read_text())["benchmarks"]
        result["benchmarks"] = [one for one in earlier if one["group"] not in measured] + result["benchmarks"]
    with draft.open("w") as file:
        json.dump(result, file, indent=4)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def main(arguments: list[str]) -> int:
    name = f"{datetime.date.today().isoformat()}-{machine.commit()}"
    folder = machine.RESULTS / machine.machine_name()
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / f"{name}.json"
    draft = path.with_suffix(".part")
    code = int(pytest.main([f"--rootdir={machine.ROOT}", f"--benchmark-json={draft}", *chosen(arguments)]))
    if draft.exists() and draft.stat().st_size:
        if code == 0:
            join(path, draft)
            for written in (path, *report.write(path)):
                print(written.relative_to(machine.ROOT))
        else:
            print(f"some benches failed: the times of the others are in {draft.relative_to(machine.ROOT)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
