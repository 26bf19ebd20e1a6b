"""Which axis of a layer's output is the batch, and whether gradients reach the layer: found by running the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpq.calibration import Batch, Calibration
from mpq.errors import GraphError, MpqError
from mpq.losses import logits_of
from mpq.trees import tensors_in
from mpq.view import ModelView, preserved_state

# (layer name, number of the call, number of the output tensor); the model's own output has the name "".
OutputKey = tuple[str, int, int]
# ("rows", n): the first axis is the batch times n, with the samples in order; ("second", n): the second axis is;
# ("mixed", 0): neither, so that an output belongs to the whole batch.
Layout = tuple[str, int]
Layouts = dict[OutputKey, Layout]

MIXED: Layout = ("mixed", 0)
_TOLERANCE = 1e-3  # other batch sizes may run other kernels


def layouts_of(view: ModelView, names: Iterable[str], data: Calibration) -> tuple[Layouts, float]:
    """Where the samples are in every output, and the forward passes of finding out.

    The two largest batches must agree: routing may happen to keep the samples apart in one of them.

    Args:
        view: The model.
        names: Layers to watch.
        data: Nothing is run if all of its batches are single samples.
    """
    names, layouts = list(names), Layouts()
    tried = sorted((b for b in data.batches if b.size > 1), key=lambda b: -b.size)[:2]
    for batch in tried:
        found = find_layouts(view, names, batch)
        layouts = {k: v if layouts.get(k, v) == v else MIXED for k, v in found.items()}
    return layouts, 2 * sum(b.size for b in tried) / data.num_samples


def find_layouts(view: ModelView, names: Iterable[str], batch: Batch) -> Layouts:
    """Run a batch with and without its last sample and compare each layer's outputs.

    Shapes alone are ambiguous (tokens may be as many as samples), and position embeddings or routed tokens belong to no
    sample. Two forward passes, more only where a model refuses the shorter batch. If the model's own output mixes
    samples, so do all layers.

    Args:
        view: The model.
        names: Layers to watch.
        batch: A batch of at least two samples.
    """
    names = list(names)
    whole = _outputs(view, names, batch)
    found = _compared(view, names, batch, whole)
    if any(layout == MIXED for (name, *_), layout in found.items() if not name):
        return dict.fromkeys(found, MIXED)
    return found


def _compared(view: ModelView, names: list[str], batch: Batch, whole: dict[OutputKey, Tensor]) -> Layouts:
    # A tensor as long as the batch may be shared (an attention mask, say): then only the first one is cut.
    for shorter in (batch.without_last(), batch.without_last(first_only=True)):
        if shorter is None:  # tensors of an unknown structure: only an equal length tells
            return {k: ("rows", 1) if t.dim() and len(t) == batch.size else MIXED for k, t in whole.items()}
        try:
            less = _outputs(view, names, shorter)
        except MpqError:
            continue
        return {k: _layout(t, less.get(k), batch.size) for k, t in whole.items()}
    # The model takes this batch size only: change the last sample instead, which must change its own part only.
    other = _outputs(view, names, batch.with_last_replaced())
    return {k: _changed_part(t, other.get(k), batch.size) for k, t in whole.items()}


def _outputs(view: ModelView, names: list[str], batch: Batch) -> dict[OutputKey, Tensor]:
    """Outputs of all calls of the layers, and of the model."""
    found: dict[OutputKey, Tensor] = {}
    calls: dict[str, int] = dict.fromkeys(names, 0)

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.update({(name, calls[name], i): t.detach().clone() for i, t in enumerate(tensors_in(output))})
            calls[name] += 1

        return keep

    hooks = [view.layers[n].register_forward_hook(hook(n)) for n in names]
    with preserved_state(seed=0), torch.no_grad(), view.hooked(hooks):
        output = view(batch)
    logits = logits_of(output)
    outputs = tensors_in(output) if logits is None else [logits]
    found.update({("", 0, i): t for i, t in enumerate(outputs) if t.is_floating_point()})
    return found


def _layout(whole: Tensor, less: Tensor | None, size: int) -> Layout:
    """Where the samples are, given the output without the last of them."""
    if less is None or less.dim() != whole.dim():
        return MIXED
    for axis, name in ((0, "rows"), (1, "second")):
        if whole.dim() > axis and whole.shape[axis] * (size - 1) == less.shape[axis] * size:
            kept = whole.narrow(axis, 0, less.shape[axis])
            if kept.shape == less.shape and _equal(kept, less):
                return name, whole.shape[axis] // size
    return MIXED


def _changed_part(whole: Tensor, other: Tensor | None, size: int) -> Layout:
    """Where the samples are, given the output with another last sample."""
    if other is None or other.shape != whole.shape or _equal(whole, other):
        return MIXED
    for axis, name in ((0, "rows"), (1, "second")):
        if whole.dim() > axis and whole.shape[axis] and whole.shape[axis] % size == 0:
            each = whole.shape[axis] // size
            rest = whole.shape[axis] - each
            if (axis == 0 or each == 1) and _equal(whole.narrow(axis, 0, rest), other.narrow(axis, 0, rest)):
                return name, each
    return MIXED


def _equal(a: Tensor, b: Tensor) -> bool:
    scale = float(a.abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=_TOLERANCE * scale)


def check_reached(view: ModelView, names: Iterable[str], batches: Iterable[Batch]) -> None:
    """Refuse layers that no gradient reaches although they change the output.

    Args:
        view: The model.
        names: Layers without gradient; one that does not change the output (an unused branch) is fine.
        batches: What to run.

    Raises:
        GraphError: Naming the first such layer.
    """
    names = list(names)
    for batch in batches if names else ():
        before = _outputs(view, [], batch)
        for name in names:
            weight = view.weight(name)
            with view.swapped({name: weight * 1.5 + weight.abs().mean()}):
                after = _outputs(view, [], batch)
            if before.keys() != after.keys() or any(not torch.equal(after[k], t) for k, t in before.items()):
                raise GraphError(
                    f"no gradient reaches layer {name!r} although it changes the output: the model's forward uses "
                    f"torch.no_grad() or detach() after it. Remove that, or leave the layer float with skip=[{name!r}]"
                )
