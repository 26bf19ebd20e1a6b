"""Lists of formats, and tensors of seeded random numbers to round to them."""

from __future__ import annotations

import torch

# Every one that is no plain cast.
MINIFLOATS = [
    f"fp{1 + e + m}_e{e}m{m}"
    for e in range(1, 9)
    for m in range(15)
    if 3 <= 1 + e + m <= 16 and (e, m) not in ((5, 10), (8, 7))
]
# More than a scale times a grid.
CODED = [
    *("kmeans_1", "kmeans_3", "kmeans_4:tensor", "kmeans_3:g8", "kmeans_5", "kmeans_2:b2x4"),
    *("nupes_2", "nupes_4", "nupes_3:g8", "nupes_8:tensor", "nupes_4:g8:p2"),
    *("pvq_2:g16", "pvq_2:g5", "pvq_1", "pvq_3:g4", "pvq_8", "pvq_4:g1", "pvq_2:g16:s32"),
    *("int8:cross", "int4:cross", "fp8_e4m3:cross"),
    *("int1:nested", "int2:nested", "int4:nested", "int4:g8:nested", "int8:tensor:nested", "int3:g8:p2:nested"),
    *("int4:g8:progressive", "int4:g128:progressive"),
]


def tensor(seed, shape=(6, 5, 4), dtype=torch.float32, power=1):
    """Normal numbers, with longer tails for higher powers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * x.abs() ** (power - 1)).to(dtype)


def drawn(*shape, seed=0, dtype=torch.float64):
    """Normal numbers, drawn in their own dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(*shape, seed=0):
    return drawn(*shape, seed=seed, dtype=torch.float32)
