"""Recipes: what is done to a weight before or while it is rounded, by the names in a format (``int4:hadamard:gptq``).

Names are applied from left to right: the first ones change what is rounded, the last one may say how it is rounded;
without one it is to nearest. What comes out is the effective weight: the values that the layer multiplies its own
inputs with, whatever a runtime stores (`mpq.quantizers.stored`). Where inputs are quantized, that is after they are
rotated or scaled (`mpq.quantizers.basis`).

| name | what | forward passes |
|---|---|---|
| ``hadamard`` | inputs are rotated | none |
| ``smooth``, ``awq`` | input channels are scaled | one |
| ``sparseN`` | the largest N of a thousand weights stay float16 | none |
| ``ocsN`` | N of a hundred input channels are split into halves | none |
| ``splitN`` | N clusters of weights have scales of their own | none |
| ``svdN`` | two float16 factors of rank N are taken off the weight | none |
| ``lorcN``, ``qeraN`` | two float16 factors of rank N take up the weight's error, the outputs' | none, one |
| ``rsq`` | tokens count by their norms in the statistics | one |
| ``weighted`` | ranges and codebooks for errors that count by the mean squares of their inputs | one |
| ``stochastic`` | rounds up or down at random, by draws that the weight and its format fix | none |
| ``gptq``, ``adaround``, ``flexround``, ``adaquant`` | rounding that keeps outputs | one |

The one pass over the calibration data is the same for all layers, formats and methods.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.adaround import adaquant, adaround, flexround
from mpq.quantizers.blocks import all_finite, to_blocks, to_rows
from mpq.quantizers.elements import element_scales, stochastic
from mpq.quantizers.equalization import awq_scales, smooth_scales
from mpq.quantizers.float16 import to_float16
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.gptq import gptq
from mpq.quantizers.grids import grid_of
from mpq.quantizers.hadamard import hadamard_rotation, rotate, rotate_stats
from mpq.quantizers.lowrank import low_rank_factors
from mpq.quantizers.outliers import channels_to_split, clusters, largest_elements
from mpq.quantizers.packing import pack
from mpq.quantizers.ranges import check_rule
from mpq.quantizers.recipe_storage import cluster_bits, matrix_of, split_step
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.stored import UNDO, StoredWeight, column_scales, of_clusters, split_columns
from mpq.quantizers.tensors import QuantizedTensor, dequantize, fake_quantize, quantize


@dataclass(frozen=True)
class Rounded:
    """What comes out of some steps of a recipe, the last included.

    Attributes:
        values: The effective weight ``[out, in]``.
        codes: As in `StoredWeight`.
        kept: As in `StoredWeight`.
    """

    values: Tensor
    codes: tuple[QuantizedTensor, ...]
    kept: dict[str, Tensor]

    def before(self, step: str, positions: int, **kept: Tensor) -> Rounded:
        """With one more step in front, which kept something to undo it by."""
        named = {f"{step}.{part}": t for part, t in kept.items()}
        return Rounded(UNDO[step](self.values, kept, positions), self.codes, named | self.kept)


# Rounds a weight ``[out, in]``, given the statistics of its inputs.
Rounding = Callable[[Tensor, LayerStats | None], Rounded]


@dataclass(frozen=True)
class Setting:
    """What a step knows besides the weight.

    Attributes:
        fmt: The format, without recipe.
        method: Range rule.
        positions: Neighbouring columns that belong to one input channel (those of a kernel).
        name: Of the step.
        number: The number in the step's name; 0 without.
        seed: Of what is drawn at random.
        weighted: Whether errors count by the inputs that they meet.
    """

    fmt: NumberFormat
    method: str
    positions: int
    name: str
    number: int
    seed: int
    weighted: bool

    def nearest(self, weight: Tensor, stats: LayerStats | None) -> QuantizedTensor:
        """Rounding to nearest."""
        return quantize(weight, self.fmt, 0, self.method, self._importance(weight, stats))

    def nearest_values(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """What `nearest` comes to."""
        return fake_quantize(weight, self.fmt, 0, self.method, self._importance(weight, stats))

    def _importance(self, weight: Tensor, stats: LayerStats | None) -> Tensor | None:
        """Of each error, up to a factor: what it adds to the squared error of outputs, if inputs are uncorrelated.

        That is the diagonal of the second derivatives of a layer's squared error (Frantar and Alistarh, Optimal Brain
        Compression, 2022, section 3), in the place of the Fisher information's of SqueezeLLM (Kim et al., 2024, eq. 3).
        """
        if not self.weighted:
            return None
        assert stats is not None
        return stats.mean_squares(len(weight)).to(weight.dtype)


def apply_recipe(
    weight: Tensor,
    fmt: NumberFormat,
    channel_axis: int = 0,
    method: str = "mse",
    stats: LayerStats | None = None,
) -> Tensor:
    """The effective weight of a format with a recipe, in the weight's own basis, shape and dtype.

    Args:
        weight: Floating point, at least two axes.
        fmt: Any format; without recipe this is `fake_quantize`.
        channel_axis: The output-channel axis.
        method: Range rule, see `find_range`.
        stats: Of the inputs, in the order of the weight's other axes, where `NumberFormat.needs_data`.

    Raises:
        FormatError: If the recipe needs statistics that are missing, or does not go with the format; or the weight
            holds what the format can't.
    """
    if not fmt.recipe:
        return fake_quantize(weight, fmt, channel_axis, method)
    if not weight.numel():
        return weight.detach().clone()
    stored = round_weight(weight.movedim(channel_axis, 0), fmt, method, stats)
    return stored.values().movedim(0, channel_axis).contiguous().to(weight.dtype)


def round_weight(
    weight: Tensor, fmt: NumberFormat, method: str = "mse", stats: LayerStats | None = None
) -> StoredWeight:
    """As `apply_recipe`, with all that is stored: codes, scales, and what the steps keep.

    Args:
        weight: Floating point, output channels first.
        fmt: Any format but a plain cast, with or without recipe.
        method: Range rule, see `find_range`.
        stats: Of the inputs, in the order of the weight's other axes, where `NumberFormat.needs_data`.

    Raises:
        FormatError: As `apply_recipe`.
    """
    shape = tuple(weight.shape)
    if not fmt.recipe:
        return StoredWeight(fmt, shape, (quantize(weight, fmt, 0, method),), {})
    if fmt.needs_data and stats is None:
        raise FormatError(f"{fmt.name} needs calibration data: statistics of the layer's inputs")
    check_rule(fmt, method)
    rows = to_rows(weight.detach())
    rows = rows.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    # Some steps would take NaN for an outlier, and store it.
    if not all_finite(rows):
        raise FormatError(f"the weight {list(shape)} holds NaN or infinity")
    with torch.no_grad():
        found = _chain(fmt, method, matrix_of(shape)[2], _seed(rows, fmt))(rows, stats)
    return StoredWeight(fmt, shape, found.codes, found.kept)


def _seed(rows: Tensor, fmt: NumberFormat) -> int:
    """Of a weight in a format: draws that layers or formats share would make errors that do not cancel."""
    if "stochastic" not in fmt.recipe:
        return 0
    digest = hashlib.sha256(fmt.name.encode())
    digest.update(rows.cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1  # a generator takes 63 bits


def _chain(fmt: NumberFormat, method: str, positions: int, seed: int) -> Rounding:
    """The steps of a recipe as one function, built from the last to the first."""
    last = Setting(replace(fmt, recipe=()), method, positions, "", 0, seed, "weighted" in fmt.recipe)
    chain: Rounding = partial(_nearest, last)
    for step in reversed(fmt.recipe):
        name, number = split_step(step)
        setting = replace(last, name=name, number=number)
        chain = partial(STEPS[name], setting, chain) if name in STEPS else partial(_rounded, setting)
    return chain


def _nearest(setting: Setting, weight: Tensor, stats: LayerStats | None) -> Rounded:
    q = setting.nearest(weight, stats)
    return Rounded(dequantize(q), (q,), {})


def _rounded(setting: Setting, weight: Tensor, stats: LayerStats | None) -> Rounded:
    nearest = setting.nearest(weight, stats)  # the range is searched once
    if setting.name == "stochastic":
        values = stochastic(weight, setting.fmt, setting.method, setting.seed, nearest)
    else:
        assert stats is not None
        values = ROUNDINGS[setting.name](weight, setting.fmt, stats, setting.method, nearest=nearest)
    q = recoded(nearest, values)
    return Rounded(dequantize(q), (q,), {})


def recoded(q: QuantizedTensor, values: Tensor) -> QuantizedTensor:
    """The same scales with the codes of other values on their grid."""
    grid, zero = grid_of(q.fmt), None if q.fmt.symmetric else q.zero_point
    units = to_blocks(values, q.fmt, q.channel_axis) * (1 / q.scale)
    return replace(q, codes=grid.encode(grid.round_(units, zero), zero))


def _hadamard(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    rotation = hadamard_rotation(weight.shape[1] // setting.positions, weight.dtype).to(weight.device)
    turned = None if stats is None else rotate_stats(stats, rotation, setting.positions)
    inner = rest(rotate(weight, rotation, setting.positions), turned)
    return inner.before("hadamard", setting.positions)


def _scaled(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats, scales: Tensor) -> Rounded:
    columns = column_scales(scales, setting.positions, weight)
    return rest(weight * columns, stats.scaled(1 / columns)).before(
        setting.name, setting.positions, scales=scales.half()
    )


def _smooth(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats) -> Rounded:
    largest = stats.largest.amax(0).reshape(-1, setting.positions).amax(1)
    return _scaled(setting, rest, weight, stats, smooth_scales(largest, weight, positions=setting.positions))


def _awq(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats) -> Rounded:
    return _scaled(setting, rest, weight, stats, awq_scales(weight, stats, setting.nearest_values, setting.positions))


def _sparse(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    places = largest_elements(weight, setting.number)
    kept = to_float16(weight.flatten()[places], f"a weight of sparse{setting.number}")
    inner = rest(weight.flatten().index_fill(0, places, 0).view(weight.shape), stats)
    return inner.before("sparse", setting.positions, places=places.int(), values=kept)


def _ocs(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    channels = channels_to_split(weight, setting.number, setting.positions)
    split = split_columns(channels, setting.positions)
    columns = torch.cat([torch.arange(weight.shape[1], device=weight.device), split])
    share = torch.ones_like(weight[0]).index_fill(0, split, 0.5)
    halved, stats = (weight * share)[:, columns], None if stats is None else stats.taken(columns)
    if setting.fmt.family == "int":
        # Halves that differ by half a step round to what the whole would, and not twice to the same side. As they move
        # the range, by up to a quarter of it in small groups, the rest searches its own.
        nearest = setting.nearest(halved, stats)
        quarter = element_scales(halved, setting.fmt, setting.method, nearest)[0][:, weight.shape[1] :] / 4
        halved[:, split] -= quarter
        halved[:, weight.shape[1] :] += quarter
    inner = rest(halved, stats)
    return inner.before("ocs", setting.positions, channels=channels.int())


def _split_clusters(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    """The last step: what is not in a cluster has its code from another one."""
    found = clusters(weight, setting.number)
    parts = [rest(torch.where(found == k, weight, 0), stats) for k in range(setting.number)]
    place = to_blocks(found, setting.fmt)
    codes = torch.stack([part.codes[0].codes for part in parts]).gather(0, place[None])[0]
    joined = tuple(replace(part.codes[0], codes=codes) for part in parts)
    packed = pack(found, cluster_bits(setting.number))
    return Rounded(of_clusters([dequantize(q) for q in joined], packed), joined, {"split.clusters": packed})


def _svd(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    """What is left without the largest singular values has fewer outliers (SVDQuant, Li et al., 2025, section 4.2)."""
    left, right = low_rank_factors(weight, setting.number)
    inner = rest(weight - (left.double() @ right.double()).to(weight), stats)
    return inner.before(setting.name, setting.positions, left=left, right=right)


def _lorc(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    inner = rest(weight, stats)
    by_outputs = stats if setting.name == "qera" else None
    left, right = low_rank_factors(weight - inner.values, setting.number, by_outputs)
    return inner.before(setting.name, setting.positions, left=left, right=right)


def _known(setting: Setting, rest: Rounding, weight: Tensor, stats: LayerStats | None) -> Rounded:
    """Nothing to do here: statistics were gathered with token weights (``rsq``), all settings say ``weighted``."""
    return rest(weight, stats)


# Steps that change what the rest of the recipe rounds: (setting, rest, weight, statistics) -> what comes out.
STEPS: dict[str, Callable[..., Rounded]] = {
    "hadamard": _hadamard,
    "smooth": _smooth,
    "awq": _awq,
    "sparse": _sparse,
    "ocs": _ocs,
    "split": _split_clusters,
    "svd": _svd,
    "lorc": _lorc,
    "qera": _lorc,
    "rsq": _known,
    "weighted": _known,
}
# Ways to round to a minimum of the outputs' error, which come last: (weight, format, statistics, range rule, what is
# nearest) -> values.
ROUNDINGS: dict[str, Callable[..., Tensor]] = {
    "gptq": gptq,
    "adaround": adaround,
    "flexround": flexround,
    "adaquant": adaquant,
}
