"""Core ML packages for Apple devices: weights of 4 or 8 bits, with our codes and scales.

Compression goes through the metadata that coremltools reads off a PyTorch model (buffers named ``_COREML_/...``), which
takes our scales as they are; its own ``linear_quantize_weights`` makes others and, unless told otherwise, skips small
layers in silence.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpq._lazy import require
from mpq.apply import check_fits, remove_input_quantizers
from mpq.calibration import make_batch
from mpq.errors import ExportError
from mpq.export.check import check
from mpq.export.packed import layer_codes
from mpq.export.report import Exported
from mpq.export.runtimes import RUNTIMES
from mpq.kept_codes import check_made_for
from mpq.quantizers.tensors import QuantizedTensor, dequantize
from mpq.trees import tensors_in
from mpq.view import copy_model, own_weight, plain

if TYPE_CHECKING:
    from mpq.config import BitConfig

EXTRA = "export-coreml"
_QUANTIZATION = 3  # in coremltools' list of kinds of compression
_CONSTANT = "constexpr_blockwise_shift_scale"


def coreml_package(
    config: BitConfig,
    path: Path,
    model: nn.Module | None = None,
    *,
    sample: Any = None,
    compute_precision: str = "float16",
) -> Exported:
    """Write an ``.mlpackage`` for iOS 18, macOS 15 or later.

    Args:
        config: The bits.
        path: The package.
        model: The float model, or what `mpq.quantize` made of it.
        sample: One batch, as for calibration, which gives the shape of the input.
        compute_precision: ``float16`` or ``float32``, of activations and scales.

    Raises:
        ExportError: If a scheme has no constant in Core ML, or coremltools can't convert the model or folds a weight
            into another operation.
        MpqError: If coremltools is not installed.
    """
    check(config, RUNTIMES["coreml"], model)
    if path.suffix != ".mlpackage":
        raise ExportError(f"Core ML needs a path like net.mlpackage, not {path}")
    if compute_precision not in ("float16", "float32"):
        raise ExportError(f"compute_precision is 'float16' or 'float32', not {compute_precision!r}")
    if model is None or sample is None:
        raise ExportError(
            "packages hold weights: pass model= and sample= (one batch, as for calibration), or --model and --calib"
        )
    require(("coremltools",), EXTRA)
    copied = copy_model(plain(model)).eval().float()
    check_fits(copied, config)
    check_made_for(plain(model), config)
    remove_input_quantizers(copied)
    copied.register_buffer("_COREML_/metadata_version", torch.tensor(1))
    codes: dict[int, QuantizedTensor] = {}
    for name in config.layers:
        layer = copied.get_submodule(name)
        weight = own_weight(layer)
        assert weight is not None
        if id(weight) not in codes:  # tied weights are rounded once
            found = layer_codes(config, copied, name)
            codes[id(weight)] = found
            weight.data = dequantize(found)
        _describe(layer, codes[id(weight)])
    batch = make_batch(sample, copied)
    package = _convert(copied, tensors_in((batch.args, batch.kwargs)), compute_precision)
    _check_kept({n: codes[id(own_weight(copied.get_submodule(n)))] for n in config.layers}, _constants(package))
    package.save(str(path))
    exact = compute_precision == "float32"
    held = {
        n: ("exact" if exact else "approximated", f"{c.weight.name}{'' if exact else ', scales in float16'}")
        for n, c in config.layers.items()
    }
    return Exported(
        "coreml", path, held, f"add {path} to an Xcode project, or coremltools.models.MLModel({str(path)!r})"
    )


def _describe(layer: nn.Module, q: QuantizedTensor) -> None:
    """Buffers that tell coremltools how the weight is stored."""
    rows = 1 if q.fmt.granularity == "tensor" else q.shape[0]
    shape = rows, len(q.scale) // rows, *[1] * (len(q.shape) - 2)
    described = {
        "compression_type": torch.tensor([_QUANTIZATION]),
        "quantization_n_bits": torch.tensor(q.fmt.bits),
        "quantization_scale": q.scale.reshape(shape),
    }
    if not q.fmt.symmetric:
        described["zero_point"] = q.zero_point.reshape(shape).int()
    for key, value in described.items():
        layer.register_buffer(f"_COREML_/weight/{key}", value)


def _convert(model: nn.Module, inputs: list[torch.Tensor], compute_precision: str) -> Any:
    import coremltools as ct

    logging.getLogger("coremltools").setLevel(logging.ERROR)  # of versions of torch that it was not tested with
    types = [
        ct.TensorType(f"input_{i}" if i else "input", tuple(x.shape), dtype=_type(x)) for i, x in enumerate(inputs)
    ]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # torch has no types for jit.trace
            # torch has no types for it.
            traced = torch.jit.trace(model, tuple(inputs), check_trace=False)  # type: ignore[no-untyped-call]
            return ct.convert(
                traced,
                inputs=types,
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=getattr(ct.precision, compute_precision.upper()),
                skip_model_load=True,
            )
    except Exception as error:
        raise ExportError(f"coremltools can't convert the model: {type(error).__name__}: {str(error)[:500]}") from error


def _type(x: torch.Tensor) -> Any:
    import numpy as np

    return np.float32 if x.is_floating_point() else np.int32


def _check_kept(codes: dict[str, QuantizedTensor], constants: list[str]) -> None:
    """See that every weight is among the constants; coremltools keeps one of those that are equal.

    Raises:
        ExportError: If one is not: with the names of its layers.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, q in codes.items():
        parts = [t.numpy().tobytes() for t in (q.codes, q.scale, q.zero_point)]
        alike.setdefault((q.fmt, q.shape, *parts), []).append(name)
    called = {name: f"{_identifier(name)}_weight" for name in codes}
    kept = {max((n for n in codes if c.startswith(called[n])), key=len, default="") for c in constants}
    for names in alike.values():
        if kept.isdisjoint(names):
            layers = "layer " + names[0] if len(names) == 1 else "layers " + ", ".join(names)
            raise ExportError(
                f"coremltools made no quantized constant of the weight of {layers}: it folded it into another "
                f"operation; leave it out with skip={names}"
            )


def _identifier(name: str) -> str:
    """A layer's name as coremltools writes it."""
    found = re.sub(r"\W", "_", name)
    return f"var_{found}" if found[0].isdigit() else found


def _constants(package: Any) -> list[str]:
    """Names of the quantized constants of a package."""
    return [
        op.outputs[0].name
        for function in package.get_spec().mlProgram.functions.values()
        for block in function.block_specializations.values()
        for op in block.operations
        if op.type == _CONSTANT
    ]
