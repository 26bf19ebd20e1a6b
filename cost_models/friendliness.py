"""Quantization friendliness: which formats gain no time in which layers of a network on a device, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from mpq.cost_models.devices import Device, Kernel, find_device
from mpq.cost_models.latency import LayerTimes, layer_times
from mpq.cost_models.workload import make_workload
from mpq.errors import FormatError
from mpq.layers import LayerGraph, LayerSpec
from mpq.quantizers import NumberFormat, Scheme, parse_schemes


@dataclass(frozen=True)
class Useless:
    """A scheme that gains nothing in a layer.

    Attributes:
        layer: The layer.
        scheme: The scheme.
        wider: A scheme with at least as many bits in weights and activations that is as fast.
        seconds: Of the scheme.
        wider_seconds: Of the wider one.
        why: What the time goes to.
    """

    layer: str
    scheme: Scheme
    wider: Scheme
    seconds: float
    wider_seconds: float
    why: str


@dataclass(frozen=True, eq=False)
class Friendliness:
    """What fewer bits gain in each layer of a network on a device.

    Attributes:
        device: The device, with its setting.
        layers: The layers, ``L`` of them.
        schemes: The schemes that the device runs, ``S`` of them.
        times: Where the time goes, each part ``[L, S]``.
        wider: ``[L, S]``: which scheme has more bits and takes no longer; -1 where there is none.
        margin: A gain below this share of the time counts as none.
    """

    device: Device
    layers: tuple[LayerSpec, ...]
    schemes: tuple[Scheme, ...]
    times: LayerTimes
    wider: NDArray[np.int64]
    margin: float

    @property
    def useless(self) -> NDArray[np.bool_]:
        """Schemes that gain no time ``[L, S]``: a search for speed can drop them; one for size should not."""
        return self.wider >= 0

    @property
    def gain(self) -> NDArray[np.float64]:
        """Time of the slowest scheme over that of the fastest ``[L]``: what quantizing the layer is worth."""
        return np.asarray(self.times.total.max(1) / self.times.total.min(1))

    def reasons(self) -> list[Useless]:
        """Every scheme that gains nothing, with the reason, by layer."""
        found = []
        for index, s in np.argwhere(self.useless):
            t = int(self.wider[index, s])
            seconds, longer = (float(self.times.total[index, i]) for i in (s, t))
            pair = self.schemes[s], self.schemes[t]
            found.append(Useless(self.layers[index].name, *pair, seconds, longer, self._why(index, s, t)))
        return found

    def _why(self, layer: int, scheme: int, wider: int) -> str:
        """The most specific of promoted, padded, and bound by the largest part."""
        narrow, wide = (_arithmetic(self.device, self.schemes[i]) for i in (scheme, wider))
        bound = self.times.bound_by(layer, scheme)
        if bound == "widening":
            return f"its weights are widened to {narrow[0]}, which costs more than reading fewer bits saves"
        if bound == "compute" and narrow == wide:
            return f"promoted: it multiplies as {narrow[0]} x {narrow[1]}, as {self.schemes[wider]} does"
        if bound == "compute" and self._padded(layer, wider):
            return f"padded: {self._depth(layer)} products for one output do not fill a wider instruction's"
        parts = {p: (getattr(self.times, p)[layer, scheme], getattr(self.times, p)[layer, wider]) for p in _PARTS}
        ours, theirs = (f"{value * 1e6:.3g} us" for value in parts[bound])
        return f"bound by {bound}: {ours} against {theirs}"

    def _depth(self, layer: int) -> int:
        return int(np.prod(self.layers[layer].rows_shape[1:]))

    def _padded(self, layer: int, wider: int) -> bool:
        """Whether one matrix instruction of the wider scheme takes all products already."""
        step = self.device.figures.get("step_bytes")
        bits = self.schemes[wider].weight.bits
        return step is not None and self._depth(layer) * bits <= 8 * step

    def __repr__(self) -> str:
        names = [x.name for x in self.layers]
        width = max(len(x) for x in [*names, "layer"])
        columns = [max(len(str(s)), 9) for s in self.schemes]
        head = "  ".join(f"{s!s:>{w}}" for s, w in zip(self.schemes, columns, strict=True))
        rows = [
            f"Friendliness on {self.device.name}: {self.useless.sum()} of {self.useless.size} choices gain no time (-)",
            f"  {'layer':<{width}}  {head}   gain",
        ]
        for i, name in enumerate(names):
            cells = (
                f"{self.times.total[i, s] * 1e6:>{w - 4}.4g} us{'-' if self.useless[i, s] else ' '}"
                for s, w in enumerate(columns)
            )
            rows.append(f"  {name:<{width}}  {'  '.join(cells)}  {self.gain[i]:>5.2f}")
        counted: dict[str, int] = {}
        for reason in self.reasons():
            kind = reason.why.split(":")[0]
            counted[kind] = counted.get(kind, 0) + 1
        rows += [f"  {count} x {kind}" for kind, count in sorted(counted.items(), key=lambda item: -item[1])]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


_PARTS = ("compute", "memory", "widening", "overhead")


def quantization_friendliness(
    graph: LayerGraph,
    device: str | Device,
    schemes: str | Iterable[str | Scheme] | None = None,
    margin: float = 0.01,
) -> Friendliness:
    """Find the schemes that gain nothing in time against a wider one, layer by layer.

    SpaceEvo (Wang et al., 2023) shapes search spaces by what a device quantizes well; here schemes that a device does
    not reward leave the space. A scheme is wider if its weights and its activations have at least as many bits, one of
    them more.

    Args:
        graph: The layers.
        device: Name, profile or path; with its setting, as batch size and phase decide what binds.
        schemes: What to compare; those without a kernel are left out. All pairs that the device runs if None.
        margin: A gain below this share of the time counts as none.

    Raises:
        FormatError: If none of the schemes has a kernel, or a device without a list of kernels gets no schemes.
        BudgetError: If the device has no figures for time.

    Example:
        >>> from mpq.layers import LayerSpec
        >>> import networkx as nx
        >>> layer = LayerSpec("fc", "linear", (64, 64), (64, 64), (64,), (64,), 4096, 4096, 1, 0, 0)
        >>> found = quantization_friendliness(LayerGraph((layer,), (), nx.DiGraph(), "fx", 4096), "t4", "W4A4,W8A8")
        >>> found.reasons()[0].why.split(":")[0]
        'bound by overhead'
    """
    if not 0 <= margin < 1:
        raise FormatError(f"margin is a share of the time, from 0 to below 1, not {margin}")
    target = find_device(device)
    wanted = _all_schemes(target) if schemes is None else parse_schemes(schemes)
    usable = tuple(s for s in wanted if target.supports(s))
    if not usable:
        names = ", ".join(map(str, wanted)) or "no scheme"
        raise FormatError(f"none of {names} has a kernel on {target.name}; it runs {target.kernel_names()}")
    times = layer_times(make_workload(graph.layers, target.setting), usable, target)
    wider = np.array([[_is_wider(t, s, target) for t in usable] for s in usable])  # [S, S]: t is wider than s
    other = np.where(wider, times.total[:, None, :], np.inf)  # [L, S, S]
    fastest = other.argmin(2)
    rewarded = times.total < other.min(2) * (1 - margin)
    return Friendliness(target, graph.layers, usable, times, np.where(rewarded, -1, fastest), margin)


def _all_schemes(device: Device) -> tuple[Scheme, ...]:
    """One scheme for each pair of formats that kernels run; formats that mpq does not know are left out."""
    found: dict[tuple[str, int], Scheme] = {}
    for kernel in device.kernels:
        try:
            scheme = _scheme(kernel)
        except FormatError:
            continue
        found.setdefault((scheme.weight.name, _activation_bits(scheme, device)), scheme)
    return tuple(found.values())


def _scheme(kernel: Kernel) -> Scheme:
    weight = NumberFormat.parse(kernel.weight)
    if kernel.activation == "float":
        return Scheme(weight)
    asymmetric = ":tensor:asym" if kernel.activation.startswith("int") else ""
    return Scheme(weight, NumberFormat.parse(kernel.activation + asymmetric))


def _activation_bits(scheme: Scheme, device: Device) -> int:
    """Bits of the activations; floats as wide as the device keeps them, or as the weight is."""
    if scheme.activation is not None:
        return scheme.activation.bits
    kept = NumberFormat.parse(device.float_format).bits
    return max(kept, scheme.weight.bits) if scheme.weight.plain_float else kept


def _is_wider(wide: Scheme, narrow: Scheme, device: Device) -> bool:
    weights = wide.weight.bits - narrow.weight.bits
    activations = _activation_bits(wide, device) - _activation_bits(narrow, device)
    return min(weights, activations) >= 0 and max(weights, activations) > 0


def _arithmetic(device: Device, scheme: Scheme) -> tuple[str, str]:
    """The pair that multiplies for a scheme."""
    kernel = device.kernel(scheme)
    assert kernel is not None  # only schemes with a kernel are compared
    return kernel.runs_as or (kernel.weight, kernel.activation)
