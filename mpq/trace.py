"""From a model and one batch to its `LayerGraph`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mpq.calibration import Batch
from mpq.errors import GraphError
from mpq.layers import LayerGraph, LayerSpec, Outside
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView, op_of, own_weight


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
        self._alive: list[Any] = []  # keeps ids unique during the pass

    def run(self, batch: Batch) -> int:
        """Run the batch; returns the MACs of the whole network over the batch."""
        hooks = [m.register_forward_hook(self._hook(name)) for name, m in self.view.layers.items()]
        # The counter sees the products inside attention only in its plain implementation.
        with self.view.hooked(hooks), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            self.view(batch)
        return int(flops.get_total_flops()) // 2

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            inputs, outputs = tensors_in(args), tensors_in(output)
            if not inputs:
                raise GraphError(f"layer {name!r} is called without a positional tensor; mpq can't observe its input")
            if name not in self.calls:
                self.order.append(name)
                self.shapes[name] = (tuple(inputs[0].shape[1:]), tuple(outputs[0].shape[1:]))
                if inputs[0].is_floating_point():
                    self.sources[name] = inputs[0]
            self.calls[name] += 1
            self.macs[name] += _macs(module, inputs, outputs)
            self.reads.append((name, [t.grad_fn for t in inputs]))
            self._alive += [inputs, outputs]
            return map_tensors(lambda t: self._mark(name, t), output)

        return hook

    def _mark(self, name: str, output: Tensor) -> Tensor:
        """An output that autograd knows as this layer's."""
        marked = output.clone() if output.requires_grad else output.detach().requires_grad_().clone()
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


def _macs(module: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Multiply-accumulates of one call: each output element (of a transposed convolution: input) x its fan."""
    weight = own_weight(module)
    assert weight is not None
    if isinstance(module, nn.Embedding):
        return 0
    if op_of(module)[0].startswith("conv_transpose"):  # type: ignore[index]
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


def _outside(view: ModelView, searched: set[str], counted: set[int], batch_size: int, other_macs: int) -> list[Outside]:
    """Everything with parameters that is not a layer of the graph, by module, plus matrix products outside."""
    found = []
    for module_name, module in view.module.named_modules():
        if module_name in searched:
            left = {k: p for k, p in module._parameters.items() if k != "weight" and p is not None}
        else:
            left = {k: p for k, p in module._parameters.items() if p is not None}
        left = {k: p for k, p in left.items() if id(p) not in counted}
        if not left:
            continue
        counted.update(id(p) for p in left.values())
        found.append(
            Outside(
                module_name or "(model)",
                sum(p.numel() for p in left.values()),
                sum(p.numel() * p.element_size() for p in left.values()),
                0,
                _reason(module_name, module, searched, list(left)),
            )
        )
    if other_macs > 0:
        reason = "products outside the layers, such as attention scores, stay float"
        found.append(Outside("(functional)", 0, 0, other_macs // batch_size, reason))
    return found


def _reason(name: str, module: nn.Module, searched: set[str], left: list[str]) -> str:
    if name in searched:
        return f"{', '.join(left)} stays float"
    if op_of(module) and own_weight(module) is not None:
        return "never ran on the first calibration batch"
    if op_of(module):
        return "its weight is computed by a parametrization; remove it before the search"
    if isinstance(module, nn.MultiheadAttention):
        return "attention with bias_k, add_zero_attn or its own forward can't be expanded"
    return f"{type(module).__name__} is not quantizable"


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
    order = recorder.order
    if not order:
        raise GraphError("no quantizable layer ran on the first calibration batch")
    flow = _fx_dataflow(view, order)
    storages: dict[tuple[Any, ...], int] = {}
    sources: dict[int, int] = {}
    layers = []
    for name in order:
        module, weight = view.layers[name], view.weight(name)
        op, axis = op_of(module) or ("", 0)
        key = (weight.data_ptr(), tuple(weight.shape), tuple(weight.stride())) if weight.numel() else (name,)
        source = recorder.sources.get(name)
        in_shape, out_shape = recorder.shapes[name]
        layers.append(
            LayerSpec(
                name,
                op,
                tuple(weight.shape),
                axis,
                in_shape,
                out_shape,
                round(recorder.macs[name] / batch.size),
                math.prod(weight.shape),
                recorder.calls[name],
                storages.setdefault(key, len(storages)),
                None if source is None else sources.setdefault(id(source), len(sources)),
                weight.element_size() * 8,
            )
        )
    counted = {id(own_weight(view.layers[name])) for name in order}
    outside = _outside(view, set(order), counted, batch.size, total - sum(recorder.macs.values()))
    return LayerGraph(
        tuple(layers),
        tuple(outside),
        flow if flow is not None else recorder.dataflow(),
        "fx" if flow is not None else "hooks",
        max(round(total / batch.size), sum(x.macs for x in layers)),
    )


def trace_model(model: nn.Module, batch: Any) -> LayerGraph:
    """The `LayerGraph` of a model for one batch of its inputs (tensor, tuple or dict).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = trace_model(net, torch.zeros(3, 4))
        >>> [(x.name, x.op, x.macs) for x in graph]
        [('0', 'linear', 32), ('2', 'linear', 16)]
    """
    from mpq.calibration import make_batch
    from mpq.view import preserved_state

    with preserved_state(seed=0):
        return trace(ModelView(model), make_batch(batch, model))
