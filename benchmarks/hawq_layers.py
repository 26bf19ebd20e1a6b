"""Layers of HAWQ-V3's published figures as mpq's layer specs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mpq.layers import LayerSpec

SHARED = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def load(name: str) -> dict[str, Any]:
    """A reference file."""
    data: dict[str, Any] = json.loads((SHARED / "reference" / f"{name}.json").read_text("utf8"))
    return data


def convolution(name: str, inputs: int, outputs: int, size: int, stride: int, in_hw: int, out_hw: int) -> LayerSpec:
    """A square convolution without groups."""
    shape = (outputs, inputs, size, size)
    parameters = outputs * inputs * size * size
    macs = parameters * out_hw * out_hw
    ends = (inputs, in_hw, in_hw), (outputs, out_hw, out_hw)
    return LayerSpec(name, "conv2d", shape, shape, *ends, macs, parameters, 1, 0, 0)


def linear(name: str, inputs: int, outputs: int) -> LayerSpec:
    """A linear layer for one row."""
    shape = (outputs, inputs)
    return LayerSpec(name, "linear", shape, shape, (inputs,), (outputs,), inputs * outputs, inputs * outputs, 1, 0, 0)


def network_layers(data: dict[str, Any]) -> list[LayerSpec]:
    """The layers of a published network, each with a storage and a source of its own."""
    found = []
    for i, x in enumerate(data["layers"]):
        if x["kind"] == "fc":
            layer = linear(x["name"], x["in_ch"], x["out_ch"])
        else:
            numbers = (x[k] for k in ("in_ch", "out_ch", "kernel", "stride", "in_hw", "out_hw"))
            layer = convolution(x["name"], *numbers)
        values = {**layer.__dict__, "storage": i, "source": i}
        found.append(LayerSpec(**values))
        assert (layer.parameters, layer.macs) == (x["params"], x["macs_per_image"])
    return found
