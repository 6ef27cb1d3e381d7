"""Lowering: from a spec to the program that engines run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glazoo.program.core import Kernel
from glazoo.program.operands import Operand, Role, operands
from glazoo.program.steps import (
    Bonus,
    Delta,
    Divide,
    ExactGain,
    Forget,
    Full,
    Importance,
    Lag,
    Linear,
    LogImportance,
    Normalize,
    OneToken,
    Precondition,
    ReadOut,
    StatePart,
    Step,
    SubTokens,
    Synapse,
    SynapseDelta,
    TiedKey,
    Times,
    Variance,
)
from glazoo.program.terms import Names, Term, apply

if TYPE_CHECKING:
    from glazoo.spec import Spec

__all__ = ["Program", "lower"]


@dataclass(frozen=True, slots=True)
class Program:
    """What an engine runs: the steps, the operands that they take, and the state that they
    carry."""

    spec: Spec
    operands: tuple[Operand, ...]
    steps: tuple[Step, ...]
    kernel: Kernel
    """The class of its core call."""
    state: tuple[StatePart, ...]
    recurrence: tuple[str, ...]
    """What the steps compute per head and token, in mathematical notation."""

    def operand(self, name: str) -> Operand | None:
        """Return an operand by its name, or None if the program does not take it."""
        return next((o for o in self.operands if o.name == name), None)

    def role(self, role: Role) -> Operand | None:
        """Return the operand with a role, or None if the program takes none."""
        return next((o for o in self.operands if o.role == role), None)

    def state_floats(self, key_size: int, value_size: int) -> int:
        """Count the numbers of the recurrent state per value head."""
        sizes = {"K": key_size, "V": value_size}
        total = 0
        for part in self.state:
            n = 1
            for d in part.shape:
                n *= sizes.get(d, 1)
            total += n
        return total

    def flops_per_token(self, key_size: int, value_size: int) -> int:
        """Count multiplications, additions and divisions of the recurrent form per value head and
        token."""
        return sum(row.times * row.step.cost(key_size, value_size) for row in self.rows())

    def rows(self) -> Iterator[Row]:
        """Iterate over the steps with what each one writes."""
        names, times = _names(self.operands), 1
        for step in _flat(self.steps):
            known, lines = dict(names.x), len(names.lines)
            step.write(names)
            made = {n: x for n, x in names.x.items() if n not in known or known[n] != x}
            texts = names.lines[lines:] or [f"{n} <- {x.text}" for n, x in made.items()]
            yield Row(step, times, tuple(texts))
            if isinstance(step, SubTokens):
                times = step.count

    def describe(self) -> dict[str, Any]:
        """Return the program as plain data, for tables and machines."""
        return {
            "name": self.spec.name,
            "kernel": str(self.kernel),
            "operands": [
                {
                    "name": o.name,
                    "role": o.role,
                    "shapes": ["[" + ", ".join(s) + "]" if s else "number" for s in o.shapes],
                    "domain": o.domain,
                    "meaning": o.meaning,
                    "required": o.required,
                    "idle": o.idle,
                    "wide": o.wide,
                }
                for o in self.operands
            ],
            "state": [
                {"name": p.name, "symbol": p.symbol, "shape": list(p.shape), "meaning": p.meaning}
                for p in self.state
            ],
            "recurrence": list(self.recurrence),
            "steps": [
                {"step": type(row.step).__name__, "times": row.times, "writes": list(row.texts)}
                for row in self.rows()
            ],
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A step of a program, for tables."""

    step: Step
    times: int
    """How often it runs per token."""
    texts: tuple[str, ...]
    """The lines that it writes, or what it makes for later steps."""


@functools.lru_cache(maxsize=512)
def lower(spec: Spec) -> Program:
    """Lower a spec to its program: the operands, the steps and the state.

    A pure function of the spec's values; the name plays no part.

    Args:
        spec: any valid spec.

    Returns:
        The program.
    """
    steps, taken = tuple(_steps(spec)), tuple(operands(spec))
    names = _names(taken)
    for step in steps:
        step.write(names)
    order = ("memory", "importance", "normalizer", "lag_key", "lag_value")
    parts = [part for step in steps for part in step.state()]
    return Program(
        spec=spec,
        operands=taken,
        steps=steps,
        kernel=next(step.kernel for step in _flat(steps) if step.kernel is not None),
        state=tuple(sorted(parts, key=lambda part: order.index(part.name))),
        recurrence=tuple(names.lines),
    )


def _flat(steps: tuple[Step, ...]) -> Iterator[Step]:
    for step in steps:
        yield from step.steps if isinstance(step, OneToken) else (step,)


def _names(taken: tuple[Operand, ...]) -> Names:
    """Name the operands as formulas do: a decay by its exponential, a query with its scale."""
    names = Names({})
    for operand in taken:
        dims = operand.shapes[-1]
        index = "i" if "nT" in dims else "t" if "T" in dims else ""
        shape = (dims[-1], "") if dims[-1] in ("K", "V") else ("", "")
        term = Term(operand.symbol or operand.name, shape)
        if index:
            term = Term(f"{term.text}_{index}", shape)
        if operand.role == "query":
            term = Term(f"scale {term.text}", shape, level=2)
        elif operand.role == "decay":
            term = names.let("a", apply("exp", term))
        elif operand.role == "importance_decay":
            term = apply("exp", term)
        names.x[operand.name] = term
    return names


def _steps(spec: Spec) -> Iterator[Step]:
    """Decide what a spec computes: the one place where its axes become operations."""
    p, imp, erase, count = spec.posterior, spec.importance, spec.erase, spec.steps.count
    given = spec.decay.shape != "none" and spec.decay.source != "derived"
    g = "g" if given else None
    beta = None if spec.write.shape == "none" else "beta"
    # The key that predicts, and the one along which is removed where that is another.
    e, removal = "p" if erase.key == "free" else "k", None
    if spec.key == "one_minus_decay":
        yield TiedKey()
    if erase.strength == "own" and erase.side == "prediction":
        yield Times("e", "erase", e)
        e = "e"
    elif erase.strength == "own":
        yield Times("removal", "a", e)
        removal, count = "removal", 2
    if spec.steps.source == "lagged":
        beta = "beta"
        gates = (beta,) if imp is None or imp.gate.shape == "none" else (beta, "b")
        yield Lag(gates)
        taps = {name: (f"{name}_before", name) for name in ("k", "v", *gates)}
        yield _split(q=(None, "q"), g=(None, g), **taps)
    elif spec.steps.count > 1:
        later = [None] * (count - 1)
        yield _split(q=(*later, "q"), g=(g, *later))
    rated = spec.write.shape == "value" and erase.strength == "write"
    if p.precision == "full":
        w = "v"
        if beta is not None:
            yield Times("w", beta, "v")
            w = "w"
        yield Full(w, beta, g)
    elif spec.importance_per_synapse or (rated and not spec.hebbian):
        yield from _per_synapse(spec, g, beta, e, removal)
    elif spec.log_evidence:
        yield LogImportance()
        yield Variance("z")
        yield Linear("q", "kappa", "v", "forget", symbol="mu")
    else:
        steps = tuple(_per_key(spec, g, beta, e, removal))
        # An engine may have a token in one piece, where importance scales one write.
        if imp is not None and imp.preconditioner is None and count == 1:
            yield OneToken(
                steps,
                beta,
                g,
                None if e == "k" else e,
                "none" if spec.hebbian else p.correction,
                p.gain,
                spec.read.when,
                erase.base,
                erase.strength == "own",
            )
        else:
            yield from steps
    if spec.read.bonus:
        yield Bonus(beta)
    if spec.read.normalizer != "none":
        yield Normalize(beta, g, spec.read.normalizer, spec.read.eps)
    yield ReadOut(count)


def _split(**parts: tuple[str | None, ...]) -> SubTokens:
    """Leave out names that stand for nothing at any sub-token."""
    return SubTokens(tuple((name, given) for name, given in parts.items() if any(given)))


def _per_synapse(
    spec: Spec, g: str | None, beta: str | None, e: str, removal: str | None
) -> Iterator[Step]:
    """Importance with one entry per key and value channel, or a gain with one."""
    p, imp, v, evidence = spec.posterior, spec.importance, "v", "k"
    if beta is not None and (spec.hebbian or spec.erase.strength == "own"):
        # The write gate acts on the value alone.
        yield Times("w", beta, "v")
        v, beta = "w", None
    if spec.hebbian:
        yield Synapse(v, g, spec.read.when)
        return
    if imp is None:
        yield Variance(None)
    if removal is not None:
        # The first sub-token sees all evidence, so that both use the same importance.
        yield _split(
            q=(None, "q"),
            k=(removal, "k"),
            e=(e, None),
            evidence=("k", None),
            b=("b", "b"),
            g=(g, None),
            **{v: (None, v)},
        )
        e, evidence = "e", "evidence"
    yield SynapseDelta(
        v,
        beta,
        None if imp is None else "b",
        imp is not None and imp.gate.shape == "head",
        g,
        e,
        evidence,
        p.gain,
        p.correction,
        spec.erase.base,
    )


def _per_key(
    spec: Spec, g: str | None, beta: str | None, e: str, removal: str | None
) -> Iterator[Step]:
    """Importance that is constant or one vector over keys: the classes of matrix products."""
    p, imp, when = spec.posterior, spec.importance, spec.read.when
    q, k, w, forget, found, symbol = "q", "k", "v", g, None, "S"
    J = "J" if when == "post" else "J_before"
    if imp is None:
        yield Variance(None)
    elif imp.preconditioner is not None:
        yield Importance("g_importance", before=False)
        yield Precondition(imp.preconditioner.base, imp.preconditioner.eps)
        yield Times("kappa", "m", "k")
        k, symbol = "kappa", "mu"
    else:
        pulled = not spec.hebbian and (g is not None or p.gain == "exact")
        yield Importance(g, before=pulled or when == "pre")
        yield Variance(J)
        symbol = "h" if spec.hebbian else "mu"
        if spec.hebbian:
            yield Divide("read", "q", J)
            q = "read"
        elif pulled:
            yield Forget(g)
            forget, found = None if g is None else "forget", "found"
    if p.gain == "exact":
        diagonal = p.correction == "diagonal"
        yield ExactGain(beta, found, forget, diagonal)
        if diagonal:
            yield Linear(q, "kappa", w, "kept", symbol=symbol)
        else:
            yield Times("e", "rate", "k")
            yield Times("w", "rate", "v")
            yield Delta(q, "e", "kappa", "w", forget, "decayed", symbol)
        return
    if beta is not None:
        yield Times("w", beta, "v")
        w = "w"
    if spec.hebbian:
        yield Linear(q, k, w, g, when, symbol)
        return
    if beta is not None and spec.erase.strength == "write":
        yield Times("e", beta, e)
        e = "e"
    if imp is not None and imp.preconditioner is None:
        yield Divide("kappa", "k", "J")
        k = "kappa"
        if removal is not None:
            yield Divide("removed", removal, "J")
            removal = "removed"
    if removal is not None:
        g = forget
        yield _split(q=(None, q), e=(e, None), kappa=(removal, k), w=(None, w), g=(g, None))
        e, k, w, forget = "e", "kappa", "w", "g"
    yield Delta(q, e, k, w, forget, spec.erase.base, symbol)
