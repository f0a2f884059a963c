"""convert: find the FFNs, align (or partition), materialise the sparse model."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._checks import is_integer, require, require_range
from ..alignment.checkpoints import read_log, tokens_checksum, weights_checksum
from ..alignment.config import AlignmentConfig
from ..alignment.loop import align
from ..alignment.module import AlignmentFFN, all_experts, collect_inputs
from ..alignment.ranks import Ranks, computing_device, find_ranks
from ..alignment.reconstruction import reconstruct
from ..alignment.schedule import ends
from ..alignment.sharding import is_divided, recomputed, shard_blocks, twin, whole_layer
from ..alignment.soft import BudgetState
from ..alignment.stopping import Stop
from ..alignment.transport import Transport
from ..evaluation import COLLAPSE, unused_experts, unused_line
from ..models.backbone import check_backbone, shared_width
from ..models.config import DotMoeConfig
from ..models.modeling import DotMoeForCausalLM, check_return, materialize
from ..models.surgery import DenseFFN, find_ffns, swap_ffn
from ..partitions import CALIBRATED, PARTITIONS, noise_router, start_affinity
from .data import as_tokens
from .starts import CALIBRATION_TOKENS, find_start, make_partition

METHODS = ("dot", *PARTITIONS)
STAGES = ("reconstruct", "align")
RECONSTRUCT_TOKENS, RECONSTRUCT_BATCH = 65536, 1024  # that the reconstruction collects at most, and takes a step
_CURVES = ("loss", "kl", "ce", "hidden", "experts_in_use", "largest_load")  # of the log, how each began and ended


def _check_model(model: PreTrainedModel, config: DotMoeConfig, ffns: dict[str, DenseFFN]) -> None:
    """What ``materialize`` and ``load`` would refuse, before anything is trained."""
    width = shared_width(ffn.gate_proj for ffn in ffns.values())
    config.check(dense_width=width)
    require(config.router_k is None, "config.router_k", config.router_k, "None: it is learned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once, by the conversion itself
        check_return(model, config, width)


def _soft_options(options: AlignmentConfig, config: DotMoeConfig) -> AlignmentConfig:
    """``options`` with what ``config`` sets of the soft router."""
    fields = {
        "router_temperature_end": config.router_temperature,
        "threshold": config.router_threshold,
        "cap": config.router_cap,
    }
    return dataclasses.replace(options, **{name: value for name, value in fields.items() if value is not None})


def _ordered(stages: Sequence[str], reconstruct_steps: int) -> list[str]:
    """``stages`` in the order of ``STAGES``, each once."""
    whole = is_integer(reconstruct_steps) and reconstruct_steps >= 0
    require(whole, "reconstruct_steps", reconstruct_steps, "an integer of at least 0")
    allowed = f"one or both of {' '.join(STAGES)}"
    given = [stages] if isinstance(stages, str) else list(stages)
    require(bool(given) and set(given) <= set(STAGES), "stages", " ".join(map(str, given)) or "empty", allowed)
    return [stage for stage in STAGES if stage in given]


def _swap_in(model: PreTrainedModel, name: str, ffn: DenseFFN, config: DotMoeConfig) -> AlignmentFFN:
    """An AlignmentFFN of its weights in the place of ``ffn``; how it starts is for ``_start`` to say."""
    weights = (ffn.gate_proj.data, ffn.up_proj.data, ffn.down_proj.data)
    router = torch.zeros((config.num_experts, ffn.gate_proj.shape[1]))
    top_k, kind = config.num_experts_per_tok, config.router
    layer = AlignmentFFN(*weights, router_weight=router, top_k=top_k, activation=ffn.activation, router=kind)
    swap_ffn(model, name, layer)
    return layer


def _start(
    model: PreTrainedModel,
    layers: dict[str, AlignmentFFN],
    config: DotMoeConfig,
    method: str,
    options: AlignmentConfig,
    data: Tensor | None,
    generator: torch.Generator | None = None,
) -> None:
    """What trains of the layers, as ``method`` and ``options.init``, which ``find_start`` has found, say."""
    E, K = config.num_experts, config.num_experts_per_tok
    shared = K // 2 if options.shared is None else options.shared
    require(shared <= min(K, E - 1), "shared", shared, f"at most K = {K}" + (f" and E - 1 = {E - 1}" if K == E else ""))
    kind = options.init if method == "dot" else method
    generator = torch.Generator().manual_seed(options.seed) if generator is None else generator
    inputs: dict[str, Tensor] = {}
    if kind in CALIBRATED:
        assert data is not None
        (least, most), weight = CALIBRATION_TOKENS, next(iter(layers.values())).gate_proj
        wanted = max(least, min(8 * weight.shape[1], most))
        rows = -(-wanted // data.shape[1])
        inputs = collect_inputs(model, layers, data[:rows].long().to(weight.device))
        broken = next((name for name, x in inputs.items() if not bool(torch.isfinite(x).all())), None)
        if broken is not None:
            raise FloatingPointError(f"what enters layer {broken} of the dense model is not finite")
    for name, layer in layers.items():
        (F, H), device = layer.gate_proj.shape, layer.gate_proj.device
        looks = is_divided(layer.gate_proj) and kind in ("kmeans", *CALIBRATED)  # at the weights
        partition = make_partition(kind, whole_layer(layer) if looks else layer, inputs.pop(name, None), E, shared, generator)
        router = noise_router(E, H, generator, std=options.init_std) if partition is None else partition.router_weight
        layer.router_weight = torch.nn.Parameter(router.float().to(device))
        if partition is not None:
            layer.expert_of = partition.expert_of.to(device)
        if method == "dot":
            affinity = start_affinity(partition, (F, E), strength=options.init_strength, std=options.init_std, generator=generator)
            layer.affinity = torch.nn.Parameter(affinity.to(device))


def _build_layers(
    model: PreTrainedModel,
    ffns: dict[str, DenseFFN],
    config: DotMoeConfig,
    method: str,
    options: AlignmentConfig,
    data: Tensor | None,
    generator: torch.Generator | None = None,
) -> dict[str, AlignmentFFN]:
    """Every FFN of ``model`` swapped for an AlignmentFFN that starts as ``method`` and ``options.init`` say."""
    options = find_start(options, method, model, ffns, data)
    layers = {name: _swap_in(model, name, ffn, config) for name, ffn in ffns.items()}
    _start(model, layers, config, method, options, data, generator)
    return layers


def _check_data(
    model: PreTrainedModel, data: Tensor | Iterable[Tensor] | None, method: str, options: AlignmentConfig
) -> Tensor | None:
    """The sequences to train on; without any, a warning that nothing is trained."""
    if data is not None:
        tokens = as_tokens(data)
        require_range(tokens, "data", 0, model.config.get_text_config().vocab_size - 1)
        return tokens
    kind = options.init if method == "dot" else method
    require(kind not in CALIBRATED, "data", None, f'token sequences to calibrate on, for "{kind}"')
    warnings.warn(
        f"data is None: nothing is trained, the router is random (N(0, {options.init_std})) and so the model is not usable "
        "as it is; give data to align it",
        stacklevel=3,
    )
    return None


@contextmanager
def _frozen(model: PreTrainedModel, ffns: dict[str, DenseFFN]) -> Iterator[None]:
    """Inside, no weight trains and the mode is eval. After an error the model is whole again, its dense FFNs in their places."""
    before = {name: ffn.module for name, ffn in ffns.items()}
    grads = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval().requires_grad_(False)
        yield
    except BaseException:
        for name, dense in before.items():
            swap_ffn(model, name, dense)
        for module, training in modes:
            module.training = training
        raise
    finally:
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


class _Run(NamedTuple):
    """What the stages share."""

    model: PreTrainedModel
    layers: dict[str, AlignmentFFN]
    tokens: Tensor
    options: AlignmentConfig
    folder: Path | None
    shared: dict[str, Any]  # arguments of every stage

    def reconstruct(self, steps: int) -> dict[str, Any]:
        """Each layer alone; its figures."""
        place = None if self.folder is None else self.folder / "reconstruct"
        options = dataclasses.replace(self.options, steps=steps)
        sample: dict[str, Any] = {"tokens": RECONSTRUCT_TOKENS, "batch_tokens": RECONSTRUCT_BATCH}
        done = reconstruct(self.model, self.layers, self.tokens, options, folder=place, **sample, **self.shared)
        errors = {name: list(pair) for name, pair in done.errors.items()}  # a config is JSON
        return {"steps": done.steps, "tokens": done.tokens, "relative_error": errors}

    def align(self, label: str) -> tuple[dict[str, Any], BudgetState | None]:
        """All layers together; the figures, and the soft router's budgets."""
        result = align(self.model, self.layers, self.tokens, self.options, folder=self.folder, label=label, **self.shared)
        written = None if self.folder is None else self.folder / "log.jsonl"
        ranks = find_ranks(next(iter(self.layers.values())).router_weight.device)
        read = ranks.once(lambda: None if written is None or not written.is_file() else read_log(written))
        log = result.log if read is None else read
        whole = len(log) == result.steps  # a log that was removed before the run was resumed says nothing of the beginning
        kept = [name for name in _CURVES if whole and all(name in entry for entry in log)]
        curves = {name: ends([entry[name] for entry in log]) for name in kept}
        if result.loads:
            _warn_of_unused(result.loads, self.options.batch_size * self.tokens.shape[1], self.layers)
        tokens = result.steps * self.options.batch_size * self.tokens.shape[1]
        return {"steps": result.steps, "tokens": tokens, **curves}, result.budgets


def _warn_of_unused(loads: dict[str, Tensor], tokens: int, layers: dict[str, AlignmentFFN]) -> None:
    """Of the last step, which had so many tokens."""
    slots = {name: load * tokens * layers[name].top_k for name, load in loads.items()}
    unused = unused_experts(slots)
    if unused:
        warnings.warn(f"{unused_line(unused, slots)} in the last step of the alignment: {COLLAPSE}", stacklevel=5)


def _sharing(model: PreTrainedModel) -> Ranks:
    """The ranks that share the weights of ``model``, each with the device that it computes on."""
    ranks = find_ranks(computing_device(model.device))
    require(ranks.grouped, "shard", True, "in a process group, such as torchrun's")
    return ranks


def _fingerprint(
    model: PreTrainedModel,
    layers: dict[str, AlignmentFFN],
    config: DotMoeConfig,
    method: str,
    tokens: Tensor,
    early: int,
    weights: int,
) -> dict[str, Any]:
    """What must agree with a run that is resumed. ``early``: steps of the reconstruction; ``weights``: checksum of the FFNs'."""
    frozen = {id(w) for layer in layers.values() for w in (layer.gate_proj, layer.up_proj, layer.down_proj)}
    return {
        "method": method,
        "topology": [config.num_experts, config.num_experts_per_tok, *(["soft"] if config.router == "soft" else [])],
        "model": [type(model).__name__, sum(p.numel() for p in model.parameters() if id(p) not in frozen)],
        "weights": weights,
        "tokens": tokens_checksum(tokens),
        "reconstruct_steps": early,
    }


def ffn_checksum(ffns: Iterable[DenseFFN]) -> int:
    return weights_checksum(w for ffn in ffns for w in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))


def train_layers(
    model: PreTrainedModel,
    layers: dict[str, AlignmentFFN],
    config: DotMoeConfig,
    method: str,
    options: AlignmentConfig,
    tokens: Tensor | None,
    ranks: Ranks | None,
    *,
    weights: int,
    stages: list[str],
    reconstruct_steps: int,
    folder: str | Path | None,
    activation_checkpointing: bool,
    **shared: Any,
) -> tuple[AlignmentConfig, dict[str, Any], BudgetState | None]:
    """Starts the layers and takes the stages: the options as they were found, the figures by stage and the budgets. ``ranks``: that
    divide the weights; ``shared``: arguments of every stage."""
    if ranks is not None:
        with all_experts(layers):
            options = find_start(options, method, model, layers, tokens, ranks)
    _start(model, layers, config, method, options, tokens)
    figures: dict[str, Any] = {}
    budgets = None
    if tokens is not None:
        early = reconstruct_steps if "reconstruct" in stages else 0
        shared["fingerprint"] = _fingerprint(model, layers, config, method, tokens, early, weights)
        run = _Run(model, layers, tokens, options, None if folder is None else Path(folder), shared)
        if early:
            figures["reconstruct"] = run.reconstruct(early)
        if "align" in stages and options.steps:
            with recomputed(model, layers) if activation_checkpointing else nullcontext():
                figures["align"], budgets = run.align(method)
    if method == "dot" and not figures:
        Transport(layers, options).refresh(options.tau_end)
    return options, figures, budgets


def _learned(layers: dict[str, AlignmentFFN], ffns: dict[str, DenseFFN]) -> dict[str, tuple[Tensor, Tensor]]:
    """The assignment and the router of each layer, where its weights are."""
    places = {name: ffn.gate_proj.device for name, ffn in ffns.items()}
    return {n: (f.expert_of.to(places[n]), f.router_weight.detach().to(places[n])) for n, f in layers.items()}  # type: ignore[union-attr]


def _describe(
    config: DotMoeConfig, method: str, options: AlignmentConfig, figures: dict[str, Any], budgets: BudgetState | None
) -> None:
    """Writes into ``config`` what was learned beside the weights, and how."""
    if config.router == "soft":
        config.router_threshold, config.router_cap = options.threshold, options.cap
        config.router_temperature = options.router_temperature_end
        if budgets is not None:
            config.router_k, config.router_temperature = budgets
    aligned = figures.get("align", {"steps": 0, "tokens": 0})
    config.assignment = {
        "method": method,
        "init": options.init if method == "dot" else method,
        "steps": aligned["steps"],
        "seed": options.seed,
        "tokens": aligned["tokens"],
    }
    config.stages = figures or None


def convert(
    model: PreTrainedModel,
    config: DotMoeConfig,
    *,
    method: str = "dot",
    data: Tensor | Iterable[Tensor] | None = None,
    init: str | None = None,
    alignment: AlignmentConfig | None = None,
    stages: Sequence[str] = ("align",),
    reconstruct_steps: int = 100,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    stop: Stop | None = None,
    shard: bool = False,
    activation_checkpointing: bool = False,
) -> DotMoeForCausalLM:
    """Turn a dense causal LM into a sparse DOT-MoE of the same neurons.

    Args:
        model: a dense Hugging Face causal LM with gated FFNs (LLaMA, Mistral, Qwen2, Qwen3, ...), on any device. It is used up:
            the sparse model takes over its tensors. After an error or an interruption of the training it is whole again.
        config: DotMoeConfig(num_experts=E, top_k=K); E must divide the FFN's width. With router="soft" its temperature, threshold
            and cap go before those of ``alignment``, and the budgets k_l of the layers are learned.
        method: "dot" learns assignment and router together; "random", "kmeans", "activation" and "shared" keep theirs fixed and
            train the router the same way, for comparison.
        data: [N, S] int64 packed token sequences (see ``conversion.load_tokens``), or an iterable of [S]. None: nothing is
            trained, and a warning says so.
        init: what "dot" starts A and the router from: "noise", or the partition "kmeans", "activation" or "shared"; "auto" is
            the last if with data a large part of the FFNs' inputs is one vector, else the first. None: as ``alignment`` says.
        alignment: the training options. None: AlignmentConfig().
        stages: "align" trains all layers together against the dense model's output; "reconstruct" trains one layer after the other
            against its dense FFN's, which is cheaper and, given first, is what "align" starts from.
        reconstruct_steps: of each layer.
        folder: where checkpoints and the log of the training go. None: nowhere.
        resume: continue from the newest checkpoint in ``folder``, bit for bit on CPU.
        progress: show a bar.
        stop: looked at once a step; where it asks for it, Stopped is raised once the state is in ``folder``.
        shard: for a model that fits no GPU, and so lies on the CPU: each rank's GPU holds a part of its weights.
        activation_checkpointing: of a block its input alone is kept in the alignment, and the block computed once more.

    Returns:
        DotMoeForCausalLM in eval mode: with every expert on it equals the dense model. ``config.stages`` says what each stage
            reached.

    Raises:
        ValueError: an unknown method or stage, a topology that does not fit, a model without recognisable FFNs, already sparse,
            wrapped, with adapters or otherwise not as its class makes it, or not in memory; data of a wrong shape or with token ids
            outside the vocabulary, "activation" or "shared" without data.
        FloatingPointError: a non-finite loss, or in the calibration a non-finite state; names the step, the layer and the last good
            checkpoint.

    In a process group of torch.distributed every rank makes the same call and gets the same model; see ``alignment.ranks``.
    Source: DOT-MoE (arXiv 2606.01666).
    """
    require(method in METHODS, "method", repr(method), " | ".join(METHODS))
    require(init is None or method == "dot", "init", repr(init), 'together with method="dot"')
    options = AlignmentConfig() if alignment is None else alignment
    if init is not None:
        options = dataclasses.replace(options, init=init)
    require(isinstance(config, DotMoeConfig), "config", f"a {type(config).__name__}", "a DotMoeConfig")
    check_backbone(model)
    ffns = find_ffns(model)
    config = copy.deepcopy(config)
    _check_model(model, config, ffns)
    options, stages = _soft_options(options, config), _ordered(stages, reconstruct_steps)
    tokens = _check_data(model, data, method, options)
    ranks = _sharing(model) if shard else None
    with _frozen(model, ffns):
        weights = 0 if tokens is None else ffn_checksum(ffns.values())
        if ranks is None:
            options = find_start(options, method, model, ffns, tokens)
        work: Any = model if ranks is None else twin(model)
        layers = {name: _swap_in(work, name, ffn, config) for name, ffn in ffns.items()}
        if ranks is not None:
            shard_blocks(work, layers, ranks)
        given: dict[str, Any] = {"resume": resume, "progress": progress, "stop": stop, "folder": folder, "weights": weights}
        given |= {"stages": stages, "reconstruct_steps": reconstruct_steps, "activation_checkpointing": activation_checkpointing}
        options, figures, budgets = train_layers(work, layers, config, method, options, tokens, ranks, **given)
    learned = _learned(layers, ffns)
    del layers, work  # so that the dense FFNs are freed one by one
    _describe(config, method, options, figures, budgets)
    return materialize(model, config, learned, ffns=ffns).eval()
