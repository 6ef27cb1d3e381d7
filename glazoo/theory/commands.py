"""`glazoo verify` and `glazoo posterior`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from glazoo.terminal import AsJson, console, print_json, progress

__all__ = ["posterior", "verify"]


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Statements, variants or spec files. Default: everything."
        ),
    ] = None,
    *,
    examples: Annotated[int, typer.Option(min=1, help="Instances per statement and variant.")] = 3,
    dtype: Annotated[
        Literal["float64", "float32"] | None,
        typer.Option(help="Of all operands. Default: float64, of triton float32."),
    ] = None,
    impl: Annotated[
        str | None,
        typer.Option(
            help="One engine: reference, chunked or triton (on a GPU, or in Triton's interpreter, "
            "which takes its time). Default: the first two."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides all instances.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check the statements of the theory on every engine.

    Equivalences, limits, inequalities and invariances. The exit code is 1 if a statement fails;
    each failure comes with the smallest failing instance as a Python program.
    """
    from glazoo.theory.results import failures, passed, render, summary
    from glazoo.theory.verify import run

    with progress(quiet=as_json) as report:
        results = run(
            names or None, examples=examples, dtype=dtype, impl=impl, seed=seed, progress=report
        )
    if as_json:
        print_json([r.to_json() for r in results])
    else:
        out = console()
        out.print(render(results))
        for text in failures(results):
            out.print(text, highlight=False, markup=False, style=None)
        out.print(summary(results), markup=False)
    if not passed(results):
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
    """Rank variants by their distance to exact inference.

    Their metaplastic forms too; what is exact is the posterior itself.
    """
    from glazoo.theory import ranking
    from glazoo.theory.posterior import run

    with progress(quiet=as_json) as report:
        distances = run(names or None, seeds=seeds, key_size=key_size, impl=impl, progress=report)
    written = () if plot is None else ranking.plot(distances, plot)
    if as_json:
        print_json([d.to_json() for d in distances])
        return
    out = console()
    out.print(ranking.render(distances))
    for path in written:
        out.print(f"wrote {path}", highlight=False, markup=False)
