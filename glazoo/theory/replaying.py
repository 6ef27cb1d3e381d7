"""One statement on one instance: as a trial, as text and as a program."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from glazoo.api import attention
from glazoo.spec import Spec
from glazoo.theory.catalogue import entry
from glazoo.theory.entry import Entry, Kind, Op, Trial
from glazoo.theory.forms import Form
from glazoo.theory.instances import Instance
from glazoo.zoo import load

__all__ = ["DTYPES", "make_trial", "replay", "snippet"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}
_reference: Op = functools.partial(attention, impl="reference")


def make_trial(op: Op, name: str, spec: Spec, instance: Instance, dtype: str) -> Trial:
    """Return the trial of an implementation, named as its results name it."""
    return Trial(op, spec, instance, DTYPES[dtype], _reference if name == "op" else None)


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
    trial = make_trial(run_op, "op" if op is not None else impl, spec, instance, dtype)
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


def snippet(e: Entry, form: Form, name: str, dtype: str, instance: Instance) -> str:
    """Return a program that shows what a statement gives on an instance."""
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
