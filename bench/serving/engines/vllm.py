"""vLLM: the exact form by its Transformers backend, a stock form by its own model."""

from __future__ import annotations

from typing import Any

import vllm
from vllm import LLM, SamplingParams


class Engine:
    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        self.model = LLM(
            folder,
            dtype=options["type"],
            trust_remote_code=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=640,
            max_num_seqs=8,
            max_logprobs=options["top"],
            seed=0,
        )

    def about(self) -> dict[str, Any]:
        return {"version": vllm.__version__}

    def _run(self, prompts: list[list[int]], **options: Any) -> list[Any]:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **options)
        return self.model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return [list(out.outputs[0].token_ids) for out in self._run(prompts, max_tokens=new)]

    def score(self, sequences: list[list[int]], start: int, top: int) -> list[list[dict[int, float]]]:
        outs = self._run(sequences, max_tokens=1, prompt_logprobs=top)
        return [[{t: p.logprob for t, p in one.items()} for one in out.prompt_logprobs[start:]] for out in outs]
