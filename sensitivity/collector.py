"""One batch forward and back with hooks: a layer's effects are computed when its gradient arrives, then forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpq.bank import Inputs, QuantizerBank
from mpq.calibration import Batch
from mpq.errors import DataError, GraphError
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme
from mpq.sensitivity.projection import effects
from mpq.sensitivity.rows import MIXED, Layout, Layouts
from mpq.space import layer_scheme
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView

_CHUNK = 16  # probes whose gradients share the runs of a layer


@dataclass(eq=False)
class _Call:
    """One output tensor of one call of a layer."""

    layer: LayerSpec
    number: int
    which: int
    inputs: Inputs
    versions: list[int]
    gradients: dict[int, Tensor] = field(default_factory=dict)

    @property
    def overwritten(self) -> bool:
        """Whether the model has changed an input in place since the call."""
        return [t._version for t in tensors_in(self.inputs)] != self.versions


class Collector:
    """Effects of every layer and scheme for the samples of one batch.

    Memory: the layers' inputs, which training keeps as well, and one layer's errors at a time. With several draws, the
    gradients of up to 15 earlier ones are kept too.

    Args:
        view: The model.
        layers: Layers to watch.
        schemes: What each may have.
        bank: Quantized layers.
        batch: The batch.
        layouts: Where the samples are in each output; not needed for a single sample.

    Attributes:
        reached: Layers that a gradient reached.
        mixed: Layers whose output belongs to the whole batch.
        runs: Runs of all layers that the errors took, in forward passes (by multiply-accumulates).
    """

    def __init__(
        self,
        view: ModelView,
        layers: tuple[LayerSpec, ...],
        schemes: tuple[Scheme, ...],
        bank: QuantizerBank,
        batch: Batch,
        layouts: Layouts,
    ) -> None:
        self.view, self.layers, self.schemes, self.bank = view, layers, schemes, bank
        self.batch, self.layouts = batch, layouts
        self.reached: set[str] = set()
        self.mixed: set[str] = set()
        self.runs = 0.0
        self._macs = sum(x.macs for x in layers) or 1
        self._copied: set[str] = set()  # layers whose inputs the model overwrites later on
        self._calls: list[_Call] = []
        self._effects: dict[str, Tensor] = {}
        self._draw = self._last = 0

    def forward(self) -> Any:
        """Run the model with hooks; the outputs of all layers are watched.

        Raises:
            GraphError: If the output has no gradient.
        """
        while True:
            self._calls.clear()
            count: Counter[str] = Counter()
            hooks = [
                self.view.layers[x.name].register_forward_hook(partial(self._on_output, x, count), with_kwargs=True)
                for x in self.layers
            ]
            with self.view.hooked(hooks):
                output = self.view(self.batch)
            overwritten = {c.layer.name for c in self._calls if c.overwritten}
            if not overwritten:
                break
            self._copied |= overwritten
        if not any(t.requires_grad for t in tensors_in(output)):
            raise GraphError("no gradient reaches the model's output: its forward runs under torch.no_grad()")
        return output

    def _on_output(
        self, layer: LayerSpec, count: Counter[str], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return None
        copied = layer.name in self._copied
        inputs = map_tensors(lambda t: t.detach().clone() if copied else t.detach(), (args, kwargs))
        versions = [t._version for t in tensors_in(inputs)]
        number = count[layer.name]
        count[layer.name] += 1
        which = iter(range(len(tensors_in(output))))

        def watch(t: Tensor) -> Tensor:
            call = _Call(layer, number, next(which), inputs, versions)
            # The first layers see no gradient: their outputs start the record. They and views (of linear layers on
            # tokens) are cloned: models may overwrite them, and a view's hook would then be lost.
            watched = t if t.requires_grad else t.detach().requires_grad_()
            watched = watched.clone() if watched.is_leaf or watched._is_view() else watched
            watched.register_hook(partial(self._on_gradient, call))  # type: ignore[no-untyped-call]
            self._calls.append(call)
            return watched

        return map_tensors(watch, output)

    def backward(self, probes: Iterable[Tensor], draws: int) -> Tensor:
        """Effects ``[samples, draws, layers, schemes]`` of that many probes."""
        shape = self.batch.size, draws, len(self.schemes)
        self._effects = {x.name: torch.zeros(shape, dtype=torch.float64) for x in self.layers}
        self._last = draws - 1
        for self._draw, probe in enumerate(probes):
            torch.autograd.backward(probe, retain_graph=self._draw < self._last)
            if self._closes_chunk():
                for call in self._calls:
                    self._project(call)  # of calls that the last probe did not reach
        return torch.stack(list(self._effects.values()), 2)

    def _on_gradient(self, call: _Call, gradient: Tensor) -> None:
        call.gradients[self._draw] = gradient
        if self._closes_chunk():
            self._project(call)

    def _closes_chunk(self) -> bool:
        return self._draw == self._last or self._draw % _CHUNK == _CHUNK - 1

    @torch.no_grad()
    def _project(self, call: _Call) -> None:
        if not call.gradients:
            return
        layer, draws = call.layer, sorted(call.gradients)
        gradient = torch.stack([call.gradients[k] for k in draws])
        layout = self._layout(call, gradient)
        self.reached.add(layer.name)
        if layout == MIXED:
            self.mixed.add(layer.name)
        schemes = [layer_scheme(layer, s) for s in self.schemes]
        found, runs = effects(self.bank, layer, schemes, call.inputs, gradient, layout, self.batch.size, call.which)
        self.runs += runs * layer.macs / layer.calls / self._macs
        if not torch.isfinite(found).all():
            raise DataError(f"the influence of layer {layer.name!r} is NaN or infinite; check its inputs and the loss")
        self._effects[layer.name][:, draws] += found
        call.gradients.clear()
        if self._draw == self._last:
            call.inputs = ((), {})

    def _layout(self, call: _Call, gradient: Tensor) -> Layout:
        """Where the samples are in an output of this batch; its gradients are ``[draws, ...]``."""
        if self.batch.size == 1:
            return "rows", 1
        axis, each = self.layouts.get((call.layer.name, call.number, call.which), MIXED)
        length = gradient.shape[2 if axis == "second" else 1] if gradient.dim() > 1 else 0
        return (axis, each) if length == each * self.batch.size else MIXED
