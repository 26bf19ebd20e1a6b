"""Options of estimators: checked before any work is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.errors import MpqError

if TYPE_CHECKING:
    from mpq.sensitivity import Estimator

_GIVEN = 5  # view, space, data, bank and loss come from the analysis


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least

    return fits, f"a whole number of at least {least}"


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and float(value) > 0


def _share(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) <= 1


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "anchors": _whole(0),
    "anchor_samples": _whole(1),
    "draws": _whole(1),
    "iterations": _whole(1),
    "permutations": _whole(1),
    "probes": _whole(1),
    "rank": _whole(1),
    "shrinkage": (_share, "between 0 and 1"),
    "sigmas": (_positive, "above 0"),
    "tolerance": (_positive, "above 0"),
}


def check_values(**options: Any) -> None:
    """Refuse values out of range; None, where an estimator takes it, is none.

    Args:
        **options: Of an estimator in here.

    Raises:
        MpqError: Naming the option.
    """
    for name, value in options.items():
        if name in _RULES and value is not None:
            fits, meaning = _RULES[name]
            if not fits(value):
                raise MpqError(f"{name} must be {meaning}, not {value!r}")


def find_estimator(estimator: str | Estimator, options: Mapping[str, Any], label: str | None = None) -> Estimator:
    """An estimator by name or as it is, once it is known to take the options.

    Args:
        estimator: A name in `mpq.sensitivity.ESTIMATORS`, or an estimator.
        options: Its keywords.
        label: What to call it in errors.

    Raises:
        MpqError: If the name or an option is unknown, or a value is out of range.
    """
    from mpq.sensitivity import ESTIMATORS

    function = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    if not callable(function):
        raise MpqError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    origin = function.func if isinstance(function, partial) else function
    known = dict(list(inspect.signature(function).parameters.items())[_GIVEN:])
    unknown = sorted(set(options) - set(known))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        name = label or (estimator if isinstance(estimator, str) else getattr(origin, "__name__", repr(origin)))
        raise MpqError(f"estimator {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    # Options of the same name may mean something else in an estimator of the user's own.
    if getattr(origin, "__module__", "").startswith("mpq."):
        values = {name: p.default for name, p in known.items() if p.default is not p.empty} | dict(options)
        check_values(**values)
        for name, value in values.items():
            if value is None and "None" not in str(known[name].annotation):
                raise MpqError(f"{name} of {origin.__name__} can't be None")
    return function
