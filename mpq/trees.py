"""Tensors inside arguments and outputs of any structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in order; mappings that pytree does not know (Hugging Face outputs) are entered too."""
    if isinstance(tree, Mapping):
        return [t for value in tree.values() for t in tensors_in(value)]
    found = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(leaf)
    return found


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Replace every tensor; one tensor that occurs several times stays one tensor.

    Attention projects equal inputs in one product, so identity matters.
    """
    replaced = {id(t): fn(t) for t in {id(t): t for t in tensors_in(tree)}.values()}
    return pytree.tree_map(lambda x: replaced.get(id(x), x) if isinstance(x, Tensor) else x, tree)
