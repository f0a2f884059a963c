"""The named shapes of the benches. The tensors are drawn by ``tests/shapes.py``, so that tests and benches see the same."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A routed FFN: hidden size H, E experts of width s, K of them a token."""

    name: str
    H: int
    E: int
    s: int
    K: int

    @property
    def F(self) -> int:
        return self.E * self.s

    def __str__(self) -> str:
        return f"H {self.H}, F {self.F}, E {self.E}, s {self.s}, K {self.K}"


L3 = Shape("L3", 4096, 112, 128, 28)  # LLaMA-3-8B
Q25 = Shape("Q25", 3584, 148, 128, 37)  # Qwen2.5-7B
COARSE = Shape("coarse", 4096, 8, 1792, 2)
MID = Shape("mid", 4096, 32, 448, 8)
CPU = Shape("cpu", 1024, 112, 128, 28)  # the experts of L3 at a hidden size that two cores can do
TINY = Shape("tiny", 512, 28, 128, 7)  # for the quick benches
# 25 % of the same F active in experts of different widths
WIDTHS = tuple(Shape(f"s{s}", 1024, 14336 // s, s, 14336 // s // 4) for s in (64, 112, 128, 256, 448, 1792))

NAMED = {shape.name: shape for shape in (L3, Q25, COARSE, MID, CPU, TINY)}
