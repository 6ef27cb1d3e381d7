"""The command `glazoo`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

import glazoo
from glazoo.program import Program
from glazoo.program.show import page
from glazoo.terminal import AsJson, console, print_json, refusals

__all__ = ["app", "main"]

_CONVERT, _THEORY = "glazoo.converters.commands", "glazoo.theory.commands"
_COMPARE, _EXPLORE = "glazoo.compare.commands", "glazoo.explore.commands"
_ELSEWHERE = {
    "advise": ("glazoo.advise", "Say which conversion of a model pays, or that none would."),
    "convert": (_CONVERT, "Convert a model's folder into its metaplastic form, or back."),
    "tune": (_CONVERT, "Train the importance gates of a metaplastic model on texts."),
    "inspect": (_CONVERT, "Show where each head stands between source and metaplastic."),
    "train": ("glazoo.train", "Train a language model of any specs."),
    "verify": (_THEORY, "Check the statements of the theory on every engine."),
    "posterior": (_THEORY, "Rank variants by their distance to exact inference."),
    "compare": (f"{_COMPARE}.compare", "Train variants side by side, differences with intervals."),
    "capacity": (f"{_COMPARE}.capacity", "Measure how many associations each memory holds."),
    "decay": (f"{_COMPARE}.decay", "Follow one association while others are written over it."),
    "explore": (_EXPLORE, "Write a page on which a browser shows what memories recall."),
    "bench": (f"{_COMPARE}.bench", "Time the recurrence of each variant on this machine."),
}
"""Where the other commands are, each a function of its name, and the first sentence of each."""

_QUIET: Any = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}


class _Commands(TyperGroup):
    """The commands here, and the others, of which --help and completion know the summary alone:
    only what is to run is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _ELSEWHERE:
            return TyperCommand(cmd_name, help=_ELSEWHERE[cmd_name][1])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _ELSEWHERE:
            alone = typer.Typer(add_completion=False, **_QUIET)
            alone.command(name)(getattr(import_module(_ELSEWHERE[name][0]), name))
            command = typer.main.get_command(alone)
        return name, command, rest


app = typer.Typer(name="glazoo", cls=_Commands, help=glazoo.__doc__, no_args_is_help=True, **_QUIET)

KeySize = Annotated[int, typer.Option(min=1, help="Key channels per head, for sizes and costs.")]
ValueSize = Annotated[int, typer.Option(min=1, help="Value channels per head.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(glazoo.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_variants(
    *,
    key_size: KeySize = 64,
    value_size: ValueSize = 64,
    as_json: AsJson = False,
) -> None:
    """List the variants with their axes, gates and state size."""
    programs = [glazoo.lower(glazoo.load(name)) for name in glazoo.names()]
    if as_json:
        print_json([_row(p, key_size, value_size) for p in programs])
        return
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in (
        "name",
        "precision",
        "correction",
        "gain",
        "decay",
        "write gate",
        "importance gate",
        "metaplastic",
        "kernel class",
    ):
        table.add_column(column, no_wrap=True)
    table.add_column("state", justify="right", no_wrap=True)
    for p in programs:
        row = _row(p, key_size, value_size)
        table.add_row(
            row["name"],
            row["precision"],
            row["correction"],
            row["gain"].replace("_", " "),
            row["decay"],
            row["write_gate"],
            row["importance_gate"],
            "yes" if row["metaplastic"] else "",
            row["kernel"],
            f"{row['state_floats']:,}",
        )
    console().print(table)
    console().print(
        f"{len(programs)} variants; state in numbers per value head at K = {key_size}, "
        f"V = {value_size}.\nEvery one that is not metaplastic has a metaplastic form: "
        "glazoo show metaplastic_NAME"
    )


def _row(program: Program, key_size: int, value_size: int) -> dict[str, Any]:
    spec = program.spec
    imp = spec.importance
    return {
        "name": spec.name,
        "title": spec.title,
        "summary": spec.summary,
        "precision": spec.posterior.precision,
        "correction": spec.posterior.correction,
        "gain": spec.posterior.gain,
        "decay": _gate(spec.decay.shape, spec.decay.source),
        "write_gate": _gate(spec.write.shape, spec.write.source),
        "importance_gate": "none" if imp is None else imp.gate.shape,
        "metaplastic": spec.metaplastic,
        "kernel": str(program.kernel),
        "state_floats": program.state_floats(key_size, value_size),
        "flops_per_token": program.flops_per_token(key_size, value_size),
    }


def _gate(shape: str, source: str) -> str:
    return "none" if shape == "none" else f"{shape}, {source}"


def _variants(incomplete: str) -> list[str]:
    from glazoo.zoo import completions

    return completions(incomplete)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A variant, metaplastic_NAME, or a path to a .toml.", autocompletion=_variants
        ),
    ],
    *,
    key_size: Annotated[int | None, typer.Option(min=1, help="Default: the spec's.")] = None,
    value_size: Annotated[int | None, typer.Option(min=1, help="Default: the spec's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show one variant: spec, recurrence, operands, program and cost."""
    spec = glazoo.load(name)
    program = glazoo.lower(spec)
    keys = key_size or spec.layer.heads.key_size
    values = value_size or spec.layer.heads.value_size
    if as_json:
        cost = {
            "key_size": keys,
            "value_size": values,
            "state_floats": program.state_floats(keys, values),
            "flops_per_token": program.flops_per_token(keys, values),
        }
        print_json({"spec": spec.model_dump(), "program": program.describe(), "cost": cost})
        return
    out = console()
    for part in page(program, keys, values):
        out.print(part)


@app.command()
def schema() -> None:
    """Print the JSON Schema of spec files."""
    print_json(glazoo.schema())


@app.command()
def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Where models are written: look for what killed runs have left. Default: here.",
        ),
    ] = None,
    *,
    clean: Annotated[
        bool, typer.Option("--remove-leftovers", help="Remove what killed runs have left.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, and what is known to fail here.

    And what killed runs have left, in the folders given."""
    from glazoo.doctor import examine

    report = examine(folders or [Path()], clean=clean)
    if as_json:
        print_json(report.to_json())
    else:
        out = console()
        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        table.add_column("package")
        table.add_column("version")
        for package, version in report.versions.items():
            table.add_row(package, version or Text("not installed", style="dim"))
        for device in report.devices:
            table.add_row(device["device"], device["name"])
        table.add_row("engines", ", ".join(report.engines))
        out.print(table)
        for finding in report.findings:
            style = "bold red" if finding.level == "error" else "yellow"
            out.print(Text(f"{finding.level}: {finding.what}", style=style))
            if finding.do:
                out.print(Text(f"  {finding.do}"))
        if not report.findings:
            out.print("nothing known to fail")
    if not report.healthy:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; a refusal is one line on standard error and exit code 2."""
    with refusals():
        app()
