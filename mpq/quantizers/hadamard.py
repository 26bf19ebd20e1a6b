"""Rotation of a layer's inputs by Hadamard matrices: outliers are spread over all columns before rounding."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mpq.quantizers.statistics import LayerStats

# Rotations by size and type, for as long as anything holds them: the layers of a network share a few sizes.
_in_use: WeakValueDictionary[tuple[int, torch.dtype], Tensor] = WeakValueDictionary()


def hadamard_rotation(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An orthogonal matrix ``[size, size]``, where size is the largest power of two that divides the channels.

    Sylvester's Hadamard matrix over the root of its size, with rows of random signs from a fixed seed, so that a
    runtime can make it again (QuaRot, Ashkboos et al., 2024; RSQ, Sung et al., 2025). All who ask for one size get the
    same tensor: it must not be written to.
    """
    size = channels & -channels
    rotation = _in_use.get((size, dtype))
    if rotation is None:
        with torch.inference_mode(False):
            rotation = _in_use[size, dtype] = _rotation(size).to(dtype)
    return rotation


def _rotation(size: int) -> Tensor:
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")  # whatever the caller's default is
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.mul_(signs[:, None]).div_(size**0.5)


def rotate(x: Tensor, rotation: Tensor, positions: int = 1) -> Tensor:
    """Multiply the last axis by a rotation, block by block.

    Args:
        x: ``[..., channels * positions]``.
        rotation: ``[size, size]``; its size divides the channels. Its transpose rotates back.
        positions: Neighbouring columns that belong to one channel (a kernel's) and so rotate alike.
    """
    blocks = x.reshape(*x.shape[:-1], -1, len(rotation), positions)
    return torch.einsum("...ip,ij->...jp", blocks, rotation.to(x)).reshape(x.shape)


def rotate_stats(stats: LayerStats, rotation: Tensor, positions: int = 1) -> LayerStats:
    """Statistics of rotated inputs."""
    half = rotate(stats.hessian, rotation, positions)
    return stats.moved(rotate(half.transpose(1, 2).contiguous(), rotation, positions))
