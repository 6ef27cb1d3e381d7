"""Distance of every variant to exact inference: the ranking that the theory predicts.

A memory is asked to store pairs of random keys and values, and then read at random queries; the
exact posterior over memories answers the same queries. All variants get the same gates: noise
precision beta as write gate (as its rate, where the write gate is one) and as importance gate, one
decay per token, prior 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glazoo.api import attention
from glazoo.program import Role, lower
from glazoo.spec import Spec
from glazoo.stats import interval
from glazoo.theory.catalogue.axes import data_decay, noisy, relative
from glazoo.theory.exact import posterior
from glazoo.theory.forms import Form, forms
from glazoo.theory.instances import Operands
from glazoo.theory.instances import run as call

__all__ = ["CONDITIONS", "Condition", "Distance", "run", "unsuited"]


@dataclass(frozen=True, slots=True)
class Condition:
    """How crowded a memory is, and whether it forgets."""

    keys: str
    """orthogonal (a random orthonormal basis), random (unit vectors), correlated (unit vectors that
    share a direction)."""
    load: float
    """Stored pairs per key channel."""
    decay: float
    """Forgetting gate a of every token; 1 forgets nothing."""

    @property
    def label(self) -> str:
        """Short text for tables."""
        forget = "no forgetting" if self.decay == 1 else f"a = {self.decay:g}"
        return f"{self.keys}, {self.load:g} pairs per channel, {forget}"


_LOADS = (0.25, 0.5, 1.0, 2.0, 4.0)

CONDITIONS: tuple[Condition, ...] = tuple(
    Condition(keys, load, decay)
    for decay in (1.0, 0.9)
    for keys in ("orthogonal", "random", "correlated")
    for load in _LOADS
    if keys != "orthogonal" or load <= 1
)
"""From orthogonal to crowded keys, without and with forgetting."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Relative distance of one spec's answers to those of the exact posterior."""

    spec: str
    source: str
    """The variant that the spec is, or is the metaplastic form of."""
    metaplastic: bool
    condition: Condition
    mean: float
    """Over seeds: |y - y_exact| / |y_exact|, norms over queries and value channels."""
    low: float
    """Lower end of the 95 % confidence interval of the mean (Student's t over seeds)."""
    high: float
    """Upper end."""
    seeds: int

    def to_json(self) -> dict[str, Any]:
        """Return the distance as plain data."""
        return asdict(self)


def unsuited(spec: Spec) -> str | None:
    """Says why a spec answers no regression question, or gives None."""
    if spec.key != "operand":
        return "its key is tied to its decay: pairs cannot be stored under given keys"
    if spec.log_evidence:
        return "its keys enter as positive evidence only"
    if spec.read.normalizer == "sum":
        return "its normaliser needs positive features"
    return None


def run(
    which: Sequence[str | Path | Spec] | None = None,
    *,
    seeds: int = 20,
    key_size: int = 16,
    value_size: int = 8,
    queries: int = 64,
    conditions: Sequence[Condition] = CONDITIONS,
    impl: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Distance]:
    """Measures the distance of variants and their metaplastic forms to the exact posterior.

    Args:
        which: names or files of variants; default: all that answer the question.
        seeds: random problems per condition.
        key_size: key channels.
        value_size: value channels.
        queries: random unit queries that read the final memory.
        conditions: how crowded the memory is.
        impl: the engine.
        progress: called as `progress(condition, done, total)`.

    Returns:
        One distance per spec and condition, the closest spec (on average) first.

    Raises:
        ValueError: seeds, queries or sizes below 1; a spec answers no regression question.
    """
    sizes = {"seeds": seeds, "queries": queries, "key_size": key_size, "value_size": value_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, accepted are numbers from 1")
    shapes = _forms(which)
    out: list[Distance] = []
    for done, condition in enumerate(conditions):
        if progress is not None:
            progress(condition.label, done, len(conditions))
        problem = _problem(condition, seeds, key_size, value_size, queries)
        for form in shapes:
            errors = _errors(form.spec, problem, impl)
            mean, low, high, _ = interval(errors.tolist())
            source = form.spec.counterpart or form.spec.name
            out.append(
                Distance(
                    form.label,
                    source,
                    form.spec.metaplastic,
                    condition,
                    mean,
                    low,
                    high,
                    seeds,
                )
            )
    if progress is not None:
        progress("done", len(conditions), len(conditions))
    order = _ranking(out)
    return sorted(out, key=lambda d: order.index(d.spec))


def _forms(which: Sequence[str | Path | Spec] | None) -> tuple[Form, ...]:
    given = forms(which)
    if which is None:
        # Noise is that which keeps the prior: forms with a gate for it are those without.
        made = (f for f in given if not (noisy(f.spec) and f.spec.counterpart))
        return tuple(f for f in made if unsuited(f.spec) is None)
    for form in given:
        reason = unsuited(form.spec)
        if reason is not None:
            raise ValueError(f"which: {form.label} has no distance to the posterior: {reason}")
    return given


@dataclass(frozen=True, slots=True)
class _Problem:
    """Random pairs, gates and queries, one row per seed, and the exact answers."""

    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor
    q: Tensor
    truth: Tensor


def _unit(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


def _problem(c: Condition, seeds: int, keys: int, values: int, queries: int) -> _Problem:
    count = max(1, round(c.load * keys))
    rows = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        basis, shared = normal(keys, keys), normal(1, keys)
        k = normal(count, keys)
        v, q = normal(count, values), _unit(normal(queries, keys))
        beta = normal(count).sigmoid()
        if c.keys == "orthogonal":
            k = torch.linalg.qr(basis)[0][:count]
        elif c.keys == "correlated":
            k = _unit(k) + _unit(shared)
        rows.append((_unit(k), v, beta, q))
    k, v, beta, q = (torch.stack(x) for x in zip(*rows, strict=True))
    g = torch.full_like(beta, c.decay).log()
    mean = posterior(k, v, beta, g=g).mean[:, -1]
    return _Problem(k, v, beta, g, q, torch.einsum("skv,sqk->sqv", mean, q))


def _errors(spec: Spec, p: _Problem, impl: str) -> Tensor:
    """Return the relative distance per seed."""
    if spec.decay.source == "fixed":
        # A fixed decay would forget at every read; the same decay per token need not.
        spec = data_decay(spec, "head")
    op = functools.partial(attention, impl=impl)
    y: Tensor = call(op, spec, _operands(spec, p), scale=1.0).output[:, p.k.shape[1] :, 0]
    difference: Tensor = (y - p.truth).flatten(1).norm(dim=1)
    size: Tensor = p.truth.flatten(1).norm(dim=1)
    return difference / size


def _operands(spec: Spec, p: _Problem) -> Operands:
    """Writes the pairs, one per token, then reads the memory with tokens that change nothing."""
    seeds, keys = p.k.shape[0], p.k.shape[2]
    reads, values, n = p.q.shape[1], p.v.shape[2], spec.substeps

    def tokens(x: Tensor, *, steps: bool = True) -> Tensor:
        """Puts [S, T, ...] before idle reads; further writes of a token are idle too."""
        x = torch.cat([x, x.new_zeros(seeds, reads, *x.shape[2:])], 1)
        if n > 1 and steps:
            idle = [torch.zeros_like(x)] * (n - 1)
            x = torch.stack([x, *idle], 2).flatten(1, 2)
        return x[:, :, None]

    def gate(x: Tensor, shape: tuple[str, ...]) -> Tensor:
        x = tokens(x, steps="nT" in shape)
        size = {"K": keys, "V": values}.get(shape[-1])
        return x if size is None else x[..., None].expand(*x.shape, size)

    # A prediction from the state before the decay needs a key that decays for it.
    decayed = p.g.exp() if spec.erase.base == "prev" else torch.ones_like(p.g)
    ops: Operands = {
        "q": torch.cat([torch.zeros_like(p.k), p.q], 1)[:, :, None],
        "k": tokens(p.k),
        "v": tokens(p.v),
    }
    # What a removal takes along the decayed key, it takes once per decay of that key.
    erase = p.beta / decayed if spec.erase.side == "removal" else p.beta
    gates: dict[Role, Tensor] = {
        "decay": p.g,
        "importance_decay": p.g,
        "write": p.beta / (1 + p.beta) if spec.posterior.beta == "rate" else p.beta,
        "importance": p.beta,
        "erase": erase,
        "tap": torch.ones_like(p.beta),
        # What the decay loses of the prior's variance.
        "noise": 1 - (2 * p.g).exp(),
    }
    constants: dict[Role, float] = {"bonus": 0.0, "prior": 1.0}
    for operand in lower(spec).operands:
        role, shape = operand.role, operand.shapes[-1]
        if role in gates:
            ops[operand.name] = gate(gates[role], shape)
        elif role == "erase_key":
            ops[operand.name] = tokens(p.k * decayed[..., None])
        elif role == "mix":
            ops[operand.name] = torch.ones_like(tokens(p.beta))
        elif role in constants and not relative(spec):
            ops[operand.name] = p.k.new_full((1, keys)[: len(shape)], constants[role])
    if "beta" not in ops:
        ops["v"] = ops["v"] * tokens(p.beta)[..., None]
    return ops


def _ranking(distances: Sequence[Distance]) -> list[str]:
    """Orders specs by their average distance over conditions."""
    labels = list(dict.fromkeys(d.spec for d in distances))

    def average(label: str) -> float:
        mine = [d.mean for d in distances if d.spec == label]
        # Rounded: specs of one class stay in the order of their names on every engine.
        return round(sum(mine) / len(mine), 9)

    return sorted(labels, key=average)
