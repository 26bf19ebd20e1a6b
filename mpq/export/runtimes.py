"""What each runtime can load: legal schemes, layers, group sizes, and which layers it fuses into one.

A search with ``runtime="vllm"`` chooses among these only, so that its result can be exported; exporters check again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

from mpq.errors import FormatError
from mpq.export.integers import in_block
from mpq.quantizers import Scheme

# Layers that language-model runtimes load as one tensor: the last part of their names.
LLM_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # latent attention
)
# Ways to round that leave nothing but codes and scales.
_CODES_ONLY = {"stochastic", "adaround", "flexround", "adaquant", "gptq", "rsq", "weighted"}
# Named in errors, where a runtime loads them.
_COMMON = (
    *("W8", "W4", "W8:g32", "W4:g32", "W4:g64", "W2:g32", "W4:g32:asym", "W3:g16", "W6:g16", "W8:tensor"),
    *(
        "W4:tensor:p2",
        *(f"W{bits}:tensor:p2A8:sym:p2" for bits in (3, 4, 6, 8)),
        "W8A8",
        "W4A8",
        "W8A8:token",
        "W8A8:sym",
    ),
    *("Wfp8_e4m3", "Wnf4", "Wmxfp4", "Wnvfp4"),
)
_MATRICES = frozenset(["linear", "attention_in_proj"])
_CONVOLUTIONS = frozenset(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))
_ROUTERS = re.compile(r"(.*\.)?(mlp\.gate|block_sparse_moe\.gate|shared_expert_gate|router)")
_EXPERTS = re.compile(r"(.*\.)?experts(?=\.\d+(\.|$))")


@dataclass(frozen=True)
class Kernels:
    """Weight formats that go with activation formats.

    Attributes:
        weights: Names of formats, where ``*`` stands for any number and ``[48]`` for one of these digits.
        activations: Likewise; ``float`` is no quantization.
        features: Input features must be multiples of it.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...] = ("float",)
    features: int = 1

    def hold(self, scheme: Scheme) -> bool:
        """Whether a scheme is one of these pairs."""
        activation = "float" if scheme.activation is None else scheme.activation.name
        return _among(scheme.weight.name, self.weights) and _among(activation, self.activations)


def _among(name: str, patterns: Iterable[str]) -> bool:
    # A star is not "anything": int4:g* must not let in int4:g32:p2 or int4:g32:asym.
    return any(re.fullmatch(p.replace("*", r"\d+"), name) for p in patterns)


def _integers(bits: str, granularities: str = "") -> str:
    """Plain integers with and without zero points, whatever their scales are stored in."""
    return f"int{bits}{granularities}(:p2|:s16|:s32)?(:asym)?"


@dataclass(frozen=True)
class Runtime:
    """A downstream tool.

    Attributes:
        name: As in ``mpq.allocate(..., runtime=name)``.
        kernels: Pairs of formats that it loads.
        ops: Op types that it quantizes; others stay float.
        grouped_ops: Op types whose weights may have a scale for each group; None: all of them.
        whole_groups: Group sizes must divide the input features.
        multiple_of: Input and output features must be multiples of it.
        fused: Layers of one parent that it loads as one: they need one scheme. Names are their last parts.
        routers: It leaves the routers of mixtures of experts float.
        blocks: It quantizes layers of numbered blocks, and ``lm_head``, only.
        experts: What it loads as one of a mixture's experts: ``all`` layers, or each ``projection`` of all experts.
        source: Where these rules come from.
    """

    name: str
    kernels: tuple[Kernels, ...]
    ops: frozenset[str] = frozenset(["linear"])
    grouped_ops: frozenset[str] | None = None
    whole_groups: bool = True
    multiple_of: int = 1
    fused: tuple[tuple[str, ...], ...] = ()
    routers: bool = False
    blocks: bool = False
    experts: Literal["all", "projection"] | None = None
    source: str = field(default="", compare=False)

    def supports(self, scheme: Scheme) -> bool:
        """Whether a layer of a suitable kind and shape can have this scheme."""
        return bool(self._holding(scheme))

    def _holding(self, scheme: Scheme) -> list[Kernels]:
        plain = replace(scheme, weight=replace(scheme.weight, recipe=()))
        return [k for k in self.kernels if k.hold(plain)] if _CODES_ONLY.issuperset(scheme.weight.recipe) else []

    @property
    def leaving(self) -> str:
        """How `refusal` of layers that it never quantizes ends."""
        return f"; allocate with runtime={self.name!r}, which leaves them float"

    def refusal(self, op: str, rows_shape: Sequence[int], scheme: Scheme) -> str | None:
        """Why a layer can't have a scheme, with the fix; None if it can.

        Args:
            op: Op type of the layer.
            rows_shape: Shape of its weight, output channels first.
            scheme: What it would have.
        """
        if op not in self.ops:
            return f"{self.name} does not quantize {op} layers{self.leaving}"
        holding = self._holding(scheme)
        if not holding:
            # The same with float inputs first: it tells that these alone are in the way.
            near = [] if scheme.activation is None else [replace(scheme, activation=None)]
            tried = [*near, *self.examples()]
            fitting = ", ".join(dict.fromkeys(str(s) for s in tried if self.refusal(op, rows_shape, s) is None))
            choose = f"choose one that it loads, such as {fitting}" if fitting else "skip the layer"
            return f"{self.name} has no {scheme}; {choose}, or allocate with runtime={self.name!r}"
        features = rows_shape[1] if len(rows_shape) > 1 else 1
        least = min(k.features for k in holding)
        if all(features % k.features for k in holding):
            return (
                f"{self.name} needs input features that are multiples of {least} for {scheme}, not {features}; "
                "choose another format"
            )
        size = scheme.weight.group_size
        if size is not None and self.grouped_ops is not None and op not in self.grouped_ops:
            return f"{self.name} has no groups in {op} layers; use one scale per channel or tensor"
        if self.whole_groups and size is not None and features % size:
            return (
                f"{self.name} needs groups that divide the {features} input features; {size} does not: choose another "
                "size, or skip the layer"
            )
        uneven = [n for n in rows_shape[:2] if n % self.multiple_of]
        if uneven:
            return (
                f"{self.name} needs features that are multiples of {self.multiple_of}, not {uneven[0]}; skip the layer"
            )
        return None

    def stay_float(self, names: Collection[str]) -> dict[str, str]:
        """Layers that it leaves float whatever their shape, and what they are."""
        routers = {n: "a router" for n in names if self.routers and _ROUTERS.fullmatch(n)}
        outside = (n for n in names if self.blocks and not in_block(n) and n.rpartition(".")[2] != "lm_head")
        return dict.fromkeys(outside, "in none of the model's numbered blocks") | routers

    def examples(self) -> list[Scheme]:
        """Common schemes that it loads."""
        return [s for s in map(Scheme.parse, _COMMON) if self.supports(s)]

    def formats(self) -> str:
        """Common schemes that it loads, in words."""
        return f"{', '.join(map(str, self.examples()))} and more of their kind"

    def fused_sets(self, names: Iterable[str]) -> list[list[str]]:
        """Layers that are loaded as one, each set in the order of the names."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            together = next((f for f in self.fused if last in f), ())
            experts = _EXPERTS.match(name) if self.experts else None
            if experts:
                found.setdefault((experts[0], *([last] if self.experts == "projection" else [])), []).append(name)
            elif together:
                found.setdefault((parent, *together), []).append(name)
        return [members for members in found.values() if len(members) > 1]


_INTEGERS = ("int[2-8]", "int[2-8]:asym", "int[2-8]:g*", "int[2-8]:g*:asym")
_GROUPS = ("int[48]:g32", "int[48]:g64", "int[48]:g128")
_PACKED_FLOATS = (
    Kernels(("fp8_e4m3", "fp8_e4m3:tensor"), ("fp8_e4m3:token", "fp8_e4m3:tensor", "float")),
    Kernels(("nvfp4", "mxfp4")),
)
_INT8_INPUTS = ("int8:token", "int8:token:asym", "int8:tensor", "int8:tensor:asym")

RUNTIMES: dict[str, Runtime] = {
    r.name: r
    for r in (
        Runtime(
            "vllm",
            (
                Kernels(("int[48]", *_GROUPS, "int4:g32:asym", "int4:g64:asym", "int4:g128:asym")),
                Kernels(("int8",), _INT8_INPUTS),
                *_PACKED_FLOATS,
            ),
            fused=LLM_FUSED,
            experts="all",
            routers=True,
            source="compressed-tensors 0.20.0 and vLLM's loader of it; groups are those of its Marlin kernels",
        ),
        Runtime(
            "compressed-tensors",
            (
                Kernels(("int[2-8]", "int[2-8]:g*")),
                Kernels(("int[2-8]", "int[2-8]:asym"), _INT8_INPUTS),
                *_PACKED_FLOATS,
            ),
            routers=True,
            # Packed zero points have another shape than the one that transformers makes room for.
            source="compressed-tensors 0.20.0, loaded by transformers 5.23.0",
        ),
        Runtime(
            "torchao",
            (
                Kernels(_INTEGERS),
                Kernels(("int[2-8]", "int[2-8]:g*"), ("int8:token:asym",)),
            ),
            source="torchao 0.18.0: IntxWeightOnlyConfig, Int8DynamicActivationIntxWeightConfig",
        ),
        Runtime(
            "mlx",
            (
                Kernels(tuple(f"int[234568]:g{g}{z}" for g in (32, 64, 128) for z in ("", ":asym"))),
                Kernels(("mxfp4",)),
            ),
            ops=frozenset(["linear", "embedding"]),
            experts="projection",
            routers=True,
            source="mlx 0.32.4, mlx-lm 0.32.2",
        ),
        Runtime(
            "gptqmodel",
            # One layer of 5, 6 or 7 bits makes the whole checkpoint a GPTQ_P, which no other loader reads.
            (
                Kernels(
                    (
                        *("int[2348]", "int[2348]:asym"),
                        *(f"int[2348]:g{g}{z}" for g in (16, 32, 64, 128, 256, 512, 1024) for z in ("", ":asym")),
                    )
                ),
            ),
            routers=True,
            blocks=True,
            source="gptqmodel 7.7.0: QuantizeConfig",
        ),
        Runtime(
            "autoround",
            # It makes 8 bits symmetric and leaves layers float whose features are no multiples of 32, without an error.
            (Kernels(("int[2348]", "int[2348]:g*", "int[234]:asym", "int[234]:g*:asym")),),
            multiple_of=32,
            routers=True,
            source="auto-round 0.16.1, bits of its auto_gptq packing",
        ),
        Runtime(
            "modelopt",
            (
                Kernels(("int[2-8]", "int[2-8]:tensor", "int[2-8]:g*"), ("float", "int8:tensor")),
                Kernels(("fp8_e4m3", "fp8_e4m3:tensor"), ("float", "fp8_e4m3:tensor")),
                Kernels(("nvfp4",), ("float", "nvfp4")),
                Kernels(("mxfp4", "mxfp6_e3m2", "mxfp8_e4m3"), ("float",)),
            ),
            ops=frozenset(["linear", "conv1d", "conv2d", "conv3d"]),
            grouped_ops=frozenset(["linear"]),
            routers=True,
            source="nvidia-modelopt 0.47.0: QuantizerAttributeConfig",
        ),
        Runtime(
            "llama.cpp",
            (
                Kernels(("int[458]:g32", "int[45]:g32:asym", "mxfp4", "fp16", "bf16")),
                Kernels(("int2:g16:asym", "int3:g16", "int6:g16"), features=256),
            ),
            ops=frozenset(["linear", "embedding"]),
            experts="projection",
            routers=True,
            source="llama.cpp's llama-quant.cpp and the types of gguf 0.19.0",
        ),
        Runtime(
            "aimet",
            (
                Kernels(
                    (_integers("[48]", "(:tensor|:g*)?"), _integers("16", "(:tensor)?")),
                    ("float", _integers("(8|16)", ":tensor")),
                ),
            ),
            ops=frozenset(["conv1d", "conv2d", "conv3d"]) | _MATRICES,
            grouped_ops=_MATRICES,
            source="aimet-onnx 2.42.0, encodings 1.0.0",
        ),
        Runtime(
            "openvino",
            (
                Kernels(("int8", "int8:asym", "int[24]", "int[24]:g*", "int4:asym", "int4:g*:asym")),
                Kernels(("nf4", "nf4:g*", "fp8_e4m3", "mxfp4", "nvfp4")),
            ),
            # Not 3 bits: NNCF makes them, but no pass can follow.
            source="NNCF 3.4.0, compress_weights, which silently gives all but matrix products 8 bits",
        ),
        Runtime(
            "coreml",
            (Kernels((_integers("[48]", "(:tensor|:g*)?"),)),),
            ops=frozenset(["conv1d", "conv2d", "embedding"]) | _MATRICES,
            grouped_ops=_MATRICES | {"embedding"},
            source="coremltools 9.0, constexpr_blockwise_shift_scale of iOS 18",
        ),
        Runtime(
            "hls4ml",
            (
                Kernels(
                    ("int[2-9]:tensor:p2", "int1[0-6]:tensor:p2"),
                    ("float", "int[2-9]:tensor:p2", "int1[0-6]:tensor:p2"),
                ),
            ),
            ops=frozenset(["linear", "conv1d", "conv2d"]),
            source="hls4ml 1.3.0: ap_fixed types",
        ),
        Runtime(
            "onnx-matmulnbits",
            (Kernels((_integers("[248]", ":g(16|32|64|128|256)"),)),),
            ops=_MATRICES,
            whole_groups=False,
            source="onnxruntime 1.31.1, com.microsoft.MatMulNBits",
        ),
        Runtime(
            "onnx-qdq",
            (
                Kernels(
                    (_integers("[248]", "(:tensor|:g*)?"), _integers("16", "(:tensor)?")),
                    ("float", _integers("([248]|16)", ":tensor")),
                ),
            ),
            ops=_CONVOLUTIONS | _MATRICES | {"embedding"},
            grouped_ops=_MATRICES | {"embedding"},
            source="ONNX's QuantizeLinear-25, onnxruntime 1.31.1",
        ),
    )
}


def find_runtime(runtime: str | Runtime) -> Runtime:
    """A runtime by name, or itself.

    Raises:
        FormatError: If there is none of that name.
    """
    if isinstance(runtime, Runtime):
        return runtime
    if runtime not in RUNTIMES:
        near = get_close_matches(str(runtime), RUNTIMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RUNTIMES)}"
        raise FormatError(f"unknown runtime {runtime!r}; {hint}")
    return RUNTIMES[runtime]
