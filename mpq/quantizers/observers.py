"""Activation observers: what a layer's input looked like over the calibration data."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from mpq.errors import DataError, FormatError
from mpq.quantizers.entropy import best_share
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.ranges import find_range, parse_range_method

_PER_UPDATE, _CAPACITY = 8192, 2**17
_HALF = 2048  # bins of a histogram on either side of zero
_KL_RATIOS = 100


class Observer(Protocol):
    """What looks at activations batch by batch and then gives a range. The same updates give the same range."""

    def update(self, x: Tensor) -> None:
        """Take in one tensor.

        Raises:
            DataError: If it holds NaN, infinity or what is beyond float32.
        """

    def range(self, fmt: NumberFormat, method: str = "mse") -> tuple[float, float]:
        """Lower and upper end for a per-tensor format by a rule of `find_range`.

        Raises:
            DataError: If nothing was observed.
            FormatError: If the method is unknown.
        """


def _ends(x: Tensor) -> tuple[float, float]:
    lo, hi = (v.item() for v in x.aminmax())
    if not (abs(lo) < float("inf") and abs(hi) < float("inf")):  # NaN fails this too
        raise DataError("it holds NaN or infinity")
    if (largest := max(hi, -lo)) > torch.finfo(torch.float32).max:
        raise DataError(
            f"it holds numbers of size {largest:.3g}, which float32, what scales are stored in, does not reach"
        )
    return lo, hi


def _check(seen: bool, fmt: NumberFormat) -> None:
    if not seen:
        raise DataError("nothing was observed")
    if fmt.granularity != "tensor":
        raise FormatError(f"observers serve per-tensor formats, not {fmt.name}")


class ActivationObserver:
    """Exact minimum and maximum of all updates, and a bounded, evenly strided sample for percentile and MSE.

    Deterministic: the same updates give the same range. Memory is at most 2**17 values and one update's 8192.
    """

    def __init__(self) -> None:
        self.lo, self.hi = 0.0, 0.0
        self._samples: dict[int, Tensor] = {}  # by the number of the update
        self._updates, self._size, self._thinning = 0, 0, 1

    def update(self, x: Tensor) -> None:
        """See `Observer`."""
        x = x.detach().flatten()
        if x.numel() == 0:
            return
        lo, hi = _ends(x)
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        # An odd stride visits every channel although channel counts are mostly even.
        stride = -(-x.numel() // _PER_UPDATE) | 1
        # A thinned sample meets every other channel: updates take turns with which.
        thinned = x[::stride][self._updates % self._thinning :: self._thinning]
        self._keep({**self._samples, self._updates: thinned.to(torch.float32, copy=True)})
        self._updates += 1
        if self._size > _CAPACITY:
            places = {i: i // self._thinning % 2 for i in self._samples}
            self._keep({i: s[places[i] :: 2].clone() for i, s in self._samples.items()})
            self._thinning *= 2

    def _keep(self, samples: dict[int, Tensor]) -> None:
        self._samples = {i: s for i, s in samples.items() if len(s)}
        self._size = sum(map(len, self._samples.values()))

    def range(self, fmt: NumberFormat, method: str = "mse") -> tuple[float, float]:
        """See `Observer`."""
        samples = list(self._samples.values())
        _check(bool(samples), fmt)
        values = torch.cat([*samples, torch.tensor([self.lo, self.hi], device=samples[0].device)])[None]
        lo, hi = find_range(values, fmt, method)
        return lo.item(), hi.item()


class HistogramObserver:
    """Counts of all values in 2 x 2048 bins around zero, whose width doubles when a larger value comes.

    Widths are powers of two, so that merged bins are what wider ones would have counted: the result does not depend on
    the order of the updates. Every value counts, where `ActivationObserver` looks at a sample; a value is known to
    within 1/1024 of the largest magnitude at worst.
    """

    def __init__(self) -> None:
        self.lo, self.hi = 0.0, 0.0
        self.counts = torch.zeros(2 * _HALF, dtype=torch.int64)
        self._power = -126  # bins are 2**power wide

    def update(self, x: Tensor) -> None:
        """See `Observer`."""
        x = x.detach().flatten()
        if x.numel() == 0:
            return
        lo, hi = _ends(x)
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self._widen(max(hi, -lo))
        x = x if x.dtype == torch.float64 else x.float()  # halves can't be scaled so far
        bins = torch.ldexp(x, torch.tensor(-self._power, device=x.device)).floor_().int() + _HALF
        self.counts += torch.bincount(bins, minlength=2 * _HALF).to(self.counts.device)

    def _widen(self, largest: float) -> None:
        power = math.frexp(largest)[1] - (_HALF.bit_length() - 1)
        if power > self._power:
            bins = (torch.arange(-_HALF, _HALF) >> min(power - self._power, 62)) + _HALF
            self.counts = torch.zeros_like(self.counts).index_add_(0, bins, self.counts)
            self._power = power

    def range(self, fmt: NumberFormat, method: str = "mse") -> tuple[float, float]:
        """See `Observer`."""
        _check(bool(self.counts.any()), fmt)
        if method == "minmax":
            return self.lo, self.hi
        full = self.counts.nonzero().flatten()
        middles = torch.ldexp(full - _HALF + 0.5, torch.tensor(self._power)).clamp(self.lo, self.hi)
        middles[full == _HALF] = 0
        counts = self.counts[full]
        if method == "kl":
            return self._kl_range(full, middles, fmt)
        if method.startswith("percentile"):
            rank = max(1, round(parse_range_method(method)[1] / 100 * int(counts.sum())))
            above, below = (int(torch.searchsorted(c.cumsum(0), rank)) for c in (counts, counts.flip(0)))
            return min(0.0, middles.flip(0)[below].item()), max(0.0, middles[above].item())
        values = torch.cat([middles, torch.tensor([self.lo, self.hi])])
        weights = torch.cat([counts, torch.ones(2)]).float()
        lo, hi = find_range(values[None], fmt, method, weights[None])
        return lo.item(), hi.item()

    def _kl_range(self, full: Tensor, middles: Tensor, fmt: NumberFormat) -> tuple[float, float]:
        """As `entropy_range`, among 100 shares of the whole range that have at least as many bins as there are levels.

        Zeros after a ReLU are exact at any range: their peak must not draw the range to itself.
        """
        counts = self.counts.clone()
        counts[_HALF] = torch.minimum(counts[_HALF], counts[_HALF + 1])
        kept = counts[full] > 0
        if not bool(kept.any()):
            return 0.0, 0.0
        middles, counts = middles[kept], counts[full][kept]
        lo, hi = middles[:1].clamp(max=0), middles[-1:].clamp(min=0)
        ratios = torch.arange(_KL_RATIOS, 0, -1) / _KL_RATIOS
        enough = (hi - lo) * ratios >= 2.0**self._power * 2**fmt.bits
        tried = ratios[enough | (ratios == 1)]
        share = best_share(counts[None].double(), middles[None], (lo[None], hi[None]), fmt, tried)
        return (lo * share).item(), (hi * share).item()


class AxisObserver:
    """Statistics of each index along one axis, over all others and all updates.

    By features (``axis=-1``, or 1 for images) they are what smoothing and activation-aware scales are made of
    (SmoothQuant, AWQ); by position (``axis=1`` of ``[batch, tokens, features]``) they show outlier tokens.

    Attributes:
        lo: Smallest values ``[n]``, at most 0.
        hi: Largest values ``[n]``, at least 0.
        mean_abs: Mean magnitudes ``[n]``.
        mean_square: Mean squares ``[n]``.
        rows: How many values each index has had.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis, self.rows = axis, 0
        self.lo = self.hi = self.mean_abs = self.mean_square = torch.zeros(0)

    @property
    def largest(self) -> Tensor:
        """Largest magnitudes ``[n]``."""
        return torch.maximum(self.hi, -self.lo)

    def update(self, x: Tensor) -> None:
        """See `Observer`.

        Raises:
            DataError: If it holds NaN or infinity, or the axis has another length than before.
        """
        if x.numel() == 0:
            return
        _ends(x)
        x = x.detach().movedim(self.axis, -1).reshape(-1, x.shape[self.axis]).double()
        if self.rows == 0:
            self.lo = self.hi = self.mean_abs = self.mean_square = x.new_zeros(x.shape[1])
        if len(self.lo) != x.shape[1]:
            raise DataError(f"axis {self.axis} had {len(self.lo)} elements, now {x.shape[1]}")
        self.lo, self.hi = torch.minimum(self.lo, x.amin(0)), torch.maximum(self.hi, x.amax(0))
        self.rows += len(x)
        share = len(x) / self.rows
        self.mean_abs = torch.lerp(self.mean_abs, x.abs().mean(0), share)
        self.mean_square = torch.lerp(self.mean_square, x.square().mean(0), share)

    def range(self, fmt: NumberFormat, method: str = "minmax") -> tuple[float, float]:
        """See `Observer`; only ``minmax``."""
        _check(self.rows > 0, fmt)
        if method != "minmax":
            raise FormatError(f"an AxisObserver knows the range rule minmax only, not {method!r}")
        return self.lo.min().item(), self.hi.max().item()
