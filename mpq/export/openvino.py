"""A plan of passes of NNCF's weight compression, for models that OpenVINO converts from PyTorch.

``nncf.compress_weights`` has one format a pass, so that every format of a config is a pass, which leaves all other
layers alone. NNCF makes the scales itself; OpenVINO reads files of ``onnx-qdq`` too, which hold our own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq._lazy import require
from mpq.errors import ExportError
from mpq.export.check import check
from mpq.export.fields import read_export
from mpq.export.report import Exported, rounded_by
from mpq.export.runtimes import RUNTIMES

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig
    from mpq.quantizers import NumberFormat

EXTRA = "export-openvino"
_SCHEMA = "mpq/nncf-plan-1"
# Element types of OpenVINO that hold the weights of a mode.
_TYPES = {
    "int8_sym": ("i8",),
    "int8_asym": ("u8",),
    "int4_sym": ("i4",),
    "int4_asym": ("u4",),
    "int2_sym": ("u2",),
    "nf4": ("nf4",),
    "fp8_e4m3": ("f8e4m3",),
    "mxfp4": ("f4e2m1",),
    "nvfp4": ("f4e2m1",),
}
_SCALES = {"mxfp4": "e8m0", "nvfp4": "e4m3"}  # of other modes float16


def nncf_plan(config: BitConfig, path: Path, model: nn.Module | None = None) -> Exported:
    """Write the passes as JSON: arguments of ``nncf.compress_weights``, with patterns for ``IgnoredScope``.

    Args:
        config: The bits.
        path: The file.
        model: The float model, to check which layers share a weight.

    Raises:
        ExportError: If a scheme is none of NNCF's.
    """
    check(config, RUNTIMES["openvino"], model)
    by_format: dict[NumberFormat, list[str]] = {}
    for name, choice in config.layers.items():
        by_format.setdefault(choice.weight, []).append(name)
    passes = [
        {
            "layers": {name: _node(name) for name in names},
            "compress_weights": _arguments(fmt),
            # All other operations; a slash sets their names apart from those of constants.
            "ignored_scope": {"patterns": [f"^(?!(?:{'|'.join(_node(n) for n in names)})$).*/"], "validate": False},
        }
        for fmt, names in by_format.items()
    ]
    path.write_text(json.dumps({"schema": _SCHEMA, "passes": passes}, indent=1) + "\n", "utf8")
    modes = {n: _arguments(c.weight)["mode"] for n, c in config.layers.items()}
    held = {
        n: (status, f"{text}: {modes[n]}, scales in {_SCALES.get(modes[n], 'float16')}")
        for n, (status, text) in rounded_by("NNCF", config).items()
    }
    next_step = (
        "import openvino; from mpq.export.openvino import compress; "
        f"compressed = compress(openvino.convert_model(model, example_input=sample), {str(path)!r})"
    )
    return Exported("openvino", path, held, next_step)


def compress(model: Any, plan: str | Path) -> Any:
    """Run the passes of a plan, and see that every layer got its format.

    Args:
        model: What ``openvino.convert_model`` or Optimum Intel made of the PyTorch model.
        plan: The file that ``mpq.export(config, "openvino", path)`` wrote.

    Returns:
        The compressed model.

    Raises:
        ExportError: If the file is no plan, or a layer is not in the model or did not get its format.
        MpqError: If NNCF is not installed.
    """
    require(("nncf", "openvino"), EXTRA)
    import nncf

    data = read_export(plan)
    if data.get("schema") != _SCHEMA or "passes" not in data:
        raise ExportError(f"{plan} is no plan of schema {_SCHEMA!r}")
    wanted = [(name, node, p) for p in data["passes"] for name, node in p["layers"].items()]
    before = _weights(model)
    for name, node, _ in wanted:
        if not any(re.fullmatch(node, found) for found in before):
            raise ExportError(f"layer {name!r}: the model has no operation {node}; was it converted from PyTorch?")
    for step in data["passes"]:
        arguments = dict(step["compress_weights"])
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode(arguments.pop("mode")),
            ignored_scope=nncf.IgnoredScope(**step["ignored_scope"]),
            **arguments,
        )
    after = _weights(model)
    for name, node, step in wanted:
        mode = step["compress_weights"]["mode"]
        kind, shape = next(v for k, v in after.items() if re.fullmatch(node, k))
        size = step["compress_weights"].get("group_size", -1)
        if kind not in _TYPES[mode] or (size > 0 and shape[-1] != size):
            raise ExportError(
                f"layer {name!r}: NNCF made {kind} of shape {shape} of it, not {mode} in groups of {size}"
            )
    return model


def _node(layer: str) -> str:
    """Pattern of the operation that a linear layer becomes; Optimum Intel has a name of its own."""
    return rf"__module\.{re.escape(layer)}/(?:aten|ov_ext)::linear/MatMul"


def _arguments(fmt: NumberFormat) -> dict[str, Any]:
    """Arguments of ``compress_weights``; without all_layers=True the last layer would have 8 bits."""
    mode = f"{fmt.base}_{'sym' if fmt.symmetric else 'asym'}" if fmt.family == "int" else fmt.base
    if fmt.family == "int" and fmt.bits == 8:
        return {"mode": mode}
    return {"mode": mode, "ratio": 1.0, "all_layers": True, "group_size": fmt.group_size or -1}


def _weights(model: Any) -> dict[str, tuple[str, list[int]]]:
    """Name of each matrix product -> element type and shape of its constant weight."""
    found = {}
    for op in model.get_ops():
        if op.get_type_name() == "MatMul":
            node = op.input(1).get_source_output().get_node()
            while node.get_type_name() != "Constant" and node.inputs():  # through scales and reshapes
                node = node.input(0).get_source_output().get_node()
            if node.get_type_name() == "Constant":
                found[op.get_friendly_name()] = node.get_element_type().get_type_name(), list(node.shape)
    return found
