"""Timing calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import torch

__all__ = ["Spread", "in_turns", "seconds_of", "spread"]

T = TypeVar("T")


class Spread(NamedTuple):
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def spread(times: Sequence[float]) -> Spread:
    """Return the middle of measured times and where most of them lie; at least one."""
    cuts = quantiles(times, n=10, method="inclusive") if len(times) > 1 else [*times] * 9
    return Spread(cuts[1], median(times), cuts[7])


def seconds_of(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Return the seconds of one call, what it has started on a GPU included."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(
    measurements: Sequence[Callable[[], T]],
    *,
    seconds: float,
    least: int = 3,
    most: int = 1000,
    warm: bool = False,
) -> list[list[T]]:
    """Repeat measurements in turns, so that a busy machine disturbs all alike.

    Args:
        measurements: what to do.
        seconds: time to spend on each; a measurement that has begun ends.
        least: repetitions of each, however long they take.
        most: repetitions of each at the most.
        warm: whether each has run before; else it is made once more, which does not count.

    Returns:
        What each gave.
    """
    for measure in () if warm else measurements:
        measure()
    spent = [0.0] * len(measurements)
    out: list[list[T]] = [[] for _ in measurements]
    for round_ in range(most):
        for i, measure in enumerate(measurements):
            if round_ < least or spent[i] < seconds:
                start = time.perf_counter()
                out[i].append(measure())
                spent[i] += time.perf_counter() - start
    return out
