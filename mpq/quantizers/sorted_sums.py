"""Running sums over sorted values, for k-means in one dimension.

The sums of a large block would take twenty times its memory: every 256th is kept there, and what lies between is added
up again when it is asked for, in the same order, so that results are the same, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Elements of blocks whose sums are not all kept, of the stretches to work on there, and between sums that are kept.
_LARGE = 2**18
_STRETCH = 2**16
_STEP = 2**8


class SortedBlocks:
    """The values of blocks in rising order, and sums over any stretch of them.

    Args:
        blocks: ``[blocks, elements]``.
        weights: Non-negative, same shape; None: all alike. A block without any weight counts all alike.
    """

    def __init__(self, blocks: Tensor, weights: Tensor | None = None) -> None:
        self._step = 1 if blocks.shape[1] <= _LARGE else _STEP
        self._weights: Tensor | None = None
        if weights is None:
            self.values = _sorted(blocks) if self._step > 1 else blocks.sort(dim=1).values
        else:
            self.values, order = blocks.sort(dim=1)
            w = weights.gather(1, order)
            self._weights = torch.where(w.sum(1, keepdim=True) > 0, w, 1.0)
        kept = [blocks.new_zeros(3, len(blocks), 1, dtype=torch.float64)]
        carry = kept[0]
        for part in self._stretches(blocks.shape[1]):
            sums = _moments(self.values[:, part], None if self._weights is None else self._weights[:, part])
            sums[..., :1] += carry
            sums.cumsum_(2)
            carry = sums[..., -1:]
            kept.append(sums[..., self._step - 1 :: self._step].clone() if self._step > 1 else sums)
        self._kept = torch.cat(kept, 2)

    def before(self, cuts: Tensor) -> Tensor:
        """Weight, first and second moment of the values before each cut ``[blocks, cuts]``: ``[3, blocks, cuts]``."""
        at = cuts // self._step
        found = self._kept.gather(2, at.expand(3, -1, -1))
        if self._step == 1:
            return found
        start = at * self._step
        index = (start[..., None] + torch.arange(self._step, device=cuts.device)).flatten(1)
        index.clamp_(max=self.values.shape[1] - 1)
        weights = None if self._weights is None else self._weights.gather(1, index)
        sums = _moments(self.values.gather(1, index), weights).view(*found.shape, self._step)
        sums[..., 0] += found
        last = (cuts - start - 1).clamp(min=0).expand_as(found)
        return torch.where(cuts > start, sums.cumsum_(3).gather(3, last[..., None])[..., 0], found)

    def even_cuts(self, count: int) -> Tensor:
        """Ends ``[blocks, count + 1]`` of intervals of values, even in the third root of their density.

        They go from 0 to the number of values. Blocks with at most ``count`` distinct values have one interval for
        each of them.
        """
        rows, n = self.values.shape
        along = list(self._density()) if self._step == 1 else None
        nothing = self.values.new_zeros(rows, 1, dtype=torch.float64)
        ends = deque([(nothing, nothing.long())], maxlen=1)
        ends.extend(self._density() if along is None else along)
        total, few = ends[0][0][:, -1:], ends[0][1][:, -1:] < count
        steps = torch.arange(1, count, dtype=torch.float64, device=total.device).expand(rows, -1)
        steps = torch.where(few, steps, steps * (total / count)).contiguous()
        inner = torch.ones_like(steps, dtype=torch.int64)
        for mass, rank in self._density() if along is None else along:
            inner += torch.searchsorted(torch.where(few, rank.double(), mass), steps)
        inner.clamp_(max=n)
        # Several steps may end in one wide gap: no interval of many values stays empty.
        place = torch.arange(1, count, device=inner.device)
        apart = ((inner - place).cummax(1).values + place).minimum(n - count + place)
        inner = torch.where(few, inner, apart)
        return torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], n)], 1)

    def _density(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Of stretches of the gaps between values: sums of the density's third root, and numbers of gaps, up to each.

        Bennett: the density of the best levels is that of the values to the third; a gap d with weight w stands for
        w/d.
        """
        values, w = self.values, self._weights
        mass: Tensor | float = 0.0
        rank: Tensor | int = 0
        for part in self._stretches(values.shape[1] - 1):
            gaps = (values[:, 1:][:, part] - values[:, :-1][:, part]).double()
            new = gaps > 0
            both = 2.0 if w is None else w[:, 1:][:, part] + w[:, :-1][:, part]
            sums = torch.where(new, gaps.square() * both, 0.0).pow_(1 / 3)
            sums[:, :1] += mass
            counts = new.cumsum(1) + rank
            yield sums.cumsum_(1), counts
            mass, rank = sums[:, -1:], counts[:, -1:]

    def _stretches(self, elements: int) -> Iterator[slice]:
        step = max(1, elements) if self._step == 1 else _STRETCH
        return (slice(i, i + step) for i in range(0, elements, step))


def _sorted(blocks: Tensor) -> Tensor:
    """Rising values without their order, which would take twice their memory."""
    if blocks.device.type != "cpu":
        return blocks.sort(dim=1).values
    values = blocks.clone(memory_format=torch.contiguous_format)
    values.numpy().sort(axis=1)
    return values


def _moments(values: Tensor, weights: Tensor | None) -> Tensor:
    w = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.double()
    return torch.stack([w, w * values, w * values.double().square()])
