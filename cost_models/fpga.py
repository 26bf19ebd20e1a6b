"""FPGAs as dataflow pipelines of FINN-style matrix-vector units, one for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mpq.cost_models import finn
from mpq.cost_models.devices import Device
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.workload import Workload
from mpq.errors import BudgetError
from mpq.layers import stored_parameters
from mpq.problem import Floats, Ints
from mpq.quantizers import Scheme
from mpq.space import SearchSpace
from mpq.units import si

RESOURCES = ("luts", "dsps", "bram18", "urams")
_WEIGHTS_IN = ("luts", "bram18", "urams")
_MEMORY_BITS = {"luts": 64, "bram18": 18 * 1024, "urams": 288 * 1024}
_PRICE_ROUNDS, _PRICE_STEP = 60, 0.2


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Each layer's part of the pipeline's interval, the time between two results.

    All units of a dataflow pipeline run at once, so a layer has no time of its own: what it takes is area. A balanced
    pipeline gives each layer the share ``f`` of the device for which ``macs / (f * rate)`` is the same for all, where
    ``rate`` is what the whole device would reach in the layer's formats; the shares sum to one, so the interval is
    ``sum(macs / rate)``. A layer's part, ``macs / rate``, is what this gives: parts add up, and a format that needs
    half the area for a product halves it. Units that don't divide evenly and their fixed cost come on top: `pipeline`
    gives the folding of a whole config, and says whether its weights fit on the chip.

    The rate puts products into DSP blocks (packed, see `dsp_packing`) as long as there are any, the rest into look-up
    tables; adders take look-up tables in both cases. Weights and activations stay on the chip; rows of embeddings come
    from DRAM.
    """
    w, a = _bits(schemes)
    limits = usable(device)
    in_dsp, in_luts = (finn.luts_per_mac(w, a, dsp=dsp) for dsp in (True, False))
    packed = np.minimum(limits["dsps"] * dsp_packing(w, a, device), limits["luts"] / in_dsp)
    rate = packed + (limits["luts"] - packed * in_dsp) / in_luts
    compute = work.macs[:, None] / (rate * device.figures["clock_hz"])
    looked_up = np.where(work.macs == 0, work.rows * work.depth * work.calls, 0.0)
    memory = looked_up[:, None] * w / (8 * device.memory[-1].bandwidth)
    nothing = np.zeros_like(compute)
    return LayerTimes(compute, memory, nothing, nothing, np.maximum(compute, memory))


def usable(device: Device) -> dict[str, float]:
    """What a design may use of each resource."""
    return {r: math.floor(device.figures[r] * device.figures["usable"][r]) for r in RESOURCES}


def notes(space: SearchSpace) -> list[str]:
    """What a latency on an FPGA means here, and whether the weights can't fit on the chip whatever is picked."""
    found = [
        "FPGA: the seconds between two results of an ideal pipeline, not from input to result; "
        "mpq.cost_models.fpga.pipeline folds a config and gives both"
    ]
    limits = usable(space.device)
    holds = sum(limits[name] * bits for name, bits in _MEMORY_BITS.items()) / 8
    bits = np.array([s.weight.bits for s in space.schemes], np.float64)
    kept = [stored_parameters(x for x in g.layers if x.op != "embedding") for g in space.groups]
    least = float(np.array(kept) @ np.where(space.allowed, bits, np.inf).min(1)) / 8
    if least > holds:
        found.append(
            f"even the smallest weights, {si(least, 'B')}, are {least / holds:.0%} of what block RAM, UltraRAM and "
            f"look-up tables of {space.device.name} can hold ({si(holds, 'B')}): no pipeline fits"
        )
    return found


def dsp_packing(weight_bits: ArrayLike, activation_bits: ArrayLike, device: Device) -> Floats:
    """Products that one DSP block does in a cycle: several of few bits that share an operand."""
    widest, packing = np.maximum(weight_bits, activation_bits), device.figures["dsp_packing"]
    return np.asarray(np.select([widest <= 4, widest <= 8], [packing["4"], packing["8"]], 1), np.float64)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A folded pipeline.

    Attributes:
        pe: Outputs at a time of each unit ``[L]``.
        simd: Products of each at a time ``[L]``.
        multipliers: ``dsps`` or ``luts`` for each unit.
        weights_in: ``luts``, ``bram18`` or ``urams`` for each unit.
        cycles: Of each unit for the whole workload ``[L]``.
        resources: Name -> what each unit takes ``[L]``.
        limits: Name -> what the device has for all.
        interval: Seconds between results: those of the slowest unit.
        latency: Seconds from input to result at most: as if each unit waited for all of the last one's output.
    """

    pe: Ints
    simd: Ints
    multipliers: tuple[str, ...]
    weights_in: tuple[str, ...]
    cycles: Floats
    resources: Mapping[str, Floats]
    limits: Mapping[str, float]
    interval: float
    latency: float


@dataclass(frozen=True, eq=False)
class _Foldings:
    """All ways to build one unit, by falling cycles: ``[F]`` each, resources ``[F, R]``."""

    cycles: Floats
    resources: Floats
    pe: Ints
    simd: Ints
    dsp: Ints
    weights_in: Ints


def pipeline(work: Workload, schemes: Sequence[Scheme], device: Device) -> Pipeline:
    """Fold each layer's unit so that the pipeline is as fast as fits the device.

    The smallest interval is found by bisection over all cycle counts that a unit can have. For each, every unit takes
    the cheapest folding that keeps up, where prices of the resources rise with their use (a few rounds); so a folding
    that only a full search would find can be missed.

    Args:
        work: The layers.
        schemes: One for each layer.
        device: Of kind ``fpga``.

    Raises:
        BudgetError: If a layer has no unit, or the smallest pipeline does not fit.
    """
    limits = usable(device)
    known: dict[tuple[float, ...], _Foldings] = {}
    units = [_foldings(work, i, s, device, known) for i, s in enumerate(schemes)]
    counts = np.unique(np.concatenate([u.cycles for u in units]))
    counts = counts[counts >= max(u.cycles[-1] for u in units)]
    best, over = _fit(units, float(counts[-1]), limits)
    if best is None:
        name, share = max(over.items(), key=lambda item: item[1])
        raise BudgetError(
            f"the smallest pipeline takes {share:.0%} of the {name} that {device.name} has for it "
            f"({limits[name]:,.0f}); take fewer bits or a larger device"
        )
    low, high = 0, len(counts) - 1
    while low < high:
        middle = (low + high) // 2
        found, _ = _fit(units, float(counts[middle]), limits)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return _built(units, best, limits, device.figures["clock_hz"])


def _built(units: Sequence[_Foldings], picks: Sequence[int], limits: Mapping[str, float], clock: float) -> Pipeline:
    taken = list(zip(units, picks, strict=True))
    cycles = np.array([u.cycles[i] for u, i in taken])
    resources = np.array([u.resources[i] for u, i in taken])
    return Pipeline(
        np.array([u.pe[i] for u, i in taken]),
        np.array([u.simd[i] for u, i in taken]),
        tuple("dsps" if u.dsp[i] else "luts" for u, i in taken),
        tuple(_WEIGHTS_IN[u.weights_in[i]] for u, i in taken),
        cycles,
        {r: resources[:, k] for k, r in enumerate(RESOURCES)},
        limits,
        float(cycles.max() / clock),
        float(cycles.sum() / clock),
    )


def _fit(
    units: Sequence[_Foldings], target: float, limits: Mapping[str, float]
) -> tuple[list[int] | None, dict[str, float]]:
    """The foldings that reach a target and fit together, or None; and the use of each resource by the last try."""
    limit = np.array([max(limits[r], 1e-9) for r in RESOURCES])
    starts = [int(np.searchsorted(-u.cycles, -target)) for u in units]
    shares = [u.resources[i:] / limit for u, i in zip(units, starts, strict=True)]
    prices = np.ones(len(RESOURCES))
    use = np.zeros(len(RESOURCES))
    for _ in range(_PRICE_ROUNDS):
        picks = [int(np.argmin(s @ prices)) for s in shares]
        use = np.sum([s[i] for s, i in zip(shares, picks, strict=True)], axis=0)
        if (use <= 1).all():
            return [i + k for i, k in zip(starts, picks, strict=True)], {}
        prices = prices * np.exp(_PRICE_STEP * (np.minimum(use, 3) - 1))
    return None, dict(zip(RESOURCES, use.tolist(), strict=True))


def _foldings(
    work: Workload, i: int, scheme: Scheme, device: Device, known: dict[tuple[float, ...], _Foldings]
) -> _Foldings:
    if work.macs[i] == 0:
        raise BudgetError(f"{work.layers[i].name!r} ({work.layers[i].op}) has no matrix-vector unit; skip it")
    (w,), (a,) = _bits([scheme])
    depth, columns = int(work.depth[i]), int(work.columns[i] * work.blocks[i])
    positions = float(work.rows[i] * work.calls[i])
    key = (depth, columns, positions, w, a)
    if key not in known:
        known[key] = _all_foldings(depth, columns, positions, w, a, device)
    return known[key]


def _all_foldings(depth: int, columns: int, positions: float, w: float, a: float, device: Device) -> _Foldings:
    """Every pair of divisors, with multipliers in DSPs or not, and weights in each memory that the device has."""
    memories = [k for k, r in enumerate(_WEIGHTS_IN) if device.figures[r] > 0]
    grid = np.meshgrid(_divisors(columns), _divisors(depth), [0, 1], memories, indexing="ij")
    pe, simd, dsp, memory = (x.ravel() for x in grid)
    luts = finn.unit_luts(pe, simd, depth, columns, w, a, dsp=dsp == 1, lutram=memory == 0)
    dsps = np.where(dsp == 1, finn.packed_dsps(pe, simd, dsp_packing(w, a, device)), 0.0)
    brams = np.where(memory == 1, finn.unit_bram18(pe, simd, depth, columns, w), 0.0)
    urams = np.where(memory == 2, finn.unit_urams(pe, simd, depth, columns, w), 0.0)
    cycles = finn.unit_cycles(pe, simd, depth, columns, positions)
    order = np.argsort(-cycles, kind="stable")
    resources = np.stack([luts, dsps, brams, urams], 1)[order]
    return _Foldings(cycles[order], resources, pe[order], simd[order], dsp[order], memory[order])


def _divisors(n: int) -> Ints:
    numbers = np.arange(1, n + 1)
    found: Ints = numbers[n % numbers == 0]
    return found


def _bits(schemes: Sequence[Scheme]) -> tuple[Floats, Floats]:
    """Bits of weights and activations ``[S]`` each; activations that stay float count as of 32 bits."""
    acts = [32 if s.activation is None else s.activation.bits for s in schemes]
    return np.array([s.weight.bits for s in schemes], np.float64), np.array(acts, np.float64)
