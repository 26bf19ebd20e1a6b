"""Static plots with matplotlib: the frontier, measured accuracy, and bits by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mpq.config import BitConfig

if TYPE_CHECKING:
    from mpq.frontier import Frontier

# Okabe and Ito's colours: told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#777777", "#CC79A7", "#56B4E9"
OP_COLOURS = {"conv": BLUE, "linear": ORANGE, "embedding": GREEN, "attention": PINK}

MOST_LABELS = 60
LOSSES = {"kl": "KL to float (nats)", "mse": "squared error", "callable": "the loss"}

# Unit of a cost -> factor and label of the axis.
_AXIS = {"bytes": (1e-3, "kB"), "bit operations": (1e-9, "GBitOps")}


def kind_of(op: str) -> str:
    """Family of an op type: what layers are coloured by."""
    return op.split("_")[0].rstrip("123d")


def label_ticks(ax: Axes, names: Sequence[str], axis: str = "x") -> None:
    """Names at the ticks of an axis, thinned where there are too many to read."""
    ticks = range(0, len(names), -(-len(names) // MOST_LABELS))
    shown = [names[i] for i in ticks]
    if axis == "x":
        ax.set_xticks(ticks, shown, rotation=90, fontsize=7)
    else:
        ax.set_yticks(ticks, shown, fontsize=7)


def new_axes(ax: Axes | None, width: float = 7, height: float = 4.4) -> Axes:
    """The axes that were given, else new ones of a size in inches."""
    if ax is not None:
        return ax
    if "inline" in mpl.get_backend() or mpl.is_interactive():
        import matplotlib.pyplot as plt  # shows itself in notebooks

        new: Axes = plt.subplots(figsize=(width, height), layout="constrained")[1]
        return new
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def plot_frontier(
    front: Frontier,
    ax: Axes | None = None,
    *,
    mark: Sequence[BitConfig] = (),
    uniform: bool = True,
) -> Axes:
    """Predicted loss (log axis) against the frontier's cost.

    Args:
        front: What to draw.
        ax: Where to; a new figure by default (``ax.figure.savefig(...)`` writes it).
        mark: Configs to mark and label by their budget or average bits.
        uniform: Also show each scheme used for all layers.
    """
    ax = new_axes(ax)
    factor, unit = _AXIS.get(front.unit, (1.0, front.unit))
    positive = front.loss > 0
    ax.step(front.cost[positive] * factor, front.loss[positive], where="post", color=BLUE, lw=1.2, zorder=2)
    ax.scatter(
        front.cost[positive] * factor,
        front.loss[positive],
        s=9,
        color=BLUE,
        zorder=3,
        label=f"{front.kind} frontier",
    )
    if uniform:
        configs = {str(s): front.analysis.uniform(s) for s in front.analysis.space.uniform_schemes}
        points = {n: (c.metrics[front.metric]["value"] * factor, _predicted(front, c)) for n, c in configs.items()}
        shown = {n: p for n, p in points.items() if p[1] > 0}
        xs, ys = [p[0] for p in shown.values()], [p[1] for p in shown.values()]
        ax.scatter(xs, ys, marker="s", s=36, color=ORANGE, zorder=4, label="uniform")
        for name, point in shown.items():
            ax.annotate(name, point, xytext=(6, 5), textcoords="offset points", color=ORANGE, fontsize=9)
    for cfg in mark:
        x, y = cfg.metrics[front.metric]["value"] * factor, _predicted(front, cfg)
        ax.scatter([x], [y], marker="*", s=150, color=GREEN, edgecolor="white", zorder=5)
        label = ", ".join(cfg.budgets) or f"{cfg.avg_bits:.2f} bits"
        ax.annotate(label, (x, y), xytext=(-7, -13), textcoords="offset points", color=GREEN, fontsize=9, ha="right")
    ax.set_yscale("log")
    _label_cost(ax, front.metric, unit)
    loss = front.analysis.provenance["loss"]
    ax.set_ylabel(f"predicted rise of {LOSSES.get(loss, loss)}")
    ax.margins(x=0.08)
    _tidy(ax)
    return ax


def _label_cost(ax: Axes, metric: str, unit: str) -> None:
    """Seconds and joules are far below one: their ticks have prefixes."""
    if unit in ("s", "J"):
        ax.xaxis.set_major_locator(MaxNLocator(7))
        ax.xaxis.set_major_formatter(EngFormatter(unit))
        ax.set_xlabel(metric)
    else:
        ax.set_xlabel(f"{metric} ({unit})")


def _predicted(front: Frontier, config: BitConfig) -> float:
    """Predicted loss of a config as the frontier counts it."""
    whole = config.predicted.get("with_interactions") if front.interacting else None
    return config.predicted_loss if whole is None else float(whole)


def plot_measured(series: Mapping[str, Sequence[BitConfig]], ax: Axes | None = None, *, metric: str = "size") -> Axes:
    """Measured accuracy against a cost, one line for each series of configs.

    Args:
        series: Label -> measured configs; those without accuracy are left out.
        ax: Where to; a new figure by default.
        metric: The cost on the horizontal axis.
    """
    ax = new_axes(ax)
    float_accuracy = None
    unit = ""
    for (label, configs), colour in zip(series.items(), (BLUE, ORANGE, GREEN, PINK, SKY), strict=False):
        points = []
        for cfg in configs:
            if cfg.measured is not None and cfg.measured.accuracy is not None:
                factor, unit = _AXIS.get(cfg.metrics[metric]["unit"], (1.0, cfg.metrics[metric]["unit"]))
                points.append((cfg.metrics[metric]["value"] * factor, 100 * cfg.measured.accuracy))
                float_accuracy = cfg.measured.float_accuracy
        if points:
            ax.plot(*zip(*sorted(points), strict=True), marker="o", ms=5, lw=1.2, color=colour, label=label)
    if float_accuracy is not None:
        ax.axhline(100 * float_accuracy, color=GREY, lw=1, ls="--", label="float")
    _label_cost(ax, metric, unit)
    ax.set_ylabel("measured accuracy (%)")
    _tidy(ax)
    return ax


def plot_bits(cfg: BitConfig, ax: Axes | None = None) -> Axes:
    """Weight bits of every layer by depth, coloured by kind of layer.

    Args:
        cfg: What to draw.
        ax: Where to; a new figure by default.
    """
    ax = new_axes(ax, width=max(7, min(24, 0.3 * len(cfg))), height=4)
    kinds = [kind_of(c.op) for c in cfg.layers.values()]
    colours = [OP_COLOURS.get(k, GREY) for k in kinds]
    bits = [c.weight.bits for c in cfg.layers.values()]
    ax.bar(range(len(cfg)), bits, color=colours)
    for kind in dict.fromkeys(kinds):
        ax.bar([0], [0], color=OP_COLOURS.get(kind, GREY), label=kind)
    many = len(cfg) > 80
    ax.set_xticks([] if many else range(len(cfg)), [] if many else list(cfg), rotation=90, fontsize=7)
    ax.set_yticks(sorted(set(bits)))
    ax.set_ylabel("weight bits")
    ax.margins(x=0.01)
    _tidy(ax)
    ax.grid(False, axis="x")
    ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)
    return ax


def _tidy(ax: Axes) -> None:
    ax.grid(True, which="major", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
