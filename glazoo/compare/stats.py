"""Intervals over seeds, and what may be said about two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["Interval", "Verdict", "compare", "interval", "student_quantile"]

Verdict = Literal["higher", "lower", "not separated"]


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
        """Gives the interval in another unit."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.seeds)

    def text(self, digits: int = 3) -> str:
        """Gives `mean +- half`, or the bare mean where there is no interval."""
        if self.seeds < 2:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} \u00b1 {self.half:.{digits}f}"


def student_quantile(probability: float, degrees: int) -> float:
    """Gives the quantile of Student's t distribution.

    Args:
        probability: in (0.5, 1).
        degrees: degrees of freedom, an integer >= 1.

    Returns:
        t with P(T <= t) = probability.

    Raises:
        ValueError: an argument is outside of its domain.

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(
            f"got probability = {probability}, degrees = {degrees}; accepted are a probability in "
            "(0.5, 1) and degrees >= 1"
        )

    def central(t: float) -> float:
        """P(|T| <= t) as a finite sum, which integer degrees of freedom allow."""
        theta = math.atan2(t, math.sqrt(degrees))
        sine, cosine = math.sin(theta), math.cos(theta)
        odd = degrees % 2
        term = cosine if odd else 1.0
        total = term if degrees > 1 or not odd else 0.0
        for i in range(2 + odd, degrees - 1, 2):
            term *= cosine * cosine * (i - 1) / i
            total += term
        if odd:
            inner = sine * total if degrees > 1 else 0.0
            return 2 / math.pi * (theta + inner)
        return sine * total

    wanted, low, high = 2 * probability - 1, 0.0, 1.0
    while central(high) < wanted:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < wanted else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Gives the mean over seeds and its t interval.

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
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, mean, mean, 1)
    variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
    half = student_quantile((1 + confidence) / 2, n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def compare(a: Interval, b: Interval) -> Verdict:
    """Says whether `a` is higher or lower than `b`: only where both have an interval and the
    intervals do not touch."""
    if min(a.seeds, b.seeds) < 2:
        return "not separated"
    if a.low > b.high:
        return "higher"
    return "lower" if a.high < b.low else "not separated"
