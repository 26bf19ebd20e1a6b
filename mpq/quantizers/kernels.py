"""Rounding of whole tensors, a few output channels at a time: what is worked on stays in a core's caches.

Each chunk of rows is read from memory once, whatever the number of formats, and each result is written once. Blocks do
not reach over chunks, so results are those of rounding everything at once, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import from_blocks, scratch, weighted_blocks, work_dtype
from mpq.quantizers.compiled import blocks_alike, compiled
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import TableGrid, grid_of
from mpq.quantizers.ranges import find_range, minmax_range
from mpq.quantizers.recipe_storage import axis_of
from mpq.quantizers.scales import outer_scale, refuse_larger, scale_and_zero

FLOAT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Elements at a time: 2 MiB of float32 beside a result as large. Half as many cost a tenth more in calls of torch.
_CHUNK = 2**19


@dataclass(frozen=True, slots=True)
class Scaled:
    """Some rows of an arranged tensor, and how one format scales them.

    Attributes:
        index: Which of the formats.
        rows: Which rows; all of a tensor without axes.
        blocks: ``[blocks, elements]`` in the dtype to work in; may be a view of the tensor.
        scale: ``[blocks, 1]``, or ``[1, 1]`` of the whole tensor.
        zero: Zero points alike.
        outer: The factor in all scales, or None.
        clip: Whether there may be elements beyond the grid's ends by more than rounding.
    """

    index: int
    rows: slice | tuple[()]
    blocks: Tensor
    scale: Tensor
    zero: Tensor
    outer: Tensor | None
    clip: bool


def fake_quantize_into(
    outs: Sequence[Tensor],
    x: Tensor,
    formats: Sequence[NumberFormat],
    channel_axis: int = 0,
    method: str = "mse",
    importance: Tensor | None = None,
    *,
    finite: bool = True,
) -> None:
    """Round a tensor to each of some formats.

    Args:
        outs: Where to, as many as formats, in the shape of ``x``; with one format it may be ``x`` itself.
        x: Floating-point tensor of any shape.
        formats: Formats that are a scale times a grid, or casts.
        channel_axis: The output-channel axis of ``x``.
        method: Range rule, see `find_range`.
        importance: Weights of the elements' errors, broadcast to ``x``; None: all alike.
        finite: Refuse NaN and infinity; otherwise their blocks become NaN.

    Raises:
        FormatError: If ``x`` holds NaN or infinity, or is too large for the scales or for the type of a cast. That may
            be seen when all is done, so results are of no use then.
    """
    targets = [arranged(out, fmt, channel_axis) for out, fmt in zip(outs, formats, strict=True)]
    with torch.no_grad():
        for part in scaled_rows(x, formats, channel_axis, method, importance, finite=finite):
            _round_rows(part, formats[part.index], targets[part.index][part.rows])
        for out, target in zip(outs, targets, strict=True):
            if out.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
                out.copy_(target.view(out.shape))


def fake_quantize_compiled(out: Tensor, x: Tensor, fmt: NumberFormat, channel_axis: int) -> bool:
    """As `fake_quantize_into` with min-max ranges, by compiled loops; False where there are none for it.

    Raises:
        FormatError: If ``x`` holds NaN or infinity.
    """
    if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return False  # torch.compile takes no views of one tensor of which it writes to one
    target = arranged(out, fmt, channel_axis)
    blocks = blocks_alike(arranged(x.detach(), fmt, channel_axis), target, fmt)
    if blocks is None or (loops := compiled(fmt)) is None:
        return False
    with torch.no_grad():
        limits = loops.ends(blocks[0])
        _refuse(limits, x)
        scale, zero = _scales(limits, fmt, outer_scale(blocks[0], fmt), [])
        loops.rounding(blocks[0], scale, scale.reciprocal(), zero, blocks[1])
    return True


def quantize_rows(
    x: Tensor, formats: Sequence[NumberFormat], channel_axis: int, method: str, importance: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Codes, scales, zero points and the factor in all scales of a tensor, for each of some formats; as above."""
    written = [_Codes(x, fmt, channel_axis) for fmt in formats]
    with torch.no_grad():
        for part in scaled_rows(x, formats, channel_axis, method, importance):
            written[part.index].add(part)
    return [codes.joined() for codes in written]


class _Codes:
    """Codes of one format, in one tensor from the start: fresh memory for the parts, too, costs more than rounding."""

    def __init__(self, x: Tensor, fmt: NumberFormat, channel_axis: int) -> None:
        self.x, self.fmt, self.grid = x, fmt, grid_of(fmt)
        self.blocks = None if fmt.granularity in ("tensor", "none") else fmt.num_scales(x.shape, channel_axis)
        self.codes = self.grid.encode(x.new_empty(0, dtype=work_dtype(x)))
        self.scales: list[tuple[Tensor, Tensor]] = []
        self.outer: Tensor | None = None
        self.done = 0

    def add(self, part: Scaled) -> None:
        """Round some rows."""
        offset = None if self.fmt.symmetric else part.zero
        units = scratch("units", part.blocks.numel(), part.blocks).view(part.blocks.shape)
        torch.mul(part.blocks, part.scale.reciprocal(), out=units)
        if not isinstance(self.grid, TableGrid):
            self.grid.round_(units, offset, clip=part.clip)
        if not self.done:
            self.codes = self.codes.new_empty(self.x.numel() if self.blocks is None else self.blocks * units.shape[1])
        self.codes[self.done : self.done + units.numel()] = self.grid.encode(units, offset).view(-1)
        self.done += units.numel()
        if self.blocks is not None or not self.scales:
            self.scales.append((part.scale, part.zero))
        self.outer = part.outer

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Codes ``[blocks, elements]``, scales, zero points and the factor in all scales."""
        if not self.scales:
            nothing = torch.empty(0, 1, dtype=work_dtype(self.x), device=self.x.device)
            return self.codes.view(0, 1), nothing, nothing, None
        scale, zero = (torch.cat(parts) for parts in zip(*self.scales, strict=True))
        return self.codes.view(self.blocks or 1, -1), scale, zero, self.outer


def arranged(x: Tensor, fmt: NumberFormat, channel_axis: int) -> Tensor:
    """A tensor with its blocks along the first axis: a view where possible."""
    if x.dim() == 0:
        return x
    if fmt.granularity in ("tensor", "none"):
        return x.reshape(-1)
    if fmt.granularity == "token":
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x.movedim(axis_of(x.shape, channel_axis), 0)


def scaled_rows(
    x: Tensor,
    formats: Sequence[NumberFormat],
    channel_axis: int = 0,
    method: str = "mse",
    importance: Tensor | None = None,
    *,
    finite: bool = True,
) -> Iterator[Scaled]:
    """Each chunk of rows with its scales by each format; rows of a format come in order.

    Raises:
        FormatError: After the last chunk, if ``x`` holds NaN or infinity and should not.
    """
    if not x.numel():
        return
    x = x.detach()
    kinds: dict[str, dict[int, NumberFormat]] = {}
    for index, fmt in enumerate(formats):
        kind = fmt.granularity if fmt.granularity in ("none", "tensor", "token") else "channel"
        kinds.setdefault(kind, {})[index] = fmt
    ends: list[Tensor] = []
    for kind, alike in kinds.items():
        fmt = next(iter(alike.values()))
        weights = None if importance is None else arranged(importance.expand_as(x), fmt, channel_axis)
        scaled = _scaled_whole if kind in ("none", "tensor") else _scaled_blocks
        yield from scaled(arranged(x, fmt, channel_axis), alike, method, weights, ends if finite else None)
    _refuse(ends, x)


def _refuse(ends: Sequence[Tensor], x: Tensor) -> None:
    # A sum is ten times as fast, but may overflow.
    if ends and not math.isfinite(torch.cat(list(ends)).sum()) and not bool(torch.cat(list(ends)).isfinite().all()):
        raise FormatError(f"the tensor {list(x.shape)} holds NaN or infinity")


def _scaled_whole(
    x: Tensor, formats: dict[int, NumberFormat], method: str, importance: Tensor | None, ends: list[Tensor] | None
) -> Iterator[Scaled]:
    """As `scaled_rows`, of formats with one scale or none; notes the ends where there is a list for them."""
    blocks = x.reshape(1, -1)
    limits = minmax_range(blocks)
    _note(limits, ends)
    scales = {}
    for i, fmt in formats.items():
        if fmt.granularity == "none":
            scales[i] = torch.ones_like(limits[0]), torch.zeros_like(limits[0])
            if ends is not None:
                _refuse_cast(limits, fmt)
        else:
            weights = None if importance is None else importance.reshape(1, -1)
            scales[i] = _scales(find_range(blocks, fmt, method, weights, None, limits), fmt, None, ends)
    for rows, part in chunks(x, 1):
        part = part.reshape(1, -1).to(work_dtype(x))
        for i in formats:
            yield Scaled(i, rows, part, *scales[i], None, True)


def _scaled_blocks(
    x: Tensor, formats: dict[int, NumberFormat], method: str, importance: Tensor | None, ends: list[Tensor] | None
) -> Iterator[Scaled]:
    """As `scaled_rows`, of formats whose blocks lie along the same axis; notes the ends of all blocks."""
    outers = {i: outer_scale(x, fmt) for i, fmt in formats.items()}
    height = math.lcm(*(fmt.block[0] for fmt in formats.values() if fmt.block is not None))
    for rows, part in chunks(x, height):
        weights = None if importance is None else importance[rows]
        seen: dict[str, tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]] = {}
        for i, fmt in formats.items():
            if fmt.granularity not in seen:
                blocks, counts = weighted_blocks(part, fmt, 0, weights)
                seen[fmt.granularity] = blocks, counts, minmax_range(blocks)
                _note(seen[fmt.granularity][2], ends)
            blocks, counts, limits = seen[fmt.granularity]
            found = find_range(blocks, fmt, method, counts, outers[i], limits)
            scale, zero = _scales(found, fmt, outers[i], ends)
            yield Scaled(i, rows, blocks, scale, zero, outers[i], method != "minmax" or _clips(scale, fmt))


def _note(limits: tuple[Tensor, Tensor], ends: list[Tensor] | None) -> None:
    if ends is not None:
        ends.extend(limits)


def _scales(
    limits: tuple[Tensor, Tensor], fmt: NumberFormat, outer: Tensor | None, ends: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of final ranges; where nothing is refused, NaN for what is not finite."""
    scale, zero = scale_and_zero(*limits, fmt, outer)
    if ends is None:
        return torch.where(limits[0].isfinite() & limits[1].isfinite(), scale, torch.nan), zero
    refuse_larger(scale, limits, fmt)
    return scale, zero


def _refuse_cast(limits: tuple[Tensor, Tensor], fmt: NumberFormat) -> None:
    """Refuse what a cast would make infinite; minifloats give their ends."""
    if not fmt.plain_float:
        return
    most, largest = torch.finfo(FLOAT_DTYPES[fmt.name]).max, max(-float(limits[0]), float(limits[1]))
    if largest > most and math.isfinite(largest) and math.isinf(torch.tensor(largest).to(FLOAT_DTYPES[fmt.name])):
        raise FormatError(f"{fmt.name} ends at {most:.6g}, but the tensor holds a magnitude of {largest:.6g}")


def _clips(scale: Tensor, fmt: NumberFormat) -> bool:
    """Whether scales that cover all elements may leave some beyond the ends, once they are stored."""
    if not fmt.symmetric or fmt.family == "mx" or scale.dtype != torch.float32:
        return True
    # Rounding of the scale itself does not take an element to the next code, the limits of what stores it may.
    most = {"fp32": math.inf, "fp16": 65504.0 if fmt.bits <= 8 else 0.0, "e8m0": 2.0**127}.get(fmt.scale, 0.0)
    return most < math.inf and not float(scale.amax()) < most


def chunks(x: Tensor, height: int) -> Iterator[tuple[slice | tuple[()], Tensor]]:
    """Rows to work on at a time, a multiple of a height; all of a tensor without axes."""
    if x.dim() == 0:
        yield (), x
        return
    step = max(1, _CHUNK * len(x) // max(1, x.numel()) // height) * height
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, x[rows]


def _round_rows(part: Scaled, fmt: NumberFormat, out: Tensor) -> None:
    if fmt.plain_float:
        out.copy_(part.blocks.to(FLOAT_DTYPES[fmt.name]).view(out.shape))
        return
    in_place = out.dtype == part.blocks.dtype and out.numel() == part.blocks.numel() and out.is_contiguous()
    in_place = in_place and (fmt.block is None or fmt.block[0] == 1)
    buffer = out if in_place else scratch("units", part.blocks.numel(), part.blocks)
    buffer = buffer.view(part.blocks.shape)
    torch.mul(part.blocks, part.scale.reciprocal(), out=buffer)
    grid_of(fmt).round_(buffer, None if fmt.symmetric else part.zero, clip=part.clip).mul_(part.scale)
    if not in_place:
        out.copy_(from_blocks(buffer, tuple(out.shape), 0, *(fmt.block or (1, 0))))
