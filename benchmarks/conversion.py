"""Is conversion worth it? Train a source, convert it, tune it, against the source trained on.

    python benchmarks/conversion.py            # two sources, four seeds
    python benchmarks/conversion.py --quick    # one source, two seeds, short: shows that it works

The task is recall (mqar) at a load that the source's state cannot hold entirely; the model is that
of `glazoo compare`. From the same trained source, with the same further data, are trained:

    source          the source itself
    head, value     its metaplastic form, importance per key or per synapse, zero at the start
    control         a source with as much state as `value`, trained from the start for all steps

Reported are accuracies with 95 % t intervals over seeds, and the difference to `source` seed by
seed. Runs are kept one by one: an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

import glazoo
from glazoo.compare.model import Model, ModelConfig
from glazoo.compare.stats import interval
from glazoo.compare.tasks import Task
from glazoo.compare.train import Run, Training, evaluate, fit
from glazoo.compare.workers import Failed, Finished, run_all
from glazoo.layers import metaplasticize

RESULTS = Path(__file__).parent / "results"
ARMS: tuple[Literal["source", "head", "value", "control"], ...] = (
    "source",
    "head",
    "value",
    "control",
)


def describe(name: str, seed: int, steps: int, load: int, state: int) -> Run:
    """The source's own training."""
    return Run(
        label=name,
        spec=glazoo.load(name),
        task=Task(name="mqar", vocab=128, length=4 * load, load=load),
        model=ModelConfig(state_bytes=state),
        training=Training(steps=steps),
        mlp=64,
        rate=4e-3,
        seed=seed,
    )


def work(run: Run, progress: Any) -> dict[str, Any]:
    """Trains a source, then every arm from it; gives the accuracies at the task's own load."""
    started = time.perf_counter()
    more = run.training.steps // 2
    tuning = run.model_copy(
        update={
            # Other data than before, at the full load from the first step.
            "training": run.training.model_copy(
                update={"steps": more, "curriculum": 0.0, "data_seed": 1}
            ),
        }
    )

    def share(part: int) -> Any:
        return lambda s, loss: progress((part + s) / (1 + len(ARMS)), loss)

    def make(state: int, seed: int) -> Model:
        torch.manual_seed(seed)
        config = run.model.model_copy(update={"state_bytes": state})
        return Model(run.spec, config, run.task.interface, mlp=run.mlp)

    source = make(run.model.state_bytes, run.seed)
    fit(source, run, share(0))
    accuracy = {"trained": evaluate(source, run)[0]["accuracy"]}
    at_first, plasticity = {}, {}
    for i, arm in enumerate(ARMS):
        if arm == "control":
            model = make(2 * run.model.state_bytes, run.seed)
            fit(model, run, share(i + 1))
        else:
            model = copy.deepcopy(source)
            if arm != "source":
                metaplasticize(model, gate=arm)
                at_first[arm] = evaluate(model, run)[0]["accuracy"]
        fit(model, tuning, share(i + 1))
        accuracy[arm] = evaluate(model, run)[0]["accuracy"]
        if arm in at_first:
            scales = [p for n, p in model.named_parameters() if n.endswith(".scale")]
            plasticity[arm] = torch.cat([p.detach() for p in scales]).tolist()
    return {
        "source": run.label,
        "seed": run.seed,
        "accuracy": accuracy,
        "accuracy_at_conversion": at_first,
        "plasticity": plasticity,
        "seconds": time.perf_counter() - started,
    }


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Prints means with intervals, and differences to the source trained on."""
    table = Table(title="recall after conversion, accuracy in percent over seeds")
    for column in ("source", "model", "seeds", "accuracy", "difference to the source trained on"):
        table.add_column(column, justify="left" if column in ("source", "model") else "right")
    for name in dict.fromkeys(r["source"] for r in results):
        mine = [r for r in results if r["source"] == name]
        for arm in ("trained", *ARMS):
            values = interval([100 * r["accuracy"][arm] for r in mine])
            paired = interval([100 * (r["accuracy"][arm] - r["accuracy"]["source"]) for r in mine])
            label = {
                "trained": "source, before",
                "source": "source, trained on",
                "head": "converted, importance per key, tuned",
                "value": "converted, importance per synapse, tuned",
                "control": "source with twice the state, all steps",
            }[arm]
            difference = "" if arm in ("source", "trained") else paired.text(1)
            table.add_row(name, label, str(len(mine)), values.text(1), difference)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sources", default="mamba2,gated_deltanet")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of the source; tuning takes half")
    parser.add_argument("--load", type=int, default=40, help="pairs to recall")
    parser.add_argument("--state", type=int, default=1088, help="bytes of the source's state")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="JSON lines; kept and continued")
    options = parser.parse_args()
    if options.quick:
        options.sources, options.seeds, options.steps, options.load = "mamba2", 2, 40, 8
    today = f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"
    quick = "quick_" if options.quick else ""
    path = options.output or RESULTS / f"conversion_{quick}{today}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: getattr(options, k) for k in ("steps", "load", "state")}
    done: dict[tuple[str, int], dict[str, Any]] = {}
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if other := [x["settings"] for x in lines if x["settings"] != settings]:
            sys.exit(f"{path} holds runs of {other[0]}, not {settings}; give another --output")
        done = {(x["source"], x["seed"]): x for x in lines}
    console = Console()
    wanted = [(n, s) for s in range(options.seeds) for n in options.sources.split(",")]
    runs = [describe(n, s, **settings) for n, s in wanted if (n, s) not in done]
    failed = False
    with path.open("a") as file, console.status("training") as status:
        for event in run_all(runs, jobs=options.jobs, work=work):
            if isinstance(event, Finished):
                line = event.result | {"settings": settings}
                file.write(json.dumps(line) + "\n")
                file.flush()
                done[line["source"], line["seed"]] = line
                console.print(f"{line['source']}, seed {line['seed']}: {line['seconds']:.0f} s")
            elif isinstance(event, Failed):
                failed = failed or not event.again
                console.print(f"{event.run.label}, seed {event.run.seed}: {event.reason}")
            else:
                status.update(f"{event.run.label} {event.share:.0%}, loss {event.loss:.2f}")
    show([done[w] for w in wanted if w in done], console)
    console.print(f"runs: {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
