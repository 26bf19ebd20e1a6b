"""Quantized models as files: codes and scales packed as the formats say, everything else as the model stores it.

A weight ``w`` in a format with codes is kept as ``w:codes``, ``w:scale``, ``w:zero_point``, ... and what the steps of a
recipe keep as ``w:lorc.left`` and the like (`mpq.quantizers.stored`); one in a format such as fp16 as ``w`` in that
type. Other parameters and buffers go by their names. `mpq.packed_file` says how all of them lie in the file.

Three numbers tell how large that is. The metric ``size`` (`BitConfig.size_bytes`) counts parameters, as budgets and
papers do: weights with scales and what recipes keep, biases, and the scales of calibrated activations, which are a part
of the config in a file. `packed_size` foretells all bytes of the file: ``parameters``, which is ``size`` but for those
scales, ``buffers`` such as the statistics of batch norms, and the ``header`` with the config and the names.
`packed_bytes` reads the same off a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mpq.apply import InputQuantizer, add_input_quantizers, check_fits, quantize, set_input_bases
from mpq.config import BitConfig
from mpq.errors import ConfigError, FormatError
from mpq.kept_codes import format_in, is_quantized, keep, layer_weights, refuse_quantized, stored_weights
from mpq.packed_file import PackedFile, packed_sizes, write_packed
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.kernels import FLOAT_DTYPES
from mpq.quantizers.packing import Layout
from mpq.quantizers.stored import StoredWeight, from_parts, layout, to_parts
from mpq.view import Forward, Network, channels_first, copy_model, plain, share_weights

_NOISE = ".input_quantizer.noise"
_NOISE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_quantized(
    model: Network,
    config: BitConfig,
    path: str | Path,
    *,
    calib: Iterable[Any] | None = None,
    forward: Forward | None = None,
    strict: bool = True,
) -> Path:
    """Write a quantized model into one file, in the bits that its config says; `packed_size` foretells its bytes.

    Args:
        model: What `mpq.quantize` made of the config, corrected (`mpq.corrections`) or not; or the float model that the
            config was made for, which is quantized first.
        config: The bits.
        path: Where to.
        calib: For a float model, as for `mpq.quantize`.
        forward: Likewise.
        strict: Likewise.

    Raises:
        ConfigError: If the config was made for another model or with other calibration data, or a quantized model by
            another config, or its weights were changed since.
        FormatError: If a weight can't be rounded, naming its layer.
    """
    model = plain(model)
    if not is_quantized(model):
        model = quantize(model, config, calib=calib, forward=forward, strict=strict)
    stored, plan = stored_weights(model, config), _Plan.of(model, config)
    _check_inputs(model, config)
    tensors = dict(plan.others)
    for layer, name, fmt in plan.weights:
        weight = channels_first(model.get_submodule(layer), model.get_parameter(name))
        parts = {"": weight.to(FLOAT_DTYPES[fmt.name])} if fmt.plain_float else to_parts(stored[layer])
        tensors |= {_named(name, part): t for part, t in parts.items()}
    write_packed(Path(path), config, {name: tensors[name] for name in plan.layout}, plan.buffers)
    return Path(path)


def load_quantized(model: Network, path: str | Path) -> nn.Module:
    """The fake-quantized model that was saved by `save_quantized`; equal bit for bit.

    Counts of batches (``num_batches_tracked`` of batch norms) are not kept: they matter to training only.

    Args:
        model: The float network; its weights are not used. The copy has its device and its mode.
        path: The file.

    Raises:
        ConfigError: If the file can't be read, is no such file, is damaged, or does not fit the model; the message
            names the tensor.
    """
    file = PackedFile(path)
    model = plain(model)
    refuse_quantized(model)
    copied = copy_model(model)
    check_fits(copied, file.config)
    add_input_quantizers(copied, file.config)
    _add_corrections(copied, file.layout)
    plan = _Plan.of(copied, file.config)
    _compare(file.layout, plan.layout, path)
    tensors = file.tensors()
    for layer, name, fmt in plan.weights:
        module, weight = copied.get_submodule(layer), copied.get_parameter(name)
        shape = tuple(channels_first(module, weight.detach()).shape)
        try:
            stored, values = _read(tensors, name, fmt, shape, weight.dtype)
        except FormatError as error:
            raise ConfigError(f"{path}: tensor {name!r} in {fmt}: {error}") from None
        keep(module, stored)
        _set(weight, channels_first(module, values))
    for name, t in plan.others.items():
        _set(t, tensors[name])
    set_input_bases(copied, file.config)
    return copied


def packed_size(model: Network, config: BitConfig) -> dict[str, int]:
    """The bytes that `save_quantized` will write, without rounding anything: `packed_bytes` of the file.

    Args:
        model: The float model, or what `mpq.quantize` made of it.
        config: The bits.

    Raises:
        ConfigError: If the config was made for another model.
    """
    model = share_weights(plain(model))
    check_fits(model, config)
    plan = _Plan.of(model, config)
    return packed_sizes(config, plan.layout, plan.buffers)


def packed_bytes(path: str | Path) -> dict[str, int]:
    """Where the bytes of a file of `save_quantized` go.

    Returns:
        ``parameters``: what ``config.size_bytes`` predicts; ``buffers`` and ``header`` come on top.

    Raises:
        ConfigError: If it is no such file.
    """
    return PackedFile(path).sizes()


@dataclass(frozen=True)
class _Plan:
    """What a file holds of a model.

    Attributes:
        weights: Layer, name of its weight, and format, for each layer that has codes of its own.
        others: All other tensors by name.
        layout: Type and shape of each tensor in the file.
        buffers: Names of buffers.
    """

    weights: list[tuple[str, str, NumberFormat]]
    others: dict[str, Tensor]
    layout: Layout
    buffers: list[str]

    @classmethod
    def of(cls, model: nn.Module, config: BitConfig) -> _Plan:
        names = {id(p): name for name, p in model.named_parameters()}
        weights: list[tuple[str, str, NumberFormat]] = []
        parts: Layout = {}
        for layer, module, weight, choice in layer_weights(model, config):
            fmt, name = format_in(model, weight, choice), names.pop(id(weight))
            shape = tuple(channels_first(module, weight.detach()).shape)
            own: Layout = {"": (FLOAT_DTYPES[fmt.name], shape)} if fmt.plain_float else layout(fmt, shape)
            parts |= {_named(name, part): of for part, of in own.items()}
            weights.append((layer, name, fmt))
        buffers = _kept_buffers(model)
        others: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if id(p) in names} | buffers
        taken = sorted(parts.keys() & others.keys())
        if taken:
            raise ConfigError(f"the model has a tensor called {taken[0]!r}, which is the name of a part of another one")
        kept = {name: (t.dtype, tuple(t.shape)) for name, t in others.items()}
        return cls(weights, others, parts | kept, list(buffers))


def _named(name: str, part: str) -> str:
    return f"{name}:{part}" if part else name


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that inference needs and the model's state holds, shared ones once; and noise of input quantizers."""
    state = model.state_dict(keep_vars=True)
    counts = {id(m.num_batches_tracked) for m in model.modules() if isinstance(m, _NormBase)}
    return {
        name: b for name, b in model.named_buffers() if (name in state and id(b) not in counts) or name.endswith(_NOISE)
    }


def _check_inputs(model: nn.Module, config: BitConfig) -> None:
    """Refuse a model whose inputs are rounded otherwise than the config says."""
    for name, choice in config.layers.items():
        found = model.get_submodule(name)._modules.get("input_quantizer")
        held = (found.fmt, found.limits) if isinstance(found, InputQuantizer) else (None, None)
        if held != (choice.activation, choice.activation_range):
            raise ConfigError(f"the model was quantized by another config: layer {name!r} rounds its inputs otherwise")


def _add_corrections(model: nn.Module, found: Layout) -> None:
    """Make room for what `mpq.corrections` adds to a quantized model: biases, and noise of inputs.

    Where, how large and of which type it is, the model says; `_compare` refuses what a file has otherwise.
    """
    for name, module in model.named_modules():
        bias, noise = f"{name}.bias", f"{name}{_NOISE}"
        if isinstance(module, nn.Linear | _ConvNd) and bias in found and module.bias is None:
            outputs = len(channels_first(module, module.weight))
            module.bias = nn.Parameter(module.weight.new_zeros(outputs))
        quantizer = module._modules.get("input_quantizer")
        if isinstance(module, nn.Linear) and isinstance(quantizer, InputQuantizer) and noise in found:
            dtype = found[noise][0]  # that of the layer's inputs
            dtype = dtype if dtype in _NOISE_DTYPES else module.weight.dtype
            quantizer.noise = module.weight.new_zeros(module.in_features, dtype=dtype)


def _compare(found: Layout, expected: Layout, path: str | Path) -> None:
    """Refuse tensors that the model does not have, or has otherwise."""
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise ConfigError(f"{path}: tensor {name!r} is missing")
        if found[name] != (dtype, shape):
            is_ = f"{found[name][0]} {list(found[name][1])}"
            raise ConfigError(f"{path}: tensor {name!r} is {is_}, but must be {dtype} {list(shape)}")
    left = found.keys() - expected.keys()
    if left:
        raise ConfigError(f"{path}: tensor {min(left)!r} is not in the model or not in its format")


def _read(
    tensors: dict[str, Tensor], name: str, fmt: NumberFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[StoredWeight, Tensor]:
    """A weight as it is stored, and its values."""
    if fmt.plain_float:
        return StoredWeight(fmt, shape, (), {}), tensors[name].to(dtype)
    parts = {part: tensors[_named(name, part)] for part in layout(fmt, shape)}
    stored = from_parts(parts, fmt, shape, torch.float64 if dtype == torch.float64 else torch.float32)
    return stored, stored.values().to(dtype)


def _set(target: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        target.copy_(values)
