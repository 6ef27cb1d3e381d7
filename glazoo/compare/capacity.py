"""How many associations a memory holds, measured on the recurrence alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from glazoo.compare.errors import CompareError
from glazoo.compare.keys import EVALUATION, KEY_KINDS, SELECTION, recorded, take_keys
from glazoo.compare.probe import (
    crossing,
    gate_grid,
    key_size_for,
    mapped_size,
    missed_values,
    read,
    retrieval_error,
    write,
)
from glazoo.compare.workers import Processes
from glazoo.program import Program, lower
from glazoo.spec import Spec
from glazoo.stats import Interval, interval

__all__ = [
    "ERRORS",
    "TASKS",
    "CapacityCurve",
    "CapacityPlan",
    "Error",
    "Task",
    "capacity",
    "check",
    "curve",
    "default_pairs",
    "single_thread",
    "written",
]

Task = Literal["once", "noisy", "rewrite"]

TASKS: tuple[Task, ...] = get_args(Task)
"""once: every pair is written once; noisy: four times in random order, with noise of the values'
own size; rewrite: every key is written with another value first, and the last counts."""

Error = Literal["energy", "values"]

ERRORS: dict[Error, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "energy": retrieval_error,
    "values": missed_values,
}
"""energy: share of the values' energy that is not read back; values: share of reads that point more
to another stored value than to their own."""

_REPEATS = 4


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """One measurement: a spec, a kind of keys, and the sizes."""

    spec: Spec
    label: str
    keys: str
    """One of `KEY_KINDS`, or recorded keys, as `glazoo.compare.keys.recorded` takes them."""
    state_bytes: int
    """The budget. Recorded keys have their own size, whatever state it takes."""
    value_size: int
    pairs: tuple[int, ...]
    seeds: int
    seed: int
    threshold: float
    impl: str
    task: Task = "once"
    error: Error = "energy"


@dataclass(frozen=True, slots=True)
class CapacityCurve:
    """Retrieval error against stored pairs, of one spec and kind of keys."""

    label: str
    keys: str
    state_bytes: int
    """Bytes of the state that was used, float32: at most what was allowed, for drawn keys."""
    key_size: int
    """Key channels that the recurrence sees."""
    value_size: int
    pairs: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]
    """Per number of pairs, the error of every seed."""
    gates: tuple[dict[str, float], ...]
    """Per number of pairs, the gates that were chosen."""
    threshold: float
    task: Task
    error: Error

    @property
    def intervals(self) -> list[Interval]:
        """Error per number of pairs, over seeds."""
        return [interval(e) for e in self.errors]

    @property
    def capacities(self) -> list[float]:
        """Per seed, the pairs at which the error crosses the threshold."""
        seeds = range(len(self.errors[0]))
        return [
            crossing(list(self.pairs), [e[s] for e in self.errors], self.threshold) for s in seeds
        ]

    @property
    def capacity(self) -> Interval:
        """Pairs at which the error crosses the threshold, over seeds."""
        return interval(self.capacities)

    @property
    def capacities_per_kilobyte(self) -> list[float]:
        """Per seed, the pairs at the threshold per 1024 bytes of state."""
        return [1024 * c / self.state_bytes for c in self.capacities]

    @property
    def capacity_per_kilobyte(self) -> Interval:
        """Pairs at the threshold per 1024 bytes of state, over seeds."""
        return interval(self.capacities_per_kilobyte)

    @property
    def bounded(self) -> bool:
        """Whether every seed's curve crossed the threshold inside of the measured range."""
        return self.pairs[0] <= min(self.capacities) and max(self.capacities) < self.pairs[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        return {
            "label": self.label,
            "keys": self.keys,
            "task": self.task,
            "error": self.error,
            "state_bytes": self.state_bytes,
            "key_size": self.key_size,
            "value_size": self.value_size,
            "threshold": self.threshold,
            "capacity": self.capacity._asdict(),
            "capacity_per_kilobyte": self.capacity_per_kilobyte._asdict(),
            "bounded": self.bounded,
            "points": [
                {
                    "pairs": n,
                    "error": i._asdict(),
                    "errors": list(e),
                    "gates": g,
                }
                for n, i, e, g in zip(
                    self.pairs, self.intervals, self.errors, self.gates, strict=True
                )
            ],
        }


def default_pairs(state_bytes: int, value_size: int) -> tuple[int, ...]:
    """Return numbers of pairs in steps of about the square root of two, around the number of values
    that fit into the state as they are: from a twentieth to four times as many."""
    center = max(state_bytes / 4 / value_size, 2.0)
    return tuple(sorted({max(1, round(center * 2 ** (i / 2))) for i in range(-9, 5)}))


def written(
    task: Task, keys: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a task writes, in order.

    Args:
        task: one of `TASKS`.
        keys: [B, N, d], the keys of the pairs.
        values: [B, N, V], what each key is read back for, of size one a channel.
        generator: of noise, other values and orders.

    Returns:
        Keys and values of every write, [B, n, d] and [B, n, V].
    """
    if task == "once":
        return keys, values
    batch, pairs = keys.shape[:2]
    times = _REPEATS if task == "noisy" else 2
    several = values.repeat(1, times, 1)
    other = torch.randn(several.shape, generator=generator)
    if task == "noisy":
        several = several + other
        order = torch.rand(batch, times * pairs, generator=generator).argsort(1)
    else:
        several[:, :pairs] = other[:, :pairs]
        rounds = torch.rand(batch, times, pairs, generator=generator).argsort(2)
        order = (rounds + pairs * torch.arange(times)[:, None]).flatten(1)
    rows = torch.arange(batch)[:, None]
    return keys.repeat(1, times, 1)[rows, order], several[rows, order]


def _key_size(plan: CapacityPlan, program: Program) -> int:
    """Return the key channels before feature maps.

    Raises:
        CompareError: the budget is too small, or recorded keys are too few for the pairs.
    """
    if plan.keys in KEY_KINDS:
        return key_size_for(program, plan.state_bytes // 4, plan.value_size)
    found = recorded(plan.keys)
    if max(plan.pairs) > found.longest:
        raise CompareError(
            f"pairs: got {max(plan.pairs)}, but {plan.keys} has {found.longest} keys in a row to "
            "measure on; record a longer text, or ask for fewer pairs"
        )
    return found.size


def curve(plan: CapacityPlan) -> CapacityCurve:
    """Measures one curve.

    For every number of pairs N: keys are taken, N pairs with Gaussian values are stored in an empty
    memory, all are read back, and the error is the share of the values' energy that the best output
    scale does not recover, or of values that are taken for others. Gates are constant; the best of
    a grid is chosen on one set of draws, and the errors come from fresh draws, `seeds` of them.

    Args:
        plan: what to measure.

    Returns:
        The curve.

    Raises:
        CompareError: the state budget is too small for the spec, or recorded keys are too few.
    """
    program = lower(plan.spec)
    raw = _key_size(plan, program)
    size = mapped_size(program, raw)
    used = 4 * program.state_floats(size, plan.value_size)
    imp = plan.spec.importance
    rotated = imp is not None and imp.basis == "rotated"
    errors, chosen = [], []

    def measure(n: int, stream: int, seeds: int, grid: list[Any]) -> torch.Tensor:
        seed = (plan.seed * 1_000_003 + 2 * n + stream) % 2**63
        generator = torch.Generator().manual_seed(seed)
        # Few pairs in one memory say little: a seed is as many memories as hold some 64 pairs.
        memories = max(1, round(64 / n))
        sets = seeds * memories
        keys = take_keys(plan.keys, sets, n, raw, generator, stream=stream, rotated=rotated)
        values = torch.randn(sets, n, plan.value_size, generator=generator)
        state = write(program, *written(plan.task, keys, values, generator), grid, impl=plan.impl)
        y = read(program, state, keys, plan.value_size, grid, impl=plan.impl)
        return ERRORS[plan.error](y, values).view(seeds, memories, -1).mean(1)

    for n in plan.pairs:
        grid = gate_grid(program, n)
        best = 0
        if len(grid) > 1:
            parts = [
                measure(n, SELECTION, 3, grid[i : i + 32]).mean(0) for i in range(0, len(grid), 32)
            ]
            best = int(torch.cat(parts).argmin())
        errors.append(tuple(measure(n, EVALUATION, plan.seeds, [grid[best]])[:, 0].tolist()))
        chosen.append(grid[best].describe(program))
    return CapacityCurve(
        plan.label,
        plan.keys,
        used,
        size,
        plan.value_size,
        plan.pairs,
        tuple(errors),
        tuple(chosen),
        plan.threshold,
        plan.task,
        plan.error,
    )


def check(plans: Iterable[CapacityPlan]) -> None:
    """Checks budgets and recorded keys before anything is measured or written.

    Raises:
        CompareError: a budget is too small for a spec, or recorded keys are none or too few.
    """
    for plan in plans:
        _key_size(plan, lower(plan.spec))


@contextmanager
def single_thread() -> Iterator[None]:
    """Runs the block on one thread: the tensors here are too small to share, and threads that wait
    for one another on a busy machine make it many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _alone(measure: Callable[[CapacityPlan], CapacityCurve], plan: CapacityPlan) -> CapacityCurve:
    with single_thread():
        return measure(plan)


def capacity(
    plans: Iterable[CapacityPlan],
    *,
    jobs: int = 1,
    measure: Callable[[CapacityPlan], CapacityCurve] = curve,
) -> Iterator[CapacityCurve]:
    """Measures curves, over processes, and gives each as it is done.

    Args:
        plans: what to measure; every budget is checked before the first measurement.
        jobs: number of processes; 1 stays in this one.
        measure: what to run per plan.

    Yields:
        The curves, in the order in which they finish.

    Raises:
        CompareError: a state budget is too small, or a process was killed.
    """
    plans = list(plans)
    check(plans)
    if jobs == 1 or len(plans) == 1:
        with single_thread():
            yield from map(measure, plans)
        return
    waiting, going, pool = [*plans], set[Future[CapacityCurve]](), Processes(jobs)
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                going.add(pool.submit(_alone, measure, waiting.pop(0)))
            done, going = wait(going, return_when=FIRST_COMPLETED)
            for job in done:
                try:
                    found = job.result()
                except BrokenProcessPool as e:
                    raise CompareError(
                        f"of a measurement {pool.ending(job)}; what was measured before is kept; "
                        "try --jobs 1"
                    ) from e
                yield found
    finally:
        pool.close()
