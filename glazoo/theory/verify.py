"""Runs the catalogue: every statement, on every spec that it is claimed for, on every engine."""

from __future__ import annotations

import difflib
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glazoo.api import attention
from glazoo.engines import available, triton
from glazoo.spec import Spec, SpecError
from glazoo.theory.catalogue import ENTRIES
from glazoo.theory.entry import Domain, Entry, Finding, Kind, Op
from glazoo.theory.forms import Form, forms
from glazoo.theory.instances import Instance
from glazoo.theory.replaying import DTYPES, make_trial, snippet
from glazoo.theory.results import Result
from glazoo.zoo import load

__all__ = ["run"]

Progress = Callable[[str, int, int], None]


def run(
    names: Sequence[str | Path | Spec] | None = None,
    *,
    examples: int = 3,
    dtype: str | None = None,
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
        dtype: "float64" or "float32"; limits need float64. Default: float64, of `triton` float32.
        impl: an engine; default: all that run everywhere. `triton` runs on a GPU, or in Triton's
            interpreter.
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
    if dtype is None:
        dtype = "float32" if impl == "triton" else "float64"
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, accepted are {', '.join(DTYPES)}")
    accepted = [*available(), "triton"]
    if impl is not None and impl not in accepted:
        raise ValueError(f"impl: got {impl!r}, accepted are {', '.join(accepted)}")
    if impl == "triton":
        if dtype != "float32":
            raise ValueError(f"dtype: got {dtype!r}, but impl='triton' verifies in float32 only")
        triton.interpret()
    entries, subjects = _select(names, only_source)
    results: list[Result] = []
    ops: dict[str, Op] = {}
    if op is not None:
        ops["op"] = op
    else:
        for name in available() if impl is None else (impl,):
            engine = functools.partial(attention, impl=name)
            if name == "triton" and torch.cuda.is_available():
                engine = functools.partial(_elsewhere, engine, torch.device("cuda"))
            reason = _unavailable(engine, getattr(torch, dtype))
            if reason is None:
                ops[name] = engine
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


def _elsewhere(op: Op, device: torch.device, *operands: Any, **options: Any) -> Any:
    """Calls an implementation on another device than where operands and results are."""

    def to(device: torch.device) -> Callable[[Any], Any]:
        return lambda x: x.to(device) if isinstance(x, Tensor) else x

    operands, options = tree_map(to(device), (operands, options))
    return tree_map(to(torch.device("cpu")), op(*operands, **options))


def _unavailable(op: Op, dtype: torch.dtype) -> str | None:
    """Says why an engine cannot run here, or gives None."""
    spec = load("linear_attention")
    ops = Instance().operands(spec, dtype)
    try:
        op(spec, ops["q"], ops["k"], ops["v"])
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
    result = functools.partial(
        Result, e.id, e.statement, e.kind, form.label, name, dtype, instances=len(cases)
    )
    worst: Finding | None = None
    unsupported: set[str] = set()
    for instance in cases:
        finding = e.judge(make_trial(op, name, form.spec, instance, dtype))
        if finding.unsupported:
            unsupported.add(finding.what)
            continue
        if worst is None or _badness(e, finding) > _badness(e, worst):
            worst = finding
        if not finding.passed:
            if shrink:
                instance, worst = _smallest(e, form, name, op, dtype, instance, finding)
            return result(
                "failed",
                residual=worst.residual,
                allowed=worst.allowed,
                what=worst.what,
                instance=instance,
                snippet=snippet(e, form, name, dtype, instance),
            )
    if worst is None:
        return result("skipped", instances=0, what="; ".join(sorted(unsupported)))
    return result("passed", residual=worst.residual, allowed=worst.allowed, what=worst.what)


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
        return e.judge(make_trial(op, name, form.spec, x, dtype))

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
