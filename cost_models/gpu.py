"""GPUs: a derated roofline with tiles, waves, caches, widening of weights, launches and requantization."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mpq.cost_models.devices import Device, Kernel, Memory
from mpq.cost_models.gpu_tiles import Arithmetic, TileTimes, Traffic, combined, tile_times
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.workload import Workload
from mpq.errors import BudgetError
from mpq.problem import Floats
from mpq.quantizers import NumberFormat, Scheme


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Seconds of each layer under each scheme on a GPU.

    ``launch + (arithmetic^p + traffic^p)^(1/p)``: a roofline (Williams et al., 2009) whose corner ``overlap`` rounds.

    Arithmetic is tiles in waves over the processors, at the rate that kernels reach, plus requantization of integer
    sums, plus the widening of weights where the arithmetic does not take them as stored: with few rows, weight-only
    kernels (LUT-GEMM, Park et al., 2022; Marlin, Frantar et al., 2024) and W4A8 (QServe, Lin et al., 2024) gain
    bandwidth; with many they pay for widening and gain nothing. So fewer weight bits may take longer, as may narrower
    products whose depth does not fill an instruction: their kernels reach a smaller share of a higher peak.

    Traffic is the slower of main memory and second-level cache. Inputs and outputs stay in the cache as far as they
    fit, weights do not. Integer kernels write ``output_bits`` whatever comes next.

    Attention itself and the key-value cache are no layers: `mpq.cost_models.kv_cache`.

    Args:
        work: The layers.
        schemes: Each has a kernel on the device.
        device: A profile of kind ``gpu``.

    Raises:
        BudgetError: If the profile has no peak for the arithmetic of a scheme.
    """
    stored = {fmt: work.storage_bits(fmt) / 8 for fmt in {s.weight for s in schemes}}
    columns = [_column(work, stored[s.weight], s, device) for s in schemes]
    parts = np.array(columns).reshape(len(schemes), 5, len(work)).transpose(1, 2, 0)
    return LayerTimes(*parts)


def levels(device: Device) -> tuple[Memory, Memory]:
    """The last-level cache and the main memory of a GPU."""
    return device.memory[-2], device.memory[-1]


def format_bits(name: str) -> int:
    """Bits of a format by its base name: ``int8`` -> 8, ``fp8_e4m3`` -> 8, ``nf4`` -> 4."""
    match = re.search(r"\d+", name)
    if match is None:
        raise BudgetError(f"{name!r} says no number of bits; name a format like int8 or fp16 in the profile")
    return int(match[0])


def find_arithmetic(kernel: Kernel, device: Device) -> Arithmetic:
    """What multiplies in a kernel: the kernel itself, or the one that it runs as.

    Raises:
        BudgetError: If the profile has no peak or no efficiency for it.
    """
    figures = device.figures
    weight, activation = kernel.runs_as or (kernel.weight, kernel.activation)
    pairs = (k.peak for k in device.kernels if (k.weight, k.activation) == (weight, activation))
    peak = kernel.peak if kernel.runs_as is None else next(pairs, None)
    efficiency = figures["efficiency"].get(weight)
    if peak is None or efficiency is None:
        missing = "efficiency" if peak is not None else "peak"
        raise BudgetError(
            f"device {device.name!r} has no {missing} for {weight} x {activation}, which runs "
            f"{kernel.weight} x {kernel.activation}; add it to the profile"
        )
    step = max(1, 8 * figures["step_bytes"] // format_bits(weight))
    return Arithmetic(peak * efficiency, step)


def _column(work: Workload, stored: Floats, scheme: Scheme, device: Device) -> Floats:
    """Compute, memory, widening, overhead and total of one scheme ``[5, L]``."""
    kernel = device.kernel(scheme)
    if kernel is None:
        raise BudgetError(f"{scheme} has no kernel on {device.name}; it runs {device.kernel_names()}")
    figures = device.figures
    arithmetic = find_arithmetic(kernel, device)
    embeds = np.array([x.op == "embedding" for x in work.layers])
    traffic = _traffic(work, stored, scheme, kernel, device, embeds)
    cache, main = levels(device)
    kept = cache.size_bytes / 2  # inputs and outputs share it
    through = traffic.weights + sum(np.maximum(x - kept, 0) for x in (traffic.inputs, traffic.outputs))
    memory = through / (main.bandwidth * figures["memory_efficiency"])
    tile = tile_times(work, traffic, arithmetic, kernel.widen, figures, cache.bandwidth, memory)
    none = np.zeros(len(work))
    looked_up = (traffic.inputs + traffic.weights + traffic.outputs) / cache.bandwidth
    tile = TileTimes(
        np.where(embeds, none, tile.compute),
        np.where(embeds, none, tile.widening),
        np.where(embeds, looked_up, tile.cache),
    )
    results = work.blocks * work.rows * work.columns
    scaled = np.where(~embeds & _is_integer(kernel), results / figures["requantize"], 0.0)
    busy = TileTimes(tile.compute + scaled, tile.widening, tile.cache)  # other blocks multiply while one requantizes
    total = combined(busy, memory, figures["overlap"]) + figures["launch"]
    launch = np.full(len(work), figures["launch"])
    parts = (tile.compute + scaled, np.maximum(tile.cache, memory), tile.widening, launch, total)
    return np.stack(parts) * work.calls


def _is_integer(kernel: Kernel) -> bool:
    """Whether the sums are integers, which a kernel must scale."""
    return (kernel.runs_as or (kernel.weight,))[0].startswith("int")


def _traffic(
    work: Workload, stored: Floats, scheme: Scheme, kernel: Kernel, device: Device, embeds: np.ndarray
) -> Traffic:
    """Bytes of one call; an embedding reads whole numbers of 8 bytes and the rows that they name."""
    float_bits = NumberFormat.parse(device.float_format).bits
    if scheme.activation is not None:
        bits = float(device.computed(scheme)[1].bits)
    else:
        bits = float(max(float_bits, 32 if kernel.weight == "fp32" else 0))
    written = device.figures["output_bits"] if _is_integer(kernel) else max(bits, float_bits)
    looked_up = work.rows * work.depth
    reads = np.minimum(work.inputs, looked_up * work.blocks)
    return Traffic(
        np.where(embeds, stored * np.minimum(1, looked_up / work.weights), stored),
        np.where(embeds, 8 * work.inputs, reads * bits / 8),
        work.outputs * np.where(embeds, float_bits, written) / 8,
    )
