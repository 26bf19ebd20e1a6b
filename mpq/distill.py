"""Calibration data made from the network itself, for users who have none to give.

`distilled_data` follows ZeroQ (Cai et al., 2020, eq. 3): synthetic inputs whose statistics at the input of every batch
norm match the mean and deviation that it kept of the training data. ``benchmarks/data_free.py`` measures what they are
worth. Three things differ from the authors' code:

- statistics are those of a batch, as in the paper, not of each image, which leaves the images free to differ;
- errors are relative to the deviation kept, so that every channel of every layer counts alike;
- pixels are not optimised one by one, which leaves most of the first noise in place: it is a Fourier basis with the
  spectrum of natural images (Olah et al., 2017, Feature Visualization) and a mix of the colours that are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from mpq.calibration import Batch
from mpq.errors import DataError, GraphError, MpqError
from mpq.progress import progress_bar
from mpq.trees import tensors_in
from mpq.view import Forward, ModelView, preserved_state

_EXPONENT = 1.25  # amplitudes of natural images fall as 1/f to 1/f^1.5
_COLOUR_SPEED = 3.0  # learning rate of colours over that of the noise: few parameters, and the rest builds on them


def distilled_data(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    samples: int = 64,
    batch_size: int = 32,
    iterations: int = 40,
    lr: float = 0.03,
    seed: int = 0,
    progress: bool = True,
    forward: Forward | None = None,
) -> list[Tensor]:
    """Synthetic inputs for a model without data: give them as ``calib`` to `mpq.allocate` and its like.

    For each batch, Adam minimises over the inputs ``x``

        sum_l mean_c [((m_lc - M_lc) / S_lc)^2 + (s_lc / S_lc - 1)^2] + mean_c [m_0c^2 + (s_0c - 1)^2],

    where ``m_lc, s_lc`` are mean and deviation of channel ``c`` at the input of batch norm ``l`` over the batch,
    ``M_lc, S_lc`` those that it keeps (``S_lc^2`` with its epsilon), and ``m_0c, s_0c`` those of ``x`` itself.

    Args:
        model: A trained network whose batch norms are not fused yet; never touched.
        input_shape: Shape of one input without the batch axis, such as ``(3, 224, 224)``. With a convolution as first
            layer the size alone will do, ``(224, 224)``; with a linear layer as first layer nothing is needed.
        samples: How many inputs.
        batch_size: At most so many are made at a time. Statistics are taken over a batch, and one takes the memory of
            a training step.
        iterations: Steps for each batch. One step costs about four forward passes of the batch.
        lr: Learning rate at the first step, lowered to zero along a cosine.
        seed: Of the noise that the inputs start as.
        progress: Show a bar.
        forward: ``(model, inputs) -> output`` where the model does not take one tensor.

    Returns:
        Batches ``[B, *input_shape]`` in the type of the weights, on the CPU.

    Raises:
        MpqError: If the model has no batch norm with statistics, or the optimisation diverges.
        DataError: If the shape can't be told or does not fit the model.
        GraphError: If the model can't be copied, or no gradient reaches its input.

    Example:
        >>> from mpq.bundled import resnet20
        >>> [tuple(x.shape) for x in distilled_data(resnet20(), (28, 28), samples=6, batch_size=4, iterations=1)]
        [(3, 1, 28, 28), (3, 1, 28, 28)]
    """
    if min(samples, batch_size, iterations) < 1 or lr <= 0:
        raise MpqError("samples, batch_size and iterations must be at least 1, and lr above 0")
    with preserved_state(seed):
        view = ModelView(model, forward)
        norms = _batch_norms(view.module)
        shape = _input_shape(view, input_shape)
        generator = torch.Generator().manual_seed(seed)
        sizes = [len(part) for part in torch.arange(samples).tensor_split(-(-samples // batch_size))]
        steps = progress_bar(range(len(sizes) * iterations), "distill data", progress)
        return [_distil(view, norms, (n, *shape), islice(steps, iterations), iterations, lr, generator) for n in sizes]


class _Images:
    """What is optimised in place of the pixels of a batch: ``x = mix . spectrum(noise) + offset``.

    Args:
        shape: ``[B, C, *size]``; without a size the spectrum is left out.
        dtype: To compute in.
        generator: Of the noise.
        device: Where the model is.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: torch.device
    ) -> None:
        _, channels, *self._size = shape
        self.noise = torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_()
        self.mix = torch.eye(channels, dtype=dtype, device=device).requires_grad_()
        offsets = (channels, *[1] * len(self._size))
        self.offset = torch.zeros(offsets, dtype=dtype, device=device).requires_grad_()
        self._amplitudes = _amplitudes(self._size, dtype).to(device) if self._size else None

    def __call__(self) -> Tensor:
        """The batch ``[B, C, *size]``."""
        x = self.noise
        if self._amplitudes is not None:
            axes = tuple(range(2, x.dim()))
            x = torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * self._amplitudes, s=self._size, dim=axes)
        found: Tensor = torch.einsum("dc,bc...->bd...", self.mix, x) + self.offset
        return found


def _amplitudes(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Amplitudes that give white noise the spectrum of natural images and variance one, laid out as by ``rfftn``."""
    square = torch.zeros((), dtype=dtype)
    for axis, n in enumerate(size):
        square = square + torch.fft.fftfreq(n, dtype=dtype).square().view(-1, *[1] * (len(size) - axis - 1))
    lowest = max(size) ** -2.0  # the mean has no frequency: it is as strong as the lowest one
    amplitudes = square.clamp_min(lowest) ** (-_EXPONENT / 2)
    found: Tensor = (amplitudes / amplitudes.square().mean().sqrt())[..., : size[-1] // 2 + 1]
    return found


def _distil(
    view: ModelView,
    norms: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    steps: Iterator[int],
    iterations: int,
    lr: float,
    generator: torch.Generator,
) -> Tensor:
    """One batch."""
    dtype = next(p.dtype for p in view.module.parameters() if p.is_floating_point())
    images = _Images(shape, torch.promote_types(dtype, torch.float32), generator, view.device)
    colours: dict[str, Any] = {"params": [images.mix, images.offset], "lr": lr * _COLOUR_SPEED}
    optimizer = torch.optim.Adam([{"params": [images.noise]}, colours], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in steps:
        loss = _statistics_loss(view, norms, images(), dtype)
        if not torch.isfinite(loss):
            raise MpqError(f"the statistics of the distilled data became NaN or infinite; use an lr below {lr}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return images().detach().to("cpu", dtype)


def _statistics_loss(view: ModelView, norms: Mapping[str, nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the statistics of a batch are from those that the model keeps."""
    parts = [_mismatch(x, torch.zeros(()), torch.ones(()), eps=1e-6)]

    def hook(norm: Any, args: Any, kwargs: Any) -> None:
        at_norm = tensors_in((args, kwargs))[0].to(x.dtype)
        kept = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
        parts.append(_mismatch(at_norm, *kept, eps=float(getattr(norm, "eps", 1e-5))))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in norms.values()]
    with view.hooked(handles):
        inputs = x.to(dtype)
        view(Batch((inputs,), {}, len(inputs), None, inputs))
    if not any(part.requires_grad for part in parts[1:]):
        raise GraphError("no gradient reaches the input from any batch norm: the model's forward uses torch.no_grad()")
    return torch.stack(parts).sum()


def _mismatch(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Squared error of mean and deviation in units of the deviation wanted, averaged over channels."""
    found_mean, found_variance = _Statistics.apply(x)
    scale = (variance + eps).sqrt()
    errors: Tensor = ((found_mean - mean) / scale).square() + ((found_variance + eps).sqrt() / scale - 1).square()
    return errors.mean()


class _Statistics(torch.autograd.Function):
    """Mean and variance of each channel (axis 1); half a step's time would go to autograd's own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance ``[C]`` of ``[B, C, ...]``."""
        axes = [i for i in range(x.dim()) if i != 1]
        mean = x.mean(axes, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean.flatten(), (x - mean).square_().mean(axes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Gradient at ``x``."""
        x, mean = ctx.saved_tensors
        of_mean, of_variance = (g.view_as(mean) * (mean.numel() / x.numel()) for g in gradients)
        return torch.addcmul(of_mean - 2 * of_variance * mean, x, 2 * of_variance)


def _batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep statistics per channel over batches, frozen ones of other libraries too.

    Raises:
        MpqError: If there are none, or they are as they were made.
    """
    found: dict[str, Any] = {
        name: m
        for name, m in module.named_modules()
        if isinstance(getattr(m, "running_mean", None), Tensor)
        and isinstance(getattr(m, "running_var", None), Tensor)
        and not isinstance(m, _InstanceNorm)
    }
    advice = (
        "Calibrate with real data, or take an estimator that looks at the weights only: "
        "then any inputs of the right shape do"
    )
    if not found:
        others = sorted({type(m).__name__ for m in module.modules() if "norm" in type(m).__name__.lower()})
        raise MpqError(
            "no data can be distilled: the model has no batch norm with running statistics, only "
            f"{', '.join(others) or 'layers without normalisation'} (norms fused into convolutions are gone). {advice}"
        )
    if all(bool((m.running_mean == 0).all() and (m.running_var == 1).all()) for m in found.values()):
        raise MpqError(
            f"no data can be distilled: all {len(found)} batch norms still have mean 0 and variance 1. Was the model "
            f"trained, and its state dict loaded? {advice}"
        )
    return found


def _input_shape(view: ModelView, given: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of one input, completed from the first layer.

    Raises:
        DataError: If that does not tell it.
    """
    name, first = next(iter(view.layers.items()))
    shape = () if given is None else tuple(given)
    if isinstance(first, nn.Linear) and not shape:
        return (first.in_features,)
    if isinstance(first, _ConvNd) and len(shape) == len(first.kernel_size):
        shape = (first.in_channels, *shape)
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        channels = f"; {name!r} takes {first.in_channels} channels" if isinstance(first, _ConvNd) else ""
        raise DataError(
            f"input_shape must be the shape of one input without the batch axis, such as (3, 224, 224), not {given!r}"
            f"{channels}"
        )
    return shape
