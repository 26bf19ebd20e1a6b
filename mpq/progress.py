"""Progress bars that stay silent below two seconds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Never, TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # notebooks without ipywidgets get the text bar
    from tqdm.auto import tqdm

T = TypeVar("T")


def progress_bar(items: Iterable[T], title: str, show: bool = True, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar that appears after two seconds and leaves nothing behind.

    Args:
        items: What to iterate.
        title: What is done, in a few words.
        show: False for silence.
        total: Length, where the items don't know it.
    """
    yield from tqdm(items, title, total=total, delay=2, leave=False, disable=not show, dynamic_ncols=True)


def open_bar(title: str, show: bool = True, total: int | None = None) -> tqdm[Never]:
    """The same bar, for work that is not an iteration: call its ``update()`` after each step; ``with`` closes it."""
    return tqdm(desc=title, total=total, delay=2, leave=False, disable=not show, dynamic_ncols=True)
