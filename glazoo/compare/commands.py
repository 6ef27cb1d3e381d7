"""`glazoo capacity`, `decay`, `compare` and `bench`: variants side by side."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from glazoo.compare.errors import CompareError
from glazoo.spec import Spec, metaplasticize
from glazoo.terminal import AsJson, console, print_json
from glazoo.zoo import load

__all__ = ["bench", "capacity", "compare", "decay"]

Names = Annotated[
    list[str],
    typer.Argument(metavar="NAME...", help="Variants, metaplastic_NAME, or paths to .toml files."),
]
Metaplastic = Annotated[
    bool, typer.Option("--metaplastic", help="Also measure every variant's metaplastic form.")
]
GateShape = Annotated[
    Literal["spec", "head", "value"],
    typer.Option(
        "--gate",
        help="With --metaplastic: importance per head's keys, per synapse, or what the variant's "
        "own counterpart has.",
    ),
]
Gain = Annotated[
    Literal["spec", "first_order", "exact"],
    typer.Option(
        "--gain",
        help="With --metaplastic: learning rate of the forms that subtract their prediction, or "
        "what the variant's own counterpart has.",
    ),
]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures (matplotlib).")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random draws.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per CPU core.")]
Impl = Annotated[str, typer.Option(help="Engine: auto, reference, chunked or triton.")]


def capacity(
    names: Names,
    *,
    metaplastic: Metaplastic = False,
    gate: GateShape = "spec",
    gain: Gain = "spec",
    keys: Annotated[
        list[str] | None,
        typer.Option(help="Kinds of keys: random, clustered, anisotropic. Default: all three."),
    ] = None,
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
    """Measure how many associations each memory holds, untrained, at equal state bytes.

    Pairs of unit keys and Gaussian values are stored in an empty memory and read back. Gates are
    constant, every variant's the best of a grid, chosen on other draws than those that are
    reported. The error is the share of the values' energy that is not recovered.
    """
    from glazoo.compare import plots as figures
    from glazoo.compare.capacity import CapacityPlan, check, default_pairs
    from glazoo.compare.capacity import capacity as measure
    from glazoo.compare.files import make_folder, write_bytes, write_csv, write_json
    from glazoo.compare.probe import KEY_KINDS
    from glazoo.compare.tables import capacity_rows, capacity_table

    if plots:
        figures.require_matplotlib()
    for kind in keys or ():
        if kind not in KEY_KINDS:
            raise CompareError(f"keys: got {kind!r}, accepted are {', '.join(KEY_KINDS)}")
    kinds = [k for k in KEY_KINDS if not keys or k in keys]
    counts = default_pairs(state, value_size) if pairs is None else _integers("pairs", pairs)
    specs = _specs(names, metaplastic, gate, gain)
    plans = [
        CapacityPlan(s, n, k, state, value_size, counts, seeds, seed, threshold, impl)
        for k in kinds
        for n, s in specs.items()
    ]
    check(plans)
    make_folder(out)
    done = {}
    with _progress("measuring capacity", len(plans), quiet=as_json) as advance:
        for curve in measure(plans, jobs=_jobs(jobs)):
            done[curve.keys, curve.label] = curve
            advance(f"{curve.label}, {curve.keys} keys")
    curves = [done[p.keys, p.label] for p in plans]
    result = {
        "command": _command(),
        "versions": _versions(),
        "seed": seed,
        "seeds": seeds,
        "state_budget": state,
        "curves": [c.to_json() for c in curves],
    }
    write_json(out / "capacity.json", result)
    write_csv(out / "capacity.csv", capacity_rows(curves))
    if plots:
        write_bytes(out / "capacity.png", figures.panels(_capacity_axes(curves), columns=2))
    if as_json:
        print_json(result)
        return
    screen = console()
    for kind in kinds:
        screen.print(capacity_table([c for c in curves if c.keys == kind], kind))
    screen.print(f"data{' and figure' if plots else ''}: {out}/")


def _capacity_axes(curves: list[Any]) -> list[Any]:
    from glazoo.compare.plots import Axes, Line

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
                "retrieval error (share of energy)",
                lines,
                log_x=True,
                y_range=(0, 1),
                guide=threshold,
                guide_label=f"capacity: error {threshold:g}",
            )
        )
    return axes


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
    """Follow one association while others are written over it: measurement and theory.

    The recurrence alone, untrained, with constant gates and random unit keys. Left: the share of
    the association's signal that is left. Right: the share of the value that is not recovered.
    """
    import math

    from glazoo.compare import plots as figures
    from glazoo.compare.capacity import single_thread
    from glazoo.compare.files import make_folder, write_bytes, write_csv, write_json
    from glazoo.compare.forgetting import ForgettingPlan, forgetting
    from glazoo.compare.probe import Gates

    if plots:
        figures.require_matplotlib()
    if not (time_constant >= 0 and math.isfinite(time_constant)):
        raise CompareError(f"time-constant: got {time_constant}, accepted are numbers >= 0")
    gates = Gates(
        decay=-1 / time_constant if time_constant else 0.0,
        write=write_gate,
        importance=importance,
        prior=prior,
        erase=erase,
    )
    specs = _specs(names, metaplastic, gate, gain)
    make_folder(out)
    curves = []
    bar = _progress("following one association", len(specs), quiet=as_json)
    with bar as advance, single_thread():
        for name, spec in specs.items():
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
            advance(name)
    result = {
        "command": _command(),
        "versions": _versions(),
        "seed": seed,
        "curves": [c.to_json() for c in curves],
    }
    write_json(out / "decay.json", result)
    write_csv(out / "decay.csv", [row for c in curves for row in _decay_rows(c)])
    if plots:
        write_bytes(out / "decay.png", figures.panels(_decay_axes(curves)))
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


def _decay_rows(curve: Any) -> list[dict[str, Any]]:
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


def _decay_axes(curves: list[Any]) -> list[Any]:
    from glazoo.compare.plots import Axes, Line

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


def _specs(names: list[str], metaplastic: bool, gate: str, gain: str) -> dict[str, Spec]:
    """Loads specs by label; with `metaplastic`, each is followed by its counterpart."""
    out: dict[str, Spec] = {}
    for name in names:
        spec = load(name)
        if out.setdefault(spec.name, spec) != spec:
            raise CompareError(f"two different specs are named {spec.name!r}: give one a new name")
        if metaplastic and not spec.metaplastic:
            options: dict[str, Any] = {"gate": gate}
            if spec.posterior.correction == "full":
                options["gain"] = gain
            chosen = {name: x for name, x in options.items() if x != "spec"}
            made = metaplasticize(spec, **chosen)
            label = ", ".join(x.replace("_", " ") for x in chosen.values())
            out.setdefault(f"{made.name} ({label})" if label else made.name, made)
    return out


def _integers(name: str, text: str) -> tuple[int, ...]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) > 0 for p in parts):
        raise CompareError(f"{name}: got {text!r}, accepted are positive integers like 8,16,32")
    return tuple(sorted({int(p) for p in parts}))


def _jobs(jobs: int | None) -> int:
    from glazoo.compare.machine import cores

    return jobs or cores()


def _command() -> str:
    """Return the command that makes these results again."""
    return shlex.join(["glazoo", *sys.argv[1:]])


def _versions() -> dict[str, str]:
    from glazoo.compare.machine import versions

    return versions()


class _progress:
    """A bar on standard error that counts measurements."""

    def __init__(self, what: str, total: int, *, quiet: bool) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
            transient=True,
        )
        self.task = self.bars.add_task(what, total=total)
        self.what = what

    def __enter__(self) -> Any:
        self.bars.start()
        return self.advance

    def advance(self, what: str) -> None:
        self.bars.update(self.task, advance=1, description=f"{self.what}: {what}")

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


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
            "paper-small: that on a CPU in about an hour."
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
    """Train variants side by side, and report differences with intervals over seeds.

    Metaplastic forms are compared with their sources at equal state bytes, or with --convert at
    equal keys: a source is trained, and then trained on as it is and converted. Differences are
    paired by seed; what a task measures is shown beside its control. Rates are chosen on seeds that
    are not reported. Finished runs are kept, and long ones save where they are: after an
    interruption the same command goes on where it stopped. The folder gets report.html, report.md,
    the figures with their data, and every run in runs.jsonl.
    """
    from glazoo.compare import plots as figures
    from glazoo.compare.clock import duration, estimate
    from glazoo.compare.machine import machine
    from glazoo.compare.plan import PRESETS, Plan, Tuning
    from glazoo.compare.report import rows, table, write_report
    from glazoo.compare.store import Store
    from glazoo.compare.tasks import TASKS, Task
    from glazoo.compare.train import Training

    if plots and not dry_run:
        figures.require_matplotlib()
    chosen: Any = _known("task", task, TASKS)
    p = PRESETS[_known("preset", preset, tuple(PRESETS))].for_task(chosen)
    _check_device(device)

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
    further = p.tuning.rates if further_rates is None else _numbers("further-rates", further_rates)
    plan = Plan(
        _specs(names, metaplastic or convert, gate, gain),
        plan_task,
        tuple(models),
        trained(p.training, steps),
        p.rates if rates is None else _numbers("rates", rates),
        seeds or p.seeds,
        () if plasticity_rate is None else _numbers("plasticity-rate", plasticity_rate),
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
        seconds = estimate(plan, threads) / _jobs(jobs)
        count = sum(runs for _, runs in plan.counts())
        if as_json:
            shown = {"runs": count, "seconds": seconds, "config": plan.config()}
            print_json(shown | {"rows": _row_json(found)})
            return
        console().print(table(plan, found))
        console().print(
            f"{count} runs of {plan.training.steps} steps, about {duration(seconds)} here"
        )
        return
    with Store(out, plan.config()) as store:
        try:
            lost = _execute(plan, store, jobs=_jobs(jobs), threads=threads, quiet=as_json)
        except KeyboardInterrupt:
            Console(stderr=True).print(
                f"stopped; {len(store.results)} runs are kept in {out}: the same command goes on"
            )
            raise
        found = rows(plan, store.results)
        write_report(
            out,
            plan,
            found,
            command=_command(),
            versions=_versions(),
            machine=machine(),
            lost=lost,
            plots=plots,
        )
    if as_json:
        print_json({"out": str(out), "lost": lost, "rows": _row_json(found)})
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


def _execute(plan: Any, store: Any, *, jobs: int, threads: int, quiet: bool) -> list[str]:
    """Runs what a plan still needs and gives the runs that could not be made."""
    import functools

    from rich.live import Live

    from glazoo.compare.clock import Clock, duration
    from glazoo.compare.report import rows, table
    from glazoo.compare.train import train
    from glazoo.compare.workers import Failed, Finished, Moved, run_all

    queued: set[str] = set()

    def ready() -> list[Any]:
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

    def more(result: dict[str, Any]) -> list[Any]:
        store.add(result)
        return ready()

    total = sum(runs for _, runs in plan.counts())
    screen = Console(stderr=True)
    live = screen.is_terminal and not quiet
    running: dict[Any, str] = {}
    lost: list[str] = []
    clock = Clock(plan, jobs)

    def show() -> Any:
        view = table(plan, rows(plan, store.results), running)
        done = sum(r.key in store.results for r in plan.wanted(store.results))
        left = clock.left(store.results)
        about = "" if left is None else f"about {duration(left)} left; "
        view.caption = f"{done} of {total} runs are done; {about}Ctrl-C keeps them"
        return view

    work = functools.partial(train, folder=store.folder)
    events = run_all(ready(), jobs=jobs, threads=threads, more=more, work=work)
    with Live(console=screen, auto_refresh=False, transient=True) as display, closing(events):
        for event in events:
            run = event.run
            line = run.label, run.model, run.task.name
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
                    )
            elif isinstance(event, Failed):
                running.pop(line, None)
                clock.ended(run)
                message = f"{name}: {event.reason}"
                screen.print(message + ("; it starts again" if event.again else ""), style="yellow")
                if not event.again:
                    lost.append(message)
            if live:
                display.update(show(), refresh=True)
    for arm in plan.arms:
        if plan.chosen(arm, store.results) is None and not lost:
            lost.append(f"{arm.label}: its rates were not all tried")
    return lost


def _row_json(found: Any) -> list[dict[str, Any]]:
    def of(row: Any) -> dict[str, Any]:
        accuracy, difference = row.accuracy, row.difference
        return {
            "label": row.label,
            "task": row.arm.task.name,
            "shape": row.shape.model_dump(),
            "parameters": row.arm.parameters,
            "rate": row.rates and row.rates.rate,
            "plasticity_rate": row.rates and row.rates.plasticity,
            "difference": difference and difference._asdict(),
            "accuracy": accuracy and accuracy._asdict(),
            "accuracies": [x["accuracy"] for x in row.results],
            "chosen_on_reported": row.chosen_on_reported,
            "control": None if row.control is None else of(row.control),
        }

    return [of(row) for row in found]


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise CompareError(f"device: got {device!r}, accepted are cpu and cuda") from e
    if kind == "cuda" and not torch.cuda.is_available():
        raise CompareError(
            f"device: got {device!r}, but this machine has no GPU that torch can use"
        )


def _known(name: str, value: str, accepted: tuple[str, ...]) -> str:
    import difflib

    if value in accepted:
        return value
    near = difflib.get_close_matches(value, accepted, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(accepted)}"
    raise CompareError(f"{name}: got {value!r}; {hint}")


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(p) for p in text.split(",")}))
    except ValueError as e:
        raise CompareError(f"{name}: got {text!r}, accepted are numbers like 0.003,0.01") from e


def bench(
    names: Names,
    *,
    metaplastic: Metaplastic = False,
    gate: GateShape = "spec",
    gain: Gain = "spec",
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Engine; give it again for more. Default: all but the reference."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="train, prefill or decode; give it again for more. Default: all."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 4,
    key_size: Annotated[int, typer.Option(min=1, help="Key channels per head.")] = 64,
    value_size: Annotated[int, typer.Option(min=1, help="Value channels per head.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"],
        typer.Option(help="Of queries, keys and values; gates are float32."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time to spend on each measurement.")
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench.json and bench.csv. Default: none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the recurrence of each variant on this machine: training, prefill and decoding.

    Each engine is first compared with the reference. Memory is what autograd keeps for the backward
    pass and, on a GPU, the peak.
    """
    import torch

    from glazoo.compare.bench import MODES, BenchPlan, measure
    from glazoo.compare.files import make_folder, write_csv, write_json
    from glazoo.compare.machine import machine
    from glazoo.engines import available

    engines = engine or [e for e in available() if e != "reference"]
    for e in engines:
        _known("engine", e, ("reference", "chunked", "triton"))
    for m in mode or ():
        _known("mode", m, MODES)
    modes = [m for m in MODES if not mode or m in mode]
    _check_device(device)
    specs = _specs(names, metaplastic, gate, gain)
    if out is not None:
        make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    plans = [
        BenchPlan(
            spec,
            name,
            e,
            m,
            batch,
            tokens,
            heads,
            key_size,
            value_size,
            getattr(torch, dtype),
            device,
            seconds,
        )
        for name, spec in specs.items()
        for e in engines
        for m in modes
    ]
    results = []
    with _progress("timing", len(plans), quiet=as_json) as advance:
        for plan in plans:
            results.append(measure(plan))
            advance(f"{plan.label}, {plan.engine}, {plan.mode}")
    data = {
        "command": _command(),
        "versions": _versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "heads": heads,
        "key_size": key_size,
        "value_size": value_size,
        "dtype": dtype,
        "device": device,
        "measurements": [r.to_json() for r in results],
    }
    if out is not None:
        write_json(out / "bench.json", data)
        write_csv(out / "bench.csv", [r.to_json() for r in results])
    if as_json:
        print_json(data)
        return
    view = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in ("variant", "engine", "mode"):
        view.add_column(column, no_wrap=True)
    for column in (
        "tokens\nper call",
        "ms per call\n(p20 / p50 / p80)",
        "tokens/s",
        "state\n(KiB)",
        "kept for backward\n(MiB)",
        "GPU peak\n(MiB)",
        "error against\nthe reference",
    ):
        view.add_column(column, justify="right", no_wrap=True)
    for r in results:
        if r.failure:
            continue
        view.add_row(
            r.label,
            r.engine,
            r.mode,
            f"{batch} x {r.tokens}",
            " / ".join(f"{x:.3g}" for x in r.milliseconds),
            f"{r.tokens_per_second:,.0f}",
            f"{r.state_bytes / 1024:,.0f}",
            f"{r.saved_bytes / 2**20:,.1f}" if r.saved_bytes else "",
            "" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:,.1f}",
            "" if r.error is None else f"{r.error:.1e}",
        )
    if not all(r.failure for r in results):
        console().print(view)
    failures = dict.fromkeys(f"{r.label}, {r.engine}: {r.failure}" for r in results if r.failure)
    for failure in failures:
        console().print(f"no measurement of {failure}", style="yellow")
    console().print(
        f"{machine()}; {torch.get_num_threads()} threads; {heads} heads, K = {key_size}, "
        f"V = {value_size}, {dtype} on {device}"
    )
