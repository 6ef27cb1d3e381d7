"""The report of a comparison: tables, figures with their data, configs and versions."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from glazoo.compare.figures import draw_figures
from glazoo.compare.files import make_folder, write_bytes, write_csv, write_text
from glazoo.compare.plan import Plan
from glazoo.compare.rows import Row, with_controls
from glazoo.compare.tables import (
    accuracy_columns,
    choice_lines,
    difference_columns,
    group_lines,
    lines,
    size_columns,
    training_columns,
)
from glazoo.compare.train import Training
from glazoo.errors import extra
from glazoo.terminal import markdown_table

with extra("compare"):
    from jinja2 import Environment

__all__ = ["write_report"]


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
    done = with_controls(found)
    figures = draw_figures(plan, found) if plots and done else {}
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


def _of(row: Row, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": row.label,
        "task": row.arm.task.name,
        "state_bytes": row.shape.state_bytes,
        "seed": result["seed"],
    }


Block = tuple[str, Any]
"""("heading", text), ("text", text), ("code", text), ("figures", None), ("table", [rows]), or, if
the order of the rows is theirs, ("facts", [rows])."""


def _blocks(
    plan: Plan,
    found: Sequence[Row],
    command: str,
    versions: dict[str, str],
    machine: str,
    lost: Sequence[str],
) -> list[Block]:
    done = with_controls(found)
    task = plan.task
    hashes = sorted({x["data_hash"] for r in done for x in r.results})
    counted = {x["key"]: x for r in done for x in [*r.results, *r.selection, *r.every]}
    seconds = sum(x["cpu_seconds"] for x in counted.values())
    blocks: list[Block] = [("heading", f"{task.name}: {len(plan.specs)} variants side by side")]
    blocks.append(("text", _explained(plan, found)))
    if rivals := [r for r in found if r.rival]:
        blocks.append(("table", lines(difference_columns(plan), rivals)))
        blocks.append(("heading", task.measure.capitalize()))
    blocks.append(("table", lines(accuracy_columns(plan), found)))
    if groups := group_lines(found):
        blocks.append(("heading", "Stability and plasticity"))
        blocks.append(("table", groups))
    if lost:
        blocks.append(("heading", "Runs without a result"))
        blocks += [("text", x) for x in lost]
    blocks.append(("figures", None))
    blocks.append(("heading", "Models"))
    blocks.append(("table", lines(size_columns(plan), found)))
    blocks.append(("heading", "Training"))
    blocks.append(("table", lines(training_columns(plan), found)))
    if choices := choice_lines(plan, found):
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
    blocks.append(("facts", [["what", "value"], *facts]))
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
            out.append("\n".join(markdown_table(body[0], body[1:], right=True)))
    return "\n\n".join(out) + "\n"


def _html(blocks: Sequence[Block], figures: dict[str, tuple[str, bytes]]) -> str:
    text = (resources.files("glazoo.compare") / "report.html").read_text("utf-8")
    pictures = [
        (caption, f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}")
        for caption, picture in figures.values()
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template.render(blocks=blocks, figures=pictures) + "\n"
