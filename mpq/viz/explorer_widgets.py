"""Two widgets that make Plotly's live figure dependable: it opens complete, and follows the width of the page."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets
from plotly import graph_objects as go


class LiveFigure(go.FigureWidget):  # type: ignore[misc]  # Plotly has no types
    """A FigureWidget that tells the page of itself only when it has its data.

    Plotly opens its channel first and sends the data after it; a page that draws in between stays empty.

    Args:
        figure: What it shows.
    """

    _complete = False

    def __init__(self, figure: go.Figure) -> None:
        super().__init__(figure)
        self._complete = True
        self.open()

    def open(self) -> None:
        """Open the channel to the page."""
        if self._complete:
            super().open()

    def refresh(self) -> None:
        """Hand on what was drawn since it was opened to pages that open later: boxes don't ask for it."""
        self._repr_mimebundle_()


class PageWidth(anywidget.AnyWidget):
    """An empty line that knows how wide it is: in a box, Plotly's figure has a width of its own.

    Attributes:
        width: Pixels; 0 before it is shown.
    """

    _esm = """
    export default { render({ model, el }) {
        const observer = new ResizeObserver(() => {
            if (el.clientWidth > 0) { model.set("width", el.clientWidth); model.save_changes(); }
        });
        observer.observe(el);
        return () => observer.disconnect();
    } };
    """
    width: Any = traitlets.Int(0).tag(sync=True)
