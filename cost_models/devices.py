"""Device profiles: which pairs of weight and activation formats have a kernel. Data files with sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

from mpq.errors import FormatError
from mpq.quantizers.formats import NumberFormat, Scheme


@dataclass(frozen=True)
class Device:
    """What a target can run.

    Attributes:
        name: Name of the profile.
        description: One line.
        kernels: Pairs of weight and activation formats, by base name (``int8``, ``fp16``; ``float`` means that the
            activation is not quantized). Empty: everything runs.
        source: Where the figures come from.
    """

    name: str
    description: str
    kernels: tuple[tuple[str, str], ...]
    source: str

    def supports(self, scheme: Scheme) -> bool:
        """Whether a layer with this scheme has a kernel here."""
        pair = (_base(scheme.weight), _base(scheme.activation))
        return not self.kernels or pair in self.kernels

    def kernel_names(self) -> str:
        """The supported pairs in words."""
        return ", ".join(f"{w} x {a}" for w, a in self.kernels) or "every scheme"


def _base(fmt: NumberFormat | None) -> str:
    return "float" if fmt is None else fmt.name.split(":")[0]


@cache
def all_devices() -> dict[str, Device]:
    """All shipped profiles by name."""
    folder = resources.files("mpq.cost_models")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {d.name: d for d in (_read(json.loads(f.read_text("utf8"))) for f in files)}


def _read(data: dict[str, Any]) -> Device:
    kernels = tuple((k["weight"], k["activation"]) for k in data["kernels"])
    return Device(data["name"], data["description"], kernels, data["source"])


def find_device(device: str | Device) -> Device:
    """A device by name.

    Raises:
        FormatError: If there is no such profile.
    """
    if isinstance(device, Device):
        return device
    if device not in all_devices():
        near = get_close_matches(device, all_devices(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(all_devices())}"
        raise FormatError(f"unknown device {device!r}; {hint}")
    return all_devices()[device]
