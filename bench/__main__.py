"""Record: run the benches and keep the result.

    python -m bench [PYTEST ARGUMENT ...]

writes ``bench/results/<machine>/<date>-<commit>.json`` with its table and figure. Without arguments it runs everything but the
quick variants; ``python -m bench -k rounding`` runs a part.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest

from bench import machine, report


def main(arguments: list[str]) -> int:
    name = f"{datetime.date.today().isoformat()}-{machine.commit()}"
    folder = machine.RESULTS / machine.machine_name()
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / f"{name}.json"
    draft = path.with_suffix(".part")
    chosen = arguments or ["-k", "not quick"]
    code = int(pytest.main([str(machine.ROOT / "bench"), f"--rootdir={machine.ROOT}", f"--benchmark-json={draft}", *chosen]))
    if draft.exists() and draft.stat().st_size:
        if code == 0:
            draft.replace(path)
            for written in (path, *report.write(path)):
                print(written.relative_to(machine.ROOT))
        else:
            print(f"some benches failed: the times of the others are in {draft.relative_to(machine.ROOT)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
