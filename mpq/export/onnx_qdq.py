"""ONNX with QuantizeLinear and DequantizeLinear: runs in onnxruntime; OpenVINO, TensorRT and others read it too.

Weights are stored as our codes with our scales and zero points, so that they are exactly those of `mpq.quantize`; batch
norms behind convolutions are multiplied into the scales.
Inputs of layers are rounded to the calibrated ranges; ONNX divides by the scale where mpq multiplies by its inverse,
which may move a value that is halfway between two steps by one step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.export.onnx_fold import fold_batch_norms
from mpq.export.onnx_graph import OnnxGraph, blocks_as, onnx_exporter
from mpq.export.packed import layer_input
from mpq.export.report import Exported

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from mpq.config import BitConfig, LayerChoice
    from mpq.quantizers import NumberFormat
    from mpq.quantizers.tensors import QuantizedTensor

# Versions of ONNX's operators that have integers of so many bits.
_OPSETS = {2: 25, 4: 21, 8: 21, 16: 21}


@onnx_exporter("onnx-qdq")
def onnx_qdq(config: BitConfig, path: Path, graph: OnnxGraph, *, fold: bool = True) -> Exported:
    """Write the quantized model as one ONNX file.

    Args:
        config: The bits.
        path: The file.
        graph: The model, traced.
        fold: Multiply the scales of convolutions by the batch norms behind them, so that runtimes find integer
            convolutions; codes stay, and outputs differ by rounding in float32 only.
    """
    for layer, node in graph.marks("weight"):
        _dequantize_weight(graph, layer, node)
    for layer, node in graph.marks("input"):
        _round_input(graph, layer, node)
    if fold:
        fold_batch_norms(graph)
    formats = [f for c in config.values() for f in (c.weight, c.activation) if f is not None]
    graph.save(path, max(_OPSETS[f.bits] for f in formats))
    held = {n: ("exact", f"{_type(c.weight)} weight" + _held_input(c.activation)) for n, c in config.layers.items()}
    return Exported(
        "onnx-qdq",
        path,
        held,
        "onnxruntime.InferenceSession(path); where weights alone are quantized, set the session option "
        "session.qdq_matmulnbits_accuracy_level=1, or onnxruntime rounds inputs to 8 bits on its own",
    )


def _type(fmt: NumberFormat) -> str:
    return f"{'INT' if fmt.symmetric else 'UINT'}{fmt.bits}"


def _held_input(fmt: NumberFormat | None) -> str:
    return "" if fmt is None else f", {_type(fmt)} input"


def _element_type(fmt: NumberFormat) -> int:
    from onnx import TensorProto

    found: int = TensorProto.DataType.Value(_type(fmt))
    return found


def _dequantize_weight(graph: OnnxGraph, layer: str, node: onnx.NodeProto) -> None:
    """Put codes and DequantizeLinear in the place of a mark."""
    from onnx import helper

    fmt, turned = graph.config[layer].weight, graph.transpose_after(node)
    target, after = node.output[0], []
    parts, axis = _parts(graph.codes[layer]), 0 if fmt.group_size is None else 1
    if turned is not None:  # runtimes look for MatMul right after DequantizeLinear
        parts, axis, target = [v.T if v.ndim == 2 else v for v in parts], 1 - axis, turned.output[0]
        graph.replace(turned, ())
    if _hidden(graph.config[layer]):
        codes, *others = parts
        parts, axis = [codes[None], *(v[None] if v.ndim == 2 else v for v in others)], axis + 1
        first = graph.constant(("axes", 0), "mpq_first_axis", np.array([0]))
        after = [helper.make_node("Squeeze", [f"{target}_stored", first], [target], f"{layer}/weight/Squeeze")]
        target = f"{target}_stored"
    kind, key = _element_type(fmt), (graph.weights[layer].data_ptr(), fmt, parts[0].shape, turned is None)
    name = f"{layer}.weight" + ("" if turned is None else "_T")
    inputs = [
        graph.constant((*key, part), f"{name}_{part}", np.array(values, order="C"), None if part == "scale" else kind)
        for part, values in zip(("quantized", "scale", "zero_point"), parts, strict=True)
    ]
    blocks: dict[str, Any] = {} if fmt.group_size is None else {"block_size": fmt.group_size}
    new = helper.make_node(
        "DequantizeLinear", inputs, [target], f"{layer}/weight/DequantizeLinear", axis=axis, **blocks
    )
    graph.replace(node, [new, *after])


def _hidden(choice: LayerChoice) -> bool:
    """Whether onnxruntime 1.31 would fuse a layer into an operator of integers that refuses its types of 2 bits."""
    return choice.activation is not None and 2 in (choice.weight.bits, choice.activation.bits)


def _parts(q: QuantizedTensor) -> list[NDArray[Any]]:
    """Codes, scales and zero points in the shapes that DequantizeLinear takes."""
    codes, scale, zero = blocks_as(q, q.codes), q.scale.flatten(), q.zero_point.flatten()
    if q.fmt.granularity == "tensor":
        scale, zero = scale[0], zero[0]
    elif q.fmt.group_size is not None:
        scale, zero = scale.reshape(len(codes), -1), zero.reshape(len(codes), -1)
    return [codes.numpy(), scale.numpy(), zero.numpy()]


def _round_input(graph: OnnxGraph, layer: str, node: onnx.NodeProto) -> None:
    """Put QuantizeLinear and DequantizeLinear in the place of a mark; nothing where the input stays float."""
    from onnx import helper

    rounded = layer_input(graph.config[layer])
    if rounded is None:
        graph.bypass(node)
        return
    fmt, scale, zero = rounded
    source, kind = node.input[0], _element_type(fmt)
    key, name = (source, fmt, graph.config[layer].activation_range), f"{layer}.input"
    shared = [
        graph.constant((*key, "scale"), f"{name}_scale", scale.numpy()),
        graph.constant((*key, "zero"), f"{name}_zero_point", zero.numpy(), kind),
    ]
    codes = f"{node.output[0]}_quantized"
    graph.replace(
        node,
        [
            helper.make_node("QuantizeLinear", [source, *shared], [codes], f"{layer}/input/QuantizeLinear"),
            helper.make_node("DequantizeLinear", [codes, *shared], [node.output[0]], f"{layer}/input/DequantizeLinear"),
        ],
    )
