"""Which activations exist when: tensors between layers and the steps at which they are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.layers import LayerGraph


@dataclass(frozen=True)
class Tensor:
    """What some layers read.

    Attributes:
        readers: Layers that read it, by index.
        pieces: Layers whose outputs it is made of (a sum, a concatenation, or one output); none for the model's input.
        ready: Step at which its last piece is written; -1 for the model's input.
        last: Last step that needs it: its last reader, or the end of the sum that it is carried into by a shortcut.
    """

    readers: tuple[int, ...]
    pieces: tuple[int, ...]
    ready: int
    last: int


def tensors(graph: LayerGraph) -> tuple[Tensor, ...]:
    """The tensors that layers read, in the order of their first reader; step ``i`` runs layer ``i``.

    A graph knows layers, not element-wise operations. So a tensor is what layers of one ``source`` read, made of the
    outputs of all layers before them in the dataflow. Where these include everything that another, earlier tensor is
    made of, the earlier one is carried over (a residual connection): it is a part of the later one and lives until that
    is complete. Inputs that are whole numbers are left out.
    """
    index = {x.name: i for i, x in enumerate(graph.layers)}
    readers: dict[int, list[int]] = {}
    for i, layer in enumerate(graph.layers):
        if layer.source is not None:
            readers.setdefault(layer.source, []).append(i)
    made_of = {
        source: frozenset(index[p] for i in found for p in graph.dataflow.predecessors(graph.layers[i].name))
        for source, found in readers.items()
    }
    # Recurrent calls give edges from later layers; a tensor is made of what runs before its first reader.
    made_of = {s: frozenset(p for p in parts if p < readers[s][0]) for s, parts in made_of.items()}
    found = []
    for source, parts in made_of.items():
        carried = _carried(parts, made_of)
        heir = min((max(later) for later in made_of.values() if parts and parts < later), default=-1)
        pieces = tuple(sorted(parts - carried))
        last = max(*readers[source], heir)
        found.append(Tensor(tuple(readers[source]), pieces, max(parts, default=-1), last))
    return tuple(found)


def _carried(parts: frozenset[int], made_of: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Layers whose outputs come in an earlier tensor that is a part of this one."""
    return frozenset().union(*(earlier for earlier in made_of.values() if earlier < parts))
