"""One gradient at a time: hooks that reduce gradients and layer inputs to a few numbers as soon as they exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from mpq.bank import Inputs, QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, GraphError
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.progress import progress_bar
from mpq.quantizers import NumberFormat, Scheme
from mpq.sensitivity.aggregate import distinct_layers
from mpq.sensitivity.rows import check_reached
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView

# (output, batch) -> the scalar to differentiate.
Objective = Callable[[Any, Batch], Tensor]
# (layer, gradient) -> numbers [K]
WeightReader = Callable[[LayerSpec, Tensor], Tensor]
# (layer, value, gradient) -> numbers [K]
InputReader = Callable[[LayerSpec, Tensor, Tensor], Tensor]
# (layer, inputs, gradients of its outputs) -> numbers [K]
OutputReader = Callable[[LayerSpec, Inputs, Sequence[Tensor | None]], Tensor]

_ROUNDING = 1e-6  # of the largest loss: what is closer to zero is rounding


def gradient_sums(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    objective: Objective,
    draws: int,
    title: str,
    progress: bool,
    *,
    weight: WeightReader | None = None,
    activation: InputReader | None = None,
    output: OutputReader | None = None,
) -> Floats:
    """Differentiate the objective for every batch and draw, and let readers reduce each gradient to numbers.

    One forward pass per batch and one backward pass per batch and draw. A reader runs inside the backward pass, under
    ``torch.no_grad``, and its gradient is dropped after it, so that no two layers' gradients exist at once.

    Args:
        view: The model.
        space: The layers to read.
        data: The batches.
        objective: Called once per draw.
        draws: Backward passes per batch.
        title: Of the progress bar.
        progress: Show a bar.
        weight: Reads the gradient of each weight, once for tied layers (their uses add up).
        activation: Reads each input tensor and its gradient. A tensor that several layers take in is read once, for
            the first of them, with the sum of their gradients.
        output: Reads the gradients of all outputs of each call.

    Returns:
        Sums over calls ``[draws, batches, layers, K]``, layers as in ``space.layers``.

    Raises:
        DataError: If a number is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
    """
    found: list[list[Mapping[str, Tensor]]] = []
    unreached = {x.name for x in space.layers}
    for batch in progress_bar(data.batches, title, progress):
        sweep = _Sweep(view, space, weight, activation, output)
        found.append(sweep.run(batch, objective, draws))
        unreached -= sweep.reached
    check_reached(view, sorted(unreached), data.batches)
    width = next((len(v) for each in found for sums in each for v in sums.values()), 1)
    nothing = torch.zeros(width, dtype=torch.float64)
    rows = [[torch.stack([s.get(x.name, nothing) for x in space.layers]) for s in each] for each in found]
    sums: Floats = torch.stack([torch.stack(each) for each in rows], 1).numpy()
    for i, layer in enumerate(space.layers):
        if not np.isfinite(sums[:, :, i]).all():
            raise DataError(f"the {title} of layer {layer.name!r} is NaN or infinite; check the data and the loss")
    return sums


class _Sweep:
    """Hooks of one batch.

    Attributes:
        reached: Layers that a gradient reached.
    """

    def __init__(
        self,
        view: ModelView,
        space: SearchSpace,
        weight: WeightReader | None,
        activation: InputReader | None,
        output: OutputReader | None,
    ) -> None:
        self._view, self._space = view, space
        self._weight, self._activation, self._output = weight, activation, output
        self._sums: dict[str, Tensor] = {}
        # Tensors that layers have read: the tensor, its version then, and what the layer got in its place.
        self._read: dict[int, tuple[ReferenceType[Tensor], int, Tensor]] = {}
        self.reached: set[str] = set()

    def run(self, batch: Batch, objective: Objective, draws: int) -> list[Mapping[str, Tensor]]:
        """Numbers of each layer, for each draw."""
        layers = self._space.layers
        hooks: list[Any] = []
        if self._output is not None:
            hooks += [
                self._view.layers[x.name].register_forward_hook(self._mark_outputs(x), with_kwargs=True) for x in layers
            ]
        if self._activation is not None:
            hooks += [
                self._view.layers[x.name].register_forward_pre_hook(self._mark_inputs(x), with_kwargs=True)
                for x in layers
                if x.source is not None
            ]
        with torch.no_grad():  # the user's tensors may want gradients; they get none
            batch = batch.to(self._view.device)
        weights = {x.name: self._leaf(x) for x in distinct_layers(self._space)} if self._weight is not None else {}
        with self._view.swapped(weights):
            with self._view.hooked(hooks):
                result = self._view(batch)
            self._read.clear()
            if not any(t.requires_grad for t in tensors_in(result)):
                raise GraphError("no gradient reaches the model's output: its forward runs under torch.no_grad()")
            return [self._backward(objective(result, batch), last=d == draws - 1) for d in range(draws)]

    def _backward(self, scalar: Tensor, last: bool) -> Mapping[str, Tensor]:
        self._sums = {}
        torch.autograd.backward(scalar, retain_graph=not last)
        return self._sums

    def _add(self, layer: LayerSpec, numbers: Tensor) -> None:
        numbers = numbers.double().cpu()
        self._sums[layer.name] = self._sums[layer.name] + numbers if layer.name in self._sums else numbers
        self.reached.add(layer.name)

    def _leaf(self, layer: LayerSpec) -> Tensor:
        """The layer's weight as a leaf whose gradient is read as soon as it is complete."""
        leaf = self._view.weight(layer.name).detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(partial(self._read_weight, layer))  # type: ignore[no-untyped-call]
        return leaf

    def _read_weight(self, layer: LayerSpec, leaf: Tensor) -> None:
        assert self._weight is not None
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad.to_dense(), None
        self._add(layer, self._weight(layer, gradient))
        self.reached.update(x.name for x in self._space.layers if x.storage == layer.storage)

    def _mark_inputs(self, layer: LayerSpec) -> Any:
        def mark(t: Tensor) -> Tensor:
            known, version, marked = self._read.get(id(t), (None, 0, t))
            if known is not None and known() is t and version == t._version:
                return marked
            if not t.is_floating_point():
                return t
            # A copy, because models may overwrite the tensor later on.
            marked = (t if t.requires_grad else t.detach().requires_grad_()).clone()
            self._read[id(t)] = ref(t), t._version, marked
            read = partial(self._read_input, layer, marked.detach())
            marked.register_hook(read)  # type: ignore[no-untyped-call]
            return marked

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return map_tensors(mark, (args, kwargs)) if torch.is_grad_enabled() else None

        return hook

    def _read_input(self, layer: LayerSpec, value: Tensor, gradient: Tensor) -> None:
        assert self._activation is not None
        self._add(layer, self._activation(layer, value, gradient))

    def _mark_outputs(self, layer: LayerSpec) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            inputs = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
            outputs = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors_in(output)]
            register_multi_grad_hook(outputs, partial(self._read_outputs, layer, inputs))
            copies = iter(t.clone() for t in outputs)
            return map_tensors(lambda t: next(copies), output)

        return hook

    def _read_outputs(self, layer: LayerSpec, inputs: Inputs, gradients: Sequence[Tensor | None]) -> None:
        assert self._output is not None
        self._add(layer, self._output(layer, inputs, gradients))


def input_sums(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    read: Callable[[LayerSpec, Inputs], Sequence[float]],
    title: str,
    progress: bool,
) -> Floats:
    """Run the data once and add up what a reader makes of every layer's inputs, over all calls ``[layers, K]``."""
    found: dict[str, Floats] = {}

    def hook(layer: LayerSpec) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any) -> None:
            found[layer.name] = found.get(layer.name, 0.0) + np.array(read(layer, (args, kwargs)), np.float64)

        return add

    hooks = [view.layers[x.name].register_forward_pre_hook(hook(x), with_kwargs=True) for x in space.layers]
    with view.hooked(hooks), torch.no_grad():
        for batch in progress_bar(data.batches, title, progress):
            view(batch)
    return np.stack([found[x.name] for x in space.layers])


def schemes_of(space: SearchSpace, layer: LayerSpec) -> list[Scheme]:
    """What each column of the space means for a layer."""
    return [layer_scheme(layer, s) for s in space.schemes]


def by_activation(
    space: SearchSpace,
    bank: QuantizerBank,
    layer: LayerSpec,
    inputs: Inputs,
    measure: Callable[[Tensor, Tensor], float],
) -> list[float]:
    """A measure of (tensor, rounded tensor), summed over a layer's inputs, for each scheme; zero where they stay float.

    Every activation format is rounded to once.
    """
    formats = [s.activation for s in schemes_of(space, layer)]
    found: dict[NumberFormat | None, float] = {None: 0.0}
    for fmt in dict.fromkeys(f for f in formats if f is not None):
        pairs = zip(tensors_in(inputs), tensors_in(bank.inputs(layer, fmt, inputs)), strict=True)
        found[fmt] = sum(measure(t, r) for t, r in pairs if t.is_floating_point())
    return [found[f] for f in formats]


def input_power(view: ModelView, space: SearchSpace, data: Calibration, bank: QuantizerBank, progress: bool) -> Floats:
    """Mean squared rounding error of each layer's inputs under each scheme ``[layers, S]``; one forward pass."""

    def read(layer: LayerSpec, inputs: Inputs) -> list[float]:
        errors = by_activation(space, bank, layer, inputs, lambda t, r: float((r - t).double().square().sum()))
        return [*errors, sum(t.numel() for t in tensors_in(inputs) if t.is_floating_point())]

    sums = input_sums(view, space, data, read, "input noise", progress)
    power: Floats = sums[:, :-1] / np.maximum(sums[:, -1:], 1)
    return power


def has_activations(space: SearchSpace) -> bool:
    """Whether any scheme rounds activations."""
    return any(s.activation is not None for s in space.schemes)


def grouped(space: SearchSpace, values: Floats) -> Floats:
    """Sum ``[..., layers, S]`` over the layers of each group ``[..., G, S]``."""
    position = {x.name: i for i, x in enumerate(space.layers)}
    parts = [values[..., [position[x.name] for x in g.layers], :].sum(-2) for g in space.groups]
    result: Floats = np.stack(parts, -2)
    return result


def over_draws(sums: Floats, data: Calibration, *, exact: bool = False) -> tuple[Floats, Floats]:
    """Mean over samples and draws of ``[draws, batches, ...]``, and the standard error that the draws leave.

    The data are taken as given: draws of different batches are independent, so their variances add. NaN for one draw,
    zero where nothing is drawn (``exact``).
    """
    draws = len(sums)
    mean: Floats = sums.mean(0).sum(0) / data.num_samples
    if exact or draws == 1:
        return mean, np.full_like(mean, 0.0 if exact else np.nan)
    spread: Floats = np.sqrt(sums.var(0, ddof=1).sum(0) / draws) / data.num_samples
    return mean, spread


def cut_below_zero(space: SearchSpace, losses: Floats) -> tuple[Floats, dict[str, dict[str, float]]]:
    """Measured losses ``[G, S]`` without those below zero, and which ones these were: group -> scheme -> loss.

    The second belongs into the provenance as ``negative_losses``, where the sanity gate looks for it. Rounding is left
    out of it.
    """
    below = losses < -_ROUNDING * np.abs(losses).max()
    negative = {
        group.name: {str(space.schemes[s]): float(losses[g, s]) for s in np.flatnonzero(below[g])}
        for g, group in enumerate(space.groups)
        if below[g].any()
    }
    return np.maximum(losses, 0), negative


def table_of(
    space: SearchSpace, scores: Floats, stderr: Floats, estimator: str, passes: float, **provenance: Any
) -> SensitivityTable:
    """A table without interactions."""
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    cost = {"estimator": estimator, "forward_passes": round(passes, 2)}
    return SensitivityTable(*names, scores, stderr, provenance={**cost, **provenance})
