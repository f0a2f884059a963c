"""The head of a causal LM: how the last hidden states of its backbone become logits.

    logits = cap tanh(scale (x W^T + b) / cap)

No architecture is consulted: what the config's fields suggest is tried on a few tokens against the model itself.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")  # config fields; some architectures multiply, some divide
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


class Head(NamedTuple):
    """W [V, H], b [V], scale and cap of the formula above; ``backbone`` gives the hidden states that it takes."""

    backbone: nn.Module
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def hidden(self, input_ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, H]."""
        return self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]; the product in the dtype of the weight, the rest in float32 (float64 for float64)."""
        return self.finish(nn.functional.linear(hidden, self.weight, self.bias))

    def finish(self, product: Tensor) -> Tensor:
        """x W^T + b -> logits; ``product`` is used up."""
        logits = product if product.dtype == torch.float64 else product.float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def product_gradient(self, dlogits: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient of x W^T + b, in the dtype of the weight; ``dlogits`` is used up, ``logits`` are needed with a cap alone."""
        if self.cap is not None:
            assert logits is not None
            dlogits = dlogits.addcmul_(dlogits, (logits / self.cap).square_(), value=-1)
        if self.scale != 1.0:
            dlogits = dlogits.mul_(self.scale)
        return dlogits.to(self.weight.dtype)


def _values(model: nn.Module, fields: tuple[str, ...]) -> list[float]:
    """The numbers that the model's config, or that of its text part, holds under these names."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [getattr(c, field, None) for c in (config, text) for field in fields]
    return [float(v) for v in dict.fromkeys(found) if isinstance(v, int | float) and v > 0]


@torch.no_grad()
def find_head(model: nn.Module, input_ids: Tensor) -> Head | None:
    """The head of ``model``, or None where its logits are not those of the formula.

    Args:
        model: a causal LM with ``base_model`` and ``get_output_embeddings()``, as transformers' have.
        input_ids: [B, N] a few tokens to compare the logits on, to within two roundings of their dtype.
    """
    backbone, find_embeddings = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    embeddings = None if find_embeddings is None else find_embeddings()
    weight, bias = getattr(embeddings, "weight", None), getattr(embeddings, "bias", None)
    if backbone is None or backbone is model or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    expected = model(input_ids=input_ids, use_cache=False).logits
    scales = {1.0: None} | {c: None for v in _values(model, _SCALES) for c in (v, 1 / v)}
    best, least = None, float("inf")
    for scale, cap in product(scales, [None, *_values(model, _CAPS)]):
        head = Head(backbone, weight.detach(), None if bias is None else bias.detach(), scale, cap)
        try:
            logits = head.logits(head.hidden(input_ids))
        except Exception:  # a backbone that takes or gives something else, a weight that is elsewhere or packed
            return None
        if logits.shape != expected.shape:
            return None
        error = float((logits - expected).abs().max())
        if error < least:
            best, least = head, error
    rounding = torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return best if least <= 2 * rounding else None
