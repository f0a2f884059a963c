"""The teacher of a fine-tuning: whose next-token distribution the sparse model is held to, and the loss that does it.

    kl KL(teacher || sparse) + ce CE(next token)

Without a second copy of what does not train: a teacher made from the model itself, with every expert on, shares those tensors. With
adapters that is all of them; where every weight trains it is a copy of the dense model in its own dtype.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from .._checks import refuse, require
from ..alignment.chunked import chunked_distillation
from ..alignment.head import Head, find_head
from ..alignment.losses import distillation_losses
from ..models.block import moe_blocks
from ..models.checkpoint import load
from ..models.inspect import is_converted
from ..models.modeling import DotMoeForCausalLM
from .sources import read_dense

ITSELF, BEFORE = "the model itself, every expert on", "the model itself, before its zero experts"
_PROBE = 16  # tokens on which a head is compared with the model's logits


class Teacher(NamedTuple):
    """A model that teaches, and what its loss needs to know of both models."""

    model: PreTrainedModel
    name: str  # for the figures
    heads: tuple[Head, Head] | None  # the student's and the teacher's, weights aside; None: the loss takes whole logits
    kl: float
    ce: float
    dtype: torch.dtype | None  # of the products of the student's head, as under autocast
    mode: Callable[[], AbstractContextManager[object]] = nullcontext  # in which it is the teacher, where it is the student as well

    def losses(self, student: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """After a pass of both on tokens [B, N]: kl KL + ce CE, which has a gradient, and the two by name, unweighted."""
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False), self.mode():
            theirs = self._states(self.model, tokens, 1)
        ours = self._states(student, tokens, 0)
        if self.heads is None:
            kl, ce = distillation_losses(theirs, ours, tokens)
            return self.kl * kl + self.ce * ce, {"kl": kl, "ce": ce}
        total, kl, ce = chunked_distillation(
            theirs,
            ours,
            self._head(student, 0),
            tokens,
            teacher_head=self._head(self.model, 1),
            dtype=self.dtype,
            kl_weight=self.kl,
            ce_weight=self.ce,
        )
        return total, {"kl": kl, "ce": ce}

    def _states(self, model: PreTrainedModel, tokens: Tensor, which: int) -> Tensor:
        """The last hidden states [B, N, H], or the logits [B, N, V] where the heads are not known."""
        if self.heads is None:
            return model(input_ids=tokens, use_cache=False).logits
        return self.heads[which].hidden(tokens)

    def _head(self, model: PreTrainedModel, which: int) -> Head:
        """With the weights as they are now: they train, and change their dtype."""
        assert self.heads is not None
        embeddings: Any = model.get_output_embeddings()
        return self.heads[which]._replace(weight=embeddings.weight, bias=getattr(embeddings, "bias", None))


def _own(model: DotMoeForCausalLM, adapters: bool, static: bool) -> DotMoeForCausalLM:
    """``model`` as it is now, with every expert on unless ``static``; shares what will not train, and the routers: either they
    choose nothing here, or those of ``model`` will be new parameters."""
    gates = {id(block.gate.weight) for block in moe_blocks(model).values()}
    shared = [p for p in model.parameters() if adapters or not p.requires_grad or id(p) in gates]
    teacher = copy.deepcopy(model, {id(t): t for t in (*shared, *model.buffers())})
    for block in moe_blocks(teacher).values():
        block.gate.bypass = not static
    return teacher


def _read(name: str | os.PathLike[str], model: DotMoeForCausalLM) -> PreTrainedModel:
    """The dense or converted model of a folder or a name, in the dtype and on the device of ``model``."""
    place = os.fspath(name)
    try:
        if is_converted(place):
            return load(place, dtype=model.dtype, device=model.device)
        return read_dense(place, model.dtype).to(model.device)  # type: ignore[arg-type]
    except (ValueError, OSError, SafetensorError) as error:
        refuse("teacher", f"{place}, which cannot be read ({error})", "the folder of a causal LM, or a name")


def other_teacher(teacher: Any, model: DotMoeForCausalLM) -> tuple[PreTrainedModel, str]:
    """One that is not ``model`` itself, and what figures call it."""
    if isinstance(teacher, str | os.PathLike):
        return _read(teacher, model), os.fspath(teacher)
    kinds = "a causal LM of transformers, a folder or a name"
    require(isinstance(teacher, PreTrainedModel), "teacher", f"a {type(teacher).__name__}", kinds)
    require(teacher.device == model.device, "teacher", f"on {teacher.device}", f"the device of model, {model.device}")
    return teacher, str(teacher.config.name_or_path or type(teacher).__name__)


def _find(teacher: Any, model: DotMoeForCausalLM, adapters: bool, static: bool) -> tuple[PreTrainedModel, str]:
    """The model that teaches, and what figures call it."""
    if teacher is model:
        return _own(model, adapters, static), BEFORE if static else ITSELF
    return other_teacher(teacher, model)


def _vocabulary(model: PreTrainedModel) -> int | None:
    """Tokens that it gives logits of."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return None if weight is None else len(weight)


def require_same_tokens(model: PreTrainedModel, found: PreTrainedModel, name: str) -> None:
    """
    Raises:
        ValueError: the vocabularies differ in size.
    """
    theirs, ours = _vocabulary(found), _vocabulary(model)
    require(theirs == ours, "teacher", f"{name}, of {theirs} tokens", f"a causal LM of the same vocabulary, {ours} tokens")


def probe(model: PreTrainedModel, tokens: Tensor) -> Head | None:
    """Its head, if it is a known one."""
    training = model.training
    try:
        return find_head(model.eval(), tokens[:1, :_PROBE].long().to(model.device))
    finally:
        model.train(training)


def known_heads(model: DotMoeForCausalLM, found: PreTrainedModel, heads: tuple[Head | None, Head | None]) -> Any:
    """``heads`` of student and teacher, or None and a warning where one of them is not known."""
    if None not in heads:
        return heads
    warnings.warn(
        f"the logits of {type((model.backbone, found)[heads.index(None)]).__name__} are not its output embedding of the "
        "backbone's last hidden state, scaled or capped as the config says: the loss takes the whole logits of both passes, "
        "which costs memory and time",
        stacklevel=6,
    )
    return None


@contextmanager
def teaching(
    teacher: Any,
    model: DotMoeForCausalLM,
    tokens: Tensor,
    *,
    kl: float,
    ce: float,
    adapters: bool,
    half: bool,
    static: bool = False,
) -> Iterator[Teacher | None]:
    """``teacher`` made ready, in eval mode meanwhile; None if it is None.

    Args:
        teacher: ``model`` itself, which is copied as far as it trains; another causal LM, which stays as it is; a folder or a name.
        tokens: [N, S] of the training.
        kl, ce: weights of the two terms.
        adapters: these, and perhaps the routers, alone train.
        half: the student computes in bfloat16.
        static: ``model`` itself teaches with its own routing; its routers will be replaced.

    Raises:
        ValueError: no causal LM, another vocabulary or device, a folder that cannot be read.
    """
    if teacher is None:
        yield None
        return
    found, name = _find(teacher, model, adapters, static)
    require_same_tokens(model, found, name)
    heads = known_heads(model, found, (probe(model, tokens), probe(found, tokens)))
    training = found.training
    found.eval()
    try:
        yield Teacher(found, name, heads, kl, ce, torch.bfloat16 if half else None)
    finally:
        found.train(training)
