"""A cheap start for the alignment: A and the router of one layer at a time, against the dense FFN's own output.

    minimise  mean |Y^ - Y|^2 / mean |Y|^2 + z mean(logsumexp(Z)^2) + balance E <load, mean Q>

over X, what enters the FFN in the dense model; Y the dense output and Y^ the masked one (eq. 4), with the straight-through
gradients of the alignment. Nothing passes through the rest of the model, so that a step costs one FFN, not all layers and the head.
Several ranks take the layers in turn. Where the weights are divided over them, all collect the inputs together, each those of its
own layers, and each has the weights of one layer as long as it trains it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checks import is_integer, require, require_indices
from ..evaluation import reconstruction_error
from .checkpoints import BrokenCheckpoint, resume_from, save_checkpoint
from .config import SOFT_OPTIONS, AlignmentConfig
from .module import AlignmentFFN, all_experts, centred_routers, collect_inputs
from .ranks import Ranks, find_ranks
from .schedule import learning_rate, shuffled_rows
from .sharding import is_divided, whole_layer
from .soft import SoftRouting
from .stopping import Stop, Stopped, stopped
from .transport import Transport

_MEMORY = 1 << 30  # bytes of inputs that are held at a time, but for one layer's, which always are
_ROWS = 4096  # tokens of a pass without gradients
_UNREAD = ("steps", "micro_batch_size", "kl", "ce", "hidden", "budget_lr", "checkpoint_every")  # of AlignmentConfig


class ReconstructionResult(NamedTuple):
    """What a run leaves besides the layers' own parameters and assignments."""

    steps: int  # of each layer
    tokens: int  # that it trained on
    seconds: float
    errors: dict[str, tuple[float, float]]  # |Y^ - Y| / |Y| before and after, by layer, on tokens held out


class _Place(NamedTuple):
    """Where a layer that is done goes, or one that is begun if the training is asked to stop."""

    folder: Path | None
    marks: dict[str, Any]

    def read(self) -> dict[str, Any] | None:
        try:
            found = None if self.folder is None else resume_from(self.folder, self.marks)
        except BrokenCheckpoint as error:
            warnings.warn(f"{error}; the layer is trained anew", stacklevel=3)
            return None
        return None if found is None else found[1]

    def write(self, step: int, state: dict[str, Any]) -> Path | None:
        return None if self.folder is None else save_checkpoint(self.folder, step, {"fingerprint": self.marks, **state})

    def write_done(self, step: int, layer: AlignmentFFN, errors: tuple[float, float]) -> Path | None:
        affinity = None if layer.affinity is None else layer.affinity.detach()
        state = {"router_weight": layer.router_weight.detach(), "affinity": affinity, "expert_of": layer.expert_of}
        return self.write(step, {**state, "errors": errors})


@torch.no_grad()
def _outputs(layer: AlignmentFFN, x: Tensor) -> Tensor:
    return torch.cat([layer(rows) for rows in x.split(_ROWS)])


def _dense_outputs(name: str, layer: AlignmentFFN, x: Tensor) -> Tensor:
    with all_experts({name: layer}):
        return _outputs(layer, x)


def _inputs(
    model: nn.Module, layers: dict[str, AlignmentFFN], names: list[str | None], tokens: Tensor
) -> Iterator[tuple[str | None, Tensor | None]]:
    """(name, [T, H]) of the layers in ``names``, collected for as many of them at a time as ``_MEMORY`` holds. None: of no layer,
    while the other ranks collect."""
    batch_size = max(1, _ROWS // tokens.shape[1])
    todo, weight = list(names), next(iter(layers.values())).gate_proj
    count = max(1, _MEMORY // (tokens.numel() * weight.shape[1] * weight.element_size()))
    while todo:
        group, todo = todo[:count], todo[count:]
        with all_experts(layers):
            wanted = {name: layers[name] for name in group if name is not None}
            found = collect_inputs(model, wanted, tokens, batch_size=batch_size)
        for name in group:
            yield name, None if name is None else found.pop(name)


def _fit(
    name: str,
    layer: AlignmentFFN,
    x: Tensor,
    held: Tensor,
    config: AlignmentConfig,
    batch_tokens: int,
    bar: Any,
    place: _Place,
    begun: dict[str, Any] | None,
    stop: Stop,
) -> tuple[float, float]:
    """Trains one layer on x [T, H], from the state ``begun`` on if any; its relative error on ``held`` before and after."""
    y, y_held = _dense_outputs(name, layer, x), _dense_outputs(name, layer, held)
    scale = y.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    alone = {name: layer}
    transport = Transport(alone, config)
    soft = SoftRouting(alone, config) if layer.router == "soft" else None  # one layer's share of the budget is all of it: k = K
    groups = [{"params": [layer.router_weight.requires_grad_()], "lr": 0.0, "peak": config.router_rate}]
    if layer.affinity is not None:
        groups.append({"params": [layer.affinity.requires_grad_()], "lr": 0.0, "peak": config.affinity_lr})
    trained = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)

    def refresh(step: int, rounding: bool = True) -> None:
        transport.refresh(config.tau(step), rounding=rounding)
        if soft is not None:
            soft.refresh(step)

    def error() -> float:
        return reconstruction_error(y_held, _outputs(layer, held))

    rows = torch.arange(len(x), device=x.device)
    first = 0
    if begun is None:
        refresh(0)
        before = error()
    else:
        first, before, layer.expert_of = begun["step"], begun["before"], begun["expert_of"].to(x.device)
        with torch.no_grad():
            for parameter, value in zip(trained, begun["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(begun["optimizer"])
        transport.tau = begun["tau"]
        transport.log_v = {key: value.to(x.device) for key, value in begun["log_v"].items()}
    for step in range(first, config.steps):
        refresh(step, rounding=step % config.refresh_every == 0)
        share = learning_rate(step, config.steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        optimizer.zero_grad(set_to_none=True)
        batch = shuffled_rows(rows, step, batch_tokens, config.seed)
        loss = (layer(x[batch]).float() - y[batch].float()).square().mean() / scale
        assert layer.routing is not None
        (loss + config.z * layer.routing.z_loss + config.balance * layer.routing.balance_loss).backward()
        transport.backward()
        norm = nn.utils.clip_grad_norm_(trained, config.clip)
        values = (float(loss.detach()), float(norm))
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f"non-finite loss or gradient at step {step + 1} of the reconstruction in layer {name} (loss {values[0]:.4g}, "
                f"norm {values[1]:.4g}); the layers before it are kept"
            )
        optimizer.step()
        bar.set_postfix(layer=name, error=f"{math.sqrt(values[0]):.3f}", refresh=False)
        bar.update()
        if stop.asked and step + 1 < config.steps:
            state: dict[str, Any] = {"step": step + 1, "before": before, "expert_of": layer.expert_of, "tau": transport.tau}
            state |= {"parameters": [p.detach() for p in trained], "log_v": transport.log_v, "optimizer": optimizer.state_dict()}
            raise stopped(f"reconstruct of layer {name}", step + 1, config.steps, place.write(step + 1, state))
    refresh(max(config.steps - 1, 0))  # the assignment after the last update
    after = error()
    optimizer.zero_grad(set_to_none=True)
    layer.plan = layer.routing = layer.finite = None
    return before, after


def _take_over(
    layers: dict[str, AlignmentFFN], places: dict[str, _Place]
) -> tuple[dict[str, tuple[float, float]], dict[str, dict[str, Any]]]:
    """The errors of the layers that are done, which get what they learned, and the states of those that are begun."""
    errors: dict[str, tuple[float, float]] = {}
    begun: dict[str, Any] = {}
    for name, place in places.items():
        state, layer = place.read(), layers[name]
        if state is not None and "errors" not in state:
            begun[name] = state
        elif state is not None:
            with torch.no_grad():
                layer.router_weight.copy_(state["router_weight"])
                if layer.affinity is not None:
                    layer.affinity.copy_(state["affinity"])
            layer.expert_of = state["expert_of"].to(layer.router_weight.device)
            errors[name] = tuple(state["errors"])
    return errors, begun


def _deal(todo: list[str], ranks: Ranks, divided: bool) -> tuple[list[list[str]], list[str | None]]:
    """Layers by turn, one for each rank while there are enough; and those of this rank, where weights are divided None as well."""
    turns = [todo[n : n + ranks.count] for n in range(0, len(todo), ranks.count)]
    own = [turn[ranks.rank] if ranks.rank < len(turn) else None for turn in turns]
    return turns, [name for name in own if divided or name is not None]


def _own_layer(layers: dict[str, AlignmentFFN], turn: list[str], own: str | None) -> AlignmentFFN | None:
    """Of the layers of a turn, one a rank, this rank's, with all of its weights. All ranks."""
    found = None
    for name in turn:
        layer = whole_layer(layers[name])
        found = layer if name == own else found
        del layer  # before the next one is gathered
    return found


def _share(ranks: Ranks, layers: dict[str, AlignmentFFN], errors: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Gives all ranks what each has made of its layers, and returns the errors of all."""
    found = {}
    for n, (name, layer) in enumerate(layers.items()):
        owner = n % ranks.count
        if layer.expert_of is None:
            layer.expert_of = torch.zeros(len(layer.gate_proj), dtype=torch.int64, device=layer.router_weight.device)
        ranks.agree([layer.router_weight, layer.affinity, layer.expert_of], owner)
        found[name] = ranks.tell(errors.get(name, (0.0, 0.0)), owner)
    return found


def reconstruct(
    model: nn.Module,
    layers: dict[str, AlignmentFFN],
    data: Tensor,
    config: AlignmentConfig,
    *,
    tokens: int = 65536,
    batch_tokens: int = 1024,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    label: str = "reconstruct",
    fingerprint: dict[str, Any] | None = None,
    stop: Stop | None = None,
) -> ReconstructionResult:
    """Trains the affinity and the router of one layer after the other in place, and leaves the assignments in ``expert_of``.

    Args:
        model: a causal LM whose FFNs are ``layers``; called as model(input_ids=..., use_cache=False). Put into eval mode.
        layers: the FFNs by name. A layer without an affinity keeps its assignment and trains its router alone.
        data: [N, S] int64 packed token sequences.
        config: the options; ``steps`` are those of each layer, and what the joint training alone needs is not read.
        tokens: the most that are collected, from the beginning of ``data``; a sixteenth of them, at least one sequence where there
            are two, is held out for the errors. The inputs of all layers are never held at once.
        batch_tokens: tokens a step.
        folder: where a layer that is done goes, one file each. None: nowhere.
        resume: take over the layers that are done in ``folder``.
        progress: show a bar.
        fingerprint: what else must agree with a layer that is taken over.
        stop: looked at once a step.

    Returns:
        ReconstructionResult.

    Raises:
        ValueError: data of a wrong shape or dtype, tokens or batch_tokens below 1, a layer of a run with other options.
        FloatingPointError: a non-finite loss or gradient; names the step and the layer.
        Stopped: ``stop`` asked for it; the layers that are done are in ``folder``, and the one that is begun.
    """
    require_indices(data, "data", 2, "[N, S]")
    require(data.shape[0] >= 1 and data.shape[1] >= 1, "data", f"of shape {list(data.shape)}", "at least one token")
    require(len(layers) >= 1, "layers", "empty", "at least one FFN")
    for name, value in (("tokens", tokens), ("batch_tokens", batch_tokens)):
        require(is_integer(value) and value >= 1, name, value, "an integer of at least 1")
    model.eval().requires_grad_(False)
    device = next(iter(layers.values())).router_weight.device
    sequences = data[: max(1, tokens // data.shape[1])].long().to(device)
    keep = max(1, len(sequences) // 16) if len(sequences) > 1 else 0
    cut = (len(sequences) - keep) * data.shape[1]

    soft = any(layer.router == "soft" for layer in layers.values())
    unread = _UNREAD + (() if soft else SOFT_OPTIONS)
    options = {key: value for key, value in dataclasses.asdict(config).items() if key not in unread}
    marks = {**(fingerprint or {}), "reconstruct_steps": config.steps, **options}
    marks |= {"batch_tokens": batch_tokens, "layers": list(layers)}
    marks = json.loads(json.dumps({**marks, "sequences": list(sequences.shape)}))
    folders = [None if folder is None else Path(folder) / f"layer-{n:04d}" for n in range(len(layers))]
    places = {name: _Place(place, marks) for name, place in zip(layers, folders, strict=True)}

    errors, begun = _take_over(layers, places if resume else {})
    begin, ranks = time.monotonic(), find_ranks(device)
    ranks.wait()  # until all have seen the same layers done
    todo = [name for name in layers if name not in errors]
    divided = is_divided(next(iter(layers.values())).gate_proj)
    turns, mine = _deal(todo, ranks, divided)
    total, quiet = (len(errors) + len(mine)) * config.steps, not (progress and ranks.first)
    centred = centred_routers(model, layers, sequences) if config.centre else nullcontext()
    shown = tqdm(total=total, initial=len(errors) * config.steps, desc=label, disable=quiet, dynamic_ncols=True)
    stop, end = Stop() if stop is None else stop, None
    with centred, shown as bar, stop.finishing():
        for turn, (own, x) in zip(turns, _inputs(model, layers, mine, sequences), strict=False):
            layer = _own_layer(layers, turn, own) if divided else layers[own or ""]
            if own is not None and x is not None and layer is not None:
                parts = (x[:cut], x[cut:]) if keep else (x, x)
                try:
                    errors[own] = _fit(own, layer, *parts, config, batch_tokens, bar, places[own], begun.pop(own, None), stop)
                    layers[own].expert_of = layer.expert_of
                    written = places[own].write_done(config.steps, layer, errors[own])
                    if stop.asked:
                        raise stopped(f"reconstruct of layer {own}", config.steps, config.steps, written)
                except Stopped as asked:
                    end = asked
            if ranks.any(end is not None) if divided else end is not None:
                break
        if ranks.any(end is not None):
            raise end or Stopped("reconstruct stopped, as another rank was asked")
        errors |= _share(ranks, {name: layers[name] for name in todo}, errors)
    return ReconstructionResult(
        config.steps, cut if keep else sequences.numel(), time.monotonic() - begin, {n: errors[n] for n in layers}
    )
