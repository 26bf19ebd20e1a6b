"""The layer graph: what in a network can be quantized. Plain values; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from html import escape
from typing import Literal

import networkx as nx

from mpq.errors import GraphError


@dataclass(frozen=True)
class LayerSpec:
    """One quantizable layer.

    Attributes:
        name: Qualified module name; an attention's packed projection is ``<name>.in_proj``.
        op: ``conv1d`` ... ``conv_transpose3d``, ``linear``, ``embedding``, ``attention_in_proj``.
        weight_shape: Shape of the weight.
        rows_shape: Shape of the weight with its output channels first (transposed convolutions differ).
        input_shape: Shape of the first input for one sample of the first calibration batch, without batch axis.
        output_shape: Likewise for the output.
        macs: Multiply-accumulates for one sample, over all calls.
        parameters: Elements of the weight.
        calls: How often it runs in one forward pass.
        storage: Layers with the same number share one weight (tied).
        source: Layers with the same number read the same tensor; None for whole-number inputs.
        element_bits: Bits of one weight element as the model stores it.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    rows_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    calls: int
    storage: int
    source: int | None
    element_bits: int = 32


def stored_parameters(layers: Iterable[LayerSpec]) -> int:
    """Weight elements, tied storage counted once."""
    return sum({layer.storage: layer.parameters for layer in layers}.values())


# Layers that were "skipped", that did not run on the calibration data ("idle") or can't be observed ("hidden"); the
# "rest" of a searched layer, such as its bias; modules of "other" types, for which there are no formats; "products"
# outside of all layers.
OutsideKind = Literal["skipped", "idle", "hidden", "rest", "other", "products"]


@dataclass(frozen=True)
class Outside:
    """Something that holds parameters or does multiply-accumulates, but is not searched.

    Attributes:
        name: Module or parameter name.
        parameters: Its parameters.
        size_bytes: Their bytes as stored by the model.
        macs: Its multiply-accumulates for one sample.
        reason: Why it is outside, for people.
        kind: The same for programs.
    """

    name: str
    parameters: int
    size_bytes: int
    macs: int
    reason: str
    kind: OutsideKind


@dataclass(frozen=True)
class LayerGroup:
    """Layers that must share a scheme: one decision variable.

    Attributes:
        name: Name of its first layer.
        layers: Its layers in execution order.
        reason: ``single``, ``tied``, ``shared input`` or ``user``.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    reason: str = "single"

    @property
    def parameters(self) -> int:
        """Weight elements, tied storage counted once."""
        return stored_parameters(self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(layer.macs for layer in self.layers)


@dataclass(frozen=True)
class LayerGraph:
    """Quantizable layers in execution order, what is left out, and how data flows between the layers.

    Attributes:
        layers: In the order of their first call.
        outside: Parameters and multiply-accumulates that are not searched, each with its reason.
        dataflow: Directed graph over layer names; an edge means that data flows from one to the other with
            no quantizable layer between.
        traced_by: ``fx`` or ``hooks``: how the dataflow was found.
        total_macs: Multiply-accumulates of the whole network for one sample.
    """

    layers: tuple[LayerSpec, ...]
    outside: tuple[Outside, ...]
    dataflow: nx.DiGraph[str] = field(compare=False)
    traced_by: str
    total_macs: int

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerSpec:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def tied(self) -> list[list[str]]:
        """Names of layers that share one weight, each set in the order of their first call."""
        owners: dict[int, list[str]] = {}
        for x in self.layers:
            owners.setdefault(x.storage, []).append(x.name)
        return [names for names in owners.values() if len(names) > 1]

    @property
    def parameters(self) -> int:
        """Weight elements of the layers, tied storage counted once."""
        return stored_parameters(self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers for one sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameter_coverage(self) -> float:
        """Share of the network's parameters that is in the layers."""
        return self.parameters / (self.parameters + sum(o.parameters for o in self.outside))

    @property
    def mac_coverage(self) -> float:
        """Share of the network's multiply-accumulates that is in the layers."""
        return self.macs / self.total_macs if self.total_macs else 1.0

    @property
    def float_size_bytes(self) -> int:
        """Bytes of all parameters as the model stores them."""
        weights = {x.storage: x.parameters * x.element_bits // 8 for x in self.layers}
        return sum(weights.values()) + sum(o.size_bytes for o in self.outside)

    def match(self, pattern: str) -> tuple[LayerSpec, ...]:
        """Layers whose name equals the pattern or matches it as a glob (``layer1.*``).

        Raises:
            GraphError: If no layer matches.
        """
        found = tuple(x for x in self.layers if x.name == pattern or fnmatchcase(x.name, pattern))
        if not found:
            near = get_close_matches(pattern, [x.name for x in self.layers], 3, 0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"the first is {self.layers[0].name!r}"
            raise GraphError(f"no quantizable layer is called {pattern!r}; {hint} (print the graph for all names)")
        return found

    def summary(self) -> str:
        """One line: layers, coverage and how it was traced."""
        return (
            f"{len(self.layers)} layers, {self.parameters:,} of "
            f"{self.parameters + sum(o.parameters for o in self.outside):,} parameters "
            f"({self.parameter_coverage:.1%}), {self.macs / 1e6:,.1f} of {self.total_macs / 1e6:,.1f} M MACs "
            f"({self.mac_coverage:.1%}), traced by {self.traced_by}"
        )

    def __repr__(self) -> str:
        rows = [f"LayerGraph: {self.summary()}"]
        width = max(len(x.name) for x in self.layers)
        for x in self.layers:
            times = f" x{x.calls}" if x.calls > 1 else ""
            rows.append(
                f"  {x.name:<{width}}  {x.op:<16} {'x'.join(map(str, x.weight_shape)):>16} "
                f"{x.macs / 1e6:>10,.2f} M MACs{times}"
            )
        by_reason: dict[str, list[Outside]] = {}
        for o in self.outside:
            by_reason.setdefault(o.reason, []).append(o)
        for reason, members in by_reason.items():
            names = ", ".join(o.name for o in members[:2]) + (
                f" and {len(members) - 2} more" if len(members) > 2 else ""
            )
            parameters, macs = sum(o.parameters for o in members), sum(o.macs for o in members)
            amount = f"{parameters:,} parameters" if parameters else f"{macs / 1e6:,.2f} M MACs"
            rows.append(f"  outside: {amount} in {names}: {reason}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def make_groups(
    layers: Iterable[LayerSpec], share_inputs: bool, user_groups: Iterable[Iterable[LayerSpec]] = ()
) -> tuple[LayerGroup, ...]:
    """Join layers that must share a scheme.

    Args:
        layers: In execution order.
        share_inputs: Also join layers that read the same tensor: when the search chooses activation formats,
            that tensor is quantized once for all its readers.
        user_groups: Further layers to join.

    Returns:
        Groups ordered by their first layer.
    """
    layers = tuple(layers)
    links: nx.Graph[str] = nx.Graph()
    links.add_nodes_from(x.name for x in layers)
    reasons: dict[str, str] = {}

    def join(members: list[LayerSpec], reason: str) -> None:
        nx.add_path(links, [x.name for x in members])
        reasons.update({x.name: reason for x in members if len(members) > 1})

    if share_inputs:
        for source in {x.source for x in layers if x.source is not None}:
            join([x for x in layers if x.source == source], "shared input")
    for storage in {x.storage for x in layers}:
        join([x for x in layers if x.storage == storage], "tied")
    for members in user_groups:
        join(list(members), "user")
    component = {name: i for i, names in enumerate(nx.connected_components(links)) for name in names}
    by_component: dict[int, list[LayerSpec]] = {}
    for layer in layers:
        by_component.setdefault(component[layer.name], []).append(layer)
    return tuple(
        LayerGroup(found[0].name, tuple(found), reasons.get(found[0].name, "single")) for found in by_component.values()
    )
