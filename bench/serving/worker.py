"""One model in one engine: `ENVIRONMENT/bin/python worker.py ENGINE FOLDER OPTIONS` answers JSON lines from stdin on stdout.

{"do": "generate", "prompts": ids, "new": n} -> token ids    {"do": "about"} -> version and more
{"do": "score", "sequences": ids, "start": n, "top": n} -> log-probabilities

Run by its path, so that the project is not importable: an exact model must then load from its folder alone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main(name: str, folder: str, options: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print on stdout
    engine = importlib.import_module(f"engines.{name}").Engine(folder, json.loads(options))
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(engine, request.pop("do"))(**request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
