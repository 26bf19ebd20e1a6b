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
from mpq.problem import Floats

_VERSION = "1"


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """Loss of each choice, measured once; every budget is solved from it.

    Attributes:
        groups: Names of the groups ``[G]``.
        schemes: Names of the schemes ``[S]``.
        loss: Predicted rise of the loss ``[G, S]`` when only this group changes; nats for ``kl``.
        stderr: Standard error of each entry ``[G, S]``.
        factor: Interaction factor ``[R, G, S]`` or None. The predicted loss of a whole pick, interactions included, is
            ``0.5 * sum_r (sum_g factor[r, g, pick[g]])**2``; its diagonal part is ``loss``.
        provenance: Estimator, loss, seed, hashes, cost in forward passes.
    """

    groups: tuple[str, ...]
    schemes: tuple[str, ...]
    loss: Floats
    stderr: Floats
    factor: Floats | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def total(self, pick: ArrayLike) -> tuple[float, float]:
        """Predicted loss of a pick without interactions, and its standard error as if entries were independent."""
        picks = (np.arange(len(self.groups)), np.asarray(pick, np.int64))
        return float(self.loss[picks].sum()), float(np.sqrt(np.square(self.stderr[picks]).sum()))

    def quadratic(self, pick: ArrayLike) -> float:
        """Predicted loss of a pick with all pairwise interactions.

        Raises:
            ValueError: If the estimator gives no interactions.
        """
        if self.factor is None:
            raise ValueError(f"the {self.provenance.get('estimator')} table has no interactions")
        picked = self.factor[:, np.arange(len(self.groups)), np.asarray(pick, np.int64)]
        return 0.5 * float(np.square(picked.sum(1)).sum())

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        arrays = {"loss": self.loss, "stderr": self.stderr}
        if self.factor is not None:
            arrays["factor"] = self.factor
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
                arrays.get("factor"),
                header["provenance"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is a damaged sensitivity table: {error!r}") from None
        shape = (len(table.groups), len(table.schemes))
        factor_fits = table.factor is None or table.factor.shape[1:] == shape
        if table.loss.shape != shape or table.stderr.shape != shape or not factor_fits:
            raise ConfigError(f"{path} is a damaged sensitivity table: its arrays don't fit its names")
        return table
