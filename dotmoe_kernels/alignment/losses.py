"""The four-term loss (eq. 5): kl KL(dense || sparse) + ce CE(next token) + z mean(logsumexp(Z)^2) + balance E <load, mean Q>;
and, where it is wanted, a fifth term: hidden times the error of the blocks' outputs (see ``hidden``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import require, require_mask
from .chunked import chunked_distillation
from .config import AlignmentConfig
from .head import Head
from .module import AlignmentFFN


class Losses(NamedTuple):
    """Unscaled terms [], means over the valid tokens and the layers, and their weighted sum."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    z: Tensor
    balance: Tensor
    hidden: Tensor | None = None  # None: not computed


def distillation_losses(
    teacher_logits: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean KL(dense || sparse) and mean next-token cross-entropy over the valid tokens.

    Args:
        teacher_logits, logits: [B, N, V] floating point; computed in float32 (float64 for float64).
        labels: [B, N] int64 token ids; position n predicts labels[:, n + 1].
        mask: [B, N], true for a valid token.

    Returns:
        (kl [], ce []); 0 without a valid token.

    Raises:
        ValueError: logits of different shapes; a mask of another shape, or neither bool nor integers 0 and 1.

    Gradient: to ``logits``.

    Source: eq. 5 of DOT-MoE (arXiv 2606.01666).
    """
    require(
        teacher_logits.shape == logits.shape, "teacher_logits", f"of shape {list(teacher_logits.shape)}", str(list(logits.shape))
    )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_q = torch.log_softmax(logits.to(wide), -1)  # [B, N, V]
    with torch.no_grad():
        log_p = torch.log_softmax(teacher_logits.to(wide), -1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum(-1)  # [B, N]
    kl = negative_entropy - torch.einsum("bnv,bnv->bn", p, log_q)
    nll = -log_q[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]  # [B, N - 1]
    if mask is None:
        return kl.mean(), nll.mean() if nll.numel() else nll.sum()
    valid = require_mask(mask, "mask", tuple(labels.shape), "[B, N]")
    target = valid[:, 1:] & valid[:, :-1]
    kl = torch.where(valid, kl, 0).sum() / valid.sum().clamp(min=1)
    return kl, torch.where(target, nll, 0).sum() / target.sum().clamp(min=1)


def alignment_losses(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    layers: dict[str, AlignmentFFN],
    config: AlignmentConfig,
    mask: Tensor | None = None,
    *,
    head: Head | None = None,
    hidden: Tensor | None = None,
) -> Losses:
    """The terms and their weighted sum, after a sparse pass through ``layers``.

    teacher, student: [B, N, H] the last hidden states, from which ``head`` makes the logits; [B, N, V] the logits with None.
    hidden: [] the error of the blocks' outputs in that pass.
    """
    if head is None:
        kl, ce = distillation_losses(teacher, student, labels, mask)
        total = config.kl * kl + config.ce * ce
    else:
        total, kl, ce = chunked_distillation(teacher, student, head, labels, mask, kl_weight=config.kl, ce_weight=config.ce)
    routings = [layer.routing for layer in layers.values() if layer.routing is not None]
    z = torch.stack([r.z_loss for r in routings]).mean()
    balance = torch.stack([r.balance_loss for r in routings]).mean()
    total = total + config.z * z + config.balance * balance
    return Losses(total if hidden is None else total + config.hidden * hidden, kl, ce, z, balance, hidden)
