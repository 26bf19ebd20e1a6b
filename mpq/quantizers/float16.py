"""What formats keep in float16 beside their codes."""

from __future__ import annotations

from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import all_finite


def to_float16(x: Tensor, what: str, way_out: str = "") -> Tensor:
    """A finite tensor in float16.

    Args:
        x: Any shape.
        what: It is, for the message.
        way_out: What to do about it, likewise.

    Raises:
        FormatError: If an element is beyond float16's ends.
    """
    half = x.half()
    if not all_finite(half):
        largest = float(x.abs().max())
        advice = f"; {way_out}" if way_out else ""
        raise FormatError(f"{what} is {largest:.4g}, but float16, which it is kept in, ends at 65504{advice}")
    return half
