"""Tables of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from textwrap import wrap
from typing import Any

from rich import box
from rich.table import Table

from glazoo.compare.model import has_plasticity
from glazoo.compare.plan import Line, Plan, Rates
from glazoo.compare.rows import Row, accuracy_of, point
from glazoo.stats import interval, paired

__all__ = [
    "accuracy_columns",
    "choice_lines",
    "difference_columns",
    "group_lines",
    "lines",
    "size_columns",
    "table",
    "training_columns",
]

_LEFT = ("variant", "setting", "now")


Columns = dict[str, Callable[[Row], str]]
"""Names of columns, with what they show of a row."""


def _names(plan: Plan) -> Columns:
    out: Columns = {"variant": lambda r: r.label}
    if any(m.name for m in plan.models):
        out["setting"] = lambda r: r.arm.model.name
    return out


def _states(plan: Plan) -> Columns:
    """Return what tells rows of one variant apart, where there are several."""
    return _STATE if len(plan.models) > 1 else {}


_STATE: Columns = {"state (bytes)": lambda r: f"{r.shape.state_bytes:,}"}


def difference_columns(plan: Plan) -> Columns:
    """Return what rows that have a rival show of it."""
    control = plan.task.control
    against = "to the source trained on" if plan.tuning else "to its source"

    def difference(row: Row | None) -> str:
        at = None if row is None else row.difference
        return "" if at is None else at.times(100).signed(1)

    out = _names(plan) | {f"difference {against} (points)": difference}
    if control is not None and plan.control:
        out[f"{control.name}: difference (points)"] = lambda r: difference(r.control)
    return out | _states(plan)


def accuracy_columns(plan: Plan) -> Columns:
    """Return what every row shows of its accuracy, which comes first."""
    measure, control = plan.task.measure, plan.task.control

    def accuracy(row: Row | None) -> str:
        at = None if row is None else row.accuracy
        if row is None or at is None:
            return ""
        diverged = sum(r["diverged"] for r in row.results)
        return at.times(100).text(1) + (f" ({diverged} diverged)" if diverged else "")

    def spread(row: Row) -> str:
        every = [100 * accuracy_of(r) for r in row.results]
        return f"{min(every):.1f} to {max(every):.1f}" if every else ""

    out = _names(plan) | {f"{measure} (%)": accuracy}
    if control is not None and plan.control:
        out[f"{control.name}: {measure} (%)"] = lambda r: accuracy(r.control)
    if plan.every_rate:
        out["best rate of every seed (%)"] = lambda r: (
            "" if r.chosen_on_reported is None else f"{100 * r.chosen_on_reported:.1f}"
        )
    out |= {"lowest to highest (%)": spread, "seeds": lambda r: str(len(r.results))}
    return out | _states(plan)


def size_columns(plan: Plan) -> Columns:
    """Return what every row shows of its model."""
    return _names(plan) | {
        **_STATE,
        "heads x K x V": lambda r: f"{r.shape.heads} x {r.shape.key_size} x {r.shape.value_size}",
        "parameters": lambda r: f"{r.arm.parameters:,}",
    }


def training_columns(plan: Plan) -> Columns:
    """Return what every row shows of its training."""

    def share(row: Row) -> str:
        return f"{row.rates.plasticity:g}" if row.rates and has_plasticity(row.arm.spec) else ""

    def loss(row: Row) -> str:
        at = row.over_seeds(lambda r: float(r["loss"]))
        return "" if at is None else at.text(3)

    def speed(row: Row) -> str:
        speeds = [r["tokens_per_second"] for r in row.results]
        return f"{median(speeds):,.0f}" if speeds else ""

    def plasticity(row: Row) -> str:
        ends = [x for r in row.results for x in r["plasticity"]]
        return f"{min(ends):.2g} to {max(ends):.2g}" if ends else ""

    return _names(plan) | {
        "learning rate": lambda r: f"{r.rates.rate:g}" if r.rates else "",
        "plasticity rate": share,
        "plasticity at the end": plasticity,
        "loss": loss,
        "training (tokens/s)": speed,
    }


def lines(columns: Columns, found: Sequence[Row]) -> list[list[str]]:
    """Return a table as text; its first line is the head."""
    return [list(columns), *([show(row) for show in columns.values()] for row in found)]


def table(plan: Plan, found: Sequence[Row], running: Mapping[Line, str] | None = None) -> Table:
    """Makes the table of what is known so far; `running` says what is being done."""
    t = plan.task
    size = f"load {t.load}, length {t.length}" if t.resizable else f"length {t.length}"
    out = Table(box=box.SIMPLE_HEAD, header_style="bold", title=f"{t.name}, {size}")
    columns = difference_columns(plan) if any(r.rival for r in found) else {}
    columns |= accuracy_columns(plan)
    for name in ("lowest to highest (%)", "state (bytes)"):
        columns.pop(name, None)
    columns |= size_columns(plan)
    if running is not None:
        columns["now"] = lambda r: ", ".join(
            running[x.line] for x in (r, r.control) if x is not None and x.line in running
        )
    for name in columns:
        out.add_column(
            "\n".join(wrap(name, 16)),
            justify="left" if name in _LEFT else "right",
            no_wrap=True,
        )
    for row in found:
        out.add_row(*(show(row) for show in columns.values()))
    return out


_GROUPS = {"0": "keys that stayed", "1": "keys that changed"}


def group_lines(found: Sequence[Row]) -> list[list[str]]:
    """Return a table of the accuracies per group of queries, for tasks that have groups:
    differences first. Its first line is the head."""

    def of(row: Row, group: str) -> dict[int, float]:
        own = row.arm.task
        points = {r["seed"]: point(r, own.load, own.length) for r in row.results}
        return {s: p["groups"][group] for s, p in points.items() if "groups" in p}

    out = []
    for row in found:
        if not of(row, "0"):
            continue
        cells = [row.label]
        for group in _GROUPS:
            at = paired(of(row, group), {} if row.rival is None else of(row.rival, group))
            cells.append("" if at is None else at.times(100).signed(1))
        cells += [interval([*of(row, g).values()]).times(100).text(1) for g in _GROUPS]
        out.append(cells)
    names = _GROUPS.values()
    head = ["variant", *(f"{n}: difference (points)" for n in names)]
    return [[*head, *(f"{n}: accuracy (%)" for n in names)], *out] if out else []


def choice_lines(plan: Plan, found: Sequence[Row]) -> list[list[str]]:
    """Return a line for all rates of every row that has a choice of them."""
    out = []
    for row in (x for r in found for x in (r, r.control) if x is not None):
        for rates in plan.choices(row.arm) if len(plan.choices(row.arm)) > 1 else ():

            def over(runs: Sequence[dict[str, Any]], rates: Rates = rates) -> str:
                mine = [r for r in runs if (r["rate"], r["plasticity_rate"]) == rates]
                diverged = " diverged" if any(r["diverged"] for r in mine) else ""
                return f"{100 * fmean(map(accuracy_of, mine)):.1f}{diverged}" if mine else ""

            chosen = " (chosen)" if rates == row.rates else ""
            cells = [row.label, row.arm.task.name, f"{rates.rate:g}", f"{rates.plasticity:g}"]
            out.append([*cells, over(row.selection) + chosen, over(row.every or row.results)])
    return out
