"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from glazoo.compare.plan import Plan
from glazoo.compare.rows import Row, accuracy_of, point
from glazoo.compare.train import evaluation_points
from glazoo.plotting import Axes, Line, panels
from glazoo.stats import interval

__all__ = ["ENOUGH", "draw_figures"]

ENOUGH = 4
"""Seeds of which a picture shows the interval: of fewer it is so wide that it covers everything
else, and every seed has a dot."""


def draw_figures(plan: Plan, found: Sequence[Row]) -> dict[str, tuple[str, bytes]]:
    """Draws the figures: file name, caption, picture (SVG)."""
    sizes = list(dict.fromkeys(r.arm.model.state_bytes for r in found))
    main = [r for r in found if r.results and r.arm.model.state_bytes == sizes[0]]
    if not main:
        return {}
    task, percent = plan.task, f"{plan.task.measure} (%)"
    measure = task.measure.capitalize()
    points = evaluation_points(task)
    loads = sorted({load for load, length in points if length == task.length})
    lengths = sorted({length for load, length in points if load == task.load})
    count = min(len(r.results) for r in main)
    shown = "Every seed has a dot, the line is their mean." if count > 1 else "One seed."
    if count >= ENOUGH:
        shown = "Bands are 95 % t intervals over seeds."
    out: dict[str, tuple[str, bytes]] = {}

    def draw(name: str, caption: str, title: str, x: str, lines: list[Line], **more: Any) -> None:
        axes = Axes(title, x, percent, lines, y_range=(0, 100), **more)
        out[f"{name}.svg"] = caption, panels([axes], kind="svg")

    def at(row: Row, load: int, length: int) -> list[float]:
        return [float(point(r, load, length)["accuracy"]) for r in row.results]

    if len(loads) > 1:
        draw(
            "load",
            f"{measure} against load, at {task.length} tokens. {shown}",
            "against load",
            "pairs or tokens to hold",
            [_line(r.label, [(n, at(r, n, task.length)) for n in loads]) for r in main],
            ticks=loads,
        )
    if len(lengths) > 1:
        draw(
            "length",
            f"{measure} against length, at load {task.load}. {shown}",
            "against length",
            "length of the example (tokens)",
            [_line(r.label, [(n, at(r, task.load, n)) for n in lengths]) for r in main],
            log_x=True,
            ticks=lengths,
        )
    if len(sizes) > 1:
        by_label: dict[str, list[tuple[int, list[float]]]] = {}
        for r in sorted(found, key=lambda r: r.shape.state_bytes):
            if r.results:
                own = by_label.setdefault(r.label, [])
                own.append((r.shape.state_bytes, [accuracy_of(x) for x in r.results]))
        draw(
            "state",
            f"{measure} against state size. {shown}",
            "against state size",
            "recurrent state of a layer (bytes)",
            [_line(label, own) for label, own in by_label.items()],
            log_x=True,
        )
    steps = [c["step"] for c in main[0].results[0]["curve"]]
    curves = []
    for r in main:
        # Runs that diverged have ended earlier.
        whole = [x["curve"] for x in r.results if len(x["curve"]) == len(steps)]
        if whole:
            each = [(n, [c[i]["accuracy"] for c in whole]) for i, n in enumerate(steps)]
            curves.append(_line(r.label, each))
    draw(
        "learning",
        f"Held-out {task.measure} during training, at the full load. {shown}",
        "learning curves",
        "optimizer steps",
        curves,
    )
    bars = "Every seed has a dot." if count > 1 else "One seed."
    if count >= ENOUGH:
        bars = f"Bars: the 95 % t interval of the {task.measure}, lowest to highest speed."
    draw(
        "cost",
        f"{measure} against training speed on this machine, other processes included. {bars}",
        "what it costs",
        "training speed (1000 tokens/s)",
        [_cost(r) for r in main],
    )
    return out


def _line(label: str, points: Sequence[tuple[int, Sequence[float]]]) -> Line:
    """Makes a line of means over seeds, with their interval, or with the seeds themselves."""
    values = [(float(x), [100 * y for y in over]) for x, over in points]
    means = [interval(v) for _, v in values]
    few = any(len(v) < ENOUGH for _, v in values)
    return Line(
        label,
        [x for x, _ in values],
        [m.mean for m in means],
        None if few else [max(0.0, m.low) for m in means],
        None if few else [min(100.0, m.high) for m in means],
        dots=[(x, y) for x, v in values for y in v if len(v) > 1] if few else (),
    )


def _cost(row: Row) -> Line:
    """Makes the point of a variant: its accuracy at the speed of its training."""
    speeds = [r["tokens_per_second"] / 1000 for r in row.results]
    accuracies = [100 * accuracy_of(r) for r in row.results]
    at, few = interval(accuracies), len(speeds) < ENOUGH
    return Line(
        row.label,
        [median(speeds)],
        [at.mean],
        None if few else [max(0.0, at.low)],
        None if few else [min(100.0, at.high)],
        x_low=[min(speeds)],
        x_high=[max(speeds)],
        dots=list(zip(speeds, accuracies, strict=True)) if few and len(speeds) > 1 else (),
    )
