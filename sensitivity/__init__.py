"""Sensitivity estimators: each turns (model, search space, data) into a `SensitivityTable`.

An estimator is a function like `influence`; a new one is one file here plus one line in `ESTIMATORS`.
"""

from typing import Any, Protocol

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.losses import OutputLoss
from mpq.sensitivity.hessian_trace import hessian_trace
from mpq.sensitivity.influence import influence
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.view import ModelView


class Estimator(Protocol):
    """What every estimator is; further options are keywords."""

    def __call__(
        self, view: ModelView, space: SearchSpace, data: Calibration, bank: QuantizerBank, loss: OutputLoss,
        *, seed: int = 0, progress: bool = True, **options: Any,
    ) -> SensitivityTable:
        """Predicted loss of every scheme of every group."""


ESTIMATORS: dict[str, Estimator] = {"influence": influence, "hessian_trace": hessian_trace}

__all__ = ["ESTIMATORS", "Estimator", "SensitivityTable", "hessian_trace", "influence"]
