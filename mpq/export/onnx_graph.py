"""A model as an ONNX graph in which layers can be found: marks at quantized weights and inputs survive the export."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import update_wrapper
from inspect import Signature, signature
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from mpq._lazy import require
from mpq.apply import check_fits, remove_input_quantizers
from mpq.calibration import make_batch
from mpq.errors import ExportError
from mpq.export.check import check
from mpq.export.packed import layer_codes
from mpq.export.report import Exported
from mpq.export.runtimes import RUNTIMES
from mpq.kept_codes import check_made_for
from mpq.onnx_in import INPUT_NAME
from mpq.quantizers.blocks import from_blocks
from mpq.quantizers.tensors import QuantizedTensor
from mpq.trees import map_tensors
from mpq.view import channels_first, copy_model, own_weight, plain

if TYPE_CHECKING:
    import onnx

    from mpq.config import BitConfig

EXTRA = "export-onnx"
_DOMAIN = "mpq"
# The old exporter knows no newer one. Only types were added since to the operators that it writes.
_OPSET = 20


class OnnxGraph:
    """A traced model, to be edited.

    Attributes:
        proto: The ONNX model.
        weights: Layer name -> its weight in float32, output channels first; tied layers share one tensor.
        codes: Layer name -> our codes of it.
        config: The bits.
    """

    def __init__(
        self, proto: onnx.ModelProto, weights: dict[str, Tensor], codes: dict[str, QuantizedTensor], config: BitConfig
    ) -> None:
        self.proto, self.weights, self.codes, self.config = proto, weights, codes, config
        self._named: dict[tuple[object, ...], str] = {}

    @property
    def graph(self) -> onnx.GraphProto:
        """The graph itself."""
        return self.proto.graph

    def marks(self, role: str) -> list[tuple[str, onnx.NodeProto]]:
        """Layer and node of each mark of a role, ``weight`` or ``input``, in the order of the graph."""
        found = []
        for node in self.graph.node:
            if node.domain == _DOMAIN:
                values = {a.name: a.s.decode() for a in node.attribute}
                if values["role"] == role:
                    found.append((values["layer"], node))
        return found

    def users(self, name: str) -> list[onnx.NodeProto]:
        """Nodes that read a tensor."""
        return [n for n in self.graph.node if name in n.input]

    def transpose_after(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The transposition of a matrix that alone reads a node's output."""
        users = self.users(node.output[0])
        if len(users) != 1 or users[0].op_type != "Transpose":
            return None
        order = next((list(a.ints) for a in users[0].attribute if a.name == "perm"), None)
        return users[0] if order == [1, 0] else None

    def constant(self, key: tuple[object, ...], name: str, array: Any, dtype: int | None = None) -> str:
        """Name of a constant, added once for each key; a name that is taken gets a number."""
        from onnx import helper, numpy_helper

        if key not in self._named:
            taken = set(self._named.values())
            name = next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)
            values = array if dtype is None else array.astype(helper.tensor_dtype_to_np_dtype(dtype))
            self.graph.initializer.append(numpy_helper.from_array(values, name))
            self._named[key] = name
        return self._named[key]

    def replace(self, node: onnx.NodeProto, new: Iterable[onnx.NodeProto]) -> None:
        """Put nodes where one is."""
        place = next(i for i, n in enumerate(self.graph.node) if n is node or n.output == node.output)
        del self.graph.node[place]
        for n in reversed(list(new)):
            self.graph.node.insert(place, n)

    def bypass(self, node: onnx.NodeProto) -> None:
        """Take out a node that passes its input on."""
        source, target = node.input[0], node.output[0]
        self.replace(node, ())
        for user in self.graph.node:
            for i, name in enumerate(user.input):
                if name == target:
                    user.input[i] = source
        for output in self.graph.output:
            if output.name == target:
                raise ExportError(f"the input {source!r} of a layer is an output of the model, which has no name then")

    def save(self, path: Path, opset: int) -> None:
        """Write the file, without what nothing reads any more.

        Args:
            path: Where.
            opset: Version of ONNX's own operators.

        Raises:
            ExportError: If the installed onnx finds fault with it.
        """
        import onnx

        self._prune()
        self._name_layers()
        versions = {d.domain: d for d in self.proto.opset_import if d.domain != _DOMAIN}
        versions[""].version = max(opset, versions[""].version)
        if any(n.domain == "com.microsoft" for n in self.graph.node):
            versions["com.microsoft"] = onnx.helper.make_opsetid("com.microsoft", 1)
        kept = list(versions.values())
        del self.proto.opset_import[:]
        self.proto.opset_import.extend(kept)
        self.proto.ir_version = onnx.helper.find_min_ir_version_for(
            [v for v in kept if v.domain == ""], ignore_unknown=True
        )
        self.proto.producer_name = "mpq"
        large = sum(len(t.raw_data) for t in self.graph.initializer) > 1_900_000_000  # protobuf stops at 2 GiB
        onnx.save_model(self.proto, str(path), save_as_external_data=large, location=f"{path.name}.data")
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{path} is no valid ONNX file: {error}") from error

    def _prune(self) -> None:
        """Drop nodes and constants that nothing reads."""
        needed = {o.name for o in self.graph.output}
        nodes = []
        for node in reversed(self.graph.node):
            if needed & set(node.output):
                nodes.append(node)
                needed.update(node.input)
                for attribute in node.attribute:  # branches and loops read from outside
                    for inner in attribute.g.node:
                        needed.update(inner.input)
        kept = [t for t in self.graph.initializer if t.name in needed]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(reversed(nodes))
        self.graph.initializer.extend(kept)

    def _name_layers(self) -> None:
        """Weights keep the names that they have in PyTorch, although marks sit on them; nodes have one each."""
        taken = set()
        for node in self.graph.node:  # of a module that is called twice there are two
            if node.name:
                node.name = next(
                    n for n in chain([node.name], (f"{node.name}_{i}" for i in count(2))) if n not in taken
                )
                taken.add(node.name)
        for t in self.graph.initializer:
            if ".parametrizations.weight.original" in t.name:
                old, new = t.name, t.name.replace(".parametrizations.weight.original", ".weight")
                t.name = new
                for node in self.graph.node:
                    for i, name in enumerate(node.input):
                        if name == old:
                            node.input[i] = new


def onnx_exporter(runtime: str) -> Callable[[Callable[..., Exported]], Callable[..., Exported]]:
    """Makes an exporter of a function ``(config, path, graph, **own options)``: checks the config, traces the model.

    The exporter takes, besides the function's own options: ``sample``, one batch, as for calibration;
    ``dynamic_batch``, whether the first axis of every input may have any length, and the second of tokens and masks;
    and ``dynamo``, to export by ``torch.export``, which needs onnxscript, rather than by tracing.

    Args:
        runtime: Whose rules hold.
    """

    def decorate(write: Callable[..., Exported]) -> Callable[..., Exported]:
        def exporter(
            config: BitConfig,
            path: Path,
            model: nn.Module | None = None,
            *,
            sample: Any = None,
            dynamic_batch: bool = True,
            dynamo: bool = False,
            **options: Any,
        ) -> Exported:
            check(config, RUNTIMES[runtime], model)
            extra = "export-aimet" if runtime == "aimet" else EXTRA
            graph = trace_onnx(config, model, sample, dynamic_batch=dynamic_batch, dynamo=dynamo, extra=extra)
            exported = write(config, path, graph, **options)
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if model else None
            if dtype in (None, torch.float32):
                return exported
            step = f"{exported.next_step}; inputs, outputs and what stays float are float32 there, not {dtype}"
            return replace(exported, next_step=step)

        own = [p for p in signature(write).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shared = [p for p in signature(exporter).parameters.values() if p.kind is not p.VAR_KEYWORD]
        update_wrapper(exporter, write)
        vars(exporter)["__signature__"] = Signature([*shared, *own], return_annotation=Exported)
        return exporter

    return decorate


def trace_onnx(
    config: BitConfig,
    model: nn.Module | None,
    sample: Any,
    *,
    dynamic_batch: bool = True,
    dynamo: bool = False,
    extra: str = EXTRA,
) -> OnnxGraph:
    """Export a model with marks at its layers.

    Args:
        config: The bits.
        model: The float model that it was made for, or what `mpq.quantize` made of it.
        sample: One batch, as for calibration.
        dynamic_batch: The first axis of every input may have any length, and the second of whole numbers.
        dynamo: Export by ``torch.export``, which needs onnxscript, rather than by tracing.
        extra: Of mpq, that installs what is missing.

    Raises:
        ExportError: If the model or the sample is missing, or torch can't export it.
        ConfigError: If the config was made for another model.
        MpqError: If onnx is not installed.
    """
    if model is None or sample is None:
        raise ExportError(
            "ONNX files hold weights: pass model= and sample= (one batch, as for calibration), or --model and --calib"
        )
    require(("onnx", "onnxscript") if dynamo else ("onnx",), extra)
    copied = copy_model(plain(model)).eval().float()
    check_fits(copied, config)
    check_made_for(plain(model), config)
    remove_input_quantizers(copied)
    batch = make_batch(map_tensors(lambda t: t.float() if t.is_floating_point() else t, sample), copied)
    try:
        with torch.no_grad():
            copied(*batch.args, **batch.kwargs)
    except Exception as error:
        raise ExportError(
            f"the model does not run on sample=, which is one batch, as for calibration: {type(error).__name__}: "
            f"{str(error)[:300]}"
        ) from error
    codes = {name: layer_codes(config, copied, name) for name in config.layers}
    weights = {}
    for name in config.layers:
        layer = copied.get_submodule(name)
        weight = own_weight(layer)
        assert weight is not None
        weights[name] = channels_first(layer, weight).detach()
        _mark_layer(name, layer, dynamo)
    # The exporter that traces gives names in the order of the signature.
    order = [*signature(copied.forward).parameters, *batch.kwargs]
    keywords = {k: batch.kwargs[k] for k in order if k in batch.kwargs}
    return OnnxGraph(_export(copied, batch.args, keywords, dynamic_batch, dynamo), weights, codes, config)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool, dynamo: bool
) -> onnx.ModelProto:
    import onnx

    inputs = _names(model, len(args), kwargs)
    free = _free_axes([*args, *kwargs.values()]) if dynamic_batch else [{} for _ in inputs]
    options: dict[str, Any]
    if dynamo:
        sizes = {name: torch.export.Dim(name) for name in ("batch", "length")}
        shapes = [{axis: sizes[name] for axis, name in axes.items()} or None for axes in free]
        by_name = dict(zip(kwargs, shapes, strict=False))
        options = {"dynamic_shapes": by_name if kwargs else (*shapes,), "opset_version": 21, "verbose": False}
    else:
        options = {
            "dynamic_axes": dict(zip(inputs, free, strict=True)),
            "do_constant_folding": False,
            "opset_version": _OPSET,
            "custom_opsets": {_DOMAIN: 1},
        }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of deprecation and of tracing, about what users can't change
        file = Path(folder) / "model.onnx"
        try:
            names: Any = {"input_names": inputs, "output_names": ["output"]}
            torch.onnx.export(model, args, str(file), kwargs=kwargs, dynamo=dynamo, **names, **options)
        except Exception as error:
            other = "" if dynamo else "; dynamo=True tries torch's other exporter"
            raise ExportError(
                f"torch can't export the model to ONNX: {type(error).__name__}: {str(error)[:500]}{other}"
            ) from error
        return onnx.load(str(file))


def _free_axes(inputs: list[Any]) -> list[dict[int, str]]:
    """Axes that may have any length: the batch, and of tokens, and of what is as long, the next one too."""
    wide = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.dim() > 1}
    lengths = {x.shape[1] for x in wide.values() if not x.is_floating_point()}
    return [
        {0: "batch"} | ({1: "length"} if i in wide and wide[i].shape[1] in lengths else {}) for i in range(len(inputs))
    ]


def _names(model: nn.Module, count: int, keywords: Iterable[str]) -> list[str]:
    """Names of positional inputs and of those by keyword: those of the file that a model comes from."""
    if not isinstance(model, fx.GraphModule):
        return [*(f"input_{i}" if i else "input" for i in range(count)), *keywords]
    inputs = [n for n in model.graph.nodes if n.op == "placeholder"]
    # The target is the parameter's name; the node's own may differ, as fx keeps names of Python's functions apart.
    names = {str(n.target): str(n.meta.get(INPUT_NAME, n.target)) for n in inputs}
    names = {k: k if name.isdigit() else name for k, name in names.items()}  # torch writes no name of digits alone
    return [*list(names.values())[:count], *(names.get(k, k) for k in keywords)]


def _mark_layer(name: str, layer: nn.Module, dynamo: bool) -> None:
    parametrize.register_parametrization(layer, "weight", _WeightMark(name, layer, dynamo), unsafe=True)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return map_tensors(lambda t: _mark(t, name, "input", dynamo) if t.is_floating_point() else t, (args, kwargs))

    layer.register_forward_pre_hook(hook, with_kwargs=True)


class _WeightMark(nn.Module):
    def __init__(self, name: str, layer: nn.Module, dynamo: bool) -> None:
        super().__init__()
        self.name, self.dynamo = name, dynamo
        self.layer = (layer,)  # not a child

    def forward(self, weight: Tensor) -> Tensor:
        marked = _mark(channels_first(self.layer[0], weight), self.name, "weight", self.dynamo)
        return channels_first(self.layer[0], marked)


def _mark(x: Tensor, layer: str, role: str, dynamo: bool) -> Tensor:
    if dynamo:
        attributes: Any = {"layer": layer, "role": role}
        return torch.onnx.ops.symbolic(f"{_DOMAIN}::Mark", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1)
    marked: Tensor = _Mark.apply(x, layer, role)
    return marked


class _Mark(torch.autograd.Function):
    """A node of its own for the exporter that traces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: str, role: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, layer: str, role: str) -> Any:
        return g.op(f"{_DOMAIN}::Mark", x, layer_s=layer, role_s=role).setType(x.type())


def blocks_as(q: QuantizedTensor, values: Tensor) -> Tensor:
    """Something that every element has, ``[blocks, elements]``, in the shape of the tensor."""
    height, width = q.fmt.block or (1, 0)
    return from_blocks(values, q.shape, 0, height, width)
