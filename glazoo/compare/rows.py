"""What is known of each line of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from glazoo.compare.model import Shape
from glazoo.compare.plan import Arm, Line, Plan, Rates, Results, line_of
from glazoo.compare.train import Run
from glazoo.stats import Interval, interval, paired

__all__ = ["Row", "accuracy_of", "point", "rows", "with_controls"]


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
        return line_of(self.arm)

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
        return self.over_seeds(accuracy_of)

    @property
    def difference(self) -> Interval | None:
        """Accuracy less that of the rival, seed by seed; None where there is no rival."""
        if self.rival is None:
            return None
        mine, other = ({r["seed"]: accuracy_of(r) for r in x.results} for x in (self, self.rival))
        return paired(mine, other)

    def at(self, load: int, length: int) -> Interval | None:
        """Accuracy at another load or length."""
        return self.over_seeds(lambda r: float(point(r, load, length)["accuracy"]))

    @property
    def chosen_on_reported(self) -> float | None:
        """Mean accuracy as it is if every seed has its own best rate on the reported data, and the
        two lowest seeds are left out; None where not every rate was run, or for too few seeds."""
        best: dict[int, float] = {}
        for r in self.every:
            best[r["seed"]] = max(best.get(r["seed"], 0.0), accuracy_of(r))
        kept = sorted(best.values())[2:]
        return fmean(kept) if kept else None

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        accuracy, difference = self.accuracy, self.difference
        return {
            "label": self.label,
            "task": self.arm.task.name,
            "shape": self.shape.model_dump(),
            "parameters": self.arm.parameters,
            "rate": self.rates and self.rates.rate,
            "plasticity_rate": self.rates and self.rates.plasticity,
            "difference": difference and difference._asdict(),
            "accuracy": accuracy and accuracy._asdict(),
            "accuracies": [x["accuracy"] for x in self.results],
            "chosen_on_reported": self.chosen_on_reported,
            "control": None if self.control is None else self.control.to_json(),
        }


def accuracy_of(result: dict[str, Any]) -> float:
    return float(result["accuracy"])


def point(result: dict[str, Any], load: int, length: int) -> dict[str, Any]:
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


def with_controls(found: Sequence[Row]) -> list[Row]:
    """Return the rows that have results, and those of their controls."""
    every = [x for r in found for x in (r, r.control) if x is not None]
    return [r for r in every if r.results]
