"""Progressive integers: 4 bits by group on top of 8 bits by channel (QServe).

Lin et al., "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving" (2024), section 4.1: weights
become 8-bit integers within -119 to 119 with a float16 scale for each output channel, and these become unsigned 4-bit
codes with a whole scale of 1 to 16 and a zero point for each group. The range leaves room for the second rounding: what
comes back is an 8-bit integer, so that products are of 8 bits and only sums meet the float scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import BUFFERED, from_blocks, to_rows, weighted_blocks
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.kernels import chunks
from mpq.quantizers.ranges import find_range, minmax_range
from mpq.quantizers.scales import refuse_beyond, stored_scale
from mpq.quantizers.tensors import QuantizedTensor

PROTECTIVE, _STEPS = 119, 15
_LARGEST_SCALE = 16  # 2 * 119 / 15, rounded


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`; ``scale`` holds the whole scales of groups, ``outer`` those of channels.

    ``minmax`` is the paper's rule for groups; ``mse`` tries all 16 scales; the channels' range is always their largest
    magnitude.
    """
    blocks, weights = weighted_blocks(x, fmt, channel_axis, importance)
    own = to_rows(x.detach(), channel_axis)
    needed = torch.maximum(own.amax(1, keepdim=True), -own.amin(1, keepdim=True)).to(blocks.dtype) / PROTECTIVE
    refuse_beyond(needed, fmt)
    outer = stored_scale(needed, fmt)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    scale, zero = (blocks.new_empty(len(blocks), 1) for _ in range(2))
    for rows, part in chunks(blocks.reshape(len(outer), -1), 1):
        at = _blocks_of(rows, blocks, outer)
        whole = (part / outer[rows]).round_().clamp_(-PROTECTIVE, PROTECTIVE).reshape(-1, blocks.shape[1])
        counts = None if weights is None else weights[at]
        if method == "mse":
            scale[at], zero[at] = _best_scale(whole, counts)
        else:
            lo, hi = find_range(whole, fmt, method, counts)
            scale[at] = ((hi - lo) / _STEPS).round_().clamp_(1, _LARGEST_SCALE)
            zero[at] = _zero_point(lo, hi, scale[at])
        codes[at] = ((whole / scale[at]).round_() + zero[at]).clamp_(0, _STEPS).to(torch.uint8)
    return QuantizedTensor(codes, scale, zero, fmt, tuple(x.shape), channel_axis, outer)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    assert q.outer is not None
    values = q.scale.new_empty(len(q.outer), q.codes.numel() // len(q.outer))
    for rows, part in chunks(values, 1):
        at = _blocks_of(rows, q.codes, q.outer)
        whole = _eight_bits(q.codes[at], q.scale[at], q.zero_point[at])
        torch.mul(whole.view(part.shape), q.outer[rows], out=part)
    return from_blocks(values.reshape(q.codes.shape), q.shape, q.channel_axis)


def eight_bits(q: QuantizedTensor) -> Tensor:
    """The 8-bit integers ``[blocks, elements]`` (int8) that the codes stand for, which kernels multiply with."""
    return _eight_bits(q.codes, q.scale, q.zero_point)


def _eight_bits(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return codes.to(scale.dtype).sub_(zero).mul_(scale).to(torch.int8)


def _blocks_of(rows: slice | tuple[()], blocks: Tensor, channels: Tensor) -> slice:
    """Which blocks some channels have."""
    assert isinstance(rows, slice)
    each = len(blocks) // len(channels)
    return slice(rows.start * each, rows.stop * each)


def _zero_point(lo: Tensor, hi: Tensor, scale: Tensor) -> Tensor:
    """Zero points of a range; where the codes do not cover it, they miss the same share of both ends."""
    ratio = (_STEPS * scale / (hi - lo).clamp(min=1)).clamp_(max=1)
    return (-lo * ratio / scale).round_().clamp_(0, _STEPS)


def _best_scale(whole: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block, both ``[blocks, 1]``, with the least weighted squared error."""
    best = whole.new_ones(len(whole), 1)
    zero = torch.zeros_like(best)
    step = max(1, BUFFERED // whole.shape[1])
    for r in range(0, len(whole), step):
        part = whole[r : r + step]
        lo, hi = minmax_range(part)
        least = torch.full_like(lo, torch.inf)
        for s in range(1, _LARGEST_SCALE + 1):
            tried = _zero_point(lo, hi, torch.full_like(lo, s))
            error = (part / s).round_().add_(tried).clamp_(0, _STEPS).sub_(tried).mul_(s).sub_(part).square_()
            total = (error if weights is None else error.mul_(weights[r : r + step])).sum(1, keepdim=True)
            better = total < least
            best[r : r + step][better] = s
            zero[r : r + step] = torch.where(better, tried, zero[r : r + step])
            least = torch.minimum(total, least)
    return best, zero
