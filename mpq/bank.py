"""The quantizer bank: every layer's weight in every format and every activation range, made once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.calibration import Calibration
from mpq.errors import DataError, FormatError
from mpq.input_statistics import gather
from mpq.kept_codes import effective_format, naming_layer
from mpq.layers import LayerGraph, LayerSpec
from mpq.progress import progress_bar
from mpq.quantizers import NumberFormat, Scheme
from mpq.quantizers.basis import InputBasis
from mpq.quantizers.observers import ActivationObserver
from mpq.quantizers.ranges import check_rule, loss_candidates, parse_range_method
from mpq.quantizers.recipes import round_weight
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.stored import StoredWeight
from mpq.quantizers.tensors import (
    QuantizedTensor,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_static,
    quantize,
    quantize_all,
)
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView, channels_first, own_weight

Range = tuple[float, float]
_ANY_FORMAT = NumberFormat.parse("int8:tensor:s32")
# Positional and keyword arguments of a layer's forward.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def quantize_inputs(
    module: nn.Module,
    fmt: NumberFormat | None,
    limits: Range | None,
    inputs: Inputs,
    basis: InputBasis | None = None,
) -> Inputs:
    """Fake-quantize all floating-point tensors in a layer's inputs.

    Args:
        module: The layer.
        fmt: None leaves inputs as they are.
        limits: Of formats that are calibrated.
        inputs: The layer's arguments.
        basis: What they are rounded in; None: their own.
    """
    if fmt is None:
        return inputs
    lo, hi = limits or (0.0, 0.0)
    static = fmt.calibrated or fmt.granularity == "none"
    features = feature_axis(module)

    def rounded(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        x = t if basis is None else basis.into(t, features)
        x = fake_quantize_static(x, fmt, lo, hi) if static else fake_quantize_dynamic(x, fmt, features)
        return x if basis is None else basis.back(x, features).to(t.dtype)

    args, kwargs = map_tensors(rounded, inputs)
    return args, kwargs


def feature_axis(module: nn.Module) -> int:
    """Axis of a layer's input features: before the places of a convolution, else the last."""
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1


class WeightRounder:
    """Rounds the weights of a model's layers; what recipes want to know of the layers' inputs is gathered when needed.

    Args:
        view: The model.
        method: Range rule of weights.
        data: Calibration data; one forward pass over it at the first weight with a recipe that looks at inputs.
        progress: Show a bar for that pass.

    Attributes:
        passes: Forward passes over the data so far: one for plain statistics, one for those with token weights.
    """

    def __init__(self, view: ModelView, method: str, data: Calibration | None = None, progress: bool = True) -> None:
        self.view, self.method, self.data, self.progress = view, method, data, progress
        self._stats: dict[bool, dict[str, LayerStats]] = {}
        self.passes = 0

    def __call__(self, name: str, fmt: NumberFormat) -> Tensor:
        """A layer's weight rounded to a format, with one scale or group of scales for each output channel.

        Nothing that an embedding puts out depends on two of its weights, so that nearest rounding is the best there is:
        recipes that look at inputs leave it alone, unless it shares its weight with another layer.

        Raises:
            FormatError: Naming the layer, if its recipe needs data that there is none of, or it can't be done.
        """
        module, weight = self.view.layers[name], self.view.weight(name)
        fmt = effective_format(fmt, self._readers(weight))
        if fmt.recipe:
            return channels_first(module, self.stored(name, fmt).values().to(weight.dtype))
        with naming_layer(name):
            return channels_first(module, fake_quantize(channels_first(module, weight), fmt, 0, self.method))

    def stored(self, name: str, fmt: NumberFormat) -> StoredWeight:
        """A layer's weight as it is stored; of a plain cast (fp16), whose values say all, only the format.

        Raises:
            FormatError: As when it is called.
        """
        weight = channels_first(self.view.layers[name], self.view.weight(name))
        fmt = effective_format(fmt, self._readers(self.view.weight(name)))
        if fmt.plain_float:
            return StoredWeight(fmt, tuple(weight.shape), (), {})
        with naming_layer(name):
            return round_weight(weight, fmt, self.method, self._statistics(name, fmt) if fmt.needs_data else None)

    def forget(self) -> None:
        """Free the statistics; they are gathered again when they are needed."""
        self._stats.clear()

    def _readers(self, weight: Tensor) -> list[nn.Module]:
        return [m for m in self.view.layers.values() if own_weight(m) is weight]

    def _statistics(self, name: str, fmt: NumberFormat) -> LayerStats:
        if self.data is None:
            raise FormatError(
                f"{fmt.name} rounds with an eye to the layer's inputs; pass calib= (the calibration batches that the "
                "config was made with)"
            )
        by_token = "rsq" in fmt.recipe
        if by_token not in self._stats:
            self.passes += 1
            self._stats[by_token] = gather(self.view, self.data, self.view.layers, by_token, self.progress)
        same = (n for n, m in self.view.layers.items() if own_weight(m) is self.view.weight(name))
        stats = next((self._stats[by_token][n] for n in same if n in self._stats[by_token]), None)
        if stats is None:
            raise FormatError(f"{fmt.name} needs the layer's inputs, but it did not run on the calibration data")
        return stats


class QuantizerBank:
    """Quantized weights and activation ranges of one view, cached by layer and format.

    Args:
        view: The model.
        graph: Its layers.
        weight_range: Range rule of weights, see `mpq.quantizers.find_range`.
        activation_range: Range rule of activations. By ``loss`` and ``loss:N`` the bank has those that it is given.
        data: Calibration data, for weight formats with recipes that look at the layers' inputs (``int4:gptq``).
        progress: Show a bar for the pass over them.

    Raises:
        FormatError: If a range rule is unknown.
    """

    def __init__(
        self,
        view: ModelView,
        graph: LayerGraph,
        weight_range: str = "mse",
        activation_range: str = "mse",
        data: Calibration | None = None,
        progress: bool = True,
    ) -> None:
        parse_range_method(weight_range)
        if loss_candidates(activation_range) is None:
            parse_range_method(activation_range)
        self.view, self.graph = view, graph
        self.weight_range, self.activation_range = weight_range, activation_range
        self._rounder = WeightRounder(view, weight_range, data, progress)
        self._weights: dict[tuple[int, NumberFormat], QuantizedTensor | Tensor] = {}
        self._bases: dict[tuple[int, tuple[str, ...]], InputBasis] = {}
        self._input_steps: set[tuple[str, ...]] = set()
        self._observed: Calibration | None = None
        self._observers: dict[tuple[str, tuple[str, ...]], ActivationObserver] = {}
        self._ranges: dict[tuple[str, NumberFormat], Range] = {}

    @property
    def passes(self) -> int:
        """Forward passes over the data for rounding: of weights, and of inputs in other bases than their own."""
        return self._rounder.passes + len({steps for _, steps in self._observers if steps})

    def about(self, scheme: Scheme) -> str:
        """Hash of the data that the weights of a scheme are rounded for; empty if for none."""
        data = self._rounder.data
        return data.hash if data is not None and scheme.weight.needs_data else ""

    def on(self, view: ModelView) -> QuantizerBank:
        """The same bank on another view of the same model; what is made already is shared."""
        bank = copy.copy(self)
        bank.view = view
        return bank

    def weight(self, layer: LayerSpec, fmt: NumberFormat) -> Tensor:
        """The layer's weight rounded to a format; all but plain floats are kept, which tied layers share.

        They are kept as codes, with a recipe as rounded weights.

        Raises:
            FormatError: If the recipe needs data and the bank has none.
        """
        module, weight = self.view.layers[layer.name], self.view.weight(layer.name)
        if fmt.granularity == "none" and not fmt.recipe:
            return self._rounder(layer.name, fmt)
        key = (layer.storage, fmt)
        if key not in self._weights and fmt.recipe:
            self._weights[key] = self._rounder(layer.name, fmt)
        elif key not in self._weights:
            with naming_layer(layer.name):
                self._weights[key] = quantize(channels_first(module, weight), fmt, 0, self.weight_range)
        kept = self._weights[key]
        if isinstance(kept, QuantizedTensor):
            return channels_first(module, dequantize(kept).to(weight.dtype))
        return kept

    def observe(self, data: Calibration, progress: bool = True) -> None:
        """Watch every layer's inputs over the data: one forward pass for each basis that they are rounded in.

        Raises:
            DataError: If an input of a layer holds NaN or infinity.
        """
        self._observed = data
        self._observers.clear()
        self._ranges.clear()
        for steps in ((), *sorted(self._input_steps)):
            self._observe(data, steps, progress)

    def _observe(self, data: Calibration, steps: tuple[str, ...], progress: bool) -> None:
        """Watch inputs as they are after the first steps of a recipe."""
        observers = {layer.name: ActivationObserver() for layer in self.graph}
        bases = {layer.name: self._basis(layer, steps) for layer in self.graph}

        def hook(name: str) -> Any:
            def update(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                basis = bases[name]
                for t in {id(t): t for t in tensors_in((args, kwargs))}.values():
                    if t.is_floating_point():
                        try:
                            observers[name].update(t if basis is None else basis.into(t, feature_axis(module)))
                        except DataError as error:
                            raise DataError(f"the input of layer {name!r}: {error}") from None

            return update

        hooks = [self.view.layers[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in observers]
        with self.view.hooked(hooks), torch.no_grad():
            for batch in progress_bar(data.batches, "activation ranges", progress):
                self.view(batch)
        self._observers |= {(name, steps): observer for name, observer in observers.items()}

    def range(self, layer: LayerSpec, fmt: NumberFormat | None) -> Range | None:
        """Calibrated range of a layer's input for a format that needs one, else None.

        Raises:
            FormatError: If the input has negative numbers and the format has none, or ranges are chosen by loss, but
                this one was not.
        """
        if fmt is None:
            return None
        self._check_sign(layer, fmt)
        if not fmt.calibrated:
            return None
        key = (layer.name, fmt)
        if key not in self._ranges:
            if loss_candidates(self.activation_range) is not None:
                raise FormatError(
                    f"no range by loss was chosen for the input of layer {layer.name!r} in {fmt.name}; mpq.analyze "
                    "chooses them, and QuantizerBank.set_ranges takes them"
                )
            self._ranges[key] = self._observer(layer, fmt).range(fmt, self.activation_range)
        return self._ranges[key]

    def ends(self, layer: LayerSpec, fmt: NumberFormat) -> Range:
        """Smallest and largest number in a layer's input, or zero, in the basis that a format rounds it in.

        Raises:
            FormatError: If the input has negative numbers and the format has none.
        """
        self._check_sign(layer, fmt)
        return self._observer(layer, fmt).range(fmt, "minmax")

    def set_ranges(self, found: Mapping[tuple[str, NumberFormat], Range]) -> None:
        """Take ranges of layers' inputs that were chosen elsewhere; they hold until data is observed again."""
        self._ranges |= found

    def _check_sign(self, layer: LayerSpec, fmt: NumberFormat) -> None:
        watched = self._observers.get((layer.name, fmt.recipe))
        if fmt.family == "log2" and watched is not None and watched.lo < 0:
            raise FormatError(
                f"layer {layer.name!r}: {fmt.name} has no negative numbers, but the layer's input has: {watched.lo:.3g}"
            )

    def _observer(self, layer: LayerSpec, fmt: NumberFormat) -> ActivationObserver:
        if (layer.name, fmt.recipe) not in self._observers:
            assert self._observed is not None
            self._observe(self._observed, fmt.recipe, progress=False)
        return self._observers[layer.name, fmt.recipe]

    def basis(self, layer: LayerSpec, fmt: NumberFormat | None) -> InputBasis | None:
        """What a layer's inputs are rounded in; None: as they are."""
        return None if fmt is None else self._basis(layer, fmt.recipe)

    def _basis(self, layer: LayerSpec, steps: tuple[str, ...]) -> InputBasis | None:
        if not steps or isinstance(self.view.layers[layer.name], nn.Embedding):
            return None
        key = (layer.storage, steps)
        if key not in self._bases:  # whatever the weight is rounded to
            stored = self._rounder.stored(layer.name, replace(_ANY_FORMAT, recipe=steps))
            self._bases[key] = stored.input_basis(steps)
        return self._bases[key]

    def inputs(self, layer: LayerSpec, fmt: NumberFormat | None, inputs: Inputs) -> Inputs:
        """A layer's inputs rounded to an activation format."""
        return quantize_inputs(
            self.view.layers[layer.name], fmt, self.range(layer, fmt), inputs, self.basis(layer, fmt)
        )

    def run(self, layer: LayerSpec, weight: NumberFormat | None, inputs: Inputs) -> Any:
        """The layer's own forward with its weight in a format (None: float), without its hooks."""
        module, (args, kwargs) = self.view.layers[layer.name], inputs
        if weight is None:
            return module.forward(*args, **kwargs)
        with self.view.swapped({layer.name: self.weight(layer, weight)}):
            return module.forward(*args, **kwargs)

    def prepare(self, schemes: Iterable[Scheme], progress: bool = True) -> None:
        """Quantize all weights now, so that a bad format fails before long work and progress is seen."""
        schemes = tuple(schemes)
        formats = tuple(dict.fromkeys(s.weight for s in schemes))
        inputs = [a for s in schemes if (a := s.activation) is not None]
        for fmt in formats:
            check_rule(fmt, self.weight_range)
        for fmt in inputs:
            if fmt.calibrated and loss_candidates(self.activation_range) is None:
                check_rule(fmt, self.activation_range)
        self._input_steps |= {a.recipe for a in inputs if a.recipe}
        coded = [fmt for fmt in formats if fmt.granularity != "none" and not fmt.recipe]
        for layer in progress_bar(list(self.graph), "weights", progress):
            missing = [fmt for fmt in coded if (layer.storage, fmt) not in self._weights]
            weight = channels_first(self.view.layers[layer.name], self.view.weight(layer.name))
            with naming_layer(layer.name):
                made = quantize_all(weight, missing, 0, self.weight_range)
            self._weights.update({(layer.storage, fmt): codes for fmt, codes in made.items()})
            for fmt in formats:
                if fmt.recipe:
                    self.weight(layer, fmt)
            for scheme in schemes:
                self.basis(layer, scheme.activation)
        self._rounder.forget()
