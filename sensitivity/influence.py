"""Influence: how the real quantization error of each layer moves the loss of each sample.

One forward pass per batch and one backward pass per probe. At every layer the output error of every scheme,
``d = Q(layer)(x) - layer(x)``, is projected on the gradient of a loss probe (`mpq.losses.OutputLoss.probe`):
``s[n, layer, scheme] = <u_n^T dz_n/dy, d_n>``. With ``E[u u^T] = H``, half the mean of ``s**2`` is the Gauss-Newton
form ``0.5 d^T J^T H J d`` of the loss: the second-order rise of the loss for this very perturbation (Schraudolph,
2002, for the Gauss-Newton matrix). Sums of ``s`` over layers give the same form for whole configs, so that all
pairwise interactions come with the same passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.bank import Inputs, QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, GraphError, MpqError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.problem import Floats
from mpq.progress import progress_bar
from mpq.sensitivity.rows import MIXED, Layout, Layouts, check_reached, find_layouts
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView


def influence(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    draws: int = 2,
    exact: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss of every scheme of every group, with all pairwise interactions.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        draws: Random probes per sample; more of them lower the standard error towards that of the data alone.
        exact: Sum over all output classes (or elements) instead of drawing: one backward pass for each.
        seed: Of the probes.
        progress: Show a bar.

    Returns:
        A table whose loss is in the unit of ``loss``, standard errors over samples, and the interaction factor. A layer
        whose output belongs to the whole batch (position embeddings, routed tokens) has standard errors over batches,
        and its interactions are shrunk towards zero.

    Raises:
        DataError: If a gradient or an error is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If ``exact`` or a loss without a value per sample meets a layer that mixes samples.
    """
    generator = torch.Generator().manual_seed(seed)
    layouts, passes = _layouts(view, space, data)
    effects: list[Tensor] = []
    mixed: set[str] = set()
    unreached = {x.name for x in space.layers}
    for batch in progress_bar(data.batches, "influence", progress):
        collector = _Collector(view, space, bank, batch.size, layouts)
        output = collector.forward(batch)
        if not any(t.requires_grad for t in tensors_in(output)):
            raise GraphError("no gradient reaches the model's output: its forward runs under torch.no_grad()")
        drawn = (loss.probe(output, batch, generator) for _ in range(draws))
        gradients = collector.backward(loss.all_probes(output, batch) if exact else drawn)
        effects.append(collector.project(gradients) * (1.0 if exact else draws**-0.5))
        unreached -= collector.reached
        mixed |= collector.mixed
        if collector.mixed and (exact or not loss.by_sample(output, batch)):
            what = "exact=True" if exact else "a loss that returns one mean for the batch"
            raise MpqError(
                f"layer {min(collector.mixed)!r} mixes the samples of a batch, which {what} can't tell apart; "
                + ("use random draws" if exact else "return one loss per sample, or use batches of one sample")
            )
        # A backward pass counts as two forward passes; each layer runs once per scheme and once in float.
        passes += batch.size / data.num_samples * (1 + 2 * len(gradients) + len(space.schemes) + 1)
    check_reached(view, sorted(unreached), data.batches)
    provenance = {
        "estimator": "influence",
        "draws": "exact" if exact else draws,
        "loss": loss.name,
        "mixed_layers": sorted(mixed),
        "forward_passes": round(passes, 2),
    }
    return _table(space, effects, mixed, provenance)


def _layouts(view: ModelView, space: SearchSpace, data: Calibration) -> tuple[Layouts, float]:
    """Where the samples are in every output, and the forward passes of finding out.

    The two largest batches must agree: routing may happen to keep the samples apart in one of them.
    """
    layouts: Layouts = {}
    tried = sorted((b for b in data.batches if b.size > 1), key=lambda b: -b.size)[:2]
    for batch in tried:
        found = find_layouts(view, [x.name for x in space.layers], batch)
        layouts = {k: v if layouts.get(k, v) == v else MIXED for k, v in found.items()}
    return layouts, 2 * sum(b.size for b in tried) / data.num_samples


def _table(space: SearchSpace, effects: list[Tensor], mixed: set[str], provenance: dict[str, Any]) -> SensitivityTable:
    """Join the effects ``[samples, draws, layers, schemes]`` of all batches; layers become groups."""
    column = {layer.name: i for i, layer in enumerate(space.layers)}
    members = [[column[x.name] for x in g.layers] for g in space.groups]
    grouped = [torch.stack([rows[:, :, m].sum(2) for m in members], 2).numpy() for rows in effects]
    # Each sample's share of the mean loss: half its squared effects, summed over draws [N, G, S].
    shares: Floats = np.concatenate([0.5 * np.square(e).sum(1) for e in grouped])
    samples = len(shares)
    stderr = _standard_error(shares)
    over_batches = [g for g, group in enumerate(space.groups) if mixed & {x.name for x in group.layers}]
    if over_batches:
        means = np.stack([0.5 * np.square(e[:, :, over_batches]).sum((0, 1)) * len(grouped) for e in grouped]) / samples
        stderr[over_batches] = _standard_error(means)
    factor = np.concatenate([e.reshape(-1, *e.shape[2:]) for e in grouped]) / samples**0.5
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    return SensitivityTable(*names, shares.mean(0), stderr, factor, provenance)


def _standard_error(values: Floats) -> Floats:
    """Standard error of the mean over the first axis; NaN for a single row."""
    rows = len(values)
    result: Floats = values.std(0, ddof=1) / rows**0.5 if rows > 1 else np.full(values.shape[1:], np.nan)
    return result


class _Collector:
    """Hooks of one batch: keeps layer inputs on the way forward, projects all errors after the way back.

    Args:
        view: The model.
        space: Groups and schemes.
        bank: Quantized layers.
        batch_size: Samples of the batch.
        layouts: Where the samples are in each output; not needed for a single sample.

    Attributes:
        reached: Layers that a gradient reached.
        mixed: Layers whose output belongs to the whole batch.
    """

    def __init__(
        self, view: ModelView, space: SearchSpace, bank: QuantizerBank, batch_size: int, layouts: Layouts
    ) -> None:
        self.view, self.space, self.bank, self.batch_size, self.layouts = view, space, bank, batch_size, layouts
        self.reached: set[str] = set()
        self.mixed: set[str] = set()
        self._calls: list[tuple[LayerSpec, int, Inputs, list[Tensor]]] = []
        self._count: Counter[str] = Counter()

    def forward(self, batch: Batch) -> Any:
        """Run the model with hooks; outputs of all layers require gradients."""
        hooks = [
            self.view.layers[x.name].register_forward_hook(self._hook(x), with_kwargs=True) for x in self.space.layers
        ]
        with self.view.hooked(hooks):
            return self.view(batch)

    def _hook(self, layer: LayerSpec) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            # Models may overwrite a layer's input or output later on, so both are kept as copies. The first
            # layers see no gradient: their outputs start the record.
            inputs = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
            outputs = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors_in(output)]
            self._calls.append((layer, self._count[layer.name], inputs, outputs))
            self._count[layer.name] += 1
            copies = iter(t.clone() for t in outputs)
            return map_tensors(lambda t: next(copies), output)

        return hook

    def backward(self, probes: Iterable[Tensor]) -> list[list[Tensor | None]]:
        """Gradients of each probe at the outputs of all calls, None where there is none."""
        outputs = [t for *_, tensors in self._calls for t in tensors]
        return [list(torch.autograd.grad(p, outputs, retain_graph=True, allow_unused=True)) for p in probes]

    @torch.no_grad()
    def project(self, gradients: list[list[Tensor | None]]) -> Tensor:
        """Effects ``[samples, draws, layers, schemes]``."""
        shape = self.batch_size, len(gradients), len(self.space.schemes)
        effects = {x.name: torch.zeros(shape, dtype=torch.float64) for x in self.space.layers}
        position = 0
        for layer, call, inputs, outputs in self._calls:
            found = [[g[position + i] for g in gradients] for i in range(len(outputs))]
            position += len(outputs)
            if any(g is not None for each in found for g in each):
                self.reached.add(layer.name)
                stacked = [
                    torch.stack([torch.zeros_like(t) if g is None else g for g in each])
                    for t, each in zip(outputs, found, strict=True)
                ]
                effects[layer.name] += self._call_effects(layer, call, inputs, stacked)
        return torch.stack(list(effects.values()), 2)

    def _layout(self, name: str, call: int, i: int, output: Tensor) -> Layout:
        """Where the samples are in an output of this batch."""
        if self.batch_size == 1:
            return "rows", 1
        axis, each = self.layouts.get((name, call, i), MIXED)
        length = output.shape[1 if axis == "second" else 0] if output.dim() else 0
        return (axis, each) if length == each * self.batch_size else MIXED

    def _call_effects(self, layer: LayerSpec, call: int, inputs: Inputs, gradients: list[Tensor]) -> Tensor:
        """Effects ``[samples, draws, schemes]`` of one call."""
        exact = tensors_in(self.bank.run(layer, None, inputs))
        layouts = [self._layout(layer.name, call, i, t) for i, t in enumerate(exact)]
        if MIXED in layouts:
            self.mixed.add(layer.name)
        schemes = [layer_scheme(layer, s) for s in self.space.schemes]
        rounded_inputs = {a: self.bank.inputs(layer, a, inputs) for a in dict.fromkeys(s.activation for s in schemes)}
        columns = []
        for scheme in schemes:
            rounded = tensors_in(self.bank.run(layer, scheme.weight, rounded_inputs[scheme.activation]))
            parts = [
                _inner_products(g, r - e, self.batch_size, layout)
                for g, r, e, layout in zip(gradients, rounded, exact, layouts, strict=True)
            ]
            columns.append(torch.stack(parts).sum(0))
        effects = torch.stack(columns, -1)
        if not torch.isfinite(effects).all():
            raise DataError(f"the influence of layer {layer.name!r} is NaN or infinite; check its inputs and the loss")
        return effects


def _inner_products(gradient: Tensor, error: Tensor, samples: int, layout: Layout) -> Tensor:
    """Inner products of gradient ``[draws, ...]`` and error ``[...]`` by sample ``[samples, draws]``.

    Where the output belongs to the whole batch, its sum is spread evenly: the squares of the rows add up to the square
    of the sum, which has the right expectation because the probes of different samples have independent signs.
    """
    if layout[0] == "second":
        gradient, error = gradient.transpose(1, 2), error.transpose(0, 1)
    rows = 1 if layout == MIXED else samples
    products = torch.einsum("krd,rd->rk", gradient.reshape(len(gradient), rows, -1), error.reshape(rows, -1))
    products = products.double().cpu()
    return products.expand(samples, -1) / samples**0.5 if rows < samples else products
