"""Mathematics for the pages: the formulas that programs print, as LaTeX, and LaTeX as MathML.

MathML is what browsers draw themselves, so that pages need neither a script nor a font.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from latex2mathml.converter import convert

__all__ = ["formula", "mathml", "recurrence"]

_TOKEN = re.compile(
    r"""
    (?P<space>[ ]+)
  | (?P<name>[A-Za-z]+(?:_[A-Za-z]{2,})*'?(?:_(?:\{[a-z]-1\}|[a-z](?![A-Za-z])))?)
  | (?P<number>\d+(?:\.\d+)?(?:e[-+]?\d+)?)
  | (?P<mark>\(\.\)|[-+/^()\[\],])
    """,
    re.VERBOSE,
)
_GREEK = {"mu", "beta", "kappa", "phi"}
_FUNCTIONS = {"exp", "log", "max"}
_INFIX = {"+": " + ", "-": " - ", "(.)": r" \odot "}


def mathml(latex: str, *, block: bool = False) -> str:
    """Return LaTeX as MathML."""
    # A prime stands beside its letter: fonts differ in how small a raised one comes out.
    latex = re.sub(r"(\\[A-Za-z]+|[A-Za-z])'", r"{\1\\prime}", latex)
    text: str = convert(latex, display="block" if block else "inline")
    ElementTree.fromstring(text)  # LaTeX that is not known comes out as it went in
    return text


def recurrence(lines: Sequence[str]) -> str:
    """Return the lines of a printed recurrence as one block of formulas, aligned, in MathML."""
    rows = []
    for line in lines:
        if loop := re.fullmatch(r"for (\w) = 1 to (\d+):", line):
            left, right = rf"\text{{for }} {loop[1]}", rf"1, \dots, {loop[2]}"
        else:
            left, right = map(formula, line.strip().split(" = "))
        inner = '<mspace width="1.5em"/>' if line.startswith(" ") else ""
        rows.append(
            f'<mtr><mtd columnalign="right">{_cell(left)}</mtd>'
            f'<mtd columnalign="left">{inner}<mo>=</mo>{_cell(right)}</mtd></mtr>'
        )
    table = f'<mtable displaystyle="true">{"".join(rows)}</mtable>'
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">{table}</math>'


@functools.cache
def _cell(latex: str) -> str:
    """Return LaTeX as what stands inside of <math>."""
    return re.sub(r"^<math[^>]*>|</math>$", "", mathml(latex, block=True))


def formula(text: str) -> str:
    """Return a formula as programs print it as LaTeX.

    Raises:
        ValueError: it is not in the notation of `glazoo.program.terms`.
    """
    parser = _Parser(text)
    latex = parser.sum()
    if parser.tokens:
        raise ValueError(f"{text!r}: cannot read {''.join(parser.tokens)!r}")
    return latex


class _Parser:
    """Reads what `glazoo.program.terms` writes: a product is a space, (.) and / act by entry."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = []
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise ValueError(f"{text!r}: cannot read {text[at:]!r}")
            self.tokens.append(match[0])
            at = match.end()

    def peek(self, skip: bool = True) -> str:
        """Return the next token, past a space if told so; "" at the end."""
        after = 1 if skip and self.tokens and self.tokens[0].isspace() else 0
        return self.tokens[after] if len(self.tokens) > after else ""

    def take(self, expected: str | None = None) -> str:
        """Remove the next token and return it."""
        while self.tokens and self.tokens[0].isspace():
            self.tokens.pop(0)
        if not self.tokens or expected not in (None, self.tokens[0]):
            raise ValueError(f"{self.text!r}: {expected or 'more'} is missing")
        return self.tokens.pop(0)

    def sum(self) -> str:
        """Read terms with + and - between them."""
        latex = ""
        if self.peek() == "-":
            self.take()
            latex = "-"
        latex += self.quotient()
        while self.peek() in ("+", "-"):
            latex += _INFIX[self.take()] + self.quotient()
        return latex

    def quotient(self) -> str:
        """Read a product, or two with (.) or / between them."""
        latex = self.product()
        while self.peek() in ("/", "(.)"):
            if self.take() == "/":
                latex = rf"\frac{{{_bare(latex)}}}{{{_bare(self.product())}}}"
            else:
                latex += _INFIX["(.)"] + self.product()
        return latex

    def product(self) -> str:
        """Read factors with spaces between them."""
        factors = [self.factor()]
        while self.peek() not in ("", "+", "-", "/", "(.)", ")", "]", ",", "^"):
            factors.append(self.factor())
        return r" \, ".join(factors)

    def factor(self) -> str:
        """Read a name, a number, a call, a list or a sum in parentheses, with its exponents."""
        token = self.take()
        below, above = "", list[str]()
        if token == "(":
            base = _within("(", self.sum(), ")")
            self.take(")")
        elif token == "[":
            base = _within("[", self.items("]"), "]")
        elif token[0].isdigit():
            base = _number(token)
        elif token[0].isalpha() and self.peek(skip=False) == "(":
            self.take("(")
            known = token in _FUNCTIONS or token in _GREEK
            name = rf"\{token}" if known else rf"\operatorname{{{token}}}"
            base = name + _within("(", self.items(")"), ")")
        elif token[0].isalpha():
            stem, below = _split(token)
            base = _name(stem.rstrip("'")) + ("'" if stem.endswith("'") else "")
        else:
            raise ValueError(f"{self.text!r}: cannot read {token!r}")
        while self.peek(skip=False) == "^":
            self.take("^")
            above.append(self.exponent())
        latex = f"{{{base}}}" if above or below else base
        if below:
            latex += f"_{{{below}}}"
        return latex + (f"^{{{' '.join(above)}}}" if above else "")

    def exponent(self) -> str:
        """Read what stands after ^."""
        token = self.take()
        if token == "(":
            latex = self.sum()
            self.take(")")
            return latex
        if token == "-":
            return "-" + self.take()
        return r"\top" if token == "T" else token

    def items(self, end: str) -> str:
        """Read sums with commas between them, and what ends them."""
        latex = [self.sum()]
        while self.peek() == ",":
            self.take(",")
            latex.append(self.sum())
        self.take(end)
        return ", ".join(latex)


def _split(token: str) -> tuple[str, str]:
    """Return a name and its index; of a letter with a word, the word is part of the index."""
    stem, _, below = token.partition("_")
    if not below:
        return stem, ""
    word, _, index = below.rpartition("_")
    if not word and len(below.strip("{}")) > 1 and not below.startswith("{"):
        word, index = below, ""
    index = index.strip("{}")
    if not word:
        return stem, index
    if len(stem) > 1:
        return f"{stem} {word}", index
    text = r"\text{" + word.replace("_", " ") + "}"
    return stem, f"{text}, {index}" if index else text


def _name(name: str) -> str:
    """Return a name without its index: Greek letters as such, words upright."""
    if name in _GREEK:
        return rf"\{name}"
    return name if len(name) == 1 else rf"\text{{{name}}}"


def _number(text: str) -> str:
    mantissa, _, power = text.partition("e")
    if not power:
        return mantissa
    scale = f"10^{{{int(power)}}}"
    return scale if float(mantissa) == 1 else rf"{mantissa} \cdot {scale}"


def _within(start: str, latex: str, end: str) -> str:
    """Return something in brackets, that grow with a fraction alone."""
    tall = r"\frac" in latex
    return rf"\left{start} {latex} \right{end}" if tall else f"{{{start}{latex}{end}}}"


def _bare(latex: str) -> str:
    """Return what stands over or under a bar without the parentheses around all of it."""
    for start, end in ((r"\left( ", r" \right)"), ("{(", ")}")):
        inner = latex.removeprefix(start).removesuffix(end)
        if len(latex) - len(inner) == len(start + end) and _closed(inner):
            return inner
    return latex


def _closed(latex: str) -> bool:
    """Say whether every parenthesis is closed that was opened before."""
    depth = 0
    for found in re.finditer(r"[()]", latex):
        depth += 1 if found[0] == "(" else -1
        if depth < 0:
            return False
    return not depth
