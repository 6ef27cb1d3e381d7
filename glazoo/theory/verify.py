"""Runs the catalogue: every statement, on every spec that it is claimed for, on every engine."""

from __future__ import annotations

import difflib
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from glazoo.api import attention
from glazoo.engines import available
from glazoo.spec import Spec, SpecError
from glazoo.theory.catalogue import ENTRIES, entry
from glazoo.theory.entry import Domain, Entry, Finding, Kind, Op, Trial
from glazoo.theory.forms import Form, forms
from glazoo.theory.instances import Instance
from glazoo.zoo import load

__all__ = ["Result", "failures", "passed", "render", "replay", "run", "summary"]

Verdict = Literal["passed", "failed", "skipped"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Result:
    """One statement for one spec on one implementation."""

    id: str
    statement: str
    kind: str
    spec: str
    impl: str
    dtype: str
    verdict: Verdict
    instances: int = 0
    residual: float = 0.0
    """Worst relative residual, worst excess over a bound, or the fitted rate farthest from the
    predicted one."""
    allowed: str = ""
    what: str = ""
    """Which of the compared tensors was worst; for what is skipped, the reason."""
    instance: Instance | None = None
    """The smallest failing instance found."""
    snippet: str | None = None
    """A Python program that shows the failure."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data; a number that is not finite becomes a string."""
        data = asdict(self)
        if not math.isfinite(self.residual):
            data["residual"] = str(self.residual)
        return data


Progress = Callable[[str, int, int], None]


def run(
    names: Sequence[str | Path | Spec] | None = None,
    *,
    examples: int = 3,
    dtype: str = "float64",
    impl: str | None = None,
    seed: int = 0,
    op: Op | None = None,
    shrink: bool = True,
    only_source: bool = False,
    progress: Progress | None = None,
) -> list[Result]:
    """Verifies statements of the catalogue.

    Args:
        names: identifiers of statements, and names or files of variants (or specs); of each sort,
            default: all.
        examples: instances per statement and spec; some statements add one that crosses chunks.
        dtype: "float64" or "float32"; limits need float64.
        impl: an engine; default: all of this installation.
        seed: decides all instances.
        op: an implementation with the signature of `glazoo.attention`, instead of engines; where a
            statement compares a spec with another one, the reference runs the other.
        shrink: whether to look for a smaller instance of the first failure of each statement.
        only_source: whether to leave out the metaplastic forms of frozen variants.
        progress: called as `progress(statement, done, total)`.

    Returns:
        One result per statement, spec and implementation, in the catalogue's order. The same
        arguments give the same results.

    Raises:
        ValueError: a name is neither a statement nor a variant, or an option is not accepted.
    """
    if examples < 1:
        raise ValueError(f"examples: got {examples}, accepted are numbers from 1")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, accepted are {', '.join(_DTYPES)}")
    if impl is not None and impl not in available():
        raise ValueError(f"impl: got {impl!r}, accepted are {', '.join(available())}")
    entries, subjects = _select(names, only_source)
    results: list[Result] = []
    ops: dict[str, Op] = {}
    if op is not None:
        ops["op"] = op
    else:
        for name in available() if impl is None else (impl,):
            reason = _unavailable(name)
            if reason is None:
                ops[name] = functools.partial(attention, impl=name)
            else:
                results.append(Result("-", "engine", "-", "-", name, dtype, "skipped", what=reason))
    work = [
        (e, form, name)
        for e in entries
        for name in ops
        if not (e.engine and name == "reference")
        for form in subjects
        if e.applies(form.spec)
    ]
    if ops and not work:
        raise ValueError("names: none of the statements is claimed for any of the specs")
    shrunk: set[tuple[str, str]] = set()
    for done, (e, form, name) in enumerate(work):
        if progress is not None:
            progress(e.id, done, len(work))
        if e.kind is Kind.LIMIT and dtype != "float64":
            reason = "a rate is fitted over several orders of magnitude: float64 only"
            results.append(
                Result(e.id, e.statement, e.kind, form.label, name, dtype, "skipped", what=reason)
            )
            continue
        may_shrink = shrink and (e.id, name) not in shrunk
        counted = _Counted(ops[name])
        result = _verify(e, form, name, counted, dtype, examples, seed, may_shrink)
        if result.verdict == "failed":
            shrunk.add((e.id, name))
        if counted.calls or op is None:
            # A statement that never calls the given implementation says nothing about it.
            results.append(result)
    if progress is not None:
        progress("done", len(work), len(work))
    return results


class _Counted:
    """An implementation that knows whether it was called."""

    def __init__(self, op: Op) -> None:
        self.op, self.calls = op, 0

    def __call__(self, spec: Spec, q: Tensor, k: Tensor | None, v: Tensor, **options: Any) -> Any:
        self.calls += 1
        return self.op(spec, q, k, v, **options)


_reference: Op = functools.partial(attention, impl="reference")


def _trial(op: Op, name: str, spec: Spec, instance: Instance, dtype: str) -> Trial:
    return Trial(op, spec, instance, _DTYPES[dtype], _reference if name == "op" else None)


def passed(results: Iterable[Result]) -> bool:
    """Return whether something was verified and nothing failed."""
    verdicts = [r.verdict for r in results]
    return "failed" not in verdicts and "passed" in verdicts


def _select(
    names: Sequence[str | Path | Spec] | None, only_source: bool
) -> tuple[tuple[Entry, ...], tuple[Form, ...]]:
    """Sorts names into statements and specs."""
    ids = {e.id: e for e in ENTRIES}
    entries = [e for e in ENTRIES if e.id in (names or ())]
    variants: list[str | Path | Spec] = []
    for name in names or ():
        if isinstance(name, str) and name in ids:
            continue
        try:
            load(name)
        except SpecError as e:
            near = difflib.get_close_matches(str(name), ids, n=1)
            hint = f"; did you mean the statement {near[0]!r}?" if near else ""
            raise ValueError(f"names: {name!r} is no statement, and {e}{hint}") from e
        variants.append(name)
    return tuple(entries) or ENTRIES, forms(variants or None, metaplastic=not only_source)


def _unavailable(name: str) -> str | None:
    """Says why an engine cannot run here, or gives None."""
    spec = load("linear_attention")
    ops = Instance().operands(spec)
    try:
        attention(spec, ops["q"], ops["k"], ops["v"], impl=name)
    except (ImportError, NotImplementedError, RuntimeError) as e:
        return f"cannot run here: {e}"
    except ValueError as e:
        # An engine that serves other devices or dtypes says so itself.
        return f"does not serve these calls: {e}"
    return None


def _verify(
    e: Entry,
    form: Form,
    name: str,
    op: Op,
    dtype: str,
    examples: int,
    seed: int,
    shrink: bool,
) -> Result:
    # The seed of an entry and a spec does not depend on what else is run.
    own = (seed * 65_537 + zlib.crc32(f"{e.id} {form.label}".encode())) % 2**31
    cases = [e.domain.sample(n, own) for n in range(examples)]
    if e.domain.long:
        cases.append(e.domain.sample_long(own))
    worst: Finding | None = None
    unsupported: set[str] = set()
    for instance in cases:
        finding = e.judge(_trial(op, name, form.spec, instance, dtype))
        if finding.unsupported:
            unsupported.add(finding.what)
            continue
        if worst is None or _badness(e, finding) > _badness(e, worst):
            worst = finding
        if not finding.passed:
            if shrink:
                instance, worst = _smallest(e, form, name, op, dtype, instance, finding)
            return Result(
                e.id,
                e.statement,
                e.kind,
                form.label,
                name,
                dtype,
                "failed",
                len(cases),
                worst.residual,
                worst.allowed,
                worst.what,
                instance,
                _snippet(e, form, name, dtype, instance),
            )
    if worst is None:
        reason = "; ".join(sorted(unsupported))
        return Result(e.id, e.statement, e.kind, form.label, name, dtype, "skipped", what=reason)
    return Result(
        e.id,
        e.statement,
        e.kind,
        form.label,
        name,
        dtype,
        "passed",
        len(cases),
        worst.residual,
        worst.allowed,
        worst.what,
    )


def _badness(e: Entry, f: Finding) -> float:
    distance = abs(f.residual - e.rate) if e.rate is not None else f.residual
    return math.inf if math.isnan(distance) else distance


def _smallest(
    e: Entry,
    form: Form,
    name: str,
    op: Op,
    dtype: str,
    instance: Instance,
    finding: Finding,
) -> tuple[Instance, Finding]:
    """Looks for a smaller failing instance; without hypothesis, the one at hand has to do."""
    try:
        from hypothesis import HealthCheck, Phase, find, settings
        from hypothesis.errors import NoSuchExample
    except ImportError:
        return instance, finding
    from glazoo.theory import strategies

    def judge(x: Instance) -> Finding:
        return e.judge(_trial(op, name, form.spec, x, dtype))

    def fails(x: Instance) -> bool:
        f = judge(x)
        return not f.passed and not f.unsupported

    # What failed bounds the search: only sizes up to its own, down to one.
    def up_to(low_high: tuple[int, int], size: int) -> tuple[int, int]:
        return (min(low_high[0], size), max(min(low_high[0], size), size))

    d, i = e.domain, instance
    small = Domain(
        tuple(dict.fromkeys((d.regimes[0], i.regime))),
        up_to(d.batch, i.B),
        up_to(d.tokens, i.T),
        up_to(d.heads, i.H),
        up_to(d.groups, i.G),
        up_to(d.keys, i.K),
        up_to(d.values, i.V),
        i.start if d.start is not None or not i.start else None,
    )
    quiet = settings(
        max_examples=60,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        smallest = find(strategies.instances(small), fails, settings=quiet, random=Random(i.seed))
    except NoSuchExample:
        return instance, finding
    return smallest, judge(smallest)


def _snippet(e: Entry, form: Form, name: str, dtype: str, instance: Instance) -> str:
    which = f"impl={name!r}"
    if name == "op":
        which = "op=op"
    lines = [
        "import glazoo",
        "from glazoo.theory import Instance, replay",
        "",
        f"spec = {form.expression}",
        f"instance = {instance}",
        f"print(replay({e.id!r}, spec, instance, {which}, dtype={dtype!r}))",
    ]
    if name == "op":
        lines.insert(3, "op = ...  # the implementation that was verified")
    return "\n".join(lines)


def replay(
    id: str,  # noqa: A002
    spec: str | Path | Spec,
    instance: Instance,
    *,
    impl: str = "reference",
    dtype: str = "float64",
    op: Op | None = None,
) -> str:
    """Evaluates one statement on one instance and says what was compared.

    Args:
        id: identifier of the statement.
        spec: the spec.
        instance: sizes, regime and seed.
        impl: the engine.
        dtype: "float64" or "float32".
        op: an implementation to evaluate instead of the engine.

    Returns:
        Text: the statement, the operands (if they are few) and the verdict.
    """
    e, spec = entry(id), load(spec)
    run_op: Op = functools.partial(attention, impl=impl) if op is None else op
    trial = _trial(run_op, "op" if op is not None else impl, spec, instance, dtype)
    finding = e.judge(trial)
    measure = "fitted rate" if e.kind is Kind.LIMIT else "residual"
    lines = [
        f"{e.id} ({e.kind}): {e.statement}",
        f"  left:      {e.left}",
        f"  right:     {e.right}",
        f"  condition: {e.condition}",
        f"  spec:      {spec.name}",
        f"  {instance}",
    ]
    ops = trial.operands()
    if sum(x.numel() for x in ops.values()) <= 64:
        lines += [f"  {name} = {x.tolist()}" for name, x in ops.items()]
    lines.append(
        f"  {'passed' if finding.passed else 'FAILED'}: {finding.what}: {measure} "
        f"{finding.residual:.3g}, accepted {finding.allowed}"
    )
    return "\n".join(lines)


def render(results: Sequence[Result]) -> Table:
    """Return a table: statement, kind, specs, worst residual or fitted rate per engine, verdict."""
    impls = list(dict.fromkeys(r.impl for r in results if r.verdict != "skipped"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("statement", overflow="fold", ratio=1)
    table.add_column("kind")
    table.add_column("specs", justify="right")
    for impl in impls:
        table.add_column(impl, justify="right", no_wrap=True)
    table.add_column("verdict")
    for id_ in dict.fromkeys(r.id for r in results if r.id != "-"):
        mine = [r for r in results if r.id == id_]
        statement = Text.assemble((id_, "bold"), "\n", (mine[0].statement, "dim"))
        cells = [_cell([r for r in mine if r.impl == impl]) for impl in impls]
        failed = sum(r.verdict == "failed" for r in mine)
        ran = sum(r.verdict == "passed" for r in mine) + failed
        verdict = Text("passed", "green")
        if failed:
            verdict = Text(f"FAILED ({failed} of {ran})", "bold red")
        elif not ran:
            verdict = Text(f"skipped: {mine[0].what}", "yellow")
        specs = len({r.spec for r in mine})
        table.add_row(statement, mine[0].kind, str(specs), *cells, verdict)
    return table


def _cell(results: Sequence[Result]) -> Text:
    ran = [r for r in results if r.verdict != "skipped"]
    if not ran:
        return Text("-", "dim")
    if ran[0].kind == Kind.LIMIT:
        rate = entry(ran[0].id).rate
        assert rate is not None
        worst = max(
            ran, key=lambda r: math.inf if math.isnan(r.residual) else abs(r.residual - rate)
        )
        return Text(f"rate {worst.residual:.3f}")
    worst = max(ran, key=lambda r: (r.verdict == "failed", r.residual))
    return Text(f"{worst.residual:.1e}")


def failures(results: Sequence[Result]) -> list[str]:
    """Return one text per failed statement and implementation: what failed, and a program for
    it."""
    out = []
    seen: set[tuple[str, str]] = set()
    for r in results:
        if r.verdict != "failed" or (r.id, r.impl) in seen:
            continue
        seen.add((r.id, r.impl))
        also = [
            x.spec
            for x in results
            if (x.id, x.impl, x.verdict) == (r.id, r.impl, "failed") and x.spec != r.spec
        ]
        more = f"\n  also fails for: {', '.join(also)}" if also else ""
        out.append(
            f"{r.id} fails for {r.spec} on {r.impl}: {r.what}: {r.residual:.3g}, "
            f"accepted {r.allowed}{more}\n\n{r.snippet}\n"
        )
    return out


def summary(results: Sequence[Result]) -> str:
    """Says in a few lines how many statements hold, and what was left out and why."""
    count = {v: sum(r.verdict == v for r in results) for v in ("passed", "failed", "skipped")}
    statements = len({r.id for r in results if r.verdict != "skipped"})
    instances = sum(r.instances for r in results)
    lines = [
        f"{statements} statements, {instances} instances: {count['passed']} passed, "
        f"{count['failed']} failed, {count['skipped']} skipped (per spec and engine)"
    ]
    reasons = dict.fromkeys((r.impl, r.what) for r in results if r.verdict == "skipped")
    lines += [f"skipped on {impl}: {what}" for impl, what in reasons]
    return "\n".join(lines)
