"""ONNX files as PyTorch modules, so that models whose code is gone can be searched too.

Convolutions, products with constant matrices and embeddings become modules under their names in the file; everything
else becomes calls of functions (`mpq.onnx_ops`). The result is a ``torch.fx.GraphModule``.
"""

from __future__ import annotations

import inspect
import os
import re
from keyword import iskeyword, kwlist
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpq._lazy import require
from mpq.errors import GraphError
from mpq.onnx_ops import OPERATORS, padded
from mpq.onnx_trace import run

if TYPE_CHECKING:
    import onnx

# Where placeholders keep what an input is called in the file; its name here is a Python identifier.
INPUT_NAME = "onnx_name"
# What no module can be called.
_RESERVED = {*dir(nn.Module()), *kwlist}
# Older files have attributes where later ones have inputs, and another Softmax.
_OLDEST, _CONVERTED = 13, 17
# Inputs that are numbers or small lists of whole ones where they are constant.
_LISTS = {
    "Reshape": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,), "Expand": (1,), "Tile": (1,),
    "Split": (1,), "Pad": (1, 3), "Resize": (3,), "ConstantOfShape": (0,), "Clip": (1, 2),
}  # fmt: skip


class BatchNorm(_BatchNorm):
    """Batch normalization of inputs of any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do."""


class PaddedConv(nn.Module):
    """A convolution after padding that PyTorch's convolutions don't have: other on the left than on the right."""

    def __init__(self, conv: nn.Module, pads: list[int], auto_pad: str) -> None:
        super().__init__()
        self.conv, self.pads, self.auto_pad = conv, pads, auto_pad

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        c: Any = self.conv
        found: Tensor = c(padded(x, c.kernel_size, c.stride, c.dilation, self.pads, self.auto_pad, 0.0))
        return found


def load_onnx(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Read an ONNX file as a PyTorch module in evaluation mode.

    Layers are named after their weights (``layer1.0.conv1`` for ``layer1.0.conv1.weight``) or their nodes. Files of a
    fixed batch size take batches of that size only.

    Args:
        path: The file.

    Returns:
        A module whose positional inputs are those of the file.

    Raises:
        GraphError: If the file can't be read, or holds an operator or an attribute that is not supported: with the
            name of the node.
        MpqError: If onnx is not installed.
    """
    require(("onnx",), "export-onnx")
    import onnx

    if not Path(path).exists():
        raise GraphError(f"{path} does not exist")
    try:
        proto = onnx.load(os.fspath(path))
        versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
        if not versions:
            raise ValueError("it is empty or names no version of ONNX's operators")
        if versions[0] < _OLDEST:
            proto = onnx.version_converter.convert_version(proto, _CONVERTED)
    except Exception as error:
        raise GraphError(f"{path} can't be read as an ONNX model: {type(error).__name__}: {error}") from None
    return _Builder(proto.graph, os.fspath(path)).build()


class _Builder:
    """Walks a graph in its order, with constants evaluated on the way."""

    def __init__(self, graph: onnx.GraphProto, origin: str) -> None:
        self.source, self.origin = graph, origin
        self.root, self.graph = nn.Module(), fx.Graph()
        self.constants = {t.name: self._tensor(t, t.name) for t in graph.initializer}
        self.initializers = {t.data_ptr(): name for name, t in self.constants.items()}
        self.nodes: dict[str, fx.Node] = {}
        self.parameters: dict[tuple[Any, ...], nn.Parameter] = {}
        self.taken: set[str] = set()
        self.read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}

    def _tensor(self, proto: onnx.TensorProto, name: str) -> Tensor:
        from onnx import TensorProto, numpy_helper

        try:
            return torch.from_numpy(numpy_helper.to_array(proto).copy())
        except TypeError:
            kind = TensorProto.DataType.Name(proto.data_type)
            raise GraphError(
                f"{self.origin}: {name!r} is of type {kind}, which PyTorch does not have "
                "(is the model quantized already?); give the float model"
            ) from None

    def build(self) -> fx.GraphModule:
        inputs = [v.name for v in self.source.input if v.name not in self.constants]
        taken = {name for name in inputs if name == _identifier(name)}  # these keep their names
        for name in inputs:
            argument = name if name in taken else _numbered(_identifier(name), taken)
            self.nodes[name] = self.graph.placeholder(argument)
            self.nodes[name].meta[INPUT_NAME] = name
        for i, node in enumerate(self.source.node):
            self._convert(node, i)
        outputs = [self._value(o.name) for o in self.source.output]
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        module = fx.GraphModule(self.root, self.graph, "OnnxModel").eval()
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def _convert(self, node: onnx.NodeProto, index: int) -> None:
        attributes = self._attributes(node)
        if node.op_type == "Constant":
            self.constants[node.output[0]] = torch.as_tensor(next(iter(attributes.values())))
            return
        self._check_outputs(node)
        found: fx.Node | None = self._module(node, attributes, index)
        if found is None:
            self._check(node, attributes)
            if all(name in self.constants for name in node.input if name):
                self._keep(node, self._evaluate(node, attributes))
                return
            held = {k: self._held(v) if isinstance(v, Tensor) else v for k, v in attributes.items()}
            found = self.graph.call_function(run, (node.op_type, *self._arguments(node)), held)
        if node.op_type == "Split":
            for i, name in enumerate(node.output):
                self.nodes[name] = self.graph.call_function(_pick, (found, i))
        else:
            self.nodes[node.output[0]] = found

    def _attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        from onnx import TensorProto, helper

        found = {}
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            if isinstance(value, TensorProto):
                value = self._tensor(value, node.output[0])
            elif isinstance(value, bytes):
                value = value.decode()
            found[attribute.name] = list(value) if isinstance(value, tuple) else value
        return found

    def _check_outputs(self, node: onnx.NodeProto) -> None:
        """Masks of Dropout, indices of MaxPool and the like may have names, but only Split has several results here."""
        used = [name for name in node.output[1:] if name in self.read]
        if used and node.op_type != "Split":
            raise self._unsupported(node, f"{node.op_type} whose further output {used[0]!r} is used")

    def _check(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            quantized = " (is the model quantized already?)" if "Quantize" in node.op_type else ""
            raise self._unsupported(node, f"{node.domain}::{node.op_type}".removeprefix("::") + quantized)
        if node.op_type == "Split" and "num_outputs" not in attributes:
            attributes["num_outputs"] = len(node.output)
        try:
            inspect.signature(OPERATORS[node.op_type]).bind(*node.input, **attributes)
        except TypeError as error:
            raise self._unsupported(node, f"{node.op_type} with {attributes}: {error}") from None

    def _unsupported(self, node: onnx.NodeProto, what: str) -> GraphError:
        name = node.name or ", ".join(node.output)
        return GraphError(
            f"{self.origin}: node {name!r} is {what}, which mpq can't convert to PyTorch; "
            "export without it, or simplify the file first (onnxsim folds what depends on shapes only)"
        )

    def _evaluate(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Any:
        try:
            return run(node.op_type, *(self.constants[n] if n else None for n in node.input), **attributes)
        except Exception as error:
            raise self._unsupported(node, f"{node.op_type} of constants: {error}") from error

    def _keep(self, node: onnx.NodeProto, values: Any) -> None:
        for name, value in zip(node.output, values if isinstance(values, tuple) else (values,), strict=False):
            self.constants[name] = value

    def _arguments(self, node: onnx.NodeProto) -> list[Any]:
        lists = (1,) if node.op_type.startswith("Reduce") else _LISTS.get(node.op_type, ())
        return [
            self.constants[n].tolist() if i in lists and n in self.constants else self._value(n)
            for i, n in enumerate(node.input)
        ]

    def _value(self, name: str) -> fx.Node | None:
        """The node that stands for a tensor; constants become parameters or buffers when they are first used."""
        if not name:
            return None
        if name not in self.nodes:
            constant, attribute = self.constants[name], self._free(_identifier(name))
            if constant.is_floating_point() and constant.data_ptr() in self.initializers:
                self.root.register_parameter(attribute, self._parameter(constant))
            else:
                self.root.register_buffer(attribute, constant)
            self.nodes[name] = self.graph.get_attr(attribute)
        return self.nodes[name]

    def _held(self, values: Tensor) -> fx.Node:
        """A tensor among the attributes, as a buffer: the text of a graph has no tensors."""
        name = self._free("constant")
        self.root.register_buffer(name, values)
        return self.graph.get_attr(name)

    def _parameter(self, values: Tensor) -> nn.Parameter:
        """One parameter for each constant, so that shared weights stay shared."""
        key = values.data_ptr(), tuple(values.shape), values.stride()
        if key not in self.parameters:
            self.parameters[key] = nn.Parameter(values)
        return self.parameters[key]

    def _module(self, node: onnx.NodeProto, attributes: dict[str, Any], index: int) -> fx.Node | None:
        """A module with a constant weight; None if this is no such node."""
        place = 0 if node.op_type == "Gather" else 1
        weight = self.constants.get(node.input[place]) if len(node.input) > place else None
        make = {
            "Conv": self._conv, "ConvTranspose": self._conv, "Gemm": self._linear, "MatMul": self._linear,
            "Gather": self._embedding, "BatchNormalization": self._batch_norm,
        }.get(node.op_type)  # fmt: skip
        if make is None or node.domain not in ("", "ai.onnx"):
            return None
        if weight is None or not weight.is_floating_point() or node.input[1 - place] in self.constants:
            if node.op_type in OPERATORS:
                return None
            raise self._unsupported(node, f"{node.op_type} with a weight that is computed")
        module = make(node, attributes, weight)
        if module is None:
            return None
        name = self._name(node, place, index)
        self.root.add_module(name, module) if "." not in name else _add_nested(self.root, name, module)
        found: fx.Node = self.graph.call_module(name, (self._value(node.input[1 - place]),))
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] and getattr(module, "bias", None) is None:
            found = self.graph.call_function(torch.add, (found, self._value(node.input[2])))
        return found

    def _bias(self, node: onnx.NodeProto, place: int = 2) -> Tensor | None:
        return self.constants.get(node.input[place]) if len(node.input) > place else None

    def _conv(self, node: onnx.NodeProto, attributes: dict[str, Any], weight: Tensor) -> nn.Module:
        dims, transposed = weight.dim() - 2, node.op_type == "ConvTranspose"
        known = {"kernel_shape", "strides", "dilations", "pads", "group", "auto_pad"} | (
            {"output_padding"} if transposed else set()
        )
        pads, auto_pad = attributes.get("pads", [0] * (2 * dims)), attributes.get("auto_pad", "NOTSET")
        even = pads[:dims] == pads[dims:] and not auto_pad.startswith("SAME")
        if set(attributes) - known or (transposed and not even):
            raise self._unsupported(node, f"{node.op_type} with {attributes}")
        groups = attributes.get("group", 1)
        channels = (weight.shape[0], weight.shape[1] * groups)
        kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        conv = kind(
            *(channels if transposed else channels[::-1]),
            tuple(weight.shape[2:]),
            tuple(attributes.get("strides", [1] * dims)),
            padding=tuple(pads[:dims]) if even else 0,
            dilation=tuple(attributes.get("dilations", [1] * dims)),
            groups=groups,
            bias=False,
            device="meta",
            **({"output_padding": tuple(attributes.get("output_padding", [0] * dims))} if transposed else {}),
        )
        conv.weight = self._parameter(weight)
        bias = self._bias(node)
        conv.bias = None if bias is None else self._parameter(bias)
        return conv if even else PaddedConv(conv, pads, auto_pad)

    def _linear(self, node: onnx.NodeProto, attributes: dict[str, Any], weight: Tensor) -> nn.Module | None:
        plain = attributes.get("transA", 0) == 0 and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if weight.dim() != 2 or not plain:
            return None
        matrix = weight if attributes.get("transB", 0) else weight.T
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], False, device="meta")
        linear.weight = self._parameter(matrix)
        bias = self._bias(node)
        if bias is not None and bias.shape == (matrix.shape[0],):
            linear.bias = self._parameter(bias)
        return linear

    def _embedding(self, node: onnx.NodeProto, attributes: dict[str, Any], weight: Tensor) -> nn.Module | None:
        if weight.dim() != 2 or attributes.get("axis", 0) != 0:
            return None
        embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
        embedding.weight = self._parameter(weight)
        return embedding

    def _batch_norm(self, node: onnx.NodeProto, attributes: dict[str, Any], weight: Tensor) -> nn.Module:
        if attributes.get("training_mode", 0):
            raise self._unsupported(node, "BatchNormalization in training mode")
        norm = BatchNorm(len(weight), attributes.get("epsilon", 1e-5))
        if any(n not in self.constants for n in node.input[2:5]):
            raise self._unsupported(node, "BatchNormalization with bias, mean or variance that are no constants")
        bias, mean, variance = (self.constants[n] for n in node.input[2:5])
        norm.weight, norm.bias = self._parameter(weight), self._parameter(bias)
        norm.running_mean, norm.running_var = mean, variance
        return norm

    def _name(self, node: onnx.NodeProto, place: int, index: int) -> str:
        """Name of a layer: its weight's without ``.weight``, else the node's without the operator."""
        weight = self.initializers.get(self.constants[node.input[place]].data_ptr(), "")
        named = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)\.weight", weight)
        if named and named[1] not in self.taken:  # tied layers share one name
            return self._free(named[1])
        path: list[str] = []
        for part in node.name.strip("/").split("/")[: -1 if "/" in node.name.strip("/") else None]:
            if path and part.startswith(f"{path[-1]}."):  # torch names scopes in full
                path.pop()
            path.append(part)
        return self._free(_dotted(".".join(path)) or f"{node.op_type.lower()}_{index}")

    def _free(self, name: str) -> str:
        """The name, with a number if it is taken, and underscores behind what no module can be called."""
        first, *others = (f"{part}_" if part in _RESERVED else part for part in name.split("."))
        if hasattr(fx.GraphModule, first) or (not others and hasattr(self.root, first)):
            first = f"{first}_"
        return _numbered(".".join([first, *others]), self.taken)


def _add_nested(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if not isinstance(getattr(root, parent, None), nn.Module):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    for child_name, child in (root._modules.get(last) or nn.Module()).named_children():
        module.add_module(child_name, child)
    root.add_module(last, module)


def _numbered(name: str, taken: set[str]) -> str:
    """The name, or with the first number that makes it one that is not taken; taken from now on."""
    free, i = name, 1
    while free in taken:
        free, i = f"{name}_{i}", i + 1
    taken.add(free)
    return free


def _pick(values: Any, index: int) -> Any:
    return values[index]


def _identifier(name: str) -> str:
    found = re.sub(r"\W+", "_", name).strip("_")
    found = found if found and not found[0].isdigit() else f"_{found}"
    return f"{found}_" if iskeyword(found) or found == "self" else found


def _dotted(name: str) -> str:
    return ".".join(filter(None, (re.sub(r"\W+", "_", part) for part in name.split("."))))
