"""Tensors inside arguments and outputs of any structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in order."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def leaves_of(tree: Any) -> Iterator[Any]:
    """All leaves in order; mappings that pytree does not know (Hugging Face outputs) are entered too."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves_of(value)
        return
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Mapping):
            yield from leaves_of(leaf)
        else:
            yield leaf


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Replace every tensor; one tensor that occurs several times stays one tensor.

    Attention projects equal inputs in one product, so identity matters.
    """
    replaced = {id(t): fn(t) for t in {id(t): t for t in tensors_in(tree)}.values()}
    return pytree.tree_map(lambda x: replaced.get(id(x), x) if isinstance(x, Tensor) else x, tree)
