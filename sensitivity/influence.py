"""Influence: how the real quantization error of each layer moves the loss of each sample.

One forward and one backward pass per batch. At every layer the output error of every scheme,
``d = Q(layer)(x) - layer(x)``, is projected on the gradient of a loss probe (`mpq.losses.OutputLoss.probe`):
``s[n, layer, scheme] = <u_n^T dz_n/dy, d_n>``. With ``E[u u^T] = H``, half the mean of ``s**2`` is the Gauss-Newton
form ``0.5 d^T J^T H J d`` of the loss: the second-order rise of the loss for this very perturbation (Schraudolph,
2002, for the Gauss-Newton matrix). Sums of ``s`` over layers give the same form for whole configs, so that all
pairwise interactions come with the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.bank import QuantizerBank, layer_scheme
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.problem import Floats
from mpq.progress import progress_bar
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
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
        A table whose loss is in the unit of ``loss``, standard errors over samples, and the interaction factor.

    Raises:
        DataError: If a gradient or an error is NaN or infinite, naming the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = 0.0
    per_batch: list[Tensor] = []
    for batch in progress_bar(data.batches, "influence", progress):
        collector = _Collector(view, space, bank, batch.size)
        output = collector.forward(batch)
        probes = loss.all_probes(output, batch) if exact else _draws(loss, output, batch, draws, generator)
        gradients = collector.backward(probes)
        per_batch.append(collector.project(gradients) * (1.0 if exact else draws**-0.5))
        # A backward pass counts as two forward passes; each layer runs once per scheme and once in float.
        passes += batch.size / data.num_samples * (1 + 2 * len(gradients) + len(space.schemes) + 1)
    return _table(space, data.num_samples, per_batch, passes, draws, exact, loss.name)


def _draws(loss: OutputLoss, output: Any, batch: Batch, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(draws):
        yield loss.probe(output, batch, generator)


def _table(
    space: SearchSpace,
    samples: int,
    per_batch: list[Tensor],
    passes: float,
    draws: int,
    exact: bool,
    loss: str,
) -> SensitivityTable:
    """Join the effects ``[rows, draws, layers, schemes]`` of all batches; layers become groups."""
    column = {layer.name: i for i, layer in enumerate(space.layers)}
    members = [[column[x.name] for x in g.layers] for g in space.groups]
    effects = [torch.stack([rows[:, :, m].sum(2) for m in members], 2).numpy() for rows in per_batch]
    # Each row's share of the mean loss: half its squared effects, summed over draws [R, G, S].
    shares: Floats = np.concatenate([0.5 * np.square(e).sum(1) for e in effects])
    factor = np.concatenate([e.reshape(-1, *e.shape[2:]) for e in effects]) / samples**0.5
    rows = len(shares)
    stderr = shares.std(0, ddof=1) * rows**0.5 / samples if rows > 1 else np.full(shares.shape[1:], np.nan)
    provenance = {
        "estimator": "influence",
        "draws": "exact" if exact else draws,
        "loss": loss,
        "rows": rows,
        "forward_passes": round(passes, 2),
    }
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    return SensitivityTable(*names, shares.sum(0) / samples, stderr, factor, provenance)


class _Collector:
    """Hooks of one batch: keeps layer inputs on the way forward, projects all errors after the way back.

    Args:
        view: The model.
        space: Groups and schemes.
        bank: Quantized layers.
        batch_size: Samples of the batch.
    """

    def __init__(self, view: ModelView, space: SearchSpace, bank: QuantizerBank, batch_size: int) -> None:
        self.view, self.space, self.bank, self.batch_size = view, space, bank, batch_size
        self._calls: list[tuple[LayerSpec, Any, Any, list[Tensor]]] = []

    def forward(self, batch: Batch) -> Any:
        """Run the model with hooks; outputs of all layers require gradients."""
        hooks = [
            self.view.layers[x.name].register_forward_hook(self._hook(x), with_kwargs=True) for x in self.space.layers
        ]
        with self.view.hooked(hooks):
            return self.view(batch)

    def _hook(self, layer: LayerSpec) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            # Models may overwrite a layer's input or output later on, so both are kept as copies. The first
            # layers see no gradient: their outputs start the record.
            kept = map_tensors(lambda t: t.detach().clone(), args)
            outputs = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors_in(output)]
            self._calls.append((layer, kept, kwargs, outputs))
            copies = iter(t.clone() for t in outputs)
            return map_tensors(lambda t: next(copies), output)

        return hook

    def backward(self, probes: Iterator[Tensor]) -> list[list[Tensor]]:
        """Gradients of each probe at the outputs of all calls."""
        outputs = [t for *_, tensors in self._calls for t in tensors]
        return [
            list(torch.autograd.grad(probe, outputs, retain_graph=True, allow_unused=True, materialize_grads=True))
            for probe in probes
        ]

    @torch.no_grad()
    def project(self, gradients: list[list[Tensor]]) -> Tensor:
        """Effects ``[rows, draws, layers, schemes]``; rows are samples, or one row if a layer mixed its samples."""
        by_layer: dict[str, list[Tensor]] = {x.name: [] for x in self.space.layers}
        position = 0
        for layer, args, kwargs, outputs in self._calls:
            end = position + len(outputs)
            stacked = [torch.stack([g[i] for g in gradients]) for i in range(position, end)]
            by_layer[layer.name] += self._call_effects(layer, args, kwargs, stacked)
            position = end
        mixed = self.batch_size > 1 and any(len(e) == 1 for parts in by_layer.values() for e in parts)
        rows = 1 if mixed else self.batch_size
        nothing = torch.zeros(rows, len(gradients), len(self.space.schemes), dtype=torch.float64)
        summed = [
            sum(((e.sum(0, keepdim=True) if mixed else e) for e in parts), nothing) for parts in by_layer.values()
        ]
        return torch.stack(summed, 2)

    def _call_effects(self, layer: LayerSpec, args: Any, kwargs: Any, gradients: list[Tensor]) -> list[Tensor]:
        """Effects ``[rows, draws, schemes]`` of one call, one entry per output tensor."""
        exact = tensors_in(self.bank.run(layer, None, args, kwargs))
        columns: list[list[Tensor]] = [[] for _ in exact]
        schemes = [layer_scheme(layer, s) for s in self.space.schemes]
        inputs = {a: self.bank.inputs(layer, a, args) for a in {s.activation for s in schemes}}
        for scheme in schemes:
            rounded = tensors_in(self.bank.run(layer, scheme.weight, inputs[scheme.activation], kwargs))
            for column, g, r, e in zip(columns, gradients, rounded, exact, strict=True):
                column.append(_inner_products(g, r - e, self.batch_size))
        effects = [torch.stack(column, -1) for column in columns]
        if not all(torch.isfinite(e).all() for e in effects):
            raise DataError(f"the influence of layer {layer.name!r} is NaN or infinite; check its inputs and the loss")
        return effects


def _inner_products(gradient: Tensor, error: Tensor, batch_size: int) -> Tensor:
    """Inner products of gradient ``[draws, ...]`` and error ``[...]`` by sample ``[rows, draws]``, in float64.

    Rows are samples where the first or second axis is the batch, or the first is the batch times something (windows
    or tokens of one sample in a row); else one row for the whole batch.
    """
    if error.dim() > 1 and len(error) != batch_size and error.shape[1] == batch_size:
        gradient, error = gradient.transpose(1, 2), error.transpose(0, 1)
    rows = batch_size if error.dim() and len(error) and len(error) % batch_size == 0 else 1
    flat = gradient.reshape(len(gradient), rows, -1)
    return torch.einsum("krd,rd->rk", flat, error.reshape(rows, -1)).double().cpu()
