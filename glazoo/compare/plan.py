"""What a comparison runs: presets, equal sizes, and the choice of learning rates."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple, Self

from glazoo.compare.errors import CompareError
from glazoo.compare.model import ModelConfig, Shape, count_parameters, has_plasticity, shape_for
from glazoo.compare.tasks import Task, TaskName
from glazoo.compare.train import Run, Training
from glazoo.spec import Spec

__all__ = ["PRESETS", "Arm", "Line", "Plan", "Preset", "Rates", "Results", "Tuning", "line_of"]

_SELECTION_SEED = 1000
"""First seed of the runs that choose rates: none of those that are reported."""

_CONVERTED = 10.0
"""Plasticity rate of converted forms: Hebbian, exact and first order, on three seeds that are not
reported (benchmarks/LOG.md)."""


class Rates(NamedTuple):
    """What is chosen for a variant on seeds that are not reported."""

    rate: float
    """Learning rate."""
    plasticity: float = 1.0
    """Share of it that the plasticity of importance gates gets."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How sources and what they were converted into are trained on."""

    training: Training
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Preset:
    """Defaults of a comparison."""

    description: str
    vocab: int
    length: int
    load: int
    models: tuple[ModelConfig, ...]
    training: Training
    rates: tuple[float, ...]
    seeds: int
    tuning: Tuning
    filler_tokens: int | None = None
    every_rate: tuple[ModelConfig, ...] = ()
    """Those of the models with which every rate is also run on the reported seeds."""
    tasks: Mapping[TaskName, Mapping[str, Any]] = field(default_factory=dict)
    """What is different for a task."""

    def for_task(self, name: TaskName) -> Self:
        """Return the defaults of a task."""
        return replace(self, **self.tasks.get(name, {}))


# Eight key channels, with one importance per key or without.
_RECORDS = {
    "vocab": 81,
    "length": 96,
    "load": 12,
    "models": (ModelConfig(state_bytes=2176, mlp=0, start="window"),),
    "training": Training(steps=300, curriculum=0.0),
    "rates": (1.2e-2,),
    "seeds": 3,
    "tuning": Tuning(Training(steps=200, curriculum=0.0), (6e-3,)),
}


_PAPERS_RATES = tuple(10 ** (-3 + i / 3) for i in range(4))


def _paper(
    description: str,
    sizes: tuple[int, int, int],
    training: Training,
    theirs: ModelConfig,
    ours: ModelConfig,
    seeds: int,
    rates: tuple[float, ...] = _PAPERS_RATES,
) -> Preset:
    """Return the paper's protocol: all variants at its width, every rate on the reported seeds; and
    beside it at equal bytes, where the plasticity starts from nothing. Sizes are vocabulary, length
    and load."""
    start: dict[str, Any] = {"layers": 2, "mlp": 0, "start": "drawn", "decays": (0.01, 0.16)}
    frozen = {"plasticity": 0.66, "trains_prior": False}
    theirs = theirs.model_copy(update=start | frozen | {"name": "as in the paper"})
    ours = ours.model_copy(update=start | {"name": "equal bytes"})
    protocol = {"warmup": 0.0, "curriculum": 0.0, "decay": 0.1, "momentum": (0.9, 0.999)}
    training = training.model_copy(update=protocol)
    return Preset(
        description,
        *sizes,
        filler_tokens=1,
        models=(theirs, ours),
        every_rate=(theirs,),
        training=training,
        rates=rates,
        seeds=seeds,
        tuning=Tuning(training.model_copy(update={"steps": training.steps // 2}), rates),
    )


def _papers_training(batch: int) -> Training:
    steps = 60 * (100_000 // batch)
    return Training(steps=steps, batch=batch, examples=100_000, eval_examples=1000)


_THEIRS = ModelConfig(width=128, heads=8, key_size=16, value_size=32)
# Sixteen key channels, with one importance per key or without.
_OURS = ModelConfig(width=128, heads=8, value_size=32, state_bytes=16_896)

PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "minutes on two CPU cores",
        vocab=128,
        length=160,
        load=40,
        models=(ModelConfig(state_bytes=1680),),
        training=Training(steps=400),
        rates=(4e-3, 1.2e-2),
        seeds=4,
        tuning=Tuning(Training(steps=200, curriculum=0.0), (4e-3,)),
        tasks={"records": _RECORDS, "static": _RECORDS},
    ),
    "paper": _paper(
        "recall as in arXiv:2602.09075, at its width and at equal bytes, for a GPU",
        (8192, 512, 128),
        _papers_training(128),
        _THEIRS,
        _OURS,
        seeds=8,
    ),
    "paper-long": _paper(
        "the same with twice the pairs and the length",
        (8192, 1024, 256),
        _papers_training(64),
        _THEIRS,
        _OURS,
        seeds=8,
    ),
    "paper-small": _paper(
        "the same with a sixteenth of the pairs and two of the rates: four variants in an hour on "
        "two CPU cores",
        (128, 32, 8),
        Training(steps=800, batch=32, examples=16_000),
        ModelConfig(width=64, heads=2, key_size=4, value_size=32),
        ModelConfig(width=64, heads=2, value_size=32, state_bytes=1056),
        seeds=3,
        rates=_PAPERS_RATES[1:3],
    ),
}


@dataclass(frozen=True)
class Arm:
    """One line of a comparison on one task."""

    label: str
    spec: Spec
    task: Task
    model: ModelConfig
    mlp: int
    """Inner channels of the position-wise part."""
    shape: Shape
    parameters: int
    source: Arm | None = None
    """What it goes on from, with the same weights."""
    rival: Arm | None = None
    """What differences are taken to, seed by seed."""


def _plasticity_rate(arm: Arm) -> float:
    """Return the share of the learning rate that an arm's plasticity gets if none is asked for."""
    return 1.0 if arm.source is None else _CONVERTED


@dataclass(frozen=True)
class Plan:
    """A comparison: variants by label, and everything that they share.

    Without `tuning`, variants are trained side by side, and metaplastic forms are compared with
    their sources. With it, sources are trained, then trained on as they are and converted into
    each of their metaplastic forms, on the same data; that is compared.
    """

    specs: dict[str, Spec]
    task: Task
    models: tuple[ModelConfig, ...]
    training: Training
    rates: tuple[float, ...]
    seeds: int
    plasticity_rates: tuple[float, ...] = ()
    """Shares of the learning rate to choose from for the plasticity; none for the default."""
    selection_seeds: int = 1
    """Seeds on which rates are chosen, where there is a choice."""
    every_rate: tuple[ModelConfig, ...] = ()
    """Those of the models with which all rates are run on the reported seeds, to show what choosing
    on these gives."""
    control: bool = True
    """Whether the task's control is run as well."""
    tuning: Tuning | None = None
    equal_parameters: bool = True
    impl: str = "auto"
    device: str = "cpu"

    def config(self) -> dict[str, Any]:
        """Return what all runs of a results folder share; variants, seeds, rates, state budgets and
        the control may be added later."""
        tuning = None if self.tuning is None else self.tuning.training.model_dump(mode="json")
        shared = self.models[0].model_dump(
            mode="json", exclude={"name", "state_bytes", "key_size", "value_size"}
        )
        return {
            "format": 3,
            "task": self.task.model_dump(mode="json"),
            "model": shared,
            "training": self.training.model_dump(mode="json"),
            "tuning": tuning,
            "equal_parameters": self.equal_parameters,
            "impl": self.impl,
            "device": self.device,
        }

    def check(self) -> None:
        """Checks everything that can be wrong before the first run starts.

        Raises:
            CompareError: the task does not fit, a state budget is too small for a variant, a rate
                is out of its domain, or there is nothing to convert.
        """
        for rates in (self.rates, self.tuning.rates) if self.tuning else (self.rates,):
            if not rates or any(not 0 < r < 10 for r in rates):
                raise CompareError(f"rates: got {list(rates)}, accepted are numbers in (0, 10)")
        if any(not 0 <= r <= 1000 for r in self.plasticity_rates):
            raise CompareError(
                f"plasticity-rate: got {list(self.plasticity_rates)}, accepted are numbers in "
                "[0, 1000]"
            )
        self.task.check()
        # Building them checks that every state budget is large enough.
        arms = self.arms
        if self.tuning is not None and not any(a.rival for a in arms):
            raise CompareError(
                f"variants: got {', '.join(self.specs)}, of which none has a metaplastic form that "
                "it could be converted into"
            )

    @functools.cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The task and, if it has one and it is asked for, its control."""
        control = self.task.control if self.control else None
        return (self.task,) if control is None else (self.task, control)

    @functools.cached_property
    def arms(self) -> list[Arm]:
        """All lines of the comparison, the task's before its control's.

        With equal parameters, inner channels are added to the position-wise part of the smaller
        models until they have as many parameters as the largest, to within one channel.

        Raises:
            CompareError: a state budget is too small for a variant.
        """
        out: list[Arm] = []
        for task in self.tasks:
            for model in self.models:
                out += self._converted(task, model) if self.tuning else self._beside(task, model)
        return out

    def _sized(self, specs: Mapping[str, Spec], task: Task, model: ModelConfig) -> list[Arm]:
        tokens = task.interface
        shapes = {n: shape_for(s, model) for n, s in specs.items()}
        counts = {n: count_parameters(s, model, tokens) for n, s in specs.items()}
        out = []
        for label, spec in specs.items():
            inner, count = model.mlp, counts[label]
            if self.equal_parameters and model.mlp:
                per_channel = model.layers * (2 * model.width + 1)
                inner += round((max(counts.values()) - count) / per_channel)
                count = count_parameters(spec, model, tokens, inner)
            out.append(Arm(label, spec, task, model, inner, shapes[label], count))
        return out

    def _beside(self, task: Task, model: ModelConfig) -> list[Arm]:
        arms = self._sized(self.specs, task, model)
        by_name = {a.spec.name: a for a in arms}
        return [replace(a, rival=by_name.get(a.spec.counterpart or "")) for a in arms]

    def _converted(self, task: Task, model: ModelConfig) -> list[Arm]:
        sources = {n: s for n, s in self.specs.items() if not s.metaplastic}
        out = []
        for source in self._sized(sources, task, model):
            name, shape = source.label, source.shape
            before = replace(source, label=f"{name}, before")
            rival = replace(source, label=f"{name}, trained on", source=before)
            out += [before, rival]
            same = model.model_copy(
                update={"key_size": shape.key_size, "value_size": shape.value_size}
            )
            for label, spec in self.specs.items():
                if spec.counterpart == source.spec.name:
                    count = count_parameters(spec, same, task.interface, source.mlp)
                    out.append(
                        Arm(
                            f"{label}, converted",
                            spec,
                            task,
                            same,
                            source.mlp,
                            shape_for(spec, same),
                            count,
                            before,
                            rival,
                        )
                    )
        return out

    def choices(self, arm: Arm) -> list[Rates]:
        """Lists the rates that are tried for an arm."""
        rates = self.rates
        if arm.source is not None:
            assert self.tuning is not None
            rates = self.tuning.rates
        shares: tuple[float, ...] = (1.0,)
        if has_plasticity(arm.spec):
            shares = self.plasticity_rates or (_plasticity_rate(arm),)
        return [Rates(r, p) for r in rates for p in shares]

    def selection(self, arm: Arm, results: Results) -> list[Run]:
        """Lists the runs that choose an arm's rates: none where there is no choice, or while those
        of what it goes on from are not chosen."""
        choices = self.choices(arm)
        if len(choices) == 1:
            return []
        seeds = range(_SELECTION_SEED, _SELECTION_SEED + self.selection_seeds)
        runs = (self._run(arm, c, s, results, selection=True) for c in choices for s in seeds)
        return [r for r in runs if r is not None]

    def chosen(self, arm: Arm, results: Results) -> Rates | None:
        """Return an arm's rates: those with the best mean accuracy, and then loss, over the seeds
        that choose; None while one of these runs is missing."""
        choices = self.choices(arm)
        return choices[0] if len(choices) == 1 else best(self.selection(arm, results), results)

    def reported(self, arm: Arm, results: Results) -> list[Run]:
        """Lists an arm's runs on the reported seeds at its rates; none while these are unknown."""
        rates = self.chosen(arm, results)
        return [] if rates is None else self._reported(arm, [rates], results)

    def at_every_rate(self, arm: Arm, results: Results) -> list[Run]:
        """Lists an arm's runs on the reported seeds at all rates, where that is asked for."""
        if arm.model not in self.every_rate:
            return []
        return self._reported(arm, self.choices(arm), results)

    def _reported(self, arm: Arm, choices: Iterable[Rates], results: Results) -> list[Run]:
        runs = (self._run(arm, c, s, results) for c in choices for s in range(self.seeds))
        return [r for r in runs if r is not None]

    def _run(
        self, arm: Arm, rates: Rates, seed: int, results: Results, *, selection: bool = False
    ) -> Run | None:
        before = None
        if arm.source is not None:
            chosen = self.chosen(arm.source, results)
            if chosen is None:
                return None
            before = self._run(arm.source, chosen, seed, results, selection=selection)
            assert before is not None
        line = arm.label, arm.model, arm.task.name, rates, seed, selection, before and before.key
        if line not in self._runs:
            changes = {"selection": selection, "before": before}
            self._runs[line] = self._described(arm, rates, seed).model_copy(update=changes)
        return self._runs[line]

    @functools.cached_property
    def _runs(self) -> dict[tuple[object, ...], Run]:
        """Runs that were described already: their keys are worth keeping."""
        return {}

    def _described(self, arm: Arm, rates: Rates, seed: int) -> Run:
        training = self.training
        if arm.source is not None:
            assert self.tuning is not None
            training = self.tuning.training
        return Run(
            label=arm.label,
            spec=arm.spec,
            task=arm.task,
            model=arm.model,
            training=training,
            mlp=arm.mlp,
            rate=rates.rate,
            plasticity_rate=rates.plasticity,
            seed=seed,
            kept=self.tuning is not None and arm.source is None,
            impl=self.impl,
            device=self.device,
        )

    def wanted(self, results: Results) -> list[Run]:
        """Lists every run that is known to be needed, what others go on from first."""
        out: dict[str, Run] = {}
        for arm in self.arms:
            runs = [
                *self.selection(arm, results),
                *self.reported(arm, results),
                *self.at_every_rate(arm, results),
            ]
            for run in runs:
                if run.before is not None:
                    out.setdefault(run.before.key, run.before)
                out.setdefault(run.key, run)
        return list(out.values())

    def counts(self) -> list[tuple[Arm, int]]:
        """Return every line with the number of its runs in the whole comparison."""
        out = []
        for arm in self.arms:
            choices = len(self.choices(arm))
            # What goes on from an arm needs it on the seeds that choose as well.
            followed = any(a.source == arm and len(self.choices(a)) > 1 for a in self.arms)
            choosing = choices if choices > 1 else int(followed)
            reported = self.seeds * (choices if arm.model in self.every_rate else 1)
            out.append((arm, choosing * self.selection_seeds + reported))
        return out

    def sample(self, arm: Arm) -> Run:
        """Describes a run of an arm as it is but for rates, seed and what it goes on from."""
        return self._described(arm, self.choices(arm)[0], 0)


Results = Mapping[str, dict[str, Any]]
"""Finished runs by key."""
Line = tuple[str, ModelConfig, str]
"""Label, sizes and task: what tells the lines of a comparison apart."""


def line_of(x: Run | Arm) -> Line:
    """Return the line that a run or an arm belongs to."""
    return x.label, x.model, x.task.name


def best(runs: Iterable[Run], results: Results) -> Rates | None:
    """Return the rates of the best runs, by the mean over seeds of accuracy and then loss; None
    while a run is missing. Rates at which a run diverged are worse than all others."""
    by_rates: dict[Rates, list[dict[str, Any]]] = {}
    for run in runs:
        if run.key not in results:
            return None
        by_rates.setdefault(Rates(run.rate, run.plasticity_rate), []).append(results[run.key])

    def value(rates: Rates) -> tuple[bool, float, float]:
        found = by_rates[rates]
        return (
            not any(r["diverged"] for r in found),
            fmean(r["accuracy"] for r in found),
            -fmean(r["loss"] for r in found),
        )

    return max(by_rates, key=value, default=None)
