"""Which activations exist when: tensors between layers and the steps at which they are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        summands: Layers in whose formats its parts come: its pieces; where all that it is made of is carried over (a
            sum of tensors that layers also read one by one), the summands of those tensors.
    """

    readers: tuple[int, ...]
    pieces: tuple[int, ...]
    ready: int
    last: int
    summands: tuple[int, ...]


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
    made_of = []
    for found in readers.values():
        before = {index[p] for i in found for p in graph.dataflow.predecessors(graph.layers[i].name)}
        # Recurrent calls give edges from later layers; a tensor is made of what runs before its first reader.
        made_of.append(frozenset(p for p in before if p < found[0]))
    heirs = _heirs(made_of)
    carried: dict[int, list[int]] = {}
    for t, found in enumerate(heirs):
        for heir in found:
            carried.setdefault(heir, []).append(t)
    pieces, summands = _pieces(made_of, carried)
    return tuple(
        Tensor(
            tuple(found),
            pieces[t],
            max(parts, default=-1),
            max(found + [max(made_of[h]) for h in heirs[t]]),
            summands[t],
        )
        for t, (found, parts) in enumerate(zip(readers.values(), made_of, strict=True))
    )


def _pieces(
    made_of: Sequence[frozenset[int]], carried: Mapping[int, Sequence[int]]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Pieces and summands of each tensor; ``carried`` gives the tensors that are carried into another."""
    pieces = [
        tuple(sorted(parts.difference(*(made_of[c] for c in carried.get(t, ()))))) for t, parts in enumerate(made_of)
    ]
    summands = list(pieces)
    for t in sorted(range(len(made_of)), key=lambda t: len(made_of[t])):  # what is carried is made of less
        if not pieces[t]:
            summands[t] = tuple(sorted({p for c in carried.get(t, ()) for p in summands[c]}))
    return pieces, summands


def _heirs(made_of: Sequence[frozenset[int]]) -> list[list[int]]:
    """For each tensor those that it is carried into: made of all that it is and more, with none between."""
    masks = [sum(1 << p for p in parts) for parts in made_of]
    holding: dict[int, list[int]] = {}
    for t in sorted(range(len(made_of)), key=lambda t: (max(made_of[t], default=-1), len(made_of[t]))):
        for p in made_of[t]:
            holding.setdefault(p, []).append(t)
    heirs: list[list[int]] = []
    for t, parts in enumerate(made_of):
        found: list[int] = []
        for other in holding.get(max(parts, default=-1), []):
            larger = masks[other] != masks[t] and masks[other] & masks[t] == masks[t]
            if larger and not any(masks[other] & masks[h] == masks[h] for h in found):
                found.append(other)
        heirs.append(found)
    return heirs
