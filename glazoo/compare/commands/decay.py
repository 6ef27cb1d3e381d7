"""`glazoo decay`: one association while others are written over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from glazoo import stats
from glazoo.compare.capacity import single_thread
from glazoo.compare.commands.options import (
    Gain,
    GateShape,
    Impl,
    Metaplastic,
    Names,
    Plots,
    Seed,
    command_line,
    load_specs,
)
from glazoo.compare.errors import CompareError
from glazoo.compare.files import make_folder, write_bytes, write_csv, write_json
from glazoo.compare.forgetting import Forgetting, ForgettingPlan, forgetting
from glazoo.compare.machine import versions
from glazoo.compare.probe import Gates
from glazoo.plotting import Axes, Line, panels, require
from glazoo.terminal import AsJson, console, print_json, progress

__all__ = ["decay"]


def decay(
    names: Names,
    *,
    metaplastic: Metaplastic = False,
    gate: GateShape = "spec",
    gain: Gain = "spec",
    time_constant: Annotated[
        float,
        typer.Option(help="Tokens in which the decay alone leaves 1/e; 0: no decay."),
    ] = 512.0,
    write_gate: Annotated[float, typer.Option("--write", min=1e-6, help="Write gate.")] = 1.0,
    importance: Annotated[float, typer.Option(min=0.0, help="Importance gate.")] = 1.0,
    prior: Annotated[float, typer.Option(min=1e-6, help="Prior importance.")] = 1.0,
    erase: Annotated[float, typer.Option(min=0.0, max=1.0, help="Own erase gate.")] = 1.0,
    key_size: Annotated[int, typer.Option(min=2, help="Key channels.")] = 64,
    value_size: Annotated[int, typer.Option(min=1, help="Value channels.")] = 32,
    before: Annotated[
        int, typer.Option(min=0, help="Associations before the one that is followed.")
    ] = 64,
    after: Annotated[int, typer.Option(min=8, help="Tokens that follow it.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Independent draws; intervals need 2.")] = 6,
    seed: Seed = 0,
    impl: Impl = "auto",
    out: Annotated[Path, typer.Option(help="Folder for figure and data.")] = Path("decay-results"),
    plots: Plots = True,
    as_json: AsJson = False,
) -> None:
    """Follow one association while others are written over it.

    Measurement and theory of the recurrence alone, untrained, with constant gates and random unit
    keys. Left: the share of the association's signal that is left. Right: the share of the value
    that is not recovered.
    """
    if plots:
        require("pass --no-plots")
    stats.require()
    if not (time_constant >= 0 and math.isfinite(time_constant)):
        raise CompareError(f"time-constant: got {time_constant}, accepted are numbers >= 0")
    gates = Gates(
        decay=-1 / time_constant if time_constant else 0.0,
        write=write_gate,
        importance=importance,
        prior=prior,
        erase=erase,
    )
    specs = load_specs(names, metaplastic, gate, gain)
    make_folder(out)
    curves = []
    with progress(quiet=as_json) as report, single_thread():
        for done, (name, spec) in enumerate(specs.items()):
            report(f"following one association: {name}", done, len(specs))
            plan = ForgettingPlan(
                spec,
                name,
                gates,
                key_size,
                value_size,
                before,
                after,
                seeds=seeds,
                seed=seed,
                impl=impl,
            )
            curves.append(forgetting(plan))
    result = {
        "command": command_line(),
        "versions": versions(),
        "seed": seed,
        "curves": [c.to_json() for c in curves],
    }
    write_json(out / "decay.json", result)
    write_csv(out / "decay.csv", [row for c in curves for row in _rows(c)])
    if plots:
        write_bytes(out / "decay.png", panels(_axes(curves)))
    if as_json:
        print_json(result)
        return
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("variant", no_wrap=True)
    points = sorted({1, 16, 64, 256, after})
    points = [min(curves[0].lags, key=lambda lag: abs(lag - p)) for p in points if p <= after]
    table.add_column("half-life\n(tokens)", justify="right")
    for lag in points:
        table.add_column(f"error after {lag}\nmeasured (theory)", justify="right")
    for c in curves:
        at = {lag: i for i, lag in enumerate(c.lags)}
        cells = []
        for lag in points:
            predicted = f" ({c.theory.error[lag]:.2f})" if c.theory else ""
            cells.append(c.error[at[lag]].text(2) + predicted)
        half = f"> {after}" if c.half_life is None else f"{c.half_life:.0f}"
        table.add_row(c.label, half, *cells)
    console().print(table)
    console().print(f"data{' and figure' if plots else ''}: {out}/")


def _rows(curve: Forgetting) -> list[dict[str, Any]]:
    return [
        {
            "label": curve.label,
            "lag": p["lag"],
            **{
                f"{what}_{end}": p[what][end]
                for what in ("signal", "error")
                for end in ("mean", "low", "high")
            },
            "theory_signal": p["theory_signal"],
            "theory_error": p["theory_error"],
        }
        for p in curve.to_json()["points"]
    ]


def _axes(curves: Sequence[Forgetting]) -> list[Axes]:
    def lines(what: str) -> list[Line]:
        out = []
        for c in curves:
            measured = getattr(c, what)
            predicted = getattr(c.theory, what) if c.theory else None
            out.append(
                Line(
                    c.label,
                    c.lags[1:],
                    [i.mean for i in measured[1:]],
                    [i.low for i in measured[1:]],
                    [i.high for i in measured[1:]],
                    list(range(1, len(predicted))) if predicted else None,
                    predicted[1:] if predicted else None,
                )
            )
        return out

    x = "tokens since it was written"
    return [
        Axes("signal that is left", x, "signal (share of the first)", lines("signal"), log_x=True),
        Axes(
            "what is not recovered",
            x,
            "retrieval error (share of energy)",
            lines("error"),
            log_x=True,
            y_range=(0, 1),
        ),
    ]
