"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from glazoo.compare.plan import Plan
from glazoo.compare.rows import Row
from glazoo.compare.train import evaluation_points
from glazoo.plotting import Axes, Line, panels
from glazoo.stats import Interval, interval

__all__ = ["draw_figures"]


def draw_figures(plan: Plan, found: Sequence[Row]) -> dict[str, tuple[str, bytes]]:
    """Draws the figures: file name, caption, picture."""
    sizes = list(dict.fromkeys(r.arm.model.state_bytes for r in found))
    main = [r for r in found if r.results and r.arm.model.state_bytes == sizes[0]]
    task, percent = plan.task, f"{plan.task.measure} (%)"
    points = evaluation_points(task)
    count = min((len(r.results) for r in found if r.results), default=0)
    band = "Bands are 95 % t intervals over seeds." if count > 1 else "One seed: no intervals."

    def line(row_label: str, x: list[float], found_at: list[Interval | None]) -> Line:
        known = [(a, b) for a, b in zip(x, found_at, strict=True) if b is not None]
        return Line(
            row_label,
            [a for a, _ in known],
            [100 * b.mean for _, b in known],
            [max(0.0, 100 * b.low) for _, b in known],
            [min(100.0, 100 * b.high) for _, b in known],
        )

    out: dict[str, tuple[str, bytes]] = {}
    axes = []
    loads = sorted({load for load, length in points if length == task.length})
    lengths = sorted({length for load, length in points if load == task.load})
    common: dict[str, Any] = {"y_range": (0, 100)}
    if len(loads) > 1:
        axes.append(
            Axes(
                f"against load, {task.length} tokens",
                "pairs or tokens to hold",
                percent,
                [
                    line(r.label, list(map(float, loads)), [r.at(n, task.length) for n in loads])
                    for r in main
                ],
                ticks=loads,
                **common,
            )
        )
    if len(lengths) > 1:
        axes.append(
            Axes(
                f"against length, load {task.load}",
                "length of the example (tokens)",
                percent,
                [
                    line(r.label, list(map(float, lengths)), [r.at(task.load, n) for n in lengths])
                    for r in main
                ],
                log_x=True,
                ticks=lengths,
                **common,
            )
        )
    if axes and main:
        out["accuracy.png"] = (f"Accuracy against load and length. {band}", panels(axes))
    if len(sizes) > 1:
        labels = dict.fromkeys(r.label for r in found if r.results)
        lines = []
        for label in labels:
            own = sorted(
                (r for r in found if r.label == label and r.results),
                key=lambda r: r.shape.state_bytes,
            )
            lines.append(
                line(label, [float(r.shape.state_bytes) for r in own], [r.accuracy for r in own])
            )
        axis = Axes(
            "against state size",
            "recurrent state of a layer (bytes)",
            percent,
            lines,
            log_x=True,
            **common,
        )
        out["state.png"] = (f"Accuracy against state size. {band}", panels([axis]))
    if main:
        steps = [c["step"] for c in main[0].results[0]["curve"]]
        curves = []
        for r in main:
            whole = [x for x in r.results if len(x["curve"]) == len(steps)]
            if whole:
                at = [
                    interval([x["curve"][i]["accuracy"] for x in whole]) for i in range(len(steps))
                ]
                curves.append(line(r.label, [float(s) for s in steps], list(at)))
        out["learning.png"] = (
            f"Held-out accuracy during training, at the full load. {band}",
            panels([Axes("learning curves", "optimizer steps", percent, curves, **common)]),
        )
        cost = [
            Line(
                r.label,
                [median(x["tokens_per_second"] for x in r.results) / 1000],
                [100 * r.accuracy.mean],
            )
            for r in main
            if r.accuracy is not None
        ]
        out["cost.png"] = (
            "Accuracy against training speed on this machine, other processes included.",
            panels(
                [Axes("what it costs", "training speed (1000 tokens/s)", percent, cost, **common)]
            ),
        )
    return out
