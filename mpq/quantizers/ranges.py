"""Ranges: where to clip before rounding. Every rule works on all blocks (rows) at once.

A block is the set of elements that share one scale; tensors arrive as ``[blocks, elements]``.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import all_finite, checked_weights, work_dtype
from mpq.quantizers.clips import best_of_grid, mse_range
from mpq.quantizers.entropy import entropy_range
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.legality import fitted
from mpq.quantizers.mean_ranges import magnitude_range, mean_is_best
from mpq.quantizers.selection import LARGE, weighted_rank

_CANDIDATES = 80
_MOST_CANDIDATES = 10_000
_NUMBER = re.compile(r"[-+0-9.eE]+")  # as configs have it; Python reads 9_9, spaces and other alphabets' digits too
_BY_LOSS = 8  # each costs forward passes


def minmax_range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each block, both ``[blocks, 1]``; the range always holds zero."""
    # Twice as many passes as aminmax, which is twenty times slower on CPUs.
    lo, hi = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    return lo.to(work_dtype(lo)).clamp_(max=0), hi.to(work_dtype(hi)).clamp_(min=0)


def percentile_range(blocks: Tensor, percentile: float, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Range between the two-sided percentiles ``100 - p`` and ``p`` of each block, both ``[blocks, 1]``.

    The element at the nearest rank is taken (no interpolation), so the range is attained by the data.

    Args:
        blocks: ``[blocks, elements]``.
        percentile: p.
        own: Which elements count, at least one of each block; None: all.
    """
    n = blocks.shape[1]
    if n > LARGE and all_finite(blocks):
        return _percentiles_of_large(blocks, percentile, own)
    if own is not None and not bool(own.all()):
        counts = own.sum(1, keepdim=True)
        ranks = torch.minimum((percentile / 100 * counts.double()).round().long().clamp(min=1), counts)
        rising = torch.where(own, blocks, torch.inf).sort(1).values.to(work_dtype(blocks))
        return rising.gather(1, counts - ranks).clamp(max=0), rising.gather(1, ranks - 1).clamp(min=0)
    rank = min(n, max(1, round(percentile / 100 * n)))
    hi = blocks.kthvalue(rank, dim=1, keepdim=True).values.to(work_dtype(blocks))
    lo = blocks.kthvalue(n + 1 - rank, dim=1, keepdim=True).values.to(work_dtype(blocks))
    return lo.clamp(max=0), hi.clamp(min=0)


def _percentiles_of_large(blocks: Tensor, percentile: float, own: Tensor | None) -> tuple[Tensor, Tensor]:
    found = []
    for row, block in enumerate(blocks):
        weights = None if own is None else own[row]
        n = len(block) if weights is None else int(weights.count_nonzero())
        rank = min(n, max(1, round(percentile / 100 * n)))
        found.append(torch.stack([weighted_rank(block, r, weights) for r in (n + 1 - rank, rank)]))
    ends = torch.stack(found)
    return ends[:, :1].clamp(max=0), ends[:, 1:].clamp(min=0)


def find_range(
    blocks: Tensor,
    fmt: NumberFormat,
    method: str = "mse",
    importance: Tensor | None = None,
    outer: Tensor | None = None,
    ends: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Range of each block by a named rule.

    ======================  =====================================================================================
    ``minmax``              smallest and largest element
    ``percentile:P``        the elements at the ranks of P % and 100 - P %, 50 < P <= 100
    ``mse``                 least squared error among 24 clips (104 for blocks of up to 64 elements)
    ``mse:N``               least squared error among N clips, see `best_of_grid`
    ``pnorm:P``             least sum of ``|error|**P`` among 80 clips; GPTQ's code has 2.4
    ``absmean``             ternary and binary formats: scale by the mean magnitude (BitNet b1.58)
    ``absmedian``           by the median magnitude (BitNet b1.58 Reloaded)
    ``kl``                  histogram that changes least by rounding (TensorRT), see `entropy_range`
    ======================  =====================================================================================

    Ranges of activations may also be found by ``loss`` or ``loss:N``, which looks at the whole network: `mpq.analyze`.

    Args:
        blocks: ``[blocks, elements]``.
        fmt: A format with scales. MX formats are scaled as OCP has it by ``mse`` as by ``minmax``.
        method: See the table.
        importance: Weights ``[blocks, elements]`` of errors, and of elements in histograms; None: all alike, as in
            blocks without any weight. Percentiles are those of all elements with a weight.
        outer: The factor in all scales, see `outer_scale`.
        ends: What `minmax_range` gives, if that is known.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.

    Raises:
        FormatError: If the method is unknown, or an importance is negative, NaN or infinite.
    """
    name, value = parse_range_method(method)
    importance = None if importance is None else checked_weights(importance)
    if name == "percentile":
        return percentile_range(blocks, value, None if importance is None else importance > 0)
    if name in ("absmean", "absmedian") or (method == "mse" and mean_is_best(fmt)):
        return magnitude_range(blocks, fmt, method, importance)
    ends = minmax_range(blocks) if ends is None else ends
    if name == "minmax" or (method == "mse" and fmt.family == "mx"):
        return ends
    if name == "kl":
        return entropy_range(blocks, ends, fmt, importance, outer)
    if method == "mse":
        return mse_range(blocks, ends, fmt, importance, outer)
    if name == "mse":
        return best_of_grid(blocks, ends, fmt, int(value), 2.0, importance, outer)
    return best_of_grid(blocks, ends, fmt, _CANDIDATES, value, importance, outer)


@lru_cache(256)
def check_rule(fmt: NumberFormat, method: str) -> None:
    """Refuse a rule that finds no range for a format, before there are tensors.

    Raises:
        FormatError: Naming the format.
    """
    if "weighted" in fmt.recipe and not _minimises_error(fmt, method):
        raise FormatError(
            f"{fmt.name} weighs the errors that a range is to minimise; {method} ranges of {fmt.base} minimise none: "
            "use mse:N, pnorm:P or kl as weight_range, or leave weighted out"
        )
    if fmt.granularity not in ("none", "cross") and not fitted(fmt):
        find_range(torch.ones(1, 2), fmt, method)


def _minimises_error(fmt: NumberFormat, method: str) -> bool:
    """Whether the errors that a range or what is fitted in its place is to minimise may have weights."""
    if fmt.family in ("kmeans", "pvq"):  # the rule has no say
        return True
    return parse_range_method(method)[0] in ("mse", "pnorm", "kl") and (method != "mse" or fmt.family != "mx")


def loss_candidates(method: str) -> int | None:
    """How many clips the rules of activations ``loss`` (8) and ``loss:N`` try; None for other rules.

    Raises:
        FormatError: If there is not at least one more clip than the whole range.
    """
    name, colon, text = method.partition(":")
    if name != "loss":
        return None
    count = int(text) if text.isascii() and text.isdecimal() else 0
    if colon and not 2 <= count <= _MOST_CANDIDATES:
        raise FormatError(f"loss:N tries N clips, 2 to {_MOST_CANDIDATES:,}, unlike {method!r}")
    return count if colon else _BY_LOSS


def parse_range_method(method: str) -> tuple[str, float]:
    """Name of a range rule and the number after its colon (NaN where there is none).

    Raises:
        FormatError: If there is no such rule, or its number is out of range.
    """
    name, colon, text = method.partition(":")
    try:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
    except ValueError:
        value = math.nan
    known = {
        "mse": not colon or (text.isdecimal() and 2 <= value <= _MOST_CANDIDATES),
        "minmax": not colon,
        "kl": not colon,
        "absmean": not colon,
        "absmedian": not colon,
        "percentile": colon and 50 < value <= 100,
        "pnorm": colon and 0 < value < math.inf,
    }
    if name == "loss":
        raise FormatError(
            f"{method!r} is the network's loss with one input rounded: it is for activation_range= of mpq.analyze, and "
            "needs its calibration data; for weights use mse, mse:N or another rule of find_range"
        )
    if not known.get(name):
        raise FormatError(
            f"unknown range method {method!r}; use mse, mse:N with N clips, minmax, percentile:P with 50 < P <= 100, "
            "pnorm:P with P > 0, kl, absmean or absmedian; for activations also loss or loss:N"
        )
    return name, value
