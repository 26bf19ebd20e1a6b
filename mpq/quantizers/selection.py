"""Elements by rank, of blocks too large to sort: exact, in a few passes and little memory, by counting leading bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import BUFFERED, work_dtype

# Elements of blocks that are counted rather than sorted.
LARGE = 2**20

_DIGIT = 16
# Integers as wide as a float, and all their bits but the sign.
_INTEGERS = {torch.float32: (torch.int32, 0x7FFFFFFF), torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


def weighted_rank(
    values: Tensor, target: float | Tensor, weights: Tensor | None = None, *, magnitudes: bool = False
) -> Tensor:
    """The least element at and below which the elements weigh as much as a target; the largest if all don't.

    Integers that order as floats do are counted by their first 16 bits, then those that begin like the one sought by
    the next 16, and so on.

    Args:
        values: ``[elements]``; numbers, at least one.
        target: Without weights a rank from 1 on.
        weights: Non-negative, some of them positive, same shape; None: one each.
        magnitudes: Of the magnitudes of the elements.

    Returns:
        A scalar in the dtype to work in.
    """
    dtype = work_dtype(values)
    whole, positive = _INTEGERS[dtype]
    bits = 8 * whole.itemsize
    prefix = 0
    left = torch.as_tensor(target, dtype=torch.float64, device=values.device).reshape(1)
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.float64, device=values.device)
        for start in range(0, len(values), BUFFERED):
            part = values[start : start + BUFFERED].to(dtype)
            w = None if weights is None else weights[start : start + BUFFERED].double()
            key = (part.abs() if magnitudes else part).view(whole)
            # Negative floats order the other way round.
            key = key ^ ((key >> (bits - 1)) & positive)
            if shift < bits - _DIGIT:
                alike = key >> (shift + _DIGIT) == prefix
                key, w = key[alike], None if w is None else w[alike]
                digit = (key >> shift) & ((1 << _DIGIT) - 1)
            else:
                digit = (key >> shift) + (1 << (_DIGIT - 1))
            # On CUDA weights are added in any order, so that a target within rounding of a sum may go either way.
            counts += torch.bincount(digit, w, minlength=1 << _DIGIT)
        below = counts.cumsum(0)
        # Rounded sums may miss the target by a little.
        filled = counts.nonzero()
        found = torch.searchsorted(below, left).clamp(filled[0], filled[-1])
        left = left - (below[found] - counts[found])
        digit_found = int(found)
        prefix = (prefix << _DIGIT) | digit_found if shift < bits - _DIGIT else digit_found - (1 << (_DIGIT - 1))
    key = torch.tensor(prefix, dtype=whole, device=values.device)
    return (key ^ ((key >> (bits - 1)) & positive)).view(dtype)
