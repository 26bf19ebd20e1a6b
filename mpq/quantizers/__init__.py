"""Number formats and the kernels that round tensors to them; nothing here knows about layers."""

from typing import TYPE_CHECKING

from mpq._lazy import lazy_names

if TYPE_CHECKING:
    from mpq.quantizers.formats import NumberFormat, Scheme, parse_schemes
    from mpq.quantizers.integer import (
        QuantizedTensor,
        dequantize,
        fake_quantize,
        fake_quantize_static,
        quantize,
    )
    from mpq.quantizers.observers import ActivationObserver
    from mpq.quantizers.ranges import find_range

__all__ = [
    "ActivationObserver",
    "NumberFormat",
    "QuantizedTensor",
    "Scheme",
    "dequantize",
    "fake_quantize",
    "fake_quantize_static",
    "find_range",
    "parse_schemes",
    "quantize",
]

# Formats are plain values: reading them (a saved BitConfig, say) must not load torch.
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(("NumberFormat", "Scheme", "parse_schemes"), "mpq.quantizers.formats")
    | dict.fromkeys(
        ("QuantizedTensor", "dequantize", "fake_quantize", "fake_quantize_static", "quantize"),
        "mpq.quantizers.integer",
    )
    | {"ActivationObserver": "mpq.quantizers.observers", "find_range": "mpq.quantizers.ranges"},
)
