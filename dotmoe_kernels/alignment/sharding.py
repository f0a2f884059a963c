"""A model that fits no single GPU: the frozen weights of its blocks are divided over the ranks by FSDP2 and gathered block by
block, in the forward and once more in the backward pass. What trains, the embeddings and the head lie whole on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from .hidden import find_blocks
from .module import AlignmentFFN
from .ranks import Ranks

_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same weights: what becomes of the copy, ``model`` keeps its own."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def shard_blocks(model: nn.Module, layers: Mapping[str, nn.Module], ranks: Ranks) -> None:
    """Divides the blocks of ``model``, a twin whose FFNs are ``layers``, and brings the rest to the device of ``ranks``.
    An AlignmentFFN keeps what trains of it.

    Raises:
        ValueError: a layer is in no block.
    """
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import fully_shard

    aligned = [layer for layer in layers.values() if isinstance(layer, AlignmentFFN)]
    whole = {p for layer in aligned for p in layer.parameters()}
    for layer in aligned:
        for name in _WEIGHTS:
            setattr(layer, name, nn.Parameter(getattr(layer, name).contiguous(), requires_grad=False))
    blocks = find_blocks(model, layers)
    inside = {p for block in blocks for p in block.parameters()} - whole
    whole |= {p for p in model.parameters() if p not in inside}
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(ranks.device)
    backbone = getattr(model, "base_model", None)
    if isinstance(backbone, nn.Module):  # the one that is called: it gathers the next block while this one computes
        fully_shard(backbone, mesh=mesh, ignored_params=whole)


def spread(model: nn.Module, names: Iterable[str], ranks: Ranks) -> nn.Module:
    """A twin of ``model``, whose FFNs have these ``names``, with its blocks divided over the ranks: to compute what the model gives
    where it fits no GPU. All ranks call it, and call it alike."""
    other = twin(model)
    shard_blocks(other, {name: other.get_submodule(name) for name in names}, ranks)
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
