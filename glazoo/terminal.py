"""What the commands share: options, and printing for people and for machines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from glazoo.errors import extra, one_line
from glazoo.strictjson import dumps

with extra("cli"):
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

__all__ = [
    "AsJson",
    "Report",
    "console",
    "heat_map",
    "markdown_table",
    "print_json",
    "progress",
    "refusals",
    "step_progress",
]

Report = Callable[[str, int, int], None]
"""What shows how far some work is: what is being done, how much is done, and of how much."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def console() -> Console:
    """Return the console of standard output; wide enough for tables when it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(data: Any) -> None:
    """Prints plain data as JSON, and nothing else."""
    typer.echo(dumps(data, indent=2))


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False
) -> list[str]:
    """Return the lines of a Markdown table; with `right`, all columns but the first are aligned to
    the right."""
    rule = ["---", *(["---:" if right else "---"] * (len(head) - 1))]
    cells = ([x.replace("|", "\\|").replace("\n", " ") for x in row] for row in rows)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *cells)]


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the program where a command refuses: one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        # Only the operating system's own errors have a number.
        reason = one_line(e) if isinstance(e, OSError) and e.errno is not None else str(e)
        Console(stderr=True).print(Text(f"glazoo: {reason}"), style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _alone() -> Iterator[None]:
    """Keeps transformers' bars, if it is imported, off the screen that ours is on."""
    logging = sys.modules.get("transformers.utils.logging")
    theirs = logging is not None and logging.is_progress_bar_enabled()
    if logging is not None and theirs:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if logging is not None and theirs:
            logging.enable_progress_bar()


@contextmanager
def progress(*, quiet: bool, of_bytes: bool = False) -> Iterator[Report]:
    """Show a bar on standard error for work that reports `(what, done, total)`, in counts or
    bytes."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    )
    task = bars.add_task("", total=None)
    with _alone(), bars:
        yield lambda what, done, total: bars.update(
            task, description=what, completed=done, total=total
        )


@contextmanager
def step_progress(*, quiet: bool) -> Iterator[Report]:
    """Show training steps on standard error: a bar on a terminal, elsewhere a line whenever there
    is something new to say."""
    said = ""

    def line(what: str, done: int, total: int) -> None:
        nonlocal said
        if what != said and not quiet:
            typer.echo(f"step {done} of {total}: {what}", err=True)
        said = what

    with progress(quiet=quiet) as bar:
        yield bar if sys.stderr.isatty() else line


_SHADES = " .:-=+*#%@"


def heat_map(title: str, rows: Mapping[int, Sequence[float]], top: float) -> Text:
    """Draw layers by heads; shades as well as colours, for terminals and files without them."""
    text = Text(
        f"{title}: layers down, heads across, {_SHADES[1]} little to {_SHADES[-1]} {top:g}\n"
    )
    for layer, values in rows.items():
        text.append(f"{layer:5d} ")
        for value in values:
            share = min(1.0, max(0.0, value / top))
            shade = _SHADES[0 if share == 0 else 1 + round(share * (len(_SHADES) - 2))]
            text.append(
                shade * 2, style=f"rgb({int(40 + 215 * share)},60,{int(220 - 180 * share)})"
            )
        text.append("\n")
    return text
