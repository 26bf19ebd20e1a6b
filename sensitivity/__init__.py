"""Sensitivity estimators: each turns (model, search space, data) into a `SensitivityTable`.

An estimator is a function like `influence`; a new one is one file here plus one line in `ESTIMATORS`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpq._lazy import lazy_names
from mpq.sensitivity.anchored import anchored
from mpq.sensitivity.fisher_trace import fisher_trace
from mpq.sensitivity.hessian_trace import hessian_trace
from mpq.sensitivity.influence import influence
from mpq.sensitivity.interaction import Dependency, augmented_order, dependency, measured_pairs, shapley
from mpq.sensitivity.kernel_share import kernel_share
from mpq.sensitivity.noise import noise
from mpq.sensitivity.perturbation import perturbation, smallest_precision
from mpq.sensitivity.saliency import (
    activation_saliency,
    gradient_saliency,
    lim,
    outlier_share,
    output_channel_salience,
)
from mpq.sensitivity.squared_gradient import squared_gradient
from mpq.sensitivity.table import SensitivityTable
from mpq.sensitivity.top_eigenvalue import hawq_order, top_eigenvalue
from mpq.sensitivity.weight_importance import weight_importance
from mpq.sensitivity.weight_only import weight_sqnr, zd

if TYPE_CHECKING:
    from mpq.comparison import Comparison, compare

# (view, space, data, bank, loss, *, seed, progress, further options) -> table, as in `influence`.
Estimator = Callable[..., SensitivityTable]

ESTIMATORS: dict[str, Estimator] = {
    "anchored": anchored,
    "influence": influence,
    "hessian_trace": hessian_trace,
    "top_eigenvalue": top_eigenvalue,
    "fisher_trace": fisher_trace,
    "squared_gradient": squared_gradient,
    "measured_pairs": measured_pairs,
    "shapley": shapley,
    "perturbation": perturbation,
    "noise": noise,
    "gradient_saliency": gradient_saliency,
    "weight_importance": weight_importance,
    "activation_saliency": activation_saliency,
    "output_channel_salience": output_channel_salience,
    "outlier_share": outlier_share,
    "kernel_share": kernel_share,
    "lim": lim,
    "zd": zd,
    "weight_sqnr": weight_sqnr,
}

__all__ = [
    "ESTIMATORS",
    "Comparison",
    "Dependency",
    "Estimator",
    "SensitivityTable",
    "activation_saliency",
    "anchored",
    "augmented_order",
    "compare",
    "dependency",
    "fisher_trace",
    "gradient_saliency",
    "hawq_order",
    "hessian_trace",
    "influence",
    "kernel_share",
    "lim",
    "measured_pairs",
    "noise",
    "outlier_share",
    "output_channel_salience",
    "perturbation",
    "shapley",
    "smallest_precision",
    "squared_gradient",
    "top_eigenvalue",
    "weight_importance",
    "weight_sqnr",
    "zd",
]

# It runs whole analyses, which need this package.
__getattr__ = lazy_names(__name__, {"Comparison": "mpq.comparison", "compare": "mpq.comparison"})
