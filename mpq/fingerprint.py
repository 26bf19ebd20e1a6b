"""Fingerprints: SHA-256 of values and of code, the same in every process; what has none is named."""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import sys
import sysconfig
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis), torch.dtype, torch.device)
# Written in C, or made by the class body.
_NAMED = (
    BuiltinFunctionType
    | MethodWrapperType
    | MethodDescriptorType
    | WrapperDescriptorType
    | MemberDescriptorType
    | GetSetDescriptorType
)
_WRAPPED = ("fget", "fset", "fdel", "__func__", "func")  # of properties, static methods and the like
_UNSHARED = (tuple, frozenset, CodeType)  # immutable: which of them are one object is up to the compiler
# Of a class: where its text stands and what Python and ABCMeta note about it, none of which changes what it does.
_BOOKKEEPING = {"__module__", "__qualname__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "_abc_impl"}
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
_SITE = {"site-packages", "dist-packages"}


class Fingerprint:
    """A hash that takes values of any structure: tensors, arrays, text, numbers, containers, objects, code.

    Objects count by their class and by what pickle would keep of them, so that two of them are told apart wherever
    their contents differ.

    Args:
        code: Functions and classes count by what they do: their bytecode, that of the functions and classes they call,
            and the values they read from outside. Those of installed packages count by the file they are in. Without,
            they count by their names.

    Attributes:
        opaque: Name of the type of the first value that has no content to hash; empty if there is none.
    """

    def __init__(self, *, code: bool = False) -> None:
        self._code, self._digest = code, hashlib.sha256()
        # Seen before -> its number; kept alive, or a later object could have the same id.
        self._seen: dict[int, tuple[int, Any]] = {}
        self.opaque = ""

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()

    def add(self, value: Any) -> None:
        """Take one more value."""
        if isinstance(value, _ATOMS) and type(value).__module__ in ("builtins", "torch"):
            return self._feed(type(value).__name__, repr(value).encode())
        if id(value) in self._seen:
            return self._feed("again", str(self._seen[id(value)][0]).encode())
        if not isinstance(value, _UNSHARED):
            self._seen[id(value)] = len(self._seen), value
        if isinstance(value, Tensor):
            return self._feed(f"tensor {tuple(value.shape)} {value.dtype}", tensor_bytes(value))
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            return self._feed(f"array {value.shape} {value.dtype.str}", np.ascontiguousarray(value).tobytes())
        if isinstance(value, type | FunctionType | CodeType | ModuleType | MethodType | _NAMED):
            return self._add_code(value)
        if isinstance(value, set | frozenset):
            return self._feed("set", "".join(sorted(map(self._apart, value))).encode())
        if isinstance(value, nn.Module):
            return self._add_object(type(value), _state(value))
        if type(value) in (tuple, list, dict):
            return self._add_all(type(value).__name__, value.items() if isinstance(value, dict) else value)
        if isinstance(value, weakref.ReferenceType):  # recurrent layers keep some to their own weights
            return self._add_object(type(value), value())
        return self._add_object(*self._contents(value))

    def _feed(self, kind: str, data: bytes) -> None:
        self._digest.update(f"{kind} {len(data)}:".encode() + data)

    def _add_all(self, kind: str, values: Any) -> None:
        values = list(values)
        self._feed(kind, str(len(values)).encode())
        for value in values:
            self.add(value)

    def _add_object(self, kind: Any, contents: Any) -> None:
        self._feed("object", b"")
        self.add(kind)
        self.add(contents)

    def _apart(self, value: Any) -> str:
        """Fingerprint of a member of a set: sets have no order."""
        one = Fingerprint(code=self._code)
        one.add(value)
        self.opaque = self.opaque or one.opaque
        return one.hexdigest()

    def _contents(self, value: Any) -> tuple[Any, Any]:
        """Class and contents of an object, as pickle would keep them."""
        if isinstance(value, Mapping):  # also those which pickle can't enter
            return type(value), dict(value)
        if isinstance(value, property | staticmethod | classmethod | functools.cached_property):
            return type(value), [getattr(value, k, None) for k in _WRAPPED]
        own = copyreg.dispatch_table.get(type(value))
        try:
            reduced = value.__reduce_ex__(4) if own is None else own(value)
        except Exception:  # objects that don't pickle raise anything
            self.opaque = self.opaque or type(value).__qualname__
            return type(value), None
        if isinstance(reduced, str):  # a global by its name
            return type(value), reduced
        make, args, *rest = reduced
        return type(value), [make, args, *(list(r) if isinstance(r, Iterator) else r for r in rest)]

    def _add_code(self, value: Any) -> None:
        if isinstance(value, CodeType):
            self._add_bytecode(value)
        elif isinstance(value, MethodType):
            self._add_all("method", [value.__func__, value.__self__])
        elif not self._code or isinstance(value, ModuleType | _NAMED) or _installed(value.__module__):
            self._add_name(value)
        elif isinstance(value, FunctionType):
            self._add_function(value)
        else:
            self._feed("class", b"")
            self._add_all("bases", value.__mro__[1:])
            self._add_all("body", [x for x in sorted(vars(value).items()) if x[0] not in _BOOKKEEPING])

    def _add_name(self, value: Any) -> None:
        module = getattr(value, "__module__", None)
        self._feed("name", f"{module}.{getattr(value, '__qualname__', value.__name__)}".encode())
        if self._code and module is not None:
            self._feed("file", _file_hash(module))
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, ModuleType | type):
            self.add(owner)  # of a bound method written in C

    def _add_function(self, value: FunctionType) -> None:
        self._add_bytecode(value.__code__)
        cells = [c.cell_contents for c in value.__closure__ or () if c != CellType()]
        self._add_all("read", [value.__defaults__, value.__kwdefaults__, *cells])
        for code in _nested(value.__code__):
            self._add_all("globals", _globals_read(code, value.__globals__))

    def _add_bytecode(self, code: CodeType) -> None:
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        self._add_all("code", [code.co_code, code.co_exceptiontable, names, counts, code.co_consts])


def tensor_bytes(t: Tensor) -> bytes:
    """Raw bytes of a tensor, whatever its device, layout and dtype."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; its mode does not count, and hooks count without their numbers."""
    found = {k: v for k, v in vars(module).items() if k != "training"}
    return {k: list(v.values()) if k.endswith("_hooks") and isinstance(v, dict) else v for k, v in found.items()}


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of all functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _globals_read(code: CodeType, scope: Mapping[str, Any]) -> Iterator[Any]:
    """Values that code reads by global names; of a module that it names, what it takes from there."""
    value: Any = None
    for step in dis.get_instructions(code):
        if isinstance(value, ModuleType) and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            value = getattr(value, step.argval, None)
            continue
        if value is not None:
            yield value
        value = scope.get(step.argval) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else None


def _installed(module: str | None) -> bool:
    """Whether a module belongs to Python or an installed package (or mpq): its file tells its version."""
    if module is None or module.partition(".")[0] in ("builtins", "torch", "mpq"):
        return module is not None
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module in sys.builtin_module_names
    return bool(_SITE.intersection(Path(file).parts)) or Path(file).is_relative_to(_STANDARD)


@functools.cache
def _file_hash(module: str) -> bytes:
    file = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).digest() if file and Path(file).is_file() else b""
