"""The stages of a model that no process has whole, from folder to folder: read and divided a block at a time (``origins``), written
one tensor at a time by the first rank. Every rank makes the same calls.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import require
from .._files import write_folder
from ..alignment.config import AlignmentConfig
from ..alignment.module import AlignmentFFN
from ..alignment.ranks import Ranks, computing_device, find_ranks
from ..alignment.sharding import shard_blocks
from ..models.card import model_card
from ..models.config import DotMoeConfig
from ..models.folder import check_folder
from ..models.modeling import DotMoeForCausalLM
from ..models.shards import ShardWriter, Spec, file_layout, in_files, save_configs, writing
from ..models.surgery import find_ffns, recognise_ffn
from ..models.target import check_target, in_its_place, replaced_files
from .finetuning import FinetuneConfig, tune
from .origins import Files
from .pipeline import (
    METHODS,
    _check_data,
    _check_model,
    _describe,
    _ordered,
    _soft_options,
    _swap_in,
    ffn_checksum,
    train_layers,
)
from .sharded import Student, whole_tensors
from .streaming import Source, write_converted


def sharing_ranks() -> Ranks:
    """Those of the process group, each with the device that it computes on."""
    ranks = find_ranks(computing_device(torch.device("cpu")))
    require(ranks.grouped, "shard", True, "in a process group, such as torchrun's")
    return ranks


def convert_files(
    source: Files,
    output: Path,
    config: DotMoeConfig,
    *,
    method: str = "dot",
    data: Tensor | None = None,
    alignment: AlignmentConfig | None = None,
    stages: Sequence[str] = ("align",),
    reconstruct_steps: int = 100,
    **shared: Any,
) -> None:
    """What ``save(convert(model, config, ...), output)`` writes, of a dense model in a folder; arguments as of ``convert``.

    Raises:
        ValueError: see ``convert``; a checkpoint whose tensors have other names than in the model.
        OSError: the disk is full or not writable.
    """
    require(method in METHODS, "method", repr(method), " | ".join(METHODS))
    ranks, ffns, config = sharing_ranks(), find_ffns(source.model), copy.deepcopy(config)
    _check_model(source.model, config, ffns)
    options = _soft_options(AlignmentConfig() if alignment is None else alignment, config)
    tokens = _check_data(source.model, data, method, options)
    given = {"stages": _ordered(stages, reconstruct_steps), "reconstruct_steps": reconstruct_steps, **shared}
    learned, *found = _train(source, config, method, options, tokens, ranks, given)

    def write() -> None:
        origin = Source(source.folder, copy.deepcopy(source.config), source.dtype, otherwise="a run without --shard")
        config.bind(origin.config, dense_width=next(iter(ffns.values())).gate_proj.shape[0])
        _describe(config, method, *found)
        write_converted(origin, config, lambda name, ffn: learned[name], output)

    ranks.once(write)


def _train(
    source: Files,
    config: DotMoeConfig,
    method: str,
    options: AlignmentConfig,
    tokens: Tensor | None,
    ranks: Ranks,
    given: dict[str, Any],
) -> tuple[Any, ...]:
    """The assignment and the router of each layer, and of ``train_layers`` the options, the figures and the budgets."""
    model, fill = source.fresh()
    ffns, text = find_ffns(model), model.config.get_text_config()
    layers: dict[str, AlignmentFFN] = {}
    checksums: list[int] = []

    def prepare(path: str) -> None:
        fill(path)
        for name in [name for name in ffns if path and name.startswith(f"{path}.")]:
            ffn = recognise_ffn(model.get_submodule(name), text, name=name)  # once more, now that gate and up can be told apart
            assert ffn is not None
            checksums.append(ffn_checksum([ffn]))
            layers[name] = _swap_in(model, name, ffn, config)

    shard_blocks(model.eval(), ffns, ranks, prepare)
    found = train_layers(model, layers, config, method, options, tokens, ranks, weights=sum(checksums), **given)
    return {n: (f.expert_of.cpu(), f.router_weight.detach().cpu()) for n, f in layers.items()}, *found  # type: ignore[union-attr]


def finetune_files(source: Files, output: Path, data: Tensor, config: FinetuneConfig, **options: Any) -> None:
    """What ``save(finetune(load(source), data, config, ...), output)`` writes; arguments as of ``finetune``. The teacher may be
    ``source.model``.

    Raises:
        ValueError: see ``finetune``.
        OSError: the disk is full or not writable.
    """
    ranks = sharing_ranks()
    model: Any = source.model
    tune(model, _Tuned(source, output, ranks), data, config, ranks=ranks, **options)


class _Tuned(Files):
    """A converted model in ``source``, and once it is fine-tuned the one in ``output``."""

    def __init__(self, source: Files, output: Path, ranks: Ranks) -> None:
        super().__init__(source.folder, source._dtype)
        self.model, self.source, self.output, self.ranks = source.model, source, output, ranks

    def take_back(self, student: Student, options: Any) -> None:
        write_student(student, self.source, self.output, self.ranks)
        self.folder, self.config = self.output, check_folder(self.output, DotMoeForCausalLM)

    def note(self, stages: dict[str, Any]) -> None:
        """In the config of the folder."""

        def write() -> None:
            with write_folder(self.folder) as new:
                self.config.save_pretrained(new)

        self.config.stages = stages
        self.ranks.once(write)


def write_student(student: Student, source: Files, folder: Path, ranks: Ranks) -> None:
    """A model that was fine-tuned, as a folder.

    Raises:
        OSError: the disk is full or not writable; there is no folder then.
    """
    with torch.device("meta"):
        target = DotMoeForCausalLM(copy.deepcopy(student.model.config))
    kept = target.state_dict().keys()
    layout = {n: Spec(_kind(t, source.dtype), tuple(t.shape)) for n, t in file_layout(target).items()}
    gathered, error = whole_tensors(student), None
    if ranks.first:
        try:
            with write_folder(folder, replaced_files(tokenizer=False)) as new:
                with writing(new, layout) as writer:
                    for name, tensor in student.model.named_buffers():
                        if name in kept:
                            _write(writer, target, name, tensor)
                    for name, tensor, _ in gathered:
                        _write(writer, target, name, tensor.to(_kind(tensor, source.dtype)))
                save_configs(target, new, source.folder, source.dtype)
                check_folder(new, DotMoeForCausalLM)
        except OSError as caught:
            error = caught
    for _ in gathered:  # those that are left: the other ranks give their parts of them
        pass
    ranks.once(lambda: _raise(error))


def publish(
    source: Files, output: Path, *, tokenizer: Any = None, overwrite: bool = False, card: Mapping[str, Any] | None = None
) -> None:
    """``save`` of a converted model that lies in a folder: its files under another name, or copies. Arguments as of ``save``."""
    path = check_target(output, "folder", overwrite)
    with write_folder(path, replaced_files(tokenizer=tokenizer is not None)) as new:
        for file in source.folder.iterdir():
            try:
                os.link(file, new / file.name)
            except OSError:  # on another file system
                shutil.copy2(file, new / file.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").unlink(missing_ok=True)  # its text would change under the other name as well
        (new / "README.md").write_text(model_card(source.model, path.name, card or {}), encoding="utf-8")  # type: ignore[arg-type]
        with in_its_place(new, path):
            check_folder(new, DotMoeForCausalLM)


def _kind(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _write(writer: ShardWriter, target: Any, name: str, tensor: Tensor) -> None:
    for file_name, part in in_files(target, {name: tensor}).items():
        writer.write(file_name, part)


def _raise(error: OSError | None) -> None:
    if error is not None:
        raise error
