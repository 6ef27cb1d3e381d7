"""`glazoo convert`: checkpoint folders into metaplastic form and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markdown import Markdown

from glazoo.converters.errors import ConversionError
from glazoo.converters.report import Report
from glazoo.terminal import AsJson, bytes_progress, console, print_json

__all__ = ["convert"]


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the model to convert.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    *,
    plasticity: Annotated[
        float,
        typer.Option(
            metavar="KAPPA",
            help="Where on the continuum to start: 0 is the source, 1 the full metaplastic form.",
        ),
    ] = 0.0,
    gate: Annotated[
        Literal["value", "head"],
        typer.Option(help="One importance per synapse, or one vector over keys per head."),
    ] = "value",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the importance gate. Default: width / 16, max 128.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to convert, for example 0,2-5. Default: all that can be.")
    ] = "all",
    seed: Annotated[int, typer.Option(help="Seed of the importance gate's projection.")] = 0,
    link: Annotated[
        bool,
        typer.Option("--link/--copy", help="Hard-link the source's weights if possible, or copy."),
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare source and converted model; needs both in memory."),
    ] = False,
    float64: Annotated[
        bool, typer.Option("--float64", help="With --verify: compare in float64 too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and report only; read headers, write nothing.")
    ] = False,
    revert: Annotated[
        bool, typer.Option("--revert", help="SRC is a converted folder: give its source back.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model's folder that is already at DST.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the report to this file: JSON, or Markdown if it ends in .md."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint folder into its metaplastic form without changing what it computes.

    With --verify, the reports verify.json and verify.md are written into DST/glazoo, and the exit
    code is 1 if source and converted model differ by more than rounding.
    """
    from glazoo.converters.checkpoint import convert_checkpoint, revert_checkpoint

    results: list[Report] = []
    passed = True
    with bytes_progress(quiet=as_json) as progress:
        if revert:
            if dry_run or verify:
                raise ConversionError("--revert goes with neither --dry-run nor --verify")
            results.append(revert_checkpoint(src, dst, link=link, force=force, progress=progress))
        else:
            results.append(
                convert_checkpoint(
                    src,
                    dst,
                    plasticity=plasticity,
                    gate=gate,
                    rank=rank,
                    layers=_layers(layers),
                    seed=seed,
                    link=link,
                    dry_run=dry_run,
                    force=force,
                    progress=progress,
                )
            )
    if verify and not dry_run:
        from glazoo.converters.verify import verify_checkpoint

        status = Console(stderr=True, quiet=as_json)
        with status.status("loading both models") as line:
            verified = verify_checkpoint(
                src, dst, float64=float64, progress=lambda stage: line.update(stage)
            )
        for name in ("verify.json", "verify.md"):
            verified.write(dst / "glazoo" / name)
        results.append(verified)
        passed = verified.passed
    if report is not None:
        results[-1 if verify else 0].write(report)
    if as_json:
        merged = results[0].to_json()
        if len(results) > 1:
            merged["verify"] = results[1].to_json()
        print_json(merged)
    else:
        for result in results:
            console().print(Markdown(result.to_markdown()))
    if not passed:
        raise typer.Exit(1)


def _layers(text: str) -> list[int] | None:
    """Reads a list like 0,2-5."""
    if text == "all":
        return None
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConversionError(f"layers: got {text!r}, accepted are 'all' or numbers like 0,2-5")
        out += range(int(first), int(last or first) + 1)
    return out
