"""About how long a comparison takes: measured before it, and while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean

import torch

from glazoo.compare.plan import Arm, Line, Plan, Results, line_of
from glazoo.compare.train import Run, step_seconds

__all__ = ["Clock", "duration", "estimate"]


def duration(seconds: float) -> str:
    """Return a time in the unit that fits."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"


def estimate(plan: Plan, threads: int = 1) -> float:
    """Measures a few steps of every line of a plan on that many threads, and gives the seconds that
    all of its runs would take one after the other."""
    total = 0.0
    torch.set_num_threads(threads)
    for arm, runs in plan.counts():
        run = plan.sample(arm)
        total += runs * run.training.steps * step_seconds(run)
    return total


class Clock:
    """Time that is left, from what runs have taken.

    Args:
        plan: what is run.
        jobs: number of processes.
    """

    def __init__(self, plan: Plan, jobs: int) -> None:
        self.plan, self.jobs = plan, jobs
        self._began: dict[str, float] = {}
        self._share: dict[str, tuple[Run, float]] = {}

    def moved(self, run: Run, share: float) -> None:
        """Notes how far a run is."""
        self._began.setdefault(run.key, time.monotonic())
        self._share[run.key] = run, share

    def ended(self, run: Run) -> None:
        """Notes that a run is no longer running."""
        self._began.pop(run.key, None)
        self._share.pop(run.key, None)

    def left(self, results: Results) -> float | None:
        """Return about how many seconds are left; None while nothing is known."""
        took: dict[Line, list[float]] = {}
        done: dict[Line, float] = {}
        for run in self.plan.wanted(results):
            if run.key in results:
                took.setdefault(line_of(run), []).append(results[run.key]["seconds"])
                done[line_of(run)] = done.get(line_of(run), 0.0) + 1.0
        for key, (run, share) in self._share.items():
            if share > 0.02:
                elapsed = time.monotonic() - self._began[key]
                took.setdefault(line_of(run), []).append(elapsed / share)
            done[line_of(run)] = done.get(line_of(run), 0.0) + share
        if not took:
            return None
        arms = {line_of(arm): self._tokens(arm) for arm, _ in self.plan.counts()}
        per_token = fmean(fmean(x) / arms[line] for line, x in took.items() if line in arms)
        return (
            sum(
                max(0.0, runs - done.get(line_of(arm), 0.0)) * self._each(arm, took, per_token)
                for arm, runs in self.plan.counts()
            )
            / self.jobs
        )

    def _each(self, arm: Arm, took: Mapping[Line, list[float]], per_token: float) -> float:
        known = took.get(line_of(arm))
        return fmean(known) if known else per_token * self._tokens(arm)

    def _tokens(self, arm: Arm) -> float:
        t = self.plan.sample(arm).training
        return float(t.steps * t.batch * arm.task.length)
