"""Activation ranges by what they do to the network's predictions: ``mpq.analyze(..., activation_range="loss")``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from mpq.apply import InputQuantizer
from mpq.bank import QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, FormatError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.progress import progress_bar
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
    """Where a bank's rule is ``loss``, give it the clip of each layer's input after which the loss rises least.

    PD-Quant (Liu et al., CVPR 2023) chooses ranges by the difference between predictions. Here one layer's input is
    rounded at a time and all else is float, so that no order matters and what runs before the layer is not computed
    again (`mpq.sensitivity.prefix`). Among clips with the same loss the widest wins.

    Args:
        view: The model.
        space: Layers and schemes.
        data: Calibration data. Ends are those of all samples, losses those of the first batches with 64 samples.
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
    wanted = [(x, fmt) for x in space.layers for fmt in _calibrated(x, space)]
    if candidates is None or not wanted:
        return 0.0
    batches = _first(data)
    ends = {(x.name, fmt): bank.ends(x, fmt) for x, fmt in wanted}
    rises = {(x.name, fmt): dict.fromkeys(clip_shares(fmt, candidates), 0.0) for x, fmt in wanted}

    def measured(batch: Batch) -> Iterator[None]:
        start = float_recording(view, batch)
        meter = rise_meter(loss, start.output, batch)
        for layer, fmt in wanted:
            module, (lo, hi), found = view.layers[layer.name], ends[layer.name, fmt], rises[layer.name, fmt]
            for share in found:
                quantizer = InputQuantizer(fmt, (lo * share, hi * share), bank.basis(layer, fmt))
                with view.hooked([module.register_forward_pre_hook(quantizer, with_kwargs=True)]):
                    found[share] += float(meter(start.run([layer.name])).sum())
            yield

    steps = (step for batch in batches for step in measured(batch))  # one batch's outputs in memory at a time
    for _ in progress_bar(steps, "activation ranges by loss", progress, len(batches) * len(wanted)):
        pass
    chosen = {}
    for (name, fmt), found in rises.items():
        try:
            share = best_clip(fmt, candidates, found.__getitem__)
        except FormatError as error:
            raise DataError(f"the input of layer {name!r} in {fmt.name}: {error}") from None
        lo, hi = ends[name, fmt]
        chosen[name, fmt] = lo * share, hi * share
    bank.set_ranges(chosen)
    return (1 + len(wanted) * candidates) * sum(b.size for b in batches) / data.num_samples


def _calibrated(layer: LayerSpec, space: SearchSpace) -> list[NumberFormat]:
    formats = (layer_scheme(layer, s).activation for s in space.schemes)
    return list(dict.fromkeys(fmt for fmt in formats if fmt is not None and fmt.calibrated))


def _first(data: Calibration) -> list[Batch]:
    """Whole batches, until there are enough samples."""
    before = accumulate((b.size for b in data.batches), initial=0)
    return [b for b, count in zip(data.batches, before, strict=False) if count < _SAMPLES]
