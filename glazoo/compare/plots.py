"""Plots of the measurements: legible in print and for colour-blind readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glazoo.compare.errors import CompareError
from glazoo.plotting import MISSING, can_plot, png, style
from glazoo.stats import source_of

__all__ = ["Axes", "Line", "panels", "require_matplotlib", "styles"]

# Okabe and Ito's palette without its yellow, which vanishes on paper.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def require_matplotlib() -> None:
    """Checks that plots can be drawn.

    Raises:
        CompareError: matplotlib is not installed.
    """
    if not can_plot():
        raise CompareError(f"{MISSING}, or pass --no-plots")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot, with its interval."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    theory_x: Sequence[float] | None = None
    theory_y: Sequence[float] | None = None


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
    ticks: Sequence[float] | None = field(default=None)
    """Places on the x axis to name."""
    rules: tuple[str, str] = ("measured, with 95 % interval", "theory")
    """What markers and bare lines mean, where there is theory."""


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return every label its colour, marker and line; a metaplastic form has its source's colour
    and marker, hollow and dashed."""
    out: dict[str, dict[str, Any]] = {}
    families: dict[str, int] = {}
    for label in labels:
        source = source_of(label)
        i = families.setdefault(source, len(families))
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        round_two = i // len(_COLORS) > 0
        metaplastic = source != label
        out[label] = {
            "color": color,
            "marker": marker,
            "linestyle": (0, (4, 2)) if metaplastic else (0, (1, 1)) if round_two else "-",
            "markerfacecolor": "white" if metaplastic else color,
        }
    return out


def panels(axes: Sequence[Axes], *, title: str = "", columns: int = 2) -> bytes:
    """Draws panels with one legend for all.

    Args:
        axes: the panels.
        title: above all of them.
        columns: panels side by side.

    Returns:
        The picture, PNG.

    Raises:
        CompareError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    labels = list(dict.fromkeys(line.label for a in axes for line in a.lines))
    drawn_as = styles(labels)
    columns = min(columns, len(axes))
    rows = -(-len(axes) // columns)
    entries = len(labels) + 2 * any(ln.theory_y is not None for a in axes for ln in a.lines)
    longest = max((len(label) for label in labels), default=0)
    room = 3 if columns > 1 and longest <= 30 else 2 if columns > 1 or longest <= 30 else 1
    per_row = max(1, min(room, entries))
    legend_height = 0.22 * -(-entries // per_row) + 0.15
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
                    clip_on=False,
                    zorder=3,
                )
                if line.low is not None and line.high is not None:
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
            if panel.y_range is not None:
                ax.set_ylim(*panel.y_range)
        for i in range(len(axes), rows * columns):
            grid[i // columns][i % columns].set_visible(False)
        shown = list(handles.items())
        if any(line.theory_y is not None for a in axes for line in a.lines):
            from matplotlib.lines import Line2D

            measured, predicted = axes[0].rules
            gray: Any = {"color": "#555555"}
            shown.append((measured, Line2D([], [], marker="o", linestyle="none", **gray)))
            shown.append((predicted, Line2D([], [], linestyle="-", **gray)))
        figure.legend(
            [h for _, h in shown],
            [n for n, _ in shown],
            loc="outside lower center",
            ncols=per_row,
        )
        if title:
            figure.suptitle(title, fontsize=11)
        return png(figure)
