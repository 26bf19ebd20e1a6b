"""Packages whose names are imported on first use, so that ``import mpq`` costs nothing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mpq.errors import MpqError


def lazy_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` (PEP 562) for a package.

    Args:
        package: ``__name__`` of the package.
        names: Public name -> module that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(names[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__


def require(modules: tuple[str, ...], extra: str) -> None:
    """Refuse early what needs packages that are not installed.

    Args:
        modules: Names to import.
        extra: The extra of mpq that installs them.

    Raises:
        MpqError: If one is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MpqError(f"{module} is not installed: pip install 'mpq[{extra}]'")
