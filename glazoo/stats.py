"""Intervals over seeds, and of differences seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from glazoo.errors import extra

__all__ = [
    "Interval",
    "against_source",
    "interval",
    "paired",
    "require",
    "source_of",
]


class Interval(NamedTuple):
    """A mean with its confidence interval; both ends are the mean for a single value."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def times(self, factor: float) -> Interval:
        """Return the interval in another unit."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.seeds)

    def text(self, digits: int = 3) -> str:
        """Return `mean +- half`, or the bare mean where there is no interval."""
        return self._text(f".{digits}f", digits)

    def signed(self, digits: int = 1) -> str:
        """Return the text of a difference."""
        return self._text(f"+z.{digits}f", digits)

    def _text(self, form: str, digits: int) -> str:
        bare = format(self.mean, form)
        return bare if self.seeds < 2 else f"{bare} \u00b1 {self.half:.{digits}f}"


def require() -> None:
    """Refuses, before anything is measured, where there is nothing to compute intervals with.

    Raises:
        ImportError: scipy is not installed.
    """
    with extra("compare"):
        import scipy.special  # noqa: F401


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean over seeds and its t interval.

        mean +- t_{n - 1} s / sqrt(n)

    Args:
        values: one number per seed, at least one.
        confidence: in (0, 1).

    Returns:
        The interval; without width for a single value, which has none.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values: got none, accepted is at least one")
    mean = fmean(values)
    if n == 1:
        return Interval(mean, mean, mean, 1)
    # Student's t; scipy.stats calls the same function and takes seconds to import.
    with extra("compare"):
        from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * stdev(values, mean) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """Return the interval of a difference, seed by seed.

    What a seed does to both, such as its data, is not in the interval; a difference is there where
    the interval excludes zero.

    Args:
        a: a number per seed.
        b: what is subtracted, per seed.

    Returns:
        The interval of a - b over the seeds that both have; None where there are none.
    """
    seeds = sorted(a.keys() & b.keys())
    return interval([a[s] - b[s] for s in seeds]) if seeds else None


def source_of(label: str) -> str:
    """Return the label of a metaplastic form's source; every other label is its own."""
    return label.removeprefix("metaplastic_").split(" ")[0]


def against_source(label: str, values: Mapping[str, Sequence[float]]) -> str:
    """Say how a metaplastic form compares with its source: only what their paired difference
    separates from zero.

    Args:
        label: of the form; of what is no form, nothing is said.
        values: by label a number per seed, more being better.

    Returns:
        "better", "worse", "not separated" or nothing.
    """
    source = source_of(label)
    if source == label or source not in values:
        return ""
    difference = paired(*(dict(enumerate(values[x])) for x in (label, source)))
    if difference is None or difference.seeds < 2 or difference.low <= 0 <= difference.high:
        return "not separated"
    return "better" if difference.low > 0 else "worse"
