"""What a comparison runs: presets, equal sizes, and the choice of learning rates."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from glazoo.compare.errors import CompareError
from glazoo.compare.model import ModelConfig, Shape, count_parameters, shape_for
from glazoo.compare.tasks import Task, TaskName
from glazoo.compare.train import Run, Training
from glazoo.spec import Spec

__all__ = ["PRESETS", "Plan", "Preset"]

_SWEEP_SEED = 1000
"""Seed of the runs that choose a learning rate: none of those that are reported."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Defaults of a comparison."""

    description: str
    vocab: int
    length: int
    load: int
    model: ModelConfig
    training: Training
    rates: tuple[float, ...]
    seeds: int
    tasks: Mapping[TaskName, Mapping[str, Any]] = field(default_factory=dict)
    """What is different for a task."""

    def for_task(self, name: TaskName) -> Self:
        """Gives the defaults of a task."""
        return replace(self, **self.tasks.get(name, {}))


# The source's eight key channels and, with one importance per key, as many of its metaplastic form.
_RECORDS = {
    "vocab": 81,
    "length": 96,
    "load": 12,
    "model": ModelConfig(state_bytes=2304, mlp=0, start="window"),
    "training": Training(steps=300, curriculum=0.0),
    "rates": (1.2e-2,),
    "seeds": 3,
}


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "four variants in less than 15 minutes on two CPU cores",
        vocab=128,
        length=160,
        load=40,
        model=ModelConfig(state_bytes=1680),
        training=Training(steps=400),
        rates=(4e-3, 1.2e-2),
        seeds=4,
        tasks={"records": _RECORDS, "static": _RECORDS},
    ),
    "paper": Preset(
        "multi-query associative recall as in arXiv:2602.09075, for a GPU",
        vocab=8192,
        length=512,
        load=128,
        model=ModelConfig(
            width=128, layers=2, heads=8, state_bytes=4 * 8 * 16 * 16, mlp=256, start="drawn"
        ),
        training=Training(
            steps=64 * 390, batch=256, warmup=0.1, curriculum=0.0, decay=0.1, examples=100_000
        ),
        rates=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
        seeds=3,
    ),
}


@dataclass(frozen=True)
class Plan:
    """A comparison: variants by label, and everything that they share."""

    specs: dict[str, Spec]
    task: Task
    models: tuple[ModelConfig, ...]
    """One per state budget."""
    training: Training
    rates: tuple[float, ...]
    seeds: int
    equal_parameters: bool = True
    impl: str = "auto"
    device: str = "cpu"

    def config(self) -> dict[str, Any]:
        """Gives what all runs of a results folder share; variants, seeds, rates and state budgets
        may be added later."""
        return {
            "format": 2,
            "task": self.task.model_dump(mode="json"),
            "model": self.models[0].model_dump(mode="json", exclude={"state_bytes"}),
            "training": self.training.model_dump(mode="json"),
            "equal_parameters": self.equal_parameters,
            "impl": self.impl,
            "device": self.device,
        }

    def check(self) -> None:
        """Checks everything that can be wrong before the first run starts.

        Raises:
            CompareError: the task does not fit, or a state budget is too small for a variant.
        """
        if not self.rates or any(not 0 < r < 10 for r in self.rates):
            raise CompareError(f"rates: got {list(self.rates)}, accepted are numbers in (0, 10)")
        self.task.check()
        for model in self.models:
            for spec in self.specs.values():
                shape_for(spec, model)

    @functools.cached_property
    def sizes(self) -> list[tuple[str, ModelConfig, Shape, int, int]]:
        """Label, model, head sizes, inner channels and parameters of every variant and budget.

        With equal parameters, inner channels are added to the position-wise part of the smaller
        models until they have as many parameters as the largest, to within one channel.
        """
        out = []
        for model in self.models:
            tokens = self.task.interface
            counts = {n: count_parameters(s, model, tokens) for n, s in self.specs.items()}
            largest = max(counts.values())
            for label, spec in self.specs.items():
                inner, count = model.mlp, counts[label]
                if self.equal_parameters and model.mlp:
                    per_channel = model.layers * (2 * model.width + 1)
                    inner += round((largest - count) / per_channel)
                    count = count_parameters(spec, model, tokens, inner)
                out.append((label, model, shape_for(spec, model), inner, count))
        return out

    @functools.cached_property
    def sweeps(self) -> list[list[Run]]:
        """Per variant and budget, the runs that choose its learning rate."""
        return [
            [self.run(label, model, inner, r, _SWEEP_SEED, sweep=True) for r in self.rates]
            for label, model, _, inner, _ in self.sizes
        ]

    def run(
        self, label: str, model: ModelConfig, inner: int, rate: float, seed: int, *, sweep: bool
    ) -> Run:
        """Describes one run."""
        return Run(
            label=label,
            spec=self.specs[label],
            task=self.task,
            model=model,
            training=self.training,
            mlp=inner,
            rate=rate,
            seed=seed,
            sweep=sweep,
            impl=self.impl,
            device=self.device,
        )

    def finals(self, sweep: list[Run], results: dict[str, dict[str, Any]]) -> list[Run]:
        """Lists the runs to report, once the learning rate is known.

        Args:
            sweep: the runs that choose it, of one variant and budget.
            results: finished runs by key.

        Returns:
            One run per seed at the best rate, by accuracy and then loss; nothing while a run of the
            sweep is missing.
        """
        rate = best_rate(sweep, results)
        if rate is None:
            return []
        first = sweep[0]
        return [
            self.run(first.label, first.model, first.mlp, rate, seed, sweep=False)
            for seed in range(self.seeds)
        ]


def best_rate(sweep: Iterable[Run], results: dict[str, dict[str, Any]]) -> float | None:
    """Gives the learning rate of the best run of a sweep; None while a run is missing. A single
    rate needs no run."""
    sweep = list(sweep)
    if len(sweep) == 1:
        return sweep[0].rate
    done = [results[r.key] for r in sweep if r.key in results]
    if len(done) < len(sweep):
        return None
    return float(max(done, key=lambda r: (not r["diverged"], r["accuracy"], -r["loss"]))["rate"])
