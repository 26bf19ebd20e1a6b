"""Sensitivity estimators: each turns (model, search space, data) into a `SensitivityTable`.

An estimator is a function like `influence`; a new one is one file here plus one line in `ESTIMATORS`.
"""

from collections.abc import Callable

from mpq.sensitivity.hessian_trace import hessian_trace
from mpq.sensitivity.influence import influence
from mpq.sensitivity.table import SensitivityTable

# (view, space, data, bank, loss, *, seed, progress, further options) -> table, as in `influence`.
Estimator = Callable[..., SensitivityTable]

ESTIMATORS: dict[str, Estimator] = {"influence": influence, "hessian_trace": hessian_trace}

__all__ = ["ESTIMATORS", "Estimator", "SensitivityTable", "hessian_trace", "influence"]
