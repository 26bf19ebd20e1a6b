"""ONNX operators as PyTorch functions, with attributes as keyword arguments.

An operator is a function here under its own name, in lower case with underscores; `OPERATORS` has them under ONNX's
names. Inputs that are known when a file is read may be plain lists of whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = Tensor | Sequence[int]

# TensorProto.DataType -> torch
_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def ints(values: Ints) -> list[int]:
    """Whole numbers of a tensor or a list."""
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _axes(axes: Ints | None, dims: int) -> list[int]:
    return list(range(dims)) if axes is None or len(axes) == 0 else ints(axes)


def clip(x: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    """Clip."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):  # computed ends
        low, high = (None if v is None else torch.as_tensor(v, dtype=x.dtype) for v in (low, high))
    # Both are tensors or both numbers by now, which the type checker can't tell.
    return x if low is None and high is None else torch.clamp(x, low, high)  # type: ignore[arg-type]  # one may be None


def global_average_pool(x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.dim() - 3]
    found: Tensor = pool(x, 1)
    return found


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """HardSigmoid."""
    return (alpha * x + beta).clamp(0, 1)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gelu."""
    return F.gelu(x, approximate=approximate)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """PRelu with any slope that broadcasts."""
    return torch.where(x < 0, x * slope, x)


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *,
    alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
) -> Tensor:  # fmt: skip
    """Gemm."""
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def div(a: Tensor, b: Tensor) -> Tensor:
    """Div: whole numbers are divided towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def layer_normalization(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """LayerNormalization."""
    return F.layer_norm(x, [int(n) for n in x.shape[axis:]], weight, bias, epsilon)  # fixed sizes, for exporters


def instance_normalization(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """InstanceNormalization."""
    return F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)


def group_normalization(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """GroupNormalization; before version 21 there is one weight and bias a group, not a channel."""
    each = int(x.shape[1]) // len(weight)
    if each > 1:
        weight, bias = (v[:, None].expand(-1, each).flatten() for v in (weight, bias))
    return F.group_norm(x, num_groups, weight, bias, epsilon)


def padded(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int],
    auto_pad: str, value: float,
) -> Tensor:  # fmt: skip
    """The input of a convolution or pooling with its padding."""
    if auto_pad.startswith("SAME"):
        pads = [0] * (2 * len(kernel))
        for i, (size, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
            total = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
            first = total // 2 if auto_pad == "SAME_UPPER" else -(-total // 2)
            pads[i], pads[i + len(kernel)] = first, total - first
    half = len(pads) // 2
    flat = [p for i in reversed(range(half)) for p in (pads[i], pads[i + half])]
    return F.pad(x, flat, value=value) if any(flat) else x


def max_pool(
    x: Tensor, *, kernel_shape: list[int], strides: list[int] | None = None, dilations: list[int] | None = None,
    pads: list[int] | None = None, auto_pad: str = "NOTSET", ceil_mode: int = 0, storage_order: int = 0,
) -> Tensor:  # fmt: skip
    """MaxPool."""
    ones = [1] * len(kernel_shape)
    strides, dilations = strides or ones, dilations or ones
    x = padded(x, kernel_shape, strides, dilations, pads or [], auto_pad, -math.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_shape) - 1]
    found: Tensor = pool(x, kernel_shape, strides, 0, dilations, bool(ceil_mode))
    return found


def average_pool(
    x: Tensor, *, kernel_shape: list[int], strides: list[int] | None = None, pads: list[int] | None = None,
    auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0, dilations: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """AveragePool."""
    ones = [1] * len(kernel_shape)
    if dilations and dilations != ones:
        raise NotImplementedError("dilations of AveragePool")
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel_shape) - 1]
    strides = strides or ones
    whole = padded(x, kernel_shape, strides, ones, pads or [], auto_pad, 0.0)
    mean = pool(whole, kernel_shape, strides, 0, bool(ceil_mode))
    if count_include_pad or whole is x:
        return mean
    share = pool(
        padded(torch.ones_like(x), kernel_shape, strides, ones, pads or [], auto_pad, 0.0),
        kernel_shape, strides, 0, bool(ceil_mode),
    )  # fmt: skip
    return mean / share


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to a matrix."""
    return x.reshape(math.prod(x.shape[:axis]), -1) if axis != 1 else x.flatten(1)


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """Reshape: 0 keeps a size."""
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(ints(shape))])


def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    """Transpose."""
    return x.permute(perm if perm is not None else list(reversed(range(x.dim()))))


def concat(*parts: Tensor, axis: int) -> Tensor:
    """Concat."""
    return torch.cat(parts, axis)


def split(x: Tensor, sizes: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None) -> tuple[Tensor, ...]:
    """Split; without sizes into equal parts."""
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // (num_outputs or 1)), axis)
    return torch.split(x, ints(sizes), axis)


def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    """Slice."""
    first, last = ints(starts), ints(ends)
    by = ints(steps) if steps is not None else [1] * len(first)
    for axis, lo, hi, step in zip(_axes(axes, len(first)), first, last, by, strict=True):
        if step > 0:
            size = x.shape[axis]
            x = x.movedim(axis, 0)[slice(lo, None if hi >= size else hi, step)].movedim(0, axis)
        else:
            places = list(range(x.shape[axis]))[slice(lo, None if hi < -x.shape[axis] else hi, step)]
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Squeeze."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """Unsqueeze."""
    dims = x.dim() + len(axes)
    for axis in sorted(a % dims for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Ints) -> Tensor:
    """Expand: sizes broadcast both ways."""
    # torch has no types for broadcast_shapes
    return torch.broadcast_to(x, torch.broadcast_shapes(x.shape, ints(shape)))  # type: ignore[no-untyped-call]  # by torch


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Gather slices."""
    found = x.index_select(axis, indices.flatten() % x.shape[axis])
    return found.squeeze(axis) if not indices.dim() else torch.unflatten(found, axis, indices.shape)


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Shape."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def constant_of_shape(sizes: Ints, *, value: Tensor | None = None) -> Tensor:
    """ConstantOfShape."""
    filled = torch.zeros(1) if value is None else value
    return filled.reshape(()).expand(ints(sizes)).clone()


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Cast to a type of ONNX."""
    if to not in _DTYPES:
        raise NotImplementedError(f"Cast to ONNX type {to}")
    return x.to(_DTYPES[to])


def reducer(fn: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """A reduction whose axes are an input or an attribute."""

    def reduce(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if (axes is None or len(axes) == 0) and noop_with_empty_axes:
            return x
        return fn(x, _axes(axes, x.dim()), bool(keepdims))

    return reduce


def pad(
    x: Tensor, pads: Ints, value: Tensor | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    """Pad."""
    amounts, over = ints(pads), [a % x.dim() for a in _axes(axes, x.dim())]
    flat = [0] * (2 * x.dim())
    for i, axis in enumerate(over):
        place = 2 * (x.dim() - 1 - axis)
        flat[place : place + 2] = amounts[i], amounts[i + len(over)]
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else value.item())
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode={"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode])


def resize(
    x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Ints | None = None, *,
    mode: str = "nearest", coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75, antialias: int = 0, exclude_outside: int = 0, extrapolation_value: float = 0.0,
) -> Tensor:  # fmt: skip
    """Resize of images in the ways that PyTorch has."""
    target = ints(sizes)[2:] if sizes is not None and len(sizes) else None
    factors = None if target or scales is None else [float(s) for s in torch.as_tensor(scales).tolist()][2:]
    corners = coordinate_transformation_mode == "align_corners"
    centres = coordinate_transformation_mode in ("half_pixel", "pytorch_half_pixel")
    known = mode in ("linear", "cubic") and (corners or centres)
    nearest = mode == "nearest" and (coordinate_transformation_mode, nearest_mode) == ("asymmetric", "floor")
    if not known and not nearest:
        raise NotImplementedError(f"Resize by {mode}, {coordinate_transformation_mode}, {nearest_mode}")
    way = {"linear": ("linear", "bilinear", "trilinear")[x.dim() - 3], "cubic": "bicubic"}.get(mode, mode)
    return F.interpolate(x, target, factors, way, corners if known else None)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DepthToSpace."""
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    parts = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMax: the first or the last place of the largest value."""
    if select_last_index:
        return x.shape[axis] - 1 - x.flip(axis).argmax(axis, bool(keepdims))
    return x.argmax(axis, bool(keepdims))


def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """Trilu."""
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Range."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def one_input(fn: Any) -> Callable[[Tensor], Tensor]:
    """A function of one tensor, without attributes."""
    return lambda x: fn(x)


def two_inputs(fn: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of two tensors, without attributes."""
    return lambda a, b: fn(a, b)


def over_inputs(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of any number of tensors."""

    def fold(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = fn(first, other)
        return first

    return fold


OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: one_input(fn)
        for name, fn in {
            "Relu": F.relu, "Sigmoid": torch.sigmoid, "HardSwish": F.hardswish, "Tanh": torch.tanh, "Mish": F.mish,
            "Softplus": F.softplus, "Softsign": F.softsign, "Erf": torch.erf, "Exp": torch.exp, "Log": torch.log,
            "Sqrt": torch.sqrt, "Abs": torch.abs, "Neg": torch.neg, "Reciprocal": torch.reciprocal, "Sin": torch.sin,
            "Cos": torch.cos, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign,
            "Not": torch.logical_not, "IsNaN": torch.isnan, "Identity": lambda x: x,
        }.items()
    },
    **{
        name: two_inputs(fn)
        for name, fn in {
            "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": div, "Pow": torch.pow, "MatMul": torch.matmul,
            "Equal": torch.eq, "Less": torch.lt, "LessOrEqual": torch.le, "Greater": torch.gt,
            "GreaterOrEqual": torch.ge, "And": torch.logical_and, "Or": torch.logical_or, "PRelu": prelu,
        }.items()
    },
    **{
        f"Reduce{name}": reducer(fn)
        for name, fn in {
            "Mean": lambda x, a, k: x.mean(a, k), "Sum": lambda x, a, k: x.sum(a, k),
            "Max": lambda x, a, k: x.amax(a, k), "Min": lambda x, a, k: x.amin(a, k),
            "L2": lambda x, a, k: x.square().sum(a, k).sqrt(), "SumSquare": lambda x, a, k: x.square().sum(a, k),
        }.items()
    },
    "Min": over_inputs(torch.minimum),
    "Max": over_inputs(torch.maximum),
    "Sum": over_inputs(torch.add),
    "Clip": clip,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "HardSigmoid": hard_sigmoid,
    "Gelu": gelu,
    "Swish": lambda x, *, alpha=1.0: x * torch.sigmoid(alpha * x),
    "Softmax": lambda x, *, axis=-1: x.softmax(axis),
    "LogSoftmax": lambda x, *, axis=-1: x.log_softmax(axis),
    "Gemm": gemm,
    "LayerNormalization": layer_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.dim())), True),
    "Flatten": flatten,
    "Reshape": reshape,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Tile": lambda x, repeats: x.tile(ints(repeats)),
    "Gather": gather,
    "GatherElements": lambda x, indices, *, axis=0: x.gather(axis, indices % x.shape[axis]),
    "Shape": shape,
    "ConstantOfShape": constant_of_shape,
    "Cast": cast,
    "CastLike": lambda x, like, *, saturate=1: x.to(like.dtype),
    "Dropout": lambda x, ratio=None, training=None, *, seed=0: x,
    "Where": lambda condition, x, y: torch.where(condition, x, y),
    "Range": range_,
    "Pad": pad,
    "Resize": resize,
    "DepthToSpace": depth_to_space,
    "Trilu": trilu,
    "ArgMax": arg_max,
    "CumSum": lambda x, axis: x.cumsum(int(axis)),
    "Einsum": lambda *xs, equation: torch.einsum(equation, *xs),
}  # fmt: skip
