"""Weights as they are stored: codes and scales, and what the steps of a recipe keep beside them.

The steps of a recipe (`mpq.quantizers.recipes`) are undone here, from the last to the first. Rounding and reading back
go through the same functions, so that what is read is what was rounded, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers import packing
from mpq.quantizers.basis import InputBasis, input_basis
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.hadamard import hadamard_rotation, rotate
from mpq.quantizers.packing import Layout, check_layout
from mpq.quantizers.recipe_storage import cluster_bits, matrix_of, recipe_layout, split_step
from mpq.quantizers.tensors import QuantizedTensor, dequantize


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a format with or without a recipe.

    Attributes:
        fmt: The format.
        shape: Shape of the weight, output channels first.
        codes: What the steps of the recipe leave to round: codes and scales. With clusters (``split``) there is one for
            each, of the same codes and scales of its own.
        kept: What the steps keep beside them, by the names and in the types of `layout`.
    """

    fmt: NumberFormat
    shape: tuple[int, ...]
    codes: tuple[QuantizedTensor, ...]
    kept: Mapping[str, Tensor]

    def __deepcopy__(self, memo: object) -> StoredWeight:
        """Itself: nothing in it ever changes."""
        return self

    def values(self) -> Tensor:
        """The effective weight, in the type it was worked in: float64 for float64 weights, else float32."""
        rows = self._rounded()
        positions = matrix_of(self.shape)[2]
        for step in reversed(self.fmt.recipe):
            name = split_step(step)[0]
            if name in UNDO:
                rows = UNDO[name](rows, self._of(name), positions)
        return rows.reshape(self.shape)

    def plain_codes(self) -> QuantizedTensor:
        """Codes and scales, in the shape of the weight, where there is nothing else to it.

        Raises:
            FormatError: If a step of the recipe needs more.
        """
        more = [step for step in self.fmt.recipe if split_step(step)[0] in UNDO or len(self.codes) > 1]
        if more:
            raise FormatError(f"{self.fmt.name} is more than codes and scales: {', '.join(more)} would be lost")
        return replace(self.codes[0], shape=self.shape)

    def input_basis(self, steps: Sequence[str]) -> InputBasis:
        """The basis that inputs are rounded in, after these first steps of the recipe."""
        return input_basis(steps, self.kept, matrix_of(self.shape)[1])

    def _rounded(self) -> Tensor:
        parts = [dequantize(q) for q in self.codes]
        if len(parts) == 1:
            return parts[0].reshape(matrix_of(self.shape)[0], -1)
        return of_clusters(parts, self._of("split")["clusters"])

    def _of(self, step: str) -> dict[str, Tensor]:
        prefix = f"{step}."
        return {k.removeprefix(prefix): t for k, t in self.kept.items() if k.startswith(prefix)}


def of_clusters(parts: list[Tensor], clusters: Tensor) -> Tensor:
    """Each element from the tensor of its cluster; ``clusters`` are packed numbers."""
    first = parts[0]
    found = packing.unpack(clusters, cluster_bits(len(parts)), first.numel()).view(first.shape)
    return torch.stack([torch.where(found == k, part, 0) for k, part in enumerate(parts)]).sum(0)


def column_scales(scales: Tensor, positions: int, like: Tensor) -> Tensor:
    """A factor for each column from those of input channels."""
    return scales.to(like).repeat_interleave(positions)


def split_columns(channels: Tensor, positions: int) -> Tensor:
    """The columns of input channels."""
    return (channels[:, None].long() * positions + torch.arange(positions, device=channels.device)).flatten()


def _rotate_back(rows: Tensor, kept: Mapping[str, Tensor], positions: int) -> Tensor:
    rotation = hadamard_rotation(rows.shape[1] // positions, rows.dtype).to(rows.device)
    return rotate(rows, rotation.T, positions)


def _unscale(rows: Tensor, kept: Mapping[str, Tensor], positions: int) -> Tensor:
    return rows / column_scales(kept["scales"], positions, rows)


def _add_sparse(rows: Tensor, kept: Mapping[str, Tensor], positions: int) -> Tensor:
    outliers = torch.zeros_like(rows).flatten()
    outliers[kept["places"].long()] = kept["values"].to(rows)
    return rows + outliers.view(rows.shape)


def _join_channels(rows: Tensor, kept: Mapping[str, Tensor], positions: int) -> Tensor:
    columns = split_columns(kept["channels"], positions)
    own = rows.shape[1] - len(columns)
    return rows[:, :own].index_add(1, columns, rows[:, own:])


def _add_low_rank(rows: Tensor, kept: Mapping[str, Tensor], positions: int) -> Tensor:
    return rows + (kept["left"].double() @ kept["right"].double()).to(rows)


# Steps that leave more than codes: (rows [out, in], what they kept, positions) -> rows as they were before the step.
UNDO: dict[str, Callable[[Tensor, Mapping[str, Tensor], int], Tensor]] = {
    "hadamard": _rotate_back,
    "smooth": _unscale,
    "awq": _unscale,
    "sparse": _add_sparse,
    "ocs": _join_channels,
    "svd": _add_low_rank,
    "lorc": _add_low_rank,
    "qera": _add_low_rank,
}


def layout(fmt: NumberFormat, shape: tuple[int, ...]) -> Layout:
    """Data type and shape of each part of a weight, output channels first, that `to_parts` writes."""
    plain = replace(fmt, recipe=())
    if not fmt.recipe:
        return packing.layout(plain, shape)
    channels, inputs, positions = matrix_of(shape)
    kept, wider = recipe_layout(fmt.recipe, channels, inputs, positions)
    found = packing.layout(plain, (channels, wider * positions))
    name, clusters = split_step(fmt.recipe[-1])
    if name == "split":
        beside = [(part, of) for part, of in found.items() if part != "codes"]
        found |= {f"{part}.{k}": of for k in range(1, clusters) for part, of in beside}
    return found | {part: (getattr(torch, kind), size) for part, (kind, size) in kept.items()}


def to_parts(stored: StoredWeight) -> dict[str, Tensor]:
    """A stored weight as the plain tensors that hold it, of `NumberFormat.storage_bits` in whole bytes each.

    Raises:
        FormatError: If a scale, a factor or a level of a codebook is not what the format stores.
    """
    first, *others = stored.codes
    found = packing.to_parts(first)
    for k, q in enumerate(others, 1):
        found |= {f"{part}.{k}": t for part, t in packing.to_parts(q).items() if part != "codes"}
    return found | dict(stored.kept)


def from_parts(
    parts: Mapping[str, Tensor], fmt: NumberFormat, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> StoredWeight:
    """The weight that `to_parts` took apart; nothing about the parts is taken on trust.

    Args:
        parts: What `to_parts` gave.
        fmt: The format.
        shape: Of the weight, output channels first.
        dtype: What it was worked in: float64 for float64 weights, else float32.

    Raises:
        FormatError: If a part is missing, unknown, of another shape or type, or holds what the format does not have.
    """
    check_layout(parts, layout(fmt, shape))
    plain = replace(fmt, recipe=())
    read = partial(packing.from_parts, fmt=plain, dtype=dtype)
    if not fmt.recipe:
        return StoredWeight(fmt, shape, (read(parts, shape=shape),), {})
    channels, inputs, positions = matrix_of(shape)
    names, wider = recipe_layout(fmt.recipe, channels, inputs, positions)
    kept = {part: parts[part] for part in names}
    _check_kept(kept, fmt, shape)
    size = channels, wider * positions
    own = packing.layout(plain, size)
    step, number = split_step(fmt.recipe[-1])
    of_cluster = [{part: part if part == "codes" or k == 0 else f"{part}.{k}" for part in own} for k in range(number)]
    named = of_cluster if step == "split" else [{part: part for part in own}]
    codes = tuple(read({part: parts[name] for part, name in names_.items()}, shape=size) for names_ in named)
    return StoredWeight(fmt, shape, codes, kept)


def _check_kept(kept: Mapping[str, Tensor], fmt: NumberFormat, shape: tuple[int, ...]) -> None:
    """Refuse numbers that are not finite, factors that are not positive, and places and clusters that there are not."""
    for name, t in kept.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise FormatError(f"{name} holds NaN or infinity")
        if name.endswith(".scales") and not bool((t > 0).all()):
            raise FormatError(f"{name} holds what is no positive number")
    channels, inputs, positions = matrix_of(shape)
    for i, (step, number) in enumerate(map(split_step, fmt.recipe)):
        there = recipe_layout(fmt.recipe[:i], channels, inputs, positions)[1]
        elements = channels * there * positions
        if step == "sparse":
            _check_places("sparse.places", kept["sparse.places"], elements)
        elif step == "ocs":
            _check_places("ocs.channels", kept["ocs.channels"], there)
        elif step == "split":
            found = packing.unpack(kept["split.clusters"], cluster_bits(number), elements)
            _check_places("split.clusters", found, number)


def _check_places(name: str, found: Tensor, end: int) -> None:
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < end:
        raise FormatError(f"{name} holds {int(found.min())} to {int(found.max())}, but there are 0 to {end - 1}")
