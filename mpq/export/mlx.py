"""MLX-LM: the ``quantization`` of a ``config.json``; with a model a folder that ``mlx_lm.load`` takes, with our codes.

MLX stores ``scale * code + bias`` for each group, so a symmetric format has the bias ``-2**(bits-1) * scale``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ConfigError, ExportError
from mpq.export.check import check, left_out
from mpq.export.fields import of_kind, read_format, read_integer, take
from mpq.export.report import Exported, rounded_by
from mpq.export.runtimes import RUNTIMES
from mpq.layers import LayerSpec
from mpq.quantizers import NumberFormat, Scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpq.config import BitConfig

_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # of Mixtral's experts
_DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}


def mlx(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write a folder for ``mlx_lm.load``, or without a model the settings for ``mlx_lm.convert``.

    Raises:
        ExportError: If MLX can't hold the config, or a checkpoint is asked for of no model of transformers.
    """
    check(config, RUNTIMES["mlx"], model)
    settings = quantization(config)
    if model is None:
        path.write_text(json.dumps({"quantization": settings}, indent=1) + "\n", "utf8")
        size = settings["group_size"]
        use = f"mlx_lm.convert(..., q_group_size={size}, quant_predicate=lambda p, m: quantization.get(p, False))"
        how = "with a bias for each group beside its scale; codes, scales and biases by MLX"
        signed = {n: c for n, c in config.layers.items() if c.weight.family == "int" and c.weight.symmetric}
        biased = {n: ("approximated", f"{c.scheme} {how}") for n, c in signed.items()}
        return Exported("mlx", path, rounded_by("MLX", config) | biased, use)
    from mpq.export.packed import check_model, save_checkpoint

    check_model(config, model)
    expert = next((n for n in config.layers if _stacked(n) != n), None)
    if expert is not None:  # some of MLX-LM's models stack weights only, and drop scales
        raise ExportError(f"layer {expert!r} is an expert, which MLX stacks; export without model= for mlx_lm.convert")
    packed = {name: _packed(config, model, name) for name in config.layers}
    tensors = {name: found for name, (found, _) in packed.items()}
    save_checkpoint(model, path, tensors, {"quantization": settings, "quantization_config": settings})
    return Exported("mlx", path, {n: status for n, (_, status) in packed.items()}, f"mlx_lm.load({str(path)!r})")


def quantization(config: BitConfig) -> dict[str, Any]:
    """MLX's settings: one entry for each layer, False for those left out.

    ``mlx_lm.convert`` leaves layers float whose input features don't divide by the global group size, before it looks
    at their own entries; the least group size divides them all.
    """
    layers = {_stacked(name): _entry(c.weight) for name, c in config.layers.items()}
    common = {**_DEFAULTS, "group_size": min(e["group_size"] for e in layers.values())}
    return {**common, **layers, **dict.fromkeys(map(_stacked, left_out(config)), False)}


def _stacked(name: str) -> str:
    """The layer of MLX-LM that holds an expert's; other names stay."""
    found = re.fullmatch(r"(.*\.)experts\.\d+\.([^.]*)", name)
    return name if found is None else f"{found[1]}switch_mlp.{_PROJECTIONS.get(found[2], found[2])}"


def _entry(fmt: NumberFormat) -> dict[str, Any]:
    mode = "affine" if fmt.family == "int" else fmt.base
    return {"group_size": fmt.group_size, "bits": fmt.bits, "mode": mode}


def _packed(config: BitConfig, model: nn.Module, name: str) -> tuple[dict[str, Tensor], tuple[str, str]]:
    """A layer's tensors in the file, and how near they are to our values."""
    import torch

    from mpq.export.packed import by_row, layer_codes, layer_weight, pack_rows, status, unsigned
    from mpq.quantizers import dequantize

    fmt, dtype = config[name].weight, layer_weight(model, name).dtype
    q = layer_codes(config, model, name)
    codes, scale, zero = by_row(q)
    if fmt.family == "mx":
        exponents = (scale.log2() + 127).to(torch.uint8)
        tensors = {"weight": pack_rows(codes, 4, 32).view(torch.uint32), "scales": exponents}
        return tensors, status(dequantize(q), config, model, name)
    codes = unsigned(codes, fmt.bits, fmt.symmetric)
    offset = torch.full_like(zero, 2 ** (fmt.bits - 1)) if fmt.symmetric else zero
    scales, biases = scale.to(dtype), (-offset * scale).to(dtype)
    grouped = codes.reshape(*scale.shape, -1).to(dtype)
    held = (grouped * scales[..., None] + biases[..., None]).reshape(q.shape)  # in the model's type, as MLX does
    tensors = {"weight": pack_rows(codes, fmt.bits, 32).view(torch.uint32), "scales": scales, "biases": biases}
    return tensors, status(held, config, model, name)


def read_mlx(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What MLX-LM gives each layer: its own entry, unless that is False, else the common settings where they divide.

    Raises:
        ConfigError: If a field is wrong, or mpq has no such format.
    """
    if not {"bits", "mode"} & set(settings):
        raise ConfigError("it holds no quantization settings of MLX (bits, group_size, mode)")
    common = {k: settings.get(k, v) for k, v in _DEFAULTS.items()}
    if take(common, "group_size", int, "the config") <= 0:
        raise ConfigError(f"group_size must be positive, not {common['group_size']}")
    found = {}
    for name, layer in layers.items():
        entry, where = settings.get(_stacked(name), True), f"the entry of layer {name!r}"
        if layer.op not in RUNTIMES["mlx"].ops or entry is False:
            continue
        if entry is True and layer.weight_shape[-1] % take(common, "group_size", int, "the config"):
            continue
        merged = common if entry is True else {**common, **of_kind(entry, dict, where)}
        mode = take(merged, "mode", str, where)
        if mode == "affine":  # a scale and a bias
            found[name] = read_integer({**merged, "sym": False}, where)
        else:
            found[name] = Scheme(read_format({"mxfp8": "mxfp8_e4m3"}.get(mode, mode), where))
    return found
