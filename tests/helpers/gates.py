"""Spaces and tables made by hand for tests of the sanity gate."""

import networkx as nx
import numpy as np

from mpq.cost_models import find_device
from mpq.layers import LayerGraph, LayerSpec, Outside
from mpq.sensitivity import SensitivityTable
from mpq.space import make_space

NAMES = ("a", "b", "c")
SCHEMES = ("W2A8", "W4A8", "W8A8")
UNROUTED = Outside("expert", 9, 36, 0, "not called as a module on the first calibration batch", "idle")
NORM = Outside("norm", 9, 36, 0, "LayerNorm is not quantizable", "other")


def space_of(schemes=SCHEMES, outside=(), names=NAMES, element_bits=32, **options):
    shapes = (4, 8), (4, 8), (8,), (4,)
    layers = [LayerSpec(n, "linear", *shapes, 32, 32, 1, i, i, element_bits) for i, n in enumerate(names)]
    graph = LayerGraph(tuple(layers), tuple(outside), nx.DiGraph(), "fx", 96)
    return make_space(graph, schemes, device=find_device("generic"), **options)


def table_of(space, loss=(0.3, 0.2, 0.1), **fields):
    """The same losses in each group, unless given for each."""
    shape = space.allowed.shape
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    given = {"stderr": np.zeros(shape)} | fields
    return SensitivityTable(*names, np.broadcast_to(np.array(loss, float), shape).copy(), **given)


def kinds(gate):
    return [(f.group, f.kind) for f in gate.findings]
