"""Which path, and which way within it, fits a size and a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .hardware import BACKEND, H200_BANDWIDTH, H200_BF16, TRITON_SHARE, has_matrix_units


def masked_up_in_triton(T: int, num_experts: int) -> bool:
    """Whether the masked path's up product is Triton's rather than PyTorch's with a masking pass behind it. A row tile that all
    experts serve gains nothing but a pass over [T, 2F]: so PyTorch's, which is the dense FFN's own. Predicted, not measured."""
    return False


def leaves_zeros_out(T: int, E: int, s: int, K: int, H: int) -> bool:
    """Whether ``masked_ffn`` takes the products behind its mask by slots: a third of the arithmetic at 25 % active is saved, the
    rows [T K, H] of two sums are written and read, and the weights are copied in both passes. Predicted, not measured."""
    products = 6 * T * E * s * H / H200_BF16  # the three behind the mask
    saved = products * (1 - K / (TRITON_SHARE * E))
    return K > 0 and saved * H200_BANDWIDTH > 2 * (4 * T * K * H + 12 * E * s * H)  # bytes in 16 bits


def reduction(E: int, s: int, K: int, T: int, dtype: torch.dtype, backend: str = BACKEND) -> str:
    """How the grouped path adds up a token's K rows: "rows" stores them sorted by expert and sums them afterwards; "chunks" does so
    for some tokens and columns at a time, whose rows stay in L2; "dense" multiplies the dense hidden [T, E s] (no expert twice a
    token, a dense view); "atomics" adds in float32 in any order. Predicted, not measured: at L3 a chunk takes 144 launches of 5 us
    each, which eats what the cache saves, and the dense product costs 4 times the flops; so "rows" until a GPU says otherwise."""
    return "rows"


# bytes of the rows [S, columns] that are summed to y and to dx: at L3 and T = 8192 the whole [S, H] takes 1.9 GB, and every part
# of it reads the hidden rows again: [S, s] for y, 59 MB, [S, 2s] for dx
SUM_WORKSPACE = 2**30

REDUCTION_CHUNK = (2048, 256)  # tokens, columns: at K = 28 a scratch of 29 MB in 16 bits, of 50 MB of L2


# experts on a CPU: from which rows an expert (T K / E) one expert after another beats whole grouped products, and how many rows of
# several experts stay in the cache of two cores between the two products of a batch
_CPU_LOOP_ROWS = {torch.float32: 24, torch.float64: 24, torch.bfloat16: 96, torch.float16: 96}
_CPU_PADDED_ROWS = 2048
_CPU_TURNED_ROWS = 96
_CPU_FEW_ROWS = 16  # of a product, whose sizes are so few that none is filled up
_CPU_WIDE = 256  # from which width s a product of its own costs less than reading an expert's weights for nothing


def expert_by_expert(dtype: torch.dtype, num_slots: int, num_experts: int) -> bool:
    """Whether the grouped path on a CPU finishes one expert after another instead of one product after another."""
    return num_slots >= _CPU_LOOP_ROWS[dtype] * num_experts


def padded_experts(num_experts: int, rows: int) -> int:
    """How many experts of at most ``rows`` rows go into one batched product on a CPU in 16 bits."""
    return max(1, min(num_experts, _CPU_PADDED_ROWS // max(rows, 1)))


def in_batches(x: torch.Tensor) -> bool:
    """Whether the experts' products with rows like ``x`` are batched ones of few sizes: on a CPU in 16 bits."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def product_rows(n: int, x: torch.Tensor) -> int:
    """Rows to which ``n`` of an expert are filled up for a product like ``x``. On a CPU in 16 bits at most a fifth more: oneDNN
    compiles a kernel for every size that is not in its cache of 1024, in the time of ten such products, and routing makes sizes
    without end."""
    if n <= _CPU_FEW_ROWS or not in_batches(x):
        return n
    step = max(4, 1 << n.bit_length() - 4)  # eight sizes an octave
    return -(-n // step) * step


def most_idle(width: int) -> float:
    """Up to which share of experts without rows a batched product of all of them beats one product a chosen expert."""
    return 0.6 if width < _CPU_WIDE else 0.5


def most_padding() -> float:
    """Up to how many times the rows that are used a batched product on a CPU without matrix units beats one product an expert."""
    return 2.0


# with matrix units, counted in rows of an expert of s H elements: what the calls of a run cost beside their rows, measured at
# s H = 37,000 (2,048 rows in one batch go at 370 GFLOP/s, 128 alone at 150) and 262,000; and a row of the dense product
_CPU_CALL_ROWS, _CPU_CALL_ELEMENTS, _CPU_DENSE_ROWS = 50, 6.5e6, 0.42
_CPU_SLOW_ROWS = 0.2  # of that fixed cost without matrix units, whose rows take so much longer


def batched_call(elements: int, dtype: torch.dtype) -> float:
    """The fixed cost of a run of experts of s H ``elements`` on a CPU in 16 bits, in rows."""
    return (_CPU_CALL_ROWS + _CPU_CALL_ELEMENTS / max(elements, 1)) * (1.0 if has_matrix_units(dtype) else _CPU_SLOW_ROWS)


def batches_experts(experts: int, rows: int) -> bool:
    """Whether so many experts of so many rows may be one run."""
    return experts * rows <= _CPU_PADDED_ROWS


def weights_first(experts: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether the first product of a run has its weights on the left."""
    return not has_matrix_units(dtype) or (experts > 1 and rows < _CPU_TURNED_ROWS)


def dense_rows(tokens: int) -> float:
    """The rows of a run that take the time of an expert in a dense product of so many ``tokens``, with matrix units."""
    return _CPU_DENSE_ROWS * tokens


_CPU_DECODE_TOKENS = 2  # in 16 bits, without matrix units
# with them, counted in elements of a projection's weights: what the calls for a token of its own cost, and how many read in a dense
# product take the time of one that decode reads; rows of an expert from which on the arithmetic that grouped products save
# outweighs their copies, where experts have about as many rows
_CPU_CALLS, _CPU_DENSE_RATE = 200_000, 1.5
_CPU_EVEN_ROWS = 48
_CPU_FEW_TOKENS = 16  # a layer's calls take longer than what they add to the bytes of its weights
_CPU_PACKED = 2**22  # of the masked path: what its last product makes of the hidden rows and the weights
_CPU_TOKENS_FIRST = 128  # of the masked path
_CPU_GATHERED = 2**20  # elements up to which a copy of 16-bit weights costs less than a product's call for each expert


# experts up to which, in 32 bits, a call for each costs less than what one for all of them needs; and elements of a down projection
# from which on it does so for any number
_CPU_SUMMED_EXPERTS, _CPU_SUMMED = 12, 2**17


def sums_rows(experts: int, elements: int, dtype: torch.dtype) -> bool:
    """Whether decode of one token on a CPU reads ``experts`` down projections of ``elements`` each by rows, in one call, instead of
    by a product an expert."""
    return dtype in (torch.bfloat16, torch.float16) or (experts > _CPU_SUMMED_EXPERTS and elements <= _CPU_SUMMED)


def gathers_experts(elements: int, dtype: torch.dtype, device: str) -> bool:
    """Whether decode on a CPU copies the chosen experts' ``elements`` of gate and up together, for one product instead of many."""
    return device == "cpu" and dtype in (torch.bfloat16, torch.float16) and elements <= _CPU_GATHERED


# masked_ffn on a CPU: tokens from which on the zeros left out outweigh the copies of the weights; rows of an expert from which on a
# product of its own is worth its calls; rows times neurons of it from which on two threads have something to share. Without matrix
# units for them 16-bit products are slow, and so is nothing beside them; without a backward pass one product of three is spared
# instead of three of six
_SPLIT_TOKENS, _SPLIT_ROWS = 256, 16
_SPLIT_HIDDEN = {"16 bits": 8192, "both passes": 16384, "forward": 32768}


def expert_by_expert_masked(T: int, K: int, E: int, F: int, dtype: torch.dtype, learns: bool) -> bool:
    """Whether the products behind the mask go expert by expert on a CPU. With matrix units never: what is spared is the cheap part,
    and both passes take half the time whole, at H = 576 and 2,048 and from 512 to 2,048 tokens."""
    if has_matrix_units(dtype):
        return False
    rows = T * K // max(E, 1)  # an expert's
    least = _SPLIT_HIDDEN["16 bits" if dtype.itemsize == 2 else "both passes" if learns else "forward"]
    return T >= _SPLIT_TOKENS and rows >= _SPLIT_ROWS and rows * F >= least * E and 2 * K <= E


def decodes_each(T: int, E: int, s: int, K: int, H: int, dtype: torch.dtype) -> bool:
    """Whether T tokens on a CPU are decoded one after another faster than the dense product of all experts takes."""
    return dtype == torch.bfloat16 and T * (_CPU_DENSE_RATE * K * s * H + _CPU_CALLS) < E * s * H


def down_by_expert(T: int, elements: int, dtype: torch.dtype) -> bool:
    """Whether the masked path on a CPU multiplies with a down projection of ``elements`` in one batched product of the experts,
    whose results are added up: spared is what another product packs of it."""
    return T <= _CPU_FEW_TOKENS and elements >= _CPU_PACKED and dtype in (torch.bfloat16, torch.float16)


def tokens_first(T: int) -> bool:
    """Whether the masked path on a CPU has tokens as rows, as the dense FFN has, rather than neurons: the mask alone is on top."""
    return T >= _CPU_TOKENS_FIRST


def few_tokens(T: int) -> bool:
    """Whether so many tokens on a CPU leave a model's routed FFN bound by its calls, and so worth a way of their own."""
    return 0 < T <= _CPU_FEW_TOKENS


def turns_rows(elements: int) -> bool:
    """Whether [F, T] is turned over before the masked path's product with a down projection of ``elements`` on a CPU, or by it."""
    return elements >= _CPU_PACKED


class Choice(NamedTuple):
    """The path of ``expert_ffn``, and the reason in words."""

    path: str
    why: str


# on a GPU, tokens: up to where each chosen expert's weights are read once without a sort; without a dense view, up to where those
# kernels still take all rows at once; from where the arithmetic that grouped products save outweighs their padding. The first is a
# property of the kernels, the last is predicted: a dense FFN in 16 bits is bound by its weights' bytes up to T = 184 on an H200
# (790 TFLOP/s over 4.3 TB/s), and at T = 512 and 25 % active an expert has a whole tile of 128 rows
_DECODE_TOKENS, _DECODE_TOKENS_ALONE, _GROUPED_TOKENS = 16, 64, 512


def pick_path(
    T: int,
    E: int,
    s: int,
    K: int,
    H: int,
    dtype: torch.dtype,
    device: str,
    *,
    dense_view: bool,
    needs_grad: bool = False,
    matrix_units: bool | None = None,
) -> Choice:
    """The path of ``expert_ffn`` for x [T, H], E experts of width s and K slots a token on "cpu" or a GPU; ``dense_view``: the
    weights are the dense FFN as well; ``matrix_units``: the CPU has them for ``dtype``, None: as this machine's."""
    if needs_grad:
        return Choice("grouped", "the path with a gradient")
    if device == "cpu":
        if T == 1:
            return Choice("decode", "one token: matrix-vector products with the chosen experts")
        if dtype in (torch.bfloat16, torch.float16):
            if dense_view and (has_matrix_units(dtype) if matrix_units is None else matrix_units):
                if decodes_each(T, E, s, K, H, dtype):
                    return Choice("decode", "so few experts in all that each token reads its own")
                if T * K < _CPU_EVEN_ROWS * E:
                    return Choice("masked", "matrix units: the dense product costs less than the copies of the rows by expert")
                return Choice("grouped", "rows enough an expert: saves the arithmetic of the experts that a token did not choose")
            if T <= _CPU_DECODE_TOKENS:
                return Choice("decode", f"16 bits and T <= {_CPU_DECODE_TOKENS}: down_proj is read by rows, not expert by expert")
            return Choice("grouped", "16 bits: many experts in one batched product")
        return Choice("grouped", "reads only the experts that were chosen")
    if dtype == torch.float64:
        return Choice("grouped", "float64 has no kernels of its own")
    if T <= _DECODE_TOKENS:
        return Choice("decode", f"T <= {_DECODE_TOKENS}: every chosen expert's weights are read once, without a sort")
    if dense_view and T < _GROUPED_TOKENS and K * _DECODE_TOKENS >= E:
        return Choice("masked", "nearly every expert is chosen by some token: bound by the weights' bytes, as the dense FFN is")
    if T <= _DECODE_TOKENS_ALONE and not dense_view:
        return Choice("decode", f"T <= {_DECODE_TOKENS_ALONE} and no dense view")
    return Choice("grouped", "enough rows an expert: saves the arithmetic of the experts that a token did not choose")
