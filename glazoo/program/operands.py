"""The inputs of a program as data: what each one is, its domain, and what leaves a memory alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from glazoo.spec import Shape, Spec

__all__ = ["Operand", "Role", "operands"]

Role = Literal[
    "query",
    "key",
    "value",
    "erase_key",
    "decay",
    "write",
    "erase",
    "tap",
    "bonus",
    "importance",
    "importance_decay",
    "prior",
    "center",
    "noise",
    "basis",
    "mix",
]

# The weight of this logarithm underflows to zero, and unlike -inf it stays finite in differences.
_NO_EVIDENCE = -1e4


@dataclass(frozen=True, slots=True)
class Operand:
    """One input of a program."""

    name: str
    role: Role
    """What it does in the recurrence; a gate's role is its field in the spec."""
    shapes: tuple[tuple[str, ...], ...]
    """Accepted shapes over B, T, nT (tokens times steps), H, HV, K, V; () is a number."""
    meaning: str
    """What it is."""
    symbol: str | None = None
    """What formulas call it, if not by its name."""
    low: float = -math.inf
    """Smallest accepted value."""
    high: float = math.inf
    """Largest accepted value."""
    open: bool = False
    """Whether `low` itself is not accepted."""
    log: bool = False
    """Whether it is a natural logarithm."""
    idle: float | None = None
    """What it is at a token that neither writes nor forgets; None: any value does."""
    usual: tuple[float, float] | None = None
    """Between which values a trained layer has it; None: it has no scale of its own."""
    wide: bool = True
    """Whether it stays in the compute dtype; tokens are multiplied in the dtype they come in."""
    default: float | Literal["schedule", "identity"] | None = None
    """What it is if it is not given: a number, the spec's fixed schedule, or the identity; None: it
    must be."""

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is None

    @property
    def per_token(self) -> bool:
        """Whether it has one entry per token."""
        return self.shapes[0][:1] == ("B",)

    @property
    def domain(self) -> str:
        """Accepted values, in words."""
        if (self.low, self.high) == (-math.inf, math.inf):
            words = "any"
        elif self.high == math.inf:
            words = f"{'>' if self.open else '>='} {self.low:g}"
        elif self.low == -math.inf:
            words = f"<= {self.high:g}"
        else:
            words = f"in [{self.low:g}, {self.high:g}]"
        return f"{words}, natural logarithm" if self.log else words

    def shown(self) -> str:
        """Return the accepted shapes in words."""
        return " or ".join(
            "[" + ", ".join(s).replace("nT", "n T") + "]" if s else "a number" for s in self.shapes
        )


def _shapes(*texts: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(text.split()) for text in texts)


def operands(spec: Spec) -> Iterator[Operand]:
    """List the operands of a spec, in the order in which `glazoo.attention` takes them."""
    imp, erase, decay = spec.importance, spec.erase, spec.decay
    steps = "B nT" if spec.substeps > 1 else "B T"
    key = _shapes(f"{steps} H K")

    def gate(lead: str, shape: Shape) -> tuple[tuple[str, ...], ...]:
        return _shapes(f"{lead} HV " + {"key": "K", "value": "V"}.get(shape, ""))

    meaning = "query, normalised or mapped as the spec's layer says"
    yield Operand("q", "query", _shapes("B T H K"), meaning, wide=False)
    if spec.key == "operand":
        log = spec.log_evidence
        meaning = "key, the logarithm of its evidence" if log else "key"
        idle = _NO_EVIDENCE if log else 0.0
        yield Operand("k", "key", key, meaning, log=log, idle=idle, wide=False)
    yield Operand("v", "value", gate(steps, "value"), "value", idle=0.0, wide=False)
    if decay.shape != "none" and decay.source == "fixed":
        meaning = "fixed log decay; default: the schedule"
        yield Operand(
            "g", "decay", _shapes("HV"), meaning, high=0.0, log=True, idle=0.0, default="schedule"
        )
    elif decay.shape != "none" and decay.source != "derived":
        shape = gate("B T", decay.shape)
        yield Operand("g", "decay", shape, "log decay", high=0.0, log=True, idle=0.0)
    if spec.write.shape != "none":
        shape, usual = gate(steps, spec.write.shape), (0.02, spec.write.factor)
        meaning = "write gate, activated"
        yield Operand("beta", "write", shape, meaning, low=0.0, idle=0.0, usual=usual)
    if spec.steps.source == "lagged":
        shape, meaning = gate("B T", "head"), "weight of the current tap; 1 - trap of the lagged"
        yield Operand("trap", "tap", shape, meaning, low=0.0, high=1.0, usual=(0.05, 0.95))
    if erase.key == "free":
        yield Operand("p", "erase_key", key, "erase key", idle=0.0, wide=False)
    if erase.strength == "own":
        predicts, shape = erase.side == "prediction", gate(steps, "key")
        name, symbol = ("erase", None) if predicts else ("removal", "r")
        meaning = f"own gate of the {'prediction key' if predicts else 'removal, r in formulas'}"
        yield Operand(name, "erase", shape, meaning, symbol=symbol, idle=0.0, usual=(0.0, 1.0))
    if spec.read.bonus:
        yield Operand("u", "bonus", _shapes("HV K"), "same-token bonus")
    if spec.read.mix.shape != "none":
        shape, meaning = gate("B T", spec.read.mix.shape), "share of the solved query, activated"
        yield Operand("mix", "mix", shape, meaning, low=0.0, high=1.0, usual=(0.05, 0.95))
    if imp is None:
        return
    if imp.gate.shape != "none":
        shape, meaning = gate(steps, imp.gate.shape), "importance gate, activated"
        yield Operand("b", "importance", shape, meaning, low=0.0, idle=0.0, usual=(0.0, 1.0))
    if imp.own_decay is not None:
        shape, meaning = gate(steps, "head"), "importance's own log decay"
        yield Operand(
            "g_importance", "importance_decay", shape, meaning, high=0.0, log=True, idle=0.0
        )
    if imp.noise.shape != "none":
        shape, meaning = gate("B T", imp.noise.shape), "variance that a token adds, activated"
        yield Operand("noise", "noise", shape, meaning, low=0.0, idle=0.0, usual=(0.02, 1.0))
    if imp.basis == "rotated":
        meaning = "orthogonal matrix R, whose columns are the axes of the importance"
        yield Operand("basis", "basis", _shapes("H K K"), meaning, symbol="R", default="identity")
    if imp.preconditioner is not None:
        default = imp.preconditioner.center_init
        meaning = f"center of the preconditioner; default {default}"
        yield Operand("center", "center", _shapes("", "HV"), meaning, default=default)
    if imp.prior.shape != "none":
        one = spec.posterior.precision == "isotropic" or imp.prior.shape == "relative"
        shape, default = _shapes("", "HV", *(() if one else ("HV K",))), imp.prior.init
        meaning = f"prior importance I_p; default {default}"
        if imp.prior.shape == "relative":
            meaning = f"prior importance as a share of |H|; default {default}"
        yield Operand(
            "prior", "prior", shape, meaning, low=0.0, open=True, usual=(0.5, 2.0), default=default
        )
