"""Data as the model takes it: batches of tensors, tuples or dicts become calls of ``forward``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpq.errors import DataError
from mpq.fingerprint import Fingerprint, tensor_bytes
from mpq.trees import leaves_of, map_tensors, tensors_in

_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        args: Positional arguments of ``forward``.
        kwargs: Keyword arguments of ``forward``.
        size: Number of samples (first axis of the first tensor).
        labels: What came after the inputs in a tuple, or ``labels`` of a dict; None if there is nothing.
        raw: The batch as it was given; a loss of the user's own gets this one.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    size: int
    labels: Any
    raw: Any

    def to(self, device: torch.device) -> Batch:
        """A copy of the batch on a device: models may write into their inputs."""

        def move(value: Any) -> Any:
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        args, kwargs, labels, raw = pytree.tree_map(move, (self.args, dict(self.kwargs), self.labels, self.raw))
        return Batch(args, kwargs, self.size, labels, raw)

    def tensors(self) -> list[Tensor]:
        """All input tensors."""
        return tensors_in((self.args, dict(self.kwargs)))

    def _by_sample(self) -> list[Tensor]:
        """Tensors with as many entries as there are samples; nearly always those that hold one entry for each."""
        found = tensors_in((self.args, dict(self.kwargs), self.raw))
        return [t for t in found if t.dim() and len(t) == self.size]

    def without_last(self, first_only: bool = False) -> Batch | None:
        """The same batch with one sample less; None where its tensors can't be found.

        Args:
            first_only: Cut only the first tensor that is as long as the batch.
        """
        found = {id(t) for t in (self._by_sample()[:1] if first_only else self._by_sample())}
        return self._mapped(lambda t: t[:-1] if id(t) in found else t, self.size - 1) if found else None

    def with_last_replaced(self) -> Batch:
        """The same batch with the first sample in the place of the last, in its first tensor."""
        first = {id(t) for t in self._by_sample()[:1]}
        return self._mapped(lambda t: torch.cat([t[:-1], t[:1]]) if id(t) in first else t, self.size)

    def _mapped(self, fn: Callable[[Tensor], Tensor], size: int) -> Batch:
        args, kwargs, raw = map_tensors(fn, (self.args, dict(self.kwargs), self.raw))
        return Batch(args, kwargs, size, None, raw)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of all that is in it."""
        digest = hashlib.sha256()
        self.update_hash(digest)
        return digest.hexdigest()

    def update_hash(self, digest: hashlib._Hash) -> str:
        """Feed names, shapes and bytes of inputs and labels to a hash, and whatever else there is.

        Returns:
            Name of a type that has no content to hash; empty if there is none.
        """
        parts = [("", self.args), *sorted(self.kwargs.items()), ("labels", self.labels)]
        named = [(name, t) for name, tree in parts for t in tensors_in(tree)]
        for name, t in named:
            digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode() + tensor_bytes(t))
        everything = [self.args, dict(self.kwargs), self.labels, self.raw]
        known = {id(t) for _, t in named}
        if all(x is None or id(x) in known for x in leaves_of(everything)):
            return ""
        found = Fingerprint()
        found.add(everything)
        digest.update(found.hexdigest().encode())
        return found.opaque


def _required_positional(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def make_batch(raw: Any, model: nn.Module) -> Batch:
    """Read one batch.

    A tensor is the only input. A dict (or Hugging Face ``BatchEncoding``) gives keyword arguments; its
    ``labels`` are kept apart. A tuple or list gives as many leading items as ``forward`` has required
    positional parameters, the next item is the labels; a dict in first place gives keyword arguments.

    Raises:
        DataError: If there is no tensor in it.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    labels = None
    inputs = raw
    if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw):
        taken = 1 if isinstance(raw[0], Mapping) else _required_positional(model)
        args = tuple(raw[:taken])
        labels = raw[taken] if len(raw) > taken else None
        inputs = raw[0]
    if isinstance(inputs, Mapping):
        kwargs = {k: v for k, v in inputs.items() if k not in _LABELS}
        found = labels_of(inputs)
        labels = labels if found is None else found
        args = ()
    elif not args:
        args = (raw,)
    first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
    if first is None or first.dim() == 0:
        raise DataError(
            f"a batch must be a tensor with a batch axis, or a tuple or dict of such, not {type(raw).__name__}"
        )
    return Batch(args, kwargs, len(first), labels, raw)


def labels_of(raw: Any) -> Any:
    """The labels of an ``(inputs, labels)`` pair or of a dict with ``labels``, else None."""
    if isinstance(raw, Mapping):
        return next((raw[k] for k in _LABELS if raw.get(k) is not None), None)
    return raw[1] if isinstance(raw, tuple | list) and len(raw) == 2 else None


@dataclass(frozen=True)
class Calibration:
    """Batches held in memory.

    Attributes:
        batches: The batches in order.
        hash: SHA-256 of all inputs and labels; of what can be hashed, where something in them can't.
        opaque: Name of the type of something that can't be hashed; empty if there is none.
    """

    batches: tuple[Batch, ...]
    hash: str
    opaque: str = ""

    @property
    def num_samples(self) -> int:
        """Samples over all batches."""
        return sum(b.size for b in self.batches)

    def first(self, samples: int) -> list[Batch]:
        """The first whole batches that hold at least so many samples, or all batches."""
        before = accumulate((b.size for b in self.batches), initial=0)
        return [b for b, count in zip(self.batches, before, strict=False) if count < samples]

    @property
    def alike(self) -> bool:
        """Whether there are several samples, and all have the same inputs."""
        first = self.batches[0].tensors()
        return self.num_samples > 1 and all(
            t.dim() > 0 and t.shape[1:] == f.shape[1:] and bool((t == f[:1]).all())
            for batch in self.batches
            for t, f in zip(batch.tensors(), first, strict=False)
        )

    @classmethod
    def load(cls, data: Iterable[Any], read: Callable[[Any], Batch], max_samples: int | None = None) -> Calibration:
        """Take batches from any iterable until there are enough samples.

        Args:
            data: Batches or a DataLoader; a generator is consumed only as far as needed. A tensor is one batch.
            read: Makes a `Batch` of what the iterable yields, such as `mpq.view.ModelView.read`.
            max_samples: Stop after the batch that reaches this many.

        Raises:
            DataError: If there are no samples, or an input holds NaN or infinity.
        """
        if max_samples is not None and max_samples < 1:
            raise DataError(f"max_samples must be at least 1, not {max_samples}; None takes all")
        batches: list[Batch] = []
        digest, opaque = hashlib.sha256(), ""
        for batch in read_batches(data, read):
            opaque = batch.update_hash(digest) or opaque
            batches.append(batch)
            if max_samples is not None and sum(b.size for b in batches) >= max_samples:
                break
        if not batches:
            raise DataError("the data is empty: no batch with at least one sample (is a generator already used up?)")
        return cls(tuple(batches), digest.hexdigest(), opaque)


def read_batches(data: Iterable[Any], read: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Batches with at least one sample.

    Raises:
        DataError: If an input holds NaN or infinity.
    """
    if not isinstance(data, Iterable):
        # Callers without a type checker pass anything, which the annotation calls unreachable.
        hint = "; a Dataset gives batches through a DataLoader" if hasattr(data, "__getitem__") else ""  # type: ignore[unreachable]
        raise DataError(f"the data must be an iterable of batches, not {data!r}{hint}")
    for i, raw in enumerate([data] if isinstance(data, Tensor | Mapping) else data):
        batch = read(raw)
        # Minus infinity is what additive attention masks are made of.
        if any(t.is_floating_point() and bool((t.isnan() | (t == torch.inf)).any()) for t in batch.tensors()):
            raise DataError(f"batch {i} of the data holds NaN or infinity")
        if batch.size:
            yield batch


def model_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and bytes of all parameters and buffers that a state dict holds."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        if isinstance(t, Tensor):
            digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode() + tensor_bytes(t))
    return digest.hexdigest()
