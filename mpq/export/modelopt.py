"""NVIDIA ModelOpt: a ``quant_cfg`` list, where later entries win: all quantizers off, then those of each layer on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ConfigError
from mpq.export.check import check
from mpq.export.fields import of_kind, read_export, read_format, take
from mpq.export.report import Exported, rounded_by
from mpq.export.runtimes import RUNTIMES
from mpq.layers import LayerSpec
from mpq.quantizers import NumberFormat, Scheme

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig

_BLOCKS = ("nvfp4", "mxfp4", "mxfp6_e3m2", "mxfp8_e4m3")
_NEXT = (
    "import modelopt.torch.quantization as mtq; from mpq.export.modelopt import load_modelopt; "
    "mtq.quantize(model, load_modelopt({!r}), forward_loop)"
)
_SCALE_BITS = {"e4m3": [4, 3], "e8m0": [8, 0]}


def modelopt(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write a JSON that `load_modelopt` reads as the config of ``mtq.quantize``.

    Raises:
        ExportError: If ModelOpt can't hold the config.
    """
    check(config, RUNTIMES["modelopt"], model)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, choice in config.layers.items():
        for part, fmt in (("weight", choice.weight), ("input", choice.activation)):
            if fmt is not None:  # names are matched by fnmatch
                entries.append({"quantizer_name": f"{escape(name)}.{part}_quantizer", "cfg": _attributes(fmt, part)})
    path.write_text(json.dumps({"quant_cfg": entries, "algorithm": "max"}, indent=1) + "\n", "utf8")
    return Exported("modelopt", path, rounded_by("ModelOpt", config), _NEXT.format(str(path)))


def load_modelopt(path: str | Path) -> dict[str, Any]:
    """An exported file with the tuples and whole-number keys that ModelOpt asks for and JSON has not.

    Raises:
        ExportError: If it can't be read.
    """
    return read_export(path, _in_python)


def _attributes(fmt: NumberFormat, part: str) -> dict[str, Any]:
    """A format as ModelOpt's ``QuantizerAttributeConfig``."""
    found: dict[str, Any] = {"num_bits": [fmt.exponent, fmt.mantissa] if fmt.exponent else fmt.bits}
    if fmt.group_size is None:
        return {**found, "axis": 0 if fmt.granularity == "channel" and part == "weight" else None}
    sizes: dict[str, Any] = {"-1": fmt.group_size}
    if fmt.scale in _SCALE_BITS:
        sizes |= {"type": "dynamic", "scale_bits": _SCALE_BITS[fmt.scale]}
    return {**found, "block_sizes": sizes}


def _in_python(entry: dict[str, Any]) -> dict[Any, Any]:
    pairs = {k: tuple(v) if k in ("num_bits", "scale_bits") and isinstance(v, list) else v for k, v in entry.items()}
    return {int(k) if k == "-1" else k: v for k, v in pairs.items()}


def read_modelopt(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What ModelOpt gives each layer that it quantizes: of the entries that fit a quantizer the last counts.

    Raises:
        ConfigError: If a field is missing or wrong, or mpq has no format for an entry.
    """
    entries = [of_kind(e, dict, "an entry of 'quant_cfg'") for e in take(settings, "quant_cfg", list, "the config")]
    found = {}
    for name, layer in layers.items():
        if layer.op in RUNTIMES["modelopt"].ops:
            weight, inputs = (_read(entries, layer, part) for part in ("weight", "input"))
            if weight is not None:
                found[name] = Scheme(weight, inputs)
    return found


def _read(entries: list[dict[str, Any]], layer: LayerSpec, part: str) -> NumberFormat | None:
    """The format of a quantizer, None if it is off: entries with ``cfg`` replace it, others switch it on and off."""
    quantizer = f"{layer.name}.{part}_quantizer"
    where, on = f"the entry of {quantizer}", False
    held: dict[str, Any] = {}
    for entry in entries:
        pattern = take(entry, "quantizer_name", str, "an entry of 'quant_cfg'")
        parent = take(entry, "parent_class", str, where, "")
        if fnmatchcase(quantizer, pattern) and parent.removeprefix("nn.").lower() in ("", layer.op):
            on = take(entry, "enable", bool, where, True)
            held = take(entry, "cfg", dict, where, held)
    if not on:
        return None
    if not held:
        raise ConfigError(f"{where} has no 'cfg'")
    attributes = {k: v for k, v in held.items() if v is not None}
    size = take(attributes, "block_sizes", dict, where, {}).get("-1")
    granularity = f":g{size}" if size else "" if attributes.get("axis") == 0 else ":tensor"
    integers = (f"int{bits}{granularity}" for bits in range(2, 9))
    for candidate in (*integers, f"fp8_e4m3{granularity}", *_BLOCKS):
        fmt = read_format(candidate, where)
        if attributes == {k: v for k, v in _attributes(fmt, part).items() if v is not None}:
            return fmt
    raise ConfigError(f"{where}: mpq has no format for {attributes}")
