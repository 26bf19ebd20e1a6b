"""Fixed-point types for hls4ml (FPGA): ``ap_fixed<W,I>`` for the weights and inputs of each layer.

A fixed-point type is an integer times a power of two, so that formats must be ``int<W>:tensor:p2``; the integer bits
``I`` come from the calibrated scale. With ``RND_CONV`` and ``SAT`` they round and clip as mpq does, ties to even.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from mpq.apply import check_fits, remove_input_quantizers
from mpq.errors import ExportError
from mpq.export.check import check
from mpq.export.fields import read_export
from mpq.export.packed import layer_codes, layer_input
from mpq.export.report import Exported
from mpq.export.runtimes import RUNTIMES
from mpq.kept_codes import check_made_for

if TYPE_CHECKING:
    from mpq.config import BitConfig
    from mpq.quantizers import NumberFormat

# What changes shapes only: hls4ml gives its output the type of its input.
_SHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
_SHAPE_CALLS = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute"}


def hls4ml_precision(
    config: BitConfig, path: Path, model: nn.Module | None = None, *, default: str = "ap_fixed<32,16>"
) -> Exported:
    """Write the types as JSON: the entries of ``hls_config`` that `update` puts there.

    Args:
        config: The bits.
        path: The file.
        model: The float model: scales are made from its weights, and the names of layers from its graph.
        default: Type of everything else: biases, layers left out, and the results of layers, which it keeps hls4ml
            from merging with a batch normalization (weights would change).

    Raises:
        ExportError: If a format is no fixed-point type, the model can't be traced down to its layers, or two of them
            need different types of one tensor.
        ConfigError: If the config was made for another model, or the model adds noise to the inputs of layers.
    """
    check(config, RUNTIMES["hls4ml"], model)
    if model is None:
        raise ExportError("integer bits are made from the weights: pass model=...")
    check_fits(model, config)
    check_made_for(model, config)
    model = copy.deepcopy(model)
    remove_input_quantizers(model)
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:
        raise ExportError(f"hls4ml needs a model that torch.fx can trace: {error}") from error
    nodes = [n for n in graph.nodes if n.op == "call_module" and n.target in config]
    hidden = config.layers.keys() - {n.target for n in nodes}
    if hidden:
        name = next(n for n in config if n in hidden)
        raise ExportError(
            f"layer {name!r} is inside a module that torch.fx does not look into, so hls4ml can't hold its types; "
            f"leave it out with skip=[{name!r}]"
        )
    entries, held = _types(nodes, config, model, default)
    data = {
        "Model": {"Precision": {"default": default}},
        "LayerName": {name: {"Precision": kinds} for name, kinds in entries.items()},
    }
    path.write_text(json.dumps(data, indent=1) + "\n", "utf8")
    next_step = (
        "import hls4ml; from mpq.export.hls4ml import update; hls_config = update(hls4ml.utils."
        f"config_from_pytorch_model(model, input_shape, granularity='name', backend='Vitis'), {str(path)!r})"
    )
    return Exported("hls4ml", path, held, next_step)


def _types(
    nodes: list[fx.Node], config: BitConfig, model: nn.Module, default: str
) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, str]]]:
    """Types by hls4ml's name of a layer, and what each layer of the config holds.

    Raises:
        ExportError: If two layers need different types of one tensor.
    """
    entries: dict[str, dict[str, str]] = {}
    results: dict[fx.Node, tuple[str, str]] = {}
    held: dict[str, tuple[str, str]] = {}
    sources = {node: _source(node.all_input_nodes[0], model) for node in nodes}
    for node, source in sources.items():
        name = str(node.target)
        choice = config[name]
        kinds = entries.setdefault(node.name, {"result": default})
        kinds["weight"] = _fixed(choice.weight, layer_codes(config, model, name).scale.item())
        held[name] = "exact", f"{kinds['weight']} weight"
        rounded = layer_input(choice)
        if rounded is not None:
            fmt, scale, _ = rounded
            kind = _fixed(fmt, scale.item())
            other, theirs = results.setdefault(source, (name, kind))
            if theirs != kind:
                raise ExportError(
                    f"layers {other!r} and {name!r} read one tensor, which can't be both {theirs} and {kind}; "
                    "allocate with runtime='hls4ml', which gives them one scheme"
                )
            others = [n.name for n in _readers(source, model) if n.target not in config]
            also = f", which {', '.join(others)} reads too" if others else ""
            held[name] = "approximated" if others else "exact", f"{held[name][1]}, {kind} input{also}"
    for node, source in sources.items():
        name = str(node.target)
        if source in results and config[name].activation is None:
            other, kind = results[source]
            held[name] = "approximated", f"{held[name][1]}, {kind} input for layer {other!r}"
    for source, (_, kind) in results.items():
        entries.setdefault(source.name, {})["result"] = kind
    return entries, held


def update(hls_config: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Put the types of a file into what ``hls4ml.utils.config_from_pytorch_model(..., granularity="name")`` made.

    Args:
        hls_config: The dict, which is changed and returned.
        path: The file that ``mpq.export(config, "hls4ml", path, model)`` wrote.

    Raises:
        ExportError: If the file can't be read or holds no types, or hls4ml does not know one of the layers; it would
            ignore that in silence.
    """
    data = read_export(path)
    if not {"Model", "LayerName"} <= data.keys():
        raise ExportError(f"{path} holds no types of mpq.export(config, 'hls4ml', ...)")
    layers = hls_config.get("LayerName", {})
    unknown = [name for name in data["LayerName"] if name not in layers]
    if unknown:
        raise ExportError(
            f"hls4ml has no layer {unknown[0]!r}; it has {', '.join(layers) or 'none'} "
            "(make the dict with granularity='name')"
        )
    hls_config["Model"]["Precision"].update(data["Model"]["Precision"])
    for name, entry in data["LayerName"].items():
        layers[name]["Precision"].update(entry["Precision"])
    return hls_config


def _fixed(fmt: NumberFormat, scale: float) -> str:
    """The fixed-point type of a signed integer times a power of two."""
    return f"ap_fixed<{fmt.bits},{fmt.bits + round(math.log2(scale))},RND_CONV,SAT>"


def _only_shapes(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _SHAPE_MODULES)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _SHAPE_CALLS


def _source(node: fx.Node, model: nn.Module) -> fx.Node:
    """The node that makes the values of a tensor."""
    while _only_shapes(node, model):
        node = node.all_input_nodes[0]
    return node


def _readers(node: fx.Node, model: nn.Module) -> Iterator[fx.Node]:
    """What uses the values of a tensor."""
    for user in node.users:
        if _only_shapes(user, model):
            yield from _readers(user, model)
        else:
            yield user
