"""The basis that a layer's inputs are rounded in: with SmoothQuant and rotations, not their own.

Codes of a weight that was scaled or rotated are multiplied with inputs that were scaled or rotated the other way, so
that these are what a runtime rounds. Here they are brought back afterwards: a layer keeps its weight in its own basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.quantizers.blocks import work_dtype
from mpq.quantizers.hadamard import hadamard_rotation, rotate


@dataclass(frozen=True)
class InputBasis:
    """Steps that inputs go through before they are rounded.

    Attributes:
        steps: Divisors ``[inputs]`` (``smooth``) or rotations ``[size, size]`` (``hadamard``), in order.
    """

    steps: tuple[Tensor, ...]

    def into(self, x: Tensor, axis: int = -1) -> Tensor:
        """Inputs in this basis; channel groups, one after the other along the axis, share the steps.

        In float32 at least: a rotation in bfloat16 alone may lose what it is to save.
        """
        rows = x.movedim(axis, -1).to(work_dtype(x))
        for step in self.steps:
            rows = rows / _tiled(step, rows) if step.dim() == 1 else rotate(rows, step)
        return rows.movedim(-1, axis)

    def back(self, x: Tensor, axis: int = -1) -> Tensor:
        """Inverse of `into`, in float32 at least."""
        rows = x.movedim(axis, -1).to(work_dtype(x))
        for step in reversed(self.steps):
            rows = rows * _tiled(step, rows) if step.dim() == 1 else rotate(rows, step.T)
        return rows.movedim(-1, axis)


def input_basis(steps: Sequence[str], kept: Mapping[str, Tensor], inputs: int) -> InputBasis:
    """The basis that goes with the first steps of a recipe.

    Args:
        steps: ``smooth`` and ``hadamard``, in order.
        kept: What they keep, see `mpq.quantizers.stored.StoredWeight`.
        inputs: Input channels of the weight.
    """
    found = (kept["smooth.scales"] if step == "smooth" else hadamard_rotation(inputs, torch.float64) for step in steps)
    return InputBasis(tuple(found))


def _tiled(scales: Tensor, rows: Tensor) -> Tensor:
    return scales.to(rows).repeat(rows.shape[-1] // len(scales))
