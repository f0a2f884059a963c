"""KL and CE over the vocabulary, chunked over tokens with the head's product inside the chunk.

    z = head(x), y = head(x')                      [c, V] of a chunk of student and teacher states
    kl = sum_v p (log p - log q),  ce = -log q[target],   log q = log_softmax(z), log p = log_softmax(y)
    dz = kl_weight (q - p) + ce_weight (q - onehot(target));   dx = dz W

Once a chunk's logits are there, so is its part of the gradients. They are computed in the forward pass, and the backward pass
scales them. Softmax and loss in float32, the head's products in the dtype of its weight or another. Alive at a time: four [c, V] in
float32; kept for the backward pass: dx [T, H]. Neither the teacher's logits nor the student's are ever whole.

A head that trains gets dW = sum over the chunks of dz^T x, [V, H] in float32, which is kept as well. Each chunk reads and writes
all of it, so that there a chunk has at least H / 4 tokens: its four [c, V] then take what dW does.

Liger-Kernel's LigerFusedLinearJSDLoss at beta = 0 has the same KL, but it cannot stand in: it divides both terms by one count (the
last token of a sequence has a KL and no label), always forms the gradient of the head too (a fourth product and a [V, H]
buffer), asks the device in its backward pass whether the incoming gradient is one, and knows no cap on the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autograd import first_order
from .._checks import (
    compute_dtype,
    is_integer,
    require,
    require_float,
    require_indices,
    require_mask,
    require_range,
    require_same,
    require_shape,
)
from .._tiles import LOSS_CHUNK
from .head import Head

_LEAST_ROWS = 64  # of a chunk: each reads the whole head
_ADDED_ROWS = 1024  # of a head's gradient at a time on a CPU: in the cache from the product to the sum


def chunk_rows(vocabulary: int, device: torch.device, hidden: int = 0) -> int:
    """Tokens of a chunk. ``hidden``: H of a head that trains."""
    return max(_LEAST_ROWS, hidden // 4, LOSS_CHUNK.get(device.type, LOSS_CHUNK["cuda"]) // (4 * vocabulary))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] b [k, n]."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type != "cpu":
        total += torch.mm(a, b)
    else:  # on a CPU the sum of two dtypes makes a whole copy in the wider one
        for rows, some in zip(total.split(_ADDED_ROWS), a.split(_ADDED_ROWS), strict=True):
            rows += torch.mm(some, b)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        heads: tuple[Head, Head],
        target: Tensor,
        soft: Tensor,
        hard: Tensor,
        count: Tensor | float,
        weights: tuple[float, float],
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, teacher [T, H]; weight, bias: what the gradient of the student's head goes to; heads: the student's, as its
        products are taken, and the teacher's; target [T]; soft, hard [T]: what a token's KL and CE count, in units of 1 / count."""
        (kl_weight, ce_weight), (head, teacher_head) = weights, heads
        kl, nll = torch.empty_like(soft), torch.empty_like(hard)
        dx = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=soft.dtype) if ctx.needs_input_grad[1] else None
        db = torch.zeros_like(bias, dtype=soft.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        of_q, of_label = (kl_weight * soft + ce_weight * hard)[:, None], (-ce_weight * hard)[:, None]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x, label = hidden[rows].to(head.weight.dtype), target[rows, None]
            z = head.logits(x)
            log_q = torch.log_softmax(z, -1)  # [c, V]
            capped = None if head.cap is None else z
            del z
            log_p = torch.log_softmax(teacher_head.logits(teacher[rows]), -1)
            nll[rows] = -log_q.gather(1, label)[:, 0]
            p = log_p.exp()
            kl[rows] = log_p.sub_(log_q).mul_(p).sum(-1)
            del log_p
            if dx is not None or dw is not None or db is not None:
                dz = log_q.exp_().mul_(of_q[rows]).sub_(p, alpha=kl_weight)
                dz.scatter_(1, label, dz.gather(1, label) + of_label[rows])  # scatter_add_ has no deterministic form on a GPU
                dz = head.product_gradient(dz, capped)
                if dx is not None:
                    torch.mm(dz, head.weight, out=dx[rows]) if dx.dtype == dz.dtype else dx[rows].copy_(torch.mm(dz, head.weight))
                if dw is not None:
                    _add_product(dw, dz.T, x)
                if db is not None:
                    db += torch.where(soft[rows, None] > 0, dz, 0).sum(0, dtype=db.dtype)  # a padding token's x is 0, its dz is not
                del dz
            del log_q, p, capped
        ctx.save_for_backward(hidden, None if dw is None else weight, dx, dw, db)
        ctx.count, ctx.kinds = count, (hidden.dtype, weight.dtype, weight.dtype)
        kl, ce = torch.dot(soft, kl) / count, torch.dot(hard, nll) / count
        total = kl_weight * kl + ce_weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    @first_order("chunked_distillation")
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *made = ctx.saved_tensors  # the first two are kept for first_order alone: a second derivative would pass through them
        # the mean's 1 / count comes last: it would push the small entries of a 16-bit dz out of range
        scale = grad / ctx.count
        scaled = (None if g is None else (g.to(grad.dtype) * scale).to(kind) for g, kind in zip(made, ctx.kinds, strict=True))
        return (*scaled, *[None] * 8)


def chunked_distillation(
    teacher: Tensor,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    teacher_head: Head | None = None,
    dtype: torch.dtype | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``distillation_losses`` of the logits that ``head`` makes of hidden states, and their weighted sum.

    Args:
        teacher, hidden: [B, N, H] in the dtype of the head's weight: the last hidden states of the dense and the sparse pass.
        head: of the sparse pass; see ``find_head``. It trains if its weight requires a gradient.
        labels: [B, N] int64 token ids; position n predicts labels[:, n + 1].
        mask: [B, N], true for a valid token; a padding token may hold anything.
        teacher_head: of the dense pass, of as many tokens but perhaps another H. None: ``head``.
        dtype: of the products of ``head``, as under autocast; ``hidden`` may then have any. None: that of its weight.
        kl_weight, ce_weight: of the two terms in the sum.
        chunk: tokens of a chunk. None: ``chunk_rows``.

    Returns:
        (kl_weight kl + ce_weight ce, kl, ce), [] each in float32 (float64 for float64); 0 without a valid token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a chunk below 1, on a CPU labels outside the vocabulary.

    Gradient: to ``hidden`` and the weight and bias of ``head``, of the weighted sum alone; kl and ce have none. A second derivative
    is refused.

    Source: eq. 5 of DOT-MoE (arXiv 2606.01666); the gradient in the forward pass as in Liger-Kernel (arXiv 2410.10989).
    """
    V, H = head.weight.shape
    theirs = head if teacher_head is None else teacher_head
    for name, tensor, of in (("teacher", teacher, theirs), ("hidden", hidden, head)):
        require_float(tensor, name, 3, "[B, N, H]")
        require_same(tensor, name, of.weight, "head.weight", dtype=dtype is None or name == "teacher")
    B, N, _ = hidden.shape
    require_shape(hidden, "hidden", (B, N, H), "[B, N, H]")
    require_shape(teacher, "teacher", (B, N, theirs.weight.shape[1]), "[B, N, H]")
    require(len(theirs.weight) == V, "teacher_head", f"of {len(theirs.weight)} tokens", f"the {V} of head")
    require_indices(labels, "labels", 2, "[B, N]")
    require_shape(labels, "labels", (B, N), "[B, N]")
    require_range(labels, "labels", 0, V - 1)
    if mask is not None:
        mask = require_mask(mask, "mask", (B, N), "[B, N]")
    require(chunk is None or (is_integer(chunk) and chunk >= 1), "chunk", chunk, "an integer of at least 1")
    device, wide = hidden.device, compute_dtype(hidden)
    target = torch.roll(labels, -1, 1).to(torch.int64)  # the last column has no target
    soft = torch.ones((B, N), dtype=wide, device=device)
    hard = soft.clone()
    hard[:, -1:] = 0
    count: Tensor | float = float(max(B * N, 1))
    if mask is None:
        hard *= count / max(B * (N - 1), 1)
    else:
        valid = mask
        hidden, teacher = (torch.where(valid[..., None], t, 0) for t in (hidden, teacher))
        soft *= valid
        hard *= valid & valid.roll(-1, 1)
        count = soft.sum().clamp(min=1)
        hard *= count / hard.sum().clamp(min=1)
    kind = head.weight.dtype if dtype is None else dtype
    bias = None if head.bias is None else head.bias.detach().to(kind)
    trains = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    with torch.autocast(device.type, enabled=False):
        return _Distillation.apply(
            hidden.reshape(B * N, H),
            head.weight,
            head.bias,
            teacher.detach().reshape(B * N, -1),
            (head._replace(weight=head.weight.detach().to(kind), bias=bias), theirs),
            target.flatten(),
            soft.flatten(),
            hard.flatten(),
            count,
            (kl_weight, ce_weight),
            chunk or chunk_rows(V, device, H if trains and torch.is_grad_enabled() else 0),
        )
