"""The masked path in PyTorch.

dense    all of it as dense products
sparse   alignment with frozen weights: behind the mask only what is not zero
"""
