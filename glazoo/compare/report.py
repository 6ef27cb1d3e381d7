"""The report of a comparison: tables, figures with their data, configs and versions."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from glazoo.compare.files import make_folder, write_bytes, write_csv, write_text
from glazoo.compare.model import Shape
from glazoo.compare.plan import Plan
from glazoo.compare.stats import Interval, interval
from glazoo.compare.tables import against_source

__all__ = ["Row", "rows", "table", "write_report"]


@dataclass(slots=True)
class Row:
    """One variant at one state budget."""

    label: str
    budget: int
    shape: Shape
    parameters: int
    rate: float | None
    results: list[dict[str, Any]] = field(default_factory=list)
    """Reported runs, by seed."""
    sweep: list[dict[str, Any]] = field(default_factory=list)

    def over_seeds(self, get: Callable[[dict[str, Any]], float]) -> Interval | None:
        """Gives an interval of a number that every run has."""
        return interval([get(r) for r in self.results]) if self.results else None

    @property
    def accuracy(self) -> Interval | None:
        """Accuracy at the task's own load and length."""
        return self.over_seeds(lambda r: float(r["accuracy"]))

    def at(self, load: int, length: int) -> Interval | None:
        """Accuracy at another load or length."""
        return self.over_seeds(lambda r: _point(r, load, length))


def _point(result: dict[str, Any], load: int, length: int) -> float:
    return float(
        next(p["accuracy"] for p in result["points"] if (p["load"], p["length"]) == (load, length))
    )


def rows(plan: Plan, stored: dict[str, dict[str, Any]]) -> list[Row]:
    """Collects the runs of a plan that are finished."""
    from glazoo.compare.plan import best_rate

    out = []
    for sizes, sweep in zip(plan.sizes, plan.sweeps, strict=True):
        label, model, shape, _, count = sizes
        row = Row(label, model.state_bytes, shape, count, best_rate(sweep, stored))
        row.sweep = [stored[r.key] for r in sweep if r.key in stored]
        row.results = [stored[r.key] for r in plan.finals(sweep, stored) if r.key in stored]
        out.append(row)
    return out


_COLUMNS = (
    "variant",
    "state (bytes)",
    "heads x K x V",
    "parameters",
    "learning rate",
    "seeds",
    "accuracy (%)",
    "lowest to highest (%)",
    "loss (nats)",
    "against source",
    "training (tokens/s)",
)


def _cells(row: Row, peers: Sequence[Row]) -> list[str]:
    """Gives one line of the main table."""
    accuracy, loss = row.accuracy, row.over_seeds(lambda r: float(r["loss"]))
    shape = f"{row.shape.heads} x {row.shape.key_size} x {row.shape.value_size}"
    cells = [row.label, f"{row.shape.state_bytes:,}", shape, f"{row.parameters:,}"]
    cells.append("" if row.rate is None else f"{row.rate:g}")
    cells.append(str(len(row.results)))
    if accuracy is None or loss is None:
        return [*cells, *[""] * (len(_COLUMNS) - len(cells))]
    percent = accuracy.times(100)
    every = [100 * r["accuracy"] for r in row.results]
    diverged = sum(r["diverged"] for r in row.results)
    note = f" ({diverged} diverged)" if diverged else ""
    values = {
        r.label: r.accuracy for r in peers if r.budget == row.budget and r.accuracy is not None
    }
    return [
        *cells,
        percent.text(1) + note,
        f"{min(every):.1f} to {max(every):.1f}",
        loss.text(3),
        against_source(row.label, values),
        f"{median(r['tokens_per_second'] for r in row.results):,.0f}",
    ]


def table(plan: Plan, found: Sequence[Row], running: dict[str, str] | None = None) -> Table:
    """Makes the table of what is known so far."""
    t = plan.task
    size = f"length {t.length}" if t.name == "text" else f"load {t.load}, length {t.length}"
    out = Table(box=box.SIMPLE_HEAD, header_style="bold", title=f"{t.name}, {size}")
    chosen = [0, 1, 2, 3, 4, 5, 6, 7, 9]
    for i in chosen:
        out.add_column(
            _COLUMNS[i].replace(" (", "\n(").replace(" to ", "\nto "),
            justify="left" if i in (0, 9) else "right",
            no_wrap=True,
        )
    if running is not None:
        out.add_column("now", no_wrap=True)
    for row in found:
        cells = _cells(row, found)
        extra = [] if running is None else [running.get(f"{row.label}/{row.budget}", "")]
        out.add_row(*(cells[i] for i in chosen), *extra)
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
                    "state_budget": row.budget,
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

    main = [r for r in found if r.results and r.budget == plan.models[0].state_bytes]
    task, percent = plan.task, "accuracy (%)"
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
    budgets = sorted({r.budget for r in found if r.results})
    if len(budgets) > 1:
        labels = dict.fromkeys(r.label for r in found if r.results)
        lines = []
        for label in labels:
            own = sorted(
                (r for r in found if r.label == label and r.results), key=lambda r: r.budget
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


def _groups(found: Sequence[Row]) -> list[list[str]]:
    """Gives accuracies per group of queries, for tasks that have groups."""
    out = []
    for row in found:
        known = [r for r in row.results if any("groups" in p for p in r["points"])]
        if not known:
            continue
        cells = [row.label]
        for group in ("0", "1"):
            at = interval([_own(r)["groups"][group] for r in known])
            cells.append(at.times(100).text(1))
        out.append(cells)
    return out


def _own(result: dict[str, Any]) -> dict[str, Any]:
    """Gives a run's evaluation point at the task's own load and length."""
    return next(
        p for p in result["points"] if p["accuracy"] == result["accuracy"] and "groups" in p
    )


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
    done = [r for r in found if r.results]
    figures = _figures(plan, found) if plots and done else {}
    make_folder(folder / "plots")
    for name, (_, picture) in figures.items():
        write_bytes(folder / "plots" / name, picture)
    accuracy = _intervals_csv(found)
    if accuracy:
        write_csv(folder / "plots" / "accuracy.csv", accuracy)
        write_csv(
            folder / "plots" / "learning.csv",
            [
                {"label": r.label, "state_budget": r.budget, "seed": x["seed"]} | point
                for r in done
                for x in r.results
                for point in x["curve"]
            ],
        )
        write_csv(
            folder / "plots" / "cost.csv",
            [
                {
                    "label": r.label,
                    "state_budget": r.budget,
                    "seed": x["seed"],
                    "tokens_per_second": x["tokens_per_second"],
                    "cpu_seconds": x["cpu_seconds"],
                    "accuracy": x["accuracy"],
                }
                for r in done
                for x in r.results
            ],
        )
    blocks = _blocks(plan, found, command, versions, machine, lost)
    write_text(folder / "report.md", _markdown(blocks, figures))
    write_text(folder / "report.html", _html(blocks, figures))


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
    done = [r for r in found if r.results]
    task, t = plan.task, plan.training
    hashes = sorted({x["data_hash"] for r in done for x in r.results})
    seconds = sum(x["cpu_seconds"] for r in done for x in [*r.results, *r.sweep])
    blocks: list[Block] = [("heading", f"{task.name}: {len(plan.specs)} variants side by side")]
    blocks.append(
        (
            "text",
            "Accuracy is the mean over seeds with its 95 % t interval. All variants have the "
            "same model around the recurrence, the same budget of recurrent state"
            + (", as many parameters" if plan.equal_parameters else "")
            + ", the same data in the same order, and each the best of the learning rates below, "
            "chosen on a seed that is not reported. A variant is called better or worse than "
            "another only where the intervals do not touch.",
        )
    )
    blocks.append(("table", [list(_COLUMNS), *(_cells(r, found) for r in found)]))
    if groups := _groups(done):
        blocks.append(("heading", "Stability and plasticity"))
        blocks.append(
            (
                "table",
                [
                    [
                        "variant",
                        "keys that stayed: accuracy (%)",
                        "keys that changed: accuracy (%)",
                    ],
                    *groups,
                ],
            )
        )
    if lost:
        blocks.append(("heading", "Runs without a result"))
        blocks += [("text", x) for x in lost]
    blocks.append(("figures", None))
    blocks.append(("heading", "Learning rates"))
    rates = [[r.label, f"{r.budget:,}", *(_rate_cell(r, x) for x in plan.rates)] for r in found]
    blocks.append(
        (
            "table",
            [
                ["variant", "state budget (bytes)", *(f"{r:g}: accuracy (%)" for r in plan.rates)],
                *rates,
            ],
        )
    )
    blocks.append(("heading", "How it was made"))
    blocks.append(("code", command))
    facts = [
        ["machine", machine],
        *([n, v] for n, v in versions.items()),
        ["training", f"{t.steps} steps of {t.batch} examples"],
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


def _rate_cell(row: Row, rate: float) -> str:
    found = next((x for x in row.sweep if x["rate"] == rate), None)
    if found is None:
        return ""
    chosen = " (chosen)" if rate == row.rate else ""
    return f"{100 * found['accuracy']:.1f}{' diverged' if found['diverged'] else ''}{chosen}"


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
