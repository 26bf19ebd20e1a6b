"""How estimators use a score store: some keep their parts, of the others the finished table is kept."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq import __version__
from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.errors import DataError, MpqError
from mpq.fingerprint import Fingerprint
from mpq.layers import LayerGraph
from mpq.losses import OutputLoss
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.store import ScoreStore
from mpq.view import Forward


def open_store(
    folder: str | Path,
    model: nn.Module,
    forward: Forward | None,
    data: Calibration,
    graph: LayerGraph,
    bank: QuantizerBank,
    loss: OutputLoss,
) -> ScoreStore:
    """A store for one model, run and quantized in one way.

    Args:
        folder: Where the files are.
        model: Its weights, attributes and code tell it from others.
        forward: How it is given a batch.
        data: Refused if it can't be told from other data.
        graph: The model's layers.
        bank: Range rules are a part of the address.
        loss: What is protected.

    Raises:
        DataError: If the data has something without content.
        MpqError: If the model, ``forward`` or the loss has.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise MpqError(f"store={str(folder)!r} is a file; name a folder")
    if data.opaque:
        raise DataError(
            f"a store can't tell this data from other data: it holds a {data.opaque}, whose content can't be read; "
            "measure without store=, or make batches of tensors, arrays, numbers, text and plain objects"
        )
    return ScoreStore(Path(folder)).within(
        versions=[__version__, torch.__version__],
        model=_fingerprint("the model", model),
        forward=_fingerprint("forward=", forward),
        loss=_fingerprint("the loss", loss),
        layers=[repr(x) for x in graph],
        ranges=[bank.weight_range, bank.activation_range],
    )


def _fingerprint(what: str, value: Any) -> str:
    found = Fingerprint(code=True)
    found.add(value)
    if found.opaque:
        raise MpqError(
            f"a store needs a stable source to tell {what} from another version of it, but it depends on a "
            f"{found.opaque}, which has none; measure without store=, or build it of Python functions, classes and "
            "objects that can be pickled"
        )
    return found.hexdigest()


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

    Raises:
        MpqError: If an option can't be told from another one.
    """
    own = not estimate.func.__module__.startswith("mpq.")  # no name tells whether its code has changed
    if store is None or own:
        return estimate(**options)
    if "store" in inspect.signature(estimate.func).parameters:
        return estimate(store=store, **options)
    about = {
        "estimator": estimate.func.__name__,
        "options": _fingerprint("estimator_options", sorted(options.items())),
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
