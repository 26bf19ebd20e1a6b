"""Checkpoints of Hugging Face models with packed codes: our own codes and scales in a tool's layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.apply import refuse_noise
from mpq.config import BitConfig, LayerChoice
from mpq.errors import ExportError, FormatError
from mpq.kept_codes import check_made_for, codes_of
from mpq.quantizers import NumberFormat
from mpq.quantizers.packing import pack
from mpq.quantizers.scales import scale_and_zero
from mpq.quantizers.tensors import QuantizedTensor, dequantize


def layer_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer."""
    return cast(Tensor, model.get_submodule(name).weight).detach()


def layer_codes(config: BitConfig, model: nn.Module, name: str) -> QuantizedTensor:
    """The codes and scales of a layer, output channels first: those that a quantized model keeps.

    Raises:
        ExportError: If the model is float and a recipe needs calibration data, or leaves more than codes and scales.
    """
    try:
        return codes_of(model, config, name).plain_codes()
    except FormatError as error:
        raise ExportError(f"{error}; or export the config without model=, for the tool's own rounding") from None


def layer_input(choice: LayerChoice) -> tuple[NumberFormat, Tensor, Tensor] | None:
    """Format, scale and zero point of a layer's input; None where no range of it was calibrated."""
    if choice.activation is None or choice.activation_range is None:
        return None
    lo, hi = torch.tensor(choice.activation_range, dtype=torch.float32)
    return choice.activation, *scale_and_zero(lo, hi, choice.activation)


def by_row(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, and scales and zero points ``[out, groups]``; one row where the tensor has one scale."""
    rows = 1 if q.fmt.granularity == "tensor" else q.shape[0]
    return q.codes.reshape(q.shape), q.scale.reshape(rows, -1), q.zero_point.reshape(rows, -1)


def unsigned(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Integer codes counted from zero, as files keep them."""
    return codes.int() + (2 ** (bits - 1) if symmetric else 0)


def pack_rows(codes: Tensor, bits: int, word: int = 8) -> Tensor:
    """Unsigned codes ``[rows, columns]`` as bytes, lowest bits first, each row filled up to words of 8 or 32 bits."""
    filled = F.pad(codes, (0, -codes.shape[1] % word))  # rows now begin at whole words
    size = math.ceil(codes.shape[1] * bits / word) * word // 8
    return pack(filled, bits).reshape(len(codes), -1)[:, :size].contiguous()


def status(held: Tensor, config: BitConfig, model: nn.Module, name: str, why: str = "") -> tuple[str, str]:
    """``exact`` where a tool finds our values, else ``approximated`` with how far they are off, and why.

    Args:
        held: What the tool finds.
        config: The bits.
        model: The model.
        name: The layer.
        why: Of values that differ; by default that scales are kept in the model's type.
    """
    weight = layer_weight(model, name)
    ours = dequantize(layer_codes(config, model, name)).to(weight.dtype)
    held = held.to(ours.dtype)
    if torch.equal(held, ours):
        return "exact", str(config[name].scheme)
    off = float((held.float() - ours.float()).abs().max() / ours.float().abs().max())
    why = why or f"codes are exact, scales are kept in {str(weight.dtype).removeprefix('torch.')}"
    return "approximated", f"{config[name].scheme}: {why}: values off by {off:.1e}"


def check_model(config: BitConfig, model: nn.Module) -> None:
    """Refuse a model that can't be saved, or has other weights than the config was made for.

    Raises:
        ExportError: If it is no model of transformers.
        ConfigError: If its weights differ, or it adds noise to inputs.
    """
    if not hasattr(model, "save_pretrained"):
        raise ExportError(
            f"a checkpoint needs a model of transformers, not {type(model).__name__}; without one a recipe is written"
        )
    check_made_for(model, config)
    refuse_noise(model)


def save_checkpoint(
    model: nn.Module, path: Path, layers: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any]
) -> None:
    """Write a folder as ``save_pretrained`` does, with other tensors for some layers and more in ``config.json``.

    Args:
        model: A model of transformers.
        path: The folder.
        layers: Layer name -> tensor name -> tensor, in place of the weight.
        settings: What to add to ``config.json``.
    """
    state = dict(model.state_dict())
    written: set[int] = set()
    for name, tensors in layers.items():
        weight = state.pop(f"{name}.weight")
        if weight.data_ptr() not in written:  # of tied layers files hold the first
            state |= {f"{name}.{k}": v for k, v in tensors.items()}
        written.add(weight.data_ptr())
    cast(Any, model).save_pretrained(path, state_dict=state)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf8")), **settings}, indent=2) + "\n", "utf8")
