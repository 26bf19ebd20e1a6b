"""`Estimate`: what each layer takes on a device in each scheme, where the time goes, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from html import escape
from typing import TYPE_CHECKING, Any

from torch import nn

from mpq.config import BitConfig
from mpq.cost_models.devices import Device, find_device
from mpq.cost_models.latency import LayerTimes, layer_times
from mpq.cost_models.workload import Workload, make_workload
from mpq.errors import BudgetError, ConfigError
from mpq.layers import LayerGraph
from mpq.quantizers import Scheme, parse_schemes
from mpq.trace import trace_model
from mpq.units import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Estimate:
    """Seconds of each layer in each scheme on a device, conversions between layers left out.

    Attributes:
        device: With its setting.
        work: What the layers do.
        schemes: Those that have a kernel on the device.
        times: Parts of the time, each ``[L, S]`` seconds.
    """

    device: Device
    work: Workload
    schemes: tuple[Scheme, ...]
    times: LayerTimes

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in execution order."""
        return tuple(x.name for x in self.work.layers)

    def seconds(self, config: BitConfig) -> float:
        """Time of all layers in the schemes of a config.

        Raises:
            ConfigError: If a layer is missing or its scheme was not estimated.
        """
        total = 0.0
        for i, name in enumerate(self.layers):
            if name not in config:
                raise ConfigError(f"the config has no layer {name!r}")
            total += float(self.times.total[i, self._column(config[name].scheme, i)])
        return total

    def _column(self, scheme: Scheme, layer: int) -> int:
        """Inputs that are whole numbers have no format, so that any scheme with the weight's does."""
        for s, known in enumerate(self.schemes):
            same = known.weight == scheme.weight if self.work.layers[layer].source is None else known == scheme
            if same:
                return s
        raise ConfigError(f"{scheme} of layer {self.layers[layer]!r} was not estimated; there are {self._names()}")

    def _names(self) -> str:
        return ", ".join(map(str, self.schemes))

    def explain(self, layer: str) -> str:
        """What bounds a layer in each scheme, with numbers.

        Raises:
            BudgetError: If there is no such layer.
        """
        if layer not in self.layers:
            raise BudgetError(f"no layer is called {layer!r}; the first is {self.layers[0]!r}")
        i = self.layers.index(layer)
        w = self.work
        shape = f"{w.rows[i]:,.0f} x {w.depth[i]:,.0f} x {w.columns[i]:,.0f}"
        blocks = f" in {w.blocks[i]:,.0f} groups" if w.blocks[i] > 1 else ""
        head = f"{layer} ({w.layers[i].op}) on {self.device.name}: {w.macs[i] / 1e6:,.2f} M MACs, {shape}{blocks}"
        parts = [f.name for f in fields(LayerTimes) if f.name != "total"]
        rows = [head]
        for s, scheme in enumerate(self.schemes):
            shown = ", ".join(f"{p} {si(float(getattr(self.times, p)[i, s]), 's')}" for p in parts)
            kernel = self.device.kernel(scheme)
            how = f", as {' x '.join(kernel.runs_as)}" if kernel is not None and kernel.runs_as else ""
            total = si(float(self.times.total[i, s]), "s")
            rows.append(f"  {scheme!s:<8} {total:>9}, bound by {self.times.bound_by(i, s)} ({shown}){how}")
        return "\n".join(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Time of each layer in execution order, one line for each scheme."""
        from mpq.viz.estimate import plot_estimate

        return plot_estimate(self, ax)

    def __repr__(self) -> str:
        setting = self.device.setting
        width = max(len(x) for x in self.layers)
        rows = [
            f"Estimate on {self.device.name}, batch {setting.batch}, {setting.phase}: {len(self.layers)} layers",
            f"  {'layer':<{width}} " + " ".join(f"{s!s:>10}" for s in self.schemes) + "  bound by",
        ]
        for i, name in enumerate(self.layers):
            cells = " ".join(f"{si(float(x), 's'):>10}" for x in self.times.total[i])
            bound = dict.fromkeys(self.times.bound_by(i, s) for s in range(len(self.schemes)))
            rows.append(f"  {name:<{width}} {cells}  {', '.join(bound)}")
        totals = " ".join(f"{si(float(x), 's'):>10}" for x in self.times.total.sum(0))
        return "\n".join([*rows, f"  {'all':<{width}} {totals}"])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def estimate(
    model: nn.Module | LayerGraph,
    device: str | Device,
    schemes: str | Iterable[str | Scheme],
    batch: Any = None,
) -> Estimate:
    """Time of every layer of a model in every scheme, without measuring anything.

    Args:
        model: A network, or its `LayerGraph`.
        device: Name (``t4:batch=8``), profile or path of one.
        schemes: What to compare; those without a kernel on the device are left out.
        batch: One batch of the model's inputs, for the shapes; not needed with a graph.

    Raises:
        BudgetError: If the device has no figures for time, runs none of the schemes, or the batch is missing.

    Example:
        >>> from mpq.bundled import load_example
        >>> model, calib, _ = load_example()
        >>> found = estimate(model, "t4", "W4A4,W8A8", calib[0])
        >>> found.explain("fc").splitlines()[0]
        'fc (linear) on t4: 0.00 M MACs, 1 x 64 x 10'
    """
    if not isinstance(model, LayerGraph):
        if batch is None:
            raise BudgetError("the shapes of the layers come from a batch: pass batch=one batch of inputs")
        model = trace_model(model, batch)
    target, wanted = find_device(device), parse_schemes(schemes)
    usable = tuple(s for s in wanted if target.supports(s))
    if not usable:
        names = ", ".join(map(str, wanted))
        raise BudgetError(f"none of {names} has a kernel on {target.name}; it runs {target.kernel_names()}")
    work = make_workload(model.layers, target.setting)
    return Estimate(target, work, usable, layer_times(work, usable, target))
