"""Tiles of a GPU's matrix kernels: how a product falls on the processors, what is padded, what passes the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from mpq.cost_models.workload import Workload
from mpq.problem import Floats


@dataclass(frozen=True)
class Arithmetic:
    """What multiplies in a kernel.

    Attributes:
        rate: Multiply-accumulates per second that large products reach: the peak times the achieved efficiency.
        step: Products along the depth that one matrix instruction takes; the rest of the last one is padding.
    """

    rate: float
    step: int


@dataclass(frozen=True, eq=False)
class TileTimes:
    """Seconds of one call, each ``[L]``.

    Attributes:
        compute: Multiply-accumulates, padding and idle processors of the last wave included.
        widening: Turning weights into what the arithmetic takes, for each row of tiles anew.
        cache: Operands, partial sums and results through the second-level cache.
    """

    compute: Floats
    widening: Floats
    cache: Floats


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes of one call, each ``[L]``.

    Attributes:
        weights: Of the weights as stored.
        inputs: Of the input elements that are read; a strided 1x1 convolution skips some.
        outputs: Of the results as the kernel writes them.
    """

    weights: Floats
    inputs: Floats
    outputs: Floats


def tile_times(
    work: Workload,
    traffic: Traffic,
    arithmetic: Arithmetic,
    widen: float | None,
    figures: Mapping[str, Any],
    cache_bandwidth: float,
    memory: Floats,
) -> TileTimes:
    """Times under the tile that is best for each layer, as an autotuner or a library's heuristic picks it.

    Every output tile is one block of threads; the blocks run in waves over the processors, so the last wave may leave
    some idle (tile and wave quantization: NVIDIA, "Matrix multiplication background user's guide", 2023, section 3).
    Splitting the depth gives more blocks and shorter chains of dependent sums, and costs partial sums. A wave takes as
    long whether its tiles are full or not. Depthwise and other grouped convolutions also have a direct kernel on the
    vector units.

    Args:
        work: The layers.
        traffic: What they move.
        arithmetic: What multiplies.
        widen: Weight elements per second that can be widened, if they need to be.
        figures: Of the profile.
        cache_bandwidth: Bytes per second of the second-level cache.
        memory: Seconds that each layer spends on the memory behind the cache ``[L]``: what is best depends on it.
    """
    best = _direct(work, traffic, figures, widen, cache_bandwidth)
    least = combined(best, memory, figures["overlap"])
    for (rows, columns), split in product(figures["tiles"], figures["splits"]):
        tile = _tiled(work, traffic, arithmetic, widen, figures, cache_bandwidth, (rows, columns, split))
        seconds = combined(tile, memory, figures["overlap"])
        better = seconds < least
        least = np.where(better, seconds, least)
        best = TileTimes(
            np.where(better, tile.compute, best.compute),
            np.where(better, tile.widening, best.widening),
            np.where(better, tile.cache, best.cache),
        )
    return best


def combined(tile: TileTimes, memory: Floats, overlap: float) -> Floats:
    """Seconds of arithmetic and traffic that overlap in part: ``(a^p + m^p)^(1/p)``; infinite ``p`` is a roofline."""
    arithmetic, moving = tile.compute + tile.widening, np.maximum(tile.cache, memory)
    longer, shorter = np.maximum(arithmetic, moving), np.minimum(arithmetic, moving)
    share = np.divide(shorter, longer, out=np.zeros_like(longer), where=(longer > 0) & np.isfinite(longer))
    return np.asarray(longer * (1 + share**overlap) ** (1 / overlap))


def _tiled(
    work: Workload,
    traffic: Traffic,
    arithmetic: Arithmetic,
    widen: float | None,
    figures: Mapping[str, Any],
    cache_bandwidth: float,
    tile: tuple[int, int, int],
) -> TileTimes:
    rows, columns, split = tile
    down, across = np.ceil(work.rows / rows), np.ceil(work.columns / columns)
    waves = np.ceil(down * across * work.blocks * split / figures["processors"])
    depth = np.ceil(work.depth / split / arithmetic.step) * arithmetic.step
    chain = (
        figures["chain"] * work.depth / split
    )  # what one block waits for its own sums; other blocks hide it from then on
    compute = waves * rows * columns * depth * figures["processors"] / arithmetic.rate + chain
    # A split product writes its sums and reads them again, 4 bytes each.
    partial = (split > 1) * 8.0 * split * work.rows * work.columns * work.blocks
    moved = traffic.inputs * across + traffic.weights * down + traffic.outputs + partial
    return TileTimes(compute, _widening(work.weights * down, widen), moved / cache_bandwidth)


def _direct(
    work: Workload, traffic: Traffic, figures: Mapping[str, Any], widen: float | None, cache_bandwidth: float
) -> TileTimes:
    """Grouped convolutions on the vector units, at the same rate for every format; infinite for other layers."""
    per_call = work.blocks * work.rows * work.columns * work.depth
    compute = np.where(work.blocks > 1, per_call / figures["vector"], np.inf)
    moved = (traffic.inputs + traffic.weights + traffic.outputs) / cache_bandwidth
    return TileTimes(compute, _widening(work.weights, widen), moved)


def _widening(elements: Floats, widen: float | None) -> Floats:
    return np.zeros(len(elements)) if widen is None else elements / widen
