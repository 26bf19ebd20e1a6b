"""Activation observers: what a layer's input looked like over the calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.errors import DataError, FormatError
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.ranges import find_range

_PER_UPDATE, _CAPACITY = 8192, 2**17


class ActivationObserver:
    """Exact minimum and maximum of all updates, and a bounded, evenly strided sample for percentile and MSE.

    Deterministic: the same updates give the same range. Memory is at most 2**17 values.
    """

    def __init__(self) -> None:
        self.lo, self.hi = 0.0, 0.0
        self._samples: list[Tensor] = []
        self._thinning = 1

    def update(self, x: Tensor) -> None:
        """Take in one tensor.

        Raises:
            DataError: If it holds NaN or infinity.
        """
        x = x.detach().flatten()
        if x.numel() == 0:
            return
        lo, hi = (v.item() for v in x.aminmax())
        if not (abs(lo) < float("inf") and abs(hi) < float("inf")):  # NaN fails this too
            raise DataError("it holds NaN or infinity")
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        # An odd stride visits every channel although channel counts are mostly even.
        stride = -(-x.numel() // _PER_UPDATE) * self._thinning | 1
        self._samples.append(x[::stride].float())
        if sum(len(s) for s in self._samples) > _CAPACITY:
            self._samples = [torch.cat(self._samples)[::2].clone()]
            self._thinning *= 2

    def range(self, fmt: NumberFormat, method: str = "mse") -> tuple[float, float]:
        """Lower and upper end for a per-tensor format by a rule of `find_range`.

        Raises:
            DataError: If nothing was observed.
            FormatError: If the method is unknown.
        """
        if not self._samples:
            raise DataError("nothing was observed")
        if fmt.granularity != "tensor":
            raise FormatError(f"observers serve per-tensor formats, not {fmt.name}")
        ends = torch.tensor([self.lo, self.hi], device=self._samples[0].device)
        values = torch.cat([*self._samples, ends])[None]
        lo, hi = find_range(values, fmt, method)
        return lo.item(), hi.item()
