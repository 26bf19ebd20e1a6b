"""The sensitivity table: predicted loss of every scheme of every group, with its uncertainty and origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpq.errors import ConfigError
from mpq.problem import Floats, pair_sum

_VERSION = "2"
_OPTIONAL = "interactions", "rows"


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """Loss of each choice, measured once; every budget is solved from it.

    Attributes:
        groups: Names of the groups ``[G]``.
        schemes: Names of the schemes ``[S]``.
        loss: Predicted rise of the loss ``[G, S]`` when only this group changes; nats for ``kl``.
        stderr: Standard error of each entry ``[G, S]``.
        interactions: ``[G, S, G, S]`` or None: what a pair of choices adds to the sum of their losses; symmetric, zero
            within a group.
        rows: Effects ``[N, D, G, S]`` of each sample and draw, or None. Half the squared sum over a pick's entries,
            summed over draws, is one sample's share of the predicted loss: `stderr_of` takes its spread.
        provenance: Estimator, loss, seed, hashes, cost in forward passes.
    """

    groups: tuple[str, ...]
    schemes: tuple[str, ...]
    loss: Floats
    stderr: Floats
    interactions: Floats | None = None
    rows: Floats | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def total(self, pick: ArrayLike) -> tuple[float, float]:
        """Predicted loss of a pick without interactions, and its standard error as if entries were independent."""
        picks = (np.arange(len(self.groups)), np.asarray(pick, np.int64))
        return float(self.loss[picks].sum()), float(np.sqrt(np.square(self.stderr[picks]).sum()))

    def predict(self, pick: ArrayLike) -> float:
        """Predicted loss of a pick ``[G]``, with interactions where the estimator gives them."""
        return self.total(pick)[0] + pair_sum(self.interactions, pick)

    def stderr_of(self, pick: ArrayLike) -> float:
        """Standard error of `predict`: the jackknife over samples where there are rows, else that of `total`."""
        if self.rows is None:
            return self.total(pick)[1]
        picked = self.rows[:, :, np.arange(len(self.groups)), np.asarray(pick, np.int64)]
        shares = 0.5 * np.square(picked.sum(2)).sum(1)
        # Leaving one sample out at a time gives just this for a mean.
        return float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else float("nan")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        arrays = {"loss": self.loss, "stderr": self.stderr}
        arrays |= {k: a for k in _OPTIONAL if (a := getattr(self, k)) is not None}
        header = {"groups": self.groups, "schemes": self.schemes, "provenance": dict(self.provenance)}
        save_file(arrays, path, {"mpq_sensitivity": _VERSION, "header": json.dumps(header, sort_keys=True)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read a file written by `save`.

        Raises:
            ConfigError: If it is damaged or of another version.
        """
        try:
            with safe_open(path, "numpy") as f:
                metadata = f.metadata() or {}
                arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a sensitivity table: {error}") from None
        if metadata.get("mpq_sensitivity") != _VERSION:
            raise ConfigError(f"{path} is not a sensitivity table of version {_VERSION}")
        try:
            header = json.loads(metadata["header"])
            table = cls(
                tuple(header["groups"]),
                tuple(header["schemes"]),
                arrays["loss"],
                arrays["stderr"],
                *(arrays.get(k) for k in _OPTIONAL),
                header["provenance"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is a damaged sensitivity table: {error!r}") from None
        shape = (len(table.groups), len(table.schemes))
        wanted = {"loss": shape, "stderr": shape, "interactions": shape + shape}
        fits = all(k not in arrays or arrays[k].shape == v for k, v in wanted.items())
        if not fits or (table.rows is not None and table.rows.shape[2:] != shape):
            raise ConfigError(f"{path} is a damaged sensitivity table: its arrays don't fit its names")
        return table
