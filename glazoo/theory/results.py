"""What the statements of the catalogue gave, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from glazoo.errors import extra
from glazoo.theory.catalogue import entry
from glazoo.theory.entry import Kind
from glazoo.theory.instances import Instance

with extra("verify"):
    from rich import box
    from rich.table import Table
    from rich.text import Text

__all__ = ["Result", "Verdict", "failures", "passed", "render", "summary"]

Verdict = Literal["passed", "failed", "skipped"]


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


def passed(results: Iterable[Result]) -> bool:
    """Return whether something was verified and nothing failed."""
    verdicts = [r.verdict for r in results]
    return "failed" not in verdicts and "passed" in verdicts


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
