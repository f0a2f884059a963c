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


class Backbone(NamedTuple):
    """A LLaMA around a routed FFN: its layers, vocabulary and heads; ``tied``: the head is the embedding."""

    name: str
    ffn: Shape
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False

    @property
    def attention(self) -> int:
        """Weights of a layer's attention."""
        return 2 * self.ffn.H * (self.heads + self.kv_heads) * self.head_size

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.ffn.H

    def read(self, experts: float) -> float:
        """Weights that a decode step reads, with so many experts a layer; E without their router is the dense model. An embedding
        that is not the head is a row a token."""
        c = self.ffn
        router = c.E * c.H if experts < c.E else 0
        return self.head + self.layers * (self.attention + 3 * experts * c.s * c.H + router)

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.ffn}, vocabulary {self.vocabulary}"


SMOLLM2 = Backbone("SmolLM2", Shape("SmolLM2", 576, 24, 64, 6), 30, 49152, 9, 3, 64, tied=True)
H2048 = Backbone("H2048", Shape("H2048", 2048, 64, 128, 16), 6, 32000, 32, 8, 64)
L3_PAIR = Backbone("L3-pair", L3, 2, 1024, 32, 8, 128)  # two layers of LLaMA-3-8B, with little beside them
L3_MODEL = Backbone("L3", L3, 32, 128256, 32, 8, 128)
Q25_MODEL = Backbone("Q25", Q25, 28, 152064, 28, 4, 128)
TINY_MODEL = Backbone("tiny", Shape("tiny", 64, 8, 16, 2), 2, 128, 4, 2, 16)
