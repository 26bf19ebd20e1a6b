"""Device profiles: what a target runs, how fast, and where each figure comes from. Data files checked by a schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema

from mpq.errors import FormatError
from mpq.quantizers import NumberFormat, Scheme

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Kernel:
    """One pair of formats that a device runs.

    Attributes:
        weight: Base name of the weight's format (``int8``, ``fp16``).
        activation: Base name of the activation's format; ``float`` means that it is not quantized.
        peak: Multiply-accumulates per second of the whole device, None where no figure is known.
        runs_as: The pair that does the arithmetic, where the device has no instruction for this one: weights are
            stored in their own format and widened on the way (``int4`` weights on an int8 dot product).
        widen: Weight elements per second that can be widened; None where it costs nothing beside the arithmetic.
    """

    weight: str
    activation: str
    peak: float | None = None
    runs_as: tuple[str, str] | None = None
    widen: float | None = None


@dataclass(frozen=True)
class Memory:
    """One level of memory, the outermost last.

    Attributes:
        name: ``dram``, ``l2``, ``vtcm``, ...
        size_bytes: What it holds.
        bandwidth: Bytes per second.
    """

    name: str
    size_bytes: float
    bandwidth: float


@dataclass(frozen=True)
class Setting:
    """How a network is run on a device.

    Attributes:
        batch: Samples at once.
        phase: ``prefill`` (all tokens at once; also what a network without tokens does) or ``decode`` (one token).
        tokens: Tokens of a sample; None as in the calibration data.
        context: Tokens that are already in the key-value cache.
    """

    batch: int = 1
    phase: str = "prefill"
    tokens: int | None = None
    context: int = 0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise FormatError(f"no phase {self.phase!r} of a device's setting; there are {' and '.join(PHASES)}")
        for name, value, least in (("batch", self.batch, 1), ("tokens", self.tokens, 1), ("context", self.context, 0)):
            if value is not None and value < least:
                raise FormatError(f"{name} of a device's setting must be at least {least}, not {value}")


@dataclass(frozen=True)
class Device:
    """A target.

    Attributes:
        name: Name of the profile.
        kind: Which cost model reads it: ``generic`` (none), ``gpu``, ``cpu``, ``dsp``, ``fpga``, ``array``, ``table``.
        description: One line.
        kernels: Supported pairs of formats. Empty: everything runs.
        float_format: What tensors that stay float are kept and computed in.
        memory: Its levels of memory, innermost first.
        figures: Everything else that the cost model of its kind reads, as the schema names it.
        sources: Name of a figure -> where it comes from.
        setting: How the network is run.
        alignment: Bytes; each weight tensor takes a multiple of it.
    """

    name: str
    kind: str
    description: str
    kernels: tuple[Kernel, ...]
    float_format: str = "fp32"
    memory: tuple[Memory, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    setting: Setting = Setting()
    alignment: int = 1

    def kernel(self, scheme: Scheme) -> Kernel | None:
        """The kernel that runs a layer with this scheme; None where there is none, or no figures at all."""
        weight, activation = base_name(scheme.weight), base_name(scheme.activation)
        stays_float = {"float", self.float_format}
        names = stays_float if activation in stays_float else {activation}
        return next((k for k in self.kernels if k.weight == weight and k.activation in names), None)

    def computed(self, scheme: Scheme) -> tuple[NumberFormat, NumberFormat]:
        """Formats of weights and activations in the arithmetic: the scheme's, or those of the pair that it runs as.

        Activations are held in theirs between layers: what is multiplied as bytes is written as bytes.
        """
        kernel = self.kernel(scheme)
        own = scheme.weight, scheme.activation or NumberFormat.parse(self.float_format)
        if kernel is None or kernel.runs_as is None:
            return own
        weight, activation = (self.float_format if name == "float" else name for name in kernel.runs_as)
        return _widened(own[0], weight), _widened(own[1], activation)

    def loaded(self, scheme: Scheme, kind: str) -> NumberFormat:
        """Format of a layer's weights in memory: that of the arithmetic where kernels take no packed weights.

        Args:
            scheme: What the layer has in the file.
            kind: ``conv``, ``depthwise``, ``matmul`` or ``embedding``, whose rows stay as they are.
        """
        packed = self.figures.get("packed_ops")
        stays = packed is None or kind in (*packed, "embedding")
        return scheme.weight if stays else self.computed(scheme)[0]

    def supports(self, scheme: Scheme) -> bool:
        """Whether a layer with this scheme has a kernel here."""
        return not self.kernels or self.kernel(scheme) is not None

    def kernel_names(self) -> str:
        """The supported pairs in words."""
        found: dict[str, list[str]] = {}
        for k in self.kernels:
            found.setdefault(k.weight, []).append(k.activation)
        rows: dict[tuple[str, ...], list[str]] = {}
        for weight, activations in found.items():
            rows.setdefault(tuple(activations), []).append(weight)
        return ", ".join(f"{_runs(weights)} x {_runs(acts)}" for acts, weights in rows.items()) or "every scheme"

    def at(self, **changes: Any) -> Device:
        """The same device with another `Setting`: ``device.at(batch=8, phase="decode")``."""
        return replace(self, setting=replace(self.setting, **changes))


def _runs(names: Sequence[str]) -> str:
    """Names joined, with runs of three or more integer formats as ``int2 to int8``."""
    found: list[list[str]] = []
    for name in names:
        last = found[-1][-1] if found else ""
        follows = name.startswith("int") and last.startswith("int") and int(name[3:]) == int(last[3:]) + 1
        if follows:
            found[-1].append(name)
        else:
            found.append([name])
    return "/".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else "/".join(run) for run in found)


def _widened(fmt: NumberFormat, name: str) -> NumberFormat:
    """A format in the bits of a wider one; integers keep their scales."""
    wide = NumberFormat.parse(name)
    if wide.bits <= fmt.bits:
        return fmt
    return wide if wide.plain_float or fmt.family != wide.family else replace(fmt, bits=wide.bits)


def base_name(fmt: NumberFormat | None) -> str:
    """Name of a format without its options; ``float`` for what is not quantized.

    Bipolar integers keep theirs: kernels that take signed codes can't read them.
    """
    if fmt is None:
        return "float"
    return f"{fmt.base}:bipolar" if fmt.variant == "bipolar" else fmt.base


@cache
def all_devices() -> dict[str, Device]:
    """All shipped profiles by name."""
    folder = resources.files("mpq.cost_models")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {d.name: d for d in (parse_device(f.read_text("utf8"), f.name) for f in files)}


def load_device(path: str | Path) -> Device:
    """A device from a profile of the user's own (schema: ``mpq/schema/device-1.json``).

    Raises:
        FormatError: If it is no profile; the message names the field.
    """
    try:
        text = Path(path).read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"can't read the device profile {path}: {error}") from None
    return parse_device(text, str(path))


def find_device(device: str | Device) -> Device:
    """A device by name, by the path of its profile, or itself.

    A name or path takes settings behind colons: ``t4:batch=8``, ``a100:decode:context=2048``, ``mine.json:batch=8``.

    Raises:
        FormatError: If there is no such profile, or a setting is unknown.
    """
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise FormatError(f"a device is a name, the path of a profile or a Device, not {device!r}")
    path, suffix, settings = device.rpartition(".json")
    if suffix and settings[:1] in ("", ":"):
        found, options = load_device(path + suffix), settings.split(":")[1:]
    else:
        name, *options = device.split(":")
        found = _shipped(name)
    chosen = [_setting(device, option) for option in options]
    twice = [key for i, (key, _) in enumerate(chosen) if key in dict(chosen[:i])]
    if twice:
        raise FormatError(f"{device!r} says {twice[0]} twice")
    return found.at(**dict(chosen))


def _shipped(name: str) -> Device:
    if name not in all_devices():
        near = get_close_matches(name.lower(), all_devices(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(all_devices())}, or a path to a .json file"
        raise FormatError(f"unknown device {name!r}; {hint}")
    return all_devices()[name]


def _setting(device: str, option: str) -> tuple[str, Any]:
    key, _, value = option.partition("=")
    if option in PHASES:
        return "phase", option
    if (
        key in ("batch", "tokens", "context")
        and value.isascii()
        and value.isdecimal()
        and (int(value) or key == "context")
    ):
        return key, int(value)
    raise FormatError(
        f"{device!r}: {option!r} is no setting; there are batch=N, tokens=N, context=N, prefill and decode"
    )


@cache
def _schema() -> Any:
    return json.loads(resources.files("mpq.schema").joinpath("device-1.json").read_text("utf8"))


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_schema())


def check_name(name: str) -> None:
    """Check the name of a new profile.

    Raises:
        FormatError: If the schema does not take it.
    """
    if not re.search(_schema()["properties"]["name"]["pattern"], name):
        raise FormatError(f"{name!r} is no name for a device: small letters, digits, '.', '_' and '-', like my_cpu")


def parse_device(text: str, origin: str) -> Device:
    """A device from the text of a profile.

    Raises:
        FormatError: If it is no profile; the message begins with the origin and names the field.
    """
    try:
        data = json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        raise FormatError(f"{origin}: not JSON: {error}") from None
    wrong = jsonschema.exceptions.best_match(_validator().iter_errors(data))
    if wrong is not None:
        where = ".".join(map(str, wrong.absolute_path)) or "the profile"
        raise FormatError(f"{origin}: {where}: {wrong.message}")
    kernels = tuple(
        Kernel(k["weight"], k["activation"], k.get("peak"), _pair(k.get("runs_as")), k.get("widen"))
        for k in data["kernels"]
    )
    if not kernels and data["kind"] not in ("generic", "table"):
        raise FormatError(f"{origin}: kernels: a device of kind {data['kind']} needs at least one")
    memory = tuple(Memory(m["name"], m.get("size_bytes", math.inf), m["bandwidth"]) for m in data.get("memory", ()))
    for inner, outer in pairwise(memory):
        if inner.size_bytes >= outer.size_bytes:
            raise FormatError(
                f"{origin}: memory: {inner.name} is no smaller than {outer.name}; list the innermost first"
            )
    return Device(
        data["name"],
        data["kind"],
        data["description"],
        kernels,
        data.get("float_format", "fp32"),
        memory,
        data.get("figures", {}),
        data["sources"],
        alignment=data.get("alignment", 1),
    )


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _pair(names: list[str] | None) -> tuple[str, str] | None:
    return None if names is None else (names[0], names[1])
