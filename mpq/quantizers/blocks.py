"""Blocks: tensors arranged as ``[blocks, elements]``, one block for each scale."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.recipe_storage import axis_of

# Elements to work on at a time: half a MiB of float32, beside a buffer or a result as large, in the usual 1 MiB.
CACHED = 2**17
# Elements that are kept of each kind of scratch memory: 4 MiB of float32.
_MOST_SCRATCH = 2**20

# Elements of a buffer for what is worked out of several blocks at a time.
BUFFERED = 2**18

_kept = threading.local()


def scratch(use: str, numel: int, like: Tensor) -> Tensor:
    """Memory for one use at a time, kept by each thread: fresh pages cost several passes over them."""
    if numel > _MOST_SCRATCH:
        return torch.empty(numel, dtype=like.dtype, device=like.device)
    key = f"{use} {like.dtype} {like.device}"
    found: Tensor | None = _kept.__dict__.get(key)
    if found is None or len(found) < numel:
        with torch.inference_mode(False):
            found = _kept.__dict__[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
    return found[:numel]


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, by its ends: several times faster than element by element."""
    return not x.numel() or all(bool(torch.isfinite(end)) for end in x.aminmax())


def to_rows(x: Tensor, channel_axis: int = 0) -> Tensor:
    """A tensor as ``[output channels, elements]``."""
    if x.dim() == 0:
        return x.reshape(1, 1)
    return x.movedim(axis_of(x.shape, channel_axis), 0).reshape(x.shape[channel_axis], -1)


def to_blocks(x: Tensor, fmt: NumberFormat, channel_axis: int = 0) -> Tensor:
    """Arrange a tensor as ``[blocks, elements]``; short last groups and blocks repeat their last values."""
    if x.numel() == 0:
        return x.reshape(0, 1)
    if fmt.granularity in ("tensor", "none") or x.dim() == 0:
        return x.reshape(1, -1)
    if fmt.granularity == "token":
        return x.reshape(-1, x.shape[-1])
    rows = to_rows(x, channel_axis)
    if fmt.block is None:
        return rows
    height, width = fmt.block
    down, right = -rows.shape[0] % height, -rows.shape[1] % width
    if right:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, right)], 1)
    if height == 1:
        return rows.reshape(-1, width)
    if down:
        rows = torch.cat([rows, rows[-1:].expand(down, -1)], 0)
    tiles = rows.reshape(rows.shape[0] // height, height, rows.shape[1] // width, width)
    return tiles.transpose(1, 2).reshape(-1, height * width)


def from_blocks(
    blocks: Tensor, shape: tuple[int, ...], channel_axis: int = 0, height: int = 1, width: int = 0
) -> Tensor:
    """Inverse of `to_blocks`: drop the padding and restore the shape.

    Args:
        blocks: ``[blocks, elements]``.
        shape: Of the tensor.
        channel_axis: Its output-channel axis, counted from either end.
        height: Output channels of a block.
        width: Elements of each of them; needed where blocks are higher than one channel.
    """
    numel = math.prod(shape)
    if not shape or numel == 0 or (height == 1 and blocks.numel() == numel and (channel_axis == 0 or len(blocks) == 1)):
        return blocks.reshape(shape)
    channel_axis = axis_of(shape, channel_axis)
    channels = shape[channel_axis]
    if height > 1:
        down = -(-channels // height)
        blocks = blocks.reshape(down, -1, height, width).transpose(1, 2).reshape(down * height, -1)[:channels]
    rows = blocks.reshape(channels, -1)[:, : numel // channels]
    rest = [n for i, n in enumerate(shape) if i != channel_axis]
    return rows.reshape(channels, *rest).movedim(0, channel_axis).contiguous()


def tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Parts of blocks ``[blocks, elements]`` to work on at a time: whole ones, or stretches of one."""
    rows, columns = shape
    step = max(1, BUFFERED // max(1, columns))
    for r in range(0, rows, step):
        for c in range(0, columns, BUFFERED):
            yield slice(r, r + step), slice(c, c + BUFFERED)


def padding_mask(shape: tuple[int, ...], fmt: NumberFormat, channel_axis: int, device: torch.device) -> Tensor | None:
    """Which elements of the blocks ``[blocks, elements]`` are the tensor's own; None where all are."""
    if fmt.block is None or not math.prod(shape) or not shape:
        return None
    channels = shape[channel_axis]
    size = channels, math.prod(shape) // channels
    height, width = fmt.block
    if not size[0] % height and not size[1] % width:
        return None
    own = torch.zeros(size[0] + -size[0] % height, size[1] + -size[1] % width, device=device)
    own[: size[0], : size[1]] = 1
    return to_blocks(own, fmt)


def work_dtype(x: Tensor) -> torch.dtype:
    """Half precision is rounded in float32: its own spacing is coarser than 8-bit steps."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def checked_weights(weights: Tensor) -> Tensor:
    """Weights ``[blocks, elements]`` of errors; those of a block without any weight count all alike.

    Raises:
        FormatError: If some are negative, NaN or infinite.
    """
    if not weights.numel():
        return weights
    if not all(0 <= float(end) < math.inf for end in weights.aminmax()):  # NaN fails this too
        raise FormatError("importance holds negative numbers, NaN or infinity")
    some = weights.sum(1, keepdim=True) > 0
    return weights if bool(some.all()) else torch.where(some, weights, 1.0)


def weighted_blocks(
    x: Tensor, fmt: NumberFormat, channel_axis: int, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Blocks in the dtype to work in, and the weights of their elements' errors: none for padding; None: all alike.

    Raises:
        FormatError: If an importance is negative, NaN or infinite.
    """
    x = x.detach().to(work_dtype(x))
    blocks = to_blocks(x, fmt, channel_axis)
    counts = padding_mask(tuple(x.shape), fmt, channel_axis, x.device)
    if importance is not None:
        weights = checked_weights(to_blocks(importance.expand_as(x).to(x.dtype), fmt, channel_axis))
        counts = weights if counts is None else weights * counts
    return blocks, counts
