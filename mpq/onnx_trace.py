"""Operators whose sizes are computed, for torch's exporter that traces: they go out as they came in.

Functions that read sizes as numbers would write those of the one batch that is traced into the new file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq.onnx_ops import OPERATORS

# Operators that make tensors of sizes, or read them; they have not changed since the oldest files that are read.
_MAKE = {"Shape", "ConstantOfShape", "Range"}
_READ = {"Reshape", "Expand", "Slice", "Tile"}


def run(operator: str, *inputs: Any, **attributes: Any) -> Any:
    """Run an operator by ONNX's name."""
    found = OPERATORS[operator](*inputs, **attributes)
    computed = operator in _MAKE or (operator in _READ and any(isinstance(x, Tensor) for x in inputs[1:]))
    if not computed or None in inputs or not torch.onnx.is_in_onnx_export():
        return found
    tensors = [x if isinstance(x, Tensor) else torch.tensor(x) for x in inputs]
    named = {f"{k}_i": v for k, v in attributes.items() if k != "value"}
    if "value" in attributes:  # a constant may be a number only here
        named["value"] = attributes["value"].item()
    return _AsItIs.apply(operator, named, found.detach(), found.dtype, found.dim(), *tensors)


class _AsItIs(torch.autograd.Function):
    """A node for the exporter, and what it computes."""

    @staticmethod
    def forward(ctx: Any, operator: str, named: dict[str, Any], found: Tensor, *others: Any) -> Tensor:
        return found.clone()

    @staticmethod
    def symbolic(
        g: Any, operator: str, named: dict[str, Any], found: Any, dtype: torch.dtype, dims: int, *inputs: Any
    ) -> Any:
        if "value" in named:
            named = {"value_t": torch.tensor([named["value"]], dtype=dtype)}
        kind = torch._C.TensorType.get().with_dtype(dtype).with_sizes([None] * dims)
        return g.op(operator, *inputs, **named).setType(kind)
