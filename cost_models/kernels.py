"""Measured kernels: what one layer takes in onnxruntime on this machine, in a graph that holds nothing else."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mpq._lazy import require
from mpq.errors import GraphError
from mpq.layers import LayerSpec

# Operators that do a layer's products: what onnxruntime turns the graphs below into.
_OPS = {"Conv", "FusedConv", "QLinearConv", "Gemm", "FusedGemm", "QGemm", "MatMulNBits"}
GROUP = 32  # weights that share a scale in 4-bit kernels


def shape_key(layer: LayerSpec) -> tuple[object, ...]:
    """Layers with the same key run the same kernel."""
    return layer.op, layer.rows_shape, layer.input_shape, layer.output_shape


def measurable(layer: LayerSpec, scheme: str) -> bool:
    """Whether onnxruntime's CPU provider has a kernel for a layer under ``W32``, ``W8A8`` or ``W4:g32``."""
    if layer.op in ("conv1d", "conv2d"):
        return scheme in ("W32", "W8A8")
    dense = layer.op in ("linear", "attention_in_proj")
    return dense and (scheme in ("W32", "W8A8") or (scheme == "W4:g32" and layer.rows_shape[1] % GROUP == 0))


def measure(layer: LayerSpec, scheme: str, seconds: float = 0.3) -> float:
    """Seconds of one call of a layer's kernel at batch 1, on one thread.

    The graph is quantized as exporters write it (``QuantizeLinear``/``DequantizeLinear`` around the operator) and
    optimized as onnxruntime does by default; the time is that of the operator's node alone, without the layout
    changes at the ends, from onnxruntime's own profile. Calls follow each other, so weights are as warm as the caches
    keep them. Other jobs on the machine only ever add time, so it is the mean of the fastest quarter of the calls.

    Args:
        layer: The layer.
        scheme: ``W32``, ``W8A8`` or ``W4:g32``.
        seconds: How long to repeat, after a warm-up; at least 8 calls.

    Raises:
        GraphError: If there is no such kernel.
        MpqError: If onnx or onnxruntime is not installed.
    """
    require(("onnx", "onnxruntime"), "profile")
    if not measurable(layer, scheme):
        raise GraphError(f"onnxruntime has no {scheme} kernel for {layer.name!r} ({layer.op})")
    ort: Any = import_module("onnxruntime")
    build = {"W32": _float, "W8A8": _quantized, "W4:g32": _four_bits}[scheme]
    model, feed = build(layer)
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        warm = _repeat(lambda: session.run(None, feed), 0.1 * seconds, 3)
        _repeat(lambda: session.run(None, feed), seconds, 8)
        events = json.loads(Path(session.end_profiling()).read_text("utf8"))
    found = [e for e in events if e.get("args", {}).get("op_name") in _OPS and e["name"].endswith("_kernel_time")]
    if not found:
        names = {e["args"]["op_name"] for e in events if "op_name" in e.get("args", {})}
        raise GraphError(f"{layer.name!r} ran none of {', '.join(sorted(_OPS))} but {', '.join(sorted(names))}")
    times = np.sort([float(e["dur"]) for e in found][warm:])
    # A clock that counts whole microseconds: the mean resolves more than any single call does.
    return float(times[: max(len(times) // 4, 3)].mean()) * 1e-6


def _repeat(run: Callable[[], Any], seconds: float, least: int) -> int:
    started, count = time.perf_counter(), 0
    while count < least or time.perf_counter() - started < seconds:
        run()
        count += 1
    return count


def _rows(layer: LayerSpec) -> int:
    return math.prod(layer.input_shape[:-1])


def _conv_attributes(layer: LayerSpec) -> dict[str, Any]:
    """Strides and paddings that lead from the input's to the output's shape; dilations leave no trace in shapes."""
    sides = [
        _side(*sizes) for sizes in zip(layer.input_shape[1:], layer.output_shape[1:], layer.rows_shape[2:], strict=True)
    ]
    return {
        "kernel_shape": list(layer.rows_shape[2:]),
        "strides": [s for s, _ in sides],
        "pads": [p // 2 for _, p in sides] + [p - p // 2 for _, p in sides],
        "group": layer.input_shape[0] // layer.rows_shape[1],
    }


def _side(size: int, out: int, kernel: int) -> tuple[int, int]:
    """Stride and total padding of one side."""
    for stride in range(max(size // out, 1), size + 2):
        pad = max((out - 1) * stride + kernel - size, 0)
        if (size + pad - kernel) // stride + 1 == out:
            return stride, pad
    raise GraphError(f"no stride leads from {size} to {out} positions with a kernel of {kernel}")


def _float(layer: LayerSpec) -> tuple[Any, dict[str, Any]]:
    h: Any = import_module("onnx.helper")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(layer.rows_shape, np.float32) * 0.05
    bias = np.zeros(layer.rows_shape[0], np.float32)
    shape, out, op, attributes = _operator(layer)
    node = h.make_node(op, ["x", "w", "b"], ["y"], **attributes)
    model = _model([node], {"w": weight, "b": bias}, ("x", 1, shape), ("y", 1, out))
    return model, {"x": rng.standard_normal(shape, np.float32)}


def _quantized(layer: LayerSpec) -> tuple[Any, dict[str, Any]]:
    h: Any = import_module("onnx.helper")
    rng = np.random.default_rng(0)
    channels = layer.rows_shape[0]
    shape, out, op, attributes = _operator(layer)
    constants = {
        "w": rng.integers(-127, 128, layer.rows_shape, np.int8),
        "b": np.zeros(channels, np.int32),
        "sw": np.full(channels, 1e-2, np.float32),
        "sb": np.full(channels, 1e-4, np.float32),
        "zw": np.zeros(channels, np.int8),
        "zb": np.zeros(channels, np.int32),
        "s": np.array(1e-2, np.float32),
        "z": np.array(128, np.uint8),
    }
    nodes = [
        h.make_node("DequantizeLinear", ["x", "s", "z"], ["xf"]),
        h.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0),
        h.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bf"], axis=0),
        h.make_node(op, ["xf", "wf", "bf"], ["yf"], **attributes),
        h.make_node("QuantizeLinear", ["yf", "s", "z"], ["y"]),
    ]
    model = _model(nodes, constants, ("x", 2, shape), ("y", 2, out))
    return model, {"x": rng.integers(0, 256, shape, np.uint8)}


def _four_bits(layer: LayerSpec) -> tuple[Any, dict[str, Any]]:
    h: Any = import_module("onnx.helper")
    rng = np.random.default_rng(0)
    channels, depth = layer.rows_shape
    constants = {
        "w": rng.integers(0, 256, (channels, depth // GROUP, GROUP // 2), np.uint8),
        "s": np.full(channels * depth // GROUP, 1e-2, np.float32),
    }
    node = h.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=depth, N=channels, bits=4, block_size=GROUP
    )
    rows = _rows(layer)
    model = _model([node], constants, ("x", 1, (rows, depth)), ("y", 1, (rows, channels)))
    return model, {"x": rng.standard_normal((rows, depth), np.float32)}


def _operator(layer: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...], str, dict[str, Any]]:
    """Shapes of input and output, ONNX operator and its attributes."""
    if layer.op.startswith("conv"):
        return (1, *layer.input_shape), (1, *layer.output_shape), "Conv", _conv_attributes(layer)
    rows = _rows(layer)
    return (rows, layer.rows_shape[1]), (rows, layer.rows_shape[0]), "Gemm", {"transB": 1}


def _model(
    nodes: list[Any],
    constants: dict[str, np.ndarray[Any, Any]],
    x: tuple[str, int, tuple[int, ...]],
    y: tuple[str, int, tuple[int, ...]],
) -> Any:
    """A graph with one input and one output, each given by name, element type and shape."""
    h: Any = import_module("onnx.helper")
    to_proto = import_module("onnx.numpy_helper").from_array
    stored = [to_proto(v, k) for k, v in constants.items()]
    graph = h.make_graph(nodes, "layer", [h.make_tensor_value_info(*x)], [h.make_tensor_value_info(*y)], stored)
    versions = [h.make_opsetid("", 17), h.make_opsetid("com.microsoft", 1)]
    return h.make_model(graph, opset_imports=versions, ir_version=9)
