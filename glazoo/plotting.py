"""What all pictures share: whether they can be drawn, and how they look."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["MISSING", "can_plot", "png", "style"]

MISSING = "plots need matplotlib, which is not installed: pip install 'glazoo[plots]'"


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def style() -> Iterator[None]:
    """Draws in the project's style inside a `with` block."""
    import matplotlib

    settings: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E0E0E0",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "savefig.dpi": 200,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(settings):
        yield


def png(figure: Any) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    # No version in the file: the same data gives the same picture.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
