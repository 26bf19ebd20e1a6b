"""Resources and cycles of FINN's matrix-vector units.

A unit multiplies a vector of ``depth`` inputs (kernel positions x input channels) by a ``[columns, depth]`` matrix,
with ``pe`` outputs and ``simd`` products of each at a time. Formulas of FINN-R (Blott et al., 2018) as in Xilinx/finn,
``custom_op/fpgadataflow``; those that have no published figure are left out (FIFOs, sliding windows). All take arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpq.problem import Floats

# FINN-R's fit of synthesis results: LUTs of an empty unit, and a factor on the counted logic.
_BASE_LUTS, _LUT_FACTOR = 300, 1.1


def unit_luts(
    pe: ArrayLike,
    simd: ArrayLike,
    depth: ArrayLike,
    columns: ArrayLike,
    weight_bits: ArrayLike,
    activation_bits: ArrayLike,
    *,
    dsp: ArrayLike = False,
    lutram: ArrayLike = False,
    signed: bool = False,
    out_bits: int = 0,
    accumulator: int = 32,
) -> Floats:
    """Look-up tables of a unit.

    Args:
        pe: Outputs at a time.
        simd: Products of each output at a time.
        depth: Products of an output.
        columns: Outputs.
        weight_bits: Bits of a weight.
        activation_bits: Bits of an input.
        dsp: Multipliers are DSP blocks.
        lutram: Weights are kept in look-up tables.
        signed: Inputs are signed.
        out_bits: Outputs are compared with ``2**out_bits - 1`` thresholds each; 0 leaves that to another unit.
        accumulator: Bits of an accumulator at most.
    """
    P, Q, K, N, W, A = _floats(pe, simd, depth, columns, weight_bits, activation_bits)
    multipliers = np.where(dsp, 0.0, Q * lut_multiplier(W, A))
    adders = (W + A) * (2 * Q - 1)
    alpha = np.log2(K) + W + A - 1 - signed
    acc = np.minimum(accumulator, np.ceil(alpha + np.log2(1 + 2.0**-alpha) + 1))
    levels = 2**out_bits - 1
    thresholds = levels * acc * np.ceil(N / P / 64) + levels * acc
    per_output: Floats = multipliers + adders + acc + thresholds
    weights = np.where(lutram, P * Q * W * np.ceil(K * N / (P * Q) / 64), 0.0)
    found: Floats = np.floor(_BASE_LUTS + _LUT_FACTOR * (P * per_output) + weights)
    return found


def lut_multiplier(weight_bits: ArrayLike, activation_bits: ArrayLike) -> Floats:
    """Look-up tables of one multiplier, before FINN-R's factor."""
    W, A = _floats(weight_bits, activation_bits)
    return (2 * np.ceil((W + A) / 6) - 1) * (W + A)


def luts_per_mac(weight_bits: ArrayLike, activation_bits: ArrayLike, *, dsp: bool) -> Floats:
    """What `unit_luts` grows by for one more product at a time, in a wide unit."""
    W, A = _floats(weight_bits, activation_bits)
    return _LUT_FACTOR * (2 * (W + A) + (0.0 if dsp else lut_multiplier(W, A)))


def unit_dsps(pe: ArrayLike, simd: ArrayLike, weight_bits: ArrayLike, activation_bits: ArrayLike) -> Floats:
    """DSP blocks of a unit whose multipliers don't share them (FINN's HLS unit)."""
    P, Q, W, A = _floats(pe, simd, weight_bits, activation_bits)
    return P * Q * np.ceil((W + A) / 48)


def packed_dsps(pe: ArrayLike, simd: ArrayLike, packing: ArrayLike = 4) -> Floats:
    """DSP blocks of a unit with ``packing`` products of one input in each (FINN's RTL unit: 4)."""
    P, Q, N = _floats(pe, simd, packing)
    return np.ceil(P / N) * Q


def unit_bram18(pe: ArrayLike, simd: ArrayLike, depth: ArrayLike, columns: ArrayLike, weight_bits: ArrayLike) -> Floats:
    """Block RAMs of 18 Kb for the weights of a unit, by the shapes that one can take."""
    P, Q, K, N, W = _floats(pe, simd, depth, columns, weight_bits)
    width, words = P * Q * W, K * N / (P * Q)
    choices = [np.ceil(words / 16384), np.ceil(words / 8192)]
    choices += [np.ceil(words / d) * np.ceil(width / w) for d, w in ((4096, 4), (2048, 9), (1024, 18), (512, 36))]
    conditions = [width == 1, width == 2, width <= 4, width <= 9, (width <= 18) | (words > 512)]
    return np.asarray(np.select(conditions, choices[:5], choices[5]))


def unit_urams(pe: ArrayLike, simd: ArrayLike, depth: ArrayLike, columns: ArrayLike, weight_bits: ArrayLike) -> Floats:
    """UltraRAMs (72 bits x 4,096) for the weights of a unit."""
    P, Q, K, N, W = _floats(pe, simd, depth, columns, weight_bits)
    return np.ceil(P * Q * W / 72) * np.ceil(K * N / (P * Q) / 4096)


def unit_cycles(pe: ArrayLike, simd: ArrayLike, depth: ArrayLike, columns: ArrayLike, positions: ArrayLike) -> Floats:
    """Cycles of a unit for ``positions`` output vectors."""
    P, Q, K, N, M = _floats(pe, simd, depth, columns, positions)
    return K * N / (P * Q) * M


def _floats(*values: ArrayLike) -> tuple[Floats, ...]:
    return tuple(np.asarray(x, np.float64) for x in values)
