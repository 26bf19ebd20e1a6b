"""The search space: groups of layers x schemes, and which pairs are allowed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.cost_models.devices import Device
from mpq.errors import FormatError, GraphError
from mpq.layers import LayerGraph, LayerGroup, LayerSpec, make_groups
from mpq.quantizers.formats import Scheme, parse_schemes


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Groups are the decision variables, schemes their values.

    Attributes:
        graph: The layers.
        groups: Layers that share a scheme, in execution order.
        schemes: All schemes that any group may have.
        allowed: ``[G, S]``; a pinned group has one allowed scheme.
        skipped: Layers that the user took out.
        device: What the schemes were checked against.
    """

    graph: LayerGraph
    groups: tuple[LayerGroup, ...]
    schemes: tuple[Scheme, ...]
    allowed: NDArray[np.bool_]
    skipped: tuple[LayerSpec, ...]
    device: Device

    @property
    def uniform_schemes(self) -> tuple[Scheme, ...]:
        """Schemes that every group may have, pinned groups excepted."""
        free = self.allowed[self.allowed.sum(1) > 1]
        rows = free if len(free) else self.allowed
        return tuple(s for i, s in enumerate(self.schemes) if rows[:, i].all())

    @property
    def attributes(self) -> dict[str, tuple[Any, ...]]:
        """What each scheme is made of: bits, granularity and symmetry of weights, bits and symmetry of activations.

        `mpq.search.Cqap` and `mpq.search.Linas` take them. Activations that stay float count as of 32 bits.
        """
        weights, acts = [s.weight for s in self.schemes], [s.activation for s in self.schemes]
        return {
            "weight_bits": tuple(f.bits for f in weights),
            "granularity": tuple(f.granularity for f in weights),
            "symmetric": tuple(f.symmetric for f in weights),
            "activation_bits": tuple(32 if f is None else f.bits for f in acts),
            "activation_symmetric": tuple(f is None or f.symmetric for f in acts),
        }

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The searched layers, by group."""
        return tuple(x for g in self.groups for x in g.layers)

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.schemes))
        configs = float(np.prod(self.allowed.sum(1), dtype=np.float64))
        layers = f"{len(self.groups)} groups of {len(self.layers)} layers"
        return f"SearchSpace({layers}, schemes {names}: {configs:.2g} configs)"


def layer_scheme(layer: LayerSpec, scheme: Scheme) -> Scheme:
    """What a scheme means for a layer: inputs that are whole numbers (of embeddings) are never quantized."""
    return Scheme(scheme.weight) if layer.source is None else scheme


def make_space(
    graph: LayerGraph,
    schemes: str | Iterable[str | Scheme],
    *,
    pin: Mapping[str, str | Scheme] | None = None,
    skip: Sequence[str] = (),
    groups: Iterable[Sequence[str]] = (),
    device: Device,
) -> SearchSpace:
    """Build a search space.

    Args:
        graph: The layers.
        schemes: What every group may have.
        pin: Layer name or glob -> the one scheme it must have; later entries win.
        skip: Layer names or globs to leave float and out of the search.
        groups: Lists of layer names or globs that must share a scheme.
        device: Schemes without a kernel there are absent.

    Raises:
        FormatError: If a scheme does not parse, or none has a kernel on the device.
        GraphError: If a name matches no layer, or the pins of one group differ.
    """
    wanted = parse_schemes(schemes)
    if pin is not None and not isinstance(pin, Mapping):
        raise GraphError(f"pin maps layer names to schemes, such as {{'fc': 'W8A8'}}, not {pin!r}")
    pins = {p: s if isinstance(s, Scheme) else Scheme.parse(s) for p, s in (pin or {}).items()}
    for scheme in pins.values():
        if not device.supports(scheme):
            raise FormatError(f"{scheme} has no kernel on {device.name}; it runs {device.kernel_names()}")
    usable = tuple(s for s in wanted if device.supports(s))
    absent = [str(s) for s in wanted if s not in usable]
    if usable and absent:
        left_out = f"left out, without a kernel on {device.name}: {', '.join(absent)}"
        warnings.warn(f"{left_out}; it runs {device.kernel_names()}", stacklevel=3)
    if not usable:
        names = ", ".join(map(str, wanted))
        raise FormatError(f"none of {names} has a kernel on {device.name}; it runs {device.kernel_names()}")
    skipped_storage = {x.storage for pattern in skip for x in graph.match(pattern)}
    skipped = {x.name for x in graph if x.storage in skipped_storage}  # tied weights stay float together
    pinned = {x.name: s for pattern, s in pins.items() for x in graph.match(pattern)}
    joined = [[x for pattern in _patterns(members) for x in graph.match(pattern)] for members in groups]
    for name in [*pinned, *(x.name for members in joined for x in members)]:
        if name in skipped:
            raise GraphError(f"layer {name!r} is skipped, so it can't be pinned or grouped; remove one of the two")
    layers = tuple(x for x in graph if x.name not in skipped)
    if not layers:
        raise GraphError("every layer is skipped; nothing is left to search")
    columns = tuple(dict.fromkeys([*usable, *pinned.values()]))
    share_inputs = len({s.activation for s in columns}) > 1
    found = make_groups(layers, share_inputs, joined)
    allowed = np.array([[s in usable for s in columns]] * len(found))
    for g, group in enumerate(found):
        fixed = {pinned[x.name] for x in group.layers if x.name in pinned}
        if len(fixed) > 1:
            names = ", ".join(x.name for x in group.layers)
            raise GraphError(
                f"layers {names} must share a scheme ({group.reason}) but are pinned to {', '.join(map(str, fixed))}"
            )
        for scheme in fixed:
            allowed[g] = [s == scheme for s in columns]
    return SearchSpace(graph, found, columns, allowed, tuple(x for x in graph if x.name in skipped), device)


def _patterns(members: Sequence[str]) -> Sequence[str]:
    if isinstance(members, str):
        raise GraphError(f"groups is a list of lists of layer names, such as [['q', 'k', 'v']]; {members!r} is no list")
    return members
