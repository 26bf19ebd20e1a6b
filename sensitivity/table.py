"""The sensitivity table: predicted loss of every scheme of every group, with its uncertainty and origin."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpq.errors import ConfigError
from mpq.problem import Floats, Ints
from mpq.sensitivity.spread import jackknife, leave_one_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VERSION = 2
_CHUNK = 1 << 22  # elements of a work array


@dataclass(frozen=True, eq=False, repr=False)
class SensitivityTable:
    """Loss of each choice, measured once; every budget is solved from it.

    Attributes:
        groups: Names of the groups ``[G]``.
        schemes: Names of the schemes ``[S]``.
        loss: Predicted rise of the loss ``[G, S]`` when only this group changes; nats for ``kl``.
        stderr: Standard error of each entry ``[G, S]``.
        interactions: ``[G, S, G, S]`` or None: what a pair of choices adds to the sum of their losses; symmetric, zero
            within a group.
        rows: Effects ``[N, D, G, S]`` of each sample and draw, or None. Half their squares, summed over draws, are one
            sample's share of the losses, and their products, shrunk, of the interactions: `stderr_of` takes the spread.
        ceiling: Losses saturate there: a predicted ``v`` becomes ``v / (1 + v / ceiling)``. This changes no order.
        provenance: Estimator, loss, seed, hashes, cost in forward passes.
        batches: Number of the batch of each row ``[N]`` where some group's rows belong to whole batches, or None.
    """

    groups: tuple[str, ...]
    schemes: tuple[str, ...]
    loss: Floats
    stderr: Floats
    interactions: Floats | None = None
    rows: Floats | None = None
    ceiling: float = math.inf
    provenance: Mapping[str, Any] = field(default_factory=dict)
    batches: Ints | None = None

    def total(self, pick: ArrayLike) -> tuple[float, float]:
        """Predicted loss of a pick without interactions, and its standard error as if entries were independent."""
        picks = (np.arange(len(self.groups)), np.asarray(pick, np.int64))
        return float(self.loss[picks].sum()), float(np.sqrt(np.square(self.stderr[picks]).sum()))

    def predict(self, pick: ArrayLike) -> float:
        """Predicted loss of a pick ``[G]``, with interactions where the estimator gives them, and never negative."""
        return float(self.predict_all(np.asarray(pick, np.int64)[None])[0])

    def predict_all(self, picks: ArrayLike) -> Floats:
        """`predict` for many picks ``[K, G]`` at once, ``[K]``."""
        chosen = np.asarray(picks, np.int64)
        G, S = self.loss.shape
        columns = chosen + np.arange(G) * S
        value: Floats = self.loss.reshape(-1)[columns].sum(1)
        if self.interactions is not None:
            pairs = self.interactions.reshape(G * S, G * S)
            for part in np.array_split(np.arange(len(chosen)), max(1, len(chosen) * G * G // _CHUNK)):
                value[part] += 0.5 * pairs[columns[part, :, None], columns[part, None, :]].sum((1, 2))
        return self.saturated(value)

    def saturated(self, value: ArrayLike) -> Floats:
        """Predicted losses of sums of losses and interactions: not negative, and saturated at the ceiling."""
        found = np.maximum(value, 0.0)
        saturated: Floats = found / (1 + found / self.ceiling)
        return saturated

    def stderr_of(self, pick: ArrayLike) -> float:
        """Standard error of `predict`: the jackknife over samples where there are rows, else that of `total`.

        Batches are left out instead where some group's rows belong to whole batches; one batch alone gives NaN. How
        much the interactions are shrunk, and what measured configs say, is taken as given.
        """
        if self.rows is None:
            return self.total(pick)[1]
        groups, chosen = np.arange(len(self.groups)), np.asarray(pick, np.int64)
        effects = self.rows[:, :, groups, chosen]
        shares = 0.5 * np.square(effects).sum((1, 2))
        if self.interactions is not None:
            products = np.einsum("ndg,ndh->gh", effects, effects, optimize=True) / len(effects)
            shrunk = self.interactions[groups[:, None], chosen[:, None], groups, chosen]
            kept = np.divide(shrunk, products, out=np.zeros_like(products), where=products != 0).clip(0, 1)
            shares += 0.5 * ((effects @ kept) * effects).sum((1, 2))
        return float(jackknife(self.saturated(leave_one_out(shares, self.batches))))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses by group, see `mpq.viz.plot_sensitivity`."""
        from mpq.viz.sensitivity import plot_sensitivity

        return plot_sensitivity(self, ax)

    def plot_interactions(self, schemes: str | None = None, ax: Axes | None = None) -> Axes:
        """What groups do to each other, see `mpq.viz.plot_interactions`."""
        from mpq.viz.sensitivity import plot_interactions

        return plot_interactions(self, schemes, ax)

    def __repr__(self) -> str:
        about = f"{len(self.groups)} groups x {len(self.schemes)} schemes ({', '.join(self.schemes)})"
        extras = [] if self.interactions is None else ["interactions"]
        cost = self.provenance.get("forward_passes")
        told = f"{self.provenance.get('estimator')}, {self.provenance.get('loss')}, {cost} forward passes"
        return f"SensitivityTable({about}; {', '.join([told, *extras])})"

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All that is in it as named arrays; `from_arrays` reads them."""
        header = {
            "version": _VERSION,
            "groups": self.groups,
            "schemes": self.schemes,
            "ceiling": None if math.isinf(self.ceiling) else self.ceiling,
            "provenance": dict(self.provenance),
        }
        text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        found = {k: getattr(self, k) for k in ("loss", "stderr", "interactions", "rows", "batches")}
        return {"header": text, **{k: a for k, a in found.items() if a is not None}}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], where: str) -> SensitivityTable:
        """Read what `to_arrays` gave.

        Raises:
            ConfigError: If it is damaged or of another version; ``where`` says which.
        """
        try:
            header = json.loads(arrays["header"].tobytes())
            if header["version"] != _VERSION:
                raise ConfigError(f"{where} is not a sensitivity table of version {_VERSION}")
            table = cls(
                tuple(header["groups"]),
                tuple(header["schemes"]),
                arrays["loss"],
                arrays["stderr"],
                arrays.get("interactions"),
                arrays.get("rows"),
                math.inf if header["ceiling"] is None else float(header["ceiling"]),
                header["provenance"],
                arrays.get("batches"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where} is a damaged sensitivity table: {error!r}") from None
        shape = (len(table.groups), len(table.schemes))
        wanted = {"loss": shape, "stderr": shape, "interactions": shape + shape}
        fits = all(k not in arrays or arrays[k].shape == v for k, v in wanted.items())
        if table.rows is not None:
            fits &= table.rows.ndim == 4 and table.rows.shape[2:] == shape
            fits &= table.batches is None or table.batches.shape == table.rows.shape[:1]
        if not fits:
            raise ConfigError(f"{where} is a damaged sensitivity table: its arrays don't fit its names")
        return table

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        save_file(self.to_arrays(), path, {"mpq_sensitivity": str(_VERSION)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read a file written by `save`.

        Raises:
            ConfigError: If it is damaged or of another version.
        """
        try:
            with safe_open(path, "numpy") as f:
                version = (f.metadata() or {}).get("mpq_sensitivity")
                arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a sensitivity table: {error}") from None
        if version != str(_VERSION):
            raise ConfigError(f"{path} is not a sensitivity table of version {_VERSION}")
        return cls.from_arrays(arrays, str(path))
