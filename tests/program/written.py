"""Evaluates the mathematics that a program prints: an independent reading of its notation.

Vectors are columns and numbers 1 x 1 matrices. Side by side is a matrix product, or a number times
anything; (.), / and powers act entry by entry, with a vector repeated over the columns of a matrix
and a row over its rows. X_{t-1} is X of the previous token, X_{i-1} of the previous sub-token.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

import glazoo
from glazoo.spec import Spec
from glazoo.state import State

Array = np.ndarray
Values = dict[str, Array]

TOKEN = re.compile(
    r"\s*(\(\.\)|\^T|\^2|\^-1|\^|[-+/()\[\],]|\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    r"|[A-Za-z]+(?:_[A-Za-z]+)*'?(?:_(?:[ti]\b|\{[ti]-1\}))?)"
)
FUNCTIONS: dict[str, Callable[..., Array]] = {
    "exp": np.exp,
    "log": np.log,
    "abs": np.abs,
    "max": np.maximum,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "Diag": lambda x: np.diag(x[:, 0]),
    "norm": lambda x: np.array([[np.linalg.norm(x)]]),
    "mean": lambda x: x.mean(keepdims=True),
    "phi": lambda x: np.where(x == 0, 1, -np.expm1(-x) / np.where(x == 0, 1, x)),
}


class Formula:
    """A recursive descent over one formula."""

    def __init__(self, text: str, values: Values, index: int) -> None:
        self.tokens: list[str] = []
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            assert match, f"{text!r} has no meaning from {text[at:]!r}"
            self.tokens.append(match[1])
            at = match.end()
        self.values, self.index, self.at = values, index, 0

    def value(self) -> Array:
        found = self.entry() if self.take("[") else self.sum()
        assert self.at == len(self.tokens), f"left over: {self.tokens[self.at :]}"
        return found

    def entry(self) -> Array:
        """The entry of a list that a sub-token gets; 0 and 1 stand for arrays of them."""
        entries = [self.sum()]
        while self.take(","):
            entries.append(self.sum())
        assert self.take("]")
        return np.broadcast_arrays(*entries)[self.index]

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *accepted: str) -> str:
        if self.peek() in accepted:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def sum(self) -> Array:
        sign = -1 if self.take("-") else 1
        left = sign * self.quotient()
        while operator := self.take("+", "-"):
            right = self.quotient()
            left = left + right if operator == "+" else left - right
        return left

    def quotient(self) -> Array:
        left = self.product()
        while operator := self.take("/", "(.)"):
            right = self.product()
            left = left / right if operator == "/" else left * right
        return left

    def product(self) -> Array:
        left = self.power()
        while self.peek() not in ("", "+", "-", "/", "(.)", ")", "]", ","):
            right = self.power()
            number = (1, 1) in (left.shape, right.shape)
            left = left * right if number else left @ right
        return left

    def power(self) -> Array:
        base = self.atom()
        while operator := self.take("^T", "^2", "^-1", "^"):
            if operator == "^T":
                base = base.T
            elif operator == "^2":
                base = base * base
            elif operator == "^-1":
                base = np.linalg.inv(base)
            else:
                base = base ** self.atom()
        return base

    def atom(self) -> Array:
        if self.take("("):
            found = self.sum()
            assert self.take(")")
            return found
        name = self.peek()
        self.at += 1
        if name in FUNCTIONS:
            assert self.take("(")
            given = [self.sum()]
            while self.take(","):
                given.append(self.sum())
            assert self.take(")")
            return FUNCTIONS[name](*given)
        if name[0].isdigit():
            return np.array([[float(name)]])
        return self.values[name]


def column(x: torch.Tensor) -> Array:
    return x.reshape(-1, 1).numpy()


def given(
    spec: Spec, ops: dict[str, torch.Tensor], state: State, head: int
) -> tuple[Values, Values, list[tuple[Values, list[Values]]]]:
    """What `evaluate` takes beside the lines, for the first sequence and one value head: state,
    constants and tokens."""
    program = glazoo.lower(spec)
    groups, (tokens, _, keys) = ops["v"].shape[2] // ops["q"].shape[2], ops["q"].shape[1:]
    constants = {"scale": np.array([[spec.scale(keys)]]), "K": np.array([[float(keys)]])}
    constants["Id"] = np.eye(keys)
    found: list[tuple[Values, list[Values]]] = [
        ({}, [{} for _ in range(spec.steps.count)]) for _ in range(tokens)
    ]
    for operand in program.operands:
        x, dims = ops[operand.name], operand.shapes[-1]
        symbol = operand.symbol or operand.name
        mine = head // groups if "H" in dims else head
        if "T" in dims:
            for t in range(tokens):
                found[t][0][symbol] = column(x[0, t, mine])
        elif "nT" in dims:
            for n in range(tokens * spec.substeps):
                found[n // spec.substeps][1][n % spec.substeps][symbol] = column(x[0, n, mine])
        elif operand.role == "prior":
            one = operand.shapes[-1] == ("HV",)
            constants["I_p"] = column(x[mine].reshape(-1)[:1] if one else x[mine].expand(keys))
        elif operand.role == "basis":
            constants[symbol] = x[mine].numpy()
        else:
            constants[symbol] = column(x[mine])
    start = {}
    for part in program.state:
        x = getattr(state, part.name)[0]
        x = x[head // groups if "H" in part.shape else head]
        start[part.symbol] = x.numpy() if x.ndim == 2 else column(x)
    return start, constants, found


def evaluate(
    lines: tuple[str, ...],
    state: Values,
    constants: Values,
    tokens: list[tuple[Values, list[Values]]],
) -> tuple[list[Values], Values]:
    """Evaluate a recurrence over the tokens of one sequence and head.

    Args:
        lines: what a program prints.
        state: values before the first token, by symbol.
        constants: values by name.
        tokens: per token, the values named X_t, and per sub-token those named X_i, by symbol.

    Returns:
        Per token all values, and the last value of every symbol.
    """
    head = next((n for n, line in enumerate(lines) if line.startswith("for ")), None)
    count = 1 if head is None else int(re.fullmatch(r"for i = 1 to (\d+):", lines[head])[1])
    kept = dict(state)
    before = {"t": dict(state), "i": dict(state)}
    outputs = []
    for of_token, of_parts in tokens:
        values = dict(constants)
        for index in "ti":
            values |= {f"{x}_{{{index}-1}}": value for x, value in before[index].items()}
        values |= {f"{x}_t": value for x, value in of_token.items()}
        inside = [line for line in lines if line.startswith("    ")]
        first = lines if head is None else lines[:head]
        after = () if head is None else [x for x in lines[head + 1 :] if not x.startswith("    ")]
        made: Values = dict(of_token)
        with np.errstate(divide="ignore"):
            made |= _assign(first, values, 0)
            for i in range(count if inside else 0):
                own = of_parts[i] if i < len(of_parts) else {}
                values |= {f"{x}_i": value for x, value in own.items()}
                here = own | _assign(inside, values, i)
                values |= {f"{x}_{{i-1}}": value for x, value in here.items()}
                before["i"] |= here
                kept |= here
            made |= _assign(after, values, 0)
            before["t"] |= made
            kept |= made
        outputs.append(values)
    return outputs, kept


def _assign(lines, values: Values, index: int) -> Values:
    made = {}
    for line in lines:
        name, formula = line.strip().split(" = ", 1)
        values[name] = Formula(formula, values, index).value()
        made[name.rsplit("_", 1)[0]] = values[name]
    return made
