"""The map of the field as one picture, drawn from the axes of the specs."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator

import glazoo
from glazoo.spec import Decay, Posterior, Spec

__all__ = ["field"]

_LINE, _TOP, _LEFT, _LETTER = 17, 56, 140, 7


def field() -> str:
    """Return the map: precision and decay from left to right, correction and gain downwards."""
    specs = [glazoo.load(name) for name in glazoo.names()]
    columns = [x for x in _columns() if any(_column(s) == x for s in specs)]
    rows = [x for x in _rows() if any(_row(s) == x for s in specs)]
    cells = {
        (c, r): [s for s in specs if (_column(s), _row(s)) == (c, r)] for c in columns for r in rows
    }
    widths = [_wide(c, [s for r in rows for s in cells[c, r]]) for c in columns]
    starts = list(itertools.accumulate([_LEFT, *widths]))
    out, y = [], _TOP
    for i, (precision, decay) in enumerate(columns):
        x = starts[i]
        if not i or columns[i - 1][0] != precision:
            span = sum(w for w, c in zip(widths, columns, strict=True) if c[0] == precision)
            out.append(_text(x + 8, 18, f"{precision} precision", bold=True))
            out.append(f'<path d="M{x + 4} 26 h{span - 8}"/>')
        out.append(_text(x + 8, 46, _decay(decay)))
    for row in rows:
        height = _LINE * max(2, *(len(cells[c, row]) for c in columns)) + 14
        correction, gain = row
        out.append(
            _text(
                0,
                y + 20,
                "Hebbian" if correction == "none" else f"{correction} correction",
                bold=True,
            )
        )
        out.append(_text(0, y + 20 + _LINE, f"{gain.replace('_', ' ')} gain"))
        for i, column in enumerate(columns):
            x = starts[i]
            out.append(
                f'<rect x="{x + 2}" y="{y}" width="{widths[i] - 4}" height="{height}" rx="4"/>'
            )
            for j, spec in enumerate(cells[column, row]):
                name = _text(x + 8, y + 20 + j * _LINE, spec.name)
                title = f"<title>{html.escape(f'{spec.title}: {spec.summary}')}</title>"
                out.append(f'<a href="{spec.name}.html">{title}{name}</a>')
        y += height + 4
    wide, label = starts[-1], "The variants by precision, decay, correction and gain"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {y}" role="img"'
    return f'{head} style="min-width: {wide}px" aria-label="{label}">{"".join(out)}</svg>'


def _columns() -> Iterator[tuple[str, str]]:
    for precision in _values(Posterior, "precision"):
        for shape in _values(Decay, "shape"):
            yield precision, shape


def _rows() -> Iterator[tuple[str, str]]:
    for correction in _values(Posterior, "correction"):
        for gain in _values(Posterior, "gain"):
            yield correction, gain


def _values(model: type, name: str) -> tuple[str, ...]:
    """Return the accepted values of a field, in the order of the language of specs."""
    return model.model_fields[name].annotation.__args__


def _column(spec: Spec) -> tuple[str, str]:
    return spec.posterior.precision, spec.decay.shape


def _row(spec: Spec) -> tuple[str, str]:
    return spec.posterior.correction, spec.posterior.gain


def _decay(shape: str) -> str:
    return "no decay" if shape == "none" else f"decay per {shape}"


def _wide(column: tuple[str, str], specs: list[Spec]) -> int:
    """Return a width that has room for the names and the head of a column."""
    texts = (_decay(column[1]), column[0] + " precision", *(s.name for s in specs))
    return 18 + _LETTER * max(map(len, texts))


def _text(x: int, y: int, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}"{weight}>{html.escape(text)}</text>'
