"""The report of a comparison: tables, figures with their data, configs and versions."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from textwrap import wrap
from typing import Any

from rich import box
from rich.table import Table

from glazoo.compare.files import make_folder, write_bytes, write_csv, write_text
from glazoo.compare.model import ModelConfig, Shape, has_plasticity
from glazoo.compare.plan import Arm, Plan, Rates, Results
from glazoo.compare.stats import Interval, interval, paired
from glazoo.compare.train import Run, Training

__all__ = ["Row", "rows", "table", "write_report"]


Line = tuple[str, ModelConfig, str]
"""Label, sizes and task: what tells the lines of a comparison apart."""


@dataclass(slots=True)
class Row:
    """What is known of one line of a comparison."""

    arm: Arm
    rates: Rates | None
    results: list[dict[str, Any]] = field(default_factory=list)
    """Reported runs, by seed."""
    selection: list[dict[str, Any]] = field(default_factory=list)
    every: list[dict[str, Any]] = field(default_factory=list)
    """Runs of the reported seeds at all rates, where these were asked for."""
    rival: Row | None = None
    control: Row | None = None
    """The same line on the task's control."""

    @property
    def label(self) -> str:
        """Name of the line."""
        return self.arm.label

    @property
    def line(self) -> Line:
        """What tells it apart."""
        return self.arm.label, self.arm.model, self.arm.task.name

    @property
    def shape(self) -> Shape:
        """Head sizes."""
        return self.arm.shape

    def over_seeds(self, get: Callable[[dict[str, Any]], float]) -> Interval | None:
        """Return an interval of a number that every run has."""
        return interval([get(r) for r in self.results]) if self.results else None

    @property
    def accuracy(self) -> Interval | None:
        """Accuracy at the task's own load and length."""
        return self.over_seeds(_accuracy)

    @property
    def difference(self) -> Interval | None:
        """Accuracy less that of the rival, seed by seed; None where there is no rival."""
        if self.rival is None:
            return None
        mine, other = ({r["seed"]: _accuracy(r) for r in x.results} for x in (self, self.rival))
        return paired(mine, other)

    def at(self, load: int, length: int) -> Interval | None:
        """Accuracy at another load or length."""
        return self.over_seeds(lambda r: float(_point(r, load, length)["accuracy"]))

    @property
    def chosen_on_reported(self) -> float | None:
        """Mean accuracy as it is if every seed has its own best rate on the reported data, and the
        two lowest seeds are left out; None where not every rate was run, or for too few seeds."""
        best: dict[int, float] = {}
        for r in self.every:
            best[r["seed"]] = max(best.get(r["seed"], 0.0), _accuracy(r))
        kept = sorted(best.values())[2:]
        return fmean(kept) if kept else None


def _accuracy(result: dict[str, Any]) -> float:
    return float(result["accuracy"])


def _point(result: dict[str, Any], load: int, length: int) -> dict[str, Any]:
    points: list[dict[str, Any]] = result["points"]
    return next(p for p in points if (p["load"], p["length"]) == (load, length))


def rows(plan: Plan, stored: Results) -> list[Row]:
    """Collects the runs of a plan that are finished: a row per line, with that of its control."""

    def known(runs: Sequence[Run]) -> list[dict[str, Any]]:
        return [stored[r.key] for r in runs if r.key in stored]

    out: dict[Line, Row] = {}
    for arm in plan.arms:
        row = Row(arm, plan.chosen(arm, stored))
        row.selection = known(plan.selection(arm, stored))
        row.results = known(plan.reported(arm, stored))
        row.every = known(plan.at_every_rate(arm, stored))
        out[row.line] = row
    control = plan.task.control
    for (label, model, _), row in out.items():
        if (rival := row.arm.rival) is not None:
            row.rival = out[rival.label, rival.model, rival.task.name]
        if control is not None and row.arm.task == plan.task:
            row.control = out.get((label, model, control.name))
    return [row for row in out.values() if row.arm.task == plan.task]


_LEFT = ("variant", "setting", "now")


def _columns(plan: Plan, found: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Return the columns of the main table, with what they show of a row: differences first."""
    measure, control = plan.task.measure, plan.task.control
    against = "to the source trained on" if plan.tuning else "to its source"

    def percent(get: Callable[[Row], Interval | None]) -> Callable[[Row], str]:
        def show(row: Row) -> str:
            at = get(row)
            return "" if at is None else at.times(100).text(1)

        return show

    def difference(row: Row | None) -> str:
        at = None if row is None else row.difference
        return "" if at is None else at.times(100).signed(1)

    def accuracy(row: Row) -> str:
        diverged = sum(r["diverged"] for r in row.results)
        note = f" ({diverged} diverged)" if diverged else ""
        return percent(lambda r: r.accuracy)(row) + note

    out: dict[str, Callable[[Row], str]] = {"variant": lambda r: r.label}
    if any(m.name for m in plan.models):
        out["setting"] = lambda r: r.arm.model.name
    if any(r.rival for r in found):
        out[f"difference {against} (points)"] = difference
        if control is not None and plan.control:
            out[f"{control.name}: difference (points)"] = lambda r: difference(r.control)
    out[f"{measure} (%)"] = accuracy
    if control is not None and plan.control:
        out[f"{control.name}: {measure} (%)"] = lambda r: accuracy(r.control) if r.control else ""
    if plan.every_rate:
        out["best rate of every seed (%)"] = lambda r: (
            "" if r.chosen_on_reported is None else f"{100 * r.chosen_on_reported:.1f}"
        )
    return out | {
        "seeds": lambda r: str(len(r.results)),
        "state (bytes)": lambda r: f"{r.shape.state_bytes:,}",
        "heads x K x V": lambda r: f"{r.shape.heads} x {r.shape.key_size} x {r.shape.value_size}",
        "parameters": lambda r: f"{r.arm.parameters:,}",
    }


def _more_columns() -> dict[str, Callable[[Row], str]]:
    """Return what the report's table has beside the main columns."""

    def spread(row: Row) -> str:
        every = [100 * _accuracy(r) for r in row.results]
        return f"{min(every):.1f} to {max(every):.1f}" if every else ""

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

    return {
        "lowest to highest (%)": spread,
        "learning rate": lambda r: f"{r.rates.rate:g}" if r.rates else "",
        "plasticity rate": share,
        "plasticity at the end": plasticity,
        "loss": loss,
        "training (tokens/s)": speed,
    }


def table(plan: Plan, found: Sequence[Row], running: Mapping[Line, str] | None = None) -> Table:
    """Makes the table of what is known so far; `running` says what is being done."""
    t = plan.task
    size = f"load {t.load}, length {t.length}" if t.resizable else f"length {t.length}"
    out = Table(box=box.SIMPLE_HEAD, header_style="bold", title=f"{t.name}, {size}")
    columns = _columns(plan, found)
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


def _intervals_csv(found: Sequence[Row]) -> list[dict[str, Any]]:
    out = []
    for row in found:
        for point in row.results[0]["points"] if row.results else ():
            at = row.at(point["load"], point["length"])
            assert at is not None
            out.append(
                {
                    "label": row.label,
                    "task": row.arm.task.name,
                    "state_bytes": row.shape.state_bytes,
                    "load": point["load"],
                    "length": point["length"],
                    "accuracy_mean": at.mean,
                    "accuracy_low": at.low,
                    "accuracy_high": at.high,
                    "seeds": at.seeds,
                }
            )
    return out


def _figures(plan: Plan, found: Sequence[Row]) -> dict[str, tuple[str, bytes]]:
    """Draws the figures: file name, caption, picture."""
    from glazoo.compare.plots import Axes, Line, panels
    from glazoo.compare.train import evaluation_points

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


_GROUPS = {"0": "keys that stayed", "1": "keys that changed"}


def _groups(found: Sequence[Row]) -> list[list[str]]:
    """Return a table of the accuracies per group of queries, for tasks that have groups:
    differences first. Its first line is the head."""

    def of(row: Row, group: str) -> dict[int, float]:
        own = row.arm.task
        points = {r["seed"]: _point(r, own.load, own.length) for r in row.results}
        return {s: p["groups"][group] for s, p in points.items() if "groups" in p}

    lines = []
    for row in found:
        if not of(row, "0"):
            continue
        cells = [row.label]
        for group in _GROUPS:
            at = paired(of(row, group), {} if row.rival is None else of(row.rival, group))
            cells.append("" if at is None else at.times(100).signed(1))
        cells += [interval([*of(row, g).values()]).times(100).text(1) for g in _GROUPS]
        lines.append(cells)
    names = _GROUPS.values()
    head = ["variant", *(f"{n}: difference (points)" for n in names)]
    return [[*head, *(f"{n}: accuracy (%)" for n in names)], *lines] if lines else []


def write_report(
    folder: Path,
    plan: Plan,
    found: Sequence[Row],
    *,
    command: str,
    versions: dict[str, str],
    machine: str,
    lost: Sequence[str] = (),
    plots: bool = True,
) -> None:
    """Writes report.html (one file, figures inside), report.md, the figures and their data.

    Args:
        folder: the results folder.
        plan: what was compared.
        found: what is known.
        command: what makes these results again.
        versions: of what computed.
        machine: where.
        lost: runs without a result, in words.
        plots: whether to draw figures.

    Raises:
        CompareError: a file cannot be written.
    """
    done = _with_controls(found)
    figures = _figures(plan, found) if plots and done else {}
    make_folder(folder / "plots")
    for name, (_, picture) in figures.items():
        write_bytes(folder / "plots" / name, picture)
    accuracy = _intervals_csv(done)
    if accuracy:
        write_csv(folder / "plots" / "accuracy.csv", accuracy)
        write_csv(
            folder / "plots" / "learning.csv",
            [_of(r, x) | point for r in done for x in r.results for point in x["curve"]],
        )
        write_csv(
            folder / "plots" / "cost.csv",
            [
                _of(r, x) | {n: x[n] for n in ("tokens_per_second", "cpu_seconds", "accuracy")}
                for r in done
                for x in r.results
            ],
        )
    blocks = _blocks(plan, found, command, versions, machine, lost)
    write_text(folder / "report.md", _markdown(blocks, figures))
    write_text(folder / "report.html", _html(blocks, figures))


def _with_controls(found: Sequence[Row]) -> list[Row]:
    """Return the rows that have results, and those of their controls."""
    every = [x for r in found for x in (r, r.control) if x is not None]
    return [r for r in every if r.results]


def _of(row: Row, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": row.label,
        "task": row.arm.task.name,
        "state_bytes": row.shape.state_bytes,
        "seed": result["seed"],
    }


Block = tuple[str, Any]
"""("heading", text), ("text", text), ("table", [rows]), ("code", text) or ("figures", None)."""


def _blocks(
    plan: Plan,
    found: Sequence[Row],
    command: str,
    versions: dict[str, str],
    machine: str,
    lost: Sequence[str],
) -> list[Block]:
    done = _with_controls(found)
    task = plan.task
    hashes = sorted({x["data_hash"] for r in done for x in r.results})
    counted = {x["key"]: x for r in done for x in [*r.results, *r.selection, *r.every]}
    seconds = sum(x["cpu_seconds"] for x in counted.values())
    blocks: list[Block] = [("heading", f"{task.name}: {len(plan.specs)} variants side by side")]
    blocks.append(("text", _explained(plan, found)))
    columns = _columns(plan, found) | _more_columns()
    lines = [[show(r) for show in columns.values()] for r in found]
    blocks.append(("table", [list(columns), *lines]))
    if groups := _groups(found):
        blocks.append(("heading", "Stability and plasticity"))
        blocks.append(("table", groups))
    if lost:
        blocks.append(("heading", "Runs without a result"))
        blocks += [("text", x) for x in lost]
    blocks.append(("figures", None))
    if choices := _choices(plan, found):
        head = ["variant", "task", "learning rate", "plasticity rate", f"{task.measure} (%)"]
        blocks.append(("heading", "Choice of rates"))
        blocks.append(("table", [[*head, "on the reported seeds (%)"], *choices]))
    blocks.append(("heading", "How it was made"))
    blocks.append(("code", command))
    facts = [
        ["machine", machine],
        *([n, v] for n, v in versions.items()),
        ["training", _steps(plan.training)],
        *([["further training", _steps(plan.tuning.training)]] if plan.tuning else []),
        ["processor time of the runs", f"{seconds / 60:.1f} minutes"],
        ["SHA-256 of the evaluation data", ", ".join(hashes)],
    ]
    blocks.append(("table", [["what", "value"], *facts]))
    blocks.append(("code", json.dumps(plan.config(), indent=1)))
    blocks.append(("heading", "Specs"))
    for label, spec in plan.specs.items():
        shown = json.dumps({label: spec.model_dump(mode="json", exclude_defaults=True)})
        blocks.append(("code", shown))
    blocks.append(("text", "Every run, with its learning curve, is a line of runs.jsonl."))
    return blocks


def _steps(training: Training) -> str:
    return f"{training.steps} steps of {training.batch} examples"


def _explained(plan: Plan, found: Sequence[Row]) -> str:
    """Says what the main table shows and how its numbers came about."""
    task, text = plan.task, []
    if any(r.rival for r in found):
        text.append(
            "Differences are taken seed by seed, with the 95 % t interval of their mean: there is "
            "one where the interval excludes zero."
        )
    if plan.tuning is not None:
        t = plan.tuning.training
        text.append(
            "Sources are trained; then each is trained on as it is and in each of its metaplastic "
            f"forms, from the same weights, for the same {t.steps} steps of the same other data."
        )
    if task.control is not None and plan.control:
        text.append(
            f"{task.control.name} is the control: the same task, but what the keys of a context "
            "have in common never changes, so that training can learn it."
        )
    text.append(
        f"{task.measure.capitalize()} is the mean over seeds with its 95 % t interval. All have "
        "the same model around the recurrence"
        + (", as many parameters" if plan.equal_parameters and plan.models[0].mlp else "")
        + ", and the same data in the same order."
    )
    if any(len(plan.choices(r.arm)) > 1 for r in found):
        seeds = "a seed" if plan.selection_seeds == 1 else f"{plan.selection_seeds} seeds"
        text.append(f"Rates are each one's best of those below, chosen on {seeds} not reported.")
    if plan.every_rate:
        text.append(
            "'Best rate of every seed' is what choosing on the reported numbers themselves, and "
            "leaving out the two lowest seeds, makes of the same runs."
        )
    return " ".join(text)


def _choices(plan: Plan, found: Sequence[Row]) -> list[list[str]]:
    """Return a line for all rates of every row that has a choice of them."""
    out = []
    for row in (x for r in found for x in (r, r.control) if x is not None):
        for rates in plan.choices(row.arm) if len(plan.choices(row.arm)) > 1 else ():

            def over(runs: Sequence[dict[str, Any]], rates: Rates = rates) -> str:
                mine = [r for r in runs if (r["rate"], r["plasticity_rate"]) == rates]
                diverged = " diverged" if any(r["diverged"] for r in mine) else ""
                return f"{100 * fmean(map(_accuracy, mine)):.1f}{diverged}" if mine else ""

            chosen = " (chosen)" if rates == row.rates else ""
            cells = [row.label, row.arm.task.name, f"{rates.rate:g}", f"{rates.plasticity:g}"]
            out.append([*cells, over(row.selection) + chosen, over(row.every or row.results)])
    return out


def _markdown(blocks: Sequence[Block], figures: dict[str, tuple[str, bytes]]) -> str:
    out: list[str] = []
    level = "#"
    for kind, body in blocks:
        if kind == "heading":
            out.append(f"{level} {body}")
            level = "##"
        elif kind == "text":
            out.append(body)
        elif kind == "code":
            out.append(f"```\n{body}\n```")
        elif kind == "figures":
            out += [f"![{caption}](plots/{n})\n\n{caption}" for n, (caption, _) in figures.items()]
        else:
            head, *rest = body
            lines = [head, ["---"] * len(head), *rest]
            out.append("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))
    return "\n\n".join(out) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #1a1a1a; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: 13px; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } .wide { overflow-x: auto; }
figcaption { color: #444; }
"""


def _html(blocks: Sequence[Block], figures: dict[str, tuple[str, bytes]]) -> str:
    e = html.escape
    title = next(b for k, b in blocks if k == "heading")
    out = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{e(title)}</title><style>{_STYLE}</style></head><body>",
    ]
    level = 1
    for kind, body in blocks:
        if kind == "heading":
            out.append(f"<h{level}>{e(body)}</h{level}>")
            level = 2
        elif kind == "text":
            out.append(f"<p>{e(body)}</p>")
        elif kind == "code":
            out.append(f"<pre>{e(body)}</pre>")
        elif kind == "figures":
            for caption, picture in figures.values():
                data = base64.b64encode(picture).decode()
                out.append(
                    f'<figure><img alt="{e(caption)}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{e(caption)}</figcaption></figure>"
                )
        else:
            head, *rest = body
            cells = "".join(f"<th>{e(c)}</th>" for c in head)
            out.append(f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>')
            for line in rest:
                out.append("<tr>" + "".join(f"<td>{e(c)}</td>" for c in line) + "</tr>")
            out.append("</tbody></table></div>")
    out.append("</body></html>")
    return "\n".join(out) + "\n"
