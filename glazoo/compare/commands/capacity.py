"""`glazoo capacity`: how many associations a memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from glazoo import stats
from glazoo.compare.capacity import CapacityCurve, CapacityPlan, Error, Task, check, default_pairs
from glazoo.compare.capacity import capacity as measure
from glazoo.compare.commands.options import (
    Gain,
    GateShape,
    Impl,
    Jobs,
    Metaplastic,
    Names,
    Plots,
    Seed,
    command_line,
    integers,
    load_specs,
)
from glazoo.compare.files import make_folder, write_bytes, write_csv, write_json
from glazoo.compare.keys import KEY_KINDS, recorded
from glazoo.compare.machine import cores, versions
from glazoo.plotting import Axes, Line, panels, require
from glazoo.stats import against_source
from glazoo.terminal import AsJson, console, print_json, progress

__all__ = ["capacity"]


def capacity(
    names: Names,
    *,
    metaplastic: Metaplastic = False,
    gate: GateShape = "spec",
    gain: Gain = "spec",
    keys: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of keys: random, clustered, anisotropic; trained, those of a small "
            "language model, or a FILE of glazoo inspect --save-keys, which have a size of their "
            "own; again for more. Default: the first three."
        ),
    ] = None,
    task: Annotated[
        Task,
        typer.Option(
            help="What is written: every pair once; four times with noise as large as the values; "
            "or other values first, and the last counts."
        ),
    ] = "once",
    error: Annotated[
        Error,
        typer.Option(
            help="Share of the values' energy that is not read back, or of values that are taken "
            "for others."
        ),
    ] = "energy",
    state: Annotated[
        int, typer.Option(min=8, help="State budget in bytes of float32; key sizes follow.")
    ] = 4096,
    value_size: Annotated[int, typer.Option(min=1, help="Value channels.")] = 16,
    pairs: Annotated[
        str | None,
        typer.Option(help="Numbers of pairs, like 8,16,32. Default: around the state's size."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Error that defines the capacity.")
    ] = 0.25,
    seeds: Annotated[int, typer.Option(min=1, help="Independent draws; intervals need 2.")] = 8,
    seed: Seed = 0,
    jobs: Jobs = None,
    impl: Impl = "auto",
    out: Annotated[Path, typer.Option(help="Folder for figure and data.")] = Path(
        "capacity-results"
    ),
    plots: Plots = True,
    as_json: AsJson = False,
) -> None:
    """Measure how many associations each memory holds.

    Untrained, at equal state bytes. Pairs of unit keys and Gaussian values are stored in an empty
    memory and read back. Gates are constant, every variant's the best of a grid, chosen on other
    draws than those that are reported. Recorded keys are read in the order of their text: gates,
    and the axes of rotated importances, come from its first half and the errors from its second.
    """
    if plots:
        require("pass --no-plots")
    stats.require()
    kinds = list(dict.fromkeys(keys or KEY_KINDS))
    given = None if pairs is None else integers("pairs", pairs)
    specs = load_specs(names, metaplastic, gate, gain)

    def counts(kind: str) -> tuple[int, ...]:
        if given is not None:
            return given
        if kind in KEY_KINDS:
            return default_pairs(state, value_size)
        found = recorded(kind)
        room = default_pairs(4 * found.size * value_size, value_size)
        return tuple(n for n in room if n <= found.longest) or (found.longest,)

    plans = [
        CapacityPlan(
            s, n, k, state, value_size, counts(k), seeds, seed, threshold, impl, task, error
        )
        for k in kinds
        for n, s in specs.items()
    ]
    check(plans)
    make_folder(out)
    done: dict[tuple[str, str], CapacityCurve] = {}
    with progress(quiet=as_json) as report:
        report("measuring capacity", 0, len(plans))
        for curve in measure(plans, jobs=jobs or cores()):
            done[curve.keys, curve.label] = curve
            report(f"measured {curve.label}, {curve.keys} keys", len(done), len(plans))
    curves = [done[p.keys, p.label] for p in plans]
    result = {
        "command": command_line(),
        "versions": versions(),
        "seed": seed,
        "seeds": seeds,
        "state_budget": state,
        "curves": [c.to_json() for c in curves],
    }
    write_json(out / "capacity.json", result)
    write_csv(out / "capacity.csv", _rows(curves))
    if plots:
        write_bytes(out / "capacity.png", panels(_axes(curves), columns=2))
    if as_json:
        print_json(result)
        return
    screen = console()
    for kind in kinds:
        screen.print(_table([c for c in curves if c.keys == kind], kind))
    screen.print(f"data{' and figure' if plots else ''}: {out}/")


def _axes(curves: Sequence[CapacityCurve]) -> list[Axes]:
    """Return a panel per kind of keys."""
    threshold = curves[0].threshold
    # Constant gates make some variants one and the same memory, whose curves would hide each other.
    found: dict[str, list[Any]] = {}
    for c in curves:
        errors = [[round(e, 3) for e in seeds] for seeds in c.errors]
        found.setdefault(c.label, []).append((c.keys, c.state_bytes, errors))
    shared: dict[str, list[str]] = {}
    for label, measured in found.items():
        shared.setdefault(repr(measured), []).append(label)
    together = {labels[0]: " = ".join(labels) for labels in shared.values()}
    axes = []
    for kind in dict.fromkeys(c.keys for c in curves):
        lines = [
            Line(
                together[c.label],
                [1024 * n / c.state_bytes for n in c.pairs],
                [i.mean for i in c.intervals],
                [max(i.low, 0.0) for i in c.intervals],
                [min(i.high, 1.0) for i in c.intervals],
            )
            for c in curves
            if c.keys == kind and c.label in together
        ]
        axes.append(
            Axes(
                f"{kind} keys",
                "stored pairs per KiB of state",
                f"retrieval error (share of {curves[0].error})",
                lines,
                log_x=True,
                y_range=(0, 1),
                guide=threshold,
                guide_label=f"capacity: error {threshold:g}",
            )
        )
    return axes


def _rows(curves: Sequence[CapacityCurve]) -> list[dict[str, Any]]:
    """Return one row per variant, kind of keys and number of pairs."""
    return [
        {
            "label": c.label,
            "keys": c.keys,
            "task": c.task,
            "error": c.error,
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


def _table(curves: Sequence[CapacityCurve], kind: str) -> Table:
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
    values = {c.label: c.capacities_per_kilobyte for c in curves}
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
