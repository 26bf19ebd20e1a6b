"""compressed-tensors: what vLLM, llm-compressor and transformers load.

Without a model a recipe is written, the ``quantization_config`` of a ``config.json``; its ``config_groups`` and
``ignore`` are also what llm-compressor's ``QuantizationModifier`` takes. With one, a checkpoint with our codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ConfigError
from mpq.export.check import check, left_out
from mpq.export.fields import matches, of_kind, read_format, take
from mpq.export.report import Exported, rounded_by
from mpq.export.runtimes import RUNTIMES
from mpq.layers import LayerSpec
from mpq.quantizers import NumberFormat, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mpq.config import BitConfig, LayerChoice
    from mpq.quantizers import QuantizedTensor

# Scales of 4-bit floats, as the library names their types.
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


def vllm(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write what vLLM loads: `compressed_tensors` within its kernels and fused layers."""
    return _export("vllm", config, path, model)


def compressed_tensors(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write what the library and transformers load; more than vLLM has kernels for."""
    return _export("compressed-tensors", config, path, model)


def _export(tool: str, config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    check(config, RUNTIMES[tool], model)
    settings = quantization_config(config)
    if model is None:
        path.write_text(json.dumps({"quantization_config": settings}, indent=1) + "\n", "utf8")
        held = rounded_by("llm-compressor", config)
        return Exported(tool, path, held, "QuantizationModifier(config_groups=..., ignore=...) of llm-compressor")
    from mpq.export.packed import check_model, save_checkpoint

    check_model(config, model)
    factors = _shared_factors(config, model, tool)
    packed = {name: _packed(config, model, name, factors.get(name)) for name in config.layers}
    settings |= {"quantization_status": "compressed"}
    save_checkpoint(model, path, {n: tensors for n, (tensors, _) in packed.items()}, {"quantization_config": settings})
    loads = f"vllm serve {path}" if tool == "vllm" else f"AutoModelForCausalLM.from_pretrained({str(path)!r})"
    return Exported(tool, path, {n: status for n, (_, status) in packed.items()}, loads)


def quantization_config(config: BitConfig) -> dict[str, Any]:
    """The ``quantization_config``: one group for each scheme, whose targets are whole layer names.

    Names without ``re:`` are compared literally, so no order of groups matters, in the library or in vLLM.
    """
    groups: dict[Scheme, dict[str, Any]] = {}
    for name, choice in config.layers.items():
        group = groups.setdefault(
            choice.scheme,
            {
                "targets": [],
                "weights": _arguments(choice.weight),
                "input_activations": None if choice.activation is None else _arguments(choice.activation, True),
                "output_activations": None,
                "format": _layout(choice.scheme),
            },
        )
        group["targets"].append(name)
    layouts = {g["format"] for g in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": {str(scheme): group for scheme, group in groups.items()},
        "ignore": left_out(config),
        "kv_cache_scheme": None,
    }


def _arguments(fmt: NumberFormat, activation: bool = False) -> dict[str, Any]:
    """A format as the library's ``QuantizationArgs``."""
    found: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if fmt.family == "int" else "float",
        "symmetric": fmt.symmetric,
        "strategy": "group" if fmt.group_size else fmt.granularity,
        "dynamic": activation and not fmt.calibrated,
    }
    if fmt.group_size:
        found["group_size"] = fmt.group_size
    if fmt.scale in _SCALE_DTYPES:
        found |= {"scale_dtype": _SCALE_DTYPES[fmt.scale], "zp_dtype": _SCALE_DTYPES[fmt.scale]}
    return found | ({"strategy": "tensor_group"} if fmt.family == "nvfp" else {})


def _layout(scheme: Scheme) -> str:
    """How the library stores the codes of a scheme."""
    family = scheme.weight.family
    if family in ("nvfp", "mx"):
        return f"{scheme.weight.base}-pack-quantized"
    if family == "int":
        return "pack-quantized" if scheme.activation is None else "int-quantized"
    return "naive-quantized" if scheme.activation is None else "float-quantized"


def _shared_factors(config: BitConfig, model: nn.Module, tool: str) -> dict[str, Tensor]:
    """The NVFP4 factor of layers that are loaded as one: there is one for all of them, so the largest.

    Experts are not, but the two halves of one expert's first product are.
    """
    from mpq.export.packed import layer_codes

    names = [n for n, c in config.layers.items() if c.weight.family == "nvfp"]
    found: dict[str, Tensor] = {}
    for members in replace(RUNTIMES[tool], experts=None).fused_sets(names):
        factors = [q.outer for n in members if (q := layer_codes(config, model, n)).outer is not None]
        found |= dict.fromkeys(members, max(factors))
    return found


def _packed(
    config: BitConfig, model: nn.Module, name: str, factor: Tensor | None
) -> tuple[dict[str, Tensor], tuple[str, str]]:
    """A layer's tensors in the file, and how near they are to our values."""
    from mpq.export.packed import layer_codes, layer_weight, status
    from mpq.quantizers import dequantize

    choice, weight = config[name], layer_weight(model, name)
    q, dtype = layer_codes(config, model, name), weight.dtype
    if factor is not None and factor != q.outer:
        q = _with_factor(q, weight, factor)
        kept = "the factor of its scales is that of the layers that are loaded with it"
        return _float4(q), status(dequantize(q), config, model, name, kept)
    if choice.weight.family in ("nvfp", "mx"):
        tensors = _float4(q)
    else:
        q = replace(q, scale=q.scale.to(dtype).float())
        tensors = _scaled(q, dtype, choice.activation is None)
    inputs, off = _static_input(choice, dtype)
    found, text = status(dequantize(q), config, model, name)
    if off:
        found, text = "approximated", f"{text}; the scale of its input is off by {off:.1e} of itself"
    return {**tensors, **inputs}, (found, text)


def _with_factor(q: QuantizedTensor, weight: Tensor, factor: Tensor) -> QuantizedTensor:
    """Scales in units of another factor, and the weight rounded by them anew."""
    from mpq.quantizers.blocks import to_blocks
    from mpq.quantizers.grids import grid_of
    from mpq.quantizers.scales import stored_scale

    scale, grid = stored_scale(q.scale, q.fmt, factor), grid_of(q.fmt)
    codes = grid.encode(grid.round_(to_blocks(weight.to(scale.dtype), q.fmt) / scale))
    return replace(q, codes=codes, scale=scale, outer=factor)


def _float4(q: QuantizedTensor) -> dict[str, Tensor]:
    """NVFP4: 8-bit scales times a factor of the tensor; MXFP4: exponents."""
    import torch

    from mpq.export.packed import by_row, pack_rows

    codes, scale, _ = by_row(q)
    packed = {"weight_packed": pack_rows(codes, 4)}
    if q.outer is None:
        return {**packed, "weight_scale": (scale.log2() + 127).to(torch.uint8)}
    factor = q.outer.reshape(1).float()
    return {**packed, "weight_scale": (scale / factor).to(torch.float8_e4m3fn), "weight_global_scale": 1 / factor}


def _scaled(q: QuantizedTensor, dtype: torch.dtype, weight_only: bool) -> dict[str, Tensor]:
    """Codes with scales in the model's own type: packed to words, or one byte each."""
    import torch

    from mpq.export.packed import by_row, pack_rows, unsigned

    fmt = q.fmt
    codes, scale, zero = by_row(q)
    found = {"weight_scale": scale.to(dtype).flatten() if fmt.granularity == "tensor" else scale.to(dtype)}
    if fmt.family == "float":
        return {**found, "weight": codes.view(torch.float8_e4m3fn)}
    codes = unsigned(codes, fmt.bits, fmt.symmetric)
    if not weight_only:
        first = 2 ** (fmt.bits - 1)
        zeros = {} if fmt.symmetric else {"weight_zero_point": (zero - first).to(torch.int8)}
        return {**found, **zeros, "weight": (codes - first).to(torch.int8)}
    words = pack_rows(codes, fmt.bits, 32).view(torch.int32)
    zeros = {}
    if not fmt.symmetric:  # along the output channels
        zeros = {"weight_zero_point": pack_rows(zero.int().T, fmt.bits, 32).view(torch.int32).T.contiguous()}
    return {**found, **zeros, "weight_packed": words, "weight_shape": torch.tensor(q.shape)}


def _static_input(choice: LayerChoice, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Scale and zero point of an input whose range is calibrated, and how far off the scale is in the model's type."""
    import torch

    from mpq.export.packed import layer_input

    rounded = layer_input(choice)
    if rounded is None:
        return {}, 0.0
    fmt, scale, zero = rounded
    kept = scale.to(dtype)
    found = {"input_scale": kept.reshape(1)}
    if not fmt.symmetric:
        found["input_zero_point"] = (zero - 2 ** (fmt.bits - 1)).to(torch.int8).reshape(1)
    return found, float((kept.float() / scale - 1).abs())


def read_compressed_tensors(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What the library gives each linear layer: whole names win over patterns, those over classes.

    Raises:
        ConfigError: If a field is missing or wrong, or a group has arguments that mpq has no format for.
    """
    schemes: dict[str, Scheme] = {}
    for name, group in take(settings, "config_groups", dict, "the config").items():
        where = f"group {name!r}"
        if of_kind(group, dict, where).get("weights"):
            scheme = _scheme(group, where)
            schemes |= {of_kind(t, str, f"a target of {where}"): scheme for t in take(group, "targets", list, where)}
    ordered = sorted(schemes, key=lambda t: (t.startswith("re:"), t))
    ignored = take(settings, "ignore", list, "the config", [])
    found = {}
    for name, layer in layers.items():
        if layer.op == "linear" and not any(_matches(of_kind(t, str, "'ignore'"), name) for t in ignored):
            target = next((t for t in ordered if t != "Linear" and _matches(t, name)), "Linear")
            if target in schemes:
                found[name] = schemes[target]
    return found


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return matches(target[3:], name, "the config")
    return target in (name, "Linear")


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    inputs = take(group, "input_activations", dict, where, {})
    weight = _format(take(group, "weights", dict, where), where)
    if not inputs:
        return Scheme(weight)
    activation = _format(inputs, where)
    if inputs.get("dynamic") and activation.calibrated:
        raise ConfigError(f"{where}: mpq has one scale a tensor for inputs only where it is calibrated, not dynamic")
    return Scheme(weight, activation)


def _format(arguments: Mapping[str, Any], where: str) -> NumberFormat:
    """Inverse of `_arguments`."""
    bits, size = take(arguments, "num_bits", int, where, 8), take(arguments, "group_size", int, where, 0)
    strategy = take(arguments, "strategy", str, where, {0: "tensor", -1: "channel"}.get(size, "group"))
    kind, symmetric = take(arguments, "type", str, where, "int"), take(arguments, "symmetric", bool, where, True)
    if strategy in ("tensor", "channel", "token", "group"):
        granularity = f"g{size}" if strategy == "group" else strategy
        if kind == "int":
            return read_format(f"int{bits}:{granularity}{'' if symmetric else ':asym'}", where)
        if bits == 8 and not arguments.get("scale_dtype"):
            return replace(NumberFormat.parse("fp8_e4m3"), granularity=granularity, scale="")
    floats: dict[Any, str] = {
        ("tensor_group", 4, 16): "nvfp4",
        ("group", 4, 32): "mxfp4",
        ("group", 8, 32): "mxfp8_e4m3",
    }
    key = strategy, bits, size
    if kind != "float" or key not in floats:
        raise ConfigError(f"{where}: mpq has no format for {dict(arguments)}")
    return NumberFormat.parse(floats[key])
