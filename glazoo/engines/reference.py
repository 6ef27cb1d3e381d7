"""The definition of truth: the recurrence of a spec, one token after the other, in plain tensor
operations.

It follows the posterior axes themselves (predict, observe, correct, read) and shares no arithmetic
with the kernel classes that the other engines run.
"""

from __future__ import annotations

import math
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
    erase: Tensor | None
    own_decay: Tensor | None


class _Sequence:
    """The recurrence of a batch of sequences of one length."""

    def __init__(self, call: Call, ops: dict[str, Tensor], state: State | None) -> None:
        self.spec = call.program.spec
        self.call, self.ops = call, ops
        self.q = ops["q"].repeat_interleave(call.groups, 2) * call.scale
        self.v = ops["v"]
        batch, self.tokens, heads, keys = self.q.shape
        values = self.v.shape[-1]
        self.one = self.q.new_ones(())
        imp = self.spec.importance
        self.prior = ops["prior"][None, :, :, None] if "prior" in ops else self.one
        self.memory = (
            self.q.new_zeros(batch, heads, keys, values) if state is None else state.memory
        )
        self.importance: Tensor | None = None
        if imp is not None:
            size = {"full": keys, "diagonal": values if imp.gate.shape == "value" else 1}[
                self.spec.posterior.precision
            ]
            start = -torch.inf if self.spec.log_evidence else 0.0
            self.importance = self.q.new_full((batch, heads, keys, size), start)
            if state is not None and state.importance is not None:
                self.importance = state.importance.reshape(batch, heads, keys, size)
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
                y = self._read(q, uncertainties)
            writes = self._writes(t)
            for write in writes:
                self._observe_and_correct(write)
            if self.spec.read.when == "post":
                y = self._read(q, uncertainties)
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
        """Return the writes of token t in order, each with the decay that acts right before it."""
        steps = self.spec.steps
        decay = self._decay(t)
        if steps.source == "lagged":
            trap = self.ops["trap"][:, t, :, None, None]
            now = self._write(t, decay)
            before_k, before_v = self._previous(t)
            lagged = replace(
                now,
                k=before_k,
                v=before_v,
                beta=now.beta * (1 - trap),
                b=now.b * (1 - trap),
                decay=self.one,
            )
            return [lagged, replace(now, beta=now.beta * trap, b=now.b * trap)]
        n = steps.count
        return [self._write(t * n + j, decay if j == 0 else self.one) for j in range(n)]

    def _previous(self, t: int) -> tuple[Tensor, Tensor]:
        assert self.lag_key is not None
        assert self.lag_value is not None
        k = self.lag_key.repeat_interleave(self.call.groups, 1)[..., None]
        v = self.lag_value[:, :, None]
        return k, v

    def _decay(self, t: int) -> Tensor:
        g = self.ops.get("g")
        if g is None:
            return self.one
        if g.ndim == 1:
            return g.exp()[None, :, None, None]
        a = g[:, t].exp()
        return a[..., None] if a.ndim == 3 else a[..., None, None]

    def _write(self, i: int, decay: Tensor) -> _Write:
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
        own = None if own is None else own[:, i, ..., None]
        p = keyed("p") if "p" in ops else k
        own_decay = gate("g_importance").exp() if "g_importance" in ops else None
        return _Write(
            k, ops["v"][:, i, :, None, :], gate("beta"), gate("b"), decay, p, own, own_decay
        )

    def _observe_and_correct(self, w: _Write) -> None:
        p, imp = self.spec.posterior, self.spec.importance
        if self.normalizer is not None:
            self.normalizer = w.decay * self.normalizer + w.beta * w.k
        if imp is None:
            before = after = self.one
            forget = w.decay
        elif self.spec.log_evidence:
            self._observe_log_evidence(w)
            return
        elif imp.evidence == "outer_product":
            assert self.importance is not None
            self.importance = w.decay * self.importance + w.beta * w.k * w.k.mT
            self.memory = w.decay * self.memory + w.k * (w.beta * w.v)
            return
        else:
            assert self.importance is not None
            old = self.importance
            own = w.decay if w.own_decay is None else w.own_decay
            self.importance = own * old + w.b * w.k.square()
            before, after = own * old + self.prior, self.importance + self.prior
            forget = w.decay if imp.preconditioner else w.decay * (old + self.prior) / before
        if self.spec.hebbian:
            self.memory = w.decay * self.memory + w.k * (w.beta * w.v)
            return
        previous = self.memory
        mean = forget * previous
        strength, erase = w.beta, self.spec.erase
        if p.gain == "exact":
            rate, strength = 1 / before, self._exact_strength(w, before)
        elif imp is None or imp.preconditioner is None:
            rate = 1 / after
        else:
            rate = self._precondition(imp.preconditioner)
        if p.correction == "diagonal":
            gain = rate * (w.k * strength)
            self.memory = mean * (1 - w.k * gain) + gain * w.v
            return
        base = mean if erase.base == "decayed" else previous
        if erase.strength == "write":
            removed = w.k * strength * (base * w.p).sum(2, keepdim=True)
        elif erase.side == "prediction":
            assert w.erase is not None
            removed = w.k * (base * (w.erase * w.p)).sum(2, keepdim=True)
        else:
            assert w.erase is not None
            removed = (w.erase * w.p) * (base * w.p).sum(2, keepdim=True)
        self.memory = mean + rate * (w.k * (strength * w.v) - removed)

    def _exact_strength(self, w: _Write, before: Tensor) -> Tensor:
        """Return what the exact gain makes of the write gate: [B, HV, 1, 1 or V]."""
        found = w.beta * (w.k.square() / before).sum(2, keepdim=True)
        if self.spec.posterior.beta == "precision":
            return w.beta / (1 + found)
        # In this order the quotient is beta, to the last bit, where importance is 1.
        s = w.beta * w.k.square().sum(2, keepdim=True)
        most = s.clamp(min=1)
        return w.beta / ((most - s + found) / most)

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

    def _read(self, q: Tensor, uncertainties: list[Tensor]) -> Tensor:
        if self.call.uncertainty:
            uncertainties.append(self._uncertainty(q))
        return self._mean_read(q)

    def _mean_read(self, q: Tensor) -> Tensor:
        """Reads the posterior mean: [B, HV, 1, V]."""
        if self.spec.posterior.precision == "full":
            return (self.memory * self._solve(q)).sum(2, keepdim=True)
        if self.importance is None or self.spec.memory_is_mean:
            return (self.memory * q).sum(2, keepdim=True)
        return (self.memory / (self.importance + self.prior) * q).sum(2, keepdim=True)

    def _solve(self, q: Tensor) -> Tensor:
        assert self.importance is not None
        precision = self.importance + torch.diag_embed(self.prior.squeeze(-1).expand(*q.shape[:-1]))
        return torch.cholesky_solve(q, torch.linalg.cholesky(precision))

    def _uncertainty(self, q: Tensor) -> Tensor:
        if self.spec.posterior.precision == "full":
            return (q * self._solve(q)).sum((2, 3))
        if self.importance is None:
            return q.square().sum((2, 3))
        if self.spec.log_evidence:
            return (q.square() * (-self.importance).exp()).sum((2, 3))
        variance = (q.square() / (self.importance + self.prior)).sum(2)
        return variance if self.spec.importance_per_synapse else variance.squeeze(-1)

    def _normalize(self, y: Tensor, q: Tensor) -> Tensor:
        if self.normalizer is None:
            return y
        mass = (self.normalizer * q).sum(2, keepdim=True)
        if self.spec.read.normalizer == "sum":
            return y / (mass + self.spec.read.eps)
        return y / mass.abs().clamp(min=1)
