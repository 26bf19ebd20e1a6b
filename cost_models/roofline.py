"""What processors with vector units share: arithmetic at the rate a kernel reaches for a shape, and the work around it.

A layer takes ``max(compute + widening, memory) + overhead`` (the roofline of Williams et al., 2009, with what does not
overlap on top). The parts, for a product of ``[rows, depth] x [depth, columns]`` in each of ``blocks``:

- compute: multiply-accumulates, padded to the kernel's vectors and tiles, over ``peak * efficiency``;
- widening: weights stored in fewer bits than the arithmetic takes, over the rate at which they are unpacked;
- memory: bytes over the bandwidth of what holds them, which is where CPUs and DSPs differ;
- overhead: per call, per output (bias, requantization, store), per element packed and per row gathered when the input
  of a convolution is unfolded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from mpq.cost_models.devices import Device, Kernel
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.workload import Workload
from mpq.errors import FormatError
from mpq.problem import Floats
from mpq.quantizers import NumberFormat, Scheme

OPS = ("conv", "depthwise", "matmul", "embedding")


@dataclass(frozen=True)
class Curve:
    """What one kernel reaches on one kind of layer: its achieved-efficiency curve.

    Attributes:
        weight: Format of the weights in the arithmetic.
        activation: Format of the activations in the arithmetic.
        op: ``conv``, ``depthwise`` or ``matmul``.
        efficiency: Share of the pair's peak on large shapes that need no padding.
        rows: Rows of a block are padded to a multiple of this.
        columns: Likewise its columns; the channels of a depthwise convolution.
        depth: Likewise the products summed up for one output.
        channels: Likewise the input channels of each kernel tap; inputs with fewer (images) have a kernel of their own.
        tail: Depthwise: channels beyond the last whole vector take so many times as long each; 0 where they are padded.
        gather: Seconds per position and kernel tap of copying one row of the unfolded input.
        pack: Seconds per element of the unfolded input.
        output: Seconds per output.
        overhead: Seconds per call.
    """

    weight: str
    activation: str
    op: str
    efficiency: float
    rows: float = 1
    columns: float = 1
    depth: float = 1
    channels: float = 1
    tail: float = 0
    gather: float = 0
    pack: float = 0
    output: float = 0
    overhead: float = 0


_NUMBERS = [f.name for f in fields(Curve) if f.name not in ("weight", "activation", "op")]


@dataclass(frozen=True)
class Tensors:
    """Bytes of what one call of a layer moves, each ``[L]``."""

    weights: Floats
    inputs: Floats
    outputs: Floats


class Shapes:
    """A workload with what the models of this file need beside it."""

    def __init__(self, work: Workload) -> None:
        """Args: work: The layers."""
        self.work = work
        self._stored: dict[NumberFormat, Floats] = {}
        channels = np.array([x.rows_shape[1] for x in work.layers], np.float64)
        self.embedding = work.kinds == "embedding"
        self.op = np.array([OPS.index(kind) for kind in work.kinds], np.int64)
        self.channels = channels
        self.outer = np.array([x.rows_shape[0] for x in work.layers], np.float64)

    @cached_property
    def taps(self) -> Floats:
        """Positions of the convolution kernel ``[L]``."""
        return self.work.depth / self.channels

    def stored_bytes(self, fmt: NumberFormat) -> Floats:
        """Bytes of the weights with scales and zero points ``[L]``."""
        if fmt not in self._stored:
            self._stored[fmt] = self.work.storage_bits(fmt) / 8
        return self._stored[fmt]

    def compute(self, curve: Mapping[str, Floats], peak: float) -> Floats:
        """Seconds of the arithmetic of one call ``[L]``."""
        work = self.work
        wide = _padded(self.channels, curve["channels"])
        depth = _padded(self.taps * np.where(self.channels < curve["channels"], self.channels, wide), curve["depth"])
        rows = _padded(work.rows, curve["rows"])
        dense = work.blocks * rows * _padded(work.columns, curve["columns"]) * depth
        full = np.floor(self.outer / curve["columns"]) * curve["columns"]
        rest = self.outer - full
        lanes = np.where(curve["tail"] > 0, full + curve["tail"] * rest, _padded(self.outer, curve["columns"]))
        macs = np.where(work.depthwise, rows * work.depth * lanes, dense)
        return np.where(self.embedding, 0.0, macs / (peak * curve["efficiency"]))

    def around(self, curve: Mapping[str, Floats]) -> Floats:
        """Seconds of one call for unfolding, outputs and the call itself ``[L]``."""
        work = self.work
        rows = np.where(self.embedding, 0.0, work.rows)
        copies = np.where(self.taps > 1, rows * self.taps, 0.0)
        unfolded = np.where(work.depthwise, 0.0, rows * work.depth * work.blocks)
        spent = curve["gather"] * copies + curve["pack"] * unfolded + curve["output"] * work.outputs + curve["overhead"]
        return np.where(self.embedding, 0.0, spent)  # those are costs of a product's kernel


Move = Callable[[Shapes, Tensors, Device], Floats]


def vector_times(work: Workload, schemes: Sequence[Scheme], device: Device, move: Move) -> LayerTimes:
    """Time of each layer under each scheme.

    Args:
        work: The layers.
        schemes: Each has a kernel on the device.
        device: Its figures hold ``curves`` and ``packed_ops``.
        move: Seconds that the tensors of one call take to move ``[L]``.

    Raises:
        FormatError: If the profile has no curve or no peak for a kernel.
    """
    shapes = Shapes(work)
    parts = np.zeros((4, len(work), len(schemes)))
    for s, scheme in enumerate(schemes):
        kernel = device.kernel(scheme)
        assert kernel is not None  # schemes without a kernel never get here
        pair = kernel.runs_as or (kernel.weight, _held(kernel.activation, device))
        peak = _peak(device, kernel, pair)
        curve = _curves(device, pair, shapes.op)
        packed = np.isin(shapes.op, [OPS.index(o) for o in device.figures["packed_ops"]])
        weights = np.choose(shapes.op, [shapes.stored_bytes(device.loaded(scheme, kind)) for kind in OPS])
        floats = NumberFormat.parse(device.float_format).bits  # what an embedding looks up has no format of its own
        bits = np.where(shapes.embedding, floats, device.computed(scheme)[1].bits)
        moved = Tensors(_looked_up(shapes, weights), work.inputs * bits / 8, work.outputs * bits / 8)
        parts[0, :, s] = shapes.compute(curve, peak)
        parts[1, :, s] = move(shapes, moved, device)
        if kernel.widen:
            parts[2, :, s] = np.where(packed & ~shapes.embedding, work.weights / kernel.widen, 0.0)
        parts[3, :, s] = shapes.around(curve)
    compute, memory, widening, overhead = parts * work.calls[:, None]
    return LayerTimes(compute, memory, widening, overhead, np.maximum(compute + widening, memory) + overhead)


def _padded(size: Floats, multiple: Floats) -> Floats:
    return np.ceil(size / multiple) * multiple


def _looked_up(shapes: Shapes, weights: Floats) -> Floats:
    """An embedding reads the rows it looks up, not its table."""
    work = shapes.work
    return np.where(shapes.embedding, weights / work.weights * work.rows * work.depth, weights)


def _held(name: str, device: Device) -> str:
    return device.float_format if name == "float" else name


def _peak(device: Device, kernel: Kernel, pair: tuple[str, str]) -> float:
    """Multiply-accumulates per second of the pair that does the arithmetic."""
    found = [k.peak for k in (kernel, *device.kernels) if (k.weight, _held(k.activation, device)) == pair and k.peak]
    if not found:
        raise FormatError(f"{device.name}: no peak for {pair[0]} x {pair[1]}; give it to that pair in `kernels`")
    return found[0]


def _curves(
    device: Device, pair: tuple[str, str], op: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> dict[str, Floats]:
    """The numbers of the curve of each layer's kind, each ``[L]``; an embedding has those of a product."""
    rows = [Curve(**c) for c in device.figures["curves"]]
    found = {c.op: c for c in rows if (c.weight, c.activation) == pair}
    found["embedding"] = found.get("matmul", next(iter(found.values()), rows[0]))
    missing = [o for i, o in enumerate(OPS) if o not in found and (op == i).any()]
    if missing:
        raise FormatError(
            f"{device.name}: figures.curves has no row for {missing[0]} in {pair[0]} x {pair[1]}; add one"
        )
    table = {name: np.array([getattr(found.get(o, rows[0]), name) for o in OPS], np.float64) for name in _NUMBERS}
    return {name: values[op] for name, values in table.items()}
