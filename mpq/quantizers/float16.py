"""What formats keep in float16 beside their codes."""

from __future__ import annotations

from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import all_finite


def to_float16(x: Tensor, what: str) -> Tensor:
    """A finite tensor in float16.

    Args:
        x: Any shape.
        what: It is, for the message.

    Raises:
        FormatError: If an element is beyond float16's ends.
    """
    half = x.half()
    if not all_finite(half):
        raise FormatError(f"{what} is {float(x.abs().max()):.4g}, but float16, which it is kept in, ends at 65504")
    return half
