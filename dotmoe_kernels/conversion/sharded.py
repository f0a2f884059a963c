"""The fine-tuning of a model that fits no GPU: the student and its teacher, divided over the ranks (``alignment.sharding``).

The student is made of fresh modules block by block: zero experts, adapters and float32 come to a block before it is divided. Its
teacher is another model that is divided, or with adapters the student itself, as it was before them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .._checks import refuse
from ..alignment.checkpoints import weights_checksum
from ..alignment.ranks import Ranks
from ..alignment.sharding import Divided, Prepare, divide, is_divided, shard_blocks, whole
from ..models.block import DotMoeRouter, moe_blocks
from ..models.modeling import DotMoeForCausalLM
from .adapters import add_adapters
from .origins import Files, Memory, ffn_names
from .teacher import BEFORE, ITSELF, Teacher, known_heads, other_teacher, probe, require_same_tokens
from .zero_experts import note_zero_experts


class Student(NamedTuple):
    divided: Divided
    checksums: tuple[int, int]  # of the weights before and after zero experts are added
    gates: list[DotMoeRouter]  # the routers as they were before; with adapters alone

    @property
    def model(self) -> Any:
        return self.divided.model


class _Counted:
    """Reads a part, and adds up the checksum of its weights."""

    def __init__(self, model: nn.Module, fill: Prepare | None) -> None:
        self.model, self.fill, self.checksum = model, fill, 0

    def __call__(self, path: str) -> None:
        if self.fill is not None:
            self.fill(path)
        self.checksum += weights_checksum(self.parameters(path))

    def parameters(self, path: str) -> list[nn.Parameter]:
        """Of the part, which is not divided yet."""
        return [p for p in self.model.get_submodule(path).parameters() if not is_divided(p)]


class _Prepared(_Counted):
    """Makes a part of it what trains. ``options``: a FinetuneConfig."""

    def __init__(self, model: nn.Module, fill: Prepare | None, options: Any, device: torch.device) -> None:
        super().__init__(model, fill)
        self.options, self.device = options, device
        self.generator = torch.Generator().manual_seed(options.seed)
        self.after, self.gates = 0, list[DotMoeRouter]()

    def __call__(self, path: str) -> None:
        super().__call__(path)
        options, module = self.options, self.model.get_submodule(path)
        gates = [block.gate for block in moe_blocks(module).values()] if path else []
        if options.lora_rank:
            self.gates += [copy.deepcopy(gate).requires_grad_(False).to(self.device) for gate in gates]
        for gate in gates if options.zero_experts else ():
            gate.add_zero_experts(options.zero_experts, self.generator)
        self.after += weights_checksum(self.parameters(path))
        if options.lora_rank:
            for parameter in self.parameters(path):
                parameter.requires_grad_(False)
            if path:
                add_adapters(module, options)
        for gate in gates if options.lora_rank or not options.router_lr else ():
            gate.weight.requires_grad_(bool(options.router_lr))
        for parameter in self.parameters(path):
            # a small step would be lost in a 16-bit weight, and float16 would need its loss scaled
            if parameter.dtype == torch.float16 or (parameter.dtype == torch.bfloat16 and parameter.requires_grad):
                parameter.data = parameter.data.float()


def divide_student(origin: Memory | Files, options: Any, ranks: Ranks, half: bool) -> Student:
    """The model as it trains. ``options``: a FinetuneConfig; ``half``: it computes in bfloat16."""
    model, fill = origin.fresh(trains=True)
    prepared = _Prepared(model, fill, options, ranks.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # of the adapters
        divided = divide(model, moe_blocks(model), ranks, prepared, dtype=torch.bfloat16 if half else None)
    if options.zero_experts:
        note_zero_experts(model.config, options.zero_experts)
    return Student(divided, (prepared.checksum, prepared.after), prepared.gates)


def whole_tensors(student: Student) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it moved) of every parameter, one at a time gathered, as they are once adapters are merged and gone.
    All ranks."""
    layers = [module for module in student.model.modules() if hasattr(module, "get_base_layer")]
    merged = {id(layer.get_base_layer().weight): layer for layer in layers}
    for name, parameter in student.model.named_parameters():
        if ".lora_" in name:
            continue
        tensor, layer = whole(parameter.detach()), merged.get(id(parameter))
        if layer is not None:
            for adapter in layer.active_adapters:
                tensor += whole(layer.get_delta_weight(adapter).detach())
        yield name.replace(".base_layer.", "."), tensor, parameter.requires_grad or layer is not None


@contextmanager
def _as_before(student: Student, static: bool) -> Iterator[None]:
    """Inside, the student is the model that it was before its adapters and zero experts, with every expert on unless ``static``."""
    model, training = student.model, student.model.training
    layers = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    blocks = list(moe_blocks(model).values())
    ours = [block.gate for block in blocks]
    try:
        for block, gate in zip(blocks, student.gates, strict=True):
            gate.bypass, block.gate = not static, gate
        for layer in layers:
            layer.enable_adapters(False)
        model.eval()
        yield
    finally:
        model.train(training)
        for layer in layers:
            layer.enable_adapters(True)
        for block, gate in zip(blocks, ours, strict=True):
            block.gate = gate


def _spread(origin: Memory | Files, ranks: Ranks) -> tuple[Any, int]:
    """The model with its blocks divided, and the checksum of its weights."""
    model, fill = origin.fresh()
    counted = _Counted(model, fill)
    shard_blocks(model, ffn_names(model), ranks, counted)
    return model, counted.checksum


def _other(teacher: Any, model: DotMoeForCausalLM) -> tuple[Memory | Files, str]:
    """A teacher that is not ``model``, and what figures call it."""
    if isinstance(teacher, str | os.PathLike) and Path(teacher).expanduser().is_dir():
        try:
            return Files(teacher, model.dtype), os.fspath(teacher)
        except (ValueError, OSError, SafetensorError) as error:
            refuse("teacher", f"{os.fspath(teacher)}, which cannot be read ({error})", "the folder of a causal LM, or a name")
    found, name = other_teacher(teacher, model)
    return Memory(found), name


def divided_teacher(
    teacher: Any,
    model: DotMoeForCausalLM,
    student: Student,
    origin: Memory | Files,
    tokens: Tensor,
    ranks: Ranks,
    *,
    kl: float,
    ce: float,
    adapters: bool,
    half: bool,
    static: bool,
) -> tuple[Teacher | None, int | None]:
    """As ``teaching`` makes it, and the checksum of its weights.

    Raises:
        ValueError: see ``teaching``.
    """
    if teacher is None:
        return None, None
    mode: Any = nullcontext
    if teacher is not model:
        source, name = _other(teacher, model)
        require_same_tokens(model, source.model, name)
        found, checksum = _spread(source, ranks)
    elif adapters:
        name, found, checksum = BEFORE if static else ITSELF, student.model, student.checksums[0]
        mode = partial(_as_before, student, static)
    else:
        name = BEFORE if static else ITSELF
        found, checksum = _spread(origin, ranks)
        for block in moe_blocks(found).values():
            block.gate.bypass = not static
    with torch.no_grad():
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=half):  # without it float32 meets the blocks' bfloat16
            ours = student.divided(partial(probe, student.model), tokens)
        theirs = ours if found is student.model else probe(found, tokens)
    heads = known_heads(model, found.eval() if found is not student.model else found, (ours, theirs))
    return Teacher(found, name, heads, kl, ce, torch.bfloat16 if half else None, mode), checksum
