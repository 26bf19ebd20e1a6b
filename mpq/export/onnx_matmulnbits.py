"""ONNX with onnxruntime's MatMulNBits: linear layers of 2, 4 or 8 bits, kept packed in memory while they run.

onnxruntime's own quantizer (`MatMulNBitsQuantizer`) has one width a pass and ignores ``nodes_to_include``; here every
node is written with the width, group size, codes, scales and zero points that it has in `mpq.quantize`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ExportError
from mpq.export.onnx_graph import OnnxGraph, onnx_exporter
from mpq.export.packed import pack_rows, unsigned
from mpq.export.report import Exported

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from mpq.config import BitConfig
    from mpq.quantizers.tensors import QuantizedTensor

_OPSET = 21
_ROUNDED = {2: "products in float16", 3: "products in bfloat16", 4: "inputs rounded to 8 bits"}


@onnx_exporter("onnx-matmulnbits")
def onnx_matmulnbits(config: BitConfig, path: Path, graph: OnnxGraph, *, accuracy_level: int = 1) -> Exported:
    """Write the quantized model as one ONNX file.

    Args:
        config: The bits.
        path: The file.
        graph: The model, traced.
        accuracy_level: What products are computed in: 1 float32, which agrees with `mpq.quantize`; 2 float16;
            3 bfloat16; 4 int8, which is fastest and rounds the inputs to 8 bits.

    Raises:
        ExportError: If there is no such level, or a weight is used in another way than to be multiplied by.
    """
    if accuracy_level not in range(1, 5):
        raise ExportError(f"accuracy_level is 1 (float32), 2 (float16), 3 (bfloat16) or 4 (int8), not {accuracy_level}")
    for _, node in graph.marks("input"):
        graph.bypass(node)
    for layer, node in graph.marks("weight"):
        _pack(graph, layer, node, accuracy_level)
    graph.save(path, _OPSET)
    status, rounded = ("exact", "") if accuracy_level == 1 else ("approximated", f", {_ROUNDED[accuracy_level]}")
    held = {
        n: (status, f"{c.weight.bits} bits, blocks of {c.weight.group_size}{rounded}") for n, c in config.layers.items()
    }
    return Exported("onnx-matmulnbits", path, held, "onnxruntime.InferenceSession(path)")


def _pack(graph: OnnxGraph, layer: str, node: onnx.NodeProto, accuracy_level: int) -> None:
    """Put MatMulNBits in the place of the product with a weight."""
    from onnx import helper

    turned = graph.transpose_after(node)
    users = graph.users((turned or node).output[0])
    product = users[0] if len(users) == 1 else None
    wanted = {("MatMul", True), ("Gemm", False)}
    if (
        product is None
        or (product.op_type, turned is not None) not in wanted
        or product.input[1] not in ((turned or node).output)
    ):
        kinds = ", ".join(n.op_type for n in users)
        raise ExportError(
            f"layer {layer!r}: its weight is read by {kinds} in the ONNX graph, and MatMulNBits replaces one MatMul or "
            "Gemm; leave the layer out with skip=[...]"
        )
    q, key = graph.codes[layer], graph.weights[layer].data_ptr()
    inputs = [product.input[0]]
    for part, values in _parts(q).items():
        inputs.append(graph.constant((key, part), f"{layer}.weight_{part}", values))
    has_bias = len(product.input) > 2 and bool(product.input[2])
    output = product.output[0]
    new = [
        helper.make_node(
            "MatMulNBits",
            inputs,
            [f"{output}_product" if has_bias else output],
            f"{layer}/MatMulNBits",
            domain="com.microsoft",
            K=q.shape[1],
            N=q.shape[0],
            bits=q.fmt.bits,
            block_size=q.fmt.group_size,
            accuracy_level=accuracy_level,
        )
    ]
    if has_bias:
        new.append(helper.make_node("Add", [f"{output}_product", product.input[2]], [output], f"{layer}/bias"))
    graph.replace(product, new)
    for gone in (turned, node):
        if gone is not None:
            graph.replace(gone, ())


def _parts(q: QuantizedTensor) -> dict[str, NDArray[Any]]:
    """Packed codes ``[N, blocks, bytes]``, scales ``[N, blocks]`` and packed zero points where there are any."""
    rows, bits = q.shape[0], q.fmt.bits
    packed = pack_rows(unsigned(q.codes, bits, q.fmt.symmetric), bits)
    found = {"packed": packed.reshape(rows, -1, packed.shape[1]), "scale": q.scale.reshape(rows, -1)}
    if not q.fmt.symmetric:  # without any, they are half of the range
        found["zero_point"] = pack_rows(q.zero_point.int().reshape(rows, -1), bits)
    return {part: values.numpy() for part, values in found.items()}
