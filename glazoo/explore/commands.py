"""`glazoo explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glazoo.errors import one_line
from glazoo.explore import page
from glazoo.terminal import console

__all__ = ["explore"]


def explore(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Variants or spec files. Default: every variant."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("explore.html"),
) -> None:
    """Write a page on which a browser shows what memories recall.

    One HTML file that needs no server and nothing else: with sliders for a task of stored pairs and
    for the gates, recall, state, importance and uncertainty of two memories, token by token. Every
    variant comes with its metaplastic forms.
    """
    text = page(names or None)
    try:
        out.write_text(text, "utf-8")
    except OSError as e:
        raise ValueError(f"cannot write the page: {one_line(e)}") from e
    console().print(f"wrote {out}: open it in a browser", highlight=False, markup=False)
