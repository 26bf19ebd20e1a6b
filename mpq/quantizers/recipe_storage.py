"""What the steps of a recipe store beside the codes: the names, types and shapes of tensors. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpq.errors import FormatError

# Name of a part beside the codes -> its data type and shape.
KeptParts = dict[str, tuple[str, tuple[int, ...]]]
_BYTES = {"float16": 2, "int32": 4, "uint8": 1}


def split_step(step: str) -> tuple[str, int]:
    """A step's name and the number after it; 0 where there is none."""
    name = step.rstrip("0123456789")
    return name, int(step[len(name) :] or 0)


def axis_of(shape: Sequence[int], channel_axis: int) -> int:
    """An axis counted from the first one; 0 of a number, which has none.

    Raises:
        FormatError: If there is no such axis.
    """
    if not -max(len(shape), 1) <= channel_axis < max(len(shape), 1):
        raise FormatError(f"a tensor {list(shape)} has no axis {channel_axis}")
    return channel_axis % max(len(shape), 1)


def matrix_of(shape: Sequence[int], channel_axis: int = 0) -> tuple[int, int, int]:
    """Output channels, input channels, and the elements that each pair of them has (a kernel's)."""
    channel_axis = axis_of(shape, channel_axis)
    rest = [n for i, n in enumerate(shape) if i != channel_axis]
    return (shape[channel_axis] if shape else 1), (rest[0] if rest else 1), math.prod(rest[1:])


def recipe_layout(recipe: Sequence[str], channels: int, inputs: int, positions: int) -> tuple[KeptParts, int]:
    """Parts of a weight beside its codes, and the input channels that are left to round.

    Args:
        recipe: The steps.
        channels: Output channels of the weight.
        inputs: Its input channels.
        positions: Neighbouring columns that belong to one of them.
    """
    found: KeptParts = {}
    for step in recipe:
        name, number = split_step(step)
        columns = inputs * positions
        if name in ("svd", "lorc", "qera"):
            rank = min(number, channels, columns)
            found[f"{name}.left"] = "float16", (channels, rank)
            found[f"{name}.right"] = "float16", (rank, columns)
        elif name == "sparse":
            count = min(math.ceil(number * channels * columns / 1000), channels * columns)
            found["sparse.places"], found["sparse.values"] = ("int32", (count,)), ("float16", (count,))
        elif name in ("smooth", "awq"):
            found[f"{name}.scales"] = "float16", (inputs,)
        elif name == "ocs":
            added = min(math.ceil(number * inputs / 100), inputs)
            found["ocs.channels"] = "int32", (added,)
            inputs += added
        elif name == "split":
            found["split.clusters"] = "uint8", (math.ceil(cluster_bits(number) * channels * columns / 8),)
    return found, inputs


def cluster_bits(clusters: int) -> int:
    """Bits that tell one of some clusters."""
    return (clusters - 1).bit_length()


def kept_bytes(kept: KeptParts) -> int:
    """Bytes of all parts."""
    return sum(_BYTES[kind] * math.prod(shape) for kind, shape in kept.values())
