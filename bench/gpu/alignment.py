"""Alignment's benches on a GPU, one layer's masked FFN, and a whole step of a few layers, in bfloat16."""

from __future__ import annotations

from functools import partial

from bench import alignment, masked, shapes
from bench.alignment import Size
from bench.paired import Group
from bench.shapes import Shape

DTYPE = "bfloat16"


def ffn_groups(
    device: str = "cuda",
    sizes: tuple[Shape, ...] = (shapes.L3, shapes.Q25, shapes.MID, shapes.COARSE),
    tokens: tuple[int, ...] = (8192, 2048),
) -> list[Group]:
    def group(shape: Shape, T: int) -> Group:
        case = partial(masked.case, shape, T, DTYPE, device)
        return Group(f"alignment {shape.name} T {T}", masked.GPU_IMPLS, case, masked.info(shape, T, DTYPE))

    return [group(shape, T) for T in tokens for shape in sizes]


def step_groups(device: str = "cuda", sizes: tuple[Size, ...] = (alignment.Q25, alignment.L3)) -> list[Group]:
    """With the split of the step in ``extra_info``."""

    def group(size: Size) -> Group:
        return Group(f"alignment step {size.name}", alignment.IMPLS, partial(alignment.case, size, device), alignment.info(size))

    return [group(size) for size in sizes]


def alignment_groups() -> list[Group]:
    return ffn_groups() + step_groups()
