"""Every class as a loop over tokens in plain torch: what kernels and chunked forms compute.

One rule per class maps a token and the states before it to outputs and the states after it. The
rules are the oracle of the classes' tests and of the GPU benchmark, the decode step of the chunked
forms, and what is differentiated where no faster form has a derivative: in forward mode, twice, and
under the transforms of `torch.func`. Any device, any floating dtype; float64 stays float64.

Arguments are those of the operations of the same name in `glazoo.kernels`, which say what they
mean. low: a dtype to which all states and outputs are rounded after every token.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rule = Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]


def compute_dtype(*operands: Tensor | None) -> torch.dtype:
    """float64 if any operand is float64, else float32."""
    double = any(x is not None and x.dtype == torch.float64 for x in operands)
    return torch.float64 if double else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """States and gates never drop below float32, whatever the caller's autocast."""
    device = x.device.type
    # Not every device has one: "meta" does not.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _down(x: Tensor) -> Tensor:
    """A vector over keys as a column [B, HV, K, 1]."""
    return x.unsqueeze(-1)


def _along(x: Tensor) -> Tensor:
    """A vector over values as a row [B, HV, 1, V]."""
    return x.unsqueeze(-2)


def _read(q: Tensor, state: Tensor) -> Tensor:
    """q^T S as a row [B, HV, 1, V]."""
    return _along(q) @ state


def _decay(g: Tensor | None) -> Tensor | None:
    """exp(g) as a column."""
    return None if g is None else _down(g.exp())


def _decayed(a: Tensor | None, state: Tensor) -> Tensor:
    """Diag(a) S."""
    return state if a is None else a * state


class _Given:
    """Operands of a call, brought to the compute dtype and the shapes that the rules take."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> None:
        self.like, self.cu_seqlens, self.dtype = like, cu_seqlens, dtype
        self.sequences = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def token(self, x: Tensor | None) -> Any:
        """Keys or values [B, T, H, D] for every value head; a gate of a head is one of size 1."""
        if x is None:
            return None
        x, heads = x.to(self.dtype), self.like.shape[2]
        if x.dim() == 3:
            x = x.unsqueeze(-1)
        return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)

    def state(self, x: Tensor | None, *shape: int) -> Tensor:
        """An initial state [N, HV, ..], zeros if None."""
        if x is None:
            size = (self.sequences, self.like.shape[2], *shape)
            return torch.zeros(size, dtype=self.dtype, device=self.like.device)
        return x.to(self.dtype)

    def prior(self, x: Tensor) -> Tensor:
        """[HV], [HV, 1] or [HV, K] as a column."""
        return x.to(self.dtype).reshape(x.shape[0], -1, 1)

    def walk(
        self,
        rule: Rule,
        tokens: Sequence[Tensor | None],
        states: Sequence[Tensor],
        low: torch.dtype | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs [B, T, ..] of every token and the states after each sequence's last."""
        with without_autocast(self.like):
            if self.cu_seqlens is None:
                return _walk(rule, tokens, states, low)
            parts = [
                _walk(
                    rule,
                    [None if x is None else x[:, start:stop] for x in tokens],
                    [x[n : n + 1] for x in states],
                    low,
                )
                for n, (start, stop) in enumerate(itertools.pairwise(self.cu_seqlens.tolist()))
            ]
        outputs, finals = zip(*parts, strict=True)
        return (
            [torch.cat(x, 1) for x in zip(*outputs, strict=True)],
            [torch.cat(x) for x in zip(*finals, strict=True)],
        )


def _walk(
    rule: Rule,
    tokens: Sequence[Tensor | None],
    states: Sequence[Tensor],
    low: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    def rounded(found: Sequence[Tensor]) -> Sequence[Tensor]:
        return found if low is None else [x.to(low).to(x.dtype) for x in found]

    count = next(x.shape[1] for x in tokens if x is not None)
    if not count:
        # No token: one of ones, of which every rule has finite derivatives, tells the shapes.
        ones = [None if x is None else x.new_ones(x.shape[0], *x.shape[2:]) for x in tokens]
        return [x.unsqueeze(1)[:, :0] for x in rule(*ones, *states)[0]], [x.clone() for x in states]
    rows = []
    if count == 1:
        # A step of decoding.
        found, states = rule(*(None if x is None else x[:, 0] for x in tokens), *states)
        return [x.unsqueeze(1) for x in rounded(found)], list(rounded(states))
    for token in zip(
        *(itertools.repeat(None, count) if x is None else x.unbind(1) for x in tokens), strict=True
    ):
        found, states = rule(*token, *states)
        states = rounded(states)
        rows.append(rounded(found))
    return [torch.stack(x, 1) for x in zip(*rows, strict=True)], list(states)


def times(factor: Tensor | None, x: Tensor) -> Tensor:
    """A gate [B, T, HV] times tokens, in the compute dtype; without one the tokens as they are."""
    if factor is None:
        return x
    if x.shape[2] != factor.shape[2]:
        x = x.repeat_interleave(factor.shape[2] // x.shape[2], 2)
    return factor.unsqueeze(3) * x.to(compute_dtype(x, factor))


def scaled(q: Tensor, scale: float) -> Tensor:
    """Queries times a scale, in the compute dtype."""
    return q if scale == 1 else q.to(compute_dtype(q)) * scale


def linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    read: str = "post",
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """S = Diag(exp g) S + k w^T, o = S^T q of the new state or, read "pre", of the old one."""

    def rule(q: Tensor, k: Tensor, w: Tensor, g: Tensor | None, s: Tensor) -> Any:
        new = _down(k) * _along(w) + _decayed(_decay(g), s)
        return [_read(q, new if read == "post" else s).squeeze(-2)], [new]

    at = _Given(w, cu_seqlens, compute_dtype(q, k, w))
    start = at.state(initial_state, k.shape[3], w.shape[3])
    (o,), (final,) = at.walk(rule, [at.token(x) for x in (q, k, w, g)], [start], low)
    return o.to(w.dtype), final


class Linear(NamedTuple):
    """Operands of `linear`."""

    q: Tensor
    k: Tensor
    w: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    read: str

    def loop(self) -> Any:
        return linear(**self._asdict())


def delta(
    q: Tensor,
    e: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    base: str = "decayed",
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """S' = Diag(exp g) S, S = S' + k (w - X^T e)^T, X = S' or, base "prev", old S; o = S^T q."""

    def rule(q: Tensor, e: Tensor, k: Tensor, w: Tensor, g: Tensor | None, s: Tensor) -> Any:
        decayed = _decayed(_decay(g), s)
        error = _along(w) - _read(e, decayed if base == "decayed" else s)
        new = decayed + _down(k) * error
        return [_read(q, new).squeeze(-2)], [new]

    at = _Given(w, cu_seqlens, compute_dtype(q, e, k, w))
    start = at.state(initial_state, k.shape[3], w.shape[3])
    (o,), (final,) = at.walk(rule, [at.token(x) for x in (q, e, k, w, g)], [start], low)
    return o.to(w.dtype), final


class Delta(NamedTuple):
    """Operands of `delta`."""

    q: Tensor
    e: Tensor
    k: Tensor
    w: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    base: str

    def loop(self) -> Any:
        return delta(**self._asdict())


def importance(
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """J = exp(g) J + b k^2, elementwise over keys."""

    def rule(k: Tensor, b: Tensor, g: Tensor | None, j: Tensor) -> Any:
        new = k.square() * b + (j if g is None else g.exp() * j)
        return [new], [new]

    at = _Given(b, cu_seqlens, compute_dtype(k, b))
    start = at.state(initial_state, k.shape[3])
    (j,), (final,) = at.walk(rule, [at.token(x) for x in (k, b, g)], [start], low)
    return j, final


class GatedLinear(NamedTuple):
    """Operands of `linear`, of which kernels multiply w by beta and q by scale."""

    q: Tensor
    k: Tensor
    w: Tensor
    g: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    read: str
    scale: float

    def loop(self) -> Any:
        q, w = scaled(self.q, self.scale), times(self.beta, self.w)
        o, final = Linear(q, self.k, w, self.g, *self[5:8]).loop()
        return o.to(self.w.dtype), final


class GatedDelta(NamedTuple):
    """Operands of `delta`, of which kernels multiply w by beta, e by erase and q by scale; e is k
    where it is None."""

    q: Tensor
    e: Tensor | None
    k: Tensor
    w: Tensor
    g: Tensor | None
    beta: Tensor | None
    erase: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    base: str
    scale: float

    def loop(self) -> Any:
        e = times(self.erase, self.k if self.e is None else self.e)
        q, w = scaled(self.q, self.scale), times(self.beta, self.w)
        o, final = Delta(q, e, self.k, w, self.g, *self[7:10]).loop()
        return o.to(self.w.dtype), final


class Importance(NamedTuple):
    """Operands of `importance`."""

    k: Tensor
    b: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    def loop(self) -> Any:
        return importance(**self._asdict())


def whiten(
    x: Tensor | None,
    k: Tensor,
    b: Tensor,
    g: Tensor | None,
    *,
    prior: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    at: str,
) -> tuple[Tensor, ...]:
    """x / I, the final J, the log decay of a mean whose importance decays to the prior,
    sum x^2 / I, sum x^2 and J, where I is the prior and J after a token ("written"), as its
    decay leaves it ("found") or before it ("previous")."""

    def rule(x: Tensor, k: Tensor, b: Tensor, g: Tensor | None, j: Tensor) -> Any:
        kept = j if g is None else g.exp() * j
        new = kept + b * k.square()
        before = kept + floor
        total = {"written": new + floor, "found": before, "previous": j + floor}[at]
        scaled = x / total
        f = ((j + floor) / before).log()
        sums = (x * scaled).sum(-1), x.square().sum(-1)
        return [scaled, f if g is None else g + f, *sums, new], [new]

    x = k if x is None else x
    given = _Given(b, cu_seqlens, compute_dtype(x, k, b))
    floor = prior.to(given.dtype)
    start = given.state(initial_state, k.shape[3])
    tokens = [given.token(y) for y in (x, k, b, g)]
    (scaled, *others), (final,) = given.walk(rule, tokens, [start], None)
    return scaled.to(x.dtype), final, *others


class Whiten(NamedTuple):
    """Operands of `whiten`."""

    x: Tensor | None
    k: Tensor
    b: Tensor
    g: Tensor | None
    prior: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    at: str
    forgets: bool
    sums: bool
    keeps: bool

    def loop(self) -> Any:
        found = whiten(
            *self[:4], prior=self.prior, initial_state=self.initial_state,
            cu_seqlens=self.cu_seqlens, at=self.at,
        )  # fmt: skip
        kept = (True, True, self.forgets, self.sums, self.sums, self.keeps)
        return tuple(y if k else y.new_empty(0) for y, k in zip(found, kept, strict=True))


class WhitenedLinear(NamedTuple):
    """Operands of `linear` whose queries `whiten` divides, with the importance that a token leaves
    or, read "pre", the one before it."""

    q: Tensor
    k: Tensor
    w: Tensor
    b: Tensor
    g: Tensor | None
    beta: Tensor | None
    prior: Tensor
    memory: Tensor | None
    importance: Tensor | None
    cu_seqlens: Tensor | None
    read: str
    scale: float
    keeps: bool

    def over(self) -> Whiten:
        """What divides the queries."""
        at = "previous" if self.read == "pre" else "written"
        given = (self.q, self.k, self.b, self.g, self.prior, self.importance, self.cu_seqlens)
        return Whiten(*given, at, False, False, self.keeps)

    def linear(self, read: Tensor) -> GatedLinear:
        """What reads by the quotient."""
        given = (self.k, self.w, self.g, self.beta, self.memory, self.cu_seqlens)
        return GatedLinear(read, *given, self.read, self.scale)

    def loop(self) -> Any:
        read, final, *_, j = self.over().loop()
        return *self.linear(read).loop(), final, j


def synapse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    read: str = "post",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """h = Diag(exp g) h + k w^T, J = Diag(exp g) J + k^2 b^T, o = (h / (J + prior))^T q."""

    def rule(q: Tensor, k: Tensor, w: Tensor, b: Tensor, g: Tensor | None, *old: Tensor) -> Any:
        a = _decay(g)
        new = (
            _down(k) * _along(w) + _decayed(a, old[0]),
            _down(k.square()) * _along(b) + _decayed(a, old[1]),
        )
        h, j = new if read == "post" else old
        total = j + floor
        found = [_read(q, h / total).squeeze(-2)]
        if uncertainty:
            found.append(_read(q.square(), total.reciprocal()).squeeze(-2))
        return found, new

    at = _Given(w, cu_seqlens, compute_dtype(q, k, w, b))
    floor = at.prior(prior)
    states = [at.state(x, k.shape[3], w.shape[3]) for x in initial_state or (None, None)]
    tokens = [at.token(x) for x in (q, k, w, b, g)]
    (o, *u), (h, j) = at.walk(rule, tokens, states, low)
    return o.to(w.dtype), (h, j), u[0].to(w.dtype) if uncertainty else None


class Synapse(NamedTuple):
    """Operands of `synapse`, and how it divides where that is a choice."""

    q: Tensor
    k: Tensor
    w: Tensor
    b: Tensor
    g: Tensor | None
    prior: Tensor
    h: Tensor | None
    j: Tensor | None
    cu_seqlens: Tensor | None
    read: str
    uncertainty: bool
    exact: bool

    def loop(self) -> Any:
        return _two_states(synapse, self)


def _strength(k: Tensor, beta: Tensor | float, certainty: Tensor, gain: str) -> Tensor:
    """gamma of the exact gain G = (k / I') gamma; of "exact_rate" beta, to the last bit, at I' = 1.

    exact:       beta / (1 + beta z),  z = sum k^2 / I'
    exact_rate:  beta / ((m - s + beta z) / m),  s = beta sum k^2,  m = max(s, 1)
    """
    squares = k.square()
    found = beta * (squares / certainty).sum(-2, keepdim=True)
    if gain == "exact":
        return beta / (1 + found)
    # In the order of the sum above.
    s = beta * (squares * torch.ones_like(certainty)).sum(-2, keepdim=True)
    most = s.clamp(min=1)
    return beta / ((most - s + found) / most)


def synapse_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    g: Tensor | None = None,
    *,
    e: Tensor | None = None,
    evidence: Tensor | None = None,
    prior: Tensor,
    gain: str = "first_order",
    correction: str = "full",
    initial_state: tuple[Tensor | None, Tensor | None] | None = None,
    base: str = "decayed",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """J' = a J, I' = J' + prior, J = J' + evidence^2 b^T, I = J + prior, mu' = (a I_old / I') mu.

    first_order: mu = mu' + (k / I) (beta (v - X^T e))^T, X = mu' or, base "prev", the old mu
    exact:       mu = mu' + G (v - X^T e)^T, or, correction "diagonal", mu' (1 - k G) + G v^T
    exact_rate:  as exact, where beta is the rate at importance 1
    """

    def rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        b: Tensor | None,
        e: Tensor | None,
        evidence: Tensor | None,
        g: Tensor | None,
        mu: Tensor,
        j: Tensor,
    ) -> Any:
        key, value, rate = _down(k), _along(v), 1.0 if beta is None else _along(beta)
        a = _decay(g)
        predicted, before = _decayed(a, j), mu
        if a is not None:
            before = a * (j + floor) / (predicted + floor) * mu
        new_j = predicted
        if b is not None:
            new_j = predicted + _down(k if evidence is None else evidence).square() * _along(b)
        strength, certainty = rate, new_j + floor
        if gain != "first_order":
            certainty = predicted + floor
            strength = _strength(key, rate, certainty, gain)
        if correction == "diagonal":
            step = key / certainty * strength
            new = before * (1 - key * step) + step * value
        else:
            error = value - _read(k if e is None else e, before if base == "decayed" else mu)
            new = before + key / certainty * (strength * error)
        found = [_read(q, new).squeeze(-2)]
        if uncertainty:
            found.append(_read(q.square(), (new_j + floor).reciprocal()).squeeze(-2))
        return found, (new, new_j)

    at = _Given(v, cu_seqlens, compute_dtype(q, k, v, beta, b))
    floor = at.prior(prior)
    mu, j = initial_state or (None, None)
    states = [at.state(x, k.shape[3], v.shape[3]) for x in (mu, None if b is None else j)]
    tokens = [at.token(x) for x in (q, k, v, beta, b, e, evidence, g)]
    (o, *u), (mu, j) = at.walk(rule, tokens, states, low)
    return o.to(v.dtype), (mu, j), u[0].to(v.dtype) if uncertainty else None


class SynapseDelta(NamedTuple):
    """Operands of `synapse_delta`, h the mean; and how it divides where that is a choice."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    b: Tensor | None
    g: Tensor | None
    e: Tensor | None
    evidence: Tensor | None
    prior: Tensor
    h: Tensor | None
    j: Tensor | None
    cu_seqlens: Tensor | None
    gain: str
    correction: str
    base: str
    uncertainty: bool
    exact: bool

    def loop(self) -> Any:
        return _two_states(synapse_delta, self)


def _two_states(loop: Any, x: Any) -> Any:
    """Output, both states and the uncertainty, empty if not asked for."""
    given = x._asdict()
    del given["exact"]
    o, states, u = loop(initial_state=(given.pop("h"), given.pop("j")), **given)
    return o, *states, o.new_empty(0) if u is None else u


def solve(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """H = a H + beta k k^T, x = (H + Lambda)^-1 q, both in the compute dtype."""

    def rule(q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, matrix: Tensor) -> Any:
        new = _down(k) * _along(beta * k) + _decayed(_decay(g), matrix)
        return [torch.linalg.solve(new + floor, _down(q)).squeeze(-1)], [new]

    keys = k.shape[3]
    at = _Given(beta, cu_seqlens, compute_dtype(q, k, beta))
    floor = torch.diag_embed(at.prior(prior).squeeze(-1).expand(-1, keys))
    start = at.state(initial_state, keys, keys)
    (x,), (final,) = at.walk(rule, [at.token(y) for y in (q, k, beta, g)], [start], low)
    return x, final


class Solve(NamedTuple):
    """Operands of `solve`."""

    q: Tensor
    k: Tensor
    beta: Tensor
    g: Tensor | None
    prior: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    def loop(self) -> Any:
        return solve(**self._asdict())


def riccati(
    a: Tensor,
    c: Tensor,
    d: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """z = a z / (c z + d) + u, elementwise over keys; a, c, d of size 1 or K."""

    def rule(a: Tensor, c: Tensor, d: Tensor, u: Tensor, z: Tensor) -> Any:
        new = a * z / (c * z + d) + u
        return [new], [new]

    at = _Given(u, cu_seqlens, compute_dtype(a, c, d, u))
    start = at.state(initial_state, u.shape[3])
    (z,), (final,) = at.walk(rule, [at.token(x) for x in (a, c, d, u)], [start], low)
    return z, final


class Riccati(NamedTuple):
    """Operands of `riccati`."""

    a: Tensor
    c: Tensor
    d: Tensor
    u: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    def loop(self) -> Any:
        return riccati(**self._asdict())


def covariance(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Kalman filter's covariance P = 1 / prior + C, from C = 0 on, and what it makes of keys.

        P' = D P D + Diag(n),  f = P' k,  P = P' - f f^T b / (1 + b k.f),  u = q^T P q

    with D = Diag(exp g) and n = `noise` or, without, (1 - D^2) / prior. Gives f, u and the last C.
    A loop in every engine: a token's P depends on all keys before it. Its gradients take memory of
    three matrices per token and head (48 MiB for 256 tokens, 4 heads and 64 keys in float32).
    """

    def rule(
        q: Tensor,
        k: Tensor,
        b: Tensor,
        g: Tensor | None,
        noise: Tensor | None,
        matrix: Tensor,
    ) -> Any:
        a = None if g is None else g.exp()
        if a is not None:
            matrix = matrix * (_down(a) * _along(a))
        if noise is not None:
            lost = noise if a is None else noise - (1 - a.square()) * variance
            matrix = matrix + torch.diag_embed(lost.expand(k.shape))
        found = variance * k + (matrix @ _down(k)).squeeze(-1)
        weight = b / (1 + b * (k * found).sum(-1, keepdim=True))
        new = matrix - _down(weight * found) * _along(found)
        spread = variance * q + (new @ _down(q)).squeeze(-1)
        return [found, (q * spread).sum(-1)], [new]

    at = _Given(b, cu_seqlens, compute_dtype(q, k, b))
    keys = k.shape[3]
    variance = at.prior(prior).reciprocal().squeeze(-1)
    tokens = [at.token(x) for x in (q, k, b, g, noise)]
    start = at.state(initial_state, keys, keys)
    (found, spread), (final,) = at.walk(rule, tokens, [start], low)
    return found, spread, final


def posterior(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    e: Tensor | None = None,
    initial_state: tuple[Tensor | None, Tensor | None] | None = None,
    correction: str = "none",
    gain: str = "first_order",
    read: str = "post",
    base: str = "decayed",
    own: bool = False,
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """A memory with one importance over keys, as `glazoo.kernels.posterior_step`, of any length."""

    def rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        b: Tensor,
        e: Tensor | None,
        g: Tensor | None,
        memory: Tensor,
        importance: Tensor,
    ) -> Any:
        key, value, rate = _down(k), _along(v), 1.0 if beta is None else _along(beta)
        a, old = _decay(g), _down(importance)
        predicted = _decayed(a, old)
        new = predicted + _down(b * k.square())
        seen = (new if read == "post" else old) + floor
        if correction == "none":
            after = _decayed(a, memory) + key * (rate * value)
            o = _read(q / seen.squeeze(-1), after if read == "post" else memory)
        else:
            decayed = _decayed(a, old + floor) / (predicted + floor) * memory
            if gain != "first_order":
                certainty = predicted + floor
                step = key / certainty * _strength(key, rate, certainty, gain)
                if correction == "diagonal":
                    after = decayed * (1 - key * step) + step * value
                else:
                    after = decayed + step * (value - _read(k, decayed))
            else:
                missed = _read(k if e is None else e, memory if base == "prev" else decayed)
                error = rate * value - missed if own else rate * (value - missed)
                after = decayed + key / (new + floor) * error
            o = _read(q, after)
        found = [o.squeeze(-2)]
        if uncertainty:
            found.append((q.square() / seen.squeeze(-1)).sum(-1))
        return found, (after, new.squeeze(-1))

    at = _Given(v, cu_seqlens, compute_dtype(q, k, v))
    floor = at.prior(prior)
    memory, importance = initial_state or (None, None)
    states = [at.state(memory, k.shape[3], v.shape[3]), at.state(importance, k.shape[3])]
    tokens = [at.token(x) for x in (q, k, v, beta, b, e, g)]
    (o, *u), (memory, importance) = at.walk(rule, tokens, states, low)
    return o.to(v.dtype), (memory, importance), u[0] if uncertainty else None
