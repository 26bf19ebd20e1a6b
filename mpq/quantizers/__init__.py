"""Number formats and the kernels that round tensors to them; nothing here knows about layers."""

from typing import TYPE_CHECKING

from mpq._lazy import lazy_names

if TYPE_CHECKING:
    from mpq.quantizers.formats import NumberFormat
    from mpq.quantizers.loss_aware import loss_aware_range
    from mpq.quantizers.observers import ActivationObserver
    from mpq.quantizers.ranges import find_range
    from mpq.quantizers.recipes import apply_recipe
    from mpq.quantizers.schemes import Scheme, parse_schemes
    from mpq.quantizers.statistics import LayerStats
    from mpq.quantizers.tensors import (
        QuantizedTensor,
        dequantize,
        fake_quantize,
        fake_quantize_all,
        fake_quantize_dynamic,
        fake_quantize_static,
        quantize,
        quantize_all,
    )

__all__ = [
    "ActivationObserver",
    "LayerStats",
    "NumberFormat",
    "QuantizedTensor",
    "Scheme",
    "apply_recipe",
    "dequantize",
    "fake_quantize",
    "fake_quantize_all",
    "fake_quantize_dynamic",
    "fake_quantize_static",
    "find_range",
    "loss_aware_range",
    "parse_schemes",
    "quantize",
    "quantize_all",
]

# Formats are plain values: reading them (a saved BitConfig, say) must not load torch.
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(
        (
            "QuantizedTensor",
            "dequantize",
            "fake_quantize",
            "fake_quantize_all",
            "fake_quantize_dynamic",
            "fake_quantize_static",
            "quantize",
            "quantize_all",
        ),
        "mpq.quantizers.tensors",
    )
    | {
        "NumberFormat": "mpq.quantizers.formats",
        "Scheme": "mpq.quantizers.schemes",
        "parse_schemes": "mpq.quantizers.schemes",
        "ActivationObserver": "mpq.quantizers.observers",
        "find_range": "mpq.quantizers.ranges",
        "apply_recipe": "mpq.quantizers.recipes",
        "LayerStats": "mpq.quantizers.statistics",
        "loss_aware_range": "mpq.quantizers.loss_aware",
    },
)
