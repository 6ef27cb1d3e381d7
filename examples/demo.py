"""The main job from end to end on this machine: train, convert, verify, train on, compare."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from glazoo.compare.errors import CompareError
from glazoo.compare.files import write_bytes, write_text
from glazoo.compare.model import ModelConfig, shape_for
from glazoo.compare.store import Store
from glazoo.compare.tasks import Task, draw, generator
from glazoo.compare.train import Run, Training, evaluate, fit
from glazoo.compare.workers import Failed, Finished, Processes, run_all
from glazoo.errors import extra
from glazoo.layers.plasticity import Observation
from glazoo.plotting import encoded, require, style
from glazoo.spec import metaplasticize
from glazoo.stats import interval
from glazoo.strictjson import loads
from glazoo.terminal import console, markdown_table, refusals
from glazoo.zoo import load

with extra("all"):
    import typer
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import Progress

__all__ = ["demo"]

_TASK = Task(name="records", vocab=81, length=96, load=12)
_MODEL = ModelConfig(width=64, heads=4, state_bytes=2048, mlp=0)
_RATE, _RATE_AFTER, _PLASTICITY_RATE = 0.012, 0.006, 10.0
"""Learning rates of a source and of what is trained on, and the plasticity's factor on the latter:
chosen on seeds 100 to 103, which are not reported."""
_ARMS = {
    "source": load("mamba2"),
    "converted": metaplasticize(load("mamba2")),
}


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for results; a repeat goes on there.")] = Path(
        "demo-output"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other models and data.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; the next follow.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a source.")] = 300,
    more: Annotated[int, typer.Option(min=1, help="Steps of source and converted after.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
) -> None:
    """Train small Mamba2 models, convert them, verify equality, train both on, and compare.

    Sources are transformers' own Mamba2ForCausalLM, converted by `glazoo convert --verify`. In the
    task, records, what keys have in common changes from context to context; in its control, static,
    it never does. Finished runs are kept: after an interruption the same command goes on where it
    stopped.
    """
    require()
    started = time.perf_counter()
    assert _TASK.control is not None
    tasks = (_TASK, _TASK.control)
    sources = [_source(t, s, steps) for s in range(seed, seed + seeds) for t in tasks]
    # What all results of this folder share: seeds may be added.
    shared = sources[0].model_dump(mode="json", exclude={"seed"})
    config = {"source": shared, "more": more, "rate": _RATE_AFTER, "plasticity": _PLASTICITY_RATE}
    with Store(out, config) as store:
        try:
            _work_off(sources, more, store, jobs)
        except KeyboardInterrupt:
            _say(f"stopped: finished runs are in {out}, and the same command goes on from there")
            raise typer.Exit(130) from None
        rows = [_row(t, sources, more, store.results) for t in tasks]
        conversions = [store.results[s.key]["conversion"] for s in sources]
    passed = all(c["passed"] for c in conversions)
    picture, found = _look(_kept(out, _after(sources[0], more)[-1]))
    report = _report(rows, conversions, more, found)
    console().print(Markdown(report))
    write_text(out / "demo.md", report)
    write_bytes(out / "importance.png", picture)
    seconds = time.perf_counter() - started
    _say(f"{seconds:.0f} s; in {out}: models, demo.md, importance.png, runs.jsonl")
    if not passed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    console().print(line, highlight=False, soft_wrap=True)


def _source(task: Task, seed: int, steps: int) -> Run:
    return Run(
        label="source",
        spec=_ARMS["source"],
        task=task,
        model=_MODEL,
        training=Training(steps=steps, curriculum=0.0),
        mlp=0,
        rate=_RATE,
        seed=seed,
    )


def _after(source: Run, more: int) -> list[Run]:
    """Describes how source and converted model are trained on: alike but for what they are."""
    changes = {
        "training": source.training.model_copy(update={"steps": more}),
        "rate": _RATE_AFTER,
        "plasticity_rate": _PLASTICITY_RATE,
        "before": source,
    }
    return [
        source.model_copy(update=changes | {"label": arm, "spec": s}) for arm, s in _ARMS.items()
    ]


def _folder(out: Path, run: Run) -> Path:
    return out / f"{run.task.name}-{run.seed}"


def _kept(out: Path, run: Run) -> Path:
    """Names the folder of what a run has trained."""
    return _folder(out, run) / _model_name(run).replace(", ", "-").replace(" ", "-")


def _work_off(sources: Sequence[Run], more: int, store: Store, jobs: int) -> None:
    """Does what the folder does not hold yet: trains and converts sources, then trains both on."""
    queued: set[str] = set()

    def ready() -> list[Run]:
        found = []
        for source in sources:
            wanted = _after(source, more) if source.key in store.results else [source]
            found += [r for r in wanted if r.key not in store.results and r.key not in queued]
        queued.update(r.key for r in found)
        return found

    def go_on(result: dict[str, Any]) -> list[Run]:
        store.add(result)
        return ready()

    lost: list[str] = []
    screen = Console(stderr=True)
    bars = Progress(console=screen, transient=True, disable=not screen.is_terminal)
    work = functools.partial(_train, store.folder)
    events = run_all(ready(), pool=Processes(jobs), more=go_on, work=work)
    with bars, closing(events):
        tasks = {}
        for event in events:
            run = event.run
            name = _name(run)
            if run.key not in tasks:
                tasks[run.key] = bars.add_task(name, total=1.0)
            if isinstance(event, Finished):
                bars.remove_task(tasks.pop(run.key))
                result = event.result
                _say(f"{name}: {100 * result['accuracy']:.1f} %, {result['seconds']:.0f} s")
                if run.before is None:
                    _say(result["conversion"]["command"])
            elif isinstance(event, Failed):
                _say(f"{name}: {event.reason}")
                if not event.again:
                    lost.append(name)
            else:
                what = f"{name}, loss {event.loss:.2f}"
                bars.update(tasks[run.key], completed=event.share, description=what)
    if lost:
        raise CompareError(f"{len(lost)} runs failed; the same command tries them again")


def _model_name(run: Run) -> str:
    return run.label if run.before is None else f"{run.label}, trained on"


def _name(run: Run) -> str:
    return f"{run.task.name}, seed {run.seed}: {_model_name(run)}"


def _train(out: Path, run: Run, progress: Callable[[float, float], None]) -> dict[str, Any]:
    """Trains a new source and converts it, or trains on what a folder holds; saves the model."""
    model = _start(run) if run.before is None else _load(_folder(out, run) / run.label)
    started, cpu = time.perf_counter(), time.process_time()
    fit(_Logits(model), run, progress)
    points = evaluate(_Logits(model), run)
    model.save_pretrained(_kept(out, run))
    converted = {} if run.before else {"conversion": _convert(_folder(out, run))}
    return converted | {
        "key": run.key,
        "task": run.task.name,
        "seed": run.seed,
        "model": _model_name(run),
        "accuracy": points[0]["accuracy"],
        "points": points,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }


def _transformers() -> Any:
    with extra("all"):
        import transformers

    import glazoo.models  # noqa: F401  (registers the converted model's classes)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _load(folder: Path) -> Any:
    return _transformers().AutoModelForCausalLM.from_pretrained(folder)


class _Logits(nn.Module):
    """A model of transformers that gives logits and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T N"]:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def _start(run: Run) -> Any:
    """Makes a Mamba2 of transformers that starts as a working associative memory."""
    transformers = _transformers()
    shape = shape_for(run.spec, run.model)
    torch.manual_seed(run.seed)
    config = transformers.Mamba2Config(
        vocab_size=run.task.interface,
        hidden_size=run.model.width,
        num_hidden_layers=run.model.layers,
        num_heads=shape.heads,
        head_dim=shape.value_size,
        state_size=shape.key_size,
        n_groups=shape.heads,
        expand=shape.heads * shape.value_size // run.model.width,
        chunk_size=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.Mamba2ForCausalLM(config)
    for layer in model.backbone.layers:
        _align(layer.mixer)
    return model


@torch.no_grad()
def _align(mixer: Any) -> None:
    """Starts a mixer so that training measures what its memory holds, rather than how long it takes
    to find the circuit: as transformers draws it, it is at 5 to 14 percent after 300 steps.

    - Decays are slow in all heads, and the skip is zero.
    - The convolution gives a value its own token, and a key and a query the three tokens before.
    - A query has its key's parameters, and what is read comes back as the value went in.
    """
    inner, keys = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    _, value, key, query, _ = mixer.in_proj.weight.split(
        [inner, inner, keys, keys, mixer.num_heads]
    )
    nn.init.orthogonal_(value)
    nn.init.orthogonal_(key)
    query.copy_(key)
    mixer.out_proj.weight.copy_(value.T)
    taps = mixer.conv1d.weight.squeeze(1).zero_()
    taps[:inner, -1] = 1.0
    taps[inner:, :-1] = 0.5
    mixer.conv1d.bias.zero_()
    mixer.A_log.copy_(torch.linspace(0.01, 0.16, mixer.num_heads).log())
    mixer.dt_bias.fill_(math.log(math.expm1(0.1)))
    mixer.D.zero_()


def _convert(folder: Path) -> dict[str, Any]:
    """Runs the command line, as a user would."""
    arguments = ["convert", str(folder / "source"), str(folder / "converted"), "--verify"]
    arguments.append("--force")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "glazoo", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if not done.stdout:
        raise CompareError(f"the conversion failed: {done.stderr.strip()}")
    report = loads(done.stdout)
    verified = report["verify"]
    return {
        "command": f"glazoo {' '.join(arguments)}",
        "passed": verified["passed"],
        "max_logit_change": max(c["max_difference"] or 0.0 for c in verified["checks"]),
        "state_bytes": [report["state_bytes_source"], report["state_bytes_converted"]],
    }


def _row(task: Task, sources: Sequence[Run], more: int, results: dict[str, Any]) -> dict[str, Any]:
    """Return a task's accuracies in percent, by model, one per seed."""
    row: dict[str, Any] = {"task": task.name}
    for source in sources:
        for run in (source, *_after(source, more)):
            if run.task.name == task.name:
                accuracy = 100 * results[run.key]["accuracy"]
                row.setdefault(_model_name(run), []).append(accuracy)
    return row


def _report(
    rows: Sequence[dict[str, Any]],
    conversions: Sequence[dict[str, Any]],
    more: int,
    found: Sequence[float],
) -> str:
    """Writes the results as Markdown."""
    models = list(rows[0])[1:]
    cells = []
    for row in rows:
        _, source, converted = (row[m] for m in models)
        difference = interval([b - a for a, b in zip(source, converted, strict=True)])
        means = [interval(row[m]).text(1) for m in models]
        cells.append([row["task"], *means, difference.signed(1)])
    seeds = len(rows[0][models[0]])
    before, after = conversions[0]["state_bytes"]
    change = max(c["max_logit_change"] for c in conversions)
    verdict = "agree" if all(c["passed"] for c in conversions) else "DIFFER"
    plain, own, other = (f"{100 * f:.0f} %" for f in found)
    return "\n".join(
        [
            f"transformers' Mamba2ForCausalLM and its conversion, both trained on alike for {more} "
            "steps: accuracy in percent",
            "",
            *markdown_table(["task", *models, "difference by seed"], cells, right=True),
            "",
            f"- Seeds: {seeds}{', with 95 % intervals' * (seeds > 1)}. State of a sequence: "
            f"{before:,} bytes, converted {after:,}.",
            f"- At conversion the models {verdict} within float32 rounding: logits change by "
            f"{change:.1e} at most (prefill, padding, cached decoding, continuation, greedy and "
            "beam search).",
            f"- Queries find {plain} of the records by keys alone, {own} by keys over their "
            f"importance, {other} with the importance of another context.",
            "",
        ]
    )


@torch.no_grad()
def _look(folder: Path) -> tuple[bytes, list[float]]:
    """Measures what importance does in a converted model.

        q_i . k_j ;   q_i . (k_j / I) ;   q_i . (k_j / I of another context),   summed over heads

    Returns:
        A picture, PNG, and the share of queries for which the record that they ask for has the
        largest of these, each.
    """
    model = _load(folder).eval()
    step, load = _TASK.fields + 1, _TASK.load
    inputs = draw(_TASK, 240, generator("picture")).inputs[:, : step * load]
    fields = inputs.unflatten(1, (-1, step))[..., :-1]
    telling, order = (fields != fields[:, :1]).any(1).int().argmax(1).sort(stable=True)
    inputs = inputs[order]

    seen: list[Observation] = []
    model.backbone.layers[0].mixer.observer = seen.append
    model(input_ids=inputs, use_cache=False)
    accumulated = seen[0].state.importance
    assert accumulated is not None
    importance = 1 + accumulated / seen[0].prior[:, None]
    # The convolution reaches back over one record: its query is its fields and a blank.
    last = torch.arange(step - 1, step * load, step)
    asked = inputs.index_fill(1, last, _TASK.filler[0])
    (key, _), (_, query) = _projected(model, inputs), _projected(model, asked)
    reads = [
        torch.einsum("nihk,njhk->nij", query[:, last], key[:, last] / weight[:, None])
        for weight in (torch.ones_like(importance), importance, importance.roll(1, 0))
    ]
    found = [float((r.argmax(-1) == torch.arange(load)).float().mean()) for r in reads]
    return _draw(
        importance, telling, [r[0] / r[0].diagonal()[:, None] for r in reads], found
    ), found


def _draw(
    importance: Float[Tensor, "N H K"],
    telling: Int[Tensor, " N"],
    reads: Sequence[Float[Tensor, "R R"]],
    found: Sequence[float],
    contexts: int = 6,
) -> bytes:
    """Draws the importance of key channels after some contexts, sorted by the field that tells
    their records apart, and what the queries of one context read."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds = range(_TASK.fields)
    rows = torch.cat([(telling == f).nonzero()[:contexts, 0] for f in kinds])
    heads, keys = importance.shape[1:]
    titles = "query . key", "query . (key / importance)", "with another context's importance"
    with style():
        figure = Figure(figsize=(14, 4.2))
        axes: Any = figure.subplots(1, 4, width_ratios=[2.2, 1, 1, 1])
        for ax in axes:
            ax.grid(False)
            ax.tick_params(length=0)
        shown = importance[rows].flatten(1).numpy()
        image = axes[0].imshow(shown, cmap="cividis", norm=LogNorm(), aspect="auto")
        figure.colorbar(image, ax=axes[0], pad=0.02)
        axes[0].set_title(f"importance of key channels after {len(rows)} contexts, over the prior")
        axes[0].set_xlabel(f"key channel, {heads} heads of {keys}")
        axes[0].set_yticks(
            [contexts * (f + 0.5) - 0.5 for f in kinds], [f"field {f + 1}\ntells" for f in kinds]
        )
        for f in kinds[1:]:
            axes[0].axhline(contexts * f - 0.5, color="white", linewidth=2)
        for h in range(1, heads):
            axes[0].axvline(keys * h - 0.5, color="white", linewidth=2)
        for ax, title, read, share in zip(axes[1:], titles, reads, found, strict=True):
            image = ax.imshow(read.numpy(), cmap="cividis", vmin=0, vmax=1)
            ax.set_title(f"{title}\nfinds {100 * share:.0f} % of the records")
            ax.set_xlabel("record")
            ax.set_xticks([])
            ax.set_yticks([])
        axes[1].set_ylabel("query of record")
        figure.colorbar(
            image, ax=axes[1:], pad=0.02, shrink=0.75, label="read, over the own record"
        )
        return encoded(figure)


def _projected(model: Any, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T G K"]]:
    """Return the keys and queries of the first mixer."""
    block = model.backbone.layers[0]
    mixer, width = block.mixer, block.mixer.n_groups * block.mixer.ssm_state_size
    _, mixed, _ = mixer.in_proj(block.norm(model.backbone.embeddings(tokens))).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1
    )
    mixed = F.silu(mixer.conv1d(mixed.mT)[..., : tokens.shape[1]].mT)
    _, *parts = mixed.split([mixer.intermediate_size, width, width], -1)
    return [part.unflatten(-1, (mixer.n_groups, -1)) for part in parts]


if __name__ == "__main__":
    with refusals():
        typer.run(demo)
