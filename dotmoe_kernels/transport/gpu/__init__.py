"""Transport in Triton; every module imports it."""
