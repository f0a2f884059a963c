"""The training loop: A and the router of all layers against the dense model's own output.

A step: plans and assignments of all layers; for every micro-batch a dense pass (teacher), a sparse pass and a backward pass, of
the backbone alone where the head is a known one; one backward pass through Sinkhorn; AdamW. Everything else is frozen. The
same seed and data give the same run, and a resumed run equals an uninterrupted one bit for bit on CPU.

On a GPU a step is queued whole up to AdamW; then the host waits once, for all the numbers of the step together, so that a loss or a
gradient that is not finite moves nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checks import require, require_indices
from .checkpoints import last_checkpoint, load_checkpoint, save_checkpoint, truncate_log
from .config import SOFT_OPTIONS, AlignmentConfig
from .head import find_head
from .losses import alignment_losses
from .module import AlignmentFFN, all_experts
from .schedule import learning_rate, shuffled_rows
from .soft import BudgetState, SoftRouting
from .transport import Transport

_TERMS = ("loss", "kl", "ce", "z", "balance", "grad_norm")
_PROBE = 16  # tokens on which the head is compared with the model's logits


class AlignmentResult(NamedTuple):
    """What a run leaves besides the layers' own parameters and assignments."""

    steps: int
    seconds: float
    log: list[dict[str, float]]  # one entry a step of this call
    budgets: BudgetState | None = None  # of the soft router


def _fetch(values: dict[str, Tensor]) -> dict[str, float]:
    """Numbers [] on the device -> on the host, in one transfer."""
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


def _source(layers: dict[str, AlignmentFFN], loss_is_finite: bool) -> str:
    """Where the first non-finite value arose, for the error message: forward from the first layer, backward from the last."""
    for name, layer in layers.items():
        if layer.finite is not None and not bool(layer.finite):
            return f"layer {name}"
    if loss_is_finite:
        for name, layer in reversed(layers.items()):
            gradients = [p.grad for p in (layer.affinity, layer.router_weight) if p is not None and p.grad is not None]
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                return f"layer {name}"
    return "the output head (every FFN is finite)"


def align(
    model: nn.Module,
    layers: dict[str, AlignmentFFN],
    data: Tensor,
    config: AlignmentConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    label: str = "align",
    fingerprint: dict[str, Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> AlignmentResult:
    """Trains the affinities and routers of ``layers`` in place, and leaves their final assignments in ``expert_of``.

    Args:
        model: a causal LM whose FFNs are ``layers``; called as model(input_ids=..., use_cache=False).logits, or in its parts (see
            ``find_head``). Put into eval mode.
        layers: the FFNs by name. A layer without an affinity keeps its assignment and trains its router alone.
        data: [N, S] int64 packed token sequences.
        config: the options.
        folder: where checkpoints (``checkpoints/``) and the log (``log.jsonl``, a line a step) go. None: nowhere.
        resume: continue from the newest checkpoint in ``folder`` (from the start if there is none).
        progress: show a bar with the loss terms and the time left.
        fingerprint: what else must agree with a checkpoint that is resumed.
        on_step: called with the number of steps done after each.

    Returns:
        AlignmentResult.

    Raises:
        ValueError: data of a wrong shape or dtype, or a checkpoint of a run with other options.
        FloatingPointError: a non-finite loss or gradient; names the step, the layer and the last good checkpoint.

    Source: section 3 of DOT-MoE (arXiv 2606.01666).
    """
    require_indices(data, "data", 2, "[N, S]")
    require(data.shape[0] >= 1 and data.shape[1] >= 2, "data", f"of shape {list(data.shape)}", "sequences of at least 2 tokens")
    require(len(layers) >= 1, "layers", "empty", "at least one FFN")
    device = next(iter(layers.values())).router_weight.device
    model.eval().requires_grad_(False)
    routers = [layer.router_weight.requires_grad_() for layer in layers.values()]
    affinities = [layer.affinity.requires_grad_() for layer in layers.values() if layer.affinity is not None]
    groups = [{"params": routers, "lr": 0.0, "peak": config.router_lr}]
    if affinities:
        groups.append({"params": affinities, "lr": 0.0, "peak": config.affinity_lr})
    soft = SoftRouting(layers, config) if any(layer.router == "soft" for layer in layers.values()) else None
    budgets = [] if soft is None else list(soft.budgets.parameters())
    if budgets:
        groups.append({"params": budgets, "lr": 0.0, "peak": config.budget_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    with all_experts(layers):
        head = find_head(model, data[:1, :_PROBE].to(device))
    if head is None:
        warnings.warn(
            f"the logits of {type(model).__name__} are not its output embedding of the backbone's last hidden state, scaled or "
            "capped as the config says: the loss takes the whole logits of both passes, which costs memory and time",
            stacklevel=2,
        )

    def outputs(input_ids: Tensor) -> Tensor:
        """The last hidden states [B, N, H] if the head is known, else the logits [B, N, V]."""
        return model(input_ids=input_ids, use_cache=False).logits if head is None else head.hidden(input_ids)

    transport = Transport(layers, config)
    trained = [*routers, *affinities, *budgets]

    options = {k: v for k, v in dataclasses.asdict(config).items() if soft is not None or k not in SOFT_OPTIONS}
    marks = {**options, "data": list(data.shape), "layers": list(layers), **(fingerprint or {})}
    marks = json.loads(json.dumps(marks))
    checkpoints = None if folder is None else Path(folder) / "checkpoints"
    log_path = None if folder is None else Path(folder) / "log.jsonl"
    first, last_good = 0, "none"
    found = last_checkpoint(checkpoints) if resume and checkpoints is not None else None
    if found is not None:
        state = load_checkpoint(found, marks)
        first, last_good = state["step"], str(found)
        with torch.no_grad():
            for parameter, value in zip(trained, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        transport.tau, transport.log_v = state["tau"], {k: v.to(device) for k, v in state["log_v"].items()}
        for name, expert_of in state["assignment"].items():
            layers[name].expert_of = expert_of.to(device)
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        truncate_log(log_path, first if found is not None else 0)

    def checkpoint(step: int) -> str:
        assert checkpoints is not None
        state = {
            "step": step,
            "fingerprint": marks,
            "parameters": [p.detach().clone() for p in trained],
            "optimizer": optimizer.state_dict(),
            "tau": transport.tau,
            "log_v": transport.log_v,
            "assignment": {name: layer.expert_of for name, layer in layers.items() if layer.affinity is not None},
        }
        return str(save_checkpoint(checkpoints, step, state))

    begin, log = time.monotonic(), []
    bar = tqdm(total=config.steps, initial=first, desc=label, disable=not progress, dynamic_ncols=True)
    with bar:
        for step in range(first, config.steps):
            tau = config.tau(step)
            numbers = transport.refresh(tau, rounding=step % config.refresh_every == 0)
            budget = None if soft is None else soft.refresh(step)
            share = learning_rate(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
            optimizer.zero_grad(set_to_none=True)
            for layer in layers.values():
                layer.finite = None
            batch = shuffled_rows(data, step, config.batch_size, config.seed).to(device, non_blocking=True)
            sums = torch.zeros(5, device=device)
            for micro in batch.split(config.micro_batch_size or config.batch_size):
                with torch.no_grad(), all_experts(layers):
                    teacher = outputs(micro)
                losses = alignment_losses(teacher, outputs(micro), micro, layers, config, head=head)
                weight = len(micro) / len(batch)
                (losses.total * weight).backward()
                if soft is not None:
                    soft.observe(weight)
                sums += torch.stack([term.detach().float() for term in losses]) * weight
            transport.backward()
            if soft is not None:
                soft.backward()
            norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            numbers |= dict(zip(_TERMS, [*sums, norm], strict=True)) | ({} if soft is None else soft.log())
            values = _fetch(numbers)
            if not all(math.isfinite(values[name]) for name in _TERMS):
                terms = ", ".join(f"{name.removeprefix('grad_')} {values[name]:.4g}" for name in _TERMS)
                where = _source(layers, all(math.isfinite(values[name]) for name in _TERMS[:-1]))
                raise FloatingPointError(
                    f"non-finite loss or gradient at step {step + 1} in {where} ({terms}); last good checkpoint: {last_good}"
                )
            nn.utils.clip_grads_with_norm_(trained, config.clip, norm)
            optimizer.step()
            entry = {"step": step + 1, "tau": tau, **values, **({} if budget is None else budget.log())}
            if "sinkhorn_iters" in entry:
                entry["sinkhorn_iters"] = int(entry["sinkhorn_iters"])
            entry |= {"lr": share * config.router_lr, "seconds": time.monotonic() - begin}
            log.append(entry)
            if log_path is not None:
                with log_path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            done = step + 1
            if checkpoints is not None and (
                done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0)
            ):
                last_good = checkpoint(done)
            shown = {name: f"{values[name]:.3f}" for name in ("loss", "kl", "ce")}
            bar.set_postfix(shown, tau=f"{tau:.2f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(done)
    last = max(config.steps - 1, 0)
    transport.refresh(config.tau(last))  # the assignment and the budgets after the last update
    reached = None if soft is None else soft.refresh(last)
    for layer in layers.values():
        layer.plan = layer.routing = None
    return AlignmentResult(config.steps, time.monotonic() - begin, log, reached)
