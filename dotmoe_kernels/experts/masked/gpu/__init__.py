"""The masked path in Triton; every module but ``autograd.py`` imports it."""
