"""The training loop: A and the router of all layers against the dense model's own output.

A step: plans and assignments of all layers; for every micro-batch a dense pass (teacher), a sparse pass and a backward pass, of
the backbone alone where the head is a known one; one backward pass through Sinkhorn; AdamW. Everything else is frozen. The
same seed and data give the same run, and a resumed run equals an uninterrupted one bit for bit on CPU.

Several ranks (see ``ranks``) share the passes of a step and the layers' transport. One sum over them of all gradients and terms
follows the passes; after it every rank takes the same step.

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
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checks import require, require_indices
from .checkpoints import resume_from, save_checkpoint, truncate_log
from .config import SOFT_OPTIONS, AlignmentConfig
from .head import Head, find_head
from .hidden import HiddenStates
from .loads import ExpertLoads
from .losses import alignment_losses
from .module import AlignmentFFN, all_experts, centred_routers
from .ranks import Ranks, find_ranks
from .schedule import learning_rate, shuffled_rows
from .soft import BudgetState, SoftRouting
from .stopping import Stop, stopped
from .transport import Transport

_TERMS = ("loss", "kl", "ce", "z", "balance")
_PROBE = 16  # tokens on which the head is compared with the model's logits


class AlignmentResult(NamedTuple):
    """What a run leaves besides the layers' own parameters and assignments."""

    steps: int
    seconds: float
    log: list[dict[str, float]]  # one entry a step of this call
    budgets: BudgetState | None = None  # of the soft router
    loads: dict[str, Tensor] | None = None  # [E] by layer in the last step, if this call took one


def _fetch(values: dict[str, Tensor]) -> dict[str, float]:
    """Numbers [] on the device -> on the host, in one transfer."""
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


def _source(layers: dict[str, AlignmentFFN], loss_is_finite: bool, ranks: Ranks) -> str:
    """Where the first non-finite value arose, for the error message: forward from the first layer, backward from the last."""
    broken = {n: (~f.finite).float() if f.finite is not None else f.router_weight.new_zeros(()) for n, f in layers.items()}
    for name, found in ranks.most(broken).items():
        if bool(found):
            return f"layer {name}"
    if loss_is_finite:
        for name, layer in reversed(layers.items()):
            gradients = [p.grad for p in (layer.affinity, layer.router_weight) if p is not None and p.grad is not None]
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                return f"layer {name}"
    return "the output head (every FFN is finite)"


class _Run:
    """What trains, its optimizer, the plans and budgets of the layers, the log and the checkpoints.

    The state of a run is what ``state`` says and ``restore`` takes over; everything else follows from the options and the step."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, AlignmentFFN],
        data: Tensor,
        config: AlignmentConfig,
        folder: Path | None,
        fingerprint: dict[str, Any],
        transport: Callable[[dict[str, AlignmentFFN], AlignmentConfig], Transport],
        ranks: Ranks,
        stop: Stop,
    ) -> None:
        self.model, self.layers, self.data, self.config, self.ranks = model, layers, data, config, ranks
        self.device = next(iter(layers.values())).router_weight.device
        self.transport = transport(layers, config)
        self.transport.ranks = ranks
        self.soft = SoftRouting(layers, config) if any(layer.router == "soft" for layer in layers.values()) else None
        self.hidden = HiddenStates(model, layers) if config.hidden else None
        self.terms = (*_TERMS, *(() if self.hidden is None else ("hidden",)), "grad_norm")
        self.loads = ExpertLoads(layers)
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=config.weight_decay)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.head = self._find_head()
        options = {k: v for k, v in dataclasses.asdict(config).items() if self.soft is not None or k not in SOFT_OPTIONS}
        self.marks = json.loads(json.dumps({**fingerprint, **options, "data": list(data.shape), "layers": list(layers)}))
        self.checkpoints = None if folder is None else folder / "checkpoints"
        self.log_path = None if folder is None else folder / "log.jsonl"
        self.log: list[dict[str, float]] = []
        self.last_good, self.begin = "none", time.monotonic()
        self.last_step = self.begin
        self.stop, self.last = stop, False  # asked for by one of the ranks

    def _groups(self) -> list[dict[str, Any]]:
        """Routers, affinities and budgets, each with its peak learning rate."""
        layers, c = self.layers.values(), self.config
        routers = [layer.router_weight.requires_grad_() for layer in layers]
        affinities = [layer.affinity.requires_grad_() for layer in layers if layer.affinity is not None]
        groups: list[dict[str, Any]] = [{"params": routers, "lr": 0.0, "peak": c.router_rate}]
        if affinities:
            groups.append({"params": affinities, "lr": 0.0, "peak": c.affinity_lr})
        if self.soft is not None:
            budgets = list(self.soft.budgets.parameters())
            groups.append({"params": budgets, "lr": 0.0, "peak": c.budget_lr, "weight_decay": 0.0})
        return groups

    def _find_head(self) -> Head | None:
        with all_experts(self.layers):
            head = find_head(self.model, self.data[:1, :_PROBE].long().to(self.device))
        if head is None:
            warnings.warn(
                f"the logits of {type(self.model).__name__} are not its output embedding of the backbone's last hidden state, "
                "scaled or capped as the config says: the loss takes the whole logits of both passes, which costs memory and time",
                stacklevel=4,
            )
        return head

    def restore(self, resume: bool) -> int:
        """The first step (0-based). If ``resume``, that of the newest checkpoint, if any, whose state is taken over; else 0."""
        found = resume_from(self.checkpoints, self.marks, self.ranks) if resume and self.checkpoints is not None else None
        first = 0
        if found is not None:
            path, state = found
            first, self.last_good = state["step"], str(path)
            with torch.no_grad():
                for parameter, value in zip(self.trained, state["parameters"], strict=True):
                    parameter.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            self.transport.tau = state["tau"]
            self.transport.log_v = {key: value.to(self.device) for key, value in state["log_v"].items()}
            for name, expert_of in state["assignment"].items():
                self.layers[name].expert_of = expert_of.to(self.device)
        else:  # what a partition on a GPU gave need not be the same on every rank
            self.ranks.agree([*self.trained, *(layer.expert_of for layer in self.layers.values())])
        if self.log_path is not None and self.ranks.first:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            truncate_log(self.log_path, first)
        return first

    def state(self, done: int) -> dict[str, Any]:
        """After ``done`` steps."""
        return {
            "step": done,
            "fingerprint": self.marks,
            "parameters": [p.detach() for p in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "tau": self.transport.tau,
            "log_v": self.transport.log_v,
            "assignment": {name: layer.expert_of for name, layer in self.layers.items() if layer.affinity is not None},
        }

    def _outputs(self, input_ids: Tensor) -> Tensor:
        """The last hidden states [B, N, H] if the head is known, else the logits [B, N, V]."""
        if self.head is not None:
            return self.head.hidden(input_ids)
        return self.model(input_ids=input_ids, use_cache=False).logits

    def _pass(self, tokens: Tensor, share: float) -> Tensor:
        """Dense, sparse and backward pass of tokens [B, N], which are ``share`` of the step; the terms, times it."""
        states = self.hidden
        with torch.no_grad(), all_experts(self.layers), nullcontext() if states is None else states.dense_pass():
            teacher = self._outputs(tokens)
        with nullcontext() if states is None else states.sparse_pass():
            student = self._outputs(tokens)
        hidden = None if states is None else states.mean()
        if self.ranks.splits(self.config.micro_batch_size):
            routings = [layer.routing for layer in self.layers.values() if layer.routing is not None]
            shared = self.ranks.balanced(routings, soft=self.soft is not None)
            for layer, routing in zip(self.layers.values(), shared, strict=True):
                layer.routing = routing
        losses = alignment_losses(teacher, student, tokens, self.layers, self.config, head=self.head, hidden=hidden)
        (losses.total * share).backward()
        if self.soft is not None:
            self.soft.observe(share)
        self.loads.observe(share)
        return torch.stack([term.detach().float() for term in losses if term is not None]) * share

    def step(self, step: int) -> dict[str, float]:
        """Step number ``step`` (0-based); returns its line of the log.

        Raises:
            FloatingPointError: a loss or gradient is not finite; nothing has moved."""
        c, tau = self.config, self.config.tau(step)
        numbers = self.transport.refresh(tau, rounding=step % c.refresh_every == 0)
        budget = None if self.soft is None else self.soft.refresh(step)
        rate = learning_rate(step, c.steps, c.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.layers.values():
            layer.finite = None
        self.loads.begin()
        batch = shuffled_rows(self.data, step, c.batch_size, c.seed).to(self.device, non_blocking=True)
        sums = torch.zeros(len(self.terms) - 1, device=self.device)
        for rows, share in self.ranks.passes(batch, c.micro_batch_size):
            sums += self._pass(rows, share)
        wish = torch.tensor(float(self.stop.asked), device=self.device)
        if self.ranks.count > 1:
            self._add_up(sums, wish)
            numbers["asked"] = wish
        self.transport.backward()
        if self.soft is not None:
            self.soft.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        numbers |= dict(zip(self.terms, [*sums, norm], strict=True)) | self.loads.log()
        numbers |= {} if self.soft is None else self.soft.log()
        values = _fetch(numbers)
        self.last = bool(values.pop("asked", self.stop.asked))  # looked at once: it may change any moment
        self._require_finite(step, values)
        nn.utils.clip_grads_with_norm_(self.trained, c.clip, norm)
        self.optimizer.step()
        entry = {"step": step + 1, "tau": tau, **values, **({} if budget is None else budget.log())}
        if "sinkhorn_iters" in entry:
            entry["sinkhorn_iters"] = int(entry["sinkhorn_iters"])
        now, before = time.monotonic(), self.last_step
        self.last_step = now
        speed = self.ranks.speed(batch.numel(), now - before)
        return entry | {"lr": rate * c.router_rate, "seconds": now - self.begin} | speed

    def _add_up(self, sums: Tensor, wish: Tensor) -> None:
        """What the passes of all ranks left: the gradients of routers, plans and budgets, the terms and what is counted; and how
        many of them were asked to stop."""
        for layer in self.layers.values():
            if layer.router_weight.grad is None:
                layer.router_weight.grad = torch.zeros_like(layer.router_weight)
        routers = [layer.router_weight.grad for layer in self.layers.values()]
        self.ranks.sum([sums, wish, *self.loads.sums(), *self.transport.gradients(), *routers])  # type: ignore[list-item]
        if self.soft is not None:
            self.ranks.sum(self.soft.sums())

    def _require_finite(self, step: int, values: dict[str, float]) -> None:
        if all(math.isfinite(values[name]) for name in self.terms):
            return
        terms = ", ".join(f"{name.removeprefix('grad_')} {values[name]:.4g}" for name in self.terms)
        where = _source(self.layers, all(math.isfinite(values[name]) for name in self.terms[:-1]), self.ranks)
        raise FloatingPointError(
            f"non-finite loss or gradient at step {step + 1} in {where} ({terms}); last good checkpoint: {self.last_good}"
        )

    def record(self, entry: dict[str, float]) -> None:
        """The log's line, and a checkpoint where one is due, or if it is the last step for now."""
        self.log.append(entry)
        if self.log_path is None or self.checkpoints is None:
            return
        if self.ranks.first:
            with self.log_path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        done, every = int(entry["step"]), self.config.checkpoint_every
        if self.last or done == self.config.steps or (every and done % every == 0):
            self.last_good = str(save_checkpoint(self.checkpoints, done, self.state(done), self.ranks))

    def finish(self) -> AlignmentResult:
        """The assignments and the budgets after the last update."""
        last = max(self.config.steps - 1, 0)
        self.transport.refresh(self.config.tau(last))
        reached = None if self.soft is None else self.soft.refresh(last)
        for layer in self.layers.values():
            layer.plan = layer.routing = None
        return AlignmentResult(self.config.steps, time.monotonic() - self.begin, self.log, reached, self.loads.by_layer())


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
    transport: Callable[[dict[str, AlignmentFFN], AlignmentConfig], Transport] = Transport,
    stop: Stop | None = None,
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
        transport: what makes plans and assignments of the affinities; another one to compare with.
        stop: looked at once a step.

    Returns:
        AlignmentResult.

    Raises:
        ValueError: data of a wrong shape or dtype, a checkpoint of a run with other options, or fewer passes a step than ranks.
        FloatingPointError: a non-finite loss or gradient; names the step, the layer and the last good checkpoint.
        Stopped: ``stop`` asked for it; the state after the last step is in ``folder``.

    Source: section 3 of DOT-MoE (arXiv 2606.01666).
    """
    require_indices(data, "data", 2, "[N, S]")
    require(data.shape[0] >= 1 and data.shape[1] >= 2, "data", f"of shape {list(data.shape)}", "sequences of at least 2 tokens")
    require(len(layers) >= 1, "layers", "empty", "at least one FFN")
    model.eval().requires_grad_(False)
    ranks = find_ranks(next(iter(layers.values())).router_weight.device)
    ranks.require_passes(config.batch_size, config.micro_batch_size)
    place = None if folder is None else Path(folder)
    stop = Stop() if stop is None else stop
    with centred_routers(model, layers, data) if config.centre else nullcontext():
        ranks.agree([layer.centre for layer in layers.values()])
        run = _Run(model, layers, data, config, place, fingerprint or {}, transport, ranks, stop)
        first = run.restore(resume)
        quiet = not (progress and ranks.first)
        bar = tqdm(total=config.steps, initial=first, desc=label, disable=quiet, dynamic_ncols=True)
        with bar, stop.finishing():
            for step in range(first, config.steps):
                entry = run.step(step)
                run.record(entry)
                shown = {name: f"{entry[name]:.3f}" for name in ("loss", "kl", "ce")}
                use = {"in_use": f"{entry['experts_in_use']:.0%}", "most": f"{entry['largest_load']:.1f}x"}
                bar.set_postfix(shown, tau=f"{entry['tau']:.2f}", **use, refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(step + 1)
                if run.last:
                    raise stopped("align", step + 1, config.steps, None if folder is None else run.last_good)
        return run.finish()
