"""Fields of other tools' files, whose readers name what is missing or of another kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpq.errors import ConfigError, ExportError, FormatError
from mpq.quantizers import NumberFormat, Scheme

T = TypeVar("T")
_KINDS = {int: "a whole number", bool: "true or false", str: "a string", list: "a list", dict: "an object"}


def read_export(path: str | Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file that an exporter wrote.

    Args:
        path: The file.
        hook: What to make of each object in it.

    Raises:
        ExportError: If it can't be read or holds no object.
    """
    try:
        found = json.loads(Path(path).read_text("utf8"), object_hook=hook)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read: {error}; write it with mpq.export") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path} holds no object; write it with mpq.export")
    return found


def take(entry: Mapping[str, Any], name: str, kind: type[T], where: str, default: T | None = None) -> T:
    """A field.

    Args:
        entry: What has it.
        name: Its name.
        kind: Of its value.
        where: The entry in words, for errors.
        default: What it is where the entry has none; without one it must be there.

    Raises:
        ConfigError: If it is not there or of another kind.
    """
    value = entry.get(name)
    if value is None:
        if default is None:
            raise ConfigError(f"{where} has no {name!r}")
        return default
    return of_kind(value, kind, f"{name!r} of {where}")


def of_kind(value: Any, kind: type[T], where: str) -> T:
    """A value that must be of a kind.

    Raises:
        ConfigError: If it is not.
    """
    if type(value) is not kind:  # true is no number here
        raise ConfigError(f"{where} must be {_KINDS[kind]}, not {value!r:.100}")
    return value


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a name begins with what a regular expression matches.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{where} has {pattern!r}, which is no regular expression: {error}") from None


def read_format(name: str, where: str) -> NumberFormat:
    """A format by its name.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return NumberFormat.parse(name)
    except FormatError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_integer(entry: Mapping[str, Any], where: str, *, group_size: int | None = None, sym: bool = True) -> Scheme:
    """Integer weights from ``bits``, ``group_size`` (-1 for whole channels) and ``sym``, with their defaults.

    Raises:
        ConfigError: If a field is missing, of another kind, or no format has it.
    """
    bits, size = take(entry, "bits", int, where), take(entry, "group_size", int, where, group_size)
    groups = f":g{size}" if size > 0 else ""
    symmetric = take(entry, "sym", bool, where, sym)
    return Scheme(read_format(f"int{bits}{groups}{'' if symmetric else ':asym'}", where))
