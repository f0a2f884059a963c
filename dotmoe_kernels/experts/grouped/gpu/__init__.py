"""The routed FFN in Triton; every module imports it."""
