"""Energy of the arithmetic and of the memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from mpq.cost_models.devices import Device
from mpq.cost_models.operations import accumulate, float_multiply, multiply
from mpq.cost_models.table import Cost, group_sums
from mpq.cost_models.workload import Workload, make_workload
from mpq.problem import Floats
from mpq.quantizers import NumberFormat, Scheme
from mpq.space import SearchSpace

# QKeras' constant (Coelho et al., 2021): 1.3 nJ for 64 bits, the lower end of Horowitz's range (2014).
DRAM_PJ_PER_BIT = 20.3125
_SMALLEST, _LARGEST = 8 * 1024, 1024**2  # bytes between which Horowitz gives energies of SRAM
_PJ = 1e-12


def sram_pj_per_bit(size_bytes: ArrayLike) -> Floats:
    """Reading one bit of an SRAM: QKeras' polynomial through Horowitz's 10, 20 and 100 pJ per 64 bits.

    These are of 8 KB, 32 KB and 1 MB; outside, the nearest holds: larger memories are banks of the largest.
    """
    x = np.log2(8 * np.clip(size_bytes, _SMALLEST, _LARGEST))
    return np.asarray(9.02427321e-4 * x**3 - 2.68847858e-2 * x**2 + 2.08900804e-1 * x)


@dataclass(frozen=True, eq=False)
class LayerEnergy:
    """Where the energy of layers goes, each part ``[L, S]`` joules for all calls over the whole batch.

    Attributes:
        products: Multiplications, or what takes their place.
        sums: Accumulations.
        widening: Weights turned into floats where the activations stay float.
        weights: Weights from DRAM through SRAM, for each call.
        activations: Inputs and outputs through SRAM, and DRAM where they don't fit.
    """

    products: Floats
    sums: Floats
    widening: Floats
    weights: Floats
    activations: Floats

    @property
    def total(self) -> Floats:
        """All of it ``[L, S]``."""
        return self.products + self.sums + self.widening + self.weights + self.activations


def layer_energy(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerEnergy:
    """Energy of each layer under each scheme, in a 45 nm process whatever the device (`mpq.cost_models.operations`).

    Of the device it takes the formats that a scheme is computed and held in there, that of what stays float, and the
    size of the on-chip memory: an input or output that fits there stays there. An output is written in the format of
    the layer's arithmetic, which stands for that of the next layer. Leakage, control and the registers within an array
    are not counted: what is meant is how schemes compare, not watts.

    Raises:
        BudgetError: If a format has no energy.
    """
    plain = NumberFormat.parse(device.float_format)
    pairs = [device.computed(s) for s in schemes]
    macs = work.macs[:, None]
    products = macs * np.array([multiply(w, a) for w, a in pairs])
    powers = np.maximum(np.ceil(np.log2(np.maximum(work.depth, 1))), 0).astype(int)
    table = np.array([[accumulate(w, a, 2**p) for w, a in pairs] for p in range(40)])
    sums = macs * table[powers]
    read, floats = _loaded(work, schemes, device)
    unpacked = np.array([s.activation is None for s in schemes]) & ~floats
    widening = work.weights[:, None] * work.calls[:, None] * unpacked
    size = on_chip_bytes(device)
    near = float(sram_pj_per_bit(size))
    weights = read * (near + DRAM_PJ_PER_BIT)
    bits = np.array([a.bits for _, a in pairs], np.float64)
    tensors = [work.inputs[:, None] * bits * (macs > 0), work.outputs[:, None] * bits]
    activations = sum(t * (near + DRAM_PJ_PER_BIT * (t > 8 * size)) for t in tensors) * work.calls[:, None]
    parts = (products, sums, widening * float_multiply(plain.exponent, plain.mantissa), weights, activations)
    return LayerEnergy(*(_PJ * np.asarray(x, np.float64) for x in parts))


def energy(space: SearchSpace) -> Cost:
    """Joules of one run of the searched layers at the device's batch size; its notes say what else the network does."""
    work = make_workload(space.layers, space.device.setting)
    plain = Scheme(NumberFormat.parse(space.device.float_format))
    reference = float(layer_energy(work, [plain], space.device).total.sum())
    cost = group_sums(space, layer_energy(work, space.schemes, space.device).total)
    macs = {
        "in skipped layers": sum(x.macs for x in space.skipped),
        "outside the layers": sum(x.macs for x in space.graph.outside),
    }
    notes = tuple(f"{count:,} multiply-accumulates {where} are not counted" for where, count in macs.items() if count)
    return Cost("energy", "J", cost, 0.0, 1.0, reference, notes=notes)


def on_chip_bytes(device: Device) -> float:
    """Memory on the chip; 1 MB, the largest SRAM that Horowitz gives, where the profile does not say."""
    f = device.figures
    if len(device.memory) > 1:
        return sum(m.size_bytes for m in device.memory[:-1])
    if device.kind == "fpga":
        return float(f["bram18"] * 18 * 128 + f["urams"] * 288 * 128)
    if device.kind == "array":
        return float(f["weight_buffer"] + f["input_buffer"])
    return float(_LARGEST)


def _loaded(
    work: Workload, schemes: Sequence[Scheme], device: Device
) -> tuple[Floats, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """Bits of the weights that all calls read, with scales, and whether they are floats ``[L, S]`` each.

    An embedding reads the rows that it looks up.
    """
    share = np.where(work.macs == 0, work.rows * work.depth / work.weights, 1.0) * work.calls

    @cache
    def stored(fmt: NumberFormat) -> Floats:
        return work.storage_bits(fmt) * share

    bits, floats = np.zeros((2, len(work), len(schemes)))
    for s, scheme in enumerate(schemes):
        for kind in np.unique(work.kinds):
            fmt, of_kind = device.loaded(scheme, str(kind)), work.kinds == kind
            bits[of_kind, s], floats[of_kind, s] = stored(fmt)[of_kind], fmt.exponent > 0
    return bits, floats > 0
