"""Heat maps of where a converted model stands, layers by heads, and their numbers as a table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glazoo.converters.report import InspectReport
from glazoo.errors import ConversionError
from glazoo.plotting import encoded, require, style

__all__ = ["check_plot", "draw", "numbers", "write_plot"]

_MOST_NUMBERS = 160
"""Cells of a map up to which each carries its number."""


@dataclass(frozen=True, slots=True)
class _Map:
    """One heat map."""

    title: str
    unit: str
    """Unit of the values."""
    values: Sequence[Sequence[float]]
    """Layers by heads."""
    low: float
    high: float
    log: bool = False


def check_plot(path: Path) -> None:
    """Refuses what cannot be drawn, before any model is loaded.

    Raises:
        ConversionError: the file's name is no PNG's.
        ImportError: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png":
        raise ConversionError(f"plot: got {path.name!r}, expected a file name that ends in .png")
    require()


def write_plot(report: InspectReport, path: Path) -> Path:
    """Writes the picture, and the numbers beside it as CSV; gives the latter's path.

    Raises:
        ConversionError: the file cannot be written.
        ImportError: matplotlib is not installed.
    """
    check_plot(path)
    table = path.with_suffix(".csv")
    try:
        path.write_bytes(draw(report))
        table.write_text(numbers(report), "utf-8", newline="")
    except OSError as e:
        raise ConversionError(f"cannot write the plot {path}: {e.strerror}") from e
    return table


def numbers(report: InspectReport) -> str:
    """Return the numbers of the picture as CSV: one line per layer and head."""
    out = io.StringIO()
    head = ["layer", "head", "plasticity", "prior"]
    if report.use:
        head += ["window_tokens", "importance_gate", "importance_over_prior", "share_above_prior"]
    write = csv.writer(out, lineterminator="\n").writerow
    write(head)
    used = {u.layer: u for u in report.use}
    for gate in report.gates:
        for h, (kappa, prior) in enumerate(zip(gate.kappa, gate.prior, strict=True)):
            row: list[float] = [gate.layer, h, kappa, prior]
            if u := used.get(gate.layer):
                row += [u.window[h], u.strength[h], u.importance[h], u.consolidated[h]]
            write(row)
    return out.getvalue()


def draw(report: InspectReport) -> bytes:
    """Draws the heat maps.

    Returns:
        The picture, PNG: plasticity, and with a text the effective window and the share of synapses
        whose importance exceeds the prior; without one, the prior.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    maps = _maps(report)
    layers = [g.layer for g in report.gates]
    heads = len(report.gates[0].kappa)
    named = len(layers) * heads <= _MOST_NUMBERS and heads <= 16
    width = min(4.2, max(2.6, 0.42 * heads)) + 0.9
    height = min(6.0, max(1.2, (0.32 if named else 0.18) * len(layers))) + 1.5
    with style():
        figure = Figure(figsize=(width * len(maps), height))
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.1, h_pad=0.08)
        axes: Any = figure.subplots(1, len(maps), squeeze=False)[0]
        for i, (ax, one) in enumerate(zip(axes, maps, strict=True)):
            norm = (LogNorm if one.log else Normalize)(one.low, one.high)
            image = ax.imshow(
                one.values, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest"
            )
            bar = figure.colorbar(image, ax=ax, pad=0.03, aspect=24)
            bar.outline.set_visible(False)
            if one.log:
                # The scale may span less than a decade: plain numbers, wherever ticks are.
                bar.locator = _log_ticks(one.low, one.high)
                bar.formatter = FuncFormatter(lambda x, _: f"{x:g}")
                bar.ax.yaxis.set_minor_formatter(NullFormatter())
                bar.minorticks_off()
                bar.update_ticks()
            ax.set_title(f"{one.title}\n{one.unit}")
            ax.set_xlabel("head")
            ax.grid(False)
            ax.tick_params(length=0)
            for side in ax.spines.values():
                side.set_visible(False)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
            shown = _some(len(layers), 24)
            ax.set_yticks(shown, [str(layers[k]) for k in shown])
            if i == 0:
                ax.set_ylabel("layer")
            if named:
                _name_cells(ax, one, image)
        text = f", on {report.tokens:,} tokens" if report.use else ""
        name = Path(report.folder).resolve().name
        figure.suptitle(f"{name}: {report.spec}, {report.gate}-shaped gate{text}", fontsize=11)
        return encoded(figure)


def _maps(report: InspectReport) -> list[_Map]:
    kappa = [g.kappa for g in report.gates]
    top = max(1.0, *(max(row) for row in kappa))
    maps = [_Map("Plasticity", "kappa: 0 source, 1 metaplastic", kappa, 0.0, top)]
    if not report.use:
        prior = [g.prior for g in report.gates]
        maps.append(
            _Map("Prior importance", "I_p: 1 at the start", prior, *_log_range(prior), log=True)
        )
        return maps
    window = [u.window for u in report.use]
    share = [[100 * x for x in u.consolidated] for u in report.use]
    maps.append(
        _Map("Effective window", "tokens, 1 / (1 - decay)", window, *_log_range(window), log=True)
    )
    maps.append(
        _Map("Importance above the prior", "% of the head's synapses at the end", share, 0.0, 100.0)
    )
    return maps


def _log_range(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return limits of a logarithmic scale that differ even if the values do not."""
    values = [x for row in rows for x in row if x > 0 and math.isfinite(x)]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    return (low, high) if high > 1.5 * low else (low / 1.5, high * 1.5)


def _log_ticks(low: float, high: float) -> Any:
    from matplotlib.ticker import FixedLocator

    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [
            s * 10.0**e
            for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for s in steps
            if low <= s * 10.0**e <= high
        ]
        if len(found) >= 3:
            break
    return FixedLocator(found)


def _some(count: int, most: int) -> list[int]:
    """Return at most so many positions, evenly spaced."""
    step = -(-count // most)
    return list(range(0, count, step))


def _name_cells(ax: Any, one: _Map, image: Any) -> None:
    for y, row in enumerate(one.values):
        for x, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue
            ax.text(
                x,
                y,
                _short(value),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if light > 0.5 else "white",
            )


def _short(value: float) -> str:
    """Writes a number in the width of a cell."""
    if value >= 10000:
        return f"{value / 1000:.0f}k"
    if value >= 9.95 or value < 0.005:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}".lstrip("0")
