"""Configs that other tools made, as a `BitConfig`, so that they can be compared, measured and exported like ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mpq.config import BitConfig
from mpq.errors import ConfigError, DataError, ExportError
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme

if TYPE_CHECKING:
    from torch import nn


class Reader(Protocol):
    """What reads a tool's settings."""

    def __call__(self, settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
        """Layer -> scheme of those that the tool quantizes.

        Args:
            settings: What the file holds.
            layers: Quantizable layers of the model.
        """


# Name -> where its reader is, beside the tool's exporter.
IMPORTERS: dict[str, str | Reader] = {
    "gptqmodel": "mpq.export.gptqmodel:read_gptqmodel",
    "autoround": "mpq.export.autoround:read_autoround",
    "compressed-tensors": "mpq.export.compressed_tensors:read_compressed_tensors",
    "torchao": "mpq.export.torchao:read_torchao",
    "mlx": "mpq.export.mlx:read_mlx",
    "modelopt": "mpq.export.modelopt:read_modelopt",
    "llama.cpp": "mpq.export.llama_cpp:read_gguf",
    "json": "mpq.export.flat:read_flat",
}


def import_config(
    name: str, path: str | Path, model: nn.Module, calib: Iterable[Any] | None = None, **options: Any
) -> BitConfig:
    """A config that another tool made: what it costs, and what it is predicted to lose.

    Args:
        name: A name in `IMPORTERS`.
        path: The tool's JSON file, or a folder with its ``config.json`` or ``quantize_config.json``; for llama.cpp a
            GGUF file.
        model: The float model that it is for.
        calib: Calibration batches, as for `mpq.analyze`. Without them layers are scored by their weights alone, for
            models of transformers, which know inputs of theirs.
        **options: As for `mpq.analyze`.

    Returns:
        A config whose status is ``given``.

    Raises:
        ExportError: If there is no such importer.
        ConfigError: If the file can't be read, or its rules don't fit the model: with the file and the field.
        DataError: If there are no batches.

    Example:
        >>> cfg = import_config("gptqmodel", "quantize_config.json", model, batches)  # doctest: +SKIP
    """
    from mpq.allocation import analyze
    from mpq.export.llama_cpp import gguf_settings
    from mpq.trace import trace_model

    if name not in IMPORTERS:
        raise ExportError(f"unknown importer {name!r}; known: {', '.join(IMPORTERS)}")
    settings = gguf_settings(Path(path)) if name == "llama.cpp" else _settings(Path(path))
    if calib is None:
        calib = [_own_inputs(model)]
        options = {"estimator": "weight_sqnr", **options}
    batches = iter(calib)
    first = next(batches, None)
    if first is None:
        raise DataError("calib has no batches")
    graph = trace_model(model, first, forward=options.get("forward"))
    try:
        found = _reader(name)(settings, {x.name: x for x in graph})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not found:
        raise ConfigError(f"{path} quantizes no layer of {type(model).__name__}; was it made for another model?")
    skip = [x.name for x in graph if x.name not in found]
    schemes = tuple(dict.fromkeys(found.values()))
    analysis = analyze(model, chain([first], batches), schemes, skip=skip, share_inputs=False, **options)
    apart = set(found) - {x.name for x in analysis.space.layers}
    if apart:
        raise ConfigError(f"layer {min(apart)!r} shares its weight with a layer that stays float")
    config = analysis.config(analysis.space.pick(found))
    return replace(config, provenance={**config.provenance, "imported_from": name})


def _reader(name: str) -> Reader:
    found = IMPORTERS[name]
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    reader: Reader = getattr(import_module(module), function)
    return reader


def _settings(path: Path) -> dict[str, Any]:
    """The part of a file that is about quantization."""
    if path.is_dir():
        path = next((f for n in ("quantize_config.json", "config.json") if (f := path / n).is_file()), path)
    try:
        found = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings")
    if str(found.get("schema")).startswith("mpq/"):
        raise ConfigError(f"{path} is a file of mpq's own, with schema {found['schema']!r}; mpq.load reads configs")
    for key in ("quantization_config", "quantization"):
        if isinstance(found.get(key), dict):
            inner: dict[str, Any] = found[key]
            return inner
    return found


def _own_inputs(model: nn.Module) -> Any:
    inputs = getattr(model, "dummy_inputs", None)
    if inputs is None:
        raise DataError(f"{type(model).__name__} has no inputs of its own; pass calib=batches")
    return inputs
