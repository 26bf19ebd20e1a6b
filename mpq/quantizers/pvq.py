"""Pyramid vector quantization: groups of whole numbers whose magnitudes add up to K, times a scale.

Fischer, "A Pyramid Vector Quantizer" (1986): the points of the pyramid ``sum(|y|) = K`` of L dimensions are counted by
``N(L, K) = N(L-1, K) + N(L-1, K-1) + N(L, K-1)`` and enumerated, so that a group takes ``bits * L`` bits however its
numbers look. K is the largest for which they suffice. A last, shorter group has fewer dimensions and a K of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import BUFFERED, from_blocks, weighted_blocks
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.legality import PVQ_BITS
from mpq.quantizers.packing import SCALE_DTYPES, Layout, check_layout, pack, unpack
from mpq.quantizers.scales import stored_scale
from mpq.quantizers.tensors import QuantizedTensor


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`; codes are the pyramid's points themselves, which `encode_group` enumerates.

    The direction comes first (the largest cosine, pulse by pulse), then the scale with the least squared error: the
    range rule has no say. Groups of zeros have the scale zero.
    """
    blocks, weights = weighted_blocks(x, fmt, channel_axis, importance)
    shape = tuple(x.shape)
    codes = torch.zeros(blocks.shape, dtype=_code_dtype(fmt, shape, channel_axis), device=x.device)
    scale = blocks.new_zeros(len(blocks), 1)
    for _, width, rows in _groups(fmt, shape, channel_axis, x.device):
        step = max(1, BUFFERED // width)
        for part in (rows[r : r + step] for r in range(0, len(rows), step)):
            values = blocks[part, :width]
            w = torch.ones_like(values) if weights is None else weights[part, :width]
            points = project(values, pulses(width, fmt.bits), w)
            codes[part, :width] = points.to(codes.dtype)
            scale[part] = _best_scale(values, points, w, fmt)
    return QuantizedTensor(codes, scale, torch.zeros_like(scale), fmt, shape, channel_axis)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    values = q.codes.to(q.scale.dtype) * q.scale
    return from_blocks(values, q.shape, q.channel_axis, *(q.fmt.block or (1, 0)))


def group_sizes(fmt: NumberFormat, shape: tuple[int, ...], channel_axis: int = 0) -> tuple[int, int]:
    """Elements in each group of an output channel, and in the last one."""
    full = fmt.group_size or 1
    channels = shape[channel_axis] if shape else 1
    length = int(torch.Size(shape).numel()) // max(channels, 1)
    return full, (length - 1) % full + 1


def _code_dtype(fmt: NumberFormat, shape: tuple[int, ...], channel_axis: int) -> torch.dtype:
    most = max(pulses(width, fmt.bits) for width in group_sizes(fmt, shape, channel_axis))
    return torch.int8 if most <= torch.iinfo(torch.int8).max else torch.int16


def _groups(
    fmt: NumberFormat, shape: tuple[int, ...], channel_axis: int, device: torch.device
) -> list[tuple[str, int, Tensor]]:
    """Full groups and shorter last ones, where there are any: a name, their elements, their places among all groups."""
    place = torch.arange(fmt.num_scales(shape, channel_axis), device=device)
    if len(place) == 0:
        return []
    full, last = group_sizes(fmt, shape, channel_axis)
    of_channel = len(place) // (shape[channel_axis] if shape else 1)
    short = (place % of_channel == of_channel - 1) & (last < full)
    found = [("codes", full, place[~short]), ("last", last, place[short])]
    return [(part, width, rows) for part, width, rows in found if len(rows)]


def project(values: Tensor, total: int, weights: Tensor) -> Tensor:
    """Points of the pyramid with nearly the largest cosine to the groups.

    Whole parts of ``|x| * K / sum(|x|)``, then the missing pulses one by one, each where the cosine gains most.

    Args:
        values: ``[groups, dimensions]``.
        total: K.
        weights: Non-negative, of the squared errors, same shape.

    Returns:
        Whole numbers in the dtype of the values, ``[groups, dimensions]``; their magnitudes add up to K.
    """
    x = values.abs()
    length = x.sum(1, keepdim=True)
    x = torch.where(length > 0, x / length, 1 / x.shape[1])
    points = torch.floor(x * total + 1e-4)  # points of the pyramid stay where they are
    missing = (total - points.sum(1)).round()
    gain, cost = weights * x, weights
    dot, square = (gain * points).sum(1, keepdim=True), (cost * points.square()).sum(1, keepdim=True)
    for _ in range(int(missing.max()) if len(x) else 0):
        cosine = (dot + gain).square() / (square + cost * (2 * points + 1)).clamp(min=torch.finfo(x.dtype).tiny)
        at = cosine.argmax(1, keepdim=True)
        more = (missing > 0).to(x.dtype)[:, None]
        dot += more * gain.gather(1, at)
        square += more * (cost.gather(1, at) * (2 * points.gather(1, at) + 1))
        points.scatter_add_(1, at, more)
        missing -= 1
    return torch.where(values < 0, -points, points)


def _best_scale(values: Tensor, points: Tensor, weights: Tensor, fmt: NumberFormat) -> Tensor:
    """Scale ``[groups, 1]`` with the least weighted squared error, as it is stored; zero for zeros."""
    dot = (weights * values * points).sum(1, keepdim=True)
    square = (weights * points.square()).sum(1, keepdim=True)
    exact = dot / square
    kind = SCALE_DTYPES[fmt.scale]
    # Lengths clip nothing: where the type's spacing is coarse they are rounded to nearest, if need be to zero.
    small = exact < torch.finfo(kind).smallest_normal
    stored = torch.where(small, exact.to(kind).to(exact.dtype), stored_scale(exact, fmt))
    return torch.where(dot > 0, stored, 0.0)


@cache
def _counts(dimensions: int, bits: int) -> list[list[int]]:
    """``N(l, k)`` for l from 0 to ``dimensions`` and k from 0 to the largest K whose points take so many bits."""
    columns = [[1] * (dimensions + 1)]  # by k: N(l, 0) is 1, N(0, k) is 0
    while True:
        before, column = columns[-1], [0]
        for i in range(dimensions):
            column.append(column[i] + before[i] + before[i + 1])
        # In one dimension K is but a part of the scale.
        if column[dimensions] > 2**bits or (dimensions == 1 and len(columns) > 1):
            return [list(row) for row in zip(*columns, strict=True)]
        columns.append(column)


def pulses(dimensions: int, bits: int) -> int:
    """The largest K with ``N(dimensions, K) <= 2**(bits * dimensions)``.

    Raises:
        FormatError: If a group's code would take more than 62 bits.
    """
    if not 1 <= bits * dimensions <= PVQ_BITS:
        raise FormatError(f"pvq codes take at most {PVQ_BITS} bits, not {bits} for each of {dimensions} elements")
    return len(_counts(dimensions, bits * dimensions)[0]) - 1


def _tables(dimensions: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``N(l, k)`` and its sums over k from 0, both ``[dimensions + 1, K + 1]``."""
    counts = torch.tensor(_counts(dimensions, bits * dimensions), device=device)
    return counts, counts.cumsum(1)


def encode_group(points: Tensor, bits: int) -> Tensor:
    """Numbers of points of the pyramid, from 0 to ``N(L, K) - 1``.

    Element by element: zero comes first, then 1, -1, 2, -2 and so on, each with all points of the remaining elements.

    Args:
        points: Whole numbers ``[groups, L]``, as `quantize` gives them (without the padding of a last group).
        bits: Of one element, as in the format.

    Returns:
        ``[groups]`` int64, of which ``bits * L`` bits are used.

    Raises:
        FormatError: If a group is no point of the pyramid.
    """
    dimensions, points = points.shape[1], points.long()
    counts, sums = _tables(dimensions, bits, points.device)
    left = torch.full_like(points[:, 0], counts.shape[1] - 1)
    if not torch.equal(points.abs().sum(1), left):
        raise FormatError(f"magnitudes of the codes must add up to {counts.shape[1] - 1} in each group")
    number = torch.zeros_like(left)
    for i in range(dimensions):
        value, fewer = points[:, i], dimensions - i - 1
        magnitude = value.abs()
        row, before = counts[fewer], sums[fewer]
        # All points with a smaller magnitude here: N for 0, twice the sum over the magnitudes from 1 to |value| - 1.
        smaller = row[left] + 2 * (before[(left - 1).clamp(min=0)] - before[left - magnitude])
        smaller += (value < 0) * row[left - magnitude]
        number += torch.where(magnitude > 0, smaller, 0)
        left = left - magnitude
    return number


def decode_group(numbers: Tensor, dimensions: int, bits: int) -> Tensor:
    """Inverse of `encode_group`: points ``[groups, dimensions]`` of int16."""
    counts, sums = _tables(dimensions, bits, numbers.device)
    left = torch.full_like(numbers, counts.shape[1] - 1)
    points = torch.zeros(len(numbers), dimensions, dtype=torch.int16, device=numbers.device)
    number = numbers.clone()
    for i in range(dimensions):
        row, before = counts[dimensions - i - 1], sums[dimensions - i - 1]
        zero = number < row[left]
        number = torch.where(zero, number, number - row[left])
        # The largest magnitude m with 2 * (before[left - 1] - before[left - m]) <= number.
        most = before[(left - 1).clamp(min=0)]
        rest = torch.searchsorted(before, most - number // 2)
        number = torch.where(zero, number, number - 2 * (most - before[rest]))
        negative = number >= row[rest]
        number = torch.where(zero | ~negative, number, number - row[rest])
        magnitude = torch.where(zero, 0, left - rest)
        points[:, i] = torch.where(negative, -magnitude, magnitude).to(torch.int16)
        left = left - magnitude
    return points


def layout(fmt: NumberFormat, shape: tuple[int, ...], channel_axis: int = 0) -> Layout:
    """As `mpq.quantizers.packing.layout`."""
    found: Layout = {"scale": (SCALE_DTYPES[fmt.scale], (fmt.num_scales(shape, channel_axis),))}
    for part, width, rows in _groups(fmt, shape, channel_axis, torch.device("cpu")):
        found[part] = torch.uint8, (-(-len(rows) * fmt.bits * width // 8),)
    return found


def to_parts(q: QuantizedTensor) -> dict[str, Tensor]:
    """As `mpq.quantizers.packing.to_parts`: numbers of the points, of shorter last groups as a part of their own."""
    scale = q.scale.flatten().to(SCALE_DTYPES[q.fmt.scale])
    if not torch.equal(scale.to(q.scale.dtype), q.scale.flatten()):
        raise FormatError(f"the scale of {q.fmt.name} is not what {scale.dtype} can hold")
    found = {"scale": scale}
    for part, width, rows in _groups(q.fmt, q.shape, q.channel_axis, scale.device):
        found[part] = pack(encode_group(q.codes[rows, :width], q.fmt.bits), q.fmt.bits * width)
    return found


def from_parts(
    parts: Mapping[str, Tensor],
    fmt: NumberFormat,
    shape: tuple[int, ...],
    channel_axis: int = 0,
    dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """As `mpq.quantizers.packing.from_parts`."""
    check_layout(parts, layout(fmt, shape, channel_axis))
    scale = parts["scale"].to(dtype)[:, None]
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise FormatError("scale holds what is no length")
    width = (fmt.group_size or 1) if shape else 1
    codes = torch.zeros(len(scale), width, dtype=_code_dtype(fmt, shape, channel_axis), device=scale.device)
    for part, width, rows in _groups(fmt, shape, channel_axis, scale.device):
        numbers = unpack(parts[part], fmt.bits * width, len(rows)).long()
        if int(numbers.max()) >= _counts(width, fmt.bits * width)[-1][-1]:
            raise FormatError(f"{part} holds {int(numbers.max())}, which is the number of no point")
        codes[rows, :width] = decode_group(numbers, width, fmt.bits).to(codes.dtype)
    return QuantizedTensor(codes, scale, torch.zeros_like(scale), fmt, shape, channel_axis)
