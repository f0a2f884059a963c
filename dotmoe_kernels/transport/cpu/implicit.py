"""The gradient of Sinkhorn at its fixed point, of one layer in PyTorch; ``gram.py`` has the kernels for a GPU.

    [diag(q) - P^T diag(1/r) P] y = b - P^T(a / r);   x = (a - P y) / r;   dX = P * (G - x - y)

G = dL/dP [F, E]; r [F] and q [E] are the actual sums of P, which keeps the system consistent; a = sum_e P G and b = sum_i P G.
The matrix is built as a Laplacian, whose null vector 1 is exact, and the E x E system is solved in float64: on a hard plan its two
terms cancel. Cost: one Gram product, 2 F E^2 flops.
"""

from __future__ import annotations

import torch
from torch import Tensor


def laplacian(gram: Tensor, q: Tensor) -> Tensor:
    """gram [..., E, E] = P^T diag(1/r) P, q [..., E] -> the matrix of the system in float64, made definite."""
    gram = gram.double()
    gram = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    q = q.double()
    ridge = 1e-12 * q.mean(-1, keepdim=True)
    diagonal = torch.diag_embed(gram.sum(-1) + ridge)
    return diagonal - (gram + gram.mT) / 2 + q[..., :, None] * q[..., None, :] / q.sum(-1)[..., None, None]


def implicit_gradient(plan: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(dX [F, E], d c [E] with <q, dc> = 0, which is what the unrolled steps give)."""
    w = plan * grad
    r, q = plan.sum(1), plan.sum(0)
    a, b = w.sum(1), w.sum(0)
    scaled = plan / r[:, None]
    rhs = (b - scaled.T @ a).double()
    y = torch.linalg.solve(laplacian(scaled.T @ plan, q), rhs - rhs.mean()).to(plan.dtype)
    xi = (a - plan @ y) / r
    return plan * (grad - xi[:, None] - y), y - torch.dot(q, y) / q.sum()
