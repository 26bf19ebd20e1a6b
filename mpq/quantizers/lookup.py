"""The nearest of given levels for every element of a tensor: by bisection, or ten times faster by two look-ups."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mpq.quantizers.blocks import scratch

# Integers as wide as a float, bits of its mantissa and of its sign and exponent.
_LAYOUTS = {torch.float32: (torch.int32, 23, 9), torch.float64: (torch.int64, 52, 12)}
_MOST_BITS = 8
# Elements at a time; fewer cost more in calls of torch than caches give.
_PIECE = 2**18


def nearest(x: Tensor, levels: tuple[float, ...], outputs: tuple[float, ...]) -> Tensor:
    """For each element the output that stands where its nearest level does; ties to the lower level, NaN stays.

    Args:
        x: Floating-point tensor of any shape.
        levels: In rising order.
        outputs: As many.
    """
    rising = torch.tensor(levels, dtype=x.dtype, device=x.device)
    # Only NaN comes after infinity.
    between = torch.cat([(rising[1:] + rising[:-1]) / 2, rising.new_tensor([torch.inf])])
    index = torch.bucketize(x.contiguous(), between, out_int32=True)
    return torch.tensor([*outputs, torch.nan], dtype=x.dtype, device=x.device)[index]


def nearest_by_tables(x: Tensor, levels: tuple[float, ...], outputs: tuple[float, ...], out: Tensor) -> Tensor:
    """As `nearest`, exactly, of contiguous tensors; into another one or in place. NaN is what arithmetic gives, quiet.

    Numbers with the same sign, exponent and leading bits of the mantissa are a bin; bins are so narrow that there is
    at most one midpoint in each. A first table has that midpoint, a second one the outputs on both sides of it.
    """
    tables = _tables(levels, outputs, x.dtype)
    if tables is None:
        return out.copy_(nearest(x, levels, outputs))
    bits, middles, sides = tables
    whole, mantissa, head = _LAYOUTS[x.dtype]
    even = (1 << (head + bits + 1)) - 2  # the last bit is for the side
    buffers = scratch("tables", 2 * min(_PIECE, x.numel()), x).view(2, -1)
    for piece, result in zip(torch.split(x.view(-1), _PIECE), torch.split(out.view(-1), _PIECE), strict=True):
        middle, bins = buffers[0, : len(piece)], buffers[1, : len(piece)].view(whole)
        torch.bitwise_right_shift(piece.view(whole), mantissa - bits - 1, out=bins).bitwise_and_(even)
        torch.index_select(middles, 0, bins, out=middle)
        # The sign bit of the difference tells the side; as a number, all bits set are -1.
        bins.sub_(middle.sub_(piece).view(whole).bitwise_right_shift_(8 * whole.itemsize - 1))
        torch.index_select(sides, 0, bins, out=result)
    return out


@lru_cache(64)
def _tables(
    levels: tuple[float, ...], outputs: tuple[float, ...], dtype: torch.dtype
) -> tuple[int, Tensor, Tensor] | None:
    """Bits of the mantissa in a bin, midpoints of bins (each twice), outputs on both sides of them; None: too many."""
    whole, mantissa, head = _LAYOUTS[dtype]
    rising = torch.tensor(levels, dtype=dtype)
    between = (rising[1:] + rising[:-1]) / 2
    for bits in range(1, _MOST_BITS + 1):
        shift = mantissa - bits
        first = torch.arange(1 << (head + bits), dtype=torch.int64) << shift  # the number nearest to zero in each bin
        last = first | ((1 << shift) - 1)
        ends = torch.stack([first, last]).to(whole).view(dtype)
        ends[:, ends.isnan()[0]] = torch.nan
        ends[1] = torch.where(ends[0].isinf(), ends[0], ends[1])
        index = torch.bucketize(ends, between).sort(0).values
        if int((index[1] - index[0]).max()) <= 1:
            middles = torch.where(index[0] < index[1], between[index[0].clamp(max=len(between) - 1)], torch.inf)
            sides = torch.tensor(outputs, dtype=dtype)[index]
            sides[:, ends[0].isnan()] = torch.nan
            sides = sides.T.reshape(-1)
            return bits, middles.repeat_interleave(2), sides
    return None
