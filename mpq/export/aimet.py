"""AIMET encodings (schema 1.0.0): loads in aimet-onnx, and in QNN and QAIRT by ``--quantization_overrides``.

Names in such a file are those of an ONNX graph, so that the float graph is written next to it. Scales and offsets are
ours; the tools round the float weights with them, which gives the values of `mpq.quantize`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ExportError
from mpq.export.onnx_graph import OnnxGraph, onnx_exporter
from mpq.export.packed import layer_input
from mpq.export.report import Exported

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from mpq.config import BitConfig
    from mpq.quantizers import NumberFormat

_OPSET = 20


@onnx_exporter("aimet")
def aimet_encodings(config: BitConfig, path: Path, graph: OnnxGraph) -> Exported:
    """Write the encodings, and the float model next to them as ``.onnx``.

    Args:
        config: The bits.
        path: The file of encodings.
        graph: The model, traced.

    Raises:
        ExportError: If two layers need different encodings of one tensor, or the float model would replace another
            file.
    """
    if path.suffix == ".onnx":
        raise ExportError(f"{path} is for the encodings, such as {path.with_suffix('.encodings')}")
    float_model = path.with_suffix(".onnx")
    graph.proto.doc_string = f"the float model that {path.name} is for"
    if float_model.exists() and not _has_text(float_model, graph.proto.doc_string):
        raise ExportError(
            f"the float model is written next to the encodings, but there is another {float_model} already, which may "
            "be your model; give the encodings another name, or move that file"
        )
    weights = {}
    for layer, node in graph.marks("weight"):
        q = graph.codes[layer]
        weights[_plain_weight(graph, layer, node)] = _encoding(q.fmt, q.scale, q.zero_point)
    inputs, shared = _inputs(graph)
    graph.save(float_model, _OPSET)
    data = {
        "version": "1.0.0",
        "activation_encodings": [{"name": n, **e} for n, e in inputs.items()],
        "param_encodings": [{"name": n, **e} for n, e in weights.items()],
        "excluded_layers": [],
        "producer": "mpq",
    }
    path.write_text(json.dumps(data, indent=1) + "\n", "utf8")
    held = {
        n: ("approximated" if n in shared else "exact", "; ".join(filter(None, [str(c.scheme), shared.get(n)])))
        for n, c in config.layers.items()
    }
    return Exported(
        "aimet",
        path,
        held,
        f"aimet_onnx.quantsim.load_encodings_to_sim(QuantizationSimModel(onnx.load({str(float_model)!r})"
        f"), {str(path)!r}, strict=False), or --quantization_overrides {path} of QAIRT's converter",
    )


def _inputs(graph: OnnxGraph) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Encodings of tensors that layers read, and what else is rounded with them, for layers that share one.

    Raises:
        ExportError: If two layers need different encodings of one tensor.
    """
    inputs: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    shared: dict[str, str] = {}
    outputs, marks = {o.name for o in graph.graph.output}, graph.marks("input")
    for layer, node in marks:
        source, rounded = node.input[0], layer_input(graph.config[layer])
        if rounded is None:
            continue
        found = _encoding(*rounded)
        first.setdefault(source, layer)
        if inputs.setdefault(source, found) != found:
            raise ExportError(
                f"layers {first[source]!r} and {layer!r} need different encodings of the tensor {source!r} that both "
                "read; allocate with runtime='aimet', which gives them one scheme"
            )
        others = {n.op_type for n in graph.users(source) if n.domain != node.domain}
        others |= {"the model's output"} if source in outputs else set()
        if others:
            shared[layer] = f"its input is rounded for {', '.join(sorted(others))} too"
    for layer, node in marks:
        if graph.config[layer].activation is None and node.input[0] in inputs:
            shared[layer] = f"its input is rounded for layer {first[node.input[0]]!r}"
        graph.bypass(node)
    return inputs, shared


def _has_text(path: Path, text: str) -> bool:
    """Whether an ONNX file has a documentation string."""
    import onnx

    try:
        return bool(onnx.load(path, load_external_data=False).doc_string == text)
    except Exception:  # no ONNX file at all: protobuf's error
        return False


def _plain_weight(graph: OnnxGraph, layer: str, node: onnx.NodeProto) -> str:
    """Put a float constant in the place of a mark and of a transposition after it; returns its name."""
    turned, weight = graph.transpose_after(node), graph.weights[layer]
    values = weight if turned is None else weight.T.contiguous()
    name = graph.constant((weight.data_ptr(), turned is None), f"{layer}.weight", values.numpy())
    node.input[0] = name
    graph.bypass(node)
    if turned is not None:
        graph.bypass(turned)
    return name


def _encoding(fmt: NumberFormat, scale: Tensor, zero: Tensor) -> dict[str, Any]:
    """Scales and offsets of one tensor; offsets count from the lowest code as if that were zero."""
    lowest = -fmt.levels[0]
    kind = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL"}.get(fmt.granularity, "PER_BLOCK")
    return {
        "dtype": "INT",
        "bw": fmt.bits,
        "enc_type": kind,
        "is_sym": fmt.symmetric,
        "scale": scale.flatten().tolist(),
        "offset": [-int(z) - lowest for z in zero.flatten().tolist()],
    } | ({"block_size": fmt.group_size} if fmt.group_size else {})
