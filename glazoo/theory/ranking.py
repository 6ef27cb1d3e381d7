"""The ranking of variants by their distance to exact inference, as a table and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from glazoo.errors import extra
from glazoo.plotting import Axes, Line, panels, require
from glazoo.strictjson import dumps
from glazoo.theory.posterior import Distance

with extra("verify"):
    from rich import box
    from rich.table import Table

__all__ = ["groups", "plot", "render"]


def groups(distances: Sequence[Distance]) -> dict[str, list[Distance]]:
    """Groups specs that give the same answers everywhere: one class of the theory each.

    Args:
        distances: what `run` gives.

    Returns:
        The distances of each class, the closest class first, under the names of its specs.
    """
    classes: dict[tuple[float, ...], list[str]] = {}
    by_spec = {
        label: [d for d in distances if d.spec == label]
        for label in dict.fromkeys(d.spec for d in distances)
    }
    for label, mine in by_spec.items():
        classes.setdefault(tuple(round(d.mean, 9) for d in mine), []).append(label)
    return {_name(labels): by_spec[labels[0]] for labels in classes.values()}


def _name(labels: Sequence[str]) -> str:
    """Names a class by its specs; both gate shapes of one metaplastic form count as one."""
    short: dict[str, None] = {}
    for label in labels:
        stem = label.split("[")[0]
        both = f"{stem}[head]" in labels and f"{stem}[value]" in labels
        short[stem if both else label] = None
    return " = ".join(short)


def render(distances: Sequence[Distance]) -> Table:
    """Return the ranking as a table: distance per kind of keys and load, mean over all.

    Args:
        distances: what `run` gives.
    """
    conditions = list(dict.fromkeys(d.condition for d in distances))
    panels = list(dict.fromkeys((c.keys, c.decay) for c in conditions))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = (
        "relative distance |y - y_exact| / |y_exact| to the exact posterior, mean over seeds and "
        "loads, half width of the 95 % interval"
    )
    table.add_column("rank", justify="right")
    table.add_column("specs with these answers", overflow="fold", ratio=1)
    for keys, decay in panels:
        forget = "a = 1" if decay == 1 else f"a = {decay:g}"
        table.add_column(f"{keys}\n{forget}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    for rank, (label, mine) in enumerate(groups(distances).items(), 1):
        cells = []
        for panel in panels:
            here = [d for d in mine if (d.condition.keys, d.condition.decay) == panel]
            mean = sum(d.mean for d in here) / len(here)
            half = sum(d.high - d.low for d in here) / len(here) / 2
            cells.append(f"{mean:.3f} +- {half:.3f}" if mean > _EXACT else "0")
        total = sum(d.mean for d in mine) / len(mine)
        table.add_row(str(rank), label, *cells, f"{total:.3f}" if total > _EXACT else "0")
    return table


_EXACT = 1e-9
"""Below this, answers are those of the exact posterior up to rounding."""


def _homes(classes: dict[str, list[Distance]]) -> dict[str, str]:
    """Return the class of each class's source; its own, where that has none."""
    members = {d: label for label in classes for d in _labels(label)}
    return {label: members.get(mine[0].source, label) for label, mine in classes.items()}


def _labels(name: str) -> list[str]:
    return [part.split("[")[0] for part in name.split(" = ")]


def plot(distances: Sequence[Distance], path: str | Path) -> tuple[Path, Path]:
    """Plots distance against load, one panel per kind of keys and decay, and writes the data.

    A class and its metaplastic form share a colour: the form is hollow and dashed.

    Args:
        distances: what `run` gives.
        path: image file; the format follows from its suffix. The data go beside it, as JSON.

    Returns:
        The image's path and the data's.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is none of matplotlib's.
    """
    require()
    image = Path(path)
    data = image.with_suffix(".json")
    conditions = list(dict.fromkeys(d.condition for d in distances))
    classes = groups(distances)
    names = {
        label: _wrapped(label if max(d.mean for d in mine) > _EXACT else f"{label} (exact: 0)")
        for label, mine in classes.items()
    }
    homes = _homes(classes)
    axes = []
    decays = list(dict.fromkeys(c.decay for c in conditions))
    kinds = list(dict.fromkeys(c.keys for c in conditions))
    for decay, keys in itertools.product(decays, kinds):
        lines = []
        for label, mine in classes.items():
            # Rounding is not a distance, and a logarithmic axis has no zero.
            here = sorted(
                (
                    d
                    for d in mine
                    if (d.condition.decay, d.condition.keys) == (decay, keys) and d.mean > _EXACT
                ),
                key=lambda d: d.condition.load,
            )
            lines.append(
                Line(
                    names[label],
                    [d.condition.load for d in here],
                    [d.mean for d in here],
                    [d.low for d in here],
                    [d.high for d in here],
                    source=names[homes[label]],
                )
            )
        forget = "no forgetting" if decay == 1 else f"forgetting gate a = {decay:g}"
        axes.append(
            Axes(
                f"{keys} keys, {forget}",
                "load (stored pairs per key channel)",
                "distance to exact posterior, |y - y*| / |y*|",
                lines,
                log_x=True,
                log_y=True,
                y_range=(0.03, 10),
                ticks=sorted({c.load for c in conditions}),
            )
        )
    title = "bands: 95 % intervals of the mean over seeds; exact answers are not drawn"
    image.write_bytes(panels(axes, title=title, columns=len(kinds), kind=image.suffix[1:]))
    data.write_text(dumps([d.to_json() for d in distances], indent=1) + "\n", "utf-8")
    return image, data


def _wrapped(label: str) -> str:
    """Breaks the name of a class into lines."""
    out, line = [], ""
    for part in label.split(" = "):
        candidate = f"{line} = {part}" if line else part
        if line and len(candidate) > 72:
            out.append(line + " =")
            line = part
        else:
            line = candidate
    return "\n".join([*out, line])
