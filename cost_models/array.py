"""Matrix arrays: bit-serial (BISMO), bit-fusing (Bit Fusion) and fixed-width (Eyeriss) accelerators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mpq.cost_models.devices import Device
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.workload import Workload
from mpq.problem import Floats
from mpq.quantizers import Scheme


def fusion_factor(
    weight_bits: ArrayLike, activation_bits: ArrayLike, unit_bits: int = 8, brick_bits: int = 2
) -> Floats:
    """Products that one fusion unit does in a cycle (Sharma et al., 2018; ``perf_factor`` in their simulator).

    A unit multiplies two operands of ``unit_bits``; it is made of bricks of ``brick_bits``, which fuse for the
    operands at hand: ``floor(unit / max(w, brick)) * floor(unit / max(a, brick))``.
    """
    per_operand = [unit_bits // np.maximum(np.asarray(b), brick_bits) for b in (weight_bits, activation_bits)]
    return np.asarray(per_operand[0] * per_operand[1], np.float64)


def array_cycles(work: Workload, schemes: Sequence[Scheme], device: Device) -> Floats:
    """Cycles of the arithmetic of each scheme of each layer ``[L, S]``, all calls.

    The array does ``positions`` output positions x ``columns`` output channels x ``depth`` products a cycle; what does
    not fill it is padded. Channel groups (depthwise convolutions) are merged into dense, block-diagonal blocks up to
    the width of the array: a depthwise layer has one output for each channel, so all columns but one would idle.

    - ``serial``: a cycle takes one bit of the weights and one of the activations, so that time is the product of both.
    - ``fused``: `fusion_factor` times as many products at a time.
    - ``fixed``: every format runs at the full width.
    """
    f, (w, a) = device.figures, _bits(schemes)
    blocks, columns, depth = (x[:, None] for x in _merged(work, f["columns"]))
    if f["arithmetic"] == "fused":
        factor, passes = fusion_factor(w, a, f["unit_bits"], f["brick_bits"]), np.ones_like(w)
    else:
        factor, passes = np.ones_like(w), w * a if f["arithmetic"] == "serial" else np.ones_like(w)
    steps = np.ceil(work.rows / f["positions"])[:, None] * blocks * np.ceil(columns / f["columns"])
    cycles = steps * np.ceil(depth / (f["depth"] * factor)) * passes * work.calls[:, None]
    return np.where(work.macs[:, None] > 0, cycles, 0.0)


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Time of each layer on an array with double buffering: the longest of arithmetic and of each memory port.

    Traffic in bits: bit-serial arrays read whole words of one bit plane (``depth`` bits), so short dot products are
    padded, as BISMO's matrices are. If neither operand fits its buffer, either the weights or the inputs are read again
    for each part of the other, whichever is less. Outputs leave in the layer's activation format, which stands for that
    of the next one. An embedding reads and writes the rows that it looks up.
    """
    f, (w, a) = device.figures, _bits(schemes)
    blocks, columns, depth = (x[:, None] for x in _merged(work, f["columns"]))
    rows, calls = work.rows[:, None], work.calls[:, None]
    if f["arithmetic"] == "serial":
        padded = f["depth"] * np.ceil(depth / f["depth"])
        weights, inputs = blocks * columns * padded * w, rows * blocks * padded * a
    else:
        weights, inputs = work.weights[:, None] * w, work.inputs[:, None] * a
    weights, inputs = _reread(weights, inputs, f["weight_buffer"] * 8, f["input_buffer"] * 8)
    looked_up, embedding = rows * work.depth[:, None] * w, (work.macs == 0)[:, None]
    weights, inputs = np.where(embedding, looked_up, weights), np.where(embedding, 0.0, inputs)
    outputs = np.where(embedding, looked_up, work.outputs[:, None] * a)
    port = 8 * device.memory[-1].bandwidth
    ports = [weights, inputs, outputs]
    busiest = sum(ports) if f["ports"] == "shared" else np.maximum.reduce(ports)
    compute = array_cycles(work, schemes, device) / f["clock_hz"]
    memory = busiest * calls / port
    nothing = np.zeros_like(compute)
    return LayerTimes(compute, memory, nothing, nothing, np.maximum(compute, memory))


def _merged(work: Workload, width: float) -> tuple[Floats, Floats, Floats]:
    """Blocks, columns and depth after merging channel groups up to a width."""
    merge = np.clip(width // work.columns, 1, work.blocks)
    return np.ceil(work.blocks / merge), merge * work.columns, merge * work.depth


def _reread(weights: Floats, inputs: Floats, weight_buffer: float, input_buffer: float) -> tuple[Floats, Floats]:
    """Bits read of weights and inputs in the better of the two loop orders."""
    again_inputs, again_weights = np.ceil(weights / weight_buffer), np.ceil(inputs / input_buffer)
    first = weights + inputs * np.maximum(again_inputs, 1) <= inputs + weights * np.maximum(again_weights, 1)
    return (
        np.where(first, weights, weights * np.maximum(again_weights, 1)),
        np.where(first, inputs * np.maximum(again_inputs, 1), inputs),
    )


def _bits(schemes: Sequence[Scheme]) -> tuple[Floats, Floats]:
    """Bits of weights and activations ``[S]`` each; activations that stay float count as of 32 bits."""
    acts = [32 if s.activation is None else s.activation.bits for s in schemes]
    return np.array([s.weight.bits for s in schemes], np.float64), np.array(acts, np.float64)
