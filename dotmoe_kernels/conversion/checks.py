"""The checks that every conversion runs: equal to the dense model with every expert on, and nothing lost on the way to disk."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_indices
from ..alignment.sharding import is_divided
from ..models.block import DotMoeBlock, all_experts, moe_blocks
from ..models.checkpoint import load
from ..models.counts import count_parameters
from ..models.modeling import restore_dense

# largest relative error of the logits against the dense model's: the sums of a few dozen layers in another order
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=tokens.to(device), use_cache=False).logits
    finally:
        model.train(training)


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """max |a - b| / max |b|, in float64."""
    a, b = logits.detach().double().cpu(), reference.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def self_check(
    model: nn.Module,
    dense: Tensor | nn.Module | None,
    tokens: Tensor,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Check a converted model against the dense one.

    Args:
        model: the sparse model.
        dense: the dense model's logits on ``tokens`` [B, N, V] (taken before the conversion), or the dense model, or None to
            restore it from ``model``, unless several ranks divide its weights: then there is nothing to compare with.
        tokens: [B, N] int64.
        folder: where ``model`` was saved: loads it again and compares the logits.

    Returns:
        all_experts_error: relative error of the logits with every expert on, against the logits of ``against``, and ``tolerance``
            for the dtype; a model restored from one that was fine-tuned is not the dense one;
        permutation: every neuron_order is one; capacities: every expert has exactly s neurons, as config says;
        reload_equal, reload_error (with ``folder``): every tensor bit for bit, with the buffers that no file holds, and the
            relative error of the logits with every expert on (not 0 on a CPU: products differ with the alignment of a file's
            tensors);
        total_parameters, active_parameters; passed: whether all of it holds.

    Raises:
        ValueError: tokens or logits of a wrong shape, no DotMoeBlock in the model.
    """
    blocks = moe_blocks(model)
    require(bool(blocks), "model", f"a {type(model).__name__} without experts", "a converted model")
    require_indices(tokens, "tokens", 2, "[B, N]")
    tuned = dense is None and bool(getattr(model.config, "finetune_runs", None))
    apart = any(map(is_divided, model.parameters()))
    if dense is None and not apart:
        dense = restore_dense(model)  # type: ignore[arg-type]
    reference = dense if isinstance(dense, Tensor) or dense is None else _logits(dense, tokens)
    with all_experts(model):
        logits = _logits(model, tokens)
    given = None if reference is None else list(reference.shape)
    require(given is None or given == list(logits.shape), "dense", f"logits of shape {given}", f"[B, N, V] = {list(logits.shape)}")
    dtype = next(iter(blocks.values())).experts.gate_up_proj.dtype
    orders = [block.neuron_order.cpu() for block in blocks.values()]
    result: dict[str, Any] = {
        **({} if reference is None else {"all_experts_error": relative_error(logits, reference)}),
        "tolerance": TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]),
        "against": "a dense model of the fine-tuned weights" if tuned else "dense",
        "permutation": all(torch.equal(o.sort().values, torch.arange(o.numel())) for o in orders),
        "capacities": all(_has_exact_capacities(block, model.config) for block in blocks.values()),
    }
    passed = result.get("all_experts_error", 0.0) <= result["tolerance"] and result["permutation"] and result["capacities"]
    if folder is not None:
        again = load(folder, device=next(model.parameters()).device)
        with all_experts(again):
            result["reload_error"] = relative_error(_logits(again, tokens), logits)
        result["reload_equal"] = _same_tensors(model, again)
        passed = passed and result["reload_equal"] and result["reload_error"] <= result["tolerance"]
    result["total_parameters"], result["active_parameters"] = count_parameters(model)
    result["passed"] = bool(passed)
    return result


def _same_tensors(model: nn.Module, again: nn.Module) -> bool:
    """Parameters and buffers, after both models have seen the same tokens: some buffers follow the length."""
    ours, theirs = model.state_dict(), again.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[n], theirs[n]) for n in ours):
        return False
    buffers, others = (dict(m.named_buffers()) for m in (model, again))
    # a cast of the whole model also casts those that a load makes anew in their own dtype
    return buffers.keys() == others.keys() and all(torch.equal(b, others[n].to(b.dtype)) for n, b in buffers.items())


def _has_exact_capacities(block: DotMoeBlock, config: Any) -> bool:
    E, s = config.num_experts, config.moe_intermediate_size
    H = block.gate.weight.shape[1]
    shapes = [tuple(t.shape) for t in (block.experts.gate_up_proj, block.experts.down_proj, block.neuron_order)]
    return shapes == [(E, 2 * s, H), (E, H, s), (E * s,)]


def check_lines(checks: dict[str, Any]) -> list[str]:
    """The result of ``self_check`` in words, a line a check."""
    lines = []
    if "all_experts_error" in checks:
        error = f"relative error {checks['all_experts_error']:.1e} (allowed {checks['tolerance']:.0e})"
        lines.append(f"every expert on = {checks['against']}: {error}")
    lines.append(
        f"assignment: {'a permutation' if checks['permutation'] else 'NOT A PERMUTATION'}, "
        + ("exact capacities" if checks["capacities"] else "WRONG CAPACITIES")
    )
    if "reload_equal" in checks:
        lines.append(f"reloaded checkpoint: {'the same tensors' if checks['reload_equal'] else 'DIFFERENT TENSORS'}")
    return lines
