"""Which axis of a layer's output is the batch, and whether gradients reach the layer: found by running the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpq.calibration import Batch
from mpq.errors import GraphError
from mpq.trees import tensors_in
from mpq.view import ModelView

# (layer name, number of the call, number of the output tensor)
OutputKey = tuple[str, int, int]
# "rows": the first axis is the batch, or the batch times something with the samples in order; "second": the second axis
# is the batch; "mixed": neither, so that an output belongs to the whole batch.
Layouts = dict[OutputKey, str]

_TOLERANCE = 1e-3  # other batch sizes may run other kernels


def find_layouts(view: ModelView, names: Iterable[str], batch: Batch) -> Layouts:
    """Run a batch with and without its last sample and compare each layer's outputs.

    Shapes alone are ambiguous (tokens may be as many as samples), and position embeddings or routed tokens belong to no
    sample. Two forward passes.

    Args:
        view: The model.
        names: Layers to watch.
        batch: A batch of at least two samples.
    """
    names = list(names)
    whole = _outputs(view, names, batch)
    shorter = batch.without_last()
    try:
        less = {} if shorter is None else _outputs(view, names, shorter)
    except Exception:  # a model that takes this batch size only: shapes must do
        less = {}
    return {key: _layout(t, less.get(key), batch.size) for key, t in whole.items()}


def _outputs(view: ModelView, names: list[str], batch: Batch) -> dict[OutputKey, Tensor]:
    found: dict[OutputKey, Tensor] = {}
    calls: dict[str, int] = dict.fromkeys(names, 0)

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.update({(name, calls[name], i): t.detach().clone() for i, t in enumerate(tensors_in(output))})
            calls[name] += 1

        return keep

    with torch.no_grad(), view.hooked([view.layers[n].register_forward_hook(hook(n)) for n in names]):
        view(batch)
    return found


def _layout(whole: Tensor, less: Tensor | None, size: int) -> str:
    if less is None:
        return "rows" if whole.dim() and len(whole) == size else "mixed"
    if less.dim() != whole.dim():
        return "mixed"
    for axis, layout in ((0, "rows"), (1, "second")):
        if whole.dim() > axis and whole.shape[axis] * (size - 1) == less.shape[axis] * size:
            kept = whole.narrow(axis, 0, less.shape[axis])
            scale = float(kept.abs().max()) if kept.numel() else 0.0
            if kept.shape == less.shape and torch.allclose(kept, less, rtol=0, atol=_TOLERANCE * scale):
                return layout
    return "mixed"


def check_reached(view: ModelView, names: Iterable[str], batch: Batch) -> None:
    """Refuse layers that no gradient reaches although they change the output.

    Args:
        view: The model.
        names: Layers without gradient; one that does not change the output (an unused branch) is fine.
        batch: What to run.

    Raises:
        GraphError: Naming the first such layer.
    """
    with torch.no_grad():
        before = tensors_in(view(batch))
        for name in names:
            weight = view.weight(name)
            with view.swapped({name: weight * 1.5 + weight.abs().mean()}):
                after = tensors_in(view(batch))
            if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(after, before, strict=True)):
                raise GraphError(
                    f"no gradient reaches layer {name!r} although it changes the output: the model's forward uses "
                    f"torch.no_grad() or detach() after it. Remove that, or leave the layer float with skip=[{name!r}]"
                )
