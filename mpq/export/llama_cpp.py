"""llama.cpp: a file for ``llama-quantize --tensor-type-file``, one line ``^tensor$=type`` for each tensor.

Names are those of GGUF, which the package ``gguf`` knows. The codes are llama.cpp's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq._lazy import require
from mpq.errors import ConfigError, ExportError
from mpq.export.check import check, left_out
from mpq.export.fields import read_format
from mpq.export.report import Exported
from mpq.export.runtimes import RUNTIMES
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig, LayerChoice

_EXACT = {"int4:g32": "q4_0", "int5:g32": "q5_0", "int8:g32": "q8_0", "mxfp4": "mxfp4", "fp16": "f16", "bf16": "bf16"}
# Blocks of 256 with small scales. Other features would get another type from llama.cpp, with no more than a warning.
_IN_256 = {
    "int2:g16:asym": "q2_k",
    "int3:g16": "q3_k",
    "int4:g32:asym": "q4_k",
    "int5:g32:asym": "q5_k",
    "int6:g16": "q6_k",
}
_IN_32 = {"int4:g32:asym": "q4_1", "int5:g32:asym": "q5_1"}
_FLOATS = {"f64", "f32", "f16", "bf16"}
_ARCHITECTURES = {"mistral": "llama"}  # model types of transformers with another name in GGUF


def llama_cpp(config: BitConfig, path: Path, model: nn.Module | None, architecture: str | None = None) -> Exported:
    """Write the tensor types.

    Args:
        config: The bits.
        path: The file.
        model: For its ``config.model_type``.
        architecture: Name of the architecture in GGUF, such as ``llama``, where the model does not tell.

    Raises:
        ExportError: If llama.cpp can't hold the config, or GGUF does not know the architecture or a layer.
    """
    check(config, RUNTIMES["llama.cpp"], model)
    apart = left_out(config)
    others = [o for o in config.outside if o.kind == "other"]
    names = _gguf_names([*config.layers, *apart, *(o.name for o in others)], architecture or _architecture(model))
    missing = next((n for n in config.layers if n not in names), None)
    if missing is not None:
        raise ExportError(f"layer {missing!r} has no name in GGUF for this architecture; skip it, or unwrap the model")
    types = {name: _ggml_type(c) for name, c in config.layers.items()}
    stays = "bf16" if model is not None and "bfloat16" in str(next(model.parameters()).dtype) else "f16"
    by_tensor = {names[n]: t for n, t in {**types, **dict.fromkeys(apart, stays)}.items() if n in names}
    # The first match counts; without the last line llama-quantize would give all other matrices its base type.
    lines = [*(f"^{re.escape(tensor)}$={t}" for tensor, t in by_tensor.items()), f".*={stays}"]
    path.write_text("\n".join(lines) + "\n", "utf8")
    use = f"llama-quantize --tensor-type-file {path} in.gguf out.gguf Q8_0 (and read the types of out.gguf)"
    held = {n: _report(c, types[n]) for n, c in config.layers.items()}
    floats = {o.name: ("left float", o.reason) for o in others if "norm" not in names.get(o.name, "")}
    return Exported("llama.cpp", path, held | floats, use)


def _ggml_type(choice: LayerChoice) -> str:
    name = choice.weight.name
    if name in _EXACT:
        return _EXACT[name]
    return _IN_32[name] if name in _IN_32 and choice.weight_shape[1] % 256 else _IN_256[name]


def _report(choice: LayerChoice, ggml_type: str) -> tuple[str, str]:
    held = f"{choice.scheme} as {ggml_type}; codes and scales by llama.cpp"
    if ggml_type in _EXACT.values():
        return "exact", held
    kept = "least values are float16" if ggml_type in _IN_32.values() else "scales have 4 to 8 bits in blocks of 256"
    return "approximated", f"{held}, {kept}"


def _architecture(model: nn.Module | None) -> str:
    found: Any = getattr(getattr(model, "config", None), "model_type", None)
    if found is None:
        raise ExportError(
            "tensor names depend on the architecture: pass a model of transformers or architecture='llama'"
        )
    return _ARCHITECTURES.get(found, str(found))


def _gguf_names(layers: list[str], architecture: str) -> dict[str, str]:
    """Layer -> tensor in GGUF, of those that it knows."""
    require(("gguf",), "export-llama-cpp")
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(
            f"GGUF has no architecture {architecture!r}; it has {', '.join(known)} (an export takes architecture=...)"
        )
    blocks = max((int(n) for name in layers for n in re.findall(r"\.(\d+)\.", name)), default=0) + 1
    table = gguf.get_tensor_name_map(known[architecture], blocks)
    # All experts are one tensor.
    found = {name: table.get_name(re.sub(r"(?<=\.experts)\.\d+(?=\.)", "", name)) for name in layers}
    return {name: f"{tensor}.weight" for name, tensor in found.items() if tensor is not None}


def gguf_settings(path: Path) -> dict[str, Any]:
    """Architecture and tensor types of a GGUF file.

    Raises:
        ConfigError: If it can't be read.
        MpqError: If gguf is not installed.
    """
    require(("gguf",), "export-llama-cpp")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    return {"architecture": architecture, "types": {t.name: t.tensor_type.name.lower() for t in reader.tensors}}


def read_gguf(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What llama.cpp made of each layer: the type of its tensor.

    Raises:
        ConfigError: If mpq has no format for a type.
    """
    names = {v: k for table in (_EXACT, _IN_256, _IN_32) for k, v in table.items()}
    types, found = settings["types"], {}
    for layer, tensor in _gguf_names(list(layers), settings["architecture"]).items():
        kind = types.get(tensor, types.get("token_embd.weight", "f32"))  # a head that is not there is tied to it
        if kind not in names and kind not in _FLOATS:
            raise ConfigError(f"tensor {tensor!r} of layer {layer!r}: mpq has no format for {kind}")
        if kind not in _FLOATS:
            found[layer] = Scheme(read_format(names[kind], f"tensor {tensor!r}"))
    return found
