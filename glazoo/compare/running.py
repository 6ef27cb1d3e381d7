"""Running a comparison's plan, and showing how far it is."""

from __future__ import annotations

import functools
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from glazoo.compare.clock import Clock, duration
from glazoo.compare.plan import Line, Plan, line_of
from glazoo.compare.rows import rows
from glazoo.compare.store import Store
from glazoo.compare.tables import table
from glazoo.compare.train import Run, train
from glazoo.compare.workers import Failed, Finished, Moved, Pool, run_all

__all__ = ["run_plan"]


def run_plan(plan: Plan, store: Store, *, pool: Pool, threads: int, quiet: bool) -> list[str]:
    """Run what a plan still needs, and show how far it is on standard error.

    Args:
        plan: what is wanted.
        store: what is there; results are added to it as they come.
        pool: where to run; it is closed at the end.
        threads: threads of each run.
        quiet: show nothing but failures.

    Returns:
        A line for every run that could not be made.
    """
    queued: set[str] = set()

    def ready() -> list[Run]:
        """Runs that have all they need and that nobody has started."""
        done = store.results
        out = [
            run
            for run in plan.wanted(done)
            if run.key not in done
            and run.key not in queued
            and (run.before is None or run.before.key in done)
        ]
        queued.update(run.key for run in out)
        return out

    def more(result: dict[str, Any]) -> list[Run]:
        store.add(result)
        return ready()

    total = sum(runs for _, runs in plan.counts())
    screen = Console(stderr=True)
    live = screen.is_terminal and not quiet
    running: dict[Line, str] = {}
    lost: list[str] = []
    clock = Clock(plan, pool.jobs)

    def show() -> Table:
        view = table(plan, rows(plan, store.results), running)
        done = sum(r.key in store.results for r in plan.wanted(store.results))
        left = clock.left(store.results)
        about = "" if left is None else f"about {duration(left)} left; "
        view.caption = f"{done} of {total} runs are done; {about}Ctrl-C keeps them"
        return view

    work = functools.partial(train, folder=store.folder.absolute())
    events = run_all(ready(), pool=pool, threads=threads, more=more, work=work)
    with Live(console=screen, auto_refresh=False, transient=True) as display, closing(events):
        for event in events:
            run = event.run
            line = line_of(run)
            what = f"rate {run.rate:g}, " if run.selection or plan.every_rate else ""
            if run.selection and run.plasticity_rate != 1:
                what += f"of plasticity times {run.plasticity_rate:g}, "
            what += f"seed {run.seed}"
            name = f"{run.label}, {run.task.name}, {run.model.state_bytes} bytes, {what}"
            if isinstance(event, Moved):
                running[line] = f"{what}: {100 * event.share:.0f} %, loss {event.loss:.2f}"
                clock.moved(run, event.share)
            elif isinstance(event, Finished):
                running.pop(line, None)
                clock.ended(run)
                if not live and not quiet:
                    r = event.result
                    left = clock.left(store.results)
                    about = "" if left is None else f"; about {duration(left)} left"
                    screen.print(
                        f"{name}: {run.task.measure} {100 * r['accuracy']:.1f} %, "
                        f"{r['seconds']:.0f} s{about}",
                        highlight=False,
                        soft_wrap=True,
                    )
            elif isinstance(event, Failed):
                running.pop(line, None)
                clock.ended(run)
                message = f"{name}: {event.reason}"
                again = "; it starts again" if event.again else ""
                screen.print(message + again, style="yellow", soft_wrap=True)
                if not event.again:
                    lost.append(message)
            if live:
                display.update(show(), refresh=True)
    for arm in plan.arms:
        if plan.chosen(arm, store.results) is None and not lost:
            lost.append(f"{arm.label}: its rates were not all tried")
    return lost
