"""What all pictures share: whether they can be drawn, how they look, and panels of lines.

Legible in print and for colour-blind readers.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from glazoo.errors import extra
from glazoo.stats import source_of

__all__ = ["COLORS", "Axes", "Line", "encoded", "panels", "require", "style"]

# Okabe and Ito's palette without its yellow, which vanishes on paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def require(instead: str = "") -> None:
    """Check that pictures can be drawn, before the work that they are to show.

    Args:
        instead: what else can be done about it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with extra("plots", instead=instead):
        import matplotlib  # noqa: F401


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
        "svg.hashsalt": "glazoo",  # the same data gives the same names inside the file
    }
    with matplotlib.rc_context(settings):
        yield


def encoded(figure: Any, kind: str = "png") -> bytes:
    """Return a figure as a file of one of matplotlib's formats."""
    buffer = io.BytesIO()
    # No version and no date in the file: the same data gives the same picture.
    nothing: Any = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}
    figure.savefig(buffer, format=kind, metadata=nothing.get(kind))
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot, or one point, with its interval."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    x_low: Sequence[float] | None = None
    x_high: Sequence[float] | None = None
    dots: Sequence[tuple[float, float]] = ()
    """What the line is the mean of, where that is too little for an interval."""
    theory_x: Sequence[float] | None = None
    theory_y: Sequence[float] | None = None
    source: str | None = None
    """Label of the line whose colour and marker it has; default: that of the form's source."""


@dataclass(frozen=True, slots=True)
class Axes:
    """One panel."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    guide: float | None = None
    """A horizontal line."""
    guide_label: str = ""
    ticks: Sequence[float] | None = None
    """Places on the x axis to name."""


def _styles(lines: Iterable[Line]) -> dict[str, dict[str, Any]]:
    """Return every label its colour, marker and line; metaplastic forms have their source's colour,
    hollow and dashed, and the first has its marker too."""
    sources = {line.label: line.source or source_of(line.label) for line in lines}
    families = list(dict.fromkeys(sources.values()))
    forms: Counter[str] = Counter()
    out: dict[str, dict[str, Any]] = {}
    for label, source in sources.items():
        again, i = divmod(families.index(source), len(COLORS))
        form = source != label
        out[label] = {
            "color": COLORS[i],
            "marker": _MARKERS[(i + again + 3 * form * forms[source]) % len(_MARKERS)],
            "linestyle": (0, (4, 2)) if form else (0, (1, 1)) if again else "-",
            "markerfacecolor": "white" if form else COLORS[i],
        }
        forms[source] += form
    return out


def _reach(at: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Any:
    """Return how far an interval reaches below and above a point."""
    return [
        [a - b for a, b in zip(at, low, strict=True)],
        [b - a for a, b in zip(at, high, strict=True)],
    ]


def panels(axes: Sequence[Axes], *, title: str = "", columns: int = 2, kind: str = "png") -> bytes:
    """Draws panels with one legend for all.

    Args:
        axes: the panels.
        title: above all of them.
        columns: panels side by side.
        kind: the picture's format, one of matplotlib's.

    Returns:
        The picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib has no such format.
    """
    require()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    drawn_as = _styles(line for a in axes for line in a.lines)
    labels = list(drawn_as)
    columns = min(columns, len(axes))
    rows = -(-len(axes) // columns)
    entries = len(labels) + 2 * any(ln.theory_y is not None for a in axes for ln in a.lines)
    longest = max((len(x) for label in labels for x in label.splitlines()), default=0)
    room = 3 if columns > 1 and longest <= 30 else 2 if columns > 1 or longest <= 30 else 1
    per_row = max(1, min(room, entries))
    deep = -(-entries // per_row)
    # Filled column by column; the longest decides.
    texts = [label.count("\n") for label in labels]
    taller = max((sum(texts[i : i + deep]) for i in range(0, len(texts), deep)), default=0)
    legend_height = 0.22 * deep + 0.15 * taller + 0.15
    plain: Callable[[float, int], str] = lambda x, _: f"{x:g}"  # noqa: E731
    with style():
        figure = Figure(figsize=(4.4 * columns, 3.3 * rows + legend_height))
        grid: Any = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for i, panel in enumerate(axes):
            ax = grid[i // columns][i % columns]
            for line in panel.lines:
                s = drawn_as[line.label]
                bare = line.theory_y is not None
                drawn = ax.plot(
                    line.x,
                    line.y,
                    label=line.label,
                    **(s | {"linestyle": "none"} if bare else s),
                    markeredgewidth=1.2,
                    clip_on=panel.log_y,
                    zorder=3,
                )
                if line.dots:
                    # Hollow, or they would be taken for means.
                    ax.scatter(
                        *zip(*line.dots, strict=True),
                        s=14,
                        facecolors="none",
                        edgecolors=s["color"],
                        linewidths=0.8,
                        alpha=0.8,
                    )
                if len(line.x) == 1 and line.low is not None and line.high is not None:
                    ax.errorbar(
                        line.x,
                        line.y,
                        yerr=_reach(line.y, line.low, line.high),
                        xerr=_reach(line.x, line.x_low or line.x, line.x_high or line.x),
                        color=s["color"],
                        linestyle="none",
                        linewidth=1.2,
                        capsize=3,
                    )
                elif line.low is not None and line.high is not None:
                    ax.fill_between(
                        line.x, line.low, line.high, color=s["color"], alpha=0.18, linewidth=0
                    )
                if bare:
                    ax.plot(
                        line.theory_x,
                        line.theory_y,
                        color=s["color"],
                        linestyle=s["linestyle"],
                        linewidth=1.4,
                    )
                handles.setdefault(line.label, drawn[0])
            if panel.guide is not None:
                ax.axhline(panel.guide, color="#555555", linewidth=0.8, linestyle=(0, (6, 3)))
                ax.annotate(
                    panel.guide_label,
                    (1.0, panel.guide),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                    color="#555555",
                )
            ax.set_title(panel.title)
            ax.set_xlabel(panel.x_label)
            ax.set_ylabel(panel.y_label)
            if panel.log_x:
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_formatter(FuncFormatter(plain))
            if panel.ticks is not None:
                ax.set_xticks(list(panel.ticks))
                ax.xaxis.set_minor_locator(NullLocator())
            if panel.log_y:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter(FuncFormatter(plain))
            if panel.y_range is not None:
                ax.set_ylim(*panel.y_range)
        for i in range(len(axes), rows * columns):
            grid[i // columns][i % columns].set_visible(False)
        shown = list(handles.items())
        if any(line.theory_y is not None for a in axes for line in a.lines):
            from matplotlib.lines import Line2D

            gray: Any = {"color": "#555555"}
            measured = Line2D([], [], marker="o", linestyle="none", **gray)
            shown.append(("measured, with 95 % interval", measured))
            shown.append(("theory", Line2D([], [], linestyle="-", **gray)))
        figure.legend(
            [h for _, h in shown],
            [n for n, _ in shown],
            loc="outside lower center",
            ncols=per_row,
        )
        if title:
            figure.suptitle(title, fontsize=11)
        return encoded(figure, kind)
