"""What each layer does, as arrays over layers: the only thing that latency and energy models see of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpq.cost_models.devices import Setting
from mpq.layers import LayerSpec
from mpq.problem import Floats


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

    @cached_property
    def kinds(self) -> np.ndarray[tuple[int, ...], np.dtype[np.str_]]:
        """What kernels tell apart: ``conv``, ``depthwise``, ``matmul`` or ``embedding`` ``[L]``."""
        embedding = [x.op == "embedding" for x in self.layers]
        conv = [x.op.startswith("conv") for x in self.layers]
        return np.select([embedding, self.depthwise, conv], ["embedding", "depthwise", "conv"], "matmul")


def make_workload(layers: Sequence[LayerSpec], setting: Setting | None = None) -> Workload:
    """The work of layers in a setting."""
    setting = setting or Setting()
    table = np.array([_row(x, setting) for x in layers], np.float64).reshape(len(layers), 8)
    return Workload(tuple(layers), *table.T.copy())


def _row(layer: LayerSpec, setting: Setting) -> tuple[float, ...]:
    """Rows, columns, depth, blocks, calls, weights, inputs, outputs of one layer."""
    channels = layer.rows_shape[0]
    depth = math.prod(layer.rows_shape[1:])
    inputs, outputs = math.prod(layer.input_shape), math.prod(layer.output_shape)
    scale = setting.batch * _token_scale(layer, setting)
    ends = layer.calls, layer.parameters, inputs * scale, outputs * scale
    if layer.op == "embedding":
        return (outputs / depth * scale, 1, depth, 1, *ends)
    # Rows of a transposed convolution are its input positions: each is multiplied by the whole kernel.
    rows = layer.macs / layer.calls / layer.parameters if layer.macs else outputs / channels
    blocks = max(layer.input_shape[0] // layer.rows_shape[1], 1) if layer.op.startswith("conv") else 1
    return (rows * scale, channels / blocks, depth, blocks, *ends)


def _token_scale(layer: LayerSpec, setting: Setting) -> float:
    """By how much more or fewer tokens than the calibration data has change the work of a layer."""
    shape = layer.output_shape
    if layer.op.startswith("conv") or len(shape) < 2 or (setting.tokens is None and setting.phase == "prefill"):
        return 1.0
    tokens = 1 if setting.phase == "decode" else setting.tokens or 1
    return tokens / shape[-2]
