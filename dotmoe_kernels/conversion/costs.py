"""What each stage of a conversion would take: memory of a GPU that holds the whole model, flops, and PREDICTED time of one H200.

L layers, S tokens a sequence, T tokens a pass, w bytes a weight, q and v the widths of queries and of keys (= values), V the
vocabulary, N parameters of the dense model and n of the sparse one, P parameters in the dense model's products (the head included),
a = 2 S q L flops a token of causal attention.

align, in bytes:

    weights      w N                            frozen
    trained      16 L (F E + E H)               A and the routers in float32, their gradients, AdamW's two moments
    transport    12 L F E                       A of all layers in one tensor, the plan and its gradient, float32
    activations  T L (w (2 F + 2 q + 2 v + E)   kept for the backward pass: gate, up; queries, keys, values, attention's output; R;
                      + 4 (3 H + 2 E) + 12 K)   in float32 the inputs of two norms and of the router, logits, Q; the K chosen
                 + 4 T w F                      while one layer works: the hidden and its gradients; or, where the mask's zeros
                                                are left out, w (2 F H + 2 T K s), gate and up in the experts' order and the
                                                slots' gradients, and the rows [T K, H] of a sum, as many as fit its workspace
    loss         3 T w H + 16 C V               both last hidden states and a gradient; four float32 [C, V] of a chunk
    hidden       T L w H + 12 T H               with that option: of every block the dense output, then the gradient in its place;
                                                three float32 [T, H] while one block is compared
    computed again                              with that option T w H a layer, of every block its input, and one layer's
                                                activations

and in flops a token:

    teacher      2 P + a
    sparse pass  2 P + a + 2 L E H              of the dense width: the straight-through rule needs every neuron
    backward     2 P + 2.5 a + 4 L E H          through the activations alone, since the weights are frozen; through the router;
                 + 2 L F E                      and to the plan
    again        2 P - 2 V H + a + 2 L E H      where blocks are computed again: the sparse pass without the head
    zeros        - 6 L F H (1 - K / E)          where a GPU leaves them out of the three products behind the mask (_tiles), which
                                                then reach a share of that rate; 8 for 6 where blocks are computed again

reconstruct, one layer after the other on a sample of M tokens, B a step. The inputs of as many layers as fit are collected at a
time, in G passes of the dense model:

    weights      w N
    trained      4 L (F E + E H) + 12 (F E + E H)    the gradients and moments of one layer at a time
    transport    12 F E
    inputs       2 M w H a layer of a group     once more while they are joined; afterwards the outputs take no more
    activations  the most of: a step's B (w (2 F + E) + 4 (H + 2 E) + 12 K) + 4 B w F; 3 R w F and R w V of a pass of R tokens
                                                without gradients
    flops        G M (2 P + a)                  the inputs
                 + L M 6 F H                    the dense outputs
                 + 2 L M / 16 (6 F H + 2 E H)   the errors on what is held out, before and after
                 + L steps B (8 F H + 4 E H + 2 F E)    a step: as above, but no gradient goes on to the inputs, so that one
                                                product, 2 F H, is behind the mask

finetune, of P' = P - 3 L F H + 3 L K s H parameters in products, in bytes:

    weights      4 n, + 2 P where they were bfloat16    in float32, and the casts of autocast; with adapters w n, frozen
    trained      12 n                           gradients, AdamW's two moments; with adapters 16 A of the A in adapters, and
                                                16 L E H where the routers train
    activations  T L (28 H + 2 (2 q + 2 v + 2 K s)    norms in float32, every product's input in bfloat16; gate and up of the
                      + 8 E + 32 K)             experts; logits and Q, the K chosen and their order. In float32 24 H, and 4 for that
                                                2. The soft router 44 E, and its most experts for K. With adapters the same:
                                                frozen weights need less, the adapters' inputs more [estimate]
    computed again 4 T H a layer                with that option, of every block its input in float32, and one layer's activations
    loss         12 T V                         log-probabilities and two gradients in float32: a CPU takes as much
                 or 12 T H + 16 C V             with a teacher: both last hidden states and a gradient; four [C, V] of a chunk
                    + 8 V H                     of a head that trains: its gradient, and once more while it is scaled
    teacher      w N                            of what trains with every weight; nothing with adapters; another model counts as
                                                large as the dense one. Its pass comes before the sparse one and keeps nothing

and in flops a token 3 (2 P') + 3.5 a + 4 L E H; with adapters 2 (2 P') + 3.5 a + 4 L E H + 6 A; where the routers train 6 L E H;
with a teacher 2 P + a more; where blocks are computed again 2 P' - 2 V H + a + 2 L E H + 2 A more. A step of AdamW moves 84 bytes a
trained parameter: 21 reads and writes of float32 by the kernels of its multi-tensor form and of the clipping [estimate].

What is not in it: the context of the driver and the allocator's gaps; padding of the grouped products; what is measured before,
between and after the stages. The backward pass of Sinkhorn, rounding and AdamW come when the activations are gone, and take less.

Time: the flops over a share of the bfloat16 rate, plus 2 num_iters reads of A a step (Sinkhorn and its adjoint) and AdamW's bytes
at the memory's rate; a step of reconstruct, which is short, at least a millisecond of launches [estimate]. The share is an
estimate: the paper's 3 hours on 8 H100 for LLaMA-3-8B would be a third of the same rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._tiles import H200_BANDWIDTH, H200_BF16, SUM_WORKSPACE, TRITON_SHARE, leaves_zeros_out
from ..alignment.chunked import chunk_rows
from ..alignment.config import AlignmentConfig
from ..alignment.reconstruction import _MEMORY, _ROWS
from .finetuning import FinetuneConfig
from .pipeline import RECONSTRUCT_BATCH, RECONSTRUCT_TOKENS

SHARE = 0.4  # of the rate that a whole step reaches [estimate]
_LEAST_STEP = 1e-3  # seconds of a step of one layer, which small ones are bound by: two hundred launches of 5 us [estimate]
_ADAM_BYTES = 84  # a trained parameter


@dataclass(frozen=True)
class Sizes:
    """The symbols of the module's docstring."""

    L: int
    F: int
    H: int
    E: int
    K: int
    slots: int  # K, or the most that the soft router takes
    soft: bool
    V: int
    S: int
    q: int
    v: int
    w: int
    N: int
    n: int
    active: int  # of the n, those that a token touches
    P: int
    adapters: int  # parameters of the adapters of rank 1
    around: int  # of the N, those outside the blocks
    learned: bool  # the assignment is; otherwise the router alone trains

    @property
    def attention(self) -> int:
        return 2 * self.S * self.q * self.L

    @property
    def plan(self) -> int:
        """F E of a layer whose assignment is learned."""
        return self.F * self.E if self.learned else 0


@dataclass(frozen=True)
class Cost:
    """Of one stage."""

    steps: int
    tokens: int  # that it trains on, those of a repeated sequence each time
    tokens_a_step: int
    tokens_a_pass: int
    memory: dict[str, float]  # bytes
    flops: float
    seconds: float


def _behind_the_mask(z: Sizes, T: int, dense: float) -> tuple[float, float]:
    """Of products behind the mask, ``dense`` flops wide: (flops, flops that the full rate would do in their time)."""
    if not leaves_zeros_out(T, z.E, z.F // z.E, z.slots, z.H):
        return dense, dense
    routed = dense * z.slots / z.E
    return routed, routed / TRITON_SHARE


def _working(z: Sizes, T: int) -> float:
    """Bytes while one layer works."""
    s, dense = z.F // z.E, 4.0 * T * z.w * z.F
    if not leaves_zeros_out(T, z.E, s, z.slots, z.H):
        return dense
    rows = min(SUM_WORKSPACE, z.w * T * z.slots * z.H)
    return max(dense, z.w * (2 * z.F * z.H + 2 * T * z.slots * s) + rows)


def sinkhorn_seconds(z: Sizes, options: AlignmentConfig) -> float:
    """Of Sinkhorn and its adjoint in the steps of an alignment."""
    return options.steps * 2 * options.num_iters * 4 * z.L * z.plan / H200_BANDWIDTH


def _kept(z: Sizes, T: int, layer: float, block: float, again: bool) -> float:
    """Bytes for the backward pass: ``layer`` a token and layer, or where blocks are computed again ``block`` and one layer's."""
    return T * (z.L * block + layer) if again else T * z.L * layer


def align_cost(z: Sizes, options: AlignmentConfig, again: bool = False) -> Cost:
    """``again``: blocks are computed again in the backward pass."""
    T = (options.micro_batch_size or options.batch_size) * z.S
    kept = z.w * (2 * z.F + 2 * z.q + 2 * z.v + z.E) + 4 * (3 * z.H + 2 * z.E) + 12 * z.K  # bytes a token and layer
    memory: dict[str, float] = {
        "weights": z.w * z.N,
        "trained": 16 * z.L * (z.plan + z.E * z.H),
        "transport": 12 * z.L * z.plan,
        "activations": _kept(z, T, kept, z.w * z.H, again) + _working(z, T),
        "loss": 3 * T * z.w * z.H + 16 * min(chunk_rows(z.V, torch.device("cuda")), T) * z.V,
    }
    if options.hidden:
        memory["hidden"] = T * z.L * z.w * z.H + 12 * T * z.H
    behind, products = (8 if again else 6) * z.L * z.F * z.H, 6 * z.P + 4.5 * z.attention + 6 * z.L * z.E * z.H
    routed, in_time = _behind_the_mask(z, T, behind)
    products += 2 * (z.P - z.V * z.H) + z.attention + 2 * z.L * z.E * z.H if again else 0
    whole = products - behind + 2 * z.L * z.plan
    a_step = options.batch_size * z.S
    tokens = options.steps * a_step
    seconds = tokens * (whole + in_time) / (SHARE * H200_BF16) + sinkhorn_seconds(z, options)
    return Cost(options.steps, tokens, a_step, T, memory, float(tokens * (whole + routed)), seconds)


def reconstruct_cost(z: Sizes, options: AlignmentConfig, steps: int, layers: int | None = None) -> Cost:
    """``layers``: how many of them. None: all."""
    own = z.L if layers is None else layers
    B, count = RECONSTRUCT_BATCH, max(1, RECONSTRUCT_TOKENS // z.S)
    sample, held = count * z.S, (max(1, count // 16) if count > 1 else 1) * z.S
    group = min(max(1, _MEMORY // (sample * z.H * z.w)), own)
    passes = max(1, _ROWS // z.S) * z.S
    memory: dict[str, float] = {
        "weights": z.w * z.N,
        "trained": (4 * z.L + 12) * (z.plan + z.E * z.H),
        "transport": 12 * z.plan,
        "inputs": 2 * group * sample * z.w * z.H,
        "activations": max(
            B * (z.w * (2 * z.F + z.E) + 4 * (z.H + 2 * z.E) + 12 * z.K) + 4 * B * z.w * z.F,
            3 * max(passes, _ROWS) * z.w * z.F,
            passes * z.w * z.V,
        ),
    }
    dense, router, rate = 6 * z.F * z.H, 2 * z.E * z.H, SHARE * H200_BF16
    around = -(-own // group) * sample * (2 * z.P + z.attention) + own * (sample * dense + 2 * held * (dense + router))
    routed, in_time = _behind_the_mask(z, B, 2 * z.F * z.H)
    whole = dense + 2 * router + 2 * z.plan  # gate, up and the gradient of their product: as many as in a dense pass
    a_step = B * (whole + routed)
    step_seconds = max(B * (whole + in_time) / rate + 2 * options.num_iters * 4 * z.plan / H200_BANDWIDTH, _LEAST_STEP)
    flops, seconds = around + own * steps * a_step, around / rate + own * steps * step_seconds
    return Cost(steps, sample, B, B, memory, float(flops), seconds)


def _taught_loss(z: Sizes, T: int, trains: bool) -> int:
    """Bytes of the loss against a teacher."""
    head = z.H if trains else 0
    return 12 * T * z.H + 16 * min(chunk_rows(z.V, torch.device("cuda"), head), T) * z.V + 8 * z.V * head


def routers_train(z: Sizes, options: FinetuneConfig) -> bool:
    return z.soft or options.zero_experts > 0 or bool(options.router_lr)


def trained_parameters(z: Sizes, options: FinetuneConfig) -> int:
    return z.L * z.E * z.H * routers_train(z, options) + options.lora_rank * z.adapters if options.lora_rank else z.n


def adam_seconds(z: Sizes, options: FinetuneConfig) -> float:
    """Of AdamW in the steps of a fine-tuning."""
    return options.steps * _ADAM_BYTES * trained_parameters(z, options) / H200_BANDWIDTH


def finetune_cost(z: Sizes, options: FinetuneConfig, dtype: torch.dtype, teacher: str | None = None, again: bool = False) -> Cost:
    """``teacher``: "itself", the model with every expert on, or "another"; ``again``: blocks are computed again in the backward
    pass."""
    T, half = (options.micro_batch_size or options.batch_size) * z.S, dtype == torch.bfloat16
    routers, learn = z.L * z.E * z.H, routers_train(z, options)
    adapters, trained = options.lora_rank * z.adapters, trained_parameters(z, options)
    width = 2 if half else 4  # bytes of what enters a product: a float16 model is float32 here
    kept = (
        (28 if half else 24) * z.H
        + width * (2 * z.q + 2 * z.v + 2 * z.slots * (z.F // z.E))
        + (44 if z.soft else 8) * z.E
        + 32 * z.slots
    )
    if options.lora_rank:
        weights, moments = width * (z.n - routers * learn), 16 * trained
    else:
        weights, moments = 4 * z.n + (2 * z.P if half else 0), 12 * z.n
    kept_in_all = _kept(z, T, kept, 4 * z.H, again)
    memory: dict[str, float] = {"weights": weights, "trained": moments, "activations": kept_in_all, "loss": 12 * T * z.V}
    if teacher is not None:
        memory["loss"] = _taught_loss(z, T, not options.lora_rank)
        memory["teacher"] = 0 if options.lora_rank and teacher == "itself" else z.w * z.N
    active = z.P - 3 * z.L * z.F * z.H + 3 * z.L * z.K * (z.F // z.E) * z.H
    a_token = (4 if options.lora_rank else 6) * active + 3.5 * z.attention + (6 if learn else 4) * routers + 6 * adapters
    a_token += 0 if teacher is None else 2 * z.P + z.attention
    a_token += 2 * (active - z.V * z.H + adapters) + z.attention + 2 * routers if again else 0
    a_step = options.batch_size * z.S
    tokens = options.steps * a_step
    seconds = tokens * a_token / (SHARE * H200_BF16) + adam_seconds(z, options)
    return Cost(options.steps, tokens, a_step, T, memory, float(tokens * a_token), seconds)
