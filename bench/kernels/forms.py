"""PREDICTED times of the older and the newer form of a kernel beside each other, on an H100 and an H200: from counts, not measured.

By ``_tiles/launches.py``: each a range from what is hoped to what is feared. The form that ``_tiles`` takes is marked.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import shapes
from dotmoe_kernels._tiles.grouped import down_launch, grouped_mm_form, grouped_up_form, up_launch
from dotmoe_kernels._tiles.hardware import GPUS, H200, Span
from dotmoe_kernels._tiles.transport import steps_seconds
from dotmoe_kernels.conversion.speeds import grouped_span

SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
TOKENS = (512, 8192)
LAYERS = (1, 28)
STEPS = 50
OLDER = {"up product": "halves", "down product": "tiles", "grouped path": "halves, tiles", "Sinkhorn steps": "streaming"}


def _row(what: str, shape: str, form: str, chosen: str, spans: list[Span]) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "shape": shape, "form": form, "older": form == OLDER[what], "chosen": form == chosen}
    for gpu, span in zip(GPUS, spans, strict=True):
        row |= {f"{gpu.name}_predicted_low_seconds": span.low, f"{gpu.name}_predicted_high_seconds": span.high}
    return row


def forms() -> list[dict[str, Any]]:
    """In bfloat16; the down product is one launch over all its columns, the grouped path has its parts."""
    rows, dtype = [], torch.bfloat16
    for c, T in [(c, T) for c in SHAPES for T in TOKENS]:
        S, shape = T * c.K, f"{c.name} T {T}"
        up, down = (
            grouped_up_form(S, c.E, c.s, c.H, dtype, "cuda"),
            grouped_mm_form(S, c.E, c.s, c.H, dtype, "cuda"),
        )
        for form in ("halves", "joint"):
            launch = up_launch(form, S, c.E, c.s, c.H)
            rows.append(_row("up product", shape, form, up, [launch.seconds(gpu) for gpu in GPUS]))
        for form in ("tiles", "table", *(("stationary",) if c.s <= 256 else ())):
            launch = down_launch(form, S, c.E, c.s, c.H)
            rows.append(_row("down product", shape, form, down, [launch.seconds(gpu) for gpu in GPUS]))
        for pair in (("halves", "tiles"), (up, down)):
            spans = [grouped_span(T, c, gpu, *pair) for gpu in GPUS]
            rows.append(_row("grouped path", shape, ", ".join(pair), f"{up}, {down}", spans))
    for c, L in [(c, L) for c in SHAPES for L in LAYERS]:
        of = {form: [steps_seconds(form, L, c.F, c.E, STEPS, gpu) for gpu in GPUS] for form in ("streaming", "persistent")}
        chosen = min(of, key=lambda form: of[form][GPUS.index(H200)].middle)
        rows += [_row("Sinkhorn steps", f"{c.name} x {L}", form, chosen, spans) for form, spans in of.items()]
    return rows


def table() -> list[list[str]]:
    """``forms`` under its header."""
    rows = [["what", "shape", "form", "", *(f"{gpu.name}, predicted" for gpu in GPUS)]]
    for row in forms():
        spans = [
            f"{1e3 * row[f'{gpu.name}_predicted_low_seconds']:.2f} - {1e3 * row[f'{gpu.name}_predicted_high_seconds']:.2f} ms"
            for gpu in GPUS
        ]
        mark = ", ".join(word for word in ("older", "chosen") if row[word])
        rows.append([row["what"], row["shape"], row["form"], mark, *spans])
    return rows
