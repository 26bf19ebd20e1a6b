"""A working view of a model: its own module tree on the same weights, so that the original is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpq.attention import PackedProjection, expand_attention
from mpq.calibration import Batch
from mpq.errors import DataError, GraphError

Forward = Callable[[nn.Module, Any], Any]

# Quantizable modules: class -> (op, output-channel axis of the weight). Subclasses count as well.
QUANTIZABLE: dict[type[nn.Module], tuple[str, int]] = {
    nn.ConvTranspose1d: ("conv_transpose1d", 1),
    nn.ConvTranspose2d: ("conv_transpose2d", 1),
    nn.ConvTranspose3d: ("conv_transpose3d", 1),
    nn.Conv1d: ("conv1d", 0),
    nn.Conv2d: ("conv2d", 0),
    nn.Conv3d: ("conv3d", 0),
    nn.Linear: ("linear", 0),
    nn.Embedding: ("embedding", 0),
    PackedProjection: ("attention_in_proj", 0),
}


def op_of(module: nn.Module) -> tuple[str, int] | None:
    """Op name and channel axis of a quantizable module, else None."""
    return next((op for cls, op in QUANTIZABLE.items() if isinstance(module, cls)), None)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The module's weight if it is a plain parameter (not computed by a parametrization), else None."""
    return module._parameters.get("weight")


class ModelView:
    """Evaluation-mode copy of a model's modules that shares the weights.

    The parameters are the original's storage without gradients, the buffers are copies; in-place
    activations are switched off and attentions expanded. Hooks and swapped weights live here only.

    Attributes:
        module: The copy.
        layers: Name -> quantizable module, as named in the copy.
        device: Where the model is.

    Args:
        model: Any module.
        forward: Replaces the way a batch is given to the model: ``forward(module, raw_batch)``.

    Raises:
        GraphError: If the model can't be copied or has no quantizable layer.
    """

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        self.module = share_weights(model)
        self._forward = forward
        self.layers: dict[str, nn.Module] = {
            name: m for name, m in self.module.named_modules() if op_of(m) and own_weight(m) is not None
        }
        if not self.layers:
            kinds = sorted({type(m).__name__ for m in model.modules()})
            raise GraphError(
                "the model has no quantizable layer (Conv, ConvTranspose, Linear, Embedding or "
                f"MultiheadAttention with plain weights); it holds {', '.join(kinds[:8])}"
            )
        self.device = next(p.device for p in self.module.parameters())

    def weight(self, name: str) -> Tensor:
        """The float weight of a layer."""
        weight = own_weight(self.layers[name])
        assert weight is not None
        return weight

    def __call__(self, batch: Batch) -> Any:
        """Run the model on a batch.

        Raises:
            DataError: If the model can't take it.
        """
        batch = batch.to(self.device)
        try:
            if self._forward is not None:
                return self._forward(self.module, batch.raw)
            return self.module(*batch.args, **batch.kwargs)
        except DataError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in batch.tensors())
            raise DataError(
                f"the model can't run a batch of inputs [{shapes}]: {type(error).__name__}: {error}. "
                "Batches may be tensors, (inputs, labels) tuples or dicts of keyword arguments; for anything "
                "else pass forward=lambda model, batch: ..."
            ) from error

    @contextmanager
    def swapped(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Run with other weights in some layers."""
        originals = {name: own_weight(self.layers[name]) for name in weights}
        try:
            for name, weight in weights.items():
                self.layers[name]._parameters["weight"] = weight  # type: ignore[assignment]
            yield
        finally:
            for name, original in originals.items():
                self.layers[name]._parameters["weight"] = original

    @contextmanager
    def hooked(self, hooks: list[Any]) -> Iterator[None]:
        """Remove hook handles at the end, whatever happens."""
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the module tree in evaluation mode that shares the parameters' storage.

    Raises:
        GraphError: If a part of the model can't be copied.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise GraphError(f"the model can't be copied ({type(error).__name__}: {error})") from error
    copied = expand_attention(copied).eval()
    for module in copied.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    return copied


@contextmanager
def preserved_state(seed: int) -> Iterator[None]:
    """Own random state (seeded), own grad mode: neither what runs inside nor the caller's mode leaks."""
    # Without a list of devices, fork_rng keeps the state of every accelerator in use as well.
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        yield
