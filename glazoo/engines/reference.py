"""The definition of truth: the recurrence of a spec, one token after the other, in plain tensor
operations.

It follows the posterior axes themselves (predict, observe, correct, read) and shares no arithmetic
with the kernel classes that the other engines run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glazoo.engines.call import Call, Result
from glazoo.state import State

if TYPE_CHECKING:
    from glazoo.spec import Preconditioner

__all__ = ["run"]


def run(call: Call) -> Result:
    """Runs a program token by token; float64 operands stay float64 and autocast is off.

    Args:
        call: the validated call.

    Returns:
        Output [B, T, HV, V], state, and uncertainty if asked for, in the compute dtype.
    """
    ops = {name: x.to(call.compute_dtype) for name, x in call.operands.items()}
    state = call.initial_state
    if state is not None:
        state = state.map(lambda x: x.to(call.compute_dtype))
    with torch.autocast(device_type=ops["q"].device.type, enabled=False):
        if call.cu_seqlens is None:
            return _Sequence(call, ops, state).run()
        results = []
        bounds = call.cu_seqlens.tolist()
        for n, (start, end) in enumerate(pairwise(bounds)):
            part = dict(ops)
            for operand in call.program.operands:
                if operand.per_token and operand.name in ops:
                    m = call.program.spec.substeps if "nT" in operand.shapes[0] else 1
                    part[operand.name] = ops[operand.name][:, start * m : end * m]
            own = None if state is None else state.sequence(n)
            results.append(_Sequence(call, part, own).run())
    uncertainties = [r.uncertainty for r in results if r.uncertainty is not None]
    return Result(
        torch.cat([r.output for r in results], 1),
        State.cat([r.state for r in results]),
        torch.cat(uncertainties, 1) if uncertainties else None,
    )


_Over = Callable[[Tensor], Tensor]
"""Divides columns [B, HV, K, n] by a precision."""


def _same(x: Tensor) -> Tensor:
    return x


@dataclass
class _Write:
    """One write of a token: key [B, HV, K, 1], value [B, HV, 1, V], gates that broadcast against
    [B, HV, K, V]."""

    k: Tensor
    v: Tensor
    beta: Tensor
    b: Tensor
    decay: Tensor
    p: Tensor
    """The key that predicts, times its own gate if it has one."""
    removal: Tensor | None
    """The key along which is removed, where it is not the written one."""
    own_decay: Tensor | None
    noise: Tensor | None


class _Sequence:
    """The recurrence of a batch of sequences of one length."""

    def __init__(self, call: Call, ops: dict[str, Tensor], state: State | None) -> None:
        self.spec = call.program.spec
        self.call, self.ops = call, ops
        self.q = ops["q"].repeat_interleave(call.groups, 2) * call.scale
        # A mean that forgets per axis of the importance is kept in its basis.
        self.turned = self.spec.turned
        if self.turned:
            turn = ops["basis"].repeat_interleave(call.groups, 0)
            self.q = torch.einsum("hkj,bthk->bthj", turn, self.q)
        self.v = ops["v"]
        batch, self.tokens, heads, keys = self.q.shape
        values = self.v.shape[-1]
        self.one = self.q.new_ones(1, 1, 1, 1)
        imp = self.spec.importance
        self.prior = ops["prior"][None, :, :, None] if "prior" in ops else self.one
        self.memory = (
            self.q.new_zeros(batch, heads, keys, values) if state is None else state.memory
        )
        self.importance: Tensor | None = None
        if imp is not None:
            precision = self.spec.posterior.precision
            size = {
                "isotropic": (1, 1),
                "diagonal": (keys, values if imp.gate.shape == "value" else 1),
                "full": (keys, keys),
            }[precision]
            start = -torch.inf if self.spec.log_evidence else 0.0
            self.importance = self.q.new_full((batch, heads, *size), start)
            if state is not None and state.importance is not None:
                self.importance = state.importance.reshape(batch, heads, *size)
        self.normalizer: Tensor | None = None
        if self.spec.read.normalizer != "none":
            given = None if state is None else state.normalizer
            self.normalizer = (
                self.q.new_zeros(batch, heads, keys, 1) if given is None else given[..., None]
            )
        self.lag_key = self.lag_value = None
        if self.spec.steps.source == "lagged":
            self.lag_key = ops["k"].new_zeros(batch, ops["k"].shape[2], keys)
            self.lag_value = self.v.new_zeros(batch, heads, values)
            if state is not None and state.lag_key is not None and state.lag_value is not None:
                self.lag_key, self.lag_value = state.lag_key, state.lag_value

    def run(self) -> Result:
        outputs: list[Tensor] = []
        uncertainties: list[Tensor] = []
        for t in range(self.tokens):
            q = self.q[:, t, :, :, None]
            if self.spec.read.when == "pre":
                y = self._read(t, q, uncertainties)
            writes = self._writes(t)
            for write in writes:
                self._observe_and_correct(write)
            if self.spec.read.when == "post":
                y = self._read(t, q, uncertainties)
            if self.spec.read.bonus:
                last = writes[-1]
                same = (self.ops["u"][:, :, None] * last.k * q).sum(2, keepdim=True)
                y = y + same * (last.beta * last.v)
            if self.lag_key is not None:
                self.lag_key, self.lag_value = self.ops["k"][:, t], self.v[:, t]
            outputs.append(self._normalize(y, q).squeeze(2))
        shape = (self.q.shape[0], 0, self.q.shape[2], self.v.shape[-1])
        output = torch.stack(outputs, 1) if outputs else self.v.new_zeros(shape)
        uncertainty = None
        if self.call.uncertainty:
            per_value = self.spec.importance_per_synapse
            uncertainty = (
                torch.stack(uncertainties, 1)
                if uncertainties
                else self.v.new_zeros(shape if per_value else shape[:-1])
            )
        importance = self.importance
        if (
            importance is not None
            and importance.shape[-1] == 1
            and not self._importance_is_matrix()
        ):
            importance = importance.squeeze(-1)
        normalizer = None if self.normalizer is None else self.normalizer.squeeze(-1)
        return Result(
            output,
            State(self.memory, importance, normalizer, self.lag_key, self.lag_value),
            uncertainty,
        )

    def _importance_is_matrix(self) -> bool:
        return self.spec.posterior.precision == "full" or self.spec.importance_per_synapse

    def _writes(self, t: int) -> list[_Write]:
        """Return the writes of token t in order, each with what is forgotten right before it."""
        steps = self.spec.steps
        decay, noise = self._decay(t), self._noise(t)
        still = None if noise is None else torch.zeros_like(noise)
        if steps.source == "lagged":
            trap = self.ops["trap"][:, t, :, None, None]
            now = self._write(t, decay, noise)
            before_k, before_v = self._previous(t)
            lagged = replace(
                now,
                k=before_k,
                v=before_v,
                beta=now.beta * (1 - trap),
                b=now.b * (1 - trap),
                decay=self.one,
                noise=still,
            )
            return [lagged, replace(now, beta=now.beta * trap, b=now.b * trap)]
        n = steps.count
        return [
            self._write(t * n + j, decay if j == 0 else self.one, noise if j == 0 else still)
            for j in range(n)
        ]

    def _previous(self, t: int) -> tuple[Tensor, Tensor]:
        assert self.lag_key is not None
        assert self.lag_value is not None
        k = self.lag_key.repeat_interleave(self.call.groups, 1)[..., None]
        v = self.lag_value[:, :, None]
        return self._to_axes(k) if self.turned else k, v

    def _decay(self, t: int) -> Tensor:
        g = self.ops.get("g")
        if g is None:
            return self.one
        if g.ndim == 1:
            return g.exp()[None, :, None, None]
        a = g[:, t].exp()
        return a[..., None] if a.ndim == 3 else a[..., None, None]

    def _noise(self, t: int) -> Tensor | None:
        noise = self.ops.get("noise")
        if noise is None:
            return None
        noise = noise[:, t]
        return noise[..., None] if noise.ndim == 3 else noise[..., None, None]

    def _write(self, i: int, decay: Tensor, noise: Tensor | None) -> _Write:
        ops, groups = self.ops, self.call.groups

        def keyed(name: str) -> Tensor:
            return ops[name][:, i].repeat_interleave(groups, 1)[..., None]

        def gate(name: str) -> Tensor:
            x = ops.get(name)
            if x is None:
                return self.one
            return x[:, i, :, None, :] if x.ndim == 4 else x[:, i, :, None, None]

        k = 1 - decay if self.spec.key == "one_minus_decay" else keyed("k")
        own = next((ops[name] for name in ("erase", "removal") if name in ops), None)
        p, removal = keyed("p") if "p" in ops else k, None
        if own is not None:
            own = own[:, i, ..., None] * p
            p, removal = (p, own) if self.spec.erase.side == "removal" else (own, None)
        own_decay = gate("g_importance").exp() if "g_importance" in ops else None
        v = ops["v"][:, i, :, None, :]
        if self.turned:
            k, p = self._to_axes(k), self._to_axes(p)
        beta = gate("beta")
        # Without a gate of its own, a precision matrix counts what is written.
        b = gate("b") if "b" in ops else beta
        return _Write(k, v, beta, b, decay, p, removal, own_decay, noise)

    def _observe_and_correct(self, w: _Write) -> None:
        p, imp, erase = self.spec.posterior, self.spec.importance, self.spec.erase
        if self.normalizer is not None:
            self.normalizer = w.decay * self.normalizer + w.beta * w.k
        if self.spec.log_evidence:
            self._observe_log_evidence(w)
            return
        seen = self._mean() if erase.base == "prev" else None
        before, after, mean = self._predict_and_observe(w)
        if self.spec.sums_writes:
            self.memory = w.decay * self.memory + w.k * (w.beta * w.v)
            return
        if self.spec.hebbian:
            own = imp is not None and imp.basis == "own" and p.precision == "diagonal"
            if own:
                rate, predicted = after(w.k), w.k * mean
            else:
                # Of all that one observation says, or what it adds elsewhere would be lost.
                found = before(w.k)
                rate = found / (1 + w.b * (w.k * found).sum(2, keepdim=True))
                predicted = (mean * w.k).sum(2, keepdim=True)
            self._keep(mean + rate * (w.beta * w.v - w.b * predicted))
            return
        strength, rate = w.beta, after(w.k)
        if p.gain == "exact":
            rate = before(w.k)
            strength = self._exact_strength(w, rate)
        elif p.gain == "flow":
            rate = before(w.k)
            strength = self._flow(w, rate)
        if p.correction == "diagonal":
            gain = rate * strength
            self._keep(mean * (1 - w.k * gain) + gain * w.v)
            return
        base = mean if seen is None else seen
        predicted = (base * w.p).sum(2, keepdim=True)
        if erase.strength == "write":
            mean = mean + rate * (strength * (w.v - predicted))
        elif w.removal is None:
            mean = mean + rate * (strength * w.v - predicted)
        else:
            mean = mean + rate * (strength * w.v) - after(w.removal) * predicted
        self._keep(mean)

    def _mean(self) -> Tensor:
        """Return the posterior mean of every synapse, [B, HV, K, V]."""
        if self.importance is None or self.spec.memory_is_mean:
            return self.memory
        if self.spec.posterior.precision == "full":
            return self._solve(self.memory)
        return self.memory / (self.importance + self.prior)

    def _keep(self, mean: Tensor) -> None:
        """Keep a mean as the memory that this spec carries."""
        natural = self.importance is not None and not self.spec.memory_is_mean
        self.memory = self._matrix() @ mean if natural else mean

    def _matrix(self) -> Tensor:
        """Return the precision matrix H + Diag(I_p)."""
        H, imp = self.importance, self.spec.importance
        assert H is not None
        assert imp is not None
        prior = self.prior.squeeze(-1)
        if imp.prior.shape == "relative":
            prior = prior * torch.linalg.matrix_norm(H)[..., None] + imp.prior.floor
        return H + torch.diag_embed(prior.expand(H.shape[:-1]))

    def _predict_and_observe(self, w: _Write) -> tuple[_Over, _Over, Tensor]:
        """Forget and count one write's evidence.

        Returns:
            What divides [B, HV, K, n] by the precision before and after the write, and the mean
            after forgetting.
        """
        p, imp = self.spec.posterior, self.spec.importance
        if imp is None:
            return _same, _same, w.decay * self.memory
        assert self.importance is not None
        if p.precision == "full":
            return self._matrices(w)
        old, a = self.importance, w.decay if w.own_decay is None else w.own_decay
        square, axes = w.k.square(), imp.basis == "rotated" and not self.turned
        if axes:
            square = self._to_axes(w.k).square()
        if p.precision == "isotropic":
            square = square.mean(2, keepdim=True)
        forget = w.decay
        if imp.forgetting == "diffuse":
            keep = a.square()
            if axes and self.spec.decay.shape == "key":
                # Of a write that decays nothing, too: its one is a sum of an axis' squares.
                turn = self.ops["basis"].square().repeat_interleave(self.call.groups, 0)
                keep = turn.mT @ keep.expand(-1, -1, turn.shape[1], -1)
            if p.precision == "isotropic":
                keep = keep.mean(2, keepdim=True)
            if w.noise is None:
                drift = keep * old / (1 + (1 - keep) * old / self.prior)
            else:
                drift = 1 / (keep / (old + self.prior) + w.noise) - self.prior
        elif imp.forgetting == "discount":
            drift, forget = a * old - (1 - a) * self.prior, self.one
        else:
            drift = a * old
            if imp.preconditioner is None:
                forget = w.decay * (old + self.prior) / (drift + self.prior)
        self.importance = drift + w.b * square
        before, after = drift + self.prior, self.importance + self.prior
        mean = forget * self._mean_of(old)
        if imp.preconditioner is not None:
            scale = self._precondition(imp.preconditioner)
            return _same, lambda x: x * scale, mean
        if axes:
            return self._over_axes(before), self._over_axes(after), mean
        return lambda x: x / before, lambda x: x / after, mean

    def _matrices(self, w: _Write) -> tuple[_Over, _Over, Tensor]:
        """The same for a precision matrix, or for a covariance less that of the prior."""
        spec, imp, old = self.spec, self.spec.importance, self.importance
        assert imp is not None
        assert old is not None
        if spec.forgetting == "diffuse":
            variance = self._variance()
            drift = w.decay * old * w.decay.mT
            if w.noise is not None:
                # What the decay would lose of the prior's variance comes back as noise.
                lost = w.noise - (1 - w.decay.square()) * variance
                drift = drift + torch.diag_embed((lost + 0 * w.k).squeeze(-1))
            found = variance * w.k + drift @ w.k
            weight = w.b / (1 + w.b * (w.k * found).sum(2, keepdim=True))
            self.importance = new = drift - weight * found * found.mT
            mean = w.decay * self.memory
            return (
                lambda x: variance * x + drift @ x,
                lambda x: variance * x + new @ x,
                mean,
            )
        self.importance = drift = w.decay * old
        if spec.sums_writes:
            # Nothing is predicted: only reads look at the matrix.
            self.importance = drift + w.b * w.k * w.k.mT
            return _same, _same, self.memory
        before = torch.linalg.cholesky(self._matrix())
        mean = torch.cholesky_solve(w.decay * self.memory, before)
        self.importance = drift + w.b * w.k * w.k.mT
        after = torch.linalg.cholesky(self._matrix())
        return (
            lambda x: torch.cholesky_solve(x, before),
            lambda x: torch.cholesky_solve(x, after),
            mean,
        )

    def _variance(self) -> Tensor:
        """Return the prior variance of every key, [1, HV, K, 1]."""
        return (1 / self.prior).expand(1, *self.memory.shape[1:3], 1)

    def _mean_of(self, old: Tensor) -> Tensor:
        """Return the mean, given the importance above the prior that goes with the memory."""
        return self.memory if self.spec.memory_is_mean else self.memory / (old + self.prior)

    def _to_axes(self, x: Tensor) -> Tensor:
        """Turn vectors [B, HV, K, 1] into the basis of the importance."""
        return self.ops["basis"].repeat_interleave(self.call.groups, 0).mT @ x

    def _over_axes(self, importance: Tensor) -> _Over:
        turn = self.ops["basis"].repeat_interleave(self.call.groups, 0)
        return lambda x: turn @ ((turn.mT @ x) / importance)

    def _exact_strength(self, w: _Write, rate: Tensor) -> Tensor:
        """Return what the exact gain makes of the write gate: [B, HV, 1, 1 or V]."""
        found = w.beta * (w.k * rate).sum(2, keepdim=True)
        if self.spec.posterior.beta == "precision":
            return w.beta / (1 + found)
        # In this order the quotient is beta, to the last bit, where importance is 1.
        s = w.beta * w.k.square().sum(2, keepdim=True)
        most = s.clamp(min=1)
        return w.beta / ((most - s + found) / most)

    def _flow(self, w: _Write, rate: Tensor) -> Tensor:
        """Return the strength of the delta rule as a flow: [B, HV, 1, 1 or V]."""
        found = (w.k * rate).sum(2, keepdim=True)
        still = found == 0
        reached = -torch.expm1(-w.beta * found) / found.masked_fill(still, 1)
        return torch.where(still, w.beta, reached)

    def _observe_log_evidence(self, w: _Write) -> None:
        assert self.importance is not None
        old = self.importance
        new = torch.logaddexp(old, w.k)
        self.importance = new
        self.memory = (old - new).exp() * self.memory + (w.k - new).exp() * w.v

    def _precondition(self, p: Preconditioner) -> Tensor:
        assert self.importance is not None
        x = (self.importance + p.eps).log() - self.ops["center"][None, :, None, None]
        return (-math.log(p.base) * x / (1 + x.abs())).exp()

    def _read(self, t: int, q: Tensor, uncertainties: list[Tensor]) -> Tensor:
        if self.call.uncertainty:
            uncertainties.append(self._uncertainty(q))
        mix = self.ops["mix"][:, t, :, None, None] if "mix" in self.ops else None
        return self._mean_read(q, mix)

    def _mean_read(self, q: Tensor, mix: Tensor | None) -> Tensor:
        """Reads the posterior mean: [B, HV, 1, V]."""
        if self.importance is None or self.spec.memory_is_mean:
            return (self.memory * q).sum(2, keepdim=True)
        if self.spec.posterior.precision == "full":
            solved = self._solve(q)
            if mix is not None:
                solved = q + mix * (solved - q)
            return (self.memory * solved).sum(2, keepdim=True)
        return (self.memory / (self.importance + self.prior) * q).sum(2, keepdim=True)

    def _solve(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x, torch.linalg.cholesky(self._matrix()))

    def _uncertainty(self, q: Tensor) -> Tensor:
        imp = self.spec.importance
        if self.importance is None or imp is None:
            return q.square().sum((2, 3))
        if self.spec.posterior.precision == "full":
            diffuse = imp.forgetting == "diffuse"
            spread = self._variance() * q + self.importance @ q if diffuse else self._solve(q)
            return (q * spread).sum((2, 3))
        if self.spec.log_evidence:
            return (q.square() * (-self.importance).exp()).sum((2, 3))
        if imp.basis == "rotated" and not self.turned:
            q = self._to_axes(q)
        variance = (q.square() / (self.importance + self.prior)).sum(2)
        return variance if self.spec.importance_per_synapse else variance.squeeze(-1)

    def _normalize(self, y: Tensor, q: Tensor) -> Tensor:
        if self.normalizer is None:
            return y
        mass = (self.normalizer * q).sum(2, keepdim=True)
        if self.spec.read.normalizer == "sum":
            return y / (mass + self.spec.read.eps)
        return y / mass.abs().clamp(min=1)
