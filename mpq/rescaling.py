"""Rescaling of channels between layers before they are rounded, which leaves what the network computes.

Whether it does is tried with factors that are powers of two: these change no bit of any product or sum, so that outputs
that are not equal bit for bit tell that something else reads a channel, however little comes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mpq.calibration import Batch, Calibration, read_batches
from mpq.errors import DataError, GraphError
from mpq.input_statistics import gather
from mpq.quantizers.blocks import work_dtype
from mpq.quantizers.equalization import cross_layer_scales, smooth_scales
from mpq.trees import tensors_in
from mpq.view import Forward, ModelView, channels_first, plain, preserved_state
from mpq.warning import warn

Layer = nn.Linear | _ConvNd

# What commutes with positive factors of each channel.
_HOMOGENEOUS_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
_HOMOGENEOUS_CALLS = {torch.relu, F.relu, F.leaky_relu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, "relu"}
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def equalize(
    model: nn.Module,
    pairs: Iterable[tuple[str, str]] | None = None,
    sweeps: int = 3,
    *,
    calib: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Give neighbouring layers equal ranges in each channel between them (Nagel et al., 2019, section 4.1).

    Only layers count between which there is nothing but ReLU, pooling and the like; batch norms must be folded first
    (`torch.fx.experimental.optimization.fuse`). The outputs stay as they are. No forward pass over the
    data; pairs are checked by one batch, which torch.fx's own do not need.

    Args:
        model: A float model.
        pairs: Names of layers of which the second reads the first; None finds them with torch.fx.
        sweeps: Over all pairs: a layer may be in two of them.
        calib: Calibration batches, of which the first is run. Needed for pairs that torch.fx does not find.
        forward: As for `mpq.allocate`.

    Raises:
        GraphError: If torch.fx can't trace the model and no pairs are given, or a pair does not fit together, shares a
            weight, or changes the outputs.
        DataError: If ``calib`` is empty.
    """
    equalized = copy.deepcopy(plain(model))
    found = layer_pairs(equalized) if pairs is None else tuple((first, second) for first, second in pairs)
    chosen = {names: _pair(equalized, names) for names in found}
    with preserved_state(seed=0), torch.no_grad():
        _check_pairs(equalized, chosen, pairs is not None, calib, forward)
        for _ in range(sweeps):
            for names in found:
                first, second = chosen[names]
                outputs, inputs = channels_first(first, first.weight), _inputs_first(second, second.weight)
                _rescale(first, second, cross_layer_scales(outputs, inputs))
    return equalized


def _pair(model: nn.Module, names: tuple[str, str]) -> tuple[Layer, Layer]:
    modules = dict(model.named_modules())
    first, second = (modules.get(n) for n in names)
    if not isinstance(first, Layer) or not isinstance(second, Layer):
        raise GraphError(f"{names} are not two linear layers or convolutions of the model")
    if first is second:
        raise GraphError(f"{names} are the same layer")
    held = [id(p) for m in modules.values() for p in m.parameters(recurse=False)]
    for name, layer in zip(names, (first, second), strict=True):
        if any(held.count(id(p)) > 1 for p in layer.parameters(recurse=False)):
            raise GraphError(f"{names}: {name!r} shares its weight or bias with another layer, which would change too")
    outputs, inputs = len(channels_first(first, first.weight)), len(_inputs_first(second, second.weight))
    if outputs != inputs:
        raise GraphError(f"{names[0]!r} has {outputs} output channels, {names[1]!r} {inputs} input channels")
    return first, second


def _check_pairs(
    model: nn.Module,
    pairs: dict[tuple[str, str], tuple[Layer, Layer]],
    given: bool,
    calib: Iterable[Any] | None,
    forward: Forward | None,
) -> None:
    """Refuse pairs that change the outputs."""
    if calib is None:
        unknown = sorted(pairs.keys() - set(_traced_pairs(model))) if given else []
        if unknown:
            raise GraphError(
                f"torch.fx does not find that {unknown[0][1]!r} alone reads {unknown[0][0]!r} through what commutes "
                "with factors; pass calib=, of which one batch is run to check it"
            )
        return
    batch = next(iter(read_batches(calib, ModelView(model, forward).read)), None)
    if batch is None:
        raise DataError("the data is empty: no batch with at least one sample")
    with evaluating(model):
        unchanged = _Unchanged(model, batch, forward)
        for names, (first, second) in pairs.items():
            channels = len(channels_first(first, first.weight))
            if not unchanged(partial(_rescale, first, second), channels, (first, second)):
                raise GraphError(
                    f"{names}: the outputs change; something else reads {names[0]!r}, or what is between "
                    "does not commute with factors"
                )


def _traced_pairs(model: nn.Module) -> tuple[tuple[str, str], ...]:
    try:
        return layer_pairs(model)
    except GraphError:
        return ()


class _Unchanged:
    """Whether a model puts out what it did.

    Args:
        model: In evaluation mode.
        batch: What is run.
        forward: As for `mpq.allocate`.
    """

    def __init__(self, model: nn.Module, batch: Batch, forward: Forward | None) -> None:
        self.model, self.batch, self.forward = model, batch, forward
        self.expected = self._outputs()

    def __call__(self, rescale: Callable[[Tensor], None], channels: int, modules: Iterable[nn.Module]) -> bool:
        """Try factors of one half and two; the modules' parameters are restored."""
        held = [p for m in modules for p in m.parameters(recurse=False)]
        before = [p.clone() for p in held]
        rescale(2.0 ** (torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(0)) * 2 - 1))
        found = self._outputs()
        for p, kept in zip(held, before, strict=True):
            p.copy_(kept)
        return len(found) == len(self.expected) and all(map(torch.equal, self.expected, found))

    def _outputs(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [t.clone() for t in tensors_in(run_on(self.model, self.batch, self.forward))]


def _rescale(first: Layer, second: Layer, scales: Tensor) -> None:
    """Divide the channels between two layers by factors, in place."""
    outputs, inputs = channels_first(first, first.weight), _inputs_first(second, second.weight)
    scales = scales.to(outputs)
    first.weight.copy_(channels_first(first, outputs / scales.view(-1, *[1] * (outputs.dim() - 1))))
    if first.bias is not None:
        first.bias.div_(scales)
    second.weight.copy_(_inputs_first(second, inputs * scales.view(-1, *[1] * (inputs.dim() - 1))))


def _inputs_first(layer: Layer, weight: Tensor) -> Tensor:
    """A weight with its input channels as first axis; applied twice it gives the weight back."""
    if isinstance(layer, nn.Linear):
        return weight.T
    if isinstance(layer, _ConvTransposeNd):
        return weight
    return weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def layer_pairs(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of layers that `equalize` can treat, in the order of the forward pass.

    Raises:
        GraphError: If torch.fx can't trace the model.
    """
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception as error:
        raise GraphError(
            f"torch.fx can't trace {type(model).__name__} ({type(error).__name__}: {error}); "
            "pass pairs=[('first layer', 'second layer'), ...]"
        ) from error
    modules = dict(model.named_modules())
    targets = [n.target for n in nodes if n.op == "call_module"]
    weights = [id(m.weight) for m in modules.values() if isinstance(m, Layer)]

    def alone(name: str) -> bool:
        """Called once, with a weight of its own."""
        layer = modules[name]
        return isinstance(layer, Layer) and targets.count(name) == 1 and weights.count(id(layer.weight)) == 1

    found = []
    for node in nodes:
        if node.op == "call_module" and alone(node.target):
            reader = _reader(node, modules)
            if reader is not None and alone(reader):
                found.append((node.target, reader))
    return tuple(found)


def _reader(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The layer that alone reads a node's output, through nothing but what commutes with factors."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Layer):
            return str(node.target)
        through = isinstance(module, _HOMOGENEOUS_MODULES) or (module is None and node.target in _HOMOGENEOUS_CALLS)
        if not through:
            return None
    return None


def smooth(model: nn.Module, calib: Iterable[Any], *, alpha: float = 0.5, forward: Forward | None = None) -> nn.Module:
    """Move outliers of inputs into the weights of the linear layers behind a norm (Xiao et al., SmoothQuant, 2023).

    The norm's weight and bias are divided by a factor of each channel, the layers' columns multiplied. Norms whose
    output is read by anything else stay as they are; one batch for each finds them: outputs must not change. Besides
    that one forward pass over the data. Where nothing can be moved, a warning says so.

    Args:
        model: A float model.
        calib: Calibration batches.
        alpha: How much of the difficulty moves from inputs to weights.
        forward: As for `mpq.allocate`.

    Raises:
        GraphError: If the model has no layer with weights, or one of them holds NaN or infinity.
        DataError: If there is no data, it does not fit the model, or it or the input of a layer behind a norm holds NaN
            or infinity.
    """
    smoothed = copy.deepcopy(plain(model))
    readers: dict[nn.Module, dict[str, nn.Linear]] = {}
    made: dict[int, tuple[Tensor, nn.Module]] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        made[id(output)] = output, module  # held, so that no other tensor gets its number

    def find(name: str) -> Any:
        def hook(module: nn.Linear, args: Any, kwargs: Any) -> None:
            for x in tensors_in((args, kwargs)):
                if id(x) in made:
                    readers.setdefault(made[id(x)][1], {})[name] = module

        return hook

    with preserved_state(seed=0), torch.no_grad(), evaluating(smoothed):
        view = ModelView(smoothed, forward)
        data = Calibration.load(calib, view.read)
        hooks = [m.register_forward_hook(keep) for m in smoothed.modules() if isinstance(m, _NORMS)]
        linear = {n: m for n, m in smoothed.named_modules() if isinstance(m, nn.Linear)}
        hooks += [m.register_forward_pre_hook(find(n), with_kwargs=True) for n, m in linear.items()]
        with view.hooked(hooks):
            run_on(smoothed, data.batches[0], forward)
        made.clear()
        names = [n for found in readers.values() for n in found]
        stats = gather(view, data, names, progress=False) if names else {}
        unchanged = _Unchanged(smoothed, data.batches[0], forward)
        chosen: dict[nn.Module, list[nn.Linear]] = {}
        for norm, layers in readers.items():
            weight = norm._parameters.get("weight")
            behind = list(layers.values())
            if weight is None or weight.shape != (behind[0].in_features,):
                continue
            if not unchanged(partial(_fold, norm, behind), len(weight), (norm, *behind)):
                continue
            chosen[norm] = behind
        for norm, behind in chosen.items():
            largest = torch.stack([stats[name].largest.amax(0) for name in readers[norm]]).amax(0)
            weights = torch.cat([x.weight for x in behind])
            _fold(norm, behind, smooth_scales(largest, weights.to(work_dtype(weights)), alpha))
    if not chosen:
        warn("smooth changed nothing: there is no norm with a weight that only linear layers read")
    return smoothed


def _fold(norm: nn.Module, layers: list[nn.Linear], scales: Tensor) -> None:
    """Move factors from a norm into the layers behind it, in place."""
    for p in norm.parameters(recurse=False):
        p.copy_(p.to(work_dtype(p)) / scales.to(p.device))
    for layer in layers:
        layer.weight.copy_(layer.weight.to(work_dtype(layer.weight)) * scales.to(layer.weight.device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in its own again."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_on(model: nn.Module, batch: Batch, forward: Forward | None) -> Any:
    """What a model puts out."""
    batch = batch.to(next(model.parameters()).device)
    return model(*batch.args, **batch.kwargs) if forward is None else forward(model, batch.raw)
