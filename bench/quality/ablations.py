"""What each piece of dot is worth: dot with one thing changed."""

from __future__ import annotations

from dotmoe_kernels.alignment.config import AlignmentConfig

from .methods import Method


def ablations(base: AlignmentConfig) -> list[Method]:
    return []
