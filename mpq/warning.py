"""Warnings that name the user's line, however deep in mpq they are given."""

from __future__ import annotations

import sys
import warnings


def warn(text: str) -> None:
    """Warn the nearest caller outside of mpq."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mpq":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
