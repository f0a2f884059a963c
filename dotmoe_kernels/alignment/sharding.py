"""A model that fits no single GPU: FSDP2 divides its weights over the ranks and gathers them block by block, in the forward and
once more in the backward pass.

    frozen     the blocks are divided; what is aligned, the embeddings and the head lie whole on every rank
    trained    all of it is, and so are gradients and moments; what is around the blocks is gathered for a whole pass (``Divided``)

A block is divided as soon as its weights are there, so that of the whole a rank never has more than its part and a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .hidden import block_paths, find_blocks
from .module import AlignmentFFN
from .ranks import Ranks

_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
# called with the path of every block before it is divided, and last with "" for what is around them: to read the weights, say
Prepare = Callable[[str], None]


def twin(model: nn.Module, *, trains: bool = False) -> nn.Module:
    """A copy of the modules over the same weights: what becomes of the copy, ``model`` keeps its own. Nothing of the copy trains,
    or ``trains`` what does in ``model``."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=trains and p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def is_divided(tensor: Tensor) -> bool:
    """Whether this rank has a part of it: a DTensor, whose class takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is divided; all ranks call it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """``value``, whole on every rank or a part already, divided as ``like`` is."""
    if not is_divided(like) or is_divided(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(value.to(like.device), placed.device_mesh, placed.placements, src_data_rank=None)


def _mesh(ranks: Ranks) -> Any:
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import

    return init_device_mesh(ranks.device.type, (ranks.count,))


def _divide_blocks(
    model: nn.Module, names: Iterable[str], mesh: Any, ranks: Ranks, prepare: Prepare | None, **options: Any
) -> list[Any]:
    """The blocks that hold the FFNs ``names``, divided; an AlignmentFFN keeps what trains of it.

    Raises:
        ValueError: an FFN is in no block.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = block_paths(model, {name: model.get_submodule(name) for name in names})
    for path, block in blocks.items():
        if prepare is not None:
            prepare(path)
        kept: set[nn.Parameter] = set()
        for layer in [module for module in block.modules() if isinstance(module, AlignmentFFN)]:
            kept |= set(layer.parameters())
            for name in _WEIGHTS:
                setattr(layer, name, nn.Parameter(getattr(layer, name).contiguous(), requires_grad=False))
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept, **options)
    if prepare is not None:
        prepare("")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(ranks.device)
    return list(blocks.values())


def shard_blocks(model: nn.Module, names: Iterable[str], ranks: Ranks, prepare: Prepare | None = None) -> None:
    """Divides the blocks of ``model``, which does not train but for AlignmentFFNs and whose FFNs have these ``names``, and brings
    the rest to the device of ``ranks``."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(ranks)
    _divide_blocks(model, names, mesh, ranks, prepare)
    around = {p for p in model.parameters() if not is_divided(p)}
    for parameter in around:
        parameter.data = parameter.data.to(ranks.device)
    backbone = getattr(model, "base_model", None)
    if isinstance(backbone, nn.Module):  # the one that is called: it gathers the next block while this one computes
        fully_shard(backbone, mesh=mesh, ignored_params=around)


def spread(model: nn.Module, names: Iterable[str], ranks: Ranks) -> nn.Module:
    """A twin of ``model``, whose FFNs have these ``names``, with its blocks divided over the ranks: to compute what the model gives
    where it fits no GPU. All ranks call it, and call it alike."""
    other = twin(model)
    shard_blocks(other, names, ranks)
    return other


class Divided(nn.Module):
    """Runs functions of ``model``, all of which is divided, with what is around its blocks gathered. In a backward pass every rank
    is left with the sum of the gradients of its part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def divide(
    model: nn.Module, names: Iterable[str], ranks: Ranks, prepare: Prepare | None = None, *, dtype: torch.dtype | None = None
) -> Divided:
    """``model`` divided, to train it; it is used up. Arguments as of ``shard_blocks``. ``dtype``: that blocks are gathered in;
    gradients are added in float32. Autocast would keep its casts of whole weights for the backward pass."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    mesh = _mesh(ranks)
    blocks = _divide_blocks(model, names, mesh, ranks, prepare, mp_policy=policy)
    divided: Any = Divided(model)
    fully_shard(divided, mesh=mesh, reshard_after_forward=True)
    for part in (divided, *blocks):
        part.set_gradient_divide_factor(1.0)  # a pass counts for its share of the step already
        part.set_force_sum_reduction_for_comms(True)
    return divided


def whole_layer(layer: AlignmentFFN) -> AlignmentFFN:
    """A copy of a layer that has all of its weights, where they are divided, and shares what trains. All ranks."""
    weights = {name: whole(getattr(layer, name)) for name in _WEIGHTS}
    other = copy.copy(layer)
    other._parameters = {name: p for name, p in layer._parameters.items() if name not in _WEIGHTS}
    for name, weight in weights.items():
        setattr(other, name, weight.detach())
    return other


@contextmanager
def recomputed(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, of a pass through a block with ``layers`` its input alone is kept, and the backward pass computes the block again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wanted = {id(block) for block in find_blocks(model, layers)}
    places = [(parent, name, block) for parent in model.modules() for name, block in parent.named_children() if id(block) in wanted]
    for parent, name, block in places:
        setattr(parent, name, checkpoint_wrapper(block))
    try:
        yield
    finally:
        for parent, name, block in places:
            setattr(parent, name, block)
