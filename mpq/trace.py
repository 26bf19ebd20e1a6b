"""From a model and one batch to its `LayerGraph`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn
from torch.backends import mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mpq.calibration import Batch
from mpq.errors import GraphError
from mpq.layers import LayerGraph, LayerSpec, Outside, OutsideKind
from mpq.trees import map_tensors, tensors_in
from mpq.view import Forward, ModelView, channels_first, op_of, own_weight, preserved_state


class _Recorder:
    """Shapes, MACs, order, inputs and data dependencies of one forward pass, by hooks."""

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self.order: list[str] = []
        self.calls: Counter[str] = Counter()
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.macs: Counter[str] = Counter()
        self.sources: dict[str, Tensor] = {}
        self.ends: dict[Any, str] = {}
        self.reads: list[tuple[str, list[Any]]] = []
        self.uses = _WeightUses(view)
        self._alive: list[Any] = []  # keeps ids unique during the pass

    def run(self, batch: Batch) -> int:
        """Run the batch; returns the MACs of the whole network over the batch."""
        hooks = []
        for name, m in self.view.layers.items():
            hooks.append(m.register_forward_pre_hook(lambda m, args, name=name: self.uses.enter(name)))
            hooks.append(m.register_forward_hook(self._hook(name), with_kwargs=True))
        with self.view.hooked(hooks), _plain_kernels(), FlopCounterMode(display=False) as flops, self.uses:
            self.view(batch)
        return int(flops.get_total_flops()) // 2

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
            if not inputs or not outputs:
                raise GraphError(f"layer {name!r} is called without a tensor or returns none")
            if name not in self.calls:
                self.order.append(name)
                self.shapes[name] = (tuple(inputs[0].shape[1:]), tuple(outputs[0].shape[1:]))
                if inputs[0].is_floating_point():
                    self.sources[name] = inputs[0]
            self.calls[name] += 1
            self.macs[name] += _macs(module, inputs, outputs)
            self.reads.append((name, [t.grad_fn for t in inputs]))
            self._alive += [inputs, outputs]
            self.uses.leave(name)
            return map_tensors(lambda t: self._mark(name, t), output)

        return hook

    def _mark(self, name: str, output: Tensor) -> Tensor:
        """An output that autograd knows as this layer's."""
        marked = output.clone() if output.requires_grad else output.detach().requires_grad_().clone()
        if marked.grad_fn is not None:  # none where the model switches gradients off
            self.ends[marked.grad_fn] = name
        return marked

    def dataflow(self) -> nx.DiGraph[str]:
        """Edges from autograd's record: which layer outputs an input was computed from."""
        flow: nx.DiGraph[str] = nx.DiGraph()
        flow.add_nodes_from(self.order)
        for name, functions in self.reads:
            stack, seen = list(functions), set()
            while stack:
                fn = stack.pop()
                if fn is None or fn in seen:
                    continue
                seen.add(fn)
                if fn in self.ends:
                    flow.add_edge(self.ends[fn], name)
                else:
                    stack += [parent for parent, _ in fn.next_functions]
        return flow


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Implementations whose products the counter sees, inside attention and recurrent layers too."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading the flags warns about hardware that is not there
        with mkldnn.flags(enabled=False):
            yield


class _WeightUses(TorchFunctionMode):
    """Notes layers whose weight is read outside their own forward, such as ``F.linear(x, self.embed.weight)``."""

    def __init__(self, view: ModelView) -> None:
        super().__init__()
        self._view, self._running = view, Counter[int]()
        self._weights = {id(view.weight(name)) for name in view.layers}
        self.elsewhere: set[int] = set()

    def enter(self, name: str) -> None:
        """The layer's own forward begins."""
        self._running[id(self._view.weight(name))] += 1

    def leave(self, name: str) -> None:
        """The layer's own forward ends."""
        self._running[id(self._view.weight(name))] -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # not .dtype, .shape and the like
            for t in tensors_in((args, kwargs or {})):
                if id(t) in self._weights and not self._running[id(t)]:
                    self.elsewhere.add(id(t))
        return result


def _macs(module: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Multiply-accumulates of one call: each output element (of a transposed convolution: input) x its fan."""
    weight = own_weight(module)
    assert weight is not None
    if isinstance(module, nn.Embedding):
        return 0
    if (op_of(module) or "").startswith("conv_transpose"):
        return inputs[0].numel() * weight[0].numel()
    return sum(t.numel() for t in outputs) * weight[0].numel()


class _LayerTracer(fx.Tracer):
    """Keeps quantizable layers whole; everything else is traced as torch.fx does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return op_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _fx_dataflow(view: ModelView, order: list[str]) -> nx.DiGraph[str] | None:
    """Dataflow by symbolic tracing, or None where the model can't be traced or runs other layers than seen."""
    try:
        graph = _LayerTracer().trace(view.module)
    except Exception:  # torch.fx raises anything, from the model's own code as well
        return None
    flow: nx.DiGraph[str] = nx.DiGraph()
    flow.add_nodes_from(order)
    reaches: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        before = frozenset().union(*(reaches[n] for n in node.all_input_nodes))
        if node.op == "call_module" and node.target in view.layers:
            flow.add_edges_from((name, node.target) for name in before)
            before = frozenset([str(node.target)])
        reaches[node] = before
    return flow if set(flow) == set(order) else None


def _without(flow: nx.DiGraph[str], names: set[str]) -> nx.DiGraph[str]:
    """The dataflow with some layers bridged over."""
    for name in names:
        flow.add_edges_from([(p, s) for p in flow.predecessors(name) for s in flow.successors(name)])
        flow.remove_node(name)
    return flow


def _outside(view: ModelView, searched: set[str], recorder: _Recorder, batch_size: int) -> list[Outside]:
    """Every parameter that is not the weight of a searched layer, by module."""
    found = []
    counted = {id(own_weight(view.layers[name])) for name in searched}
    for name, module in view.module.named_modules():
        left = {k: p for k, p in module._parameters.items() if p is not None and id(p) not in counted}
        if not left:
            continue
        counted.update(id(p) for p in left.values())
        kind, reason = _why_outside(module, list(left), recorder, name in searched)
        found.append(
            Outside(
                name or "(model)",
                sum(p.numel() for p in left.values()),
                sum(p.numel() * p.element_size() for p in left.values()),
                0 if name in searched else recorder.macs[name] // batch_size,
                reason,
                kind,
            )
        )
    return found


def _why_outside(module: nn.Module, left: list[str], recorder: _Recorder, searched: bool) -> tuple[OutsideKind, str]:
    if searched:
        return "rest", f"{', '.join(left)} stays float"
    weight = own_weight(module)
    if op_of(module) and weight is not None and not weight.numel():
        return "hidden", "its weight is empty"
    if weight is not None and id(weight) in recorder.uses.elsewhere:
        return "hidden", "its weight is used outside the module's own forward, which mpq can't observe"
    if op_of(module) and weight is not None:
        return "idle", "not called as a module on the first calibration batch"
    if op_of(module):
        return "hidden", "its weight is computed by a parametrization; remove it before the search"
    if isinstance(module, nn.MultiheadAttention):
        return "hidden", "attention with bias_k, add_zero_attn or its own forward can't be expanded"
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return "other", f"{kind.__name__} is not quantizable"
    return "other", f"{', '.join(left[:3])}{' and more' if len(left) > 3 else ''} of {kind.__name__} is not quantizable"


def trace(view: ModelView, batch: Batch) -> LayerGraph:
    """Find the quantizable layers, what they compute and how data flows between them.

    Hooks on one forward pass give order, shapes, MACs and calls. The dataflow comes from ``torch.fx`` where the
    model can be traced symbolically, else from autograd's record of the same pass.

    Args:
        view: The model.
        batch: Shapes and MACs are those of one sample of this batch.

    Raises:
        GraphError: If no layer ran.
        DataError: If the model can't take the batch.
    """
    recorder = _Recorder(view)
    total = recorder.run(batch)
    foreign = {name for name in recorder.order if id(view.weight(name)) in recorder.uses.elsewhere}
    order = [name for name in recorder.order if name not in foreign]
    if not order:
        raise GraphError("no quantizable layer ran on the first calibration batch")
    flow = _fx_dataflow(view, recorder.order)
    layers = _specs(view, order, recorder, batch.size)
    outside = _outside(view, set(order), recorder, batch.size)
    functional = total - sum(recorder.macs.values())
    if functional > 0:
        reason = "products outside the layers (attention scores, weights used elsewhere) stay float"
        outside.append(Outside("(functional)", 0, 0, functional // batch.size, reason, "products"))
    return LayerGraph(
        layers,
        tuple(outside),
        _without(recorder.dataflow() if flow is None else flow, foreign),
        "hooks" if flow is None else "fx",
        max(round(total / batch.size), sum(x.macs for x in layers)),
    )


def _specs(view: ModelView, order: list[str], recorder: _Recorder, batch_size: int) -> tuple[LayerSpec, ...]:
    storages: dict[tuple[Any, ...], int] = {}
    sources: dict[int, int] = {}
    layers = []
    for name in order:
        module, weight = view.layers[name], view.weight(name)
        key = (weight.data_ptr(), tuple(weight.shape), tuple(weight.stride())) if weight.numel() else (name,)
        source = recorder.sources.get(name)
        layers.append(
            LayerSpec(
                name=name,
                op=op_of(module) or "",
                weight_shape=tuple(weight.shape),
                rows_shape=tuple(channels_first(module, weight).shape),
                input_shape=recorder.shapes[name][0],
                output_shape=recorder.shapes[name][1],
                macs=round(recorder.macs[name] / batch_size),
                parameters=weight.numel(),
                calls=recorder.calls[name],
                storage=storages.setdefault(key, len(storages)),
                source=None if source is None else sources.setdefault(id(source), len(sources)),
                element_bits=weight.element_size() * 8,
            )
        )
    return tuple(layers)


def trace_model(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> LayerGraph:
    """The `LayerGraph` of a model for one batch of its inputs (tensor, tuple or dict).

    Args:
        model: Any module.
        batch: One batch.
        forward: ``(model, batch) -> output`` where the batch is not what the model's ``forward`` takes.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = trace_model(net, torch.zeros(3, 4))
        >>> [(x.name, x.op, x.macs) for x in graph]
        [('0', 'linear', 32), ('2', 'linear', 16)]
    """
    with preserved_state(seed=0):
        view = ModelView(model, forward)
        return trace(view, view.read(batch))
