"""What each layer does, as arrays over layers: the only thing that latency and energy models see of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpq.cost_models.devices import Setting
from mpq.layers import LayerSpec
from mpq.problem import Floats, Ints
from mpq.quantizers.formats import NumberFormat


@dataclass(frozen=True, eq=False)
class Workload:
    """Layers as matrix products: ``blocks`` of ``[rows, depth] x [depth, columns]``, all of one call.

    A convolution is one block for each of its channel groups: a depthwise one has as many blocks as channels, and one
    column each. An embedding looks up ``rows`` rows of its table: no multiply-accumulates.

    Attributes:
        layers: The layers, ``L`` of them.
        rows: ``[L]``: output positions or tokens, over the whole batch.
        columns: ``[L]``: output channels of a block.
        depth: ``[L]``: products summed up for one output.
        blocks: ``[L]``: channel groups.
        calls: ``[L]``: how often the layer runs.
        weights: ``[L]``: weight elements; those that an embedding reads are ``rows * depth``.
        inputs: ``[L]``: elements of the input of one call, over the whole batch.
        outputs: ``[L]``: likewise for the output.
    """

    layers: tuple[LayerSpec, ...]
    rows: Floats
    columns: Floats
    depth: Floats
    blocks: Floats
    calls: Floats
    weights: Floats
    inputs: Floats
    outputs: Floats

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def macs(self) -> Floats:
        """Multiply-accumulates of all calls, over the whole batch ``[L]``."""
        arithmetic = np.array([x.op != "embedding" for x in self.layers])
        return np.where(arithmetic, self.blocks * self.rows * self.columns * self.depth * self.calls, 0.0)

    @property
    def depthwise(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Whether a layer is a depthwise convolution ``[L]``."""
        return (self.blocks > 1) & (self.columns <= 2)

    def storage_bits(self, fmt: NumberFormat) -> Floats:
        """Bits of each layer's weights in a format: `NumberFormat.storage_bits` ``[L]``."""
        shapes, which = self._shapes
        return np.array([fmt.storage_bits(shape) for shape in shapes], np.float64)[which]

    @cached_property
    def _shapes(self) -> tuple[list[tuple[int, ...]], Ints]:
        """Distinct shapes of weights, and which of them each layer has ``[L]``."""
        places: dict[tuple[int, ...], int] = {}
        which = [places.setdefault(x.rows_shape, len(places)) for x in self.layers]
        return list(places), np.array(which, np.int64)

    @cached_property
    def kinds(self) -> np.ndarray[tuple[int, ...], np.dtype[np.str_]]:
        """What kernels tell apart: ``conv``, ``depthwise``, ``matmul`` or ``embedding`` ``[L]``."""
        embedding = [x.op == "embedding" for x in self.layers]
        conv = [x.op.startswith("conv") for x in self.layers]
        return np.select([embedding, self.depthwise, conv], ["embedding", "depthwise", "conv"], "matmul")


def make_workload(layers: Sequence[LayerSpec], setting: Setting | None = None) -> Workload:
    """The work of layers in a setting."""
    setting = setting or Setting()
    rows = [_rows(x) for x in layers]
    scales = _token_scales(layers, rows, setting)
    found = [_row(x, n, setting.batch * scale) for x, n, scale in zip(layers, rows, scales, strict=True)]
    return Workload(tuple(layers), *np.array(found, np.float64).reshape(len(layers), 8).T.copy())


def _rows(layer: LayerSpec) -> float:
    """Rows of one call with one sample of the calibration data."""
    if layer.op == "embedding":
        return math.prod(layer.output_shape) / math.prod(layer.rows_shape[1:])
    # Rows of a transposed convolution are its input positions: each is multiplied by the whole kernel.
    if layer.macs:
        return layer.macs / layer.calls / layer.parameters
    return math.prod(layer.output_shape) / layer.rows_shape[0]


def _row(layer: LayerSpec, rows: float, scale: float) -> tuple[float, ...]:
    """Rows, columns, depth, blocks, calls, weights, inputs, outputs of one layer; its work times a scale."""
    channels, depth = layer.rows_shape[0], math.prod(layer.rows_shape[1:])
    calls = layer.calls, layer.parameters
    inputs, outputs = math.prod(layer.input_shape) * scale, math.prod(layer.output_shape) * scale
    if layer.op == "embedding":
        return (rows * scale, 1, depth, 1, *calls, inputs, outputs)
    if layer.op.startswith("conv"):
        blocks = max(layer.input_shape[0] // layer.rows_shape[1], 1)
        return (rows * scale, channels / blocks, depth, blocks, *calls, inputs, outputs)
    # The shapes of a product lack the first axis, which holds tokens too where a model has flattened them.
    return (rows * scale, channels, depth, 1, *calls, rows * depth * scale, rows * channels * scale)


def _token_scales(layers: Sequence[LayerSpec], rows: Sequence[float], setting: Setting) -> list[float]:
    """By how much more or fewer tokens than the calibration data has change the work of each layer.

    A product whose shape has no axis of tokens, but several rows, sees tokens that the model has flattened: an expert
    its share of all. With one row it is taken to be a head that runs once.
    """
    if setting.tokens is None and setting.phase == "prefill":
        return [1.0] * len(layers)
    tokens = 1 if setting.phase == "decode" else setting.tokens or 1
    usual = calibration_tokens(layers, rows)
    return [
        1.0
        if x.op.startswith("conv") or (len(x.output_shape) < 2 and n == 1)
        else tokens / (x.output_shape[-2] if len(x.output_shape) > 1 else usual)
        for x, n in zip(layers, rows, strict=True)
    ]


def calibration_tokens(layers: Sequence[LayerSpec], rows: Sequence[float] | None = None) -> float:
    """Tokens of a sample of the calibration data: the most that a layer's shape tells of, else the most rows."""
    found = rows or [_rows(x) for x in layers]
    products = [(x.output_shape, n) for x, n in zip(layers, found, strict=True) if not x.op.startswith("conv")]
    told = [float(shape[-2]) for shape, _ in products if len(shape) > 1]
    return max(told or [n for _, n in products], default=1.0)
