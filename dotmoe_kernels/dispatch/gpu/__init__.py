"""Dispatch in Triton; ``operators.py`` imports it."""
