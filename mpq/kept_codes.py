"""What `mpq.quantize` leaves at each layer: its codes and scales, so that files and exporters hold these very ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.calibration import model_hash
from mpq.config import BitConfig, LayerChoice
from mpq.errors import ConfigError, FormatError
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.kernels import FLOAT_DTYPES
from mpq.quantizers.recipes import round_weight
from mpq.quantizers.stored import StoredWeight
from mpq.view import channels_first, op_of, own_weight

_ATTRIBUTE = "stored_weight"


@contextmanager
def naming_layer(layer: str) -> Iterator[None]:
    """Put a layer's name before what is wrong with its format."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"layer {layer!r}: {error}") from None


def effective_format(fmt: NumberFormat, readers: Iterable[nn.Module]) -> NumberFormat:
    """The format that a weight gets: what only embeddings read is rounded without an eye to inputs."""
    return fmt.data_free if fmt.needs_data and all(isinstance(m, nn.Embedding) for m in readers) else fmt


def format_in(model: nn.Module, weight: nn.Parameter, choice: LayerChoice) -> NumberFormat:
    """The format that a weight of a model gets by the choice for its layer."""
    if not choice.weight.needs_data:
        return choice.weight
    return effective_format(choice.weight, (m for m in model.modules() if op_of(m) and own_weight(m) is weight))


def keep(module: nn.Module, stored: StoredWeight) -> None:
    """Leave a weight's codes at its layer: they are copied with it, but are no part of its state."""
    setattr(module, _ATTRIBUTE, stored)


def kept_at(module: nn.Module) -> StoredWeight | None:
    """What `keep` left."""
    found = module.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, StoredWeight) else None


def is_quantized(model: nn.Module) -> bool:
    """Whether `mpq.quantize` or `mpq.load_quantized` made a model."""
    return any(kept_at(m) is not None for m in model.modules())


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that is quantized already.

    Raises:
        ConfigError: If it is.
    """
    if is_quantized(model):
        raise ConfigError("the model is quantized already; pass the float model")


def layer_weights(model: nn.Module, config: BitConfig) -> Iterator[tuple[str, nn.Module, nn.Parameter, LayerChoice]]:
    """Name, module, weight and choice of each layer of a config; of layers with tied weights the first."""
    done: set[int] = set()
    for name, choice in config.layers.items():
        layer = model.get_submodule(name)
        weight = own_weight(layer)
        assert weight is not None
        if id(weight) not in done:
            done.add(id(weight))
            yield name, layer, weight, choice


def stored_weights(quantized: nn.Module, config: BitConfig) -> dict[str, StoredWeight]:
    """Layer name -> its weight as it is stored, for the layers of `layer_weights`.

    Raises:
        ConfigError: If the model was quantized by another config, or a weight was changed since.
    """
    found = {}
    for name, layer, weight, choice in layer_weights(quantized, config):
        stored, fmt = kept_at(layer), format_in(quantized, weight, choice)
        if stored is None or stored.fmt != fmt:
            has = "float" if stored is None else stored.fmt
            raise ConfigError(f"the model was quantized by another config: layer {name!r} is {has}, not {fmt}")
        values = channels_first(layer, weight.detach()).cpu()
        if not torch.equal(values, _expected(stored, values)):
            raise ConfigError(
                f"the weight of layer {name!r} was changed after mpq.quantize rounded it, so that its codes no longer "
                "hold; quantize the changed float model instead"
            )
        found[name] = stored
    return found


def codes_of(model: nn.Module, config: BitConfig, name: str) -> StoredWeight:
    """A layer's weight as it is stored: what a quantized model keeps, or what a float one is rounded to.

    Raises:
        FormatError: Naming the layer, if the model is float, and only calibration data can tell or its weight can't be
            rounded.
    """
    layer, choice = model.get_submodule(name), config[name]
    weight = own_weight(layer)
    assert weight is not None
    tied = (kept_at(m) for m in model.modules() if own_weight(m) is weight)
    kept = next((stored for stored in tied if stored is not None), None)
    if kept is not None:
        return kept
    fmt = format_in(model, weight, choice)
    if fmt.needs_data:
        raise FormatError(
            f"layer {name!r} has {fmt.name}, whose codes depend on calibration data: pass "
            "model=mpq.quantize(model, config, calib=...), which keeps them"
        )
    with naming_layer(name):
        return round_weight(channels_first(layer, weight.detach()), fmt, config.provenance["weight_range"])


def check_made_for(model: nn.Module, config: BitConfig) -> None:
    """Refuse a model that a config was not made for, float or quantized.

    Raises:
        ConfigError: If its weights are others.
    """
    if is_quantized(model):
        stored_weights(model, config)
    else:
        check_hash(model_hash(model), config)


def check_hash(found: str, config: BitConfig) -> None:
    """Refuse other weights than those the config was made for.

    Raises:
        ConfigError: If the hashes differ.
    """
    if config.provenance["model_hash"] != found:
        raise ConfigError(
            "the config was made for a model with other weights (its hash differs); "
            "mpq.quantize(..., strict=False) uses it on the same network with other weights"
        )


def _expected(stored: StoredWeight, like: Tensor) -> Tensor:
    values = like.to(FLOAT_DTYPES[stored.fmt.name]) if stored.fmt.plain_float else stored.values().cpu()
    return values.to(like.dtype)
