"""Norms of each sample's gradient in a weight, from what the layer read and the gradient at what it made.

A sample's gradient is a sum of products over positions (tokens, pixels). Its norm needs either that sum or only the
inner products of positions with each other ("ghost norms": Goodfellow, 2015, arXiv:1510.01799; Li et al., 2022,
arXiv:2110.05679, section 4.2), whichever is smaller. Gradients exist for a few samples at a time, those of embeddings
only in the rows that were looked up, so that large vocabularies cost no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from mpq.layers import LayerSpec
from mpq.sensitivity.rows import MIXED, Layout
from mpq.view import QUANTIZABLE

_LARGEST = 1 << 24  # elements of the gradients of several samples that exist at once
_CONV_WEIGHT: dict[int, Any] = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}  # by axes of the weight


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    Attributes:
        layer: The layer.
        module: Its module.
        read: Its input tensors; an attention's projection has three.
        made: Its output tensors, as many.
        layouts: Where the samples are in each output.
    """

    layer: LayerSpec
    module: nn.Module
    read: list[Tensor]
    made: list[Tensor]
    layouts: list[Layout]


def can_be_told_apart(calls: Sequence[Call]) -> bool:
    """Whether the gradient of a weight with these uses is known by sample."""
    kinds = {_kind(c.layer) for c in calls}
    return (len(kinds) <= 1 or kinds == {"linear", "embedding"}) and all(_plain(c.module) and _fits(c) for c in calls)


def norms_by_sample(calls: Sequence[Call], gradients: Sequence[Sequence[Tensor]], samples: int) -> Tensor:
    """Squared norm of each sample's gradient in the weight that all calls use, float64 ``[B]``.

    Args:
        calls: All uses of one weight that a gradient reached, see `can_be_told_apart`.
        gradients: Of a probe, at all outputs of each call.
        samples: In the batch.
    """
    total = torch.zeros(samples, dtype=torch.float64)
    if not calls:
        return total
    step = max(1, _LARGEST // calls[0].layer.parameters)
    # The three parts of a packed projection are different rows of its weight: their norms add up.
    for part in range(len(calls[0].made)):
        uses = [_use(call, each[part], part, samples) for call, each in zip(calls, gradients, strict=True)]
        for start in range(0, samples, step):
            rows = slice(start, start + step)
            total[rows] += _norms([replace(u, read=u.read[rows], gradient=u.gradient[rows]) for u in uses]).cpu()
    return total


def sums_of_squares(rows: Tensor) -> Tensor:
    """Sum of squares of each row, float64 on the CPU; one row alone is summed in its own precision, pairwise."""
    return _wide(rows).flatten(1).square().sum(1).double().cpu()


def _kind(layer: LayerSpec) -> str:
    return "linear" if layer.op == "attention_in_proj" else layer.op


def _plain(module: nn.Module) -> bool:
    """Whether a module computes what its type says: no forward of its own, no hooks."""
    kind: Any = next(k for k in QUANTIZABLE if isinstance(module, k))
    methods = ("forward", "_conv_forward")
    own = any(f in vars(module) or getattr(type(module), f, None) is not getattr(kind, f, None) for f in methods)
    # `_conv_gradients` takes a transposed convolution for the adjoint of one that has as many outputs as it has inputs.
    steps = zip(getattr(module, "output_padding", ()), getattr(module, "stride", ()), strict=True)
    more = any(extra >= step for extra, step in steps)
    return not (own or more or module._forward_hooks or module._forward_pre_hooks)


def _fits(call: Call) -> bool:
    """Whether every output has its samples in order, and one input with the same rows."""
    if len(call.read) != len(call.made) or MIXED in call.layouts:
        return False
    if call.layer.op.startswith("conv"):
        images = call.read[0].dim() == len(call.layer.weight_shape)  # not a single one without batch axis
        return images and all(axis == "rows" for axis, _ in call.layouts)
    lead = [t.shape if call.layer.op == "embedding" else t.shape[:-1] for t in call.read]
    return lead == [t.shape[:-1] for t in call.made]


@dataclass(frozen=True, eq=False)
class _Use:
    """One use of (a part of) a weight, the samples on the first axis.

    Attributes:
        layer: The layer.
        module: Its module.
        read: ``[B, P, K]``; ``[B, P]`` indices; ``[B, R, C, ...]`` for the R images of each sample of a convolution.
        gradient: At the output, ``[B, P, M]`` or ``[B, R, M, ...]``.
    """

    layer: LayerSpec
    module: Any
    read: Tensor
    gradient: Tensor


def _use(call: Call, gradient: Tensor, part: int, samples: int) -> _Use:
    """Bring input and gradient into the form of `_Use`."""
    per_image = len(call.layer.weight_shape) - 1  # axes of one image, or of one position: its features

    def split(t: Tensor, kept: int) -> Tensor:
        t = t.transpose(0, 1) if call.layouts[part][0] == "second" else t
        return _wide(t).reshape(samples, -1, *t.shape[t.dim() - kept :])

    if call.layer.op != "embedding":
        return _Use(call.layer, call.module, split(call.read[part], per_image), split(gradient, per_image))
    ids, gradient = split(call.read[part], 0), split(gradient, 1)
    padding: Any = call.module.padding_idx
    if padding is not None:  # autograd takes its row for a constant
        gradient = gradient.masked_fill((ids == padding)[..., None], 0)
    return _Use(call.layer, call.module, ids, gradient)


def _norms(uses: list[_Use]) -> Tensor:
    kinds = {_kind(u.layer) for u in uses}
    if kinds == {"embedding"}:
        return _embedding_norms(torch.cat([u.read for u in uses], 1), torch.cat([u.gradient for u in uses], 1))
    if kinds <= {"embedding", "linear"}:
        made, read = zip(*map(_factors, uses), strict=True)
        return _product_norms(torch.cat(made, 1), torch.cat(read, 1))
    return sums_of_squares(reduce(torch.add, map(_conv_gradients, uses)))


def _factors(use: _Use) -> tuple[Tensor, Tensor]:
    """Factors whose product over positions is the gradient: ``[B, P, rows]`` and ``[B, P, columns]`` of the weight."""
    if use.layer.op == "embedding":
        return F.one_hot(use.read, use.layer.weight_shape[0]).to(use.gradient.dtype), use.gradient
    return use.gradient, use.read


def _product_norms(made: Tensor, read: Tensor) -> Tensor:
    """Squared norms of ``sum_p made[p] read[p]^T``, by sample."""
    P, M, K = made.shape[1], made.shape[2], read.shape[2]
    if P * (M + K) < M * K:
        inner = (made @ made.mT) * (read @ read.mT)
        return inner.sum((1, 2), dtype=torch.float64).clamp_min(0)
    return sums_of_squares(made.mT @ read)


def _embedding_norms(ids: Tensor, gradient: Tensor) -> Tensor:
    """Squared norms where positions with the same index share a row of the weight, by sample."""
    samples, rows = len(ids), int(ids.max()) + 1
    keys, place = torch.unique(ids + rows * torch.arange(samples, device=ids.device)[:, None], return_inverse=True)
    sums = gradient.new_zeros(len(keys), gradient.shape[2]).index_add_(0, place.flatten(), gradient.flatten(0, 1))
    return torch.zeros(samples, dtype=torch.float64).index_add_(0, (keys // rows).cpu(), sums_of_squares(sums))


def _conv_gradients(use: _Use) -> Tensor:
    """Gradients of a convolution's weight ``[B, parameters]``: the samples become groups of one large convolution."""
    module, read, gradient, padding = use.module, use.read, use.gradient, 0
    if module.transposed:  # the adjoint of a convolution: what is read and what is made change places
        read, gradient, padding = gradient, read, module.padding
    images, made = (t.transpose(0, 1).flatten(1, 2) for t in (read, gradient))
    if not module.transposed:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        images = F.pad(images, module._reversed_padding_repeated_twice, mode)
    samples, shape = len(read), use.layer.weight_shape
    found: Tensor = _CONV_WEIGHT[len(shape)](
        images,
        (samples * shape[0], *shape[1:]),
        made,
        module.stride,
        padding,
        module.dilation,
        samples * module.groups,
    )
    return found.reshape(samples, -1)


def _wide(t: Tensor) -> Tensor:
    """Squares of half precision overflow."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
