"""Transformers: the folder's own modelling file, or a stock class."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


class Engine:
    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        dtype = getattr(torch, options["type"])
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()

    def about(self) -> dict[str, Any]:
        return {"version": transformers.__version__}

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The ``new`` most probable tokens of each prompt, whatever ends a text; prompts of one length."""
        ids = torch.tensor(prompts)
        found: list[torch.Tensor] = []
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        for step in range(new):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(token)
            if step < new - 1:
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return torch.cat(found, 1).tolist()

    @torch.inference_mode()
    def score(self, sequences: list[list[int]], start: int, top: int) -> list[list[dict[int, float]]]:
        """Log-probabilities of the ``top`` tokens at each position from ``start`` on."""
        found = []
        for sequence in sequences:
            logits = self.model(torch.tensor([sequence]), use_cache=False).logits[0, start - 1 : -1].float()
            values, indices = torch.log_softmax(logits, -1).topk(top)
            found.append([dict(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)])
        return found
