"""The grouped path in Triton; every module imports it."""
