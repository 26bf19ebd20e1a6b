"""Clips: the share of the min-max range of each block that loses least by rounding, found by trying.

Blocks are ``[blocks, elements]``, ranges ``[blocks, 1]`` and candidates shares of the min-max range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import CACHED, scratch
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import grid_of
from mpq.quantizers.scales import scale_and_zero

Ends = tuple[Tensor, Tensor]

_COARSE, _FINE = 16, 8
_COARSE_SMALL, _SMALL_BLOCK = 96, 64
_STRIDE, _BEST = 8, 2
# Powers of magnitudes up to two to this, and one over it, stay far from where float32 ends, sums and all.
_LARGEST_POWER = 60.0


def least_share(fmt: NumberFormat) -> float:
    """The narrowest clip worth trying: low widths clip most of a bell curve, high ones nearly nothing."""
    return {1: 0.02, 2: 0.1, 3: 0.2, 4: 0.3}.get(fmt.bits, 0.5)


def clip_errors(
    blocks: Tensor,
    ends: Ends,
    ratios: Tensor,
    fmt: NumberFormat,
    importance: Tensor | None = None,
    outer: Tensor | None = None,
    power: float = 2.0,
) -> Tensor:
    """Sum of ``|error|**power`` of each clip, in a unit of each block: ratios ``[K, blocks]`` -> ``[K, blocks]``."""
    grid = grid_of(fmt)
    cols = blocks.shape[1]
    errors = torch.zeros_like(ratios)
    unit = error_unit(ends, power)
    step = max(1, CACHED // cols)
    for r in (slice(i, i + step) for i in range(0, len(blocks), step)):
        lo, hi = (end[r, 0] * ratios[:, r] for end in ends)
        scale, zero = (t[..., None] for t in scale_and_zero(lo, hi, fmt, outer))
        if unit is not None:
            scale = scale * unit[r]
        inverse = 1 / scale
        for c in (slice(i, i + CACHED) for i in range(0, cols, CACHED)):
            part = blocks[r, c].to(ratios.dtype)
            if unit is not None:
                part = part * unit[r]
            weights = None if importance is None else importance[r, c]
            buffer = scratch("errors", part.numel(), part).view(part.shape)
            for k in range(len(ratios)):
                torch.mul(part, inverse[k], out=buffer)
                grid.round_(buffer, None if fmt.symmetric else zero[k])
                torch.addcmul(part, buffer, scale[k], value=-1, out=buffer)
                errors[k, r] += _total(buffer, power, weights)
    return errors


def error_unit(ends: Ends, power: float = 2.0) -> Tensor | None:
    """Powers of two ``[blocks, 1]`` that bring blocks to where powers of errors neither vanish nor overflow.

    One for blocks that are there already, so that theirs keep their bits; None if all are.
    """
    largest = torch.maximum(ends[1], -ends[0])
    exponents = torch.frexp(largest)[1]  # zero for zeros
    beyond = exponents.abs() > _LARGEST_POWER / max(power, 2.0)
    if not bool(beyond.any()):
        return None
    # The quotient is exact; the unit itself must neither overflow nor lose bits.
    limits = torch.finfo(largest.dtype)
    largest = largest.clamp(limits.tiny, limits.max / 8)
    return torch.where(beyond, torch.frexp(largest)[0] / largest, 1.0)


def _total(errors: Tensor, power: float, weights: Tensor | None) -> Tensor:
    """Weighted sums of ``|error|**power`` over the last axis; may overwrite the errors."""
    if weights is None and power == 2.0:
        norms: Tensor = torch.linalg.vector_norm(errors, dim=1)
        return norms.square_()
    powers = errors.square_() if power == 2.0 else errors.abs_().pow_(power)
    return powers.sum(1) if weights is None else powers.mul_(weights).sum(1)


def mse_range(
    blocks: Tensor, ends: Ends, fmt: NumberFormat, importance: Tensor | None = None, outer: Tensor | None = None
) -> Ends:
    """Range with the least squared rounding error, found by shrinking the min-max range.

    The rule is that of Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.1; how it is
    searched for is our own:

    16 ratios over all sensible clips (96 for small blocks, whose error is a rough function of the clip), then 8
    around each block's best, for all blocks at once. The min-max range itself is a candidate, so the result is never
    worse than `minmax_range`.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.
    """
    smallest = least_share(fmt)
    count = _COARSE_SMALL if blocks.shape[1] <= _SMALL_BLOCK else _COARSE
    # The widest first: it is to win among equals.
    coarse = torch.linspace(smallest, 1.0, count, dtype=ends[0].dtype, device=blocks.device).flip(0)
    ratios = coarse[:, None].expand(-1, len(blocks))
    best_ratio, best_error = _least(ratios, clip_errors(blocks, ends, ratios, fmt, importance, outer))

    step = (1.0 - smallest) / (count - 1)
    offsets = torch.linspace(-step, step, _FINE + 2, dtype=coarse.dtype, device=blocks.device)[1:-1].flip(0)
    fine = (best_ratio + offsets[:, None]).clamp(smallest / 2, 1.0)
    ratio, error = _least(fine, clip_errors(blocks, ends, fine, fmt, importance, outer))
    return _shrunk(ends, torch.where(error < best_error, ratio, best_ratio))


def best_of_grid(
    blocks: Tensor,
    ends: Ends,
    fmt: NumberFormat,
    candidates: int,
    power: float = 2.0,
    importance: Tensor | None = None,
    outer: Tensor | None = None,
) -> Ends:
    """Range with the least ``sum(|error|**power)`` among evenly spaced clips.

    GPTQ's code (Frantar et al., 2023) shrinks ranges so, with a power of 2.4.

    Blocks of up to 64 elements try them all. Of larger ones every eighth clip is tried, and all clips around the two
    best of these, 29 instead of 80: the sum of all blocks' errors is within 0.1 % of an exhaustive search (measured on
    normal, Laplace and t-distributed blocks of 128 to 4096 elements at 2 to 8 bits). Clips are not screened on a
    sample of the elements: it misses the outliers that the choice is about.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.
    """
    grid = torch.linspace(least_share(fmt), 1.0, candidates, dtype=ends[0].dtype, device=blocks.device)

    def errors(index: Tensor) -> Tensor:
        return clip_errors(blocks, ends, grid[index], fmt, importance, outer, power)

    step = 1 if blocks.shape[1] <= _SMALL_BLOCK else _STRIDE
    # From the last one, so that the whole range is among them.
    coarse = torch.arange(candidates - 1, -1, -step, device=blocks.device)[:, None].expand(-1, len(blocks))
    found = errors(coarse)
    if step == 1:
        return _shrunk(ends, _least(grid[coarse], found)[0])
    best = found.topk(min(_BEST, len(coarse)), 0, largest=False).indices
    around = torch.tensor([i for i in range(-step // 2, step // 2 + 1) if i], device=blocks.device)
    fine = (coarse.gather(0, best)[:, None] + around[:, None]).clamp(0, candidates - 1).reshape(-1, len(blocks))
    tried = torch.cat([coarse, fine])
    return _shrunk(ends, _least(grid[tried], torch.cat([found, errors(fine)]))[0])


def _least(ratios: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """The ratio with the least error of each block, the first of equals, and that error."""
    best = errors.argmin(0, keepdim=True)
    return ratios.gather(0, best)[0], errors.gather(0, best)[0]


def _shrunk(ends: Ends, ratio: Tensor) -> Ends:
    return ends[0] * ratio[:, None], ends[1] * ratio[:, None]
