"""`BitConfig`: the answer to the user, and the only artefact that leaves a search."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from mpq.errors import ConfigError, FormatError
from mpq.files import write_text
from mpq.layers import Outside
from mpq.quantizers import NumberFormat, Scheme
from mpq.units import si

SCHEMA_VERSION = "mpq/bitconfig-1"


@dataclass(frozen=True)
class LayerChoice:
    """What one layer got.

    Attributes:
        scheme: Its scheme; the activation is None where the layer's input is not quantized.
        activation_range: Calibrated range of its input, for activation formats with one scale.
        group: Name of the group it shares the scheme with.
        op: Op type.
        weight_shape: Shape of its weight.
        parameters: Weight elements.
        macs: Multiply-accumulates for one sample.
        predicted_loss: Predicted rise of the loss from the layer's group.
        stderr: Standard error of that, None if unknown.
    """

    scheme: Scheme
    activation_range: tuple[float, float] | None
    group: str
    op: str
    weight_shape: tuple[int, ...]
    parameters: int
    macs: int
    predicted_loss: float
    stderr: float | None

    @property
    def weight(self) -> NumberFormat:
        """Format of the weight."""
        return self.scheme.weight

    @property
    def activation(self) -> NumberFormat | None:
        """Format of the input, None where it stays as it is."""
        return self.scheme.activation


@dataclass(frozen=True)
class Measured:
    """What was measured on data.

    Attributes:
        samples: How many samples.
        accuracy: Share of correct predictions, None without labels or classes.
        loss: Cross-entropy in nats (or the user's loss), None without labels.
        kl: Divergence from the float model in nats, None without reference or classes.
        float_accuracy: Accuracy of the float model on the same samples.
        mse: Mean squared error to the float model's outputs where those are not classes; None without reference.
    """

    samples: int
    accuracy: float | None
    loss: float | None
    kl: float | None
    float_accuracy: float | None = None
    mse: float | None = None

    def __str__(self) -> str:
        parts = [] if self.accuracy is None else [f"accuracy {self.accuracy:.2%}"]
        parts += [] if self.float_accuracy is None else [f"(float {self.float_accuracy:.2%})"]
        parts += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [] if self.kl is None else [f"KL {self.kl:.5f}"]
        parts += [] if self.mse is None else [f"squared error {self.mse:.3g}"]
        return f"{' '.join(parts) or 'nothing measurable'} on {self.samples:,} samples"


@dataclass(frozen=True, eq=False)
class BitConfig(Mapping[str, LayerChoice]):
    """Layer name -> `LayerChoice`, with what is predicted, measured and where it came from.

    Attributes:
        layers: In execution order.
        outside: What was not searched, with reasons.
        metrics: Metric -> ``{"value", "unit", "float"}``: of this config and of the float model.
        predicted: ``loss``, ``with_interactions`` (None where the estimator gives none) and the ``stderr`` of the
            latter, of ``loss`` where it is None.
        measured: What was measured, or None.
        budgets: The budgets it was made for.
        solver: ``name``, ``status``, ``objective``, ``bound``, ``gap``.
        provenance: Hashes, seed, estimator, versions.

    Example:
        >>> cfg["layer1.0.conv1"].weight.bits  # doctest: +SKIP
        8
    """

    layers: Mapping[str, LayerChoice]
    outside: tuple[Outside, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    predicted: Mapping[str, float | None]
    measured: Measured | None
    budgets: tuple[str, ...]
    solver: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerChoice:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitConfig) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def predicted_loss(self) -> float:
        """Predicted rise of the loss, summed over groups."""
        return float(self.predicted["loss"] or 0.0)

    @property
    def size_bytes(self) -> float:
        """Bytes of all parameters under this config."""
        return float(self.metrics["size"]["value"])

    @property
    def avg_bits(self) -> float:
        """Parameter-weighted mean of the weight formats' bits over the searched layers."""
        return float(self.metrics["avg_bits"]["value"])

    @property
    def stored_bits(self) -> float:
        """Stored bits per weight over the searched layers, scales and zero points included."""
        return float(self.metrics["stored_bits"]["value"])

    @property
    def findings(self) -> str:
        """What the sanity gate (`mpq.sensitivity.gate`) found, in one line; empty if nothing."""
        named: dict[str, list[str]] = {}
        for f in self.provenance.get("findings", ()):
            named.setdefault(f"{f['kind']} ({f['action']})", []).append(f["group"])
        parts = [
            f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for what, names in named.items()
        ]
        return f"sanity gate: {'; '.join(parts)}" if parts else ""

    @property
    def cost_notes(self) -> str:
        """What the metrics leave out or take a guess at, in one line; empty if nothing."""
        noted = self.provenance.get("cost_notes", {})
        return "; ".join(f"{metric}: {', '.join(notes)}" for metric, notes in noted.items())

    def with_measured(self, measured: Measured) -> BitConfig:
        """The same config with measured figures."""
        return replace(self, measured=measured)

    def schemes(self) -> dict[str, str]:
        """Layer name -> scheme name: the bare answer."""
        return {name: str(choice.scheme) for name, choice in self.layers.items()}

    def to_json(self) -> str:
        """JSON text against the published schema ``mpq/schema/bitconfig-1.json``; same input, same bytes."""
        layers = {
            name: {
                **{k: v for k, v in asdict(c).items() if k != "scheme"},
                "scheme": str(c.scheme),
                "weight": c.weight.name,
                "activation": None if c.activation is None else c.activation.name,
            }
            for name, c in self.layers.items()
        }
        data = {
            "schema": SCHEMA_VERSION,
            "layers": {name: dict(sorted(layer.items())) for name, layer in layers.items()},
            "outside": [asdict(o) for o in self.outside],
            "metrics": {k: dict(v) for k, v in self.metrics.items()},
            "predicted": dict(self.predicted),
            "measured": None if self.measured is None else asdict(self.measured),
            "budgets": list(self.budgets),
            "solver": dict(self.solver),
            "provenance": dict(sorted(self.provenance.items())),
        }
        return json.dumps({**data, "checksum": _checksum(data)}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the JSON file."""
        return write_text(path, self.to_json())

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write a self-contained HTML report; see `mpq.viz.write_report` for the options."""
        from mpq.viz import write_report

        return write_report(self, path, **options)

    @classmethod
    def from_json(cls, text: str, origin: str = "the text", *, verify: bool = True) -> BitConfig:
        """Read JSON text.

        Args:
            text: What `to_json` wrote.
            origin: What to call it in errors.
            verify: Refuse a text that was changed after it was written.

        Raises:
            ConfigError: If it is not JSON, of another version, breaks the schema, or was changed.
        """
        try:
            data = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{origin} is not JSON: {error}") from None
        version = data.get("schema") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ConfigError(f"{origin} has schema {version!r}; this mpq reads {SCHEMA_VERSION!r}")
        problem = next(_validator().iter_errors(data), None)
        if problem is not None:
            where = "/".join(map(str, problem.absolute_path)) or "the top level"
            raise ConfigError(f"{origin} breaks the schema at {where}: {problem.message[:200]}")
        layers = {name: _read_layer(name, entry, origin) for name, entry in data["layers"].items()}
        if verify and data["checksum"] != _checksum({k: v for k, v in data.items() if k != "checksum"}):
            raise ConfigError(
                f"{origin} was changed after mpq wrote it (its checksum differs), so that its figures may not hold; "
                "mpq.load(path, verify=False) loads it all the same"
            )
        measured = None if data["measured"] is None else Measured(**data["measured"])
        return cls(
            layers,
            tuple(Outside(**o) for o in data["outside"]),
            data["metrics"],
            data["predicted"],
            measured,
            tuple(data["budgets"]),
            data["solver"],
            data["provenance"],
        )

    def summary(self) -> str:
        """A few lines: size, bits, predicted and measured loss, certificate, and what the sanity gate found."""
        size = self.metrics["size"]
        lines = [
            f"{len(self)} layers, {si(size['value'], 'B')} ({size['value'] / size['float']:.1%} of float), "
            f"avg {self.avg_bits:.2f} bits (stored {self.stored_bits:.2f})"
            + (f", {si(self.metrics['bitops']['value'], 'BitOps')}" if "bitops" in self.metrics else ""),
            f"predicted {self.provenance.get('loss', 'loss')} rise {self.predicted['loss']:.5g}"
            + (
                f", {self.predicted['with_interactions']:.5g} with interactions"
                if self.predicted["with_interactions"] is not None
                else ""
            )
            + (f" +- {self.predicted['stderr']:.2g}" if self.predicted["stderr"] is not None else ""),
        ]
        if self.measured is not None:
            lines.append(f"measured {self.measured}")
        gap = self.solver.get("gap")
        made_for = f" for {', '.join(self.budgets)}" if self.budgets else ""
        lines.append(
            f"{self.solver['name']}: {self.solver['status']}{made_for}"
            + (f", gap {gap:.2g}" if gap is not None else "")
        )
        if self.findings:
            lines.append(self.findings)
        return "\n".join(lines)

    def __repr__(self) -> str:
        width = max(len(name) for name in self.layers)
        rows = [f"  {n:<{width}}  {c.scheme!s:<10} {c.parameters:>12,}" for n, c in self.layers.items()]
        if len(rows) > 60:
            rows = [*rows[:30], f"  ... {len(rows) - 60} more layers ...", *rows[-30:]]
        notes = [f"  notes: {self.cost_notes}"] if self.cost_notes else []
        return "\n".join([f"BitConfig: {self.summary()}", *rows, *notes])

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th style='text-align:left'>{h}</th>" for h in ("layer", "op", "scheme", "parameters", "predicted loss")
        )
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(n)}</td><td>{c.op}</td><td><b>{c.scheme}</b></td>"
            f"<td>{c.parameters:,}</td><td>{c.predicted_loss:.3g}</td></tr>"
            for n, c in self.layers.items()
        )
        return (
            f"<div><p><b>BitConfig</b><br>{escape(self.summary()).replace(chr(10), '<br>')}</p>"
            f"<div style='max-height:24em;overflow:auto'><table><tr>{head}</tr>{rows}</table></div></div>"
        )


def load(path: str | Path, *, verify: bool = True) -> BitConfig:
    """Read a `BitConfig` from a JSON file.

    Args:
        path: The file.
        verify: Refuse a file that was changed after it was written.

    Raises:
        ConfigError: If it can't be read, is damaged or changed, or is of another version.
    """
    try:
        text = Path(path).read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    return BitConfig.from_json(text, str(path), verify=verify)


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of the content, whatever its layout."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


@cache
def _validator() -> jsonschema.Draft202012Validator:
    text = resources.files("mpq.schema").joinpath("bitconfig-1.json").read_text("utf8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _read_layer(name: str, entry: dict[str, Any], origin: str) -> LayerChoice:
    try:
        scheme = Scheme.parse(entry["scheme"])
    except FormatError as error:
        raise ConfigError(f"{origin}, layer {name!r}: {error}") from None
    stated = entry["weight"], entry["activation"]
    parsed = scheme.weight.name, None if scheme.activation is None else scheme.activation.name
    if stated != parsed:
        raise ConfigError(
            f"{origin}, layer {name!r}: scheme {entry['scheme']} contradicts weight and activation {stated}"
        )
    limits = entry["activation_range"]
    calibrated = scheme.activation is not None and scheme.activation.calibrated
    if calibrated and limits is None:
        raise ConfigError(f"{origin}, layer {name!r}: {entry['scheme']} needs an activation_range")
    if limits is not None and not calibrated:
        raise ConfigError(f"{origin}, layer {name!r}: {entry['scheme']} takes no activation_range")
    if limits is not None and not limits[0] <= 0 <= limits[1]:
        raise ConfigError(f"{origin}, layer {name!r}: activation_range {limits} must hold zero")
    return LayerChoice(
        scheme,
        None if limits is None else (limits[0], limits[1]),
        entry["group"],
        entry["op"],
        tuple(entry["weight_shape"]),
        entry["parameters"],
        entry["macs"],
        entry["predicted_loss"],
        entry["stderr"],
    )
