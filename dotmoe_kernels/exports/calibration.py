"""eps = 2^-m, one a layer, from what the routers see: too large bends the weights, too small ties scores and swaps experts.

Both are one number, the distance of the stock router's weights w [T, E] from the exact ones, K ones a token:

    d(m)^2 = mean over tokens of |w(m) - 1_selected|^2 / K

A bent weight adds its error's square, a swapped expert 2 / K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.block import moe_blocks
from ..models.modeling import DotMoeForCausalLM

SHIFTS = range(0, 25)  # beyond 2^-24 every score is the same in float32
_SEQUENCES, _LENGTH = 8, 128  # of the model's own samples
_PASS = 1024  # tokens of a forward pass


def passes(tokens: Tensor) -> tuple[Tensor, ...]:
    """Tokens [N, S] by forward passes."""
    return tokens.split(max(1, _PASS // tokens.shape[1]))


def own_samples(model: DotMoeForCausalLM, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Sequences [8, N] that the model draws itself, N at most 128; each begins with another token where it has no first one."""
    text = model.config.get_text_config()
    length = min(_LENGTH, text.max_position_embeddings)
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(text.vocab_size, (_SEQUENCES, 1), generator=draw)
    if isinstance(text.bos_token_id, int):
        start[:] = text.bos_token_id
    generator: Any = model
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        return generator.generate(
            start.to(device), do_sample=True, top_k=0, min_new_tokens=length - 1, max_new_tokens=length - 1, eos_token_id=None
        )


@contextmanager
def router_hooks(model: nn.Module, hook: Callable[[str, Any, Tensor, Any], Any]) -> Iterator[None]:
    """Inside, ``hook(layer, gate, x, output)`` follows every router; what it returns, unless None, replaces the output."""
    handles = [
        block.gate.register_forward_hook(lambda gate, args, output, name=name: hook(name, gate, args[0], output))
        for name, block in moe_blocks(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stock_weights(x: Tensor, weight: Tensor, top_k: int, scores: str) -> tuple[Tensor, Tensor]:
    """(weights, indices) [T, K] of a stock router, its weights as they are after the fold; ``scores`` as in the table.

    Every engine selects by the scores of all experts in float32, also where transformers' class selects by the logits.
    """
    if scores == "sigmoid":
        values, indices = torch.sigmoid(x.float() @ weight.float().T).topk(top_k, dim=-1)
        return 2 * values, indices
    values, indices = torch.softmax((x @ weight.T).float(), dim=-1).topk(top_k, dim=-1)
    return (weight.shape[0] * values if scores == "all" else top_k * values / values.sum(-1, keepdim=True)), indices


def _squared_distance(weights: Tensor, indices: Tensor, exact: Tensor, num_experts: int) -> float:
    """Sum over tokens of |w - 1_selected|^2 / K."""
    wide = torch.zeros(len(indices), num_experts, dtype=torch.float64, device=indices.device)
    wide.scatter_(1, exact, -1.0)
    wide.scatter_add_(1, indices, weights.double())
    return float(wide.square().sum()) / indices.shape[-1]


@torch.no_grad()
def choose_shifts(model: DotMoeForCausalLM, tokens: Tensor, scores: str) -> dict[str, int]:
    """m of every layer, by path: the one of least distance over ``tokens`` [N, S], on the device of the layers."""
    sums = {name: [0.0] * len(SHIFTS) for name in moe_blocks(model)}

    def hook(name: str, gate: Any, x: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> None:
        for place, shift in enumerate(SHIFTS):
            found = stock_weights(x, gate.weight * 2.0**-shift, gate.top_k, scores)
            sums[name][place] += _squared_distance(*found, output[2], gate.num_experts)

    with router_hooks(model, hook):
        for batch in passes(tokens):
            model(input_ids=batch, use_cache=False)
    return {name: SHIFTS[min(range(len(found)), key=found.__getitem__)] for name, found in sums.items()}
