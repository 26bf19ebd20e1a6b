"""Reuse of a recorded pass: what runs before the first changed layer is not computed again.

Measuring a change in a layer runs the whole model, although nothing before that layer differs. Here one pass over a
batch is recorded, with the output of every layer; in later passes the calls before the first changed layer return what
they returned then. The model's own code runs every time, whatever it does: only the work inside modules is skipped, so
that any model that makes the same calls for the same values gets bit for bit the results of a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpq.attention import ExplicitAttention
from mpq.calibration import Batch
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView, op_of, own_weight, preserved_state


class Recording:
    """One pass over a batch with the outputs of its layers, from which later passes start.

    The model runs as it is at the moment, with swapped weights and hooks. Recorded are quantizable layers and modules
    of ``torch.nn`` that hold nothing else (normalizations, activations, pooling, ``Sequential``); other modules may do
    more than their output shows, so their code runs each time. The outputs of one batch stay in memory as long as the
    recording does, and once more while the first of a batch is made.

    Args:
        view: The model.
        batch: What to run.
        before: A recording of this batch to start from.
        changed: Names of the layers in which the model differs from how it was in ``before``; tied ones follow.

    Attributes:
        output: What the model returned.

    Raises:
        DataError: If the model can't run the batch.
    """

    def __init__(
        self, view: ModelView, batch: Batch, before: Recording | None = None, changed: Iterable[str] = ()
    ) -> None:
        self._view, self._batch = view, batch
        self._modules: list[nn.Module] = _skippable(view.module) if before is None else before._modules
        this = _Pass([], 0, True) if before is None else _Pass(before._calls, before._first(changed), True)
        self.output = self._run(this)
        self._calls: list[_Call] = this.finished()

    def run(self, changed: Iterable[str]) -> Any:
        """What the model returns as it is now.

        Args:
            changed: Names of the layers in which it differs from how it was when this recording was made.
        """
        return self._run(_Pass(self._calls, self._first(changed), False))

    def _first(self, changed: Iterable[str]) -> int:
        """Number of the first call of a layer whose weight belongs to a changed one."""
        layers = self._view.layers
        weights = {id(own_weight(layers[name])) for name in changed}
        modules = {id(m) for m in layers.values() if id(own_weight(m)) in weights}
        numbers = (i for i, call in enumerate(self._calls) if id(call.module) in modules)
        return next(numbers, len(self._calls))

    def _run(self, this: _Pass) -> Any:
        # Models that draw random numbers draw the same ones in every pass.
        with _replaced_forwards(self._modules, this.forward), preserved_state(seed=0), torch.no_grad():
            return self._view(self._batch)


@dataclass(eq=False)
class _Call:
    """One call of a module in a recorded pass.

    Attributes:
        module: What was called.
        end: Number of the first call that began after this one had ended.
        output: What it returned, as it was then.
        versions: Of the output's tensors; writing to one counts it up. None if the output can't be used again.
        overwritten: The model writes into the output later on, so it gets copies.
    """

    module: nn.Module
    end: int = 0
    output: Any = None
    versions: list[int] | None = None
    overwritten: bool = False

    def usable(self) -> bool:
        """Whether the output is still what it was."""
        return self.versions is not None and _versions(tensors_in(self.output)) == self.versions


@dataclass
class _Pass:
    """Calls of one pass, numbered in the order in which they begin.

    Attributes:
        known: Calls of an earlier pass; this one makes the same ones up to a number.
        stop: The first number that may differ.
        record: Keep outputs.
    """

    known: list[_Call]
    stop: int
    record: bool
    _number: int = 0
    _calls: list[_Call] = field(default_factory=list)
    _given: list[tuple[_Call, list[Tensor], list[int]]] = field(default_factory=list)

    def forward(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """In place of a module's forward."""
        number = self._number
        if number < self.stop and self.known[number].module is not module:
            self.stop = number  # not the same calls after all: all that follows is computed
        if number < self.stop:
            call = self.known[number]
            if call.end <= self.stop and call.usable():
                self._number = call.end
                if self.record:
                    self._calls += self.known[number : call.end]
                return _copied(call.output) if call.overwritten else call.output
        self._number += 1
        return self._recorded(module, original, args, kwargs) if self.record else original(*args, **kwargs)

    def _recorded(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        known = self.known[len(self._calls)] if len(self._calls) < len(self.known) else None
        call = _Call(module)
        self._calls.append(call)
        read = tensors_in((args, kwargs))
        before = _versions(read)
        output = original(*args, **kwargs)
        call.end = self._number
        made = tensors_in(output)
        # An output that is its input, or a view of it, must stay so; and a change of an input must happen each time.
        shared = {_storage(t) for t in read} & {_storage(t) for t in made}
        versions = _versions(made)
        if not made or shared or versions is None or before is None or _versions(read) != before:
            return output
        call.output, call.versions = output, versions
        if known is not None and known.module is module and not known.overwritten:
            return output  # not written to last time; if it is now, its version will tell
        given = _copied(output)
        copies = tensors_in(given)
        self._given.append((call, copies, _versions(copies) or []))
        return given

    def finished(self) -> list[_Call]:
        """The recorded calls."""
        for call, copies, versions in self._given:
            call.overwritten = _versions(copies) != versions
        self._given.clear()
        return self._calls


def _versions(tensors: list[Tensor]) -> list[int] | None:
    """How often each tensor was written to; None where that is not counted."""
    return None if any(t.is_inference() for t in tensors) else [t._version for t in tensors]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else id(t)


def _copied(tree: Any) -> Any:
    """Copies of all tensors with their strides and offsets: kernels, and so the last bits, depend on them."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(t: Tensor) -> Tensor:
        if t.layout is not torch.strided or t.is_complex():
            return t.clone()
        if _storage(t) not in storages:
            storages[_storage(t)] = t.untyped_storage().clone()  # type: ignore[no-untyped-call]
        return t.new_empty(0).set_(storages[_storage(t)], t.storage_offset(), t.shape, t.stride())

    return map_tensors(copy, tree)


def _skippable(root: nn.Module) -> list[nn.Module]:
    """Modules that do nothing but compute their output, as far as one can know."""
    known: dict[int, bool] = {}

    def check(module: nn.Module) -> bool:
        if id(module) not in known:
            known[id(module)] = False  # of a module that holds itself
            inside = [check(m) and not m._forward_hooks and not m._forward_pre_hooks for m in module.children()]
            known[id(module)] = _only_computes(module) and all(inside)
        return known[id(module)]

    return [m for m in root.modules() if check(m)]


def _only_computes(module: nn.Module) -> bool:
    """Whether a module's own forward does nothing else, given that those of its children do not."""
    if op_of(module) is not None:
        return True
    forward = getattr(type(module), "forward", None)
    source = getattr(forward, "__module__", None) or ""
    own = source.startswith("torch.nn.modules.") or isinstance(module, ExplicitAttention)
    return own and "forward" not in vars(module) and not module.training


@contextmanager
def _replaced_forwards(modules: Iterable[nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    """Run with ``instead(module, original forward, args, kwargs)`` in place of the modules' forwards."""
    # Set past nn.Module.__setattr__, so that nothing else of the module is touched.
    originals = [(m, vars(m).get("forward"), m.forward) for m in modules]

    def replacement(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: instead(module, original, args, kwargs)

    try:
        for module, _, original in originals:
            vars(module)["forward"] = replacement(module, original)
        yield
    finally:
        for module, own, _ in originals:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
