"""``mpq devices``: lists the device profiles, or explains one with the source of each figure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from mpq.cost_models.devices import Device, Kernel, all_devices, find_device
from mpq.units import si


def show_devices(console: Console, name: str | None) -> None:
    """Print all profiles, or everything about one (a name or the path of a profile)."""
    console.print(_explained(find_device(name)) if name else _listed())


def _listed() -> Table:
    table = Table("device", "kind", "description", "kernels (weight x activation)")
    for device in all_devices().values():
        table.add_row(device.name, device.kind, escape(device.description), device.kernel_names())
    return table


def _explained(device: Device) -> Group:
    kernels = Table("weight", "activation", "peak", "how", title="kernels")
    for k in device.kernels:
        kernels.add_row(k.weight, k.activation, "-" if k.peak is None else f"{si(k.peak, 'MAC/s')}", _how(k))
    memory = Table("memory", "size", "bandwidth", title="memory")
    for m in device.memory:
        memory.add_row(m.name, "-" if m.size_bytes == float("inf") else si(m.size_bytes, "B"), si(m.bandwidth, "B/s"))
    figures = Table("figure", "value", title="figures")
    for name, value in _flat(device.figures):
        figures.add_row(escape(name), escape(value))
    sources = Table("what", "source", title="sources")
    for name, text in device.sources.items():
        sources.add_row(escape(name), escape(text))
    head = f"[bold]{device.name}[/bold] ({device.kind}): {escape(device.description)}"
    parts: list[str | Table] = [
        f"Tensors that stay float are {device.float_format}.",
        *(t for t, shown in ((kernels, device.kernels), (memory, device.memory), (figures, device.figures)) if shown),
        sources,
    ]
    return Group(head, *parts)


def _how(kernel: Kernel) -> str:
    if kernel.runs_as is None:
        return ""
    weight, activation = kernel.runs_as
    rate = f", {si(kernel.widen, 'weights/s')}" if kernel.widen else ""
    return f"widened to {weight} x {activation}{rate}"


def _flat(values: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Names with dots, and values as JSON."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(values)
