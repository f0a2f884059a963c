"""The sparse FFN of a converted model: a router that picks K experts a token, and the experts.

    Z = x Wr^T;  y_t = sum over the K largest Z_te of Down_e (act(Gate_e x_t) * (Up_e x_t)), each with weight exactly 1

or, with the soft router, over the experts with p_te = LapSum(Z_t, k)_e > theta, each with weight p_te. Zero experts (ZEDA) are
further rows of the router: one of them among the K largest adds nothing.

State: ``gate.weight`` [E, H], or [E + N, H] with N zero experts; ``experts.gate_up_proj`` [E, 2s, H], ``experts.down_rows``
[E, s, H], ``neuron_order`` [F] int64. Files have ``experts.down_proj`` [E, H, s] for the third, as Hugging Face does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from .._autograd import wants_gradient
from .._backend import runs_as_written
from .._checks import compute_dtype, require, require_same
from .._tiles import few_tokens, multiplies_into_float32, pick_path
from ..experts import check_path, routed_ffn
from ..experts.activations import find_activation
from ..experts.decode.cpu.token import TokenExperts
from ..experts.masked.cpu.dense import few_ffn
from ..permutation import neuron_order, pack_experts, unpack_experts
from ..routing import choose
from ..routing.budgets import SoftRouter
from ..routing.cpu import largest
from .surgery import DenseFFN


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Entered only where autocast is on: for a token that costs as much as the router's product."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class DotMoeRouter(nn.Module):
    """Router of one layer: x [T, H] -> (logits [T, E], weights [T, K], indices [T, K]).

    With the soft router K is ``max_active``. An empty slot, of that or of a zero expert, has index E and weight 0; with N zero
    experts the logits are [T, E + N].
    The logits are float32 (float64 for a float64 model), under autocast too. A forward hook sees all three.
    """

    def __init__(
        self, num_experts: int, top_k: int, hidden_size: int, *, soft: SoftRouter | None = None, num_zero_experts: int = 0
    ) -> None:
        super().__init__()
        self.soft = soft
        self.num_experts, self.top_k, self.hidden_size = num_experts, top_k, hidden_size
        self.num_zero_experts = num_zero_experts
        self.bypass = False  # every expert with weight 1, see all_experts
        self.weight = nn.Parameter(torch.empty(num_experts + num_zero_experts, hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with _without_autocast(x):
            logits = self.logits(x)
            if self.bypass:
                everyone = torch.arange(self.num_experts, device=x.device).expand(len(logits), self.num_experts)
                return logits, torch.ones_like(everyone, dtype=logits.dtype), everyone
            return logits, *choose(logits, self.top_k, self.soft, self.num_zero_experts)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, E], outside autocast."""
        weight, dtype = self.weight, compute_dtype(x)
        if x.dtype == weight.dtype and multiplies_into_float32(x) and not wants_gradient(x, weight):
            return torch.mm(x, weight.T, out_dtype=dtype)  # the same, without copies in float32
        return F.linear(x.to(dtype), weight.to(dtype))

    @property
    def mean_active(self) -> float:
        """Experts expected a token: K, with zero experts the most of them, or the soft router's k."""
        return float(self.top_k if self.soft is None else self.soft.k)

    def extra_repr(self) -> str:
        kind = f"top_k={self.top_k}" if self.soft is None else ", ".join(f"{k}={v}" for k, v in self.soft._asdict().items())
        zeros = f", num_zero_experts={self.num_zero_experts}" if self.num_zero_experts else ""
        return f"num_experts={self.num_experts}, {kind}, hidden_size={self.hidden_size}{zeros}"

    @torch.no_grad()
    def add_zero_experts(self, count: int, generator: torch.Generator) -> None:
        """``count`` rows more, drawn from N(mean, std) of the rows there are, each hidden dimension on its own; a new parameter."""
        rows = self.weight.float()
        noise = torch.randn(count, self.hidden_size, generator=generator).to(rows.device)
        drawn = rows.mean(0) + rows.std(0, unbiased=False) * noise
        weight = torch.cat((self.weight, drawn.to(self.weight.dtype)))
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.num_zero_experts += count


class DotMoeExperts(nn.Module):
    """The experts' weights and their product. Both parameters are contiguous with a neuron a row, so that they are also the dense
    FFN with its neurons permuted: ``down_proj`` [E, H, s], Hugging Face's name and shape, is a view of ``down_rows`` [E, s, H]."""

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int, activation: str, *, path: str = "auto") -> None:
        super().__init__()
        check_path(path)
        find_activation(activation)
        self.num_experts, self.hidden_size, self.expert_size = num_experts, hidden_size, expert_size
        self.activation, self.path = activation, path
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_rows = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self._token = TokenExperts()

    @property
    def down_proj(self) -> Tensor:
        """[E, H, s], the transpose of a contiguous [E, s, H]."""
        return self.down_rows.transpose(1, 2)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], indices and weights [T, K] -> y [T, H]."""
        gate_up: Tensor = self.gate_up_proj
        down = self.down_proj
        if torch.is_autocast_enabled(x.device.type):  # as nn.Linear; .to keeps the strides of down_proj
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        require_same(x, "hidden_states", gate_up, "the experts' weights")  # a kernel would read what is not there
        with _without_autocast(x):
            return routed_ffn(x, gate_up, down, indices, weights, self.activation, self.path)

    def few_tokens_path(self, x: Tensor, top_k: int) -> str:
        """The path by which ``forward_few`` takes x [T, H], plain ones on a CPU, or "" where it does not."""
        path = self.path
        if path == "auto":
            sizes = len(x), self.num_experts, self.expert_size, top_k, self.hidden_size
            # one token: what ``pick_path`` says too, in the time of a product
            path = "decode" if len(x) == 1 else pick_path(*sizes, x.dtype, "cpu", dense_view=True).path
        fits = path in ("decode", "masked") and self._token.fits(x, self.gate_up_proj, self.down_rows)
        return path if fits else ""

    def forward_few(self, x: Tensor, logits: Tensor, top_k: int, path: str) -> Tensor:
        """x [T, H], logits [T, E + N] -> y of T H elements: the sums of the ``top_k`` experts' outputs, by the path that
        ``few_tokens_path`` gave; without autocast or a gradient."""
        if path == "masked":
            return few_ffn(x, self.gate_up_proj, self.down_proj, logits, top_k, self.activation)
        E, sums = self.num_experts, []
        for token, z in zip(x.unbind(), logits.tolist(), strict=True):
            sums.append(self._token(token, [e for e in largest(z, top_k) if e < E], self.activation))
        return sums[0] if len(sums) == 1 else torch.stack(sums)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._token.forget()  # the parameters are about to move
        return super()._apply(*args, **kwargs)

    def interleave_storage(self) -> None:
        """Make both parameters contiguous; keeps the Parameter objects, and does nothing where they are."""
        with torch.no_grad():
            for parameter in (self.gate_up_proj, self.down_rows):
                if not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes the tensors of a file as well."""
        if f"{prefix}down_proj" in state_dict:
            state_dict[f"{prefix}down_rows"] = state_dict.pop(f"{prefix}down_proj").transpose(1, 2)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.interleave_storage()  # with assign=True the loaded tensor replaces ours

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, expert_size={self.expert_size}, hidden_size={self.hidden_size}, "
            f"activation={self.activation}, path={self.path}"
        )


class DotMoeBlock(nn.Module):
    """Takes the place of a dense FFN: x [..., H] -> y [..., H].

    Args:
        num_experts, top_k, hidden_size, expert_size: E, K, H, s.
        activation: name in ACT2FN.
        path: of ``expert_ffn``: "auto" | "grouped" | "decode" | "masked".
        soft: the soft router's options; None: the top K.
        num_zero_experts: N.
    """

    neuron_order: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        expert_size: int,
        activation: str,
        *,
        path: str = "auto",
        soft: SoftRouter | None = None,
        num_zero_experts: int = 0,
    ) -> None:
        super().__init__()
        self.gate = DotMoeRouter(num_experts, top_k, hidden_size, soft=soft, num_zero_experts=num_zero_experts)
        self.experts = DotMoeExperts(num_experts, hidden_size, expert_size, activation, path=path)
        self.register_buffer("neuron_order", torch.arange(num_experts * expert_size))  # [F], position -> dense neuron

    @property
    def path(self) -> str:
        """Implementation of ``expert_ffn``; may be set."""
        return self.experts.path

    @path.setter
    def path(self, path: str) -> None:
        check_path(path)
        self.experts.path = path

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        gate, experts = self.gate, self.experts
        if path := self._few_tokens_path(x):
            return experts.forward_few(x, gate.logits(x), gate.top_k, path).view(hidden_states.shape)
        _, weights, indices = gate(x)
        return experts(x, indices, weights).view(hidden_states.shape)

    def _few_tokens_path(self, x: Tensor) -> str:
        """By which path x [T, H], a few tokens, goes from the router's logits to the experts' sum without the tensors between them:
        on a CPU, without a gradient, and where nobody sees, changes or replaces what happens there. "": not so."""
        if not (runs_as_written(x) and few_tokens(len(x))):  # in this order: in a graph T may be open
            return ""
        gate, experts = self.gate, self.experts
        if type(gate) is not DotMoeRouter or type(experts) is not DotMoeExperts or has_global_hooks():
            return ""
        for module in (gate, experts):
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                return ""
        return "" if gate.soft is not None or gate.bypass else experts.few_tokens_path(x, gate.top_k)

    @classmethod
    def from_dense(
        cls, ffn: DenseFFN, expert_of: Tensor, router_weight: Tensor, top_k: int, *, soft: SoftRouter | None = None
    ) -> DotMoeBlock:
        """The block whose experts are the neurons of ``ffn`` sorted by expert; arguments as checked by ``check_layer``.

        Args:
            ffn: the dense FFN.
            expert_of: [F] int64, s neurons for every expert.
            router_weight: [E, H] floating point; cast to the FFN's dtype.
            top_k: K.
            soft: the soft router's options; None: the top K.
        """
        (F_, H), E = ffn.gate_proj.shape, router_weight.shape[0]
        with torch.no_grad():
            order = neuron_order(expert_of.to(device=ffn.gate_proj.device, dtype=torch.int64))
            gate_up, down = pack_experts(ffn.gate_proj, ffn.up_proj, ffn.down_proj, order, E)
            with torch.device("meta"):
                block = cls(E, top_k, H, F_ // E, ffn.activation, soft=soft)
            trains = ffn.gate_proj.requires_grad
            block.experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=trains)
            block.experts.down_rows = nn.Parameter(down.transpose(1, 2), requires_grad=trains)
            weight = router_weight.detach().to(device=gate_up.device, dtype=gate_up.dtype, copy=True)
            block.gate.weight = nn.Parameter(weight.contiguous())
            block.neuron_order = order
        return block.train(ffn.module.training)

    def dense_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """New tensors gate_proj, up_proj [F, H] and down_proj [H, F], the neurons in their first order."""
        with torch.no_grad():
            return unpack_experts(self.experts.gate_up_proj, self.experts.down_proj, self.neuron_order)

    def reset_parameters(self, std: float) -> None:
        """Draw router and experts from N(0, std), the neurons in their given order."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, std)
            self.neuron_order.copy_(torch.arange(self.neuron_order.numel()))


def check_layer(ffn: DenseFFN, expert_of: Tensor, router_weight: Tensor, num_experts: int, name: str) -> None:
    """Check expert_of [F] and router_weight [E, H] of the layer ``name``.

    Raises:
        ValueError: a wrong shape, an expert that does not exist, or one that does not have exactly s = F / E neurons.
    """
    (width, hidden), E = ffn.gate_proj.shape, num_experts
    shape = list(router_weight.shape)
    require(shape == [E, hidden], f"router_weight of {name}", shape, f"[num_experts, H] = [{E}, {hidden}]")
    require(tuple(expert_of.shape) == (width,), f"expert_of of {name}", f"of shape {list(expert_of.shape)}", f"[F] = [{width}]")
    low, high = (int(v) for v in torch.aminmax(expert_of))
    require(low >= 0 and high < E, f"expert_of of {name}", f"in [{low}, {high}]", f"experts from 0 to {E - 1}")
    for expert, count in enumerate(torch.bincount(expert_of.flatten().long(), minlength=E).tolist()):
        given = f"{count} neurons for expert {expert}"
        require(count == width // E, f"expert_of of {name}", given, f"exactly s = {width // E} for every expert")


def moe_blocks(model: nn.Module) -> dict[str, DotMoeBlock]:
    """The DotMoeBlocks of a model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DotMoeBlock)}


def interleave_storage(model: nn.Module) -> None:
    """Make the experts' parameters contiguous, as the dense view of them needs; idempotent, keeps the Parameter objects."""
    for block in moe_blocks(model).values():
        block.experts.interleave_storage()


@contextmanager
def all_experts(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context every token visits every expert with weight 1, whatever the router says: the dense model's output."""
    gates = [block.gate for block in moe_blocks(model).values()]
    before = [gate.bypass for gate in gates]
    try:
        for gate in gates:
            gate.bypass = True
        yield model
    finally:
        for gate, bypass in zip(gates, before, strict=True):
            gate.bypass = bypass
