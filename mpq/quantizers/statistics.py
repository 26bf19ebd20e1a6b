"""What a layer's inputs looked like over the calibration data, for rounding that looks at more than the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import all_finite

_LEAST_DAMPING = 0.01


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the inputs that meet a weight ``[out, in]``, as rows: one per token or position of a kernel.

    A weight of several groups (grouped convolutions; query, key and value in one) has its output channels in as many
    equal parts, each with inputs of its own.

    Attributes:
        hessian: Second moments ``[groups, in, in]``, the mean of ``x x^T`` over the rows. The mean squared error of
            outputs under an error E of the weight is ``tr(E hessian E^T)``.
        mean_abs: Mean magnitude of each input ``[groups, in]``.
        largest: Largest magnitude of each input ``[groups, in]``.
        rows: How many rows there were.
    """

    hessian: Tensor
    mean_abs: Tensor
    largest: Tensor
    rows: int

    @property
    def groups(self) -> int:
        """Parts of the output channels with inputs of their own."""
        return len(self.hessian)

    def damped(self, damping: float | None = None) -> Tensor:
        """Positive definite second moments in float64: a constant is added to their diagonal.

        Second moments of few rows tell inputs apart that are not, which fits errors to the calibration data.

        Args:
            damping: The constant, as a share of the diagonal's median; None: inputs over rows, at least 0.01.

        Raises:
            FormatError: If the second moments overflow.
        """
        h, diagonal = self.hessian.double(), self._mean_squares().double()
        share = max(_LEAST_DAMPING, h.shape[1] / self.rows) if damping is None else damping
        usual = torch.where(diagonal.median(1).values > 0, diagonal.median(1).values, diagonal.mean(1))
        # Inputs that never were anything but zero: rounding is as if all inputs were alike.
        added = torch.where(usual > 0, usual * share, 1.0)
        return h + torch.diag_embed(added[:, None].expand(h.shape[:2]))

    def by_group(self, weight: Tensor) -> Tensor:
        """A weight ``[out, in]`` as ``[groups, out / groups, in]``."""
        return weight.reshape(self.groups, -1, weight.shape[1])

    def output_error(self, error: Tensor) -> Tensor:
        """Mean squared error ``[out]`` that an error ``[out, in]`` of the weight makes in each output."""
        parts = self.by_group(error)
        return ((parts @ self.hessian.to(error.dtype)) * parts).sum(-1).flatten()

    def mean_squares(self, channels: int) -> Tensor:
        """Mean square of the input that each weight meets, as a share of the largest.

        Inputs that never were anything but zero have none.

        Args:
            channels: Output channels.

        Returns:
            ``[channels, in]``; ``[1, in]`` where all have the same inputs.

        Raises:
            FormatError: If the second moments overflow.
        """
        squares = self._mean_squares().clamp(min=0)
        squares = squares / squares.amax().clamp(min=torch.finfo(squares.dtype).tiny)
        return squares if self.groups == 1 else squares.repeat_interleave(channels // self.groups, 0)

    def _mean_squares(self) -> Tensor:
        """Of each input ``[groups, in]``, finite."""
        squares = self.hessian.diagonal(dim1=1, dim2=2)
        if not all_finite(squares):
            dtype = str(squares.dtype).removeprefix("torch.")
            raise FormatError(
                f"the second moments of the inputs overflow {dtype}; scale the inputs down, or choose a format that "
                "does not look at them"
            )
        return squares

    def scaled(self, factor: Tensor) -> LayerStats:
        """Statistics of inputs times a factor ``[in]``."""
        hessian = self.hessian * factor * factor[:, None]
        return replace(self, hessian=hessian, mean_abs=self.mean_abs * factor, largest=self.largest * factor)

    def taken(self, columns: Tensor) -> LayerStats:
        """Statistics of some of the inputs, by index; one may occur several times."""
        hessian = self.hessian[:, columns[:, None], columns]
        return replace(self, hessian=hessian, mean_abs=self.mean_abs[:, columns], largest=self.largest[:, columns])

    def moved(self, hessian: Tensor) -> LayerStats:
        """Statistics of inputs in another basis, where root mean squares stand in for magnitudes."""
        rms = hessian.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        return replace(self, hessian=hessian, mean_abs=rms, largest=rms)
