"""The catalogue of statements: one declarative entry each."""

from __future__ import annotations

import difflib

from glazoo.theory.catalogue import bayes, chains, execution, limits, precision, symmetries
from glazoo.theory.entry import Entry

__all__ = ["ENTRIES", "entry"]

ENTRIES: tuple[Entry, ...] = (
    *chains.ENTRIES,
    *bayes.ENTRIES,
    *precision.ENTRIES,
    *limits.ENTRIES,
    *symmetries.ENTRIES,
    *execution.ENTRIES,
)
"""All statements."""


def entry(id: str) -> Entry:  # noqa: A002
    """Return the statement with an identifier.

    Raises:
        ValueError: there is none; the nearest one is suggested.
    """
    for e in ENTRIES:
        if e.id == id:
            return e
    near = difflib.get_close_matches(id, [e.id for e in ENTRIES], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`glazoo verify` lists them"
    raise ValueError(f"id: there is no statement {id!r}; {hint}")
