"""Budgets as people write them: ``size<=25%``, ``avg_bits<=4``, ``bitops<=50G``, ``accuracy_drop<=0.5%``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpq.errors import BudgetError

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {f"{p}B": f for p, f in _PREFIXES.items()} | {f"{p}iB": 1024.0**i for i, p in enumerate("KMG", 1)}
_COUNTS = {**_PREFIXES, "Gbitops": 1e9}
_BITS = {"": 1.0, "bit": 1.0, "bits": 1.0}

# Metric -> units with their factor to the metric's own unit; "%" is of the float model.
UNITS: dict[str, dict[str, float]] = {
    "size": {"": 1.0, **_BYTES, "%": 0.01},
    "avg_bits": _BITS,
    "stored_bits": _BITS,
    "bitops": {**_COUNTS, "%": 0.01},
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "%": 0.01},
    "peak_memory": {"": 1.0, **_BYTES, "%": 0.01},
    "resident_bytes": {"": 1.0, **_BYTES, "%": 0.01},
    "active_bytes": {"": 1.0, **_BYTES, "%": 0.01},
    "compute_cost": {**_COUNTS, "%": 0.01},
    "bops": {**_COUNTS, "%": 0.01},
    "energy": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9, "pJ": 1e-12, "%": 0.01},
    "accuracy_drop": {"%": 0.01},  # percentage points; without a unit, .5 could be meant as half a point or as half
}
_BUDGET = re.compile(r"\s*(\w+)\s*(<=|≤)\s*(-?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Budget:
    """A limit on one metric.

    Attributes:
        metric: A name in `mpq.cost_models.COST_MODELS`, or ``accuracy_drop``.
        value: Limit in the metric's own unit, or as a share of the float model.
        relative: The value is a share of the float model.
        text: As the user wrote it.

    Example:
        >>> Budget.parse("size <= 300KB")
        Budget(metric='size', value=300000.0, relative=False, text='size<=300KB')
        >>> Budget.parse("size<=25%").limit(reference=1000.0)
        250.0
    """

    metric: str
    value: float
    relative: bool
    text: str

    def limit(self, reference: float) -> float:
        """The limit in the metric's own unit, given the float model's value.

        Raises:
            BudgetError: If a share is asked of a float model whose value is not known (0).
        """
        if self.relative and not reference:
            raise BudgetError(f"{self.text}: the float model does not run there; write an absolute limit")
        return self.value * reference if self.relative else self.value

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read one budget.

        Raises:
            BudgetError: If it does not parse, has an unknown metric or unit, or can't be positive.
        """
        match = _BUDGET.fullmatch(text)
        if not match:
            raise BudgetError(f"{text!r} is not a budget; write metric<=limit, such as 'size<=25%' or 'avg_bits<=4'")
        metric, _, number, unit = match.groups()
        if metric not in UNITS:
            raise BudgetError(f"unknown metric {metric!r} in {text!r}; known: {', '.join(UNITS)}")
        if unit not in UNITS[metric]:
            known = ", ".join(u or "(none)" for u in UNITS[metric])
            raise BudgetError(f"unknown unit {unit!r} for {metric} in {text!r}; known: {known}")
        try:
            value = float(number) * UNITS[metric][unit]
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf and not (metric == "accuracy_drop" and value == 0):
            raise BudgetError(f"the limit in {text!r} must be a positive number")
        if metric == "accuracy_drop" and value > 1:
            raise BudgetError(f"{text!r} allows more than 100 percentage points")
        relative = unit == "%" and metric != "accuracy_drop"
        return cls(metric, value, relative, f"{metric}<={number}{unit}")


def rounded_up(metric: str, value: float) -> str:
    """A budget with a limit of four digits, never below a value (over 0) in the metric's own unit.

    Example:
        >>> rounded_up("latency", 6.43621345e-6), rounded_up("size", 1_234_561.0), rounded_up("avg_bits", 2.0)
        ('latency<=6.437us', 'size<=1.235MB', 'avg_bits<=2')
    """
    known = {u: f for u, f in UNITS[metric].items() if u != "%" and "i" not in u}
    below = [u for u in known if known[u] <= value] or [min(known, key=known.__getitem__)]
    unit = max(below, key=lambda u: (known[u], len(u)))  # B rather than nothing
    scaled = value / known[unit]
    step = 10.0 ** (math.floor(math.log10(scaled)) - 3)
    return f"{metric}<={math.ceil(scaled / step - 1e-9) * step:.10g}{unit}"


def parse_budgets(budgets: str | Budget | Iterable[str | Budget]) -> tuple[Budget, ...]:
    """Read one budget, several separated by commas, or any iterable of them.

    Raises:
        BudgetError: If there is none, one does not parse, or two limit the same metric.
    """
    if isinstance(budgets, Mapping) or not isinstance(budgets, str | Budget | Iterable):
        given = type(budgets).__name__ if isinstance(budgets, Mapping) else repr(budgets)
        raise BudgetError(f"{given} is not a budget; write metric<=limit, such as 'size<=25%' or 'avg_bits<=4'")
    parts = budgets.split(",") if isinstance(budgets, str) else [budgets] if isinstance(budgets, Budget) else budgets
    parsed = tuple(b if isinstance(b, Budget) else Budget.parse(b) for b in parts)
    if not parsed:
        raise BudgetError("no budget given; write metric<=limit, such as 'size<=25%' or 'avg_bits<=4'")
    for i, budget in enumerate(parsed):
        twin = next((b for b in parsed[:i] if b.metric == budget.metric), None)
        if twin:
            raise BudgetError(f"contradictory budgets: both {twin.text} and {budget.text}; keep one limit per metric")
    return parsed
