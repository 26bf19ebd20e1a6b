"""Numbers for people."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"), (1e-12, "p"))


def si(value: float, unit: str) -> str:
    """A number with a metric prefix and its unit.

    Example:
        >>> si(144_398, "B"), si(1.159e9, "BitOps"), si(950, "B")
        ('144.4 kB', '1.159 GBitOps', '950 B')
        >>> si(4.63e-5, "s"), si(0.0, "s")
        ('46.3 us', '0 s')
    """
    if 0 < abs(value) < 1 and unit in ("s", "J"):
        factor, prefix = next(((f, p) for f, p in _SMALL if abs(value) >= f), _SMALL[-1])
        return f"{value / factor:,.4g} {prefix}{unit}"
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f), (1.0, ""))
    scaled = f"{value / factor:,.4g}" if factor > 1 else f"{value:,.4g}"
    return f"{scaled} {prefix}{unit}"


def show(value: float, unit: str) -> str:
    """A value or a change of a metric with its unit.

    Example:
        >>> show(144_398, "bytes"), show(3.578, "bits")
        ('144.4 kB', '3.58 bits')
    """
    if unit == "bits":
        return f"{value:.3g} bits"
    return si(value, {"bytes": "B", "bit operations": "BitOps"}.get(unit, unit))
