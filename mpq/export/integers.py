"""Integer weights as GPTQModel, AutoRound and others write them: bits, group size (-1 for whole channels), symmetry."""

from __future__ import annotations

from typing import Any

from mpq.quantizers import NumberFormat


def integer_settings(fmt: NumberFormat) -> dict[str, Any]:
    """``bits``, ``group_size`` and ``sym`` of an integer format."""
    return {"bits": fmt.bits, "group_size": fmt.group_size or -1, "sym": fmt.symmetric}


def in_block(name: str) -> bool:
    """Whether a layer is in one of a model's numbered blocks: tools that quantize blocks leave the others float."""
    return any(part.isdigit() for part in name.split("."))
