"""Mathematics as text: what a step writes when it is shown instead of run.

Vectors are columns. Two terms side by side are a matrix product, or a number times anything; (.), /
and ^2 act entry by entry, and repeat a vector over the columns of a matrix, a row over its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["NUMBER", "Names", "Term", "apply", "number"]

Shape = tuple[str, str]
"""Rows and columns: "K", "V" or "" for one."""

NUMBER: Shape = ("", "")


@dataclass(frozen=True, slots=True)
class Term:
    """A formula with the shape of its value."""

    text: str
    shape: Shape = NUMBER
    level: int = 0
    """How loosely it binds: 0 a name, 1 a product, 2 a quotient or (.), 3 a sum."""

    def within(self, level: int) -> str:
        """Return the text, in parentheses if it binds more loosely than `level`."""
        return self.text if self.level <= level else f"({self.text})"

    @property
    def T(self) -> Term:
        """The transpose; a number is its own."""
        return self if self.shape == NUMBER else Term(f"{self.within(0)}^T", self.shape[::-1])

    @property
    def squared(self) -> Term:
        """The square of every entry."""
        return Term(f"{self.within(0)}^2", self.shape)

    def __matmul__(self, other: Term) -> Term:
        """Matrix product."""
        return Term(f"{self.within(1)} {other.within(0)}", (self.shape[0], other.shape[1]), 1)

    def __mul__(self, other: Term) -> Term:
        """Entry by entry."""
        shape = _broadcast(self, other)
        if NUMBER in (self.shape, other.shape):
            # The number comes first: products are read from the left.
            first, second = (self, other) if self.shape == NUMBER else (other, self)
            return Term(f"{first.within(1)} {second.within(1)}", shape, 1)
        return Term(f"{self.within(1)} (.) {other.within(1)}", shape, 2)

    def __truediv__(self, other: Term) -> Term:
        return Term(f"{self.within(1)} / {other.within(1)}", _broadcast(self, other), 2)

    def __add__(self, other: Term) -> Term:
        return Term(f"{self.within(3)} + {other.within(2)}", _broadcast(self, other), 3)

    def __sub__(self, other: Term) -> Term:
        return Term(f"{self.within(3)} - {other.within(2)}", _broadcast(self, other), 3)


def _broadcast(x: Term, y: Term) -> Shape:
    return x.shape[0] or y.shape[0], x.shape[1] or y.shape[1]


def apply(name: str, x: Term) -> Term:
    """Return a function of every entry; Diag makes a matrix of a vector."""
    return Term(f"{name}({x.text})", ("K", "K") if name == "Diag" else x.shape)


def number(x: float) -> Term:
    """Return a number as a term, with all its digits."""
    return Term(repr(x))


@dataclass(slots=True)
class Names:
    """What the names of a program stand for while it is written, and the lines so far."""

    x: dict[str, Term]
    index: str = "t"
    """t counts tokens, i the sub-tokens of a token."""
    lines: list[str] = field(default_factory=list)

    def let(self, symbol: str, value: Term) -> Term:
        """Write a line that defines a symbol, and return it."""
        name = f"{symbol}_{self.index}"
        self.lines.append(("" if self.index == "t" else "    ") + f"{name} = {value.text}")
        return Term(name, value.shape)

    def previous(self, symbol: str, shape: Shape) -> Term:
        """Return a symbol one token earlier."""
        return Term(f"{symbol}_{{{self.index}-1}}", shape)

    def decayed(self, g: str | None, symbol: str, shape: Shape) -> Term:
        """Return a state after the decay of the name g, if there is one."""
        old = self.previous(symbol, shape)
        return old if g is None else self.x[g] * old
