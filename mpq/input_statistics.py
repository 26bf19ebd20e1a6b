"""Statistics of layers' inputs, gathered in one forward pass, for recipes that round with an eye to the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mpq.attention import PackedProjection
from mpq.calibration import Calibration
from mpq.errors import DataError
from mpq.progress import progress_bar
from mpq.quantizers.blocks import CACHED, work_dtype
from mpq.quantizers.statistics import LayerStats
from mpq.trees import tensors_in
from mpq.view import ModelView, own_weight

_CHUNK = 2**23  # elements of unfolded inputs at a time
_PLACES = 2**14  # of a convolution's windows in a batch, evenly spread over it: neighbours have little news
_TOKEN_WEIGHTS = 1.0, 3.0  # of the smallest and the largest norm, as RSQ's code has them


class _Sums:
    """Running sums over the rows that meet one weight."""

    def __init__(self) -> None:
        self.hessian = self.magnitude = self.largest = torch.zeros(())
        self.weight, self.rows, self.seen = 0.0, 0, 0

    def add(self, rows: Tensor, by_token: bool, magnitudes: bool = True) -> None:
        """Take in rows ``[groups, rows, in]``, their magnitudes included or not."""
        if rows.shape[1] == 0:
            return
        if magnitudes:
            magnitude = rows.abs()
            self.add_magnitudes(magnitude.amax(1), magnitude.sum(1), rows.shape[1])
        self.rows += rows.shape[1]
        if by_token:
            weights = token_weights(rows)
            self.weight += float(weights.sum())
            rows = rows * weights.sqrt()[:, None]
        else:
            self.weight += rows.shape[1]
        self.hessian = self.hessian + rows.transpose(1, 2) @ rows

    def add_magnitudes(self, largest: Tensor, total: Tensor, count: int) -> None:
        """Take in the largest magnitudes ``[groups, in]`` of some rows, and the sums of all."""
        self.largest = torch.maximum(self.largest, largest)
        self.magnitude = self.magnitude + total
        self.seen += count

    def result(self) -> LayerStats | None:
        """Means; None if there were no rows."""
        if not self.rows:
            return None
        return LayerStats(self.hessian / self.weight, self.magnitude / self.seen, self.largest, self.rows)


def token_weights(rows: Tensor) -> Tensor:
    """How much each token counts: by its norm, from 1 for the least in the batch to 3 (Sung et al., RSQ, 2025).

    Args:
        rows: ``[groups, rows, in]``.

    Returns:
        ``[rows]``.
    """
    norms = rows.square().sum((0, 2)).sqrt()
    low, high = norms.aminmax()
    least, most = _TOKEN_WEIGHTS
    return least + (most - least) * (norms - low) / torch.where(high > low, high - low, 1)


def gather(
    view: ModelView, data: Calibration, names: Iterable[str], by_token: bool = False, progress: bool = True
) -> dict[str, LayerStats]:
    """Statistics of the inputs of layers, over all of their calls: one forward pass of the float model.

    Layers that share a weight share the statistics of all inputs that meet it. Each needs memory for one square matrix
    of its inputs.

    Args:
        view: The model.
        data: Calibration data.
        names: Layers; embeddings are left out.
        by_token: Weigh rows by their norms (`token_weights`).
        progress: Show a bar.

    Returns:
        Statistics of the layers that ran.

    Raises:
        DataError: If an input holds NaN or infinity.
    """
    wanted = {id(own_weight(view.layers[n])) for n in names}
    sums = {
        name: (id(own_weight(m)), m)
        for name, m in view.layers.items()
        if id(own_weight(m)) in wanted and not isinstance(m, nn.Embedding)
    }
    found: dict[int, _Sums] = {weight: _Sums() for weight, _ in sums.values()}

    mask: Tensor | None = None

    def check(name: str, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise DataError(f"the input of layer {name!r} holds NaN or infinity")

    def hook(name: str) -> Any:
        def update(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = tensors_in((args, kwargs))
            into, windows = found[sums[name][0]], _windows(module, inputs)
            thinned = windows is not None and windows.step > 1
            if windows is not None and thinned:  # what is largest must be seen wherever it is
                magnitudes = windows.magnitudes()
                check(name, magnitudes[0])
                into.add_magnitudes(*magnitudes)
            for rows in input_rows(module, inputs, mask) if windows is None else windows.rows():
                if not thinned:
                    check(name, rows)
                into.add(rows, by_token, not thinned)

        return update

    hooks = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, (_, m) in sums.items()]
    with view.hooked(hooks), torch.no_grad():
        for batch in progress_bar(data.batches, "input statistics", progress):
            mask = batch.kwargs.get("attention_mask")
            view(batch)
    results = {weight: s.result() for weight, s in found.items()}
    return {name: s for name, (weight, _) in sums.items() if (s := results[weight]) is not None}


def input_rows(module: nn.Module, inputs: list[Tensor], mask: Tensor | None = None) -> Iterable[Tensor]:
    """What meets the weight ``[out, in]`` of a layer (`channels_first`, flattened), as ``[groups, rows, in]``.

    Args:
        module: A convolution, transposed or not, a linear layer or an attention's packed projection.
        inputs: The tensors it is called with.
        mask: Which tokens ``[batch, tokens]`` are none but padding (0) and stay out, where inputs have these axes.
    """
    windows = _windows(module, inputs)
    if windows is not None:
        yield from windows.rows()
        return
    inputs = [x for x in inputs if x.is_floating_point()]
    alike = len({id(x) for x in inputs}) == 1
    inputs = [x.detach().to(work_dtype(x)) for x in inputs]
    if isinstance(module, PackedProjection) and not alike:  # thirds of the outputs have inputs of their own
        flat = [tokens_of(x, mask) for x in inputs]
        rows = max(len(x) for x in flat)
        yield torch.stack([F.pad(x, (0, 0, 0, rows - len(x))) for x in flat])
    else:
        yield tokens_of(inputs[0], mask)[None]


def tokens_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """All rows ``[rows, in]`` but those of padding."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and x.dim() > 2 and x.shape[:2] == mask.shape:
        x = x[mask.to(x.device) != 0]
    return x.reshape(-1, x.shape[-1])


def _windows(module: nn.Module, inputs: list[Tensor]) -> _Windows | None:
    """Those of a convolution; None for other layers."""
    if not isinstance(module, _ConvNd):
        return None
    x = next(t for t in inputs if t.is_floating_point()).detach()
    x = x.to(work_dtype(x))
    return _Windows(module, x if x.dim() == len(module.kernel_size) + 2 else x[None])


class _Windows:
    """The windows under a convolution's kernel.

    Attributes:
        step: One in so many is taken.
    """

    def __init__(self, module: _ConvNd, x: Tensor) -> None:
        self.x, self.stride = _padded(module, x)
        self.groups, self.dilation = module.groups, module.dilation
        each = zip(self.x.shape[2:], module.kernel_size, module.dilation, self.stride, strict=True)
        self.sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in each]
        self.offsets = list(product(*(range(k) for k in module.kernel_size)))
        if isinstance(module, _ConvTransposeNd):
            self.offsets.reverse()
        self.count = len(x) * math.prod(self.sizes)
        self.step = max(1, -(-self.count // _PLACES))
        # Without a common divisor, the same row, column or sample is not met over and over.
        while self.step > 1 and math.gcd(self.step, self.count) > 1:
            self.step += 1

    def rows(self) -> Iterator[Tensor]:
        """``[groups, rows, in / groups * positions]``, some samples at a time."""
        if self.step == 1:
            taken = self.x[0].numel() * len(self.offsets) if len(self.x) else 1
            for samples in torch.split(self.x, max(1, _CHUNK // max(taken, 1))):
                # [batch, channels, positions, places]
                windows = torch.stack([samples[self._places(o)] for o in self.offsets], 2).flatten(3)
                parts = torch.unflatten(windows, 1, (self.groups, -1)).permute(1, 0, 4, 2, 3)
                yield parts.reshape(self.groups, -1, parts.shape[3] * parts.shape[4])
            return
        chosen = torch.arange(0, self.count, self.step, device=self.x.device)
        for places in torch.split(chosen, max(1, _CHUNK // (self.x.shape[1] * len(self.offsets)))):
            sample, *at = torch.unravel_index(places, (len(self.x), *self.sizes))
            under = [self.x[(sample, slice(None), *self._shifted(at, o))] for o in self.offsets]  # [places, channels]
            yield torch.stack(under, 2).reshape(len(places), self.groups, -1).transpose(0, 1).contiguous()

    def magnitudes(self) -> tuple[Tensor, Tensor, int]:
        """Of all windows: the largest of each input and their sums, both ``[groups, in]``, and how many windows."""
        largest = total = torch.zeros_like(self.x[0])
        for samples in torch.split(self.x, max(1, CACHED // self.x[0].numel())):
            magnitude = samples.abs()
            largest, total = torch.maximum(largest, magnitude.amax(0)), total + magnitude.sum(0)
        peaks = [largest[self._places(o)].flatten(1).amax(1) for o in self.offsets]
        sums = [total[self._places(o)].flatten(1).sum(1) for o in self.offsets]
        most, added = (torch.stack(x, 1).reshape(self.groups, -1) for x in (peaks, sums))
        return most, added, self.count

    def _places(self, offset: tuple[int, ...]) -> tuple[Any, ...]:
        """What is under one position of the kernel, in all windows."""
        each = zip(offset, self.dilation, self.sizes, self.stride, strict=True)
        return (..., *(slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in each))

    def _shifted(self, at: Sequence[Tensor], offset: tuple[int, ...]) -> list[Any]:
        """Where one position of the kernel is in some windows."""
        return [a * s + o * d for a, o, d, s in zip(at, offset, self.dilation, self.stride, strict=True)]


def _padded(module: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Inputs with their padding, and the stride of the windows over them."""
    if not isinstance(module, _ConvTransposeNd):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, module._reversed_padding_repeated_twice, mode), module.stride
    # The same as a convolution of the input, spread out by zeros, with the mirrored kernel.
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)))
    every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in module.stride))
    spread[every] = x
    assert not isinstance(module.padding, str)
    around = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    pads = [(d * (k - 1) - p, d * (k - 1) - p + o) for k, d, p, o in around]
    return F.pad(spread, [n for pair in reversed(pads) for n in pair]), (1,) * len(pads)
