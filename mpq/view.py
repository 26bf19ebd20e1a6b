"""A working view of a model: its own module tree on the same weights, so that the original is never touched."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mpq.attention import PackedProjection, expand_attention
from mpq.calibration import Batch, labels_of, make_batch
from mpq.errors import DataError, GraphError, MpqError
from mpq.trees import tensors_in

Forward = Callable[[nn.Module, Any], Any]
# A module, or the path of an ONNX file.
Network = nn.Module | str | os.PathLike[str]

# Quantizable modules and their op names. Subclasses count as well.
QUANTIZABLE: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    PackedProjection: "attention_in_proj",
}


def op_of(module: nn.Module) -> str | None:
    """Op name of a quantizable module, else None."""
    return next((op for cls, op in QUANTIZABLE.items() if isinstance(module, cls)), None)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The module's weight if it is a plain parameter (not computed by a parametrization), else None."""
    return module._parameters.get("weight")


def has_weight(module: nn.Module) -> bool:
    """Whether the module has a plain weight with something in it."""
    weight = own_weight(module)
    return weight is not None and weight.numel() > 0


def plain(model: Network) -> nn.Module:
    """The module itself where ``torch.compile`` wrapped it, or what an ONNX file holds.

    Raises:
        GraphError: If it is no module, or a file that can't be read.
    """
    if isinstance(model, str | os.PathLike):
        from mpq.onnx_in import load_onnx

        return load_onnx(model)
    if not isinstance(model, nn.Module):
        # Callers without a type checker pass anything, which the annotation calls unreachable.
        hint = "; a state dict holds weights only, load it into the model" if isinstance(model, Mapping) else ""  # type: ignore[unreachable]
        raise GraphError(f"the model must be a torch.nn.Module or an ONNX file, not a {type(model).__name__}{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise GraphError("a TorchScript module has no layers to replace; pass the module that it was made from")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def channels_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight with its output channels as first axis; applied twice it gives the weight back.

    Transposed convolutions keep ``[in, out / groups, ...]``; all other layers have their output channels first.
    """
    if not isinstance(module, _ConvTransposeNd):
        return weight
    by_group = weight.reshape(module.groups, -1, *weight.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)


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

    def __init__(self, model: Network, forward: Forward | None = None) -> None:
        self.module = share_weights(plain(model))
        self._forward = forward
        self.layers: dict[str, nn.Module] = {
            name: m for name, m in self.module.named_modules() if op_of(m) and has_weight(m)
        }
        if not self.layers:
            kinds = sorted({type(m).__name__ for m in self.module.modules()})
            raise GraphError(
                "the model has no quantizable layer (Conv, ConvTranspose, Linear, Embedding or "
                f"MultiheadAttention with plain weights); it holds {', '.join(kinds[:8])}"
            )
        for name in self.layers:
            if self.weight(name).is_meta:
                raise GraphError(f"the weight of layer {name!r} is on the meta device, without values; load it first")
            if not torch.isfinite(self.weight(name)).all():
                raise GraphError(f"the weight of layer {name!r} holds NaN or infinity")
        self.device = next(p.device for p in self.module.parameters())

    def twin(self) -> ModelView:
        """Another view of the same weights, for another thread: hooks and swapped weights are its own."""
        return ModelView(self.module, self._forward)

    def read(self, raw: Any) -> Batch:
        """A `Batch` of what a data iterable yields.

        Raises:
            DataError: If it does not fit the model.
        """
        if self._forward is None:
            return make_batch(raw, self.module)
        with torch.no_grad():  # only the output tells how many samples a batch of any kind holds
            outputs = [t for t in tensors_in(self(Batch((raw,), {}, 1, None, raw))) if t.dim()]
        return Batch((raw,), {}, len(outputs[0]) if outputs else 1, labels_of(raw), raw)

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
        except MpqError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in batch.tensors())
            labels = " (its labels were not passed on)" if batch.labels is not None else ""
            if isinstance(self.module, fx.GraphModule):
                names = [str(n.target) for n in self.module.graph.nodes if n.op == "placeholder"]
                labels += f" for the inputs {', '.join(names)}"
            fix = (
                "Batches may be tensors, (inputs, labels) tuples or dicts of keyword arguments; for anything "
                "else pass forward=lambda model, batch: ..."
            )
            dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
            if "type" in str(error) and dtype not in {t.dtype for t in batch.tensors()}:
                fix = f"The model's weights are {dtype}: convert the batch, such as x.to({dtype})"
            raise DataError(
                f"the model can't run a batch of inputs [{shapes}]{labels}: {type(error).__name__}: {error}. {fix}"
            ) from error

    @contextmanager
    def swapped(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Run with other weights in some layers; layers that share a weight change together."""
        originals = {name: own_weight(module) for name, module in self.layers.items()}
        # Plain tensors stand in for parameters: nothing here is trained.
        changed: dict[int, Any] = {id(originals[name]): weight for name, weight in weights.items()}
        touched = [name for name, original in originals.items() if id(original) in changed]
        try:
            for name in touched:
                self.layers[name]._parameters["weight"] = changed[id(originals[name])]
            yield
        finally:
            for name in touched:
                self.layers[name]._parameters["weight"] = originals[name]

    @contextmanager
    def hooked(self, hooks: list[Any]) -> Iterator[None]:
        """Remove hook handles at the end, whatever happens."""
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy with explicit attentions.

    Raises:
        GraphError: If a part of the model can't be copied.
    """
    try:
        return expand_attention(copy.deepcopy(model, memo))
    except Exception as error:
        raise GraphError(
            f"the model can't be copied ({type(error).__name__}: {error}). Pruning and old-style weight_norm keep "
            "computed weights: make them permanent first (torch.nn.utils.prune.remove, remove_weight_norm)"
        ) from error


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the module tree in evaluation mode that shares the parameters' storage.

    Raises:
        GraphError: If a part of the model can't be copied.
    """
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise GraphError("the model has lazy layers without weights yet; run it on one batch first")
    # Autograd refuses tensors made in inference mode, so those are copied.
    values = {id(p): p.detach().clone() if p.is_inference() else p.detach() for p in model.parameters()}
    copied = copy_model(model, {key: nn.Parameter(v, requires_grad=False) for key, v in values.items()}).eval()
    for module in copied.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
        weight = own_weight(module)
        if weight is not None and getattr(module, "max_norm", None) is not None:
            weight.data = weight.data.clone()  # embeddings with max_norm renormalize their weight in use
    return copied


@contextmanager
def preserved_state(seed: int) -> Iterator[None]:
    """Own random state (seeded), grad mode and precision: neither what runs inside nor the caller's modes leak."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise MpqError(f"seed must be a whole number, not {seed!r}") from None
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        torch.random.fork_rng(),  # of the CPU and of every accelerator in use
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(accelerator, enabled=False),
    ):
        torch.manual_seed(seed)
        yield
