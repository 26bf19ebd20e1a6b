"""Memory: bytes of weights on a device, bytes that one token reads, and the peak of activations."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from mpq.cost_models.kv_cache import asked_cache
from mpq.cost_models.liveness import tensors
from mpq.cost_models.size import stored_bytes, whole_model
from mpq.cost_models.table import Cost
from mpq.cost_models.workload import make_workload
from mpq.problem import Floats
from mpq.quantizers.formats import NumberFormat
from mpq.space import SearchSpace

_EXPERT = re.compile(r"(^|\.)experts?\.\d+(\.|$)")


def resident_bytes(space: SearchSpace) -> Cost:
    """Bytes of all parameters on the device, each tensor rounded up to the device's alignment.

    Weights that the device widens when it loads them (`mpq.cost_models.devices.Device.loaded`) count as they are then.
    A setting with a context, or that decodes, has a key-value cache on top, in the device's float format.
    """
    device = space.device
    cost = whole_model(space, "resident_bytes", stored_bytes(space, device.alignment, loaded=True))
    cache, missing = asked_cache(space.graph, device.setting)
    if cache is None:
        return replace(cost, notes=(missing,) if missing else ())
    held = cache.size_bytes(NumberFormat.parse(device.float_format), device.setting)
    note = f"{held:,.0f} bytes of it are the key-value cache in {device.float_format}"
    return replace(cost, constant=cost.constant + held, reference=cost.reference + held, notes=(note,))


def active_bytes(space: SearchSpace) -> Cost:
    """Bytes of the searched weights that one token reads: of experts those that it is routed to, of a table one row.

    An expert is a layer with ``experts.<number>`` in its name; its share is that of the calibration tokens that it saw.
    Experts that the calibration data never reached are not in the graph. Skipped layers are left out, as in `bit_ops`.
    """
    shares = dict(zip((x.name for x in space.layers), _active_shares(space), strict=True))
    # Tied weights are stored once, and each of their layers reads its own share of them.
    parts = [sum(shares[x.name] * x.parameters for x in g.layers) / g.parameters for g in space.groups]
    cost = stored_bytes(space, loaded=True) * np.array(parts)[:, None]
    reference = sum(shares[x.name] * x.parameters * x.element_bits / 8 for x in space.layers)
    return Cost("active_bytes", "bytes", cost, 0.0, 1.0, reference)


def _active_shares(space: SearchSpace) -> Floats:
    work = make_workload(space.layers)
    experts = np.array([bool(_EXPERT.search(x.name)) for x in space.layers])
    dense = work.rows[~experts & (work.macs > 0)]
    routed = np.minimum(work.rows / (dense.max() if len(dense) else 1.0), 1.0)
    one_row = work.depth / work.weights
    return np.where(work.macs == 0, one_row, np.where(experts, routed, 1.0))


def peak_memory(space: SearchSpace) -> Cost:
    """Bytes of activations at the worst moment, at the device's batch size.

    There is one row for each step that can be the worst. At a step the layer's input and output are there and every
    tensor that a later step needs (see `mpq.cost_models.liveness`). A tensor is kept in the activation format that
    its readers compute in, also where a shortcut carries it on; what nobody reads stays float.

    The approximation: element-wise operations work in place, with all their operands there at once; what layers do
    inside (attention scores, im2col) and key-value caches are not counted.
    """
    elements, fixed, widths = _live(space)
    held = [space.device.computed(s)[1].bits if s.activation else 0 for s in space.schemes]
    bits = np.array(held, np.float64)
    table = np.where(bits > 0, bits, widths[:, None]) / 8  # bytes of an element [G, S]
    least = elements @ np.where(space.allowed, table, np.inf).min(1) + fixed
    most = elements @ np.where(space.allowed, table, 0.0).max(1) + fixed
    keep = np.flatnonzero(most >= least.max())
    reference = float((elements @ (widths / 8) + fixed).max())
    cost = elements[keep].toarray().T[:, None, :] * table[:, :, None]
    return Cost("peak_memory", "bytes", cost, fixed[keep], 1.0, reference)


def _live(space: SearchSpace) -> tuple[csr_array, Floats, Floats]:
    """Elements of each group's tensors at each step ``[L, G]``, bytes that stay float ``[L]``, float bits ``[G]``."""
    graph = space.graph
    work = make_workload(graph.layers, space.device.setting)
    group_of = {x.name: g for g, group in enumerate(space.groups) for x in group.layers}
    widths = np.array([g.layers[0].element_bits for g in space.groups], np.float64)
    steps = len(graph)
    fixed = np.zeros(steps)
    entries: dict[tuple[int, int], float] = defaultdict(float)
    read: set[int] = set()
    for t in sorted(tensors(graph), key=lambda t: -t.ready):
        # An output that several tensors are made of is there once, until the last of them is complete.
        spans = [(p, t.ready, work.outputs[p]) for p in t.pieces if p not in read]
        read.update(t.pieces)
        spans.append((t.ready + 1, t.last, work.inputs[t.readers[0]]))
        owner = next((group_of[graph.layers[i].name] for i in t.readers if graph.layers[i].name in group_of), None)
        for first, last, count in spans:
            if owner is None:
                fixed[first : last + 1] += count * graph.layers[t.readers[0]].element_bits / 8
            else:
                for step in range(first, last + 1):
                    entries[step, owner] += count
    for i, layer in enumerate(graph.layers):
        if i not in read:  # an output of the model, or of a part that no layer reads
            fixed[i:] += work.outputs[i] * layer.element_bits / 8
    rows, columns = np.array(list(entries), np.int64).reshape(-1, 2).T
    shape = (steps, len(space.groups))
    return csr_array((np.array(list(entries.values())), (rows, columns)), shape=shape), fixed, widths
