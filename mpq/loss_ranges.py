"""Activation ranges by what they do to the network's predictions: ``mpq.analyze(..., activation_range="loss")``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from typing import NamedTuple

from mpq.apply import InputQuantizer
from mpq.bank import QuantizerBank, Range
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, FormatError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.progress import progress_bar
from mpq.quantizers import Scheme
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.loss_aware import best_clip, clip_shares
from mpq.quantizers.ranges import loss_candidates
from mpq.sensitivity.perturbation import float_recording, rise_meter
from mpq.space import SearchSpace, layer_scheme
from mpq.view import ModelView

_SAMPLES = 64


def choose_ranges(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    progress: bool = True,
) -> float:
    """Where a bank's rule is ``loss``, give it the clip of each input of layers after which the loss rises least.

    PD-Quant (Liu et al., CVPR 2023) chooses ranges by the difference between predictions. Here one tensor is rounded at
    a time, for all layers that read it in this format and basis, as a runtime does it once for all: they share a clip.
    All else is float, so that no order matters and what runs before these layers is not computed again
    (`mpq.sensitivity.prefix`). Among clips with the same loss the widest wins.
    Of schemes that a layer may not have no loss is measured: estimators that ask for them all get the whole range.

    Args:
        view: The model.
        space: Layers and schemes.
        data: Calibration data. Ends are those of all samples, losses those of the first whole batches with at
            least 64 samples, or of all if there are fewer.
        bank: Has observed the data.
        loss: What is protected.
        progress: Show a bar.

    Returns:
        What it cost, in forward passes over all of the data; those that were cut short count as whole ones.

    Raises:
        DataError: If the loss of a layer is never a finite number.
        FormatError: If an input has negative numbers and the format has none.
    """
    candidates = loss_candidates(bank.activation_range)
    if candidates is None:
        return 0.0
    chosen = {(x.name, fmt): bank.ends(x, fmt) for x in space.layers for fmt in _calibrated(x, space.schemes)}
    tensors = _tensors(space, chosen)
    batches = data.first(_SAMPLES) if tensors else []
    rises = {key: dict.fromkeys(clip_shares(key.fmt, candidates), 0.0) for key in tensors}

    def measured(batch: Batch) -> Iterator[None]:
        start = float_recording(view, batch)
        meter = rise_meter(loss, start.output, batch)
        for key, layers in tensors.items():
            for share in rises[key]:
                rounding = [
                    view.layers[x.name].register_forward_pre_hook(
                        InputQuantizer(key.fmt, key.clipped(share), bank.basis(x, key.fmt)), with_kwargs=True
                    )
                    for x in layers
                ]
                with view.hooked(rounding):
                    rises[key][share] += float(meter(start.run([x.name for x in layers])).sum())
            yield

    steps = (step for batch in batches for step in measured(batch))  # one batch's outputs in memory at a time
    for _ in progress_bar(steps, "activation ranges by loss", progress, len(batches) * len(tensors)):
        pass
    for key, layers in tensors.items():
        try:
            share = best_clip(key.fmt, candidates, rises[key].__getitem__)
        except FormatError as error:
            raise DataError(f"the input of layer {layers[0].name!r} in {key.fmt.name}: {error}") from None
        chosen |= {(x.name, key.fmt): key.clipped(share) for x in layers}
    bank.set_ranges(chosen)
    return (1 + len(tensors) * candidates) * sum(b.size for b in batches) / data.num_samples


class _Input(NamedTuple):
    """What layers have in common that read one tensor and round it alike.

    Attributes:
        source: Number of the tensor, see `LayerSpec`.
        fmt: What it is rounded to.
        ends: Of its numbers in the basis that it is rounded in; other bases have others.
    """

    source: int | None
    fmt: NumberFormat
    ends: Range

    def clipped(self, share: float) -> Range:
        """A share of the whole range."""
        return self.ends[0] * share, self.ends[1] * share


def _tensors(space: SearchSpace, ends: Mapping[tuple[str, NumberFormat], Range]) -> dict[_Input, list[LayerSpec]]:
    """Tensors and formats with the layers that read them so, of allowed schemes."""
    found: dict[_Input, list[LayerSpec]] = {}
    for group, allowed in zip(space.groups, space.allowed, strict=True):
        for layer in group.layers:
            for fmt in _calibrated(layer, compress(space.schemes, allowed)):
                found.setdefault(_Input(layer.source, fmt, ends[layer.name, fmt]), []).append(layer)
    return found


def _calibrated(layer: LayerSpec, schemes: Iterable[Scheme]) -> list[NumberFormat]:
    formats = (layer_scheme(layer, s).activation for s in schemes)
    return list(dict.fromkeys(fmt for fmt in formats if fmt is not None and fmt.calibrated))
