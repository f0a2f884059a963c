"""Routing in Triton; every module imports it."""
