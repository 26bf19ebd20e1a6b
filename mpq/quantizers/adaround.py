"""Rounding learned by reconstruction: the weight whose outputs on the calibration data are nearest to the float ones.

All minimise ``tr((W - Q) H (W - Q)^T)``, the mean squared error of a layer's outputs, whose second moments H of inputs
are all that is needed: one forward pass over the calibration data, shared by all layers, formats and methods. Output
channels are independent of each other; each takes the best it ever saw, nearest rounding included, so that none ends up
worse. Full-batch steps of Adam from a fixed start: nothing is random. A step costs one product of the weight with
``[in, in]``. Scales stay where the range rule put them, as they are stored in few bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.quantizers.elements import element_scales, neighbours
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.tensors import QuantizedTensor, round_elements

_STEPS = 200
_LOOK = 10  # steps between two looks at what rounding gives
_GAMMA, _ZETA = -0.1, 1.1  # AdaRound's stretched sigmoid, which reaches 0 and 1
# Of its regularizer, in units of the loss of nearest rounding: ours, as the paper's is in those of the loss itself.
_PRESSURE = 30.0
_TINY = 1e-30
# Ours as well: for few full-batch steps, in that unit.
_ADAROUND_RATE, _STRAIGHT_THROUGH_RATE = 0.3, 0.002


@dataclass(frozen=True)
class _Layer:
    """What the objective needs, by groups of output channels that have inputs of their own.

    Attributes:
        weight: ``[groups, out / groups, in]``.
        scale: Of each element.
        zero: Zero point of each element, or None.
        hessian: Damped second moments ``[groups, in, in]``.
        fmt: The format.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    hessian: Tensor
    fmt: NumberFormat

    @classmethod
    def of(
        cls, weight: Tensor, fmt: NumberFormat, stats: LayerStats, method: str, nearest: QuantizedTensor | None
    ) -> _Layer:
        scale, zero = element_scales(weight, fmt, method, nearest)
        parts = (stats.by_group(weight), stats.by_group(scale), None if zero is None else stats.by_group(zero))
        return cls(*parts, stats.damped().to(weight.dtype), fmt)

    def rounded(self, x: Tensor) -> Tensor:
        return round_elements(x, self.scale, self.zero, self.fmt)

    def slope(self, x: Tensor) -> Tensor:
        """Half the gradient of the objective at a weight."""
        return (x - self.weight) @ self.hessian

    def error(self, x: Tensor) -> Tensor:
        """Objective of each output channel ``[groups, out / groups, 1]``."""
        return (self.slope(x) * (x - self.weight)).sum(-1, keepdim=True)


def adaround(
    weight: Tensor,
    fmt: NumberFormat,
    stats: LayerStats,
    method: str = "mse",
    *,
    steps: int = _STEPS,
    nearest: QuantizedTensor | None = None,
) -> Tensor:
    """Learn for each weight whether it goes to the value below or above (Nagel et al., AdaRound, 2020, eq. 21 to 25).

    Args:
        weight: ``[out, in]``.
        fmt: Any scalar format.
        stats: Of the layer's inputs.
        method: Range rule of the scales.
        steps: Of Adam.
        nearest: The weight rounded to nearest, if it is at hand.

    Raises:
        FormatError: If the format is not scalar.
    """
    layer = _Layer.of(weight, fmt, stats, method, nearest)
    low, high = neighbours(layer.weight, layer.scale, layer.zero, fmt)
    gap = high - low
    share = ((layer.weight - low) / torch.where(gap > 0, gap, 1)).clamp(0, 1)
    start = torch.logit((share - _GAMMA) / (_ZETA - _GAMMA))

    # In units of what nearest rounding loses per weight, so that one pressure and one learning rate fit all layers.
    unit = layer.error(layer.rounded(layer.weight)).clamp(min=_TINY) / weight.shape[1]

    def gradient(v: Tensor, progress: float) -> Tensor:
        sigmoid = v.sigmoid()
        h = (sigmoid * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        inner = sigmoid * (1 - sigmoid) * (_ZETA - _GAMMA) * ((h > 0) & (h < 1))
        # Falls from 20 to 2: first only what is nearly decided is pushed to an end, at last everything.
        beta = 11 + 9 * math.cos(math.pi * progress)
        away = 2 * h - 1
        force = 2 * beta * away.abs() ** (beta - 1) * away.sign()
        return (2 * layer.slope(low + h * gap) * gap / unit - _PRESSURE * force) * inner

    found = _learn(layer, start, gradient, lambda v: torch.where(v > 0, high, low), steps, _ADAROUND_RATE)
    return found.reshape(weight.shape)


def flexround(
    weight: Tensor,
    fmt: NumberFormat,
    stats: LayerStats,
    method: str = "mse",
    *,
    steps: int = _STEPS,
    nearest: QuantizedTensor | None = None,
) -> Tensor:
    """Learn a divisor of each weight before rounding (Lee et al., FlexRound, 2023, eq. 2).

    Large weights may move further than small ones. The paper's divisors of whole rows are in those of their weights.
    Arguments and errors are those of `adaround`.
    """
    layer = _Layer.of(weight, fmt, stats, method, nearest)
    return _straight_through(layer, lambda v: layer.weight * torch.exp(v), lambda x: x, steps).reshape(weight.shape)


def adaquant(
    weight: Tensor,
    fmt: NumberFormat,
    stats: LayerStats,
    method: str = "mse",
    *,
    steps: int = _STEPS,
    nearest: QuantizedTensor | None = None,
) -> Tensor:
    """Learn what is added to each weight before rounding (Hubara et al., AdaQuant, 2020, eq. 3).

    Unlike with AdaRound, a weight may move by more than one step. Arguments and errors are those of `adaround`.
    """
    layer = _Layer.of(weight, fmt, stats, method, nearest)
    unit = layer.weight.abs().mean(-1, keepdim=True).clamp(min=_TINY)
    found = _straight_through(layer, lambda v: layer.weight + v * unit, lambda x: unit, steps)
    return found.reshape(weight.shape)


def _straight_through(
    layer: _Layer, moved: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """Learn by gradients that take rounding for the identity; ``change`` is the derivative of ``moved`` at its value.

    Args:
        layer: What to round.
        moved: Parameters -> what is rounded; zeros give the weight itself.
        change: Value of ``moved`` -> its derivative.
        steps: Of Adam.
    """
    unit = layer.error(layer.rounded(layer.weight)).clamp(min=_TINY) / layer.weight.shape[-1]

    def gradient(v: Tensor, progress: float) -> Tensor:
        x = moved(v)
        return layer.slope(layer.rounded(x)) * change(x) / unit

    def rounded(v: Tensor) -> Tensor:
        return layer.rounded(moved(v))

    return _learn(layer, torch.zeros_like(layer.weight), gradient, rounded, steps, _STRAIGHT_THROUGH_RATE)


def _learn(
    layer: _Layer,
    start: Tensor,
    gradient: Callable[[Tensor, float], Tensor],
    rounded: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
) -> Tensor:
    """Descend with Adam; each output channel keeps the best rounding on the way.

    Args:
        layer: What to round.
        start: Parameters ``[groups, out / groups, in]``.
        gradient: Of the objective by the parameters, at a progress from 0 to 1.
        rounded: Parameters -> rounded weight.
        steps: Of Adam.
        rate: Learning rate; it falls to zero.
    """
    best = layer.rounded(layer.weight)
    lowest = layer.error(best)
    v = start.clone()
    optimizer = torch.optim.Adam([v], rate)
    for step in range(steps + 1):
        if step % _LOOK == 0:
            found = rounded(v)
            error = layer.error(found)
            best, lowest = torch.where(error < lowest, found, best), torch.minimum(error, lowest)
        v.grad = gradient(v, step / steps)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / (steps + 1))
        optimizer.step()
    return best
