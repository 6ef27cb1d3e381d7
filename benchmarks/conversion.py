r"""Which conversion pays: every Bayesian form of trained sources beside their controls.

    python benchmarks/conversion.py run --jobs 2                      the tasks, on CPUs
    python benchmarks/conversion.py run language --text TEXT --device cuda --jobs 5
    python benchmarks/conversion.py run --cluster slurm --jobs 32     on a cluster (glazoo[cluster])
    python benchmarks/conversion.py report                            tables and pictures

A source is trained; then the same weights are trained on for the same further steps, on the same
data, as they are and as each of their metaplastic forms; and sources with more key channels are
trained and trained on beside them, so that a form meets a source with at least its state. Runs are
paired by seed. Rates of further training are those that were best on a seed that is not reported,
for the source and two of its forms by task (`static` as `records`, `recall` as `overwriting`) and
source; `--no-select` takes the ones of `records` from Mamba2 for every row, as the language model
does, whose rates were not chosen.

A repeat goes on where the last one stopped. Runs go to `--out`, a line each; weights stay in
`--work`.
The language model reads bytes; its text is the one of `benchmarks/language_model.py`.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import glazoo
from glazoo.advise import FORMS as ADVISED
from glazoo.advise import (
    LEAST,
    LEAST_FALL,
    Prediction,
    Written,
    best_opening,
    key_use,
    opened,
    recommended,
)
from glazoo.advise import predict as advised
from glazoo.compare.commands.options import ClusterOptions, OnCluster
from glazoo.compare.files import make_folder, write_bytes
from glazoo.compare.model import Model, ModelConfig, shape_for
from glazoo.compare.store import Store
from glazoo.compare.tasks import Batch, Task, draw, generator
from glazoo.compare.train import Run, Training, evaluate_batch, evaluation_data, fit
from glazoo.compare.workers import Failed, Finished, pool_for, run_all
from glazoo.converters.calibration import turn
from glazoo.layers import gates, set_plasticity
from glazoo.layers.conversion import metaplastic_layers
from glazoo.layers.gates import GateModule
from glazoo.layers.plasticity import Observation
from glazoo.plotting import COLORS, encoded, style
from glazoo.spec import Spec
from glazoo.stats import interval, paired
from glazoo.terminal import markdown_table

RESULTS = Path(__file__).parent / "results" / "conversion"
WORK = Path("build/conversion")
RANK = 16
SELECTION_SEED = 1000

FORMS: dict[str, dict[str, Any]] = {**ADVISED, "per key (open)": {}}
"""Conversions. `rotated` has its axes from the source's keys on training data. `per key (open)`
starts as the paper's authors convert: b at 0.66 of its rate, the prior fixed at one, and decay and
write gates as they are drawn."""

ALONE = ("per key", "full")
"""Forms that are also tuned by their gates alone."""

OPEN = 0.66


class Row(Run):
    """A run of this experiment."""

    opened: bool = False
    """Whether a conversion starts open, with gates anew."""
    alone: bool = False
    """Whether the gates of a conversion are trained and nothing else."""

    @functools.cached_property
    def key(self) -> str:
        """Identifies the run by what determines its result up to rounding."""
        described = self.model_dump(mode="json", exclude={"label", "before", "impl", "device"})
        del described["model"]["name"], described["task"]["text"]
        if not self.alone:
            # Runs that were done before there was a choice keep their keys.
            del described["alone"]
        described["before"] = None if self.before is None else self.before.key
        text = json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Setting:
    """A task, the model that learns it, and how."""

    task: Task
    model: ModelConfig
    training: Training
    rate: float
    tuning: Training
    tuning_rate: float
    rates_of: str
    """The setting on which rates of further training are chosen."""
    plasticity: float = 10.0
    """Share of the rate that the plasticity gets, where none is chosen."""


def _settings() -> dict[str, Setting]:
    quick = {"training": Training(steps=400), "rate": 1.2e-2, "tuning_rate": 4e-3}
    quick["tuning"] = Training(steps=200, curriculum=0.0)
    small = ModelConfig(key_size=6, value_size=16)
    records: dict[str, Any] = {
        "model": ModelConfig(key_size=8, value_size=16, mlp=0, start="window"),
        "training": Training(steps=300, curriculum=0.0),
        "rate": 1.2e-2,
        "tuning": Training(steps=200, curriculum=0.0),
        "tuning_rate": 6e-3,
        "rates_of": "records",
    }
    pairs = {"vocab": 128, "load": 40}
    fields = {"vocab": 81, "length": 96, "load": 12}
    line = {"load": 16, "length": 64, "channels": 8, "anisotropy": 10.0, "noise": 0.5}
    regression: dict[str, Any] = quick | {
        "model": ModelConfig(key_size=8, value_size=16, start="token"),
        "rates_of": "regression",
    }
    return {
        "records": Setting(Task(name="records", **fields), **records),
        "overwriting": Setting(
            Task(name="overwriting", length=240, **pairs), small, **quick, rates_of="overwriting"
        ),
        "regression": Setting(Task(name="regression", **line), **regression),
        "static": Setting(Task(name="static", **fields), **records),
        "recall": Setting(
            Task(name="mqar", length=160, **pairs), small, **quick, rates_of="overwriting"
        ),
    }


TASKS = _settings()
LANGUAGE_STEPS = 2400
LANGUAGE = ModelConfig(width=192, layers=3, heads=4, key_size=32, value_size=48, mlp=512)


def language(text: Path, steps: int, tuning: int) -> Setting:
    """Return the setting of a language model like that of `benchmarks/language_model.py`."""
    common = {"curriculum": 0.0, "decay": 0.01, "momentum": (0.9, 0.999)}
    return Setting(
        Task(name="text", length=256, text=text),
        LANGUAGE,
        Training(steps=steps, batch=32, warmup=0.1, eval_examples=128, **common),
        4e-3,
        Training(steps=tuning, batch=8, warmup=0.1, eval_examples=128, **common),
        # A source that is trained on at a tenth of its rate gets worse in 100 steps.
        1.5e-4,
        "language",
        plasticity=50.0,
    )


@dataclass(frozen=True)
class Line:
    """A row of the table: what is done to a source."""

    label: str
    form: str | None = None
    keys: int | None = None
    """Key channels of a wider source."""

    @property
    def candidates(self) -> tuple[tuple[float, float], ...]:
        """Multiples of the setting's rate, and shares of it for the plasticity, to choose from."""
        if self.form is None:
            return (0.5, 1.0), (1.0, 1.0), (2.0, 1.0)
        return (1.0, 1.0), (1.0, 10.0), (2.0, 10.0)


RATED = (Line("trained on"), Line("per key", "per key"), Line("full", "full"))
"""Rows of which rates are chosen; the others have those of the one that is most like them."""


def converted(source: Spec, form: str) -> Spec | None:
    """Return a form of a source, or None where it has none."""
    try:
        return glazoo.metaplasticize(source, rank=RANK, **FORMS[form])
    except glazoo.SpecError:
        return None


def rated(source: str) -> list[Line]:
    """List the rows of a source of which rates are chosen."""
    spec = glazoo.load(source)
    return [x for x in RATED if x.form is None or converted(spec, x.form) is not None]


def lines(source: Spec, setting: Setting) -> list[Line]:
    """List the rows of a source: itself, its forms, and sources with at least the state of the two
    largest of these."""
    forms = {f: spec for f in FORMS if (spec := converted(source, f)) is not None}
    out = [Line("trained on"), *(Line(f, f) for f in forms)]
    out += [Line(f"{f} (gates alone)", f) for f in ALONE if f in forms]
    for form in ("full", "per synapse"):
        if form not in forms or (setting.task.name == "text" and form == "per synapse"):
            continue
        wanted = shape_for(forms[form], setting.model).state_bytes
        keys = setting.model.key_size or 1
        while shape_for(source, _wider(setting.model, keys)).state_bytes < wanted:
            keys += 1
        out.append(Line(f"bytes of {form}", keys=keys))
    return out


def _wider(model: ModelConfig, keys: int | None) -> ModelConfig:
    return model if keys is None else model.model_copy(update={"key_size": keys})


@dataclass(frozen=True)
class Experiment:
    """All runs that are wanted."""

    settings: Mapping[str, Setting]
    sources: tuple[str, ...]
    seeds: int
    select: bool
    impl: str
    device: str
    first: int = 0
    """First of the reported seeds."""
    only: tuple[str, ...] = ()
    """Labels of rows; all if there are none."""

    def _setting(self, name: str) -> Setting:
        """Return a setting of which there are runs, if only to choose rates."""
        return self.settings[name] if name in self.settings else TASKS[name]

    def _chooser(self, name: str) -> str | None:
        """Return the setting whose runs say the rates of another one."""
        chosen = self.settings[name].rates_of
        return chosen if self.select and chosen in {*self.settings, *TASKS} else None

    def _source(self, name: str, source: str, keys: int | None, seed: int) -> Row:
        setting = self._setting(name)
        return Row(
            label=f"{name}: {source}, before" + ("" if keys is None else f", K {keys}"),
            spec=glazoo.load(source),
            task=setting.task,
            model=_wider(setting.model, keys),
            training=setting.training,
            mlp=setting.model.mlp,
            rate=setting.rate,
            seed=seed,
            selection=seed >= SELECTION_SEED,
            kept=True,
            impl=self.impl,
            device=self.device,
        )

    def row(
        self, name: str, source: str, line: Line, choice: tuple[float, float], seed: int
    ) -> Row:
        """Return the run of a row at a choice of rates."""
        setting, before = self._setting(name), self._source(name, source, line.keys, seed)
        spec = before.spec if line.form is None else converted(before.spec, line.form)
        assert spec is not None
        change = {
            "label": f"{name}: {source}, {line.label}",
            "spec": spec,
            "training": setting.tuning,
            "rate": setting.tuning_rate * choice[0],
            "plasticity_rate": choice[1],
            "before": before,
            "kept": False,
            "opened": "open" in line.label,
            "alone": line.label.endswith("(gates alone)"),
        }
        return before.model_copy(update=change)

    def _default(self, name: str, line: Line) -> tuple[float, float]:
        """Return the best rates of seed 1000 on records, from mamba2, of every row of it."""
        return 2.0, 1.0 if line.form is None else self.settings[name].plasticity

    def choice(
        self, name: str, source: str, line: Line, results: Mapping[str, Any]
    ) -> tuple[float, float] | None:
        """Return the rates of a row, by the loss of a seed that is not reported; None if the runs
        that say so are missing."""
        if (chooser := self._chooser(name)) is None:
            return self._default(name, line)
        losses = {}
        label = {None: "trained on", "full": "full"}.get(line.form, "per key")
        like = next((x for x in rated(source) if x.label == label), None)
        if like is None:
            return self._default(name, line)
        for candidate in like.candidates:
            found = results.get(self.row(chooser, source, like, candidate, SELECTION_SEED).key)
            if found is None:
                return None
            losses[candidate] = math.inf if found["diverged"] else found["loss"]
        return min(losses, key=losses.__getitem__)

    def wanted(self, results: Mapping[str, Any]) -> Iterator[Row]:
        """Yield every run whose rates are known, in the order of their worth."""
        choosers = dict.fromkeys(map(self._chooser, self.settings))
        for name, source in itertools.product(choosers, self.sources):
            for line in () if name is None else rated(source):
                yield self._source(name, source, line.keys, SELECTION_SEED)
                for candidate in line.candidates:
                    yield self.row(name, source, line, candidate, SELECTION_SEED)
        for name in self.settings:
            for seed in range(self.first, self.first + self.seeds):
                for source, line in self.of(name):
                    chosen = self.choice(name, source, line, results)
                    yield self._source(name, source, line.keys, seed)
                    if chosen is not None:
                        yield self.row(name, source, line, chosen, seed)

    def of(self, name: str) -> Iterator[tuple[str, Line]]:
        """Yield every source and row of a setting."""
        for source in self.sources:
            for line in lines(glazoo.load(source), self.settings[name]):
                if not self.only or line.label in self.only:
                    yield source, line


class Logits(nn.Module):
    """A language model as `fit` takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


def new(run: Row) -> nn.Module:
    """Make a run's source as it starts."""
    source = run if run.before is None else run.before
    torch.manual_seed(run.seed)
    if run.task.name != "text":
        return Model(source.spec, source.model, run.task.interface, mlp=run.mlp, impl=run.impl)
    from glazoo.models import GlazooConfig, GlazooForCausalLM

    n = source.model
    config = GlazooConfig(
        pattern=source.spec,
        vocab_size=256,
        hidden_size=n.width,
        num_hidden_layers=n.layers,
        intermediate_size=n.mlp,
        num_heads=n.heads,
        head_k_dim=n.key_size,
        head_v_dim=n.value_size,
        tie_word_embeddings=True,
        impl=run.impl,
    )
    return Logits(GlazooForCausalLM(config))


@torch.no_grad()
def _opened(model: nn.Module) -> None:
    set_plasticity(model, OPEN)
    for _, gate in gates(model):
        assert gate.ip_log is not None
        gate.ip_log.requires_grad_(False)
    for layer, _, _ in metaplastic_layers(model):
        for name, part in layer.named_children():
            if isinstance(part, GateModule) and name in ("decay", "write"):
                part.reset_parameters()


def _inputs(run: Row, count: int) -> Tensor:
    return draw(run.task, count, generator("axes", run.seed, run.training.data_seed)).inputs


@torch.no_grad()
def observe(model: nn.Module, run: Row, inputs: Tensor) -> list[Observation]:
    """Return what every layer of a metaplastic model does with some sequences."""
    seen: list[Observation] = []
    layers: list[Any] = [layer for layer, _, _ in metaplastic_layers(model)]
    model.eval()
    for layer in layers:
        layer.observer = seen.append
    model(inputs.to(run.device))
    for layer in layers:
        layer.observer = None
    model.train()
    return seen


def _calibrate(model: nn.Module, run: Row) -> None:
    here = {gate.layer: gate for _, gate in gates(model)}
    for seen in observe(model, run, _inputs(run, 64 if run.task.name == "text" else 256)):
        k = seen.keys.double().flatten(0, 1)
        turn(here[seen.layer], torch.einsum("thi,thj->hij", k, k) / len(k))


def file_of(run: Run, folder: Path) -> Path:
    """Return where a run's weights are kept."""
    return folder / "weights" / f"{run.key}.pt"


def start(run: Row, folder: Path) -> nn.Module:
    """Make a run's model, with the weights that it goes on from, converted."""
    model = new(run)
    if run.before is None:
        return model.to(run.device)
    weights = torch.load(file_of(run.before, folder), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    model.to(run.device)
    assert isinstance(run, Row)
    if run.spec == run.before.spec:
        return model
    form = next(f for f in FORMS if converted(run.before.spec, f) == run.spec)
    glazoo.metaplasticize(model, rank=RANK, **FORMS[form])
    if FORMS[form].get("basis") == "rotated":
        _calibrate(model, run)
    if run.opened:
        _opened(model)
    if run.alone:
        added = {p for _, gate in gates(model) for p in gate.parameters() if p.requires_grad}
        model.requires_grad_(False)
        for p in added:
            p.requires_grad_(True)
    return model


# Of the language model: bytes of a window that is read at once, and where its loss is cut.
WINDOW = 4096
CUTS = (0, 256, 512, 1024, 2048, 4096)
WINDOWS = 24
RARE = 50
NEEDLES = 8
DISTANCES = (512, 1024, 2048, 4096)


@functools.lru_cache(maxsize=1)
def _held_out(text: Path) -> tuple[np.ndarray[Any, Any], frozenset[bytes]]:
    """Return the windows of the held-out text, and the words that are rare in the training text."""
    data = text.read_bytes()
    border = len(data) * 9 // 10
    part = np.frombuffer(data[border:], np.uint8)
    starts = np.linspace(0, len(part) - WINDOW - 1, WINDOWS).astype(int)
    windows = np.stack([part[s : s + WINDOW + 1] for s in starts])
    counts = collections.Counter(re.findall(rb"[A-Za-z]{5,}", data[:border]))
    known = frozenset(w for w, n in counts.items() if n > RARE)
    return windows, known


def _occurrences(window: bytes, known: frozenset[bytes]) -> tuple[list[int], list[int]]:
    """Return the places of rare words' bytes, of first occurrences and of later ones, without the
    first two bytes, which nothing can tell."""
    seen: set[bytes] = set()
    first: list[int] = []
    later: list[int] = []
    for found in re.finditer(rb"[A-Za-z]{5,}", window):
        if found.group() in known:
            continue
        (later if found.group() in seen else first).extend(range(found.start() + 2, found.end()))
        seen.add(found.group())
    return first, later


def _needles(windows: np.ndarray[Any, Any], length: int) -> tuple[Tensor, Tensor]:
    """Hide a word in a text and ask for it at the end: bytes, [N, length], and where the answer is.

    The place is drawn from the first half, so that the distance is at least half of the length.
    """
    rng = np.random.default_rng(length)
    rows = []
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    for i in range(NEEDLES):
        name, word = (bytes(rng.choice(letters, 6)) for _ in range(2))
        fact = b"\n\nThe secret word of " + name + b" is " + word + b".\n\n"
        ask = b"\n\nThe secret word of " + name + b" is " + word
        hay = bytes(windows[i % len(windows)][: length - len(fact) - len(ask)])
        at = int(rng.integers(0, len(hay) // 2 + 1))
        rows.append(np.frombuffer(hay[:at] + fact + hay[at:] + ask, np.uint8))
    return torch.from_numpy(np.stack(rows)).long(), torch.arange(length - 6, length)


@torch.no_grad()
def read(model: nn.Module, run: Row) -> dict[str, Any]:
    """Measure a language model on held-out text: nats a byte by place, of rare words, and of a
    needle."""
    assert run.task.text is not None
    windows, known = _held_out(run.task.text)
    model.eval()

    def losses(tokens: Tensor) -> tuple[Tensor, Tensor]:
        found, right = [], []
        for part in tokens.split(4):
            part = part.to(run.device)
            logits = model(part[:, :-1]).float()
            of = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(of.view(part.shape[0], -1).cpu())
            right.append((logits.argmax(-1) == part[:, 1:]).cpu())
        return torch.cat(found), torch.cat(right)

    by_place, _ = losses(torch.from_numpy(windows).long())
    out: dict[str, Any] = {
        "loss": float(by_place.mean()),
        "by_window": [round(float(x), 5) for x in by_place.mean(1)],
        "by_place": {
            f"{a}-{b}": float(by_place[:, a:b].mean()) for a, b in itertools.pairwise(CUTS)
        },
    }
    kinds: list[list[float]] = [[], []]
    for i, window in enumerate(windows):
        for kind, places in zip(kinds, _occurrences(bytes(window), known), strict=True):
            kind += [float(by_place[i, p - 1]) for p in places if p > 0]
    out["rare_first"], out["rare_later"] = (fmean(k) for k in kinds)
    out["rare_bytes"] = [len(k) for k in kinds]
    out["needle"] = {}
    for length in DISTANCES:
        tokens, answer = _needles(windows, length)
        found, right = losses(tokens)
        # Where nothing is known, a letter costs log 26 = 3.26 nats.
        out["needle"][str(length)] = {
            "loss": float(found[:, answer - 1].mean()),
            "letters": float(right[:, answer - 1].float().mean()),
        }
    model.train()
    return out


def _measure(model: nn.Module, run: Row) -> dict[str, Any]:
    if run.task.name == "text":
        found = read(model, run)
        return found | {"accuracy": math.exp(-found["loss"])}
    batch = evaluation_data(run.task, run.training.eval_examples)[run.task.load, run.task.length]
    return evaluate_batch(model, batch, run.device)


def work(
    run: Row, progress: Callable[[float, float], None] | None = None, *, folder: Path
) -> dict[str, Any]:
    """Do one run, and give its result as plain data."""
    torch.set_float32_matmul_precision("high")
    began, cpu = time.perf_counter(), time.process_time()
    model = start(run, folder)
    at_first = None if run.before is None else _measure(model, run)
    fitted = fit(model, run, progress, partial=folder / "partial" / f"{run.key}.pt")
    found = _measure(model, run)
    result = found | {
        "key": run.key,
        "label": run.label,
        "before": None if run.before is None else run.before.key,
        "seed": run.seed,
        "selection": run.selection,
        "rate": run.rate,
        "plasticity_rate": run.plasticity_rate,
        "steps": run.training.steps,
        "at_first": at_first,
        "diverged": fitted.diverged,
        "state_bytes": run.model.layers * shape_for(run.spec, run.model).state_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plasticity": [
            round(float(x), 4)
            for _, gate in gates(model)
            if (kappa := gate.kappa()) is not None
            for x in kappa.detach()
        ],
        "curve": fitted.curve,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "device": run.device,
    }
    if run.kept:
        path = file_of(run, folder)
        make_folder(path.parent)
        torch.save(model.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return result


app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Name the commands."""


@app.command(name="run")
def run_command(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks, or language; all tasks.")
    ] = None,
    sources: Annotated[str, typer.Option(help="Sources.")] = "mamba2,gated_deltanet,kda",
    seeds: Annotated[int, typer.Option(min=1, help="Reported seeds.")] = 4,
    only: Annotated[str, typer.Option(help="Rows, like 'trained on,full'. Default: all.")] = "",
    first: Annotated[int, typer.Option(min=0, help="First of them.")] = 0,
    train: Annotated[bool, typer.Option(help="Train sources whose weights are missing.")] = True,
    select: Annotated[bool, typer.Option(help="Choose rates on another seed.")] = True,
    text: Annotated[Path | None, typer.Option(help="A text, of the language model.")] = None,
    steps: Annotated[int, typer.Option(help="Of the language model's source.")] = LANGUAGE_STEPS,
    tuning: Annotated[str, typer.Option(help="Its further steps.")] = "100,1000",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    cluster: OnCluster = None,
    cluster_option: ClusterOptions = None,
    device: Annotated[str, typer.Option()] = "cpu",
    impl: Annotated[str, typer.Option(help="Engine.")] = "auto",
    minutes: Annotated[float, typer.Option(help="Stop after these.")] = math.inf,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = RESULTS,
    weights: Annotated[Path, typer.Option("--work", help="Folder of weights.")] = WORK,
) -> None:
    """Do the runs that are missing."""
    names = tasks or list(TASKS)
    settings = {n: TASKS[n] for n in names if n != "language"}
    if "language" in names:
        if text is None:
            raise typer.BadParameter("the language model needs a --text")
        of = "" if steps == LANGUAGE_STEPS else f" of {steps:,} steps"
        for n in map(int, tuning.split(",")):
            settings[f"language{of}, {n} steps"] = language(text.absolute(), steps, n)
    chosen, rows = tuple(sources.split(",")), tuple(x.strip() for x in only.split(",") if x.strip())
    experiment = Experiment(settings, chosen, seeds, select, impl, device, first, rows)
    end = time.monotonic() + 60 * minutes
    with Store(out, {"format": 1}) as store:
        started: set[str] = set()
        finished: set[str] = set()

        def ready() -> list[Run]:
            """Return the next runs, as many as processes are free: so that what goes on from a
            source comes before the next seed."""
            wanted = list(experiment.wanted(store.results))
            # A source whose weights are gone is trained again if something goes on from it.
            needed = {r.before.key for r in wanted if r.before and r.key not in store.results}
            found: list[Run] = []
            for run in wanted:
                kept = run.before is None and run.key in needed
                done = run.key in store.results and (not kept or file_of(run, weights).exists())
                known = run.before is None or file_of(run.before, weights).exists()
                free = len(started) - len(finished) < jobs
                known &= train or run.before is not None
                if free and known and not done and run.key not in started:
                    started.add(run.key)
                    found.append(run)
            return found

        def more(result: dict[str, Any]) -> list[Run]:
            finished.add(result["key"])
            store.add(result)
            return ready()

        options, failed = cluster_option or (), 0
        at_work = functools.partial(work, folder=weights.absolute())
        # Runs that follow a failed one are nobody's: they start anew.
        while time.monotonic() < end and (runs := ready()):
            pool = pool_for(cluster, weights.absolute(), jobs=jobs, device=device, options=options)
            with closing(run_all(runs, pool=pool, more=more, work=at_work, until=end)) as events:
                for event in events:
                    if isinstance(event, Finished):
                        r = event.result
                        print(
                            f"{r['label']}, seed {r['seed']}: {r['accuracy']:.4f}, "
                            f"loss {r['loss']:.4f} ({r['seconds']:.0f} s)",
                            flush=True,
                        )
                    if isinstance(event, Failed):
                        finished.update(() if event.again else (event.run.key,))
                        failed += not event.again
                        print(f"{event.run.label}: {event.reason}", flush=True)
        if time.monotonic() > end:
            print("out of time: repeat the command to go on")
    if failed:
        print(f"{failed} runs failed: repeat the command to try them again")
        raise typer.Exit(1)


@app.command()
def predict(
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    seeds: Annotated[int, typer.Option(min=2, help="Draws of a measurement.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = RESULTS,
    weights: Annotated[Path, typer.Option("--work", help="Folder of weights.")] = WORK,
) -> None:
    """Measure what untrained memories hold of every source's own keys, and what opening the gates
    of every form does to its loss, beside what training gave.

    Writes `predictions.jsonl`: what `glazoo advise` would say of each source.
    """
    rows = read_rows(out)
    known = {json.loads(x)["key"] for x in _lines(out / "predictions.jsonl")}
    for row in rows:
        source, wider = source_of(row)
        task = row["label"].partition(": ")[0]
        if row["before"] is not None or row["key"] in known or task not in TASKS or wider:
            continue
        if not (weights / "weights" / f"{row['key']}.pt").exists() or row["selection"]:
            continue
        spec = glazoo.load(source)
        specs = {"source": spec} | {
            form: found
            for form in FORMS
            if "open" not in form and (found := converted(spec, form)) is not None
        }
        experiment = Experiment(TASKS, (source,), 1, False, "auto", "cpu")
        run = experiment.row(task, source, Line("per key", "per key"), (1.0, 1.0), row["seed"])
        seen = [Written.of(x) for x in observe(start(run, weights), run, _inputs(run, CONTEXTS))]
        pairs, shares = advised(seen, specs, values=16, seeds=seeds, jobs=jobs)
        use = key_use(seen[0])
        found = {
            "key": row["key"],
            "label": row["label"],
            "seed": row["seed"],
            "pairs": pairs,
            "shares": {n: [round(x, 5) for x in of] for n, of in shares.items()},
            "directions": fmean(use.directions),
            "changing": fmean(use.changing),
            "neglected": fmean(use.neglected),
            "neglected_rotated": fmean(use.neglected_rotated),
            "load": fmean(use.load),
            "opened": openings(TASKS[task], source, row["seed"], list(specs)[1:], weights),
        }
        with (out / "predictions.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        gains = {f: round(fmean(x) - fmean(shares["source"]), 3) for f, x in shares.items()}
        loss = {f: round(best_opening(x).change.mean, 4) for f, x in found["opened"].items()}
        print(f"{row['label']}, seed {row['seed']}: {pairs}, {gains}, opened {loss}", flush=True)


# How many examples room is measured on, and in how many parts those are that use is.
CONTEXTS = 32
GROUPS = 8


def openings(
    setting: Setting, source: str, seed: int, forms: Iterable[str], weights: Path
) -> dict[str, dict[float, list[float]]]:
    """Return what opening the gates of every form does to the loss of a trained source, by form and
    plasticity, for eight groups of examples."""
    experiment = Experiment({"": setting}, (source,), 1, False, "auto", "cpu")
    found = {}
    for form in forms:
        run = experiment.row("", source, Line(form, form), (1.0, 1.0), seed)
        model = start(run, weights)
        batch = evaluation_data(run.task, run.training.eval_examples)[
            run.task.load, run.task.length
        ]
        groups = [
            Batch(*(None if x is None else x[i::GROUPS] for x in batch)) for i in range(GROUPS)
        ]

        def losses(model: nn.Module = model, groups: list[Batch] = groups) -> Tensor:
            return torch.tensor([evaluate_batch(model, g, "cpu")["loss"] for g in groups])

        found[form] = opened(model, losses)
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the runs of a folder, the last of each key."""
    rows = [json.loads(line) for line in _lines(folder / "runs.jsonl")]
    return list({row["key"]: row for row in rows}.values())


def source_of(row: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the source that a row's label names, and whether it is a wider one."""
    name, _, rest = row["label"].rpartition(": ")[2].partition(", ")
    return name, rest.startswith(("before, K", "bytes of"))


def table(
    rows: Iterable[Mapping[str, Any]], column: str
) -> dict[tuple[str, str, str], dict[int, Any]]:
    """Return a column of every reported run, by task, source and row, and by seed."""
    out: dict[tuple[str, str, str], dict[int, Any]] = collections.defaultdict(dict)
    for row in rows:
        if not row["selection"]:
            task, _, rest = row["label"].rpartition(": ")
            source, _, line = rest.partition(", ")
            out[task, source, line][row["seed"]] = row[column]
    return out


def passing(curve: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> float:
    """Return the further steps after which a row is as good as the source is at its end, as the
    learning curves have it; infinity if it never is."""
    return next((c["step"] for c in curve if c["accuracy"] >= base[-1]["accuracy"]), math.inf)


def tasks_text(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for every task: accuracy of the source trained on, and of every other row the
    difference to it by seed, and the steps after which it is where the source ends."""
    accuracy, state, curves = (table(rows, x) for x in ("accuracy", "state_bytes", "curve"))
    out = []
    for task in dict.fromkeys(t for t, _, _ in accuracy):
        found = {key[1:]: x for key, x in accuracy.items() if key[0] == task}
        sources = list(dict.fromkeys(source for source, _ in found))
        labels = [x for x in dict.fromkeys(x for _, x in found) if not x.startswith("before")]
        labels.sort(key=lambda x: x != "trained on")
        counts = (len(x) for (_, label), x in found.items() if label in labels)
        seeds = collections.Counter(counts).most_common(1)[0][0]
        body = []
        for label in labels:
            here = [s for s in sources if (s, label) in found]
            sizes = [max(state[task, s, label].values()) for s in here]
            cells = []
            for source in sources:
                values = found.get((source, label))
                base = accuracy.get((task, source, "trained on"), {})
                difference = None if values is None else paired(values, base)
                if label == "trained on" and values is not None:
                    few = "" if len(values) == seeds else f" ({len(values)})"
                    cells += [interval(list(values.values())).times(100).text(1) + few, ""]
                elif values is None or difference is None:
                    cells += ["", ""]
                else:
                    few = "" if difference.seeds == seeds else f" ({difference.seeds})"
                    text = difference.times(100).signed()
                    separated = difference.seeds > 1 and difference.low * difference.high > 0
                    steps = sorted(
                        passing(curve, curves[task, source, "trained on"][seed])
                        for seed, curve in curves[task, source, label].items()
                        if seed in curves[task, source, "trained on"]
                    )
                    ends = dict.fromkeys(steps[:: len(steps) - 1 or 1])
                    cells += [
                        (f"**{text}**" if separated else text) + few,
                        " to ".join(f"{x:g}" if math.isfinite(x) else "never" for x in ends),
                    ]
            body.append((label, f"{max(sizes):,}", *cells))
        head = ("row", "state (bytes)", *(x for s in sources for x in (s, "steps")))
        out += [
            f"## {task}",
            "",
            f"Accuracy of the source trained on, in percent; of others the difference to it by "
            f"seed, {seeds} seeds or as many as stand in brackets, and the steps after which they "
            "are where it ends.",
            "",
            *markdown_table(head, body, right=True),
            "",
        ]
    return out


def language_text(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of the language models: nats a byte less those of the source trained on,
    window by window."""
    lines: list[str] = []
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        if "by_place" in row and row["before"] is not None:
            task, _, rest = row["label"].rpartition(": ")
            groups[task, rest.partition(", ")[0], row["seed"]].append(row)
    for (task, source, seed), of in groups.items():
        base = next((r for r in of if r["label"].endswith("trained on")), None)
        if base is None:
            continue
        body = []
        for row in of:
            windows = zip(row["by_window"], base["by_window"], strict=True)
            difference = interval([a - b for a, b in windows])
            body.append(
                (
                    row["label"].rpartition(", ")[2],
                    f"{row['state_bytes']:,}",
                    f"{row['at_first']['loss']:.4f}",
                    f"{row['loss']:.4f}",
                    "" if row is base else difference.signed(4),
                    *(f"{row['by_place'][place]:.3f}" for place in ("0-256", "2048-4096")),
                    f"{row['rare_first']:.3f}",
                    f"{row['rare_later']:.3f}",
                    *(f"{row['needle'][n]['loss']:.2f}" for n in ("512", "4096")),
                )
            )
        head = ("row", "state", "at first", "after", "to trained on", "bytes 0-256", "2048-4096")
        head += ("rare words, first", "again", "needle at 512", "at 4096")
        lines += [f"## {task}: {source}, seed {seed}", "", *markdown_table(head, body, right=True)]
        lines += [""]
    return lines


class Tried(NamedTuple):
    """A form of one trained source: what is measured untrained, and what training gained."""

    task: str
    source: str
    seed: int
    form: str
    room: float
    """Share of values found, less the source's."""
    use: float
    """Fall of the source's loss when gates open."""
    gain: float
    """Accuracy, less that of the source trained on."""


MEASURES = ("room", "use")
PAYS = 0.01
"""Gain in accuracy from which on a conversion has paid."""


def predictions(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return what was measured untrained, the last of each task, source and seed."""
    out = {}
    for line in _lines(folder / "predictions.jsonl"):
        found = json.loads(line)
        task, _, rest = found["label"].rpartition(": ")
        out[task, rest.partition(", ")[0], found["seed"]] = found
    return out


def tried(rows: list[dict[str, Any]], folder: Path) -> list[Tried]:
    """Return every run that has both predictions and a source that was trained on beside it."""
    accuracy = table(rows, "accuracy")
    out = []
    for (task, source, seed), found in predictions(folder).items():
        base = accuracy.get((task, source, "trained on"), {}).get(seed)
        for form, shares in found["shares"].items():
            trained = accuracy.get((task, source, form), {}).get(seed)
            if base is not None and trained is not None:
                room = fmean(shares) - fmean(found["shares"]["source"])
                # Where no kappa leaves the loss finite, it rises by more than a nat.
                use = max(-best_opening(found["opened"][form]).change.mean, -1.0)
                out.append(Tried(task, source, seed, form, room, use, trained - base))
    return out


def thresholds(runs: Sequence[Tried], measures: Sequence[str]) -> tuple[float, ...]:
    """Return the values above all of which a conversion is said to pay: of those with the fewest
    errors, the ones in the widest gaps."""
    pays = np.array([r.gain > PAYS for r in runs])
    borders, widths, above = [], [], []
    for measure in measures:
        values = np.array([getattr(r, measure) for r in runs])
        at = np.unique(values)
        # Always and never are the last to be chosen of those that err as often.
        middles = (at[:-1] + at[1:]) / 2
        borders.append(np.array([np.nextafter(at[0], -np.inf), *middles, at[-1]]))
        widths.append(np.array([0.0, *np.diff(at), 0.0]) / max(np.ptp(at), 1e-12))
        above.append(values[None] > borders[-1][:, None])
    best: tuple[float, float, tuple[float, ...]] = (math.inf, 0.0, ())
    for chosen in itertools.product(*(range(len(b)) for b in borders[:-1])):
        said = above[-1]
        width = widths[-1]
        for n, i in enumerate(chosen):
            said, width = said & above[n][i], width * widths[n][i]
        errors = (said != pays).sum(1)
        j = int(np.lexsort((-width, errors))[0])
        at_these = (*(float(borders[n][i]) for n, i in enumerate(chosen)), float(borders[-1][j]))
        best = min(best, (float(errors[j]), -float(width[j]), at_these))
    return best[2]


def said(run: Tried, measures: Sequence[str], at: Sequence[float]) -> bool:
    """Return whether a conversion is said to pay."""
    return all(getattr(run, m) > x for m, x in zip(measures, at, strict=True))


def right(runs: Sequence[Tried], measures: Sequence[str]) -> dict[str, int]:
    """Count by task the runs of which measures say whether they pay, thresholds chosen on the runs
    of all other tasks and sources."""
    count: dict[str, int] = collections.Counter()
    for group in {(r.task, r.source) for r in runs}:
        at = thresholds([r for r in runs if (r.task, r.source) != group], measures)
        for r in runs:
            if (r.task, r.source) == group:
                count[r.task] += said(r, measures, at) is (r.gain > PAYS)
    return count


def predicted_text(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """Return how well what is measured untrained predicts what training gained."""
    from scipy.stats import spearmanr

    runs = tried(rows, folder)
    if not runs:
        return []
    several = len({(r.task, r.source) for r in runs}) > 1
    counts = {m: right(runs, m) for m in (("room",), ("use",), MEASURES) if several}
    lines = []
    for task in [*dict.fromkeys(r.task for r in runs), "all tasks"]:
        of = [r for r in runs if task in (r.task, "all tasks")]
        cells = []
        for measure in MEASURES:
            values, gains = [getattr(r, measure) for r in of], [r.gain for r in of]
            varied = len({*values}) > 1 and len({*gains}) > 1
            cells.append(f"{spearmanr(values, gains).statistic:.2f}" if varied else "")
        paid = sum(r.gain > PAYS for r in of)
        for count in counts.values():
            cells.append(f"{count[task] if task in count else sum(count.values())}")
        ours = (LEAST, LEAST_FALL)
        cells.append(f"{sum(said(r, MEASURES, ours) is (r.gain > PAYS) for r in of)}")
        lines.append((task, *cells, f"{paid}", f"{len(of)}"))
    head = ("task", "rank of room", "of use")
    head += ("right by room", "by use", "by both") if several else ()
    head += ("by both, as advised",)
    at = thresholds(runs, MEASURES)
    return [
        "## What is measured untrained beside the trained gain",
        "",
        "Rank correlations with the gain of room (values found, less the source's) and of use (the "
        f"fall of the source's loss when gates open); of how many runs they say whether a gain of "
        f"more than {100 * PAYS:.0f} point follows, thresholds from the runs of all other tasks "
        "and sources, or those of `glazoo advise`; and of how many it does.",
        "",
        *markdown_table((*head, "paid", "all"), lines, right=True),
        "",
        f"Thresholds over all runs: room {100 * at[0]:.1f} points, use {at[1]:.5f} nats.",
        "",
        *advice_text(rows, folder),
    ]


def advice_text(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """Return what `glazoo advise` would say of each source, and what training gained by it."""
    accuracy, state = table(rows, "accuracy"), table(rows, "state_bytes")
    body = []
    for (task, source, seed), found in predictions(folder).items():
        shares, base = found["shares"], accuracy.get((task, source, "trained on"), {}).get(seed)
        if base is None:
            continue
        size = {
            f: 0 if f == "source" else max(state[task, source, f].values(), default=0)
            for f in shares
        }
        of = [
            Prediction(
                form,
                interval(x),
                interval([a - b for a, b in zip(x, shares["source"], strict=True)]),
                size[form],
                1.0,
                0,
                None if form == "source" else best_opening(found["opened"][form]),
            )
            for form, x in shares.items()
            if form == "source" or size[form]
        ]
        gains = {
            form: accuracy[task, source, form][seed] - base
            for form in shares
            if seed in accuracy[task, source, form]
        }
        form = recommended(of)
        if gains and (form is None or form in gains):
            best = max(gains, key=gains.__getitem__)
            told = 0.0 if form is None else gains[form]
            body.append((task, source, form, told, best, gains[best]))
    lines = []
    for key in dict.fromkeys(x[:2] for x in body):
        here = [x for x in body if x[:2] == key]
        forms = collections.Counter(x[2] or "none" for x in here)
        bests = collections.Counter(x[4] for x in here)
        lines.append(
            (
                *key,
                ", ".join(f"{f} ({n})" if len(forms) > 1 else f for f, n in forms.most_common()),
                f"{100 * fmean(x[3] for x in here):+.1f}",
                ", ".join(f"{f} ({n})" if len(bests) > 1 else f for f, n in bests.most_common()),
                f"{100 * fmean(x[5] for x in here):+.1f}",
            )
        )
    head = ("task", "source", "advised (seeds)", "its gain", "best", "gain of the best")
    text = "What `glazoo advise` says, and points that training gained by it, means over the seeds "
    text += "of which the advised form was trained."
    return ["## What is advised", "", text, "", *markdown_table(head, lines, right=True), ""]


def picture(rows: list[dict[str, Any]]) -> bytes:
    """Draw the gain of every row, the least state below: a panel for each task, a colour for each
    source, a dot for each seed, and intervals from four seeds on."""
    from matplotlib.figure import Figure

    accuracy, state = table(rows, "accuracy"), table(rows, "state_bytes")
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    times: dict[str, float] = {}
    for (task, source, line), values in accuracy.items():
        base = accuracy.get((task, source, "trained on"), {})
        gains = [100 * (x - base[seed]) for seed, x in values.items() if seed in base]
        if line == "trained on" or line.startswith("before") or not gains:
            continue
        found.setdefault(task, {}).setdefault(line, {})[source] = gains
        of = max(state[task, source, line].values())
        times.setdefault(line, of / max(state[task, source, "trained on"].values()))
    sources = list(dict.fromkeys(x for task in found.values() for of in task.values() for x in of))
    heights = [0.9 + 0.34 * len(task) for task in found.values()]
    with style():
        figure = Figure(figsize=(7.2, sum(heights)))
        grid: Any = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)
        for ax, (task, of) in zip(grid[:, 0], found.items(), strict=True):
            names = sorted(of, key=lambda n: (times[n], n))
            for at, name in enumerate(names):
                for n, source in enumerate(sources):
                    gains = of[name].get(source, [])
                    y = at + 0.5 * ((n + 0.5) / len(sources) - 0.5)
                    look = {"color": COLORS[n], "zorder": 3}
                    ax.plot(gains, [y] * len(gains), "o", fillstyle="none", alpha=0.6, **look)
                    if len(gains) > 1:
                        ax.plot([fmean(gains)], [y], "D", **look)
                    if len(gains) > 3:
                        mean, low, high, _ = interval(gains)
                        ax.errorbar([mean], [y], xerr=[[mean - low], [high - mean]], **look)
            ax.axvline(0, color="#555555", linewidth=0.8)
            ax.set_yticks(range(len(names)), [f"{n}, {times[n]:.2f} x" for n in names])
            ax.set_ylim(-0.6, len(names) - 0.4)
            # Less than a point is nothing, and looks it.
            low, high = ax.get_xlim()
            ax.set_xlim(min(low, -1), max(high, 1))
            ax.set_title(task)
        grid[-1, 0].set_xlabel("points of accuracy to the source trained on")
        for n, source in enumerate(sources):
            grid[0, 0].plot([], [], "D", color=COLORS[n], label=source)
        grid[0, 0].legend(loc="lower right")
        return encoded(figure)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = RESULTS,
) -> None:
    """Write `report.md` and `gain.png` from the runs that are there."""
    rows = read_rows(out)
    text = ["# Which conversion pays", "", *tasks_text(rows), *predicted_text(rows, out)]
    text += language_text(read_rows(out / "language"))
    (out / "report.md").write_text("\n".join(text))
    write_bytes(out / "gain.png", picture(rows))
    print("\n".join(text))


if __name__ == "__main__":
    app()
