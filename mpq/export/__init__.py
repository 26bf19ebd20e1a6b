"""Exporters: one file per downstream tool. ``mpq.export(cfg, "gptqmodel", path)`` calls the one named.

An exporter is a function ``(BitConfig, path, model, **options) -> Exported`` that refuses what its tool can't load,
naming the rule; a new one is one file here plus one line in `EXPORTERS`. Where a tool has rules of its own, `RUNTIMES`
has them, so that a search can keep to them: ``mpq.allocate(..., runtime="vllm")``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from mpq.errors import ExportError
from mpq.export.check import left_out
from mpq.export.report import Exported
from mpq.export.runtimes import RUNTIMES, Runtime

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig
    from mpq.view import Network

__all__ = ["EXPORTERS", "RUNTIMES", "Exported", "Exporter", "Runtime", "export"]


class Exporter(Protocol):
    """What every exporter is."""

    def __call__(self, config: BitConfig, path: Path, model: nn.Module | None, **options: Any) -> Exported:
        """Write what the tool loads."""


# Name -> where its exporter is; tools are imported when they are needed.
EXPORTERS: dict[str, str | Exporter] = {
    "json": "mpq.export.flat:flat_json",
    "vllm": "mpq.export.compressed_tensors:vllm",
    "compressed-tensors": "mpq.export.compressed_tensors:compressed_tensors",
    "torchao": "mpq.export.torchao:torchao",
    "mlx": "mpq.export.mlx:mlx",
    "gptqmodel": "mpq.export.gptqmodel:gptqmodel",
    "autoround": "mpq.export.autoround:autoround",
    "modelopt": "mpq.export.modelopt:modelopt",
    "llama.cpp": "mpq.export.llama_cpp:llama_cpp",
    "onnx-qdq": "mpq.export.onnx_qdq:onnx_qdq",
    "onnx-matmulnbits": "mpq.export.onnx_matmulnbits:onnx_matmulnbits",
    "openvino": "mpq.export.openvino:nncf_plan",
    "aimet": "mpq.export.aimet:aimet_encodings",
    "coreml": "mpq.export.coreml:coreml_package",
    "hls4ml": "mpq.export.hls4ml:hls4ml_precision",
}


def export(config: BitConfig, name: str, path: str | Path, model: Network | None = None, **options: Any) -> Exported:
    """Write a config for a downstream tool.

    Args:
        config: The bits.
        name: A name in `EXPORTERS`.
        path: File or folder to write.
        model: The float model or its ONNX file, for tools whose files hold weights, and to see which share one.
        **options: The exporter's own.

    Returns:
        What was written, layer by layer.

    Raises:
        ExportError: If there is no such exporter or option, or the tool can't load the config: with the layer, the
            rule and the fix.
        ConfigError: If the config was made for another model.
    """
    from mpq.config import BitConfig

    if not isinstance(config, BitConfig):
        raise ExportError(f"config must be a BitConfig, such as mpq.load(path) gives, not {type(config).__name__}")
    if name not in EXPORTERS:
        raise ExportError(f"unknown exporter {name!r}; known: {', '.join(EXPORTERS)}")
    found = EXPORTERS[name]
    if isinstance(found, str):
        module, _, function = found.partition(":")
        found = getattr(import_module(module), function)
    takes = {n: p for n, p in signature(found).parameters.items() if n not in ("config", "path", "model")}
    for option, value in options.items():
        if option not in takes and "options" not in takes:
            raise ExportError(f"exporter {name!r} has no option {option!r}; it takes {', '.join(takes) or 'none'}")
        if option in takes and isinstance(takes[option].default, bool) and not isinstance(value, bool):
            raise ExportError(f"option {option!r} of exporter {name!r} is true or false, not {value!r}")
    if model is not None:
        from mpq.view import plain

        model = plain(model)
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ExportError(f"there is no folder {path.absolute().parent} to write {path.name} into")
    try:
        exported: Exported = found(config, path, model, **options)
    except OSError as error:
        folder = path.absolute().parent
        elsewhere = error.filename is not None and not Path(error.filename).absolute().is_relative_to(folder)
        if error.errno is None or elsewhere:  # a tool's own trouble, such as a file that it misses
            raise
        raise ExportError(f"{path} can't be written: {error}") from error
    reasons = {o.name: o.reason for o in reversed(config.outside)}  # of a layer, before that of its bias
    left = {name: ("left float", reasons[name]) for name in left_out(config)}
    return replace(exported, layers={**exported.layers, **left})


class _CallableModule(ModuleType):
    """Lets the package be called, so that ``mpq.export(...)`` and ``mpq.export.EXPORTERS`` both work."""

    def __call__(
        self, config: BitConfig, name: str, path: str | Path, model: Network | None = None, **options: Any
    ) -> Exported:
        """See `export`."""
        return export(config, name, path, model, **options)


sys.modules[__name__].__class__ = _CallableModule
