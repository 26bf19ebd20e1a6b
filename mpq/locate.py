"""Models and data named on the command line: ``package.module:name``, ``file.py:name`` or ``arrays.npz``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from mpq.errors import DataError, GraphError, MpqError
from mpq.onnx_in import load_onnx


def locate(spec: str) -> Any:
    """The object that ``module:name`` names; a function or class is called without arguments.

    Raises:
        MpqError: If the module or the name does not exist.
    """
    place, _, name = spec.partition(":")
    if not name:
        raise MpqError(f"{spec!r} names no object; write package.module:name or file.py:name")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise MpqError(f"{place} has no {name!r}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise MpqError(f"{spec} raised {type(error).__name__}: {error}") from error


def locate_model(spec: str) -> nn.Module:
    """A model, or what an ONNX file holds.

    Raises:
        GraphError: If the object is none.
    """
    if spec.endswith(".onnx"):
        return load_onnx(spec)
    found = locate(spec)
    if not isinstance(found, nn.Module):
        raise GraphError(f"{spec} is a {type(found).__name__}, not a torch.nn.Module")
    return found


def locate_data(spec: str, batch_size: int = 64) -> Iterable[Any]:
    """Batches: any iterable that a name stands for, or an npz file with ``x`` and perhaps ``y``.

    Raises:
        DataError: If there are no batches in it.
    """
    if spec.endswith(".npz"):
        try:
            with np.load(spec, allow_pickle=False) as loaded:
                arrays = {name: torch.from_numpy(loaded[name]) for name in loaded if name in ("x", "y")}
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{spec} can't be read as an npz file: {error}") from None
        if "x" not in arrays or len({len(a) for a in arrays.values()}) != 1:
            raise DataError(f"{spec} must hold an array 'x' and perhaps as many labels 'y'")
        if arrays["x"].dtype == torch.float64:  # NumPy's default; models take float32
            arrays["x"] = arrays["x"].float()
        parts = [torch.split(arrays[k], batch_size) for k in ("x", "y") if k in arrays]
        return list(parts[0]) if len(parts) == 1 else list(zip(*parts, strict=True))
    found = locate(spec)
    if not isinstance(found, Iterable):
        raise DataError(f"{spec} is a {type(found).__name__}, not an iterable of batches")
    return found


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise MpqError(f"can't import {name!r}: {error}") from None


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise MpqError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise MpqError(f"can't import {path}: {error}") from None
    return module
