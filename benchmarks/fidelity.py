"""Row of the table in which cost models meet published numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison of a predicted quantity with a published one.

    Args:
        name: What is compared, and where it was published.
        predicted: What the cost model says, with units.
        published: What was published or measured, with units.
        score: The figure the goal is about.
        goal: Bound on the score, like ``">= 0.95"`` or ``"<= 0.2"``.
        met: Whether the score keeps the goal.
    """

    name: str
    predicted: str
    published: str
    score: float
    goal: str
    met: bool
