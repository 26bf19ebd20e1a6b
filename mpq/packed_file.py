"""The file of a quantized model: one block of bytes, and a head that says what is where.

A safetensors file with two tensors of bytes. ``data`` holds all tensors one after the other, those with wider elements
first, so that each lies at a multiple of its element's size. ``head`` is JSON, compressed by zlib: the config, and
names, types and shapes of the tensors in the order of ``data``. A safetensors entry for each tensor would take some
90 bytes: more than the weights of many a small layer.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpq.config import BitConfig
from mpq.errors import ConfigError
from mpq.quantizers.packing import Layout

PACKED_VERSION = "mpq/packed-2"
_METADATA = {"format": PACKED_VERSION}
_LONGEST_HEAD = 2**28  # bytes: compressed text may blow up
_DTYPES = {str(t).removeprefix("torch."): t for t in vars(torch).values() if isinstance(t, torch.dtype)}
_HEAD = {
    "type": "object",
    "required": ["config", "tensors", "buffers"],
    "additionalProperties": False,
    "properties": {
        "config": {"type": "object"},
        "buffers": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "tensors": {
            "type": "object",
            "additionalProperties": {
                "type": "array",
                "prefixItems": [
                    {"enum": list(_DTYPES)},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}},
                ],
                "minItems": 2,
                "items": False,
            },
        },
    },
}


def write_packed(path: Path, config: BitConfig, tensors: Mapping[str, Tensor], buffers: list[str]) -> None:
    """Write a file.

    Args:
        path: Where to.
        config: The config.
        tensors: All tensors by name.
        buffers: Which of them are buffers.

    Raises:
        ConfigError: If it can't be written.
    """
    names = _ordered({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    flat = [tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8) for name in names]
    head = torch.frombuffer(bytearray(_head(config, names, buffers)), dtype=torch.uint8)
    try:
        save_file({"data": torch.cat([head[:0], *flat]), "head": head}, path, _METADATA)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} can't be written: {error}") from None


def packed_sizes(config: BitConfig, layout: Layout, buffers: list[str]) -> dict[str, int]:
    """Bytes of the file that `write_packed` writes for tensors of these types and shapes: see `PackedFile.sizes`."""
    head = len(_head(config, _ordered(layout), buffers))
    data = sum(map(_bytes, layout.values()))
    ends = {"data": (0, data), "head": (data, data + head)}
    entries = {k: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for k, (a, b) in ends.items()}
    text = len(json.dumps({"__metadata__": _METADATA, **entries}, separators=(",", ":")))
    return _by_kind(layout, buffers, 8 + math.ceil(text / 8) * 8 + data + head)


class PackedFile:
    """A file that was written by `write_packed`, with nothing taken on trust.

    Attributes:
        path: Where it is.
        config: The config in it.
        layout: Type and shape of each tensor, in order.
        buffers: Which of them are buffers.

    Raises:
        ConfigError: If it can't be read, is no such file, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, "pt") as file:
                version = (file.metadata() or {}).get("format")
                if version != PACKED_VERSION:
                    raise ConfigError(f"{path} is no packed model: its format is {version!r}, not {PACKED_VERSION!r}")
                head = self._checked(file.get_tensor("head"))
                self._data = self._checked(file.get_tensor("data"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is no packed model: {error}") from None
        found = self._read_head(head)
        self.config = BitConfig.from_json(json.dumps(found["config"]), f"the config in {path}")
        self.layout: Layout = {name: (_DTYPES[kind], tuple(n)) for name, (kind, n) in found["tensors"].items()}
        self.buffers: list[str] = found["buffers"]
        told = sum(map(_bytes, self.layout.values()))
        if told != len(self._data) or list(self.layout) != list(_ordered(self.layout)):
            raise ConfigError(f"{path} is damaged: its head tells of other tensors than there are bytes of")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors."""
        found, start = {}, 0
        for name, (dtype, shape) in self.layout.items():
            end = start + _bytes((dtype, shape))
            found[name] = self._data[start:end].clone().view(dtype).reshape(shape)
            start = end
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of ``parameters``, of ``buffers``, and of the ``header``, which is all else."""
        return _by_kind(self.layout, self.buffers, self.path.stat().st_size)

    def _checked(self, found: Tensor) -> Tensor:
        if found.dtype != torch.uint8 or found.dim() != 1:
            raise ConfigError(f"{self.path} is damaged: it holds {found.dtype} {list(found.shape)}, not bytes")
        return found

    def _read_head(self, head: Tensor) -> dict[str, Any]:
        reader = zlib.decompressobj()
        try:
            text = reader.decompress(head.numpy().tobytes(), _LONGEST_HEAD)
            if not reader.eof:
                raise ConfigError(f"{self.path} is damaged: its head is cut short, or longer than any")
            found: dict[str, Any] = json.loads(text)
        except (zlib.error, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"{self.path} is damaged: {error}") from None
        problem = next(jsonschema.Draft202012Validator(_HEAD).iter_errors(found), None)
        if problem is not None:
            raise ConfigError(f"{self.path} is damaged: its head has {problem.message[:200]}")
        for name, (_, shape) in found["tensors"].items():
            if any(type(n) is not int for n in shape):  # JSON schema takes 4.0 for an integer
                raise ConfigError(f"{self.path} is damaged: its head has the shape {shape} of tensor {name!r}")
        unknown = [name for name in found["buffers"] if name not in found["tensors"]]
        if unknown:
            raise ConfigError(
                f"{self.path} is damaged: its head has the buffer {unknown[0]!r}, which is no tensor in it"
            )
        return found


def _head(config: BitConfig, layout: Layout, buffers: list[str]) -> bytes:
    tensors = {name: [str(dtype).removeprefix("torch."), list(shape)] for name, (dtype, shape) in layout.items()}
    content = {"config": json.loads(config.to_json()), "tensors": tensors, "buffers": buffers}
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)


def _ordered(layout: Layout) -> Layout:
    """Wider elements first, else as they come."""
    return dict(sorted(layout.items(), key=lambda entry: -entry[1][0].itemsize))


def _bytes(of: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return of[0].itemsize * math.prod(of[1])


def _by_kind(layout: Layout, buffers: list[str], total: int) -> dict[str, int]:
    kept = sum(_bytes(layout[name]) for name in buffers)
    parameters = sum(map(_bytes, layout.values())) - kept
    return {"parameters": parameters, "buffers": kept, "header": total - parameters - kept}
