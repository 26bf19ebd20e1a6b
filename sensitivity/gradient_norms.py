"""Squared norms of each sample's gradient in each layer: the trace of the Gauss-Newton matrix, probe by probe.

For a loss probe with ``E[u u^T] = H_z`` (`mpq.losses.OutputLoss.probe`) and ``J`` the derivative of a sample's outputs
in a weight, ``E ||J^T u||^2 = trace(J^T H_z J)``: a squared gradient norm is an unbiased estimate of a trace that is
never negative. One backward pass to the layers' outputs serves all layers and samples; the rest is local to each layer
(`mpq.sensitivity.sample_norms`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from mpq.calibration import Batch
from mpq.layers import LayerSpec
from mpq.sensitivity.aggregate import distinct_layers
from mpq.sensitivity.hessian import check_differentiable
from mpq.sensitivity.rows import MIXED, Layout, Layouts
from mpq.sensitivity.sample_norms import Call, can_be_told_apart, norms_by_sample, sums_of_squares
from mpq.space import SearchSpace
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView


class GradientNorms:
    """One batch, run forward once; then the squared gradient norms of any number of probes.

    A weight that is used several times (tied, or in a module that runs twice) has one gradient, the sum over its uses.
    So has a tensor that several layers read; it counts for the first of them. Where samples can't be told apart (their
    rows are mixed, or a subclass has its own forward), the batch's gradient stands for theirs:
    ``E ||sum_n e_n g_n||^2 = sum_n ||g_n||^2`` for independent signs ``e``, which is right but noisier.

    Args:
        view: The model.
        space: Groups and schemes.
        batch: The samples.
        layouts: Where the samples are in each layer's outputs, see `mpq.sensitivity.rows.find_layouts`.
        weights: Measure gradients in the weights.
        activations: Measure gradients in the layers' floating-point inputs.

    Attributes:
        output: The model's output; probes are made of it.
        mixed: Layers where the batch's gradient stands for those of its samples.
        reached: Layers that the gradients so far have reached.
    """

    def __init__(
        self, view: ModelView, space: SearchSpace, batch: Batch, layouts: Layouts, *, weights: bool, activations: bool
    ) -> None:
        self._view, self._space, self._samples, self._layouts = view, space, batch.size, layouts
        self._activations = activations
        self.reached: set[str] = set()
        distinct = distinct_layers(space)
        self._weights = {x.storage: view.weight(x.name).detach().requires_grad_() for x in distinct}
        self.output = self._run(batch)
        self._uses = {s: [c for c in self._calls if c.layer.storage == s] for s in self._weights} if weights else {}
        self._whole = {s for s, calls in self._uses.items() if not can_be_told_apart(calls)}
        self.mixed = {x.name for x in space.layers if x.storage in self._whole}
        self.mixed |= {name for name, inputs in self._inputs.items() if any(layout == MIXED for _, layout in inputs)}

    def _run(self, batch: Batch) -> Any:
        for self._copies in (False, True):
            self._calls: list[Call] = []
            self._count: Counter[str] = Counter()
            # What layers read: the tensor, its version then, and what the layer got in its place.
            self._read: dict[int, tuple[Tensor, int, Tensor]] = {}
            self._inputs: dict[str, list[tuple[Tensor, Layout]]] = {x.name: [] for x in self._space.layers}
            self._taken: set[int] = set()
            self._kept: list[tuple[Tensor, int]] = []
            output = self._forward(batch)
            if all(t._version == version for t, version in self._kept):
                break  # else the model writes into what a layer has read or made: again, with copies
        self._read.clear()
        self._kept.clear()
        check_differentiable(output)
        return output

    def _forward(self, batch: Batch) -> Any:
        hooks = []
        for layer in self._space.layers:
            module, pending = self._view.layers[layer.name], list[Any]()
            hooks.append(module.register_forward_pre_hook(self._before(pending), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after(layer, pending)))
        weights = {x.name: self._weights[x.storage] for x in distinct_layers(self._space)}
        with self._view.swapped(weights), self._view.hooked(hooks):
            return self._view(batch)

    def _own(self, t: Tensor) -> Tensor:
        """A tensor of its own in the graph, with memory of its own only where the model would overwrite it."""
        found = t.clone() if self._copies else t.view_as(t)
        self._kept.append((found, found._version))
        return found

    def _before(self, pending: list[Any]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            pending.append(map_tensors(self._given, (args, kwargs)))
            return pending[-1]

        return hook

    def _given(self, t: Tensor) -> Tensor:
        """What a layer gets for a tensor; readers of one tensor share it."""
        known, version, given = self._read.get(id(t), (None, 0, t))
        if known is not t or version != t._version:
            given = self._own(t)
            if self._activations and t.is_floating_point() and not given.requires_grad:
                given.requires_grad_()
            self._read[id(t)] = t, t._version, given
        return given

    def _after(self, layer: LayerSpec, pending: list[Any]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            read, made, number = tensors_in(pending.pop()), tensors_in(output), self._count[layer.name]
            found = [self._layouts.get((layer.name, number, i), MIXED) for i in range(len(made))]
            layouts = [self._checked(layout, t) for layout, t in zip(found, made, strict=True)]
            self._calls.append(Call(layer, module, read, made, layouts))
            self._count[layer.name] += 1
            if self._activations:
                new = {id(t): t for t in read if t.is_floating_point() and id(t) not in self._taken}
                self._inputs[layer.name] += [(t, self._checked(layouts[0], t)) for t in new.values()]
                self._taken.update(new)
            return map_tensors(self._own, output)

        return hook

    def _checked(self, layout: Layout, t: Tensor) -> Layout:
        """A layout as far as a tensor of this batch fits it."""
        if self._samples == 1:
            return "rows", 1
        axis = 1 if layout[0] == "second" else 0
        fits = layout != MIXED and t.dim() > axis and t.shape[axis] == layout[1] * self._samples
        return layout if fits else MIXED

    def of(self, probe: Tensor) -> list[Tensor]:
        """Squared gradient norms of one probe, by sample.

        Args:
            probe: A scalar made of `output`.

        Returns:
            Float64 ``[B]`` for each distinct weight, then for the inputs of each layer (as far as they are measured);
            ``[1]`` where the batch's gradient stands for those of its samples.
        """
        tensors = [self._weights[s] for s in self._whole] + [t for c in self._calls for t in c.made]
        tensors += [t for inputs in self._inputs.values() for t, _ in inputs]
        wanted = [t for t in tensors if t.requires_grad]
        found = torch.autograd.grad(probe, wanted, retain_graph=True, allow_unused=True)
        gradients = {id(t): g for t, g in zip(wanted, found, strict=True) if g is not None}
        self.reached |= {c.layer.name for c in self._calls if any(id(t) in gradients for t in c.made)}
        with torch.no_grad():
            norms = [self._weight_norms(s, gradients) for s in self._uses]
            if self._activations:
                norms += [self._input_norms(x.name, gradients) for x in self._space.layers]
        return norms

    def _weight_norms(self, storage: int, gradients: dict[int, Tensor]) -> Tensor:
        if storage in self._whole:
            gradient = gradients.get(id(self._weights[storage]))
            return torch.zeros(1, dtype=torch.float64) if gradient is None else sums_of_squares(gradient[None])
        calls = [c for c in self._uses[storage] if any(id(t) in gradients for t in c.made)]
        made = [[gradients.get(id(t), torch.zeros_like(t)) for t in c.made] for c in calls]
        return norms_by_sample(calls, made, self._samples)

    def _input_norms(self, name: str, gradients: dict[int, Tensor]) -> Tensor:
        known = [(gradients[id(t)], layout) for t, layout in self._inputs[name] if id(t) in gradients]
        if any(layout == MIXED for _, layout in known):
            return torch.stack([sums_of_squares(g[None]) for g, _ in known]).sum(0)
        norms = torch.zeros(self._samples, dtype=torch.float64)
        for gradient, (axis, _) in known:
            rows = gradient.transpose(0, 1) if axis == "second" else gradient
            norms += sums_of_squares(rows.reshape(self._samples, -1))
        return norms
