"""Fine-tuning of a converted model: next-token cross-entropy, or the distribution of a teacher (``teacher``), and the routers' two
losses, in a plain loop that can be resumed.

All weights train, or with ``lora_rank`` adapters on the attention's projections (by peft); but the top-K routers rest.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .._checks import require, require_range
from ..alignment.checkpoints import (
    read_log,
    resume_from,
    save_checkpoint,
    tokens_checksum,
    truncate_log,
    weights_checksum,
)
from ..alignment.ranks import Ranks, computing_device, find_ranks
from ..alignment.schedule import ends, learning_rate, shuffled_rows
from ..alignment.sharding import Divided, is_divided, part_of, recomputed, whole
from ..alignment.stopping import Stop, stopped
from ..evaluation import perplexity
from ..models.block import moe_blocks
from ..models.config import DotMoeConfig
from ..models.folder import check_state
from ..models.modeling import DotMoeForCausalLM
from .adapters import adapters, require_lora, resting
from .data import as_tokens
from .origins import Memory
from .passes import Passes
from .sharded import Student, divide_student, divided_teacher, whole_tensors
from .teacher import Teacher, teaching
from .tuning import FinetuneConfig, with_rates, with_weights
from .zero_experts import add_zero_experts


@contextmanager
def _in_float32(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, these are float32: a small step would be lost in a 16-bit weight. Their strides stay."""
    narrow = [(p, p.dtype) for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    try:
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    found = [p for p in model.parameters() if p.requires_grad]
    require(bool(found), "model", "without a parameter that requires a gradient", "at least one")
    return found


def finetune(
    model: DotMoeForCausalLM,
    data: Tensor | Iterable[Tensor],
    config: FinetuneConfig | None = None,
    *,
    teacher: PreTrainedModel | str | Path | None = None,
    held_out: Tensor | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    on_step: Callable[[int], None] | None = None,
    stop: Stop | None = None,
    shard: bool = False,
    activation_checkpointing: bool = False,
) -> DotMoeForCausalLM:
    """Train a converted model on text: CE(next token) + z mean(logsumexp(Z)^2) + balance E <load, mean Q>; with a teacher
    kl KL(teacher || sparse) + ce CE(next token) in the place of the first.

    Args:
        model: as ``convert`` or ``load`` gives it, on any device; trained in place (after an error, load it again). Parameters that
            do not require a gradient stay as they are. Those that train are float32 meanwhile; a model in bfloat16 computes in
            bfloat16. Gradient checkpointing works, once the model has it enabled.
        data: [N, S] int64 packed token sequences, or an iterable of [S].
        config: the options. None: FinetuneConfig().
        teacher: a causal LM of the same vocabulary, whose distribution is learned: ``model`` itself with every expert on, which is
            the dense model that it was made from, or while zero experts are added as it was before (with adapters no second copy,
            else one of what trains); another one, as it is; or its folder or name, read in the dtype of ``model``. None: the text
            alone.
        held_out: [M, S] token sequences to measure the perplexity on, before and after.
        folder: where checkpoints (``checkpoints/``) and the log (``log.jsonl``, a line a step) go. None: nowhere.
        resume: continue from the newest checkpoint in ``folder``, bit for bit on CPU.
        progress: show a bar.
        on_step: called with the number of steps done after each.
        stop: looked at once a step; where it asks for it, Stopped is raised once the state is in ``folder``.
        shard: for a model that fits no GPU, and so lies on the CPU: each rank's GPU holds a part of the weights, of their gradients
            and moments, and of the teacher.
        activation_checkpointing: of a block its input alone is kept, and the block computed once more.

    Returns:
        The model, in eval mode, with the figures after those of earlier runs in ``config.stages["finetune"]``. With every expert
        on it is no longer the dense model it was made from. Without a step nothing trains.

    Raises:
        ValueError: another kind of model, data of a wrong shape or with token ids outside the vocabulary, a checkpoint of another
            run, ``lora_rank`` without peft; a teacher of another vocabulary or on another device, or that cannot be read; ``kl`` or
            ``ce`` without one.
        FloatingPointError: a non-finite loss or gradient; names the step and the last good checkpoint.
    """
    require(isinstance(model, DotMoeForCausalLM), "model", f"a {type(model).__name__}", "a DotMoeForCausalLM")
    ranks = find_ranks(computing_device(model.device)) if shard else None
    require(ranks is None or ranks.grouped, "shard", True, "in a process group, such as torchrun's")
    told: dict[str, Any] = {"resume": resume, "progress": progress, "on_step": on_step, "stop": stop, "folder": folder}
    told |= {"teacher": teacher, "held_out": held_out, "activation_checkpointing": activation_checkpointing}
    return tune(model, _InPlace(model), data, config, ranks=ranks, **told)


class _InPlace(Memory):
    """A model that gets what becomes of it."""

    def take_back(self, student: Student, options: FinetuneConfig) -> None:
        if options.zero_experts:
            add_zero_experts(self.model, options.zero_experts, seed=options.seed)
        places = dict(self.model.named_parameters())
        for name, tensor, moved in whole_tensors(student):
            if moved:
                places[name].data.copy_(tensor)

    def note(self, stages: dict[str, Any]) -> None:
        self.model.config.stages = stages


def tune(
    model: DotMoeForCausalLM,
    origin: Any,
    data: Tensor | Iterable[Tensor],
    config: FinetuneConfig | None,
    *,
    ranks: Ranks | None,
    teacher: Any,
    held_out: Tensor | None,
    folder: str | Path | None,
    resume: bool,
    progress: bool,
    on_step: Callable[[int], None] | None = None,
    stop: Stop | None,
    activation_checkpointing: bool,
) -> DotMoeForCausalLM:
    """``finetune``. ``ranks``: those that divide the weights, which then come from ``origin`` and go back there; ``model`` may have
    none."""
    with torch.device("meta"):
        check_state(model, DotMoeForCausalLM(copy.deepcopy(model.config)))  # or what is saved afterwards cannot be read back
    options = with_rates(with_weights(FinetuneConfig() if config is None else config, teacher is not None), model.config)
    tokens, taking = as_tokens(data), find_ranks(model.device) if ranks is None else ranks
    taking.require_passes(options.batch_size, options.micro_batch_size)
    vocabulary = model.config.get_text_config().vocab_size
    require_range(tokens, "data", 0, vocabulary - 1)
    figures: dict[str, Any] = {"steps": options.steps, "tokens": options.steps * options.batch_size * tokens.shape[1]}
    if options.lora_rank:
        require_lora()
        figures["lora_rank"] = options.lora_rank

    def measured() -> float | None:
        if held_out is None:
            return None
        return perplexity(model.eval() if ranks is None else origin.spread(ranks), held_out, batch_size=1)

    if held_out is not None:
        held_out = as_tokens(held_out, "held_out")
        require_range(held_out, "held_out", 0, vocabulary - 1)
    before = measured()
    log_path = None if folder is None else Path(folder) / "log.jsonl"
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    weights = {"kl": options.kl or 0.0, "ce": options.ce or 0.0}
    taught: dict[str, Any] = {**weights, "adapters": bool(options.lora_rank), "half": half, "static": bool(options.zero_experts)}
    told: dict[str, Any] = {"resume": resume, "progress": progress, "on_step": on_step, "stop": Stop() if stop is None else stop}
    told |= {"log_path": log_path, "half": half, "again": activation_checkpointing}
    given = (model, teacher, tokens, options, taught, taking, told)
    log, name = _tune_whole(*given) if ranks is None else _tune_divided(origin, *given)
    if name is not None:
        figures["teacher"] = name
    model.eval()
    if not options.steps:
        return model
    entries = log if log_path is None else taking.once(lambda: read_log(log_path))
    if len(entries) == options.steps:  # otherwise the log was removed before the run was resumed, and the beginning with it
        figures["loss"] = ends([entry["ce"] for entry in entries])
        figures |= {name: ends([entry[name] for entry in entries]) for name in ("kl", "zero") if name in entries[0]}
    if held_out is not None:
        figures["perplexity"] = [before, measured()]
    runs = model.config.finetune_runs
    if not (resume and runs[-1:] == [figures]):  # a run resumed at its end that moved no weight: its model is the one it began with
        runs.append(figures)
    origin.note({**(model.config.stages or {}), "finetune": runs})
    return model


def _tune_whole(
    model: DotMoeForCausalLM,
    teacher: Any,
    tokens: Tensor,
    options: FinetuneConfig,
    taught: dict[str, Any],
    ranks: Ranks,
    told: dict[str, Any],
) -> tuple[list[dict[str, float]], str | None]:
    """The log of the steps that were taken, and what figures call the teacher. ``taught``: of ``teaching``; ``told``: of
    ``_train``."""
    with teaching(teacher, model, tokens, **taught) as guide:
        if options.zero_experts:
            add_zero_experts(model, options.zero_experts, seed=options.seed)
        checksums = (weights_checksum(model.parameters()), None if guide is None else weights_checksum(guide.model.parameters()))
        marks = _marks(options, model.config, tokens, *checksums)
        with adapters(model, options), resting(model, not options.router_lr):
            trained = _trained(model)
            # float16 would need its loss scaled: all of it is float32 instead
            wide = trained + [p for p in model.parameters() if p.dtype == torch.float16 and not p.requires_grad]
            with _in_float32(wide):
                log = _train(model.train(), guide, trained, tokens, options, marks, ranks, **told)
    return log, None if guide is None else guide.name


def _tune_divided(
    origin: Any,
    model: DotMoeForCausalLM,
    teacher: Any,
    tokens: Tensor,
    options: FinetuneConfig,
    taught: dict[str, Any],
    ranks: Ranks,
    told: dict[str, Any],
) -> tuple[list[dict[str, float]], str | None]:
    """As ``_tune_whole``, of modules whose weights the ranks divide and ``origin`` gives and takes back."""
    student = divide_student(origin, options, ranks, taught["half"])
    guide, checksum = divided_teacher(teacher, model, student, origin, tokens, ranks, **taught)
    marks = _marks(options, student.model.config, tokens, student.checksums[1], checksum)
    trained = _trained(student.model.train())
    log = _train(student.model, guide, trained, tokens, options, marks, ranks, divided=student.divided, **told)
    origin.take_back(student, options)
    return log, None if guide is None else guide.name


def _marks(options: FinetuneConfig, config: DotMoeConfig, tokens: Tensor, weights: int, teacher: int | None) -> dict[str, Any]:
    """What must agree with a run that is resumed; without zero experts that of the time before there were any. ``weights``,
    ``teacher``: checksums."""
    zeros = config.num_zero_experts
    return {
        **{name: value for name, value in dataclasses.asdict(options).items() if zeros or not name.startswith("zero_")},
        "data": list(tokens.shape),
        "weights": weights,
        "tokens": tokens_checksum(tokens),
        "teacher": teacher,
    }


def _optimizer(model: DotMoeForCausalLM, trained: list[nn.Parameter], config: FinetuneConfig) -> torch.optim.Optimizer:
    rate, gates = float(config.lr or 0.0), {id(block.gate.weight) for block in moe_blocks(model).values()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2 and id(p) not in gates], "weight_decay": config.weight_decay, "peak": rate},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "peak": rate},
        {"params": [p for p in trained if id(p) in gates], "weight_decay": config.weight_decay, "peak": config.router_lr},
    ]
    # the fused form goes along memory: a gradient must lie there as its parameter, which autograd sees to where that has no gaps
    fused = all(is_divided(p) or p.stride() == torch.empty_like(p, device="meta").stride() for p in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=fused)


def _blank(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """``state``, of tensors without values, with room for this rank's part of weights and moments that are divided."""

    def room(value: Tensor, like: Tensor) -> Tensor:
        return torch.empty_like(like, dtype=value.dtype) if value.shape == like.shape else value

    order = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        n: {name: room(value, order[n]) for name, value in found.items()} if n < len(order) else found
        for n, found in state["optimizer"]["state"].items()
    }
    parameters = [room(value, p) for value, p in zip(state["parameters"], trained, strict=False)]
    if len(parameters) != len(state["parameters"]):  # of another run, which is refused once it is read
        return state
    return state | {"parameters": parameters, "optimizer": state["optimizer"] | {"state": moments}}


@torch.no_grad()
def _take_over(state: dict[str, Any], trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The weights and the moments of a checkpoint, of which a rank may have a part alone."""
    for parameter, value in zip(trained, state["parameters"], strict=True):
        parameter.copy_(part_of(value, parameter))
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for n, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            if value.dim() and name != "step":
                moments[name] = part_of(value, order[n])
    optimizer.load_state_dict(state["optimizer"])


def _train(
    model: DotMoeForCausalLM,
    teacher: Teacher | None,
    trained: list[nn.Parameter],
    data: Tensor,
    config: FinetuneConfig,
    marks: dict[str, Any],
    ranks: Ranks,
    *,
    log_path: Path | None,
    half: bool,
    resume: bool,
    progress: bool,
    on_step: Callable[[int], None] | None,
    stop: Stop,
    again: bool,
    divided: Divided | None = None,
) -> list[dict[str, float]]:
    """The loop; returns the log of the steps it took. ``again``: blocks are computed again in the backward pass."""
    device, rate, optimizer = ranks.device, float(config.lr or 0.0), _optimizer(model, trained, config)
    first, last_good = 0, "none"
    checkpoints = None if log_path is None else log_path.parent / "checkpoints"
    blank = None if divided is None else partial(_blank, trained, optimizer)
    found = resume_from(checkpoints, marks, ranks, blank) if resume and checkpoints is not None else None
    if found is not None:
        path, state = found
        first, last_good = state["step"], str(path)
        _take_over(state, trained, optimizer)
    if log_path is not None and ranks.first:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        truncate_log(log_path, first)
        log_path.touch()

    begin, log = time.monotonic(), list[dict[str, float]]()
    quiet = not (progress and ranks.first)
    bar = tqdm(total=config.steps, initial=first, desc="finetune", disable=quiet, dynamic_ncols=True)
    devices = [device] if device.type == "cuda" else []
    computed = recomputed(model, moe_blocks(model)) if again else nullcontext()
    passing = Passes(model, teacher, trained, config, half, ranks, divided)
    with bar, passing as passes, computed, torch.random.fork_rng(devices), stop.finishing():
        for step in range(first, config.steps):
            # of dropout, where the model has it
            torch.manual_seed(config.seed * 1_000_003 + step + (ranks.rank << 40))
            share = learning_rate(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
            optimizer.zero_grad(set_to_none=True)
            batch = shuffled_rows(data, step, config.batch_size, config.seed).to(device)
            sums, wish = passes.take(batch, stop)
            norm = nn.utils.clip_grad_norm_(trained, config.clip)
            values = dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)) | {"grad_norm": float(whole(norm))}
            if not all(map(math.isfinite, values.values())):
                shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
                raise FloatingPointError(
                    f"non-finite loss or gradient at step {step + 1} of the fine-tuning ({shown}); "
                    f"last good checkpoint: {last_good}"
                )
            optimizer.step()
            done, last = step + 1, stop.asked if wish is None else bool(wish)  # looked at once: it may change any moment
            seconds = time.monotonic() - begin
            speed = ranks.speed(batch.numel(), seconds - (log[-1]["seconds"] if log else 0.0))
            entry = {"step": done, **values, "lr": share * rate, "seconds": seconds, **speed}
            log.append(entry)
            if log_path is not None and checkpoints is not None:
                if ranks.first:
                    with log_path.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
                if last or done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0):
                    state = {"step": done, "fingerprint": marks, "parameters": [p.detach() for p in trained]}
                    last_good = str(save_checkpoint(checkpoints, done, {**state, "optimizer": optimizer.state_dict()}, ranks))
            bar.set_postfix({name: f"{values[name]:.3f}" for name in ("loss", "kl", "ce") if name in values}, refresh=False)
            bar.update()
            if on_step is not None:
                on_step(done)
            if last:
                raise stopped("finetune", done, config.steps, None if log_path is None else last_good)
    optimizer.zero_grad(set_to_none=True)
    return log
