"""One validated call of the recurrence: what every engine gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor, dtype

from glazoo.program import Program
from glazoo.program.env import Env
from glazoo.state import State

__all__ = ["Call", "Given", "Result", "TokenRun"]


@dataclass(frozen=True, slots=True)
class Call:
    """Validated operands of one program."""

    program: Program
    operands: dict[str, Tensor]
    """By name; optional operands are filled in (`g` of a schedule, `prior` as [HV, 1] or [HV, K],
    `center` as [HV])."""
    scale: float
    initial_state: State | None
    cu_seqlens: Tensor | None
    uncertainty: bool
    compute_dtype: dtype
    """At least float32; float64 if any operand is."""
    spread: Callable[[Env], Env] | None = None
    """Makes the environment of steps that run over several processes; None: this one alone."""

    @property
    def groups(self) -> int:
        """Value heads per query/key head."""
        return self.operands["v"].shape[2] // self.operands["q"].shape[2]


class Result(NamedTuple):
    """What an engine gives back; the output is in the compute dtype or in v's."""

    output: Tensor
    state: State
    uncertainty: Tensor | None


Given: TypeAlias = "Mapping[str, Tensor | float | None]"
"""Operands by name, as a call gives them."""

TokenRun: TypeAlias = "Callable[[Given, State | None], Result | None]"
"""What runs a token of decoding, prepared for all calls with operands and states of the same
shapes, dtypes and devices; None where it does not after all."""
