"""`glazoo compare`: variants trained side by side."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from glazoo.compare.clock import duration, estimate
from glazoo.compare.commands.options import (
    ClusterOptions,
    Gain,
    GateShape,
    Impl,
    Jobs,
    Metaplastic,
    Names,
    OnCluster,
    Plots,
    Seed,
    check_device,
    command_line,
    known,
    load_specs,
    numbers,
)
from glazoo.compare.errors import CompareError
from glazoo.compare.machine import cores, machine, versions
from glazoo.compare.plan import PRESETS, Plan, Tuning
from glazoo.compare.report import write_report
from glazoo.compare.rows import rows
from glazoo.compare.running import run_plan
from glazoo.compare.store import Store
from glazoo.compare.tables import table
from glazoo.compare.tasks import TASKS, Task
from glazoo.compare.train import Training
from glazoo.compare.workers import pool_for
from glazoo.plotting import require
from glazoo.terminal import AsJson, console, print_json

__all__ = ["compare"]


def compare(
    names: Names,
    *,
    task: Annotated[
        str,
        typer.Option(
            help="mqar, noisy_recall, fuzzy_recall, selective_copy, memorisation, compression, "
            "overwriting, records, static, entities, static_entities, regression, "
            "static_regression or text."
        ),
    ] = "mqar",
    preset: Annotated[
        str,
        typer.Option(
            help="quick: minutes on a CPU; paper, paper-long: the paper's protocol, for a GPU; "
            "paper-small: that on two CPU cores in an hour."
        ),
    ] = "quick",
    metaplastic: Metaplastic = False,
    gate: GateShape = "spec",
    gain: Gain = "spec",
    convert: Annotated[
        bool,
        typer.Option(
            "--convert",
            help="Train sources, then train on each as it is and converted, on the same data.",
        ),
    ] = False,
    control: Annotated[
        bool,
        typer.Option("--control/--no-control", help="Run the task's control beside it."),
    ] = True,
    state: Annotated[
        list[int] | None,
        typer.Option(help="State budget of a layer in bytes; give it again for more budgets."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Reported seeds per variant.")] = None,
    selection_seeds: Annotated[
        int, typer.Option(min=1, help="Other seeds, on which rates are chosen.")
    ] = 1,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates to choose from, like 0.003,0.01.")
    ] = None,
    further_rates: Annotated[
        str | None, typer.Option(help="With --convert: those of the training that follows.")
    ] = None,
    plasticity_rate: Annotated[
        str | None,
        typer.Option(
            help="Share of the learning rate that the plasticity of importance gates gets; "
            "several, like 0.1,1,10, to choose from. Default: 10 for conversions, "
            "otherwise 1."
        ),
    ] = None,
    load: Annotated[
        int | None, typer.Option(min=1, help="Pairs, facts or tokens to hold at once.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=4, help="Tokens of an example.")] = None,
    vocab: Annotated[int | None, typer.Option(min=16, help="Number of tokens.")] = None,
    shared: Annotated[
        float,
        typer.Option(min=0, max=1, help="records: chance that what a context shares is shared."),
    ] = 1.0,
    noise: Annotated[
        float, typer.Option(min=0, help="regression: noise on the outputs, which are of size 1.")
    ] = 0.0,
    anisotropy: Annotated[
        float, typer.Option(min=1, help="regression: largest over smallest size of the inputs.")
    ] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of a run.")] = None,
    further_steps: Annotated[
        int | None, typer.Option(min=1, help="With --convert: those of the training that follows.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples per step.")] = None,
    width: Annotated[int | None, typer.Option(min=4, help="Channels of the model.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers with a recurrence.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads of a layer.")] = None,
    equal_parameters: Annotated[
        bool,
        typer.Option(
            "--equal-parameters/--own-parameters",
            help="Widen the position-wise part of smaller models to the largest's parameters.",
        ),
    ] = True,
    text: Annotated[
        Path | None,
        typer.Option(help="text: a file to learn. Default: the reference that comes with Python."),
    ] = None,
    seed: Seed = 0,
    jobs: Jobs = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a process.")] = 1,
    cluster: OnCluster = None,
    cluster_option: ClusterOptions = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    impl: Impl = "auto",
    out: Annotated[Path, typer.Option(help="Folder for results; a repeat goes on there.")] = Path(
        "compare-results"
    ),
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print sizes, the number of runs and about how long only."),
    ] = False,
    plots: Plots = True,
    as_json: AsJson = False,
) -> None:
    """Train variants side by side, differences with intervals.

    Metaplastic forms are compared with their sources at equal state bytes, or with --convert at
    equal keys: a source is trained, and then trained on as it is and converted. Differences are
    paired by seed; what a task measures is shown beside its control. Rates are chosen on seeds that
    are not reported. Finished runs are kept, and long ones save where they are: after an
    interruption the same command goes on where it stopped. With --cluster runs are jobs of a
    cluster, and this command waits for them. The folder gets report.html, report.md,
    the figures with their data, and every run in runs.jsonl.
    """
    if plots and not dry_run:
        require("pass --no-plots")
    chosen: Any = known("task", task, TASKS)
    p = PRESETS[known("preset", preset, tuple(PRESETS))].for_task(chosen)
    # Where jobs are submitted need not be what they run on.
    if cluster is None:
        check_device(device)

    def given(**values: Any) -> dict[str, Any]:
        return {name: x for name, x in values.items() if x is not None}

    def trained(training: Training, steps: int | None) -> Training:
        changes = given(steps=steps, batch=batch, data_seed=seed)
        return Training(**(training.model_dump() | changes))

    sizes = given(load=p.load, length=p.length, vocab=p.vocab, filler_tokens=p.filler_tokens)
    plan_task = Task(
        name=chosen,
        text=text,
        shared=shared,
        noise=noise,
        anisotropy=anisotropy,
        **(sizes | given(load=load, length=length, vocab=vocab)),
    )
    if length is None:
        room = plan_task.smallest_length(plan_task.load)
        plan_task = plan_task.model_copy(update={"length": max(plan_task.length, room)})
    models = [m.model_copy(update=given(width=width, layers=layers, heads=heads)) for m in p.models]
    if state:
        models = [
            models[0].model_copy(update={"state_bytes": b, "key_size": None})
            for b in sorted(set(state))
        ]
    further = p.tuning.rates if further_rates is None else numbers("further-rates", further_rates)
    plan = Plan(
        load_specs(names, metaplastic or convert, gate, gain),
        plan_task,
        tuple(models),
        trained(p.training, steps),
        p.rates if rates is None else numbers("rates", rates),
        seeds or p.seeds,
        () if plasticity_rate is None else numbers("plasticity-rate", plasticity_rate),
        selection_seeds,
        p.every_rate,
        control,
        Tuning(trained(p.tuning.training, further_steps), further) if convert else None,
        equal_parameters,
        impl,
        device,
    )
    plan.check()
    if dry_run:
        found = rows(plan, {})
        seconds = estimate(plan, threads) / (jobs or cores())
        count = sum(runs for _, runs in plan.counts())
        if as_json:
            shown = {"runs": count, "seconds": seconds, "config": plan.config()}
            print_json(shown | {"rows": [r.to_json() for r in found]})
            return
        console().print(table(plan, found))
        console().print(
            f"{count} runs of {plan.training.steps} steps, about {duration(seconds)} here"
        )
        return
    pool = pool_for(
        cluster,
        out.absolute(),
        jobs=jobs,
        threads=threads,
        device=device,
        options=cluster_option or (),
    )
    with closing(pool), Store(out, plan.config()) as store:
        try:
            lost = run_plan(plan, store, pool=pool, threads=threads, quiet=as_json)
        except KeyboardInterrupt:
            Console(stderr=True).print(
                f"stopped; {len(store.results)} runs are kept in {out}: the same command goes on",
                soft_wrap=True,
            )
            raise
        found = rows(plan, store.results)
        write_report(
            out,
            plan,
            found,
            command=command_line(),
            versions=versions(),
            machine=machine(),
            lost=lost,
            plots=plots,
        )
    if as_json:
        print_json({"out": str(out), "lost": lost, "rows": [r.to_json() for r in found]})
    else:
        console().print(table(plan, found))
        hashes = {r["data_hash"] for row in found for r in row.results}
        console().print(f"SHA-256 of the evaluation data: {', '.join(sorted(hashes))}")
        console().print(f"report, figures and data: {out}/report.html, {out}/report.md")
    if lost:
        raise CompareError(
            f"{len(lost)} runs have no result: {'; '.join(lost)}. All others are stored in {out}; "
            "repeat the command to try these again"
        )
