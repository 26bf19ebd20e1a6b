"""The quantizer bank: every layer's weight in every format and every activation range, made once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpq.calibration import Calibration
from mpq.errors import DataError, FormatError
from mpq.layers import LayerGraph, LayerSpec
from mpq.progress import progress_bar
from mpq.quantizers.formats import NumberFormat, Scheme
from mpq.quantizers.integer import QuantizedTensor, dequantize, fake_quantize, fake_quantize_static, quantize
from mpq.quantizers.observers import ActivationObserver
from mpq.quantizers.ranges import parse_percentile
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView, channels_first

Range = tuple[float, float]
# Positional and keyword arguments of a layer's forward.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def check_range_method(method: str) -> None:
    """Refuse an unknown range method early.

    Raises:
        FormatError: If the method is unknown.
    """
    if method not in ("mse", "minmax"):
        parse_percentile(method)


def quantize_inputs(fmt: NumberFormat | None, limits: Range | None, inputs: Inputs) -> Inputs:
    """Fake-quantize all floating-point tensors in a layer's inputs."""
    if fmt is None:
        return inputs
    lo, hi = limits or (0.0, 0.0)
    args, kwargs = map_tensors(lambda t: fake_quantize_static(t, fmt, lo, hi) if t.is_floating_point() else t, inputs)
    return args, kwargs


def round_weight(module: nn.Module, weight: Tensor, fmt: NumberFormat, method: str) -> Tensor:
    """A layer's weight rounded to a format, with one scale or group of scales for each output channel."""
    return channels_first(module, fake_quantize(channels_first(module, weight), fmt, 0, method))


class QuantizerBank:
    """Quantized weights and activation ranges of one view, cached by layer and format.

    Args:
        view: The model.
        graph: Its layers.
        weight_range: Range rule of weights, see `mpq.quantizers.find_range`.
        activation_range: Range rule of activations.

    Raises:
        FormatError: If a range rule is unknown.
    """

    def __init__(
        self, view: ModelView, graph: LayerGraph, weight_range: str = "mse", activation_range: str = "mse"
    ) -> None:
        check_range_method(weight_range)
        check_range_method(activation_range)
        self.view, self.graph = view, graph
        self.weight_range, self.activation_range = weight_range, activation_range
        self._weights: dict[tuple[int, NumberFormat], QuantizedTensor] = {}
        self._observers: dict[str, ActivationObserver] = {}
        self._ranges: dict[tuple[str, NumberFormat], Range] = {}

    def on(self, view: ModelView) -> QuantizerBank:
        """The same bank on another view of the same model; what is made already is shared."""
        bank = copy.copy(self)
        bank.view = view
        return bank

    def weight(self, layer: LayerSpec, fmt: NumberFormat) -> Tensor:
        """The layer's weight rounded to a format; integer formats are kept as codes, which tied layers share."""
        module, weight = self.view.layers[layer.name], self.view.weight(layer.name)
        if fmt.family != "int":
            return round_weight(module, weight, fmt, self.weight_range)
        key = (layer.storage, fmt)
        if key not in self._weights:
            self._weights[key] = quantize(channels_first(module, weight), fmt, 0, self.weight_range)
        return channels_first(module, dequantize(self._weights[key]).to(weight.dtype))

    def observe(self, data: Calibration, progress: bool = True) -> None:
        """Watch every layer's inputs over the data: one forward pass.

        Raises:
            DataError: If an input of a layer holds NaN or infinity.
        """
        observers = {layer.name: ActivationObserver() for layer in self.graph}

        def hook(name: str) -> Any:
            def update(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                for t in {id(t): t for t in tensors_in((args, kwargs))}.values():
                    if t.is_floating_point():
                        try:
                            observers[name].update(t)
                        except DataError as error:
                            raise DataError(f"the input of layer {name!r}: {error}") from None

            return update

        hooks = [self.view.layers[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in observers]
        with self.view.hooked(hooks), torch.no_grad():
            for batch in progress_bar(data.batches, "activation ranges", progress):
                self.view(batch)
        self._observers = observers

    def range(self, layer: LayerSpec, fmt: NumberFormat | None) -> Range | None:
        """Calibrated range of a layer's input for an integer format, else None."""
        if fmt is None or fmt.family != "int":
            return None
        key = (layer.name, fmt)
        if key not in self._ranges:
            self._ranges[key] = self._observers[layer.name].range(fmt, self.activation_range)
        return self._ranges[key]

    def inputs(self, layer: LayerSpec, fmt: NumberFormat | None, inputs: Inputs) -> Inputs:
        """A layer's inputs rounded to an activation format."""
        return quantize_inputs(fmt, self.range(layer, fmt), inputs)

    def run(self, layer: LayerSpec, weight: NumberFormat | None, inputs: Inputs) -> Any:
        """The layer's own forward with its weight in a format (None: float), without its hooks."""
        module, (args, kwargs) = self.view.layers[layer.name], inputs
        if weight is None:
            return module.forward(*args, **kwargs)
        with self.view.swapped({layer.name: self.weight(layer, weight)}):
            return module.forward(*args, **kwargs)

    def prepare(self, schemes: Iterable[Scheme], progress: bool = True) -> None:
        """Quantize all weights now, so that a bad format fails before long work and progress is seen."""
        pairs = [(layer, s) for layer in self.graph for s in schemes]
        for layer, scheme in progress_bar(pairs, "weights", progress):
            try:
                self.weight(layer, scheme.weight)
            except FormatError as error:
                raise FormatError(f"layer {layer.name!r}: {error}") from None
