"""Scales that move the difficulty of rounding between tensors: from inputs to weights, and from layer to layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.tensors import fake_quantize_static

_TINY = 1e-5
_AWQ_STEPS = 10


def smooth_scales(largest: Tensor, weight: Tensor, alpha: float = 0.5, positions: int = 1) -> Tensor:
    """SmoothQuant's factors of input channels (Xiao et al., 2023, eq. 4): ``max|x|^alpha / max|w|^(1 - alpha)``.

    Inputs are divided by them, the weight's columns multiplied. They cost one forward pass over the calibration data.

    Args:
        largest: Largest magnitude of each input ``[channels]``.
        weight: ``[out, channels * positions]``.
        alpha: How much of the difficulty moves from inputs to weights.
        positions: Columns of one channel.

    Returns:
        ``[channels]`` in float16's precision, with a geometric mean of 1; 1 where an input or its weights are all zero.
    """
    peaks = weight.abs().amax(0).reshape(-1, positions).amax(1)
    scales = largest.to(weight.dtype) ** alpha / peaks.clamp(min=_TINY) ** (1 - alpha)
    return _stored(torch.where((largest > 0) & (peaks > 0), scales, torch.nan))


def awq_scales(
    weight: Tensor,
    stats: LayerStats,
    nearest: Callable[[Tensor, LayerStats], Tensor],
    positions: int = 1,
    steps: int = _AWQ_STEPS,
) -> Tensor:
    """AWQ's factors of input channels (Lin et al., 2024, eq. 4 and 5): ``mean|x|^alpha`` with the best alpha of a grid.

    The best is the one whose outputs under nearest rounding have the least squared error; alpha = 0 is among them, so
    that they are never worse than none. They cost the one forward pass that all methods share.

    Args:
        weight: ``[out, channels * positions]``.
        stats: Of the layer's inputs; groups share the factors.
        nearest: Rounds a weight, given the statistics of its inputs.
        positions: Columns of one channel.
        steps: alpha goes from 0 to 1 in as many.

    Returns:
        ``[channels]`` in float16's precision, with a geometric mean of 1.
    """
    mean = stats.mean_abs.mean(0).reshape(-1, positions).mean(1).to(weight.dtype)
    best, lowest = torch.ones_like(mean), torch.inf
    for step in range(steps + 1):
        scales = _stored(torch.where(mean > 0, mean ** (step / steps), torch.nan))
        columns = scales.repeat_interleave(positions)
        rounded = nearest(weight * columns, stats.scaled(1 / columns)) / columns
        error = float(stats.output_error(rounded - weight).double().sum())
        if error < lowest:
            best, lowest = scales, error
    return best


def _stored(scales: Tensor) -> Tensor:
    """As float16 holds them, over their geometric mean; 1 in place of NaN."""
    mean = scales.log().nanmean()
    return torch.nan_to_num((scales.log() - mean).exp(), nan=1.0).clamp(2.0**-12, 2.0**12).half().to(scales.dtype)


def cross_layer_scales(first: Tensor, second: Tensor) -> Tensor:
    """Factors that give two layers the same range in each channel between them (Nagel et al., 2019, eq. 11).

    The first layer's output channels and bias are divided by them, the second's input channels multiplied; nothing
    changes if all between is positively homogeneous (ReLU). No forward pass.

    Args:
        first: Weight of the first layer ``[channels, ...]``.
        second: Weight of the second with its input channels first ``[channels, ...]``.

    Returns:
        ``[channels]``; 1 where a range is zero.
    """
    ranges = [w.detach().abs().flatten(1).amax(1) for w in (first, second)]
    scales = (ranges[0] / ranges[1]).sqrt()
    return torch.where((ranges[0] > 0) & (ranges[1] > 0), scales, 1.0)


def fake_quantize_noisy(x: Tensor, fmt: NumberFormat, lo: float, hi: float, noise: Tensor) -> Tensor:
    """Round inputs plus a fixed noise, and take it off again (Liu et al., NoisyQuant, 2023, eq. 6 to 8).

    A runtime adds the noise to the inputs and takes its product with the weight off the bias.

    Args:
        x: Inputs.
        fmt: Of one scale.
        lo: Lower end of the range.
        hi: Upper end.
        noise: Broadcasts to ``x``.

    Raises:
        FormatError: As `fake_quantize_static`.
    """
    return fake_quantize_static(x + noise, fmt, lo, hi) - noise


def noise_bias(
    rows: Tensor, fmt: NumberFormat, lo: float, hi: float, weight: Tensor | None = None, seed: int = 0
) -> Tensor:
    """The fixed noise of NoisyQuant: uniform, of the width among a few that leaves outputs the least squared error.

    It costs no forward pass beyond the one that gives the rows.

    Args:
        rows: Inputs ``[rows, features]``.
        fmt: Of one scale.
        lo: Lower end of the range.
        hi: Upper end.
        weight: ``[out, features]``; None: the inputs' own error counts.
        seed: Of the noise.

    Returns:
        ``[features]``; all zero where no noise helps.

    Raises:
        FormatError: As `fake_quantize_static`.
    """
    step = (hi - lo) / (2**fmt.bits - 1)
    drawn = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(seed)).to(rows) - 0.5
    best, lowest = torch.zeros_like(drawn), torch.inf
    for width in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        noise = drawn * (width * step)
        error = fake_quantize_noisy(rows, fmt, lo, hi, noise) - rows
        total = float((error if weight is None else error @ weight.T).double().square().sum())
        if total < lowest:
            best, lowest = noise, total
    return best
