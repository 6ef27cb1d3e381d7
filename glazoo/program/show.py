"""What `glazoo show` prints of a program, on a terminal and in notebooks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.jupyter import JUPYTER_HTML_FORMAT
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from glazoo.program.lowering import Program
    from glazoo.spec import Spec

__all__ = ["html", "page"]


def page(program: Program, key_size: int, value_size: int) -> Iterator[RenderableType]:
    """Yield spec, recurrence, operands, steps, state and cost of a program for rich to print.

    Args:
        program: what to show.
        key_size: key channels per head, for sizes and costs.
        value_size: value channels per head.
    """
    spec = program.spec
    reference = spec.reference.paper
    if spec.reference.arxiv:
        reference += f", arXiv:{spec.reference.arxiv}"
    if spec.reference.equation:
        reference += f" ({spec.reference.equation})"
    yield Text(spec.title, style="bold")
    yield Text(spec.summary + ".")
    yield Text(reference, style="dim")
    yield _panel("recurrence (per head and token)", Text("\n".join(program.recurrence)))
    yield _panel("spec", _values(spec))
    yield _panel("operands", _operands(program))
    steps = _steps(program, key_size, value_size)
    yield _panel(f"program (kernel class {program.kernel})", steps)
    floats = program.state_floats(key_size, value_size)
    flops = program.flops_per_token(key_size, value_size)
    state = [f"{p.name} {p.symbol} [{', '.join(p.shape)}]: {p.meaning}" for p in program.state]
    state.append(
        f"{floats:,} numbers ({4 * floats:,} bytes in float32) and {flops:,} operations a token, "
        f"per value head at K = {key_size}, V = {value_size}"
    )
    auto = ", ".join(f"{engine} on {device}" for device, engine in program.auto().items())
    piece = "step by step" if program.piece is None else "in one piece"
    state.append(f"impl='auto' is {auto} here; on a CPU, a token of decoding runs {piece}")
    yield _panel("state and cost", Text("\n".join(state)))


def html(program: Program) -> str:
    """Return the page of a program as HTML, at the spec's own head sizes."""
    heads = program.spec.layer.heads
    # Recorded and written nowhere; a notebook would otherwise show it at once.
    console = Console(file=io.StringIO(), force_jupyter=False, record=True, width=120)
    console.print(*page(program, heads.key_size, heads.value_size), sep="\n")
    return console.export_html(inline_styles=True, code_format=JUPYTER_HTML_FORMAT)


def _panel(title: str, body: RenderableType) -> Panel:
    return Panel(body, title=title, title_align="left", box=box.ROUNDED)


def _values(spec: Spec) -> Table:
    """Show every value that differs from its default, by its path in the file."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    shown = spec.model_dump(exclude_defaults=True)
    for key in ("name", "title", "summary", "reference"):
        shown.pop(key, None)
    for path, value in _leaves(shown):
        table.add_row(Text(path), Text(str(value)))
    return table


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _operands(program: Program) -> Table:
    table = Table("operand", "shape", "values", "meaning", box=None, pad_edge=False)
    for o in program.operands:
        name = o.name + ("" if o.required else " (optional)")
        table.add_row(*map(Text, (name, o.shown(), o.domain, o.meaning)))
    return table


def _steps(program: Program, key_size: int, value_size: int) -> Table:
    """Show the steps that run, what each one makes, and its operations per token."""
    table = Table("step", "makes", box=None, pad_edge=False)
    table.add_column("operations", justify="right")
    for row in program.rows:
        texts = "\n".join(text.strip() for text in row.texts)
        cost = row.operations(key_size, value_size)
        table.add_row(type(row.step).__name__, Text(texts), f"{cost:,}")
    return table
