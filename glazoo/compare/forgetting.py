"""How an association fades as others are written after it: theory and measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from glazoo.api import attention, schedule
from glazoo.compare.keys import draw_keys
from glazoo.compare.probe import Gates, key_scale_matters, mapped_size, operands
from glazoo.program import Program, lower
from glazoo.spec import Spec
from glazoo.stats import Interval, interval
from glazoo.theory.instances import run

__all__ = ["Forgetting", "ForgettingPlan", "forgetting", "theory"]


@dataclass(frozen=True, slots=True)
class ForgettingPlan:
    """One measurement of a forgetting curve."""

    spec: Spec
    label: str
    gates: Gates
    key_size: int = 64
    value_size: int = 32
    before: int = 64
    """Tokens before the association that is followed."""
    after: int = 512
    """Tokens after it."""
    sequences: int = 32
    """Sequences per seed."""
    seeds: int = 6
    seed: int = 0
    impl: str = "auto"


@dataclass(frozen=True, slots=True)
class Theory:
    """The mean-field prediction, per lag."""

    signal: list[float]
    """Share of the association's signal that is left, one right after it is written."""
    error: list[float]
    """Share of the value's energy that the best output scale does not recover."""


@dataclass(frozen=True, slots=True)
class Forgetting:
    """A forgetting curve, measured and predicted, per lag in tokens."""

    label: str
    gates: dict[str, float]
    key_size: int
    state_bytes: int
    lags: list[int]
    signal: list[Interval]
    error: list[Interval]
    theory: Theory | None
    """Unset where there is none: `theory` says for what."""

    @property
    def half_life(self) -> float | None:
        """Tokens until half of the measured signal is left; unset if it is not reached."""
        return next(
            (float(n) for n, s in zip(self.lags, self.signal, strict=True) if s.mean <= 0.5), None
        )

    def to_json(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        return {
            "label": self.label,
            "gates": self.gates,
            "key_size": self.key_size,
            "state_bytes": self.state_bytes,
            "half_life": self.half_life,
            "points": [
                {
                    "lag": n,
                    "signal": s._asdict(),
                    "error": e._asdict(),
                    "theory_signal": self.theory.signal[n] if self.theory else None,
                    "theory_error": self.theory.error[n] if self.theory else None,
                }
                for n, s, e in zip(self.lags, self.signal, self.error, strict=True)
            ],
        }


def forgetting(plan: ForgettingPlan) -> Forgetting:
    """Follows one association through a stream of others and reads it at every later token.

    Unit keys and Gaussian values, gates constant. The signal is the mean of y . v over that right
    after the write; the error is the share of v's energy that the best output scale does not
    recover.

    Args:
        plan: what to measure.

    Returns:
        The measured curve, and the theory where there is one.
    """
    spec, program = plan.spec, lower(plan.spec)
    n = spec.substeps
    gates = _effective(program, plan.gates)
    late = spec.read.when == "pre"
    tokens = plan.before + plan.after + 1 + late
    generator = torch.Generator().manual_seed(plan.seed)
    dots, energies, values_energy = [], [], []
    for _ in range(plan.seeds):
        keys = draw_keys("random", plan.sequences, tokens * n, plan.key_size, generator)
        values = torch.randn(plan.sequences, tokens * n, plan.value_size, generator=generator)
        # The last of a token's writes is followed: it sees the whole token's decay but no more.
        at = (plan.before + 1) * n - 1
        queries = keys[:, at : at + 1].expand(-1, tokens, -1)
        reading = operands(program, None, values.new_zeros(values.shape), queries, [gates])
        ops = operands(program, keys, values, None, [gates]) | {"q": reading["q"]}
        with torch.no_grad():
            output = run(attention, spec, ops, impl=plan.impl).output
        y = output[:, plan.before + late :, 0].double()
        wanted = values[:, at, None].double()
        dots.append((y * wanted).sum((0, 2)))
        energies.append(y.square().sum((0, 2)))
        values_energy.append(wanted.square().sum())
    signal, error = [], []
    lags = _lags(plan.after)
    for lag in lags:
        signal.append(interval([float(d[lag] / d[0]) for d in dots]))
        error.append(
            interval(
                [
                    float(1 - d[lag].clamp(min=0).square() / (e[lag] * w).clamp(min=1e-300))
                    for d, e, w in zip(dots, energies, values_energy, strict=True)
                ]
            )
        )
    return Forgetting(
        plan.label,
        gates.describe(program),
        plan.key_size,
        4 * program.state_floats(mapped_size(program, plan.key_size), plan.value_size),
        lags,
        signal,
        error,
        theory(program, gates, plan.key_size, plan.before, plan.after),
    )


def _effective(program: Program, gates: Gates) -> Gates:
    """Takes a fixed schedule's own decay: that of its middle head of eight."""
    if program.spec.decay.source != "fixed":
        return gates
    return replace(gates, decay=float(schedule(program.spec.decay, 8)[4]))


def _lags(after: int) -> list[int]:
    """Return lag 0 and lags in steps of a factor of about 1.4."""
    spread = {round(2 ** (i / 2)) for i in range(2 * after.bit_length())}
    return sorted({0, after, *(lag for lag in spread if lag <= after)})


def theory(program: Program, gates: Gates, key_size: int, before: int, after: int) -> Theory | None:
    """Predicts a forgetting curve by a mean-field argument over random unit keys.

    Importance is replaced by its mean over channels, I = J + I_p with J = a J + b / K. A write with
    gain c along its key and removal e per unit of prediction then multiplies older signal by
    f - e / K, where f is the forgetting of the mean. Of the energy of interference along the
    followed key it keeps f^2 - 2 f e / K, and it adds c^2 / K; a removal over all channels mixes in
    e^2 / K of the energy that is stored along other directions. For full precision,
    (H + Lambda)^-1 has the deterministic equivalent x = 1 / (Lambda + (1 / K) sum_j w_j / (1 + w_j
    x)) with w_j = beta a^age.

    Args:
        program: any program.
        gates: constant gates.
        key_size: key channels K.
        before: tokens before the association.
        after: tokens after it.

    Returns:
        Signal and error per lag, or None where keys pass a feature map, are tied to the decay, are
        logarithms, where the read is normalised, where importance is forgotten otherwise, or where
        a matrix counts by a gate of its own: those have no such theory.
    """
    spec, imp = program.spec, program.spec.importance
    if key_scale_matters(program) or spec.read.normalizer != "none":
        return None
    if spec.forgetting != "temper" or spec.posterior.gain == "flow":
        return None
    if spec.posterior.precision == "full":
        assert imp is not None
        own, relative = imp.gate.shape != "none", imp.prior.shape == "relative"
        if own or relative or spec.read.mix.shape != "none":
            return None
        return _full_theory(program, gates, key_size, before, after)
    a = math.exp(gates.decay) if program.role("decay") else 1.0
    field = _MeanField(program, gates, key_size)
    # Energy of what is stored along any direction, and of interference along the followed key.
    anywhere, noise, signal = 0.0, 0.0, 0.0
    signals, errors = [], []
    for t in range(before + after + 1):
        for j in range(spec.substeps):
            forget, gain, removal = field.step(a if j == 0 else 1.0)
            written = gain * gain / key_size
            if t == before and j == spec.substeps - 1:
                # Older content along this very key is removed, not just its mean share.
                noise = anywhere * field.own_removal(forget, removal)
                signal = gain
            else:
                signal *= forget - removal / key_size
                noise = noise * field.kept(forget, removal) + written
                noise += anywhere * field.mixed(removal)
            anywhere *= field.kept(forget, removal) + field.mixed(removal)
            anywhere += written
        if t >= before:
            scale = field.read_scale()
            signals.append(signal * scale)
            errors.append(noise / (signal * signal + noise) if noise > 0 else 0.0)
    return Theory([s / signals[0] for s in signals], errors)


class _MeanField:
    """Importance and gains of random unit keys, with one number for all channels."""

    def __init__(self, program: Program, gates: Gates, key_size: int) -> None:
        self.spec, self.gates, self.size = program.spec, gates, key_size
        self.importance = 0.0
        self.beta = gates.write if program.role("write") else 1.0
        self.prior = gates.prior if program.role("prior") else 0.0

    def step(self, decay: float) -> tuple[float, float, float]:
        """Return forgetting f, gain c and removal e of one write."""
        spec, imp = self.spec, self.spec.importance
        rate = before = 1.0
        forget = decay
        if imp is not None:
            old = self.importance
            kept = old if imp.own_decay is not None else decay * old
            self.importance = kept + self.gates.importance / self.size
            if imp.preconditioner is not None:
                p = imp.preconditioner
                x = math.log(self.importance + p.eps) - p.center_init
                rate = math.exp(-math.log(p.base) * x / (1 + abs(x)))
            elif not spec.hebbian:
                before = kept + self.prior
                rate = 1 / (self.importance + self.prior)
                forget = decay * (old + self.prior) / before
        if self.spec.hebbian:
            return decay, self.beta, 0.0
        if spec.posterior.gain == "exact":
            # Unit keys: 1 - beta k.k is what a rate leaves of the one.
            known = 1.0 if spec.posterior.beta == "precision" else max(1.0 - self.beta, 0.0)
            gain = self.beta / before / (known + self.beta / before)
            return forget, gain, gain * forget
        removal = self.beta if spec.erase.strength == "write" else self.gates.erase
        base = forget if spec.erase.base == "decayed" else 1.0
        return forget, self.beta * rate, removal * rate * base

    def kept(self, forget: float, removal: float) -> float:
        """Return the share of the energy along a direction that stays there."""
        share = forget * forget - 2 * forget * removal / self.size
        if self.spec.posterior.correction == "full":
            return share
        return share + 3 * (removal / self.size) ** 2

    def mixed(self, removal: float) -> float:
        """Return the share of the energy along other directions that a removal brings in."""
        full = self.spec.posterior.correction == "full"
        return removal * removal / self.size if full else 0.0

    def own_removal(self, forget: float, removal: float) -> float:
        """Return the factor on the energy of interference along the key that is written."""
        if self.spec.posterior.correction == "full":
            return (forget - removal) ** 2
        return self.kept(forget, removal)

    def read_scale(self) -> float:
        """Return the factor between what is stored and what is read."""
        if self.spec.hebbian and self.spec.importance is not None:
            return 1 / (self.importance + self.prior)
        return 1.0


def _full_theory(program: Program, gates: Gates, key_size: int, before: int, after: int) -> Theory:
    a = math.exp(gates.decay) if program.role("decay") else 1.0
    signals, errors = [], []
    for lag in range(after + 1):
        total = before + 1 + lag
        ages = torch.arange(total, dtype=torch.float64)
        w = gates.write * a**ages
        own, others = float(w[lag]), torch.cat([w[:lag], w[lag + 1 :]])
        x = 1 / gates.prior
        for _ in range(200):
            new = 1 / (gates.prior + float((others / (1 + others * x)).sum()) / key_size)
            if abs(new - x) <= 1e-12 * new:
                break
            x = (x + new) / 2
        share = others.square() / (1 + others * x).square()
        slope = 1 / (1 / x**2 - float(share.sum()) / key_size)
        signal = own * x / (1 + own * x)
        noise = float(share.sum()) / key_size * slope / (1 + own * x) ** 2
        signals.append(signal)
        errors.append(noise / (signal * signal + noise) if noise > 0 else 0.0)
    return Theory([s / signals[0] for s in signals], errors)
