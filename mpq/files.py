"""Writing files whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file; where that fails, what was there before stays.

    Args:
        path: Where to.
        text: Written as UTF-8.

    Raises:
        OSError: If it can't be written.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():  # a device or a pipe; of a folder the error says so
        target.write_text(text, "utf8")
        return Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, "utf8")
        beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    return Path(path)
