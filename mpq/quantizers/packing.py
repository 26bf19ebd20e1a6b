"""Packing: codes as dense streams of bits, and quantized tensors as the plain tensors that a file holds.

Formats of `mpq.quantizers.tensors.CODERS` whose parts are others have a `layout`, a `to_parts` and a `from_parts` of
their own in their module, of the same arguments as those here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import from_blocks, to_blocks
from mpq.quantizers.formats import TRITS_PER_BYTE, NumberFormat
from mpq.quantizers.grids import FloatGrid, TableGrid, grid_of
from mpq.quantizers.tensors import QuantizedTensor, block_axis, coder_of

SCALE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "e8m0": torch.uint8,  # the exponent plus 127, as OCP MX has it
    "e4m3": torch.float8_e4m3fn,
}
_E8M0_BIAS = 127
# Name of a part -> its data type and shape.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def pack(codes: Tensor, bits: int) -> Tensor:
    """A stream of bits: code ``i`` has the bits ``i * bits`` to ``(i + 1) * bits - 1``, lowest first in each byte.

    Of 4 bits the first code is the lower half of a byte. Rows that are packed one by one, filled up to whole words and
    viewed as int32, are what ``pack_to_int32`` of compressed-tensors gives (which adds ``2**(bits-1)`` to its codes).

    Args:
        codes: Integers of any shape; of negative ones the lowest ``bits`` of their two's complement are kept.
        bits: 1 to 62.

    Returns:
        ``[ceil(codes * bits / 8)]`` uint8.

    Raises:
        FormatError: If there is no such number of bits, a code has more, or codes are not of a type of integers.
    """
    _check_bits(bits)
    _check_whole(codes)
    flat = codes.flatten()
    if flat.numel() and not -(2 ** (bits - 1)) <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise FormatError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit into {bits} bits")
    count = flat.numel()
    groups = torch.nn.functional.pad(flat, (0, -count % 8)).reshape(-1, 8).T.to(_word(bits))
    groups = groups & (2**bits - 1)
    packed = torch.empty(groups.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for byte in range(bits):
        word = torch.zeros_like(groups[0])
        for i in range(8 * byte // bits, -(-(8 * byte + 8) // bits)):  # the codes with bits in this byte
            word |= _shifted(groups[i], i * bits - 8 * byte)
        packed[:, byte] = word & 255
    return packed.flatten()[: math.ceil(count * bits / 8)].clone()


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool = False) -> Tensor:
    """Codes of a stream of bits.

    Args:
        packed: What `pack` gave.
        bits: 1 to 62.
        count: How many codes.
        signed: Whether they are in two's complement.

    Returns:
        ``[count]`` of the smallest type of integers that holds all codes of so many bits.

    Raises:
        FormatError: If there is no such number of bits, or the stream has another length.
    """
    _check_bits(bits)
    _check_stream(packed, math.ceil(count * bits / 8), f"{count} codes of {bits} bits")
    filled = torch.nn.functional.pad(packed, (0, -len(packed) % bits))
    groups = filled.reshape(-1, bits).T.to(_word(bits))
    types = (torch.int8, torch.int16, torch.int32, torch.int64) if signed else (torch.uint8, torch.int16, torch.int32)
    most = bits - 1 if signed else bits
    whole = next((t for t in types if 2**most - 1 <= torch.iinfo(t).max), torch.int64)
    codes = torch.empty(groups.shape[1], 8, dtype=whole, device=packed.device)
    for i in range(8):
        word = torch.zeros_like(groups[0])
        for byte in range(i * bits // 8, -(-(i + 1) * bits // 8)):
            word |= _shifted(groups[byte], 8 * byte - i * bits)
        word &= 2**bits - 1
        codes[:, i] = (word ^ 2 ** (bits - 1)) - 2 ** (bits - 1) if signed else word
    return codes.flatten()[:count].clone()


def pack_trits(codes: Tensor) -> Tensor:
    """Five codes of 0, 1 and 2 in a byte, ``sum(code[i] * 3**i)``: ``[ceil(codes / 5)]`` uint8.

    Raises:
        FormatError: If codes are others, or not of a type of integers.
    """
    _check_whole(codes)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 2:
        raise FormatError(f"ternary codes are 0, 1 and 2, not {int(codes.min())} to {int(codes.max())}")
    flat = codes.flatten().to(torch.uint8)
    fives = torch.nn.functional.pad(flat, (0, -len(flat) % TRITS_PER_BYTE)).reshape(-1, TRITS_PER_BYTE)
    return (fives * _powers_of_three(codes.device)).sum(1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The codes of `pack_trits`: ``[count]`` uint8.

    Raises:
        FormatError: If there are more or fewer bytes, or one that holds no five codes.
    """
    _check_stream(packed, math.ceil(count / TRITS_PER_BYTE), f"{count} ternary codes")
    if count and int(packed.max()) >= 3**TRITS_PER_BYTE:
        raise FormatError(f"byte {int(packed.max())} holds no five ternary codes; the largest is 242")
    fives = packed[:, None] // _powers_of_three(packed.device) % 3
    return fives.flatten()[:count].clone()


def layout(fmt: NumberFormat, shape: tuple[int, ...], channel_axis: int = 0) -> Layout:
    """Data type and shape of each part of a tensor that `to_parts` writes."""
    if (coder := coder_of(fmt)) is not None and hasattr(coder, "layout"):
        own: Layout = coder.layout(fmt, shape, channel_axis)
        return own
    numel, scales = math.prod(shape), fmt.num_scales(shape, channel_axis)
    channels = shape[channel_axis] if shape else 1
    ternary = fmt.family == "ternary"
    size = math.ceil(numel / TRITS_PER_BYTE) if ternary else math.ceil(numel * fmt.bits / 8)
    found: Layout = {"codes": (torch.uint8, (size,))}
    if fmt.scale != "none":
        found["scale"] = SCALE_DTYPES[fmt.scale], (scales,)
    if not fmt.symmetric:
        found["zero_point"] = torch.uint8, (math.ceil(scales * fmt.bits / 8),)
    if numel and (fmt.scale == "e4m3" or fmt.family == "nupes"):
        found["outer"] = torch.float32, (1,)
    if numel and fmt.granularity == "cross":
        found["scale"], found["outer"] = (torch.float32, (channels,)), (torch.float32, (scales - channels,))
    if numel and fmt.variant == "progressive":
        found["scale"], found["outer"] = (torch.uint8, (scales,)), (torch.float16, (channels,))
    if numel and fmt.family == "kmeans":
        found["codebook"] = torch.float16, (scales, 2**fmt.bits)
    return found


def to_parts(q: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized tensor as the plain tensors that hold it, of `NumberFormat.storage_bits` in whole bytes each.

    Codes come in the order of the tensor's elements, without the padding of its last blocks.

    Raises:
        FormatError: If a scale, a factor or a level of a codebook is not what the format stores.
    """
    if (coder := coder_of(q.fmt)) is not None and hasattr(coder, "to_parts"):
        parts: dict[str, Tensor] = coder.to_parts(q)
        return parts
    codes = from_blocks(q.codes, q.shape, q.channel_axis, *(q.fmt.block or (1, 0)))
    found = {"codes": pack_trits(codes) if q.fmt.family == "ternary" else pack(codes, q.fmt.bits)}
    expected = layout(q.fmt, q.shape, q.channel_axis)
    for name in list(expected)[1:]:
        found[name] = _stored(name, q, expected[name][0])
    back = from_parts(found, q.fmt, q.shape, q.channel_axis, q.scale.dtype)
    for name in found.keys() & {"scale", "outer", "codebook"}:
        if not torch.equal(getattr(back, name), getattr(q, name)):
            raise FormatError(f"the {name} of {q.fmt.name} is not what {expected[name][0]} can hold")
    return found


def from_parts(
    parts: Mapping[str, Tensor],
    fmt: NumberFormat,
    shape: tuple[int, ...],
    channel_axis: int = 0,
    dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """The quantized tensor that `to_parts` took apart; nothing about the parts is taken on trust.

    Args:
        parts: What `to_parts` gave.
        fmt: The format.
        shape: Of the tensor.
        channel_axis: Its output-channel axis.
        dtype: What it was worked in: float64 for float64 tensors, else float32.

    Raises:
        FormatError: If a part is missing, unknown, of another shape or type, or holds what the format does not have.
    """
    if (coder := coder_of(fmt)) is not None and hasattr(coder, "from_parts"):
        found: QuantizedTensor = coder.from_parts(parts, fmt, shape, channel_axis, dtype)
        return found
    check_layout(parts, layout(fmt, shape, channel_axis))
    numel, scales = math.prod(shape), fmt.num_scales(shape, channel_axis)
    signed = fmt.family == "nupes" or (fmt.family == "int" and fmt.levels[0] < 0)
    if fmt.family == "ternary":
        codes = unpack_trits(parts["codes"], numel)
    else:
        codes = unpack(parts["codes"], fmt.bits, numel, signed=signed)
    if coder is None:
        _check_codes(codes, fmt)
    device = codes.device
    outer = None
    if "outer" in parts:
        outer = parts["outer"].to(dtype).reshape((-1, 1) if fmt.variant == "progressive" else (1, -1))
    scale = torch.ones(scales or 1, 1, dtype=dtype, device=device)
    if "scale" in parts:
        scale = _read_scale(parts["scale"], fmt, outer, dtype)[:, None]
    zero = torch.zeros_like(scale)
    if "zero_point" in parts:
        zero = unpack(parts["zero_point"], fmt.bits, scales).to(dtype)[:, None]
    codebook = parts["codebook"].to(dtype) if "codebook" in parts else None
    for name, values in (("outer", outer), ("scale", scale)):
        if values is not None and not bool((torch.isfinite(values) & (values > 0)).all()):
            raise FormatError(f"{name} holds what is no positive number")
    if codebook is not None and not bool(torch.isfinite(codebook).all()):
        raise FormatError("codebook holds NaN or infinity")
    blocks = to_blocks(codes.reshape(shape), fmt, channel_axis)
    return QuantizedTensor(blocks, scale, zero, fmt, shape, block_axis(fmt, channel_axis), outer, codebook)


def check_layout(parts: Mapping[str, Tensor], expected: Layout) -> None:
    """Refuse parts of other names, types or shapes than expected.

    Raises:
        FormatError: Naming the part.
    """
    if set(parts) != set(expected):
        raise FormatError(f"has the parts {', '.join(parts)}, but the format has {', '.join(expected)}")
    for name, (dtype, shape) in expected.items():
        if parts[name].dtype != dtype or tuple(parts[name].shape) != shape:
            is_ = f"{parts[name].dtype} {list(parts[name].shape)}"
            raise FormatError(f"{name} is {is_}, but must be {dtype} {list(shape)}")


def _stored(name: str, q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """One part besides the codes."""
    if name == "zero_point":
        return pack(q.zero_point.to(torch.int32), q.fmt.bits)
    values: Tensor = getattr(q, name)
    if name != "scale":
        return (values if name == "codebook" else values.flatten()).to(dtype)
    scale = values.flatten()
    if q.fmt.scale == "e8m0":
        return (torch.frexp(scale)[1] - 1 + _E8M0_BIAS).to(dtype)
    if q.outer is not None and q.fmt.scale == "e4m3":
        scale = scale / q.outer.flatten()  # off by one rounding at most, which the conversion takes back
    return scale.to(dtype)


def _read_scale(stored: Tensor, fmt: NumberFormat, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
    if fmt.scale == "e8m0":
        if bool((stored == 255).any()):
            raise FormatError("scale holds the byte 255, which is no number in e8m0")
        return torch.ldexp(torch.ones(len(stored), dtype=dtype, device=stored.device), stored.int() - _E8M0_BIAS)
    return stored.to(dtype) if outer is None or fmt.scale != "e4m3" else stored.to(dtype) * outer.flatten()


def _check_codes(codes: Tensor, fmt: NumberFormat) -> None:
    """Refuse codes that stand for no value, such as the NaN of fp8."""
    grid = grid_of(fmt)
    if isinstance(grid, FloatGrid):
        found = codes.int() & (2 ** (fmt.bits - 1) - 1) <= grid.last
    elif isinstance(grid, TableGrid) and len(grid.codes) < 2**fmt.bits:
        known = torch.zeros(2**fmt.bits, dtype=torch.bool, device=codes.device)
        known[list(grid.codes)] = True
        found = known[codes.int()]
    else:
        return
    if not bool(found.all()):
        raise FormatError(f"codes holds {int(codes[~found][0])}, which {fmt.base} does not have")


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 62:
        raise FormatError(f"codes are packed in 1 to 62 bits, not {bits}")


def _check_whole(codes: Tensor) -> None:
    if codes.is_floating_point() or codes.is_complex():
        raise FormatError(f"codes are integers, not {codes.dtype}")


def _check_stream(packed: Tensor, size: int, what: str) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != size:
        raise FormatError(f"{what} are {size} bytes of uint8, not {list(packed.shape)} of {packed.dtype}")


def _word(bits: int) -> torch.dtype:
    """What holds a code that is shifted by up to seven bits."""
    return torch.int32 if bits <= 16 else torch.int64


def _shifted(words: Tensor, left: int) -> Tensor:
    return words << left if left >= 0 else words >> -left


def _powers_of_three(device: torch.device) -> Tensor:
    return torch.tensor([3**i for i in range(TRITS_PER_BYTE)], dtype=torch.uint8, device=device)
