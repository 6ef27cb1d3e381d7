"""What a statement of the theory is, and how one instance of it is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from glazoo.program import Program, lower
from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.instances import REGIMES, Instance, Operands, Regime, run
from glazoo.theory.maps import explicit

__all__ = [
    "Bound",
    "Comparison",
    "Curve",
    "Domain",
    "Entry",
    "Finding",
    "Kind",
    "Op",
    "Pair",
    "Trial",
]


class Op(Protocol):
    """An implementation of `glazoo.attention`: same operands, same result, without `impl`."""

    def __call__(self, spec: Spec, q: Tensor, k: Tensor | None, v: Tensor, **options: Any) -> Any:
        """Runs a spec."""


class Kind(StrEnum):
    """What a statement claims."""

    EXACT = "exact"
    """Two sides are equal."""
    LIMIT = "limit"
    """The distance of two sides falls as a power of a small number; the power is predicted."""
    INEQUALITY = "inequality"
    """One side bounds the other."""
    INVARIANCE = "invariance"
    """A change of the operands leaves the result as it is, or moves it along."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors that must be equal."""

    what: str
    actual: Tensor
    expected: Tensor


@dataclass(frozen=True, slots=True)
class Bound:
    """A tensor that must not exceed another one."""

    what: str
    value: Tensor
    limit: Tensor


@dataclass(frozen=True, slots=True)
class Curve:
    """Distances of two sides at falling values of a small number."""

    what: str
    small: tuple[float, ...]
    error: tuple[float, ...]
    scale: float = 1.0
    """Size of what the distances are of; below its rounding a distance says nothing."""


Comparison = Pair | Bound | Curve


@dataclass(frozen=True, slots=True)
class Domain:
    """The instances on which a statement is claimed."""

    regimes: tuple[Regime, ...] = REGIMES
    batch: tuple[int, int] = (1, 2)
    tokens: tuple[int, int] = (0, 9)
    heads: tuple[int, int] = (1, 2)
    groups: tuple[int, int] = (1, 2)
    keys: tuple[int, int] = (1, 5)
    values: tuple[int, int] = (1, 3)
    start: bool | None = None
    """Whether it starts from a random state; None: both are claimed."""
    long: int = 0
    """Tokens of one further instance that crosses the chunks of every engine; 0: none."""

    def sample(self, index: int, seed: int) -> Instance:
        """Return the index-th instance of a seed; the first one is large and has no edge cases."""
        generator = torch.Generator().manual_seed((seed * 7919 + index) % 2**63)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        spans = (self.batch, self.tokens, self.heads, self.groups, self.keys, self.values)
        if index == 0:
            B, T, H, G, K, V = (high for _, high in spans)
            start = self.start is not False
            regime = self.regimes[0]
        else:
            B, T, H, G, K, V = (draw(*span) for span in spans)
            start = bool(draw(0, 1)) if self.start is None else self.start
            regime = self.regimes[(index + draw(0, len(self.regimes))) % len(self.regimes)]
        return Instance(B, T, H, G, K, V, regime, start, (seed * 31 + index) % 2**31)

    def sample_long(self, seed: int) -> Instance:
        """Return the instance that crosses chunks."""
        return Instance(1, self.long, 1, 2, 4, 3, self.regimes[0], self.start is not False, seed)


@dataclass(frozen=True)
class Trial:
    """One instance of a statement, for one spec and one implementation."""

    op: Op
    spec: Spec
    instance: Instance
    dtype: torch.dtype = torch.float64
    others: Op | None = None
    """What runs other specs than this one, for an implementation that knows only this one."""

    @property
    def program(self) -> Program:
        """The program of the spec."""
        return lower(self.spec)

    @property
    def scale(self) -> float:
        """The spec's factor on q."""
        return self.spec.scale(self.instance.K)

    def operands(self) -> Operands:
        """Return the operands; the decays of a fixed schedule are spelt out."""
        return explicit(self.program, self.instance.operands(self.spec, self.dtype))

    def state(self) -> State | None:
        """Return the state to start from."""
        return self.instance.state(self.spec, self.dtype)

    def other(self, stream: int = 1) -> Operands:
        """Return further operands of the same sizes and regime."""
        i = self.instance
        fresh = Instance(
            i.B, i.T, i.H, i.G, i.K, i.V, i.regime, i.start, i.seed + 1_000_000 * stream
        )
        return explicit(self.program, fresh.operands(self.spec, self.dtype))

    def normal(self, *shape: int, stream: int = 2) -> Tensor:
        """Draws normal numbers."""
        x = torch.randn(shape, generator=self.instance.generator(stream), dtype=torch.float64)
        return x.to(self.dtype)

    def uniform(self, *shape: int, stream: int = 3) -> Tensor:
        """Draws numbers between zero and one."""
        x = torch.rand(shape, generator=self.instance.generator(stream), dtype=torch.float64)
        return x.to(self.dtype)

    def integer(self, low: int, high: int, stream: int = 4) -> int:
        """Draws an integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.instance.generator(stream)))

    def permutation(self, n: int) -> Tensor:
        """Draws a permutation; not the identity if there is another one."""
        order = torch.randperm(n, generator=self.instance.generator(5))
        return order.roll(1) if torch.equal(order, torch.arange(n)) else order

    def run(self, spec: Spec, operands: Operands, **options: Any) -> Any:
        """Calls the implementation, or for another spec the one for others."""
        op = self.op if self.others is None or spec == self.spec else self.others
        return run(op, spec, operands, **options)

    @property
    def tolerance(self) -> float:
        """The rounding that two sides may differ by, relative to the larger of 1 and their size.

        One unit per multiplication and addition along the longest chain of either side: a sum over
        keys for each write, 16 operations per term, and twice for the two sides with their maps.
        """
        i = self.instance
        writes = max(i.T, 1) * max(self.spec.substeps, 2)
        return 32 * writes * max(i.K, 4) * torch.finfo(self.dtype).eps


@dataclass(frozen=True, slots=True)
class Finding:
    """The worst comparison of one instance."""

    what: str
    residual: float
    """Relative residual (exact, invariance), excess over the bound (inequality), or fitted rate."""
    allowed: str
    passed: bool
    unsupported: bool = False
    """The implementation says that it does not do this (NotImplementedError)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One statement of the theory, as data."""

    id: str
    statement: str
    """In mathematical notation."""
    left: str
    """The left-hand side: a spec and its operands."""
    right: str
    """The right-hand side, and how its operands follow from those of the left."""
    source: str
    """Paper and equation, or "ours"."""
    check: Callable[[Trial], Iterable[Comparison]]
    """Evaluates both sides on one instance."""
    applies: Callable[[Spec], bool]
    """For which specs it is claimed; decided by their axes."""
    kind: Kind = Kind.EXACT
    condition: str = "-"
    """What is assumed of the operands."""
    domain: Domain = Domain()
    rate: float | None = None
    """Predicted exponent of a limit."""
    band: float = 0.05
    """Accepted distance of the fitted exponent from the predicted one."""
    engine: bool = False
    """Whether it compares an implementation with the reference: says nothing of the reference."""

    def describe(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return {
            "id": self.id,
            "statement": self.statement,
            "kind": str(self.kind),
            "left": self.left,
            "right": self.right,
            "condition": self.condition,
            "source": self.source,
            "rate": self.rate,
        }

    def judge(self, trial: Trial) -> Finding:
        """Return the worst comparison of an instance; a raised exception is a failure."""
        try:
            found = [self._finding(c, trial) for c in self.check(trial)]
        except NotImplementedError as e:
            return Finding(f"not implemented: {e}", 0.0, "-", True, unsupported=True)
        except Exception as e:  # an implementation may fail in any way
            return Finding(f"raised {type(e).__name__}: {e}", math.inf, "no exception", False)
        if not found:
            return Finding("nothing to compare", 0.0, "-", True)
        return min(found, key=lambda f: (f.passed, -abs(f.residual - (self.rate or 0.0))))

    def _finding(self, c: Comparison, trial: Trial) -> Finding:
        if isinstance(c, Curve):
            assert self.rate is not None
            rate = fitted_rate(c, torch.finfo(trial.dtype).eps)
            passed = abs(rate - self.rate) <= self.band
            return Finding(c.what, rate, f"{self.rate:g} +- {self.band:g}", passed)
        if isinstance(c, Pair):
            residual = relative(c.actual, c.expected)
        else:
            residual = excess(c.value, c.limit)
        return Finding(c.what, residual, f"{trial.tolerance:.1e}", not residual > trial.tolerance)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the larger of 1 and the expected size."""
    if actual.shape != expected.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    a, e = actual.detach().double(), expected.detach().double()
    difference = torch.where(a == e, 0.0, (a - e).abs())
    size = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 1.0
    worst = difference.max().item()
    return worst / max(1.0, size) if math.isfinite(worst) else math.inf


def excess(value: Tensor, limit: Tensor) -> float:
    """Return by how much a value exceeds its limit, over the larger of 1 and the limit's size."""
    value, limit = torch.broadcast_tensors(value.detach().double(), limit.detach().double())
    if value.numel() == 0:
        return 0.0
    over = (value - limit) / limit.abs().clamp(min=1)
    return math.inf if over.isnan().any() else max(0.0, over.max().item())


def fitted_rate(curve: Curve, eps: float) -> float:
    """Fits the exponent of error ~ small^rate by least squares of logarithms.

    Distances below 1000 roundings of what they are distances of carry no information: fewer than
    three left give no rate (nan), which no band accepts.
    """
    floor = 1000 * eps * max(curve.scale, 1e-300)
    points = [
        (math.log(x), math.log(y))
        for x, y in zip(curve.small, curve.error, strict=True)
        if math.isfinite(y) and y > floor
    ]
    if len(points) < 3:
        return math.nan
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )


def curve(
    what: str,
    small: Sequence[float],
    side: Callable[[float], Tensor],
    limit: Callable[[float], Tensor],
) -> Curve:
    """Measures the distance of two sides at every value of the small number."""
    errors, scale = [], 0.0
    for x in small:
        a, b = side(x).detach(), limit(x).detach()
        errors.append((a - b).abs().max().item())
        scale = max(scale, b.abs().max().item())
    return Curve(what, tuple(small), tuple(errors), scale)
