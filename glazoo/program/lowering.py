"""Lowering: from a spec to the program that engines run."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from glazoo.program import steps as step
from glazoo.program.core import Kernel, automatic
from glazoo.program.operands import Operand, Role, operands
from glazoo.program.steps import StatePart, Step
from glazoo.program.terms import Names, Term, apply
from glazoo.state import State

if TYPE_CHECKING:
    from glazoo.spec import Spec

__all__ = ["Program", "lower"]


Part = Step | step.Tempered | step.TemperedRead | step.OneToken
"""What a program runs: a step, or several of which an engine may have all in one piece."""


@dataclass(frozen=True, slots=True)
class Row:
    """A step of a program, for tables."""

    step: Step
    times: int
    """How often it runs per token."""
    texts: tuple[str, ...]
    """The lines that it writes, or what it makes for later steps."""

    def operations(self, key_size: int, value_size: int) -> int:
        """Count its operations per value head and token."""
        return self.times * self.step.cost(key_size, value_size)


@dataclass(frozen=True, slots=True)
class Program:
    """What an engine runs: the steps, the operands that they take, and the state that they
    carry."""

    spec: Spec
    operands: tuple[Operand, ...]
    steps: tuple[Part, ...]
    kernel: Kernel
    """The class of its first core call, which costs most."""
    state: tuple[StatePart, ...]
    recurrence: tuple[str, ...]
    """What the steps compute per head and token, in mathematical notation."""
    rows: tuple[Row, ...]
    """Each step with what it writes and costs."""

    def operand(self, name: str) -> Operand | None:
        """Return an operand by its name, or None if the program does not take it."""
        return next((o for o in self.operands if o.name == name), None)

    def role(self, role: Role) -> Operand | None:
        """Return the operand with a role, or None if the program takes none."""
        return next((o for o in self.operands if o.role == role), None)

    @property
    def piece(self) -> step.OneToken | None:
        """What an engine may run a token of in one piece, if that is the whole program."""
        first, *others = self.steps
        return first if isinstance(first, step.OneToken) and not others else None

    def state_floats(self, key_size: int, value_size: int) -> int:
        """Count the numbers of the recurrent state per value head."""
        sizes = {"K": key_size, "V": value_size}
        return sum(math.prod(sizes.get(d, 1) for d in part.shape) for part in self.state)

    def flops_per_token(self, key_size: int, value_size: int) -> int:
        """Count multiplications, additions and divisions of the recurrent form per value head and
        token."""
        return sum(row.operations(key_size, value_size) for row in self.rows)

    def _repr_html_(self) -> str | None:
        """Return what `glazoo show` prints, for notebooks; None, where rich is not installed."""
        if find_spec("rich") is None:
            return None
        from glazoo.program.show import html

        return html(self)

    def auto(self) -> dict[str, str]:
        """Return the engine that `impl="auto"` is for it on this machine, by device."""
        numba = find_spec("numba") is not None
        return {device: automatic(device, numba=numba) for device in ("cpu", "cuda")}

    def describe(self) -> dict[str, Any]:
        """Return the program as plain data, for tables and machines."""
        return {
            "name": self.spec.name,
            "kernel": str(self.kernel),
            "auto": self.auto(),
            "token": "steps" if self.piece is None else "one piece",
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
                for row in self.rows
            ],
        }


# Specs by their place in memory, which they keep while they stand here: a token of decoding is
# shorter than the comparison of two equal ones.
_SEEN: dict[int, tuple[Spec, Program]] = {}
_MOST = 512


def lower(spec: Spec) -> Program:
    """Lower a spec to its program: the operands, the steps and the state.

    A pure function of the spec's values; the name plays no part.

    Args:
        spec: any valid spec.

    Returns:
        The program.
    """
    seen = _SEEN.get(id(spec))
    if seen is None:
        if len(_SEEN) >= _MOST:
            _SEEN.clear()
        seen = _SEEN[id(spec)] = spec, _lower(spec)
    return seen[1]


@functools.lru_cache(maxsize=_MOST)
def _lower(spec: Spec) -> Program:
    steps, taken = tuple(_steps(spec)), tuple(operands(spec))
    names, rows, times = _names(taken), [], 1
    for part in steps:
        for one in _leaves(part):
            known, lines = dict(names.x), len(names.lines)
            one.write(names)
            made = {name: x for name, x in names.x.items() if known.get(name) != x}
            texts = names.lines[lines:] or [f"{name} <- {x.text}" for name, x in made.items()]
            rows.append(Row(one, times, tuple(texts)))
            if isinstance(one, step.SubTokens | step.ReadOut):
                times = one.count if isinstance(one, step.SubTokens) else 1
    names.lines.append(f"y_t = {names.x['y'].text}")
    if "uncertainty" in names.x:
        names.lines.append(f"var_t = {names.x['uncertainty'].text}")
    parts = [part for row in rows for part in row.step.state()]
    return Program(
        spec=spec,
        operands=taken,
        steps=steps,
        kernel=next(row.step.kernel for row in rows if row.step.kernel is not None),
        state=tuple(sorted(parts, key=lambda part: State._fields.index(part.name))),
        recurrence=tuple(names.lines),
        rows=tuple(rows),
    )


def _leaves(part: Part) -> Iterator[Step]:
    """List the steps of which a step consists."""
    if isinstance(part, Step):
        yield part
    else:
        for one in part.steps:
            yield from _leaves(one)


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


def _steps(spec: Spec) -> Iterator[Part]:
    """Decide what a spec computes: the one place where its axes become operations."""
    p, imp, erase, count = spec.posterior, spec.importance, spec.erase, spec.steps.count
    given = spec.decay.shape != "none" and spec.decay.source != "derived"
    g = "g" if given else None
    beta = None if spec.write.shape == "none" else "beta"
    noise = _noise(spec)
    if spec.substeps > 1:
        later = [None] * (count - 1)
        yield _split(q=(*later, "q"), g=(g, *later), noise=(noise, *later))
    tied = spec.key == "one_minus_decay"
    before: list[Step] = [step.TiedKey()] if tied else []
    # The key that predicts, and the one along which is removed where that is another.
    e, removed = "p" if erase.key == "free" else "k", None
    if erase.strength == "own" and erase.side == "prediction":
        before.append(step.Times("e", "erase", e))
        e = "e"
    elif erase.strength == "own":
        before.append(step.Times("removed_key", "removal", e))
        removed, count = "removed_key", 2
    if _in_one_piece(spec, count):
        synapse = spec.importance_per_synapse or _rated(spec)
        per_memory = _per_synapse if synapse else _per_key
        yield step.OneToken(
            tuple(before),
            tuple(per_memory(spec, g, beta, e, removed)),
            beta=beta,
            b=None if imp is None else "b",
            g=g,
            p="p" if erase.key == "free" else None,
            erase="erase" if e == "e" else None,
            tied=tied,
            synapse=synapse,
            correction="none" if spec.hebbian else p.correction,
            gain=_gain(spec),
            read=spec.read.when,
            base=erase.base,
        )
        yield from _after(spec, g, beta, count)
        return
    yield from before
    if spec.steps.source == "lagged":
        beta = "beta"
        gates = (beta,) if imp is None or imp.gate.shape == "none" else (beta, "b")
        yield step.Lag(gates)
        taps = {name: (f"{name}_previous", name) for name in ("k", "v", *gates)}
        yield _split(q=(None, "q"), g=(None, g), noise=(None, noise), **taps)
    if p.precision == "full":
        yield from _matrix(spec, g, beta, e)
    elif spec.importance_per_synapse or _rated(spec):
        yield from _per_synapse(spec, g, beta, e, removed)
    elif spec.log_evidence:
        yield step.LogImportance()
        yield step.Variance("z")
        yield step.Linear("q", "kappa", "v", "forget", symbol="mu")
    else:
        yield from _per_key(spec, g, beta, e, removed)
    yield from _after(spec, g, beta, count)


def _after(spec: Spec, g: str | None, beta: str | None, count: int) -> Iterator[Step]:
    """Yield the steps that follow the memory."""
    if count > 1:
        yield step.ReadOut(count)
    if spec.read.bonus:
        yield step.Bonus(beta)
    if spec.read.normalizer != "none":
        yield step.Normalize(beta, g, spec.read.normalizer, spec.read.eps)


def _rated(spec: Spec) -> bool:
    """Return whether the gain of a delta rule has an entry per synapse, by its write gate."""
    return spec.write.shape == "value" and spec.erase.strength == "write" and not spec.hebbian


def _in_one_piece(spec: Spec, count: int) -> bool:
    """Return whether an engine may have a token in one piece: where importance, if there is any,
    scales one write in the basis of the keys, and counts what this write does."""
    p, imp = spec.posterior, spec.importance
    if count > 1 or spec.turned or p.gain == "flow" or spec.log_evidence:
        return False
    if imp is None:
        return True
    plain = imp.preconditioner is None and imp.basis == "own"
    shared = imp.gate.shape == "head" and _rated(spec)
    return plain and not shared and (p.precision, spec.forgetting) == ("diagonal", "temper")


def _gain(spec: Spec) -> str:
    """Return the gain as the kernels name it."""
    p = spec.posterior
    return "exact_rate" if p.beta == "rate" else p.gain


def _noise(spec: Spec) -> str | None:
    imp = spec.importance
    return None if imp is None or imp.noise.shape == "none" else "noise"


def _split(**parts: tuple[str | None, ...]) -> step.SubTokens:
    """Leave out names that stand for nothing at any sub-token."""
    return step.SubTokens(tuple((name, given) for name, given in parts.items() if any(given)))


def _per_synapse(
    spec: Spec, g: str | None, beta: str | None, e: str, removed: str | None
) -> Iterator[Step]:
    """Importance with one entry per key and value channel, or a gain with one."""
    p, imp, v, evidence = spec.posterior, spec.importance, "v", "k"
    if beta is not None and (spec.hebbian or spec.erase.strength == "own"):
        # The write gate acts on the value alone.
        yield step.Times("w", beta, "v")
        v, beta = "w", None
    if spec.hebbian:
        yield step.Synapse(v, g, spec.read.when)
        return
    if imp is None:
        yield step.Variance(None)
    q, k, b = "q", "k", None if imp is None else "b"
    if removed is not None:
        # The first sub-token sees all evidence, so that both use the same importance.
        yield _split(
            read=(None, q),
            kappa=(removed, k),
            w=(None, v),
            e=(e, None),
            evidence=(k, None),
            b=(b, b),
            forget=(g, None),
        )
        q, k, v, e, evidence = "read", "kappa", "w", "e", "evidence"
        g = None if g is None else "forget"
    yield step.SynapseDelta(
        q=q,
        k=k,
        v=v,
        beta=beta,
        b=b,
        shared=imp is not None and imp.gate.shape == "head",
        g=g,
        e=e,
        evidence=evidence,
        gain=_gain(spec),
        correction=p.correction,
        base=spec.erase.base,
    )


def _matrix(spec: Spec, g: str | None, beta: str | None, e: str) -> Iterator[Step]:
    """Importance as a matrix over keys: solves, or a covariance, and a class of matrix products."""
    p, imp, erase, base = spec.posterior, spec.importance, spec.erase, spec.erase.base
    assert imp is not None
    b = beta if imp.gate.shape == "none" else "b"
    w = "v"
    if imp.forgetting == "diffuse":
        yield step.Covariance(b, g, _noise(spec))
        if p.gain == "first_order":
            yield step.Observed("kappa", "found", b)
    if p.gain != "first_order" and not spec.sums_writes:
        scaled = "found"
        if imp.forgetting != "diffuse":
            scaled = "z"
            yield step.Solve("z", "k", b, g, "decayed")
        yield step.Gain(beta, None, g, False, _gain(spec), scaled)
        if imp.forgetting == "diffuse":
            yield step.Times("e", "rate", "k")
            yield step.Times("w", "rate", "v")
            yield step.Delta("q", "e", "found", "w", g, base, "mu")
            return
        yield step.Natural("b", "z")
        yield step.Times("e", "removed", "z")
        yield step.Times("w", "written", "v")
        w = "w"
    else:
        if beta is not None:
            yield step.Times("w", beta, "v")
            w = "w"
        if imp.forgetting == "diffuse" and spec.hebbian:
            if b is not None:
                yield step.Times("e", b, "k")
                e = "e"
        elif not spec.sums_writes and beta is not None and erase.strength == "write":
            yield step.Times("e", beta, e)
            e = "e"
        if imp.forgetting == "diffuse":
            yield step.Delta("q", e, "kappa", w, g, base, "mu")
            return
        if not spec.sums_writes and (base == "decayed" or g is None):
            base = "decayed"
            # The matrix forgets along k what the write does not remove.
            yield step.Less("rest", e, "b", "k")
            yield step.Solve("e", "rest", b, g, "decayed")
        elif not spec.sums_writes:
            yield step.Times("rest", "b", "k")
            yield step.Solve("rest", "rest", b, g, "decayed")
            yield step.Solve("e", e, b, g, "previous")
            assert g is not None
            yield step.Less("e", "e", g, "rest")
    if imp.prior.shape == "relative":
        yield step.SolveRelative(b, g, imp.prior.floor)
    else:
        yield step.Solve("x", "q", b, g)
    yield step.Variance(None, solved="x")
    if spec.read.mix.shape != "none":
        yield step.Mix()
    if spec.sums_writes:
        yield step.Linear("x", "k", w, g, symbol="h")
    else:
        yield step.Delta("x", "e", "k", w, g, base, "h")


def _per_key(
    spec: Spec, g: str | None, beta: str | None, e: str, removed: str | None
) -> Iterator[Step | step.Tempered | step.TemperedRead]:
    """Importance that is constant, one number or one vector over keys: the classes of matrix
    products."""
    p, imp, when = spec.posterior, spec.importance, spec.read.when
    q, k, w, forget, found, symbol = "q", "k", "v", g, None, "S"
    J = "J" if when == "post" else "J_previous"
    isotropic, diffuse = p.precision == "isotropic", spec.forgetting == "diffuse"
    # Of an importance and what it makes of keys, an engine may have all in one operation.
    at_once = imp is not None and imp.preconditioner is None and spec.forgetting == "temper"
    at_once = at_once and not isotropic
    if p.gain != "first_order" and p.correction == "diagonal":
        # What is left of the mean needs the quotient before it is rounded.
        at_once = False
    counted: tuple[step.Importance, step.Variance] | None = None
    forgets = None

    def over(divide: step.Divide | step.Gain, keeps: bool = False) -> Step | step.Tempered:
        return step.Tempered(*counted, forgets, divide, keeps) if counted else divide

    # Importance over axes of its own, while the mean stays where the keys are.
    axes = imp is not None and imp.basis == "rotated" and diffuse
    own = diffuse and spec.hebbian and not (axes or isotropic)
    # What one observation says about other synapses is removed from them, too.
    shares = diffuse and spec.hebbian and not own
    if spec.turned:
        for name in dict.fromkeys(("q", "k", e)):
            yield step.Turn(name, name)
    if imp is None:
        yield step.Variance(None)
    elif imp.preconditioner is not None:
        yield step.Importance("g_importance", keeps_previous=False)
        yield step.Precondition(imp.preconditioner.base, imp.preconditioner.eps)
        yield step.Times("kappa", "m", "k")
        k, symbol = "kappa", "mu"
    elif diffuse:
        if axes:
            yield step.Turn("q_axes", "q")
            yield step.Turn("k_axes", "k")
        yield step.Diffuse("k_axes" if axes else "k", g, _noise(spec), isotropic, axes)
        yield step.Variance(J, "q_axes" if axes else "q")
        symbol, found = "mu", "found"
    else:
        discount = spec.forgetting == "discount"
        pulled = not spec.hebbian and not discount and (g is not None or p.gain != "first_order")
        keeps = pulled or when == "pre" or (discount and p.gain != "first_order")
        scan = step.Importance(g, keeps, isotropic, discount), step.Variance(J)
        if at_once:
            counted = scan
        else:
            yield from scan
        symbol = "h" if spec.hebbian else "mu"
        if spec.hebbian:
            divide = step.Divide("read", "q", J)
            if not at_once:
                yield divide
            q = "read"
        elif discount:
            forget = None
            if p.gain != "first_order":
                yield step.Discounted(g)
                found = "found"
        elif pulled:
            forgets = step.Forget(g)
            if not at_once:
                yield forgets
            forget, found = None if g is None else "forget", "found"
    if p.gain != "first_order":
        diagonal, scaled = p.correction == "diagonal", "k"
        if axes:
            yield from _over_found("scaled", axes)
            found, scaled = None, "scaled"
        gain = step.Gain(beta, found, forget, diagonal, _gain(spec), scaled)
        yield over(gain)
        if diagonal:
            yield step.Linear(q, "kappa", w, "kept", symbol=symbol)
        else:
            yield step.Times("e", "rate", "k")
            yield step.Times("w", "rate", "v")
            yield step.Delta(q, "e", "kappa", "w", forget, "decayed", symbol)
        return
    if beta is not None:
        yield step.Times("w", beta, "v")
        w = "w"
    if spec.hebbian and not diffuse:
        memory = step.Linear(q, k, w, g, when, symbol)
        yield step.TemperedRead(*counted, divide, memory) if counted else memory
        return
    if not spec.hebbian and beta is not None and spec.erase.strength == "write":
        yield step.Times("e", beta, e)
        e = "e"
    if shares:
        yield step.Times("e", "b", "k")
        yield from _over_found("scaled", axes)
        yield step.Observed("kappa", "scaled", "b")
        e, k = "e", "kappa"
    elif axes:
        yield step.Divide("k_axes", "k_axes", "J")
        yield step.Turn("kappa", "k_axes", back=True)
        k = "kappa"
    elif imp is not None and imp.preconditioner is None:
        yield over(step.Divide("kappa", "k", "J"), keeps=removed is not None)
        k = "kappa"
        if removed is not None:
            yield step.Divide("removed_key", removed, "J")
            removed = "removed_key"
    if own:
        yield step.Kept(g)
        yield step.Linear(q, k, w, "kept", when, symbol)
        return
    if removed is not None:
        yield _split(
            read=(None, q), e=(e, None), kappa=(removed, k), w=(None, w), forget=(forget, None)
        )
        q, e, k, w, forget = "read", "e", "kappa", "w", None if forget is None else "forget"
    yield step.Delta(q, e, k, w, forget, spec.erase.base, symbol)


def _over_found(out: str, axes: bool) -> Iterator[Step]:
    """The key over the importance that it finds, counted along axes of its own or not."""
    if axes:
        yield step.Divide("k_axes", "k_axes", "found", whole=True)
        yield step.Turn(out, "k_axes", back=True)
    else:
        yield step.Divide(out, "k", "found", whole=True)
