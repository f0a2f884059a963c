"""Distillation of the hidden states: the output h of every decoder block in the sparse pass against that of the dense pass.

    hidden = mean over blocks and tokens of min(|h - h*|^2 / |h*|^2, 4)

h* of the dense pass, without a gradient; a token beyond the cap counts 4 and has none either. A block is found by its place: the
child of a module list inside which an FFN lies. Both passes are those of the loss, so none is added. Kept: h* [T, H] of every block
until the sparse pass gets there; then, in its place, the gradient to h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd import anchor, first_order
from .._checks import compute_dtype, refuse, require_float, require_same, require_shape
from .module import AlignmentFFN

CAP = 4.0  # of a token's term


def block_paths(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks of ``model`` that hold ``layers``, each once, by path in the model's order.

    Raises:
        ValueError: a layer is in no module list, or is itself the child of one.
    """
    ours = {id(layer): name for name, layer in layers.items()}
    modules = dict(model.named_modules())
    blocks: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if id(module) not in ours:
            continue
        above = path.rpartition(".")[0]
        while above and not isinstance(modules[above.rpartition(".")[0]], nn.ModuleList):
            above = above.rpartition(".")[0]
        if not above:
            refuse("hidden", f"set, and {ours[id(module)]} is inside no child of a module list", "0: the blocks cannot be found")
        blocks[above] = modules[above]
    return blocks


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Those of ``block_paths``."""
    return list(block_paths(model, layers).values())


class _BlockError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, hold: Tensor | None) -> Tensor:
        """[T, H] both."""
        wide = compute_dtype(student)
        difference, target = student.to(wide) - teacher.to(wide), teacher.to(wide)
        scale = target.square().sum(-1).clamp(min=torch.finfo(wide).tiny)  # [T]
        error = difference.square().sum(-1) / scale
        gradient = None
        if ctx.needs_input_grad[0]:
            slope = torch.where(error < CAP, 2 / scale, 0)
            gradient = difference.mul_(slope[:, None]).to(student.dtype)
        ctx.save_for_backward(hold, gradient)
        return error.clamp(max=CAP).sum() / max(len(student), 1)

    @staticmethod
    @first_order("block_error")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, gradient = ctx.saved_tensors
        # the mean's 1 / T comes last: it would push small entries of a 16-bit gradient out of range
        return (gradient.to(grad.dtype) * (grad / max(len(gradient), 1))).to(gradient.dtype), None, None


def block_error(student: Tensor, teacher: Tensor) -> Tensor:
    """mean over tokens of min(|h - h*|^2 / |h*|^2, 4): [] in float32 (float64 for float64).

    Args:
        student: h, [..., H].
        teacher: h*, of the same shape and dtype.

    Raises:
        ValueError: no floating-point tensor, or shapes, dtypes or devices that differ.

    Gradient: to ``student``. A second derivative is refused.
    """
    require_float(student, "student", 1, "[..., H]", at_least=True)
    require_float(teacher, "teacher", 1, "[..., H]", at_least=True)
    require_shape(teacher, "teacher", tuple(student.shape), "[..., H]")
    require_same(teacher, "teacher", student, "student")
    rows, expected = (h.reshape(-1, h.shape[-1]) for h in (student, teacher.detach()))
    with torch.autocast(student.device.type, enabled=False):
        return _BlockError.apply(rows, expected, anchor(rows))


class HiddenStates:
    """The hidden states of one dense and one sparse pass at a time, block by block."""

    def __init__(self, model: nn.Module, layers: dict[str, AlignmentFFN]) -> None:
        self.blocks = find_blocks(model, layers)
        self.expected: list[Tensor] = []  # of the dense pass, in the order of the calls
        self.errors: list[Tensor] = []

    @contextmanager
    def dense_pass(self) -> Iterator[None]:
        """Inside, the outputs of the blocks are kept as what is expected."""
        self.expected, self.errors = [], []
        with self._watched(lambda h: self.expected.append(h.detach())):
            yield

    @contextmanager
    def sparse_pass(self) -> Iterator[None]:
        """Inside, the outputs of the blocks are compared; afterwards ``mean`` is there."""
        with self._watched(lambda h: self.errors.append(block_error(h, self.expected.pop(0)))):
            yield

    def mean(self) -> Tensor:
        """[] over the blocks and the tokens of the two passes."""
        return torch.stack(self.errors).mean()

    @contextmanager
    def _watched(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            take(output[0] if isinstance(output, tuple | list) else output)

        handles = [block.register_forward_hook(hook) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
