"""Random instances of any spec: operands, states, and the sizes that they are drawn for.

Everything follows from a spec's axes and from its program, so a new spec file is served at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from glazoo.program import Operand, Program, Role, lower
from glazoo.spec import Spec
from glazoo.state import State

__all__ = [
    "REGIMES",
    "Instance",
    "Operands",
    "Regime",
    "dims",
    "keys_are_unit",
    "operands",
    "run",
    "state",
]

Operands = dict[str, Tensor]

Regime = Literal[
    "normal",
    "no_decay",
    "strong_decay",
    "reset",
    "zero_write",
    "zero_keys",
    "zero_gate",
    "large_prior",
    "one_hot",
    "mixed",
]

REGIMES: tuple[Regime, ...] = get_args(Regime)
"""normal; no_decay: g = 0; strong_decay: g between -30 and -5; reset: g = -inf at some tokens;
zero_write: beta = 0; zero_keys: some keys are 0; zero_gate: b = 0 and prior 1; large_prior: prior
1e4, or 10 and noise in proportion; one_hot: every key is plus or minus one basis vector; mixed:
each token has g = 0, g = -inf, beta = 0, b = 0, k = 0 or nothing special. What forgets its prior,
too, has decays of the normal kind where others are strong: nothing would be left to divide by."""


@dataclass(frozen=True, slots=True)
class Instance:
    """Sizes, regime and seed of one instance; together with a spec they determine every operand."""

    B: int = 1
    T: int = 1
    H: int = 1
    G: int = 1
    """Value heads per query/key head."""
    K: int = 1
    V: int = 1
    regime: Regime = "normal"
    start: bool = False
    """Whether the recurrence starts from a random state rather than from nothing."""
    seed: int = 0

    @property
    def HV(self) -> int:
        """Value heads."""
        return self.H * self.G

    def __str__(self) -> str:
        return "Instance({})".format(
            ", ".join(f"{f}={getattr(self, f)!r}" for f in self.__dataclass_fields__)
        )

    def generator(self, stream: int = 0) -> torch.Generator:
        """Return the random generator of one stream of this instance."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + stream) % 2**63)

    def operands(self, spec: Spec, dtype: torch.dtype = torch.float64) -> Operands:
        """Draws the operands of a spec."""
        return operands(
            spec,
            self.generator(),
            self.B,
            self.T,
            self.H,
            self.HV,
            self.K,
            self.V,
            dtype,
            self.regime,
        )

    def state(self, spec: Spec, dtype: torch.dtype = torch.float64) -> State | None:
        """Draws the state to start from, or gives None where the instance starts from nothing."""
        if not self.start:
            return None
        return state(spec, self.generator(1), self.B, self.H, self.HV, self.K, self.V, dtype)


def keys_are_unit(spec: Spec) -> bool:
    """Return whether a spec's keys have norm one: its layer normalises them or its delta rule needs
    it.

    A delta rule on its own key contracts only for beta |k|^2 <= 2; longer keys make it diverge.
    """
    p = spec.posterior
    rule = p.correction == "full" and spec.erase.key == "write"
    return spec.layer.k.norm == "l2" or (rule and (p.gain == "first_order" or p.beta == "rate"))


def operands(
    spec: Spec,
    generator: torch.Generator,
    B: int = 2,
    T: int = 8,
    H: int = 1,
    HV: int = 2,
    K: int = 4,
    V: int = 3,
    dtype: torch.dtype = torch.float64,
    regime: Regime = "normal",
) -> Operands:
    """Draws random valid operands of any spec, as `glazoo.attention` takes them.

    The draw is made in float64 and then rounded, so that all dtypes see the same instance.

    Args:
        spec: any spec.
        generator: a CPU generator; it alone decides the values.
        B: batch.
        T: tokens; specs with n writes per token get n T keys, values and gates.
        H: query/key heads.
        HV: value heads, a multiple of H.
        K: key size.
        V: value size.
        dtype: floating dtype of all operands.
        regime: one of `REGIMES`.

    Returns:
        The operands by name; a key that is tied to the decay is absent. Pass them on with
        `run(op, spec, operands)`.

    Raises:
        ValueError: HV is not a multiple of H, or there is no such regime.
    """
    if HV % H:
        raise ValueError(f"HV: got {HV}, accepted is a multiple of H = {H}")
    if regime not in REGIMES:
        raise ValueError(f"regime: got {regime!r}, accepted are {', '.join(REGIMES)}")
    program = lower(spec)
    sizes = {"B": B, "T": T, "nT": spec.substeps * T, "H": H, "HV": HV, "K": K, "V": V, "1": 1}
    draw = _Draw(spec, generator, regime, sizes)
    ops: Operands = {}
    for operand in program.operands:
        x = draw(operand, ops)
        if x is not None:
            ops[operand.name] = x
    if regime == "mixed":
        draw.mix(program, ops)
    return {name: x.to(dtype) for name, x in ops.items()}


_FIXED: dict[tuple[Regime, Role], float] = {
    ("zero_write", "write"): 0.0,
    ("zero_gate", "importance"): 0.0,
    ("zero_gate", "prior"): 1.0,
}


class _Draw:
    """Draws one operand after the other, by its role and the spec's axes."""

    def __init__(
        self, spec: Spec, generator: torch.Generator, regime: Regime, sizes: dict[str, int]
    ) -> None:
        self.spec, self.generator, self.regime, self.sizes = spec, generator, regime, sizes

    def __call__(self, operand: Operand, ops: Operands) -> Tensor | None:
        role = operand.role
        shape = tuple(self.sizes[d] for d in operand.shapes[-1])
        if role in ("query", "key"):
            return self.keys(shape, query=role == "query")
        if role == "erase_key":
            # Near the key that it stands for, but not the same.
            source = ops["k"] if "k" in ops else self.normal(shape)
            return _unit(source + 0.3 * self.normal(shape))
        if role in ("decay", "importance_decay"):
            return self.decay(shape, optional=not operand.required)
        if role == "center":
            assert isinstance(operand.default, float)
            return operand.default + 0.3 * self.normal(shape)
        if role == "basis":
            basis: Tensor = torch.linalg.qr(self.normal(shape))[0]
            return basis
        if operand.usual is None:
            return self.normal(shape)
        x = self.uniform(shape, *operand.usual)
        if self.regime == "large_prior" and operand.name in ("noise", "prior"):
            # Where importance falls below its prior, the digits of the prior are lost to it.
            falls = lower(self.spec).role("noise") or self.spec.forgetting == "discount"
            large = 10.0 if falls else 1e4
            return torch.full_like(x, large) if role == "prior" else x / large
        fixed = _FIXED.get((self.regime, role))
        return x if fixed is None else torch.full_like(x, fixed)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * u

    def chance(self, shape: tuple[int, ...], probability: float) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) < probability

    def keys(self, shape: tuple[int, ...], *, query: bool) -> Tensor:
        x = self.normal(shape)
        if self.spec.read.normalizer == "sum":
            # Its feature maps are positive: the normaliser is a sum of similarities. Kept away
            # from zero, where the ratio that is read has no digits.
            x = x.abs() + 0.05
        elif keys_are_unit(self.spec):
            x = _unit(x)
        if query:
            return x
        if self.regime == "one_hot":
            axis = torch.randint(0, shape[-1], shape[:-1], generator=self.generator)
            sign = 1.0 - 2.0 * self.chance(shape[:-1], 0.5).double()
            if self.spec.read.normalizer == "sum":
                sign = sign.abs()
            x = torch.zeros_like(x).scatter(-1, axis[..., None], sign[..., None])
        if self.regime == "zero_keys":
            x = x.masked_fill(self.chance((*shape[:-1], 1), 0.4), 0.0)
        return x

    def decay(self, shape: tuple[int, ...], *, optional: bool) -> Tensor | None:
        special = self.regime in ("no_decay", "strong_decay", "reset")
        if optional and not special:
            return None
        g = -self.uniform(shape, 0.01, 1.0)
        if self.regime == "no_decay":
            return torch.zeros_like(g)
        if self.spec.forgetting == "discount":
            return g
        if self.regime == "strong_decay":
            return -self.uniform(shape, 5.0, 30.0)
        if self.regime == "reset":
            return g.masked_fill(self.chance(shape, 0.3), -torch.inf)
        return g

    def mix(self, program: Program, ops: Operands) -> None:
        for operand in program.operands:
            if operand.name not in ops or not operand.per_token:
                continue
            for value in _edges(self.spec, operand):
                x = ops[operand.name]
                mask = self.chance((*x.shape[:3], *[1] * (x.ndim - 3)), 0.15)
                ops[operand.name] = x.masked_fill(mask, value)


def _edges(spec: Spec, operand: Operand) -> tuple[float, ...]:
    """Lists the special values of an operand: a key of zero, no decay and all, the ends of a
    domain, or of the usual values where the domain has none."""
    if operand.role == "key":
        return (0.0,)
    if operand.role in ("decay", "importance_decay"):
        return (0.0,) if spec.forgetting == "discount" else (0.0, -torch.inf, -40.0)
    if operand.role == "noise":
        # Nothing kept and nothing added would be certainty.
        return operand.usual or ()
    ends = tuple(x for x in (operand.low, operand.high) if math.isfinite(x))
    return ends or operand.usual or ()


def _unit(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


def state(
    spec: Spec,
    generator: torch.Generator,
    N: int = 2,
    H: int = 1,
    HV: int = 2,
    K: int = 4,
    V: int = 3,
    dtype: torch.dtype = torch.float64,
) -> State:
    """Draws a random valid recurrent state of any spec.

    Args:
        spec: any spec.
        generator: a CPU generator.
        N: sequences.
        H: query/key heads.
        HV: value heads.
        K: key size.
        V: value size.
        dtype: float32 or float64.

    Returns:
        The state; importance is positive (definite), as any sequence of tokens would leave it. A
        covariance is above that of any prior, as noise leaves it.
    """
    sizes = {"N": N, "H": H, "HV": HV, "K": K, "V": V, "1": 1}
    parts: dict[str, Tensor] = {}
    for part in lower(spec).state:
        x = torch.randn(
            tuple(sizes[d] for d in part.shape), generator=generator, dtype=torch.float64
        )
        if part.name == "importance" and spec.posterior.precision == "full":
            x = x @ x.mT / K
        elif part.name == "importance" and not spec.log_evidence:
            x = x.abs()
        elif part.name == "normalizer" and spec.read.normalizer == "sum":
            x = x.abs() + 0.05
        parts[part.name] = x.to(dtype)
    return State(**parts)


def dims(operand: Operand, x: Tensor) -> tuple[str, ...]:
    """Return the names of an operand's axes, for that of its accepted shapes which x has."""
    return next(s for s in operand.shapes if len(s) == x.ndim)


def run(
    op: Callable[..., Any], spec: Spec, operands: Mapping[str, Tensor | None], **options: Any
) -> Any:
    """Calls an implementation of `glazoo.attention` on operands by name, final state included.

    Args:
        op: `glazoo.attention`, or anything with its signature.
        spec: the spec.
        operands: by name.
        options: further keywords of the op.

    Returns:
        What the op gives back.
    """
    rest = {name: x for name, x in operands.items() if name not in ("q", "k", "v")}
    options = {"output_final_state": True} | options
    return op(spec, operands["q"], operands.get("k"), operands["v"], **rest, **options)
