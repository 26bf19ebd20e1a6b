"""mpq: mixed-precision bit allocation for trained PyTorch networks.

    cfg = mpq.allocate(model, calib, budget="avg_bits<=4", schemes="W2A8,W3A8,W4A8,W8A8")
    cfg["layer1.0.conv1"].weight.bits
    quantized = mpq.quantize(model, cfg)

Everything is imported on first use: ``import mpq`` costs nothing.
"""

from typing import TYPE_CHECKING

from mpq import export
from mpq._lazy import lazy_names

if TYPE_CHECKING:
    from mpq.allocation import allocate, analyze, pareto
    from mpq.analysis import Analysis
    from mpq.apply import quantize
    from mpq.budget import Budget
    from mpq.config import BitConfig, Measured, load
    from mpq.distill import distilled_data
    from mpq.errors import MpqError
    from mpq.estimates import Estimate, estimate
    from mpq.evaluation import Evaluator, evaluate
    from mpq.export.importing import import_config
    from mpq.frontier import Frontier
    from mpq.global_choices import GlobalChoices
    from mpq.layers import LayerGraph
    from mpq.packed import load_quantized, packed_size, save_quantized
    from mpq.quantizers import NumberFormat, Scheme
    from mpq.trace import trace_model

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "BitConfig",
    "Budget",
    "Estimate",
    "Evaluator",
    "Frontier",
    "GlobalChoices",
    "LayerGraph",
    "Measured",
    "MpqError",
    "NumberFormat",
    "Scheme",
    "allocate",
    "analyze",
    "distilled_data",
    "estimate",
    "evaluate",
    "export",
    "import_config",
    "load",
    "load_quantized",
    "packed_size",
    "pareto",
    "quantize",
    "save_quantized",
    "trace_model",
]

_MODULES = {
    "mpq.allocation": ("allocate", "analyze", "pareto"),
    "mpq.analysis": ("Analysis",),
    "mpq.apply": ("quantize",),
    "mpq.budget": ("Budget",),
    "mpq.config": ("BitConfig", "Measured", "load"),
    "mpq.distill": ("distilled_data",),
    "mpq.errors": ("MpqError",),
    "mpq.estimates": ("Estimate", "estimate"),
    "mpq.evaluation": ("Evaluator", "evaluate"),
    "mpq.export.importing": ("import_config",),
    "mpq.frontier": ("Frontier",),
    "mpq.global_choices": ("GlobalChoices",),
    "mpq.layers": ("LayerGraph",),
    "mpq.packed": ("load_quantized", "packed_size", "save_quantized"),
    "mpq.quantizers.formats": ("NumberFormat",),
    "mpq.quantizers.schemes": ("Scheme",),
    "mpq.trace": ("trace_model",),
}

# No public function shares its module's name: importing the module would replace the function.
__getattr__ = lazy_names(__name__, {name: module for module, names in _MODULES.items() for name in names})


def __dir__() -> list[str]:
    return __all__
