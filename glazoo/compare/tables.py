"""Rows and tables of the measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from glazoo.compare.capacity import CapacityCurve
from glazoo.compare.stats import Interval, compare

__all__ = ["against_source", "capacity_rows", "capacity_table"]

_PREFIX = "metaplastic_"


def source_of(label: str) -> str | None:
    """Return the label of a metaplastic form's source, or None."""
    if not label.startswith(_PREFIX):
        return None
    return label.removeprefix(_PREFIX).split(" ")[0]


def against_source(label: str, values: dict[str, Interval], *, good: str = "higher") -> str:
    """Says how a metaplastic form compares with its source: only what the intervals separate."""
    source = source_of(label)
    if source is None or source not in values or label not in values:
        return ""
    verdict = compare(values[label], values[source])
    if verdict == "not separated":
        return verdict
    return "better" if verdict == good else "worse"


def capacity_rows(curves: Sequence[CapacityCurve]) -> list[dict[str, Any]]:
    """Return one row per variant, kind of keys and number of pairs."""
    return [
        {
            "label": c.label,
            "keys": c.keys,
            "state_bytes": c.state_bytes,
            "key_size": c.key_size,
            "value_size": c.value_size,
            "pairs": n,
            "pairs_per_kib": 1024 * n / c.state_bytes,
            "error_mean": i.mean,
            "error_low": i.low,
            "error_high": i.high,
            "seeds": i.seeds,
            "gates": " ".join(f"{k}={v:.4g}" for k, v in g.items()),
        }
        for c in curves
        for n, i, g in zip(c.pairs, c.intervals, c.gates, strict=True)
    ]


def capacity_table(curves: Sequence[CapacityCurve], kind: str) -> Table:
    """Makes the table of one kind of keys, best first."""
    threshold = curves[0].threshold
    table = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        title=f"{kind} keys: pairs at a retrieval error of {threshold:g}",
        title_justify="left",
    )
    table.add_column("variant", no_wrap=True)
    for column in ("K x V", "state\n(bytes)", "capacity\n(pairs)", "capacity\n(pairs per KiB)"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("gates near capacity")
    table.add_column("against source", no_wrap=True)
    values = {c.label: c.capacity_per_kilobyte for c in curves}
    for c in sorted(curves, key=lambda c: -c.capacity_per_kilobyte.mean):
        near = min(range(len(c.pairs)), key=lambda i: abs(c.pairs[i] - c.capacity.mean))
        gates = ", ".join(f"{k} {v:.3g}" for k, v in c.gates[near].items())
        mark = "" if c.bounded else " (outside of the pairs measured)"
        table.add_row(
            c.label,
            f"{c.key_size} x {c.value_size}",
            f"{c.state_bytes:,}",
            c.capacity.text(1) + mark,
            c.capacity_per_kilobyte.text(1),
            gates,
            against_source(c.label, values),
        )
    return table
