"""Numbers for people."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str) -> str:
    """A number with a metric prefix and its unit.

    Example:
        >>> si(144_398, "B"), si(1.159e9, "BitOps"), si(950, "B")
        ('144.4 kB', '1.159 GBitOps', '950 B')
    """
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f), (1.0, ""))
    scaled = f"{value / factor:,.4g}" if factor > 1 else f"{value:,.4g}"
    return f"{scaled} {prefix}{unit}"
