"""Static rivals: weights are removed once, for every token alike. Nothing is trained.

structured   the same neurons of an FFN for all tokens, as many as a token visits in the MoE and the router's parameters besides
layers       whole decoder blocks dropped, as near to the same number of active parameters as blocks allow
two_to_four  of every four weights along a linear layer's inputs the two of the largest score stay; all linear layers of the
             blocks, as in the paper: FFN and attention
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dotmoe_kernels.models.surgery import DenseFFN


def neurons_kept(F: int, H: int, num_experts: int, top_k: int) -> int:
    """Neurons whose parameters are those that a token touches in the MoE: F K / E neurons of 3 H and a router of E H."""
    return min(F, int((top_k * F // num_experts * 3 * H + num_experts * H) // (3 * H)))


@contextmanager
def watched_inputs(modules: dict[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, ``take`` gets the name and the first argument [T, D] of every call of the modules."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: take(name, args[0].detach().flatten(0, -2))

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_norms(model: nn.Module, modules: dict[str, nn.Module], tokens: Tensor, *, batch_size: int = 4) -> dict[str, Tensor]:
    """[D] by module: the Euclidean norm over the tokens [N, S] of each of its inputs."""
    sums: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.double().square().sum(0)

    with watched_inputs(modules, take):
        for batch in tokens.split(batch_size):
            model(input_ids=batch, use_cache=False)
    return {name: value.sqrt().float() for name, value in sums.items()}


def magnitude_score(ffn: DenseFFN) -> Tensor:
    """[F] norm of a neuron's weights in all three projections."""
    parts = ffn.gate_proj.float().square().sum(1) + ffn.up_proj.float().square().sum(1) + ffn.down_proj.float().square().sum(0)
    return parts.sqrt()


def down_projections(ffns: dict[str, DenseFFN]) -> dict[str, nn.Module]:
    return {name: ffn.module.get_submodule(ffn.children[2]) for name, ffn in ffns.items()}


def wanda_scores(model: nn.Module, ffns: dict[str, DenseFFN], tokens: Tensor) -> dict[str, Tensor]:
    """[F] by layer: sum over outputs of |Wd_hf| |U_f|, a neuron's share of Wanda's score of the down projection."""
    norms = input_norms(model, down_projections(ffns), tokens)
    return {name: ffn.down_proj.float().abs().sum(0) * norms[name] for name, ffn in ffns.items()}


def keep_neurons(ffns: dict[str, DenseFFN], scores: dict[str, Tensor], num_experts: int, top_k: int) -> None:
    """Shrinks every FFN to its neurons of the largest scores."""
    for name, ffn in ffns.items():
        F, H = ffn.gate_proj.shape
        kept = scores[name].topk(neurons_kept(F, H, num_experts, top_k)).indices.sort().values
        weights = ffn.gate_proj[kept], ffn.up_proj[kept], ffn.down_proj[:, kept]
        ffn.assign(*(w.detach().clone() for w in weights), requires_grad=False)


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    blocks = model.base_model.layers
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@torch.no_grad()
def block_influence(model: PreTrainedModel, tokens: Tensor, *, batch_size: int = 4) -> Tensor:
    """[L] mean over tokens of 1 - cos(h in, h out) (ShortGPT)."""
    blocks = block_list(model)
    sums = torch.zeros(len(blocks))

    def watch(n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            after = output[0] if isinstance(output, tuple) else output
            sums[n] += (1 - nn.functional.cosine_similarity(args[0].float(), after.float(), dim=-1)).sum().cpu()

        return hook

    handles = [block.register_forward_hook(watch(n)) for n, block in enumerate(blocks)]
    try:
        for batch in tokens.split(batch_size):
            model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums / tokens.numel()


def drop_blocks(model: PreTrainedModel, influence: Tensor, budget: int) -> None:
    """Keeps the blocks of the largest influence, in their order, as many as come nearest to ``budget`` parameters in all."""
    blocks = block_list(model)
    size = sum(p.numel() for p in blocks[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in blocks.parameters())
    count = min(len(blocks), max(1, round((budget - rest) / size)))
    kept = sorted(influence.topk(count).indices.tolist())
    model.base_model.layers = nn.ModuleList(blocks[n] for n in kept)
    model.config.num_hidden_layers = count
    for n, block in enumerate(model.base_model.layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # its place in a cache
                module.layer_idx = n  # type: ignore[assignment]


def two_to_four(weight: Tensor, score: Tensor) -> Tensor:
    """``weight`` [O, I] with the two of the largest ``score`` of every four inputs of an output; the others zero."""
    O, I = weight.shape
    if I % 4:
        raise ValueError(f"weight is of shape {[O, I]}; allowed: [O, I] with I divisible by 4")
    kept = score.view(O, I // 4, 4).topk(2, dim=2).indices
    mask = torch.zeros(O, I // 4, 4, dtype=torch.bool, device=weight.device).scatter_(2, kept, True)
    return torch.where(mask.view(O, I), weight, 0)


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of all blocks."""
    return {name: m for name, m in block_list(model).named_modules() if isinstance(m, nn.Linear)}


def prune_two_to_four(model: PreTrainedModel, norms: dict[str, Tensor] | None) -> list[Tensor]:
    """All linear layers of the blocks to 2:4, by |W|, or with ``norms`` [I] of their inputs by Wanda's |W| |x|; their weights."""
    found: list[Tensor] = []
    for name, linear in block_linears(model).items():
        score = linear.weight.detach().float().abs()
        if norms is not None:
            score = score * norms[name]
        linear.weight.data = two_to_four(linear.weight.detach(), score)
        found.append(linear.weight)
    return found
