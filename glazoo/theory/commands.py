"""`glazoo verify` and `glazoo posterior`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glazoo.terminal import AsJson, console, print_json

__all__ = ["posterior", "verify"]


@contextmanager
def _count_progress(*, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Shows a bar on standard error for work that reports `(done, total, what)`."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    )
    task = bars.add_task("", total=None)

    def report(done: int, total: int, what: str) -> None:
        bars.update(task, completed=done, total=total, description=what)

    with bars:
        yield report


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Statements, variants or spec files. Default: everything."
        ),
    ] = None,
    *,
    examples: Annotated[int, typer.Option(min=1, help="Instances per statement and variant.")] = 3,
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="Of all operands.")] = (
        "float64"
    ),
    impl: Annotated[str | None, typer.Option(help="One engine. Default: all of them.")] = None,
    seed: Annotated[int, typer.Option(help="Decides all instances.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check the theory: every equivalence, limit, inequality and invariance, on every engine.

    The exit code is 1 if a statement fails; each failure comes with the smallest failing instance
    as a Python program.
    """
    from glazoo.theory import verify as theory

    with _count_progress(quiet=as_json) as progress:
        results = theory.run(
            names or None, examples=examples, dtype=dtype, impl=impl, seed=seed, progress=progress
        )
    if as_json:
        print_json([r.to_json() for r in results])
    else:
        out = console()
        out.print(theory.render(results))
        for text in theory.failures(results):
            out.print(text, highlight=False, markup=False, style=None)
        out.print(theory.summary(results), markup=False)
    if not theory.passed(results):
        raise typer.Exit(1)


def posterior(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Variants or spec files. Default: all that qualify."
        ),
    ] = None,
    *,
    seeds: Annotated[int, typer.Option(min=1, help="Random problems per condition.")] = 20,
    key_size: Annotated[int, typer.Option(min=1, help="Key channels.")] = 16,
    impl: Annotated[str, typer.Option(help="The engine.")] = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a plot, and its data as JSON beside it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank variants and their metaplastic forms by their distance to exact Bayesian inference."""
    from glazoo.theory import posterior as theory

    with _count_progress(quiet=as_json) as progress:
        distances = theory.run(
            names or None, seeds=seeds, key_size=key_size, impl=impl, progress=progress
        )
    written = () if plot is None else theory.plot(distances, plot)
    if as_json:
        print_json([d.to_json() for d in distances])
        return
    out = console()
    out.print(theory.render(distances))
    for path in written:
        out.print(f"wrote {path}", highlight=False, markup=False)
