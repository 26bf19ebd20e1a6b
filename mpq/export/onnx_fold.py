"""Batch norms folded into the scales of quantized convolutions: codes stay, and runtimes find integer convolutions.

Between a convolution and the rounding of the next layer's input, runtimes look for nothing but an activation. A batch
norm there makes them compute in float, with the roundings on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from mpq.export.onnx_graph import OnnxGraph


def fold_batch_norms(graph: OnnxGraph) -> None:
    """Multiply scales of weights by what a batch norm multiplies their channels by, and take the norm out.

    Norms stay after weights with one scale for the whole tensor, after weights with several users, after convolutions
    whose result has another use, and where a channel is multiplied by zero or less, since scales are positive.

    Args:
        graph: With ``DequantizeLinear`` in the place of weights; changed.
    """
    constants = _constants(graph)
    outputs = {o.name for o in graph.graph.output}
    makers = {name: node for node in graph.graph.node for name in node.output}
    for norm in [n for n in graph.graph.node if n.op_type == "BatchNormalization"]:
        conv = makers.get(norm.input[0])
        weight = makers.get(conv.input[1]) if conv is not None and conv.op_type == "Conv" else None
        if conv is None or weight is None or weight.op_type != "DequantizeLinear" or weight.input[1] not in constants:
            continue
        alone = conv.output[0] not in outputs and all(
            len(graph.users(n)) == 1 for n in (conv.output[0], weight.output[0], *weight.input[:2])
        )
        parts = [constants.get(name) for name in norm.input[1:5]]
        bias = constants.get(conv.input[2]) if len(conv.input) > 2 else np.zeros(1, np.float32)
        scale = constants[weight.input[1]]
        if alone and scale.ndim == 1 and bias is not None and all(p is not None for p in parts):
            _fold(graph, norm, conv, weight, scale, bias, parts)


def _fold(
    graph: OnnxGraph,
    norm: onnx.NodeProto,
    conv: onnx.NodeProto,
    weight: onnx.NodeProto,
    scale: NDArray[Any],
    bias: NDArray[Any],
    parts: list[Any],
) -> None:
    gamma, beta, mean, variance = parts
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + np.float32(epsilon))
    if not (factor > 0).all():
        return
    name = weight.input[1]
    weight.input[1] = graph.constant((name, "folded"), f"{name}_folded", (scale * factor).astype(np.float32))
    added = ((bias - mean) * factor + beta).astype(np.float32)
    folded = graph.constant(
        (name, "bias"), f"{weight.name.removesuffix('/weight/DequantizeLinear')}.bias_folded", added
    )
    del conv.input[2:]
    conv.input.append(folded)
    output = norm.output[0]
    graph.replace(norm, ())
    conv.output[0] = output


def _constants(graph: OnnxGraph) -> dict[str, NDArray[Any]]:
    """Constants by name, also under the names that torch gives to equal ones."""
    from onnx import numpy_helper

    found = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer if t.data_type == 1}
    for node in graph.graph.node:
        if node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found
