"""How estimators use a score store: some keep their parts, of the others the finished table is kept."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from mpq import __version__
from mpq.bank import QuantizerBank
from mpq.errors import MpqError
from mpq.layers import LayerGraph
from mpq.losses import OutputLoss
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.store import ScoreStore
from mpq.view import ModelView


def open_store(
    folder: str | Path, model_hash: str, view: ModelView, graph: LayerGraph, bank: QuantizerBank, loss: OutputLoss
) -> ScoreStore:
    """A store for one model, quantized in one way.

    Args:
        folder: Where the files are.
        model_hash: Of all weights and buffers.
        view: The model; its code tells it from another one with the same weights.
        graph: Its layers.
        bank: Range rules are a part of the address.
        loss: What is protected.

    Raises:
        MpqError: If the loss can't be told from another one.
    """
    if " at 0x" in repr(loss):
        raise MpqError(
            "a store can't tell a loss of your own from another one; measure without store=, or pass an object with "
            "value, probe, all_probes and by_sample (mpq.losses.OutputLoss) whose repr says what it is"
        )
    return ScoreStore(Path(folder)).within(
        version=__version__,
        model=model_hash,
        loss=repr(loss),
        code=str(view.module),
        layers=[repr(x) for x in graph],
        ranges=[bank.weight_range, bank.activation_range],
    )


def stored(
    estimate: partial[SensitivityTable],
    options: dict[str, Any],
    store: ScoreStore | None,
    *,
    data: str,
    space: SearchSpace,
    seed: int,
) -> SensitivityTable:
    """Run an estimator, or take its table from the store.

    Args:
        estimate: The estimator with all its arguments but options.
        options: Its options.
        store: None to run it in any case.
        data: Hash of the calibration data.
        space: Groups and schemes.
        seed: Of everything random.
    """
    own = not estimate.func.__module__.startswith("mpq.")  # no name tells whether its code has changed
    if store is None or own:
        return estimate(**options)
    if "store" in inspect.signature(estimate.func).parameters:
        return estimate(store=store, **options)
    about = {
        "estimator": estimate.func.__name__,
        "options": {k: repr(v) for k, v in sorted(options.items())},
        "data": data,
        "groups": [g.name for g in space.groups],
        "schemes": [str(s) for s in space.schemes],
        "allowed": space.allowed.tolist(),
        "seed": seed,
    }
    arrays = store.get(**about)
    if arrays is not None:
        return SensitivityTable.from_arrays(arrays, f"the entry in {store.folder}")
    table = estimate(**options)
    store.put(table.to_arrays(), **about)
    return table
