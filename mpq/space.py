"""The search space: groups of layers x schemes, and which pairs are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.cost_models.devices import Device
from mpq.errors import ConfigError, FormatError, GraphError
from mpq.export.runtimes import RUNTIMES, Runtime
from mpq.layers import LayerGraph, LayerGroup, LayerSpec, make_groups
from mpq.quantizers import Scheme, parse_schemes
from mpq.warning import warn


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
        unfit: Skipped layer -> why a runtime leaves it float; of the others the user took out each.
    """

    graph: LayerGraph
    groups: tuple[LayerGroup, ...]
    schemes: tuple[Scheme, ...]
    allowed: NDArray[np.bool_]
    skipped: tuple[LayerSpec, ...]
    device: Device
    unfit: Mapping[str, str] = field(default_factory=dict)

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

    def pick(self, schemes: Mapping[str, Scheme]) -> NDArray[np.int64]:
        """The scheme index of each group ``[G]`` that gives layers these schemes.

        Args:
            schemes: Layer -> its scheme, for all searched layers.

        Raises:
            ConfigError: If a group's layers differ, or its scheme is not open to it.
        """
        apart = set(schemes) - {x.name for x in self.layers}
        if apart:
            raise ConfigError(f"layer {min(apart)!r} has {schemes[min(apart)]}, but it is outside this search")
        pick = np.empty(len(self.groups), np.int64)
        for g, group in enumerate(self.groups):
            wanted = [schemes.get(x.name) for x in group.layers]
            fits = [
                allowed and [layer_scheme(x, s) for x in group.layers] == wanted
                for s, allowed in zip(self.schemes, self.allowed[g], strict=True)
            ]
            if not any(fits):
                raise ConfigError(self._no_fit(g, wanted))
            pick[g] = fits.index(True)
        return pick

    def _no_fit(self, g: int, wanted: Sequence[Scheme | None]) -> str:
        group = self.groups[g]
        has = ", ".join(dict.fromkeys("none" if s is None else str(s) for s in wanted))
        if len(set(wanted)) > 1:
            return f"layers {', '.join(x.name for x in group.layers)} must have one scheme ({group.reason}), not {has}"
        known = ", ".join(str(s) for s, allowed in zip(self.schemes, self.allowed[g], strict=True) if allowed)
        return (
            f"{group.name!r} has {has}, but {known} are open to it here; "
            "analyze with the schemes, pins, groups and device that the config was made with"
        )

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
    share_inputs: bool | None = None,
    device: Device,
    runtime: Runtime | None = None,
) -> SearchSpace:
    """Build a search space.

    Args:
        graph: The layers.
        schemes: What every group may have.
        pin: Layer name or glob -> the one scheme it must have; later entries win.
        skip: Layer names or globs to leave float and out of the search.
        groups: Lists of layer names or globs that must share a scheme.
        share_inputs: Whether layers that read one tensor must share a scheme; None: where activations may differ.
        device: Schemes without a kernel there are absent.
        runtime: Only what it can load is searched: its layers, schemes, group sizes, and one scheme for layers that it
            fuses. Everything else stays float.

    Raises:
        FormatError: If a scheme does not parse, none has a kernel on the device or fits the runtime, or the runtime
            can't load a layer as it is pinned.
        GraphError: If a name matches no layer, or the pins of one group differ.
    """
    wanted = parse_schemes(schemes)
    if pin is not None and not isinstance(pin, Mapping):
        raise GraphError(f"pin maps layer names to schemes, such as {{'fc': 'W8A8'}}, not {pin!r}")
    pins = {p: s if isinstance(s, Scheme) else Scheme.parse(s) for p, s in (pin or {}).items()}
    for scheme in pins.values():
        if runtime is not None and not runtime.supports(scheme):
            raise FormatError(f"{runtime.name} can't load {scheme}; it loads {runtime.formats()}")
        if not device.supports(scheme):
            raise FormatError(f"{scheme} has no kernel on {device.name}; it runs {device.kernel_names()}")
    usable = tuple(s for s in wanted if device.supports(s))
    absent = [str(s) for s in wanted if s not in usable]
    if usable and absent:
        left_out = f"left out, without a kernel on {device.name}: {', '.join(absent)}"
        warn(f"{left_out}; it runs {device.kernel_names()}")
    if not usable:
        names = ", ".join(map(str, wanted))
        raise FormatError(f"none of {names} has a kernel on {device.name}; it runs {device.kernel_names()}")
    unfit: dict[str, str] = {}
    pinned = {x.name: s for pattern, s in pins.items() for x in graph.match(pattern)}
    if runtime is not None:
        usable = _loadable(usable, runtime)
        unfit, fused = _by_runtime(graph, usable, pinned, runtime, [x.name for p in skip for x in graph.match(p)])
        skip, groups = [*skip, *unfit], [*groups, *fused]
    skipped_storage = {x.storage for pattern in skip for x in graph.match(pattern)}
    skipped = {x.name for x in graph if x.storage in skipped_storage}  # tied weights stay float together
    joined = [[x for pattern in _patterns(members) for x in graph.match(pattern)] for members in groups]
    for name in [*pinned, *(x.name for members in joined for x in members)]:
        if name in skipped:
            raise GraphError(f"layer {name!r} is skipped, so it can't be pinned or grouped; remove one of the two")
    layers = tuple(x for x in graph if x.name not in skipped)
    if not layers:
        why = next((f", such as {name!r}: {reason}{_elsewhere(graph[name])}" for name, reason in unfit.items()), "")
        raise GraphError(f"every layer is skipped; nothing is left to search{why}")
    columns = tuple(dict.fromkeys([*usable, *pinned.values()]))
    if share_inputs is None:
        share_inputs = len({s.activation for s in columns}) > 1
    found = make_groups(layers, share_inputs, joined)
    allowed = np.array([[s in usable and _refused(g, s, runtime) is None for s in columns] for g in found])
    for g, group in enumerate(found):
        fixed = {pinned[x.name] for x in group.layers if x.name in pinned}
        if len(fixed) > 1:
            names = ", ".join(x.name for x in group.layers)
            raise GraphError(
                f"layers {names} must share a scheme ({group.reason}) but are pinned to {', '.join(map(str, fixed))}"
            )
        for scheme in fixed:
            if (refused := _refused(group, scheme, runtime)) is not None:
                raise FormatError(f"layer {refused[0]!r} is pinned to {scheme}, but {refused[1]}")
            allowed[g] = [s == scheme for s in columns]
    taken = {graph[n].storage: why for n, why in unfit.items()}
    left = tuple(x for x in graph if x.name in skipped)
    return SearchSpace(
        graph, found, columns, allowed, left, device, {x.name: taken[x.storage] for x in left if x.storage in taken}
    )


def _loadable(schemes: tuple[Scheme, ...], runtime: Runtime) -> tuple[Scheme, ...]:
    """The schemes that a runtime loads."""
    found = tuple(s for s in schemes if runtime.supports(s))
    absent = [str(s) for s in schemes if s not in found]
    if not found:
        raise FormatError(f"{runtime.name} loads none of {', '.join(absent)}; it loads {runtime.formats()}")
    if absent:
        warn(f"left out, not for {runtime.name}: {', '.join(absent)}")
    return found


def _by_runtime(
    graph: LayerGraph,
    schemes: tuple[Scheme, ...],
    pinned: Mapping[str, Scheme],
    runtime: Runtime,
    skipped: list[str],
) -> tuple[dict[str, str], list[list[str]]]:
    """Layers that must stay float and why, and sets of layers that need one scheme."""
    storages = {graph[n].storage for n in skipped}
    unfit: dict[str, str] = {}
    apart = runtime.stay_float([x.name for x in graph if x.op in runtime.ops])
    for x in graph:
        refusals = [runtime.refusal(x.op, x.rows_shape, s) for s in schemes]
        if x.storage in storages:
            continue
        if x.name in apart:
            unfit[x.name] = f"{runtime.name} leaves it float, being {apart[x.name]}"
            if x.name in pinned:
                raise FormatError(f"layer {x.name!r} is pinned to {pinned[x.name]}, but {unfit[x.name]}")
        elif x.name not in pinned and all(refusals):
            unfit[x.name] = str(refusals[0]).removesuffix(runtime.leaving)
    storages |= {graph[n].storage for n in unfit}
    fused = runtime.fused_sets(x.name for x in graph)
    for members in fused:  # as a whole or not at all
        known = {pinned[n] for n in members if n in pinned} or schemes
        together = [all(runtime.refusal(graph[n].op, graph[n].rows_shape, s) is None for n in members) for s in known]
        if not any(together) or any(graph[n].storage in storages for n in members):
            unfit |= {n: f"{runtime.name} loads {', '.join(members)} as one" for n in members if n not in skipped}
    if unfit:
        first = next(iter(unfit))
        share = sum(graph[n].parameters for n in unfit) / sum(x.parameters for x in graph)
        warn(f"{len(unfit)} layers ({share:.0%} of the parameters) stay float, such as {first!r}: {unfit[first]}")
    return unfit, [m for m in fused if not set(m) & {*unfit, *skipped}]


def _elsewhere(layer: LayerSpec) -> str:
    """Runtimes that quantize layers of a kind."""
    names = ", ".join(n for n, r in RUNTIMES.items() if layer.op in r.ops)
    return f"; {layer.op} layers are quantized by {names or 'none of the runtimes'}"


def _refused(group: LayerGroup, scheme: Scheme, runtime: Runtime | None) -> tuple[str, str] | None:
    """The first layer of a group that a runtime can't load with a scheme, and why."""
    if runtime is None:
        return None
    whys = ((x.name, runtime.refusal(x.op, x.rows_shape, scheme)) for x in group.layers)
    return next(((name, why) for name, why in whys if why is not None), None)


def _patterns(members: Sequence[str]) -> Sequence[str]:
    if isinstance(members, str):
        raise GraphError(f"groups is a list of lists of layer names, such as [['q', 'k', 'v']]; {members!r} is no list")
    return members
