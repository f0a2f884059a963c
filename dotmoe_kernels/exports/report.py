"""An exported model against the exact one: the figures, the check of everything but the routers, and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from .._checks import require
from ..evaluation import to_perplexity
from ..models.block import moe_blocks
from ..models.modeling import DotMoeForCausalLM
from .calibration import passes, router_hooks
from .stock import Architecture, target_blocks

_PARITY = 1e-3  # float32 rounding through some tens of layers stays below; another norm, scale or rotation does not
_PROBE = 256  # tokens a sequence, and sequences of 2, that parity is checked on
_ROWS = 128  # tokens whose logits are compared at a time


def _gates(model: DotMoeForCausalLM, target: Any, architecture: Architecture) -> dict[str, Any]:
    """The target's routers by our layers' names."""
    return {name: target.get_submodule(f"{path}.{architecture.gate}") for name, path in target_blocks(model, architecture).items()}


@torch.no_grad()
def parity(
    model: DotMoeForCausalLM, target: Any, architecture: Architecture, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """Largest difference of the logits, relative to the largest logit, when both take the experts and weights of the target's
    routers: what is left is everything else, and rounding.

    Both must be in float32 and layerwise, the target with its routers kept. Down projections are rounded as those that were folded
    in ``dtype``, once they are read. Tokens [N, S]; two sequences of at most 256 are enough.
    """
    tokens = tokens[:2, :_PROBE]
    gates, factor = _gates(model, target, architecture), architecture.factor(model)
    chosen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def force(name: str, gate: Any, x: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = gates[name](x)
        chosen[id(gates[name])] = (logits, weights, indices)
        return output[0], factor * weights.to(output[1].dtype), indices

    def fold(experts: Any, args: Any) -> None:
        for rows in experts.down_rows:  # of one expert, for the sake of memory
            rows.copy_((rows.to(dtype) * factor).float() / factor)

    handles = [block.experts.register_forward_pre_hook(fold) for block in moe_blocks(model).values()]
    handles += [gate.register_forward_hook(lambda gate, args, output: chosen.get(id(gate))) for gate in gates.values()]
    try:
        with router_hooks(model, force):
            exact = model(input_ids=tokens, use_cache=False).logits
        found = target(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return float((found - exact).abs().max() / exact.abs().max())


def require_parity(error: float, architecture: Architecture) -> None:
    """Raises ValueError where something besides the routers differs."""
    require(
        error <= _PARITY,  # NaN is not
        "architecture",
        f"{architecture.name!r}, which computes something else: with the same experts and weights logits differ by {error:.1e}",
        f"a relative difference of at most {_PARITY:g}",
    )


@torch.no_grad()
def router_figures(model: DotMoeForCausalLM, target: Any, architecture: Architecture, tokens: Tensor) -> dict[str, float]:
    """The target's routers on what the exact model's see: how far a weight is from 1, and how many tokens see another expert."""
    gates, factor = _gates(model, target, architecture), architecture.factor(model)
    most, total, count, swapped = 0.0, 0.0, 0, 0
    touched: dict[str, Tensor] = {}

    def compare(name: str, gate: Any, x: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> None:
        nonlocal most, total, count, swapped
        _, weights, indices = gates[name](x)
        error = (factor * weights.double() - 1).abs()
        differs = (indices.sort(dim=-1).values != output[2].sort(dim=-1).values).any(-1)  # [T]
        most, total, count = max(most, float(error.max())), total + float(error.sum()), count + error.numel()
        swapped += int(differs.sum())
        touched[name] = differs

    tokens_touched, decisions = 0, 0
    with router_hooks(model, compare):
        for batch in passes(tokens):
            model(input_ids=batch, use_cache=False)
            tokens_touched += int(torch.stack(list(touched.values())).any(0).sum())
            decisions += batch.numel() * len(touched)
    return {
        "gate_error": most,
        "gate_error_mean": total / count,
        "swapped": swapped / decisions,
        "tokens_swapped": tokens_touched / tokens.numel(),
    }


@torch.no_grad()
def logit_figures(model: DotMoeForCausalLM, target: Any, tokens: Tensor) -> dict[str, float]:
    """The target's logits against the exact model's, relative to the largest and to the mean square; KL in nats a token; and both
    perplexities."""
    most, scale, squares, wide, divergence, agree = 0.0, 0.0, 0.0, 0.0, 0.0, 0
    losses = [0.0, 0.0]
    for batch in passes(tokens):
        follows = torch.cat((batch[:, 1:], batch.new_full((len(batch), 1), -100)), 1)  # the token to be predicted, if any
        logits = (m(input_ids=batch, use_cache=False).logits.flatten(0, 1) for m in (model, target))
        parts = (rows.split(_ROWS) for rows in (*logits, follows.flatten()))
        for exact, found, labels in zip(*parts, strict=True):  # float32 of a whole pass would take gigabytes
            exact, found = exact.float(), found.float()
            error = found - exact
            # NaN must not get lost in max
            most, scale = max(float(error.abs().max().nan_to_num(math.inf)), most), max(scale, float(exact.abs().max()))
            squares, wide = squares + float(error.square().sum()), wide + float(exact.square().sum())
            p, q = exact.log_softmax(-1), found.log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            agree += int((exact.argmax(-1) == found.argmax(-1)).sum())
            for n, scores in enumerate((p, q)):
                losses[n] += float(nll_loss(scores, labels, reduction="sum"))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return {
        "logit_error": most / scale,
        "logit_error_rms": math.sqrt(squares / wide),
        "kl": max(0.0, divergence / tokens.numel()),
        "same_token": agree / tokens.numel(),
        "perplexity_exact": to_perplexity(losses[0] / predicted),
        "perplexity": to_perplexity(losses[1] / predicted),
    }


_WORDS = {
    "gate_error": "weight of an expert, largest distance from 1",
    "gate_error_mean": "and the mean",
    "swapped": "tokens with a swapped expert, mean of the layers",
    "tokens_swapped": "tokens with a swapped expert in any layer",
    "logit_error": "logits, largest error relative to the largest",
    "logit_error_rms": "and in the mean square",
    "kl": "KL from the exact model, nats a token",
    "same_token": "tokens whose likeliest next one is the same",
    "perplexity_exact": "perplexity, exact model",
    "perplexity": "perplexity, this model",
    "parity": "logits with the same experts and weights, float32",
}
_SHARES = ("swapped", "tokens_swapped", "same_token")


def report_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures in words, as (figure, value)."""
    fold, shifts = report["fold"], sorted(set(report["eps"].values()))
    exponents = f"2^-{shifts[0]}" if len(shifts) == 1 else f"2^-{shifts[-1]} to 2^-{shifts[0]}, by layer"
    how = "nothing" if fold["factor"] == 1 else f"{fold['factor']} into the down projections"
    rows = [
        ("architecture", report["architecture"]),
        ("why", report["reason"]),
        ("backbone", report["backbone"]),
        ("dtype", report["dtype"]),
        ("experts a layer and a token", f"{report['num_experts']}, {report['top_k']}"),
        ("eps, on the routers", exponents),
        ("folded", f"{how}: {'lossless' if fold['lossless'] else 'rounded'}"),
        ("measured on", f"{report['calibration']['tokens']:,} tokens of {report['calibration']['source']}"),
    ]
    figures = [(words, report[key], key) for key, words in _WORDS.items()]
    return rows + [(words, f"{value:.3%}" if key in _SHARES else f"{value:.4g}") for words, value, key in figures]


def stock_card(title: str, report: Mapping[str, Any]) -> str:
    """README.md of an exported folder."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in report_lines(report))
    folded = ", since K is folded into the weights" if 1 < report["fold"]["factor"] == report["top_k"] else ""
    text = (
        f"A {report['backbone']} model whose feed-forward neurons were partitioned into experts, written as "
        f"{report['architecture']}: a stock class of transformers, which loads it without further code. The exact model adds its "
        "experts with weight 1; the stock router's weights come close to that, by eps. Another number of experts a token takes "
        f"another export (`dotmoe export --top-k`){folded}."
    )
    use = 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
    return (
        f"---\nlibrary_name: transformers\ntags: [dotmoe, mixture-of-experts]\n---\n\n# {title}\n\n{text}\n\n"
        f"| figure | value |\n|---|---|\n{rows}\n\n"
        f"## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n{use}\n```\n"
    )
