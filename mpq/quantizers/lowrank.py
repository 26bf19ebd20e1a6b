"""Low rank: two thin float16 factors beside a rounded weight take up the largest part of it, or of its error."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.float16 import to_float16
from mpq.quantizers.statistics import LayerStats


def low_rank_factors(error: Tensor, rank: int, stats: LayerStats | None = None) -> tuple[Tensor, Tensor]:
    """Two float16 matrices ``[out, r] [r, in]`` whose product is the best approximation of an error ``[out, in]``.

    The error may be the weight itself, of which only the rest is rounded then (SVDQuant: Li et al., 2025). Without
    statistics the error itself is approximated, by its largest singular values (LoRC: Yao et al.,
    ZeroQuant-V2, 2023); that costs no forward pass. With statistics the outputs' error is (QERA, Zhang et al., 2025,
    theorem 1), from the one pass that all methods share. Groups with inputs of their own share the factors, so that
    the mean of their second moments counts.

    Args:
        error: What rounding took away.
        rank: r; no more than the smaller side counts.
        stats: Of the layer's inputs.

    Raises:
        FormatError: If a factor is beyond float16's ends.
    """
    work = error.double()
    root = back = None
    if stats is not None:
        values, vectors = torch.linalg.eigh(stats.damped(1e-4).mean(0))
        root, back = ((vectors * values.clamp(min=0) ** p) @ vectors.T for p in (0.5, -0.5))
        work = work @ root
    u, s, v = torch.linalg.svd(work, full_matrices=False)
    left, right = u[:, :rank] * s[:rank], v[:rank] if back is None else v[:rank] @ back
    # Both factors get the same norms, so that float16 holds either.
    share = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).sqrt()
    left, right = left * share, right / share[:, None]
    way_out = "leave the low-rank step out of the recipe"
    return to_float16(left, "a low-rank factor", way_out), to_float16(right, "a low-rank factor", way_out)
