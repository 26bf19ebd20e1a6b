"""Ranges chosen by what a rounded tensor does to a loss, which only the caller can tell."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import from_blocks, weighted_blocks
from mpq.quantizers.clips import least_share
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.ranges import minmax_range
from mpq.quantizers.scales import outer_scale, scale_and_zero
from mpq.quantizers.tensors import block_axis, check_scaled, round_elements


def loss_aware_range(
    x: Tensor, fmt: NumberFormat, loss: Callable[[Tensor], float], candidates: int = 80, channel_axis: int = 0
) -> tuple[Tensor, Tensor]:
    """The clip of a tensor with the least loss of whatever it goes into; one share of min-max for all blocks.

    PD-Quant (Liu et al., CVPR 2023) chooses the range of a layer's activations so, the loss being the difference
    between a network's predictions with them rounded and not.

    Args:
        x: Floating-point tensor of any shape.
        fmt: A format that is a scale times a grid.
        loss: What is to be least, of the rounded tensor (shape and dtype of ``x``). It is called once for each
            candidate: with predictions over the calibration data, that is as many forward passes.
        candidates: How many evenly spaced clips; the first is the whole range.
        channel_axis: The output-channel axis of ``x``.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``; of a per-tensor format those for `fake_quantize_static`.

    Raises:
        FormatError: If there are no candidates, the loss is never a finite number, or the format is of another kind.
    """
    check_scaled(fmt)
    axis = block_axis(fmt, channel_axis)
    blocks, _ = weighted_blocks(x, fmt, axis, None)
    lo, hi = minmax_range(blocks)
    outer = outer_scale(blocks, fmt)

    def loss_of(share: float) -> float:
        scale, zero = scale_and_zero(lo * share, hi * share, fmt, outer)
        rounded = round_elements(blocks, scale, zero, fmt)
        return float(loss(from_blocks(rounded, tuple(x.shape), axis, *(fmt.block or (1, 0))).to(x.dtype)))

    best = best_clip(fmt, candidates, loss_of)
    return lo * best, hi * best


def best_clip(fmt: NumberFormat, candidates: int, loss: Callable[[float], float]) -> float:
    """The share of the min-max range with the least loss, among evenly spaced ones; the widest of equals.

    Args:
        fmt: Its bits say how narrow clips may be.
        candidates: How many shares; the first is the whole range.
        loss: Of a share; called once for each.

    Raises:
        FormatError: If there are no candidates, or the loss is never a finite number.
    """
    best, least = None, float("inf")
    for share in clip_shares(fmt, candidates):
        value = loss(share)
        if value < least:
            best, least = share, value
    if best is None:
        raise FormatError("the loss was no finite number for any candidate")
    return float(best)


def clip_shares(fmt: NumberFormat, candidates: int) -> list[float]:
    """Evenly spaced shares of the min-max range, from the whole range down.

    Raises:
        FormatError: If there are none.
    """
    if candidates < 1:
        raise FormatError(f"there must be candidates to choose from, not {candidates}")
    shares: list[float] = torch.linspace(1.0, least_share(fmt), candidates).tolist()
    return shares
