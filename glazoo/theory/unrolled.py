"""Every recurrence without recurrence: all tokens at once, as weighted sums over the past.

A Hebbian memory is a decayed sum of writes. A memory that subtracts predictions is one too, of
writes that solve a triangular system; the full posterior is a least squares problem. These forms
hold every pair of tokens in memory and are here to check engines, never to replace one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glazoo.program import Program
from glazoo.state import State
from glazoo.theory.instances import Operands
from glazoo.theory.maps import expand_value_heads, explicit

__all__ = ["Unrolled", "importance", "unrolled"]


class Unrolled(NamedTuple):
    """What the dense form gives, in float64."""

    output: Tensor
    """[B, T, HV, V]."""
    memory: Tensor
    """[B, HV, K, V], after the last token."""
    importance: Tensor | None
    """J after every token [B, T, HV, V, K] ([B, T, HV, K, K] for full precision)."""


class _Writes(NamedTuple):
    """Operands per write, on axes [B, M, HV, V, K]; a size of one broadcasts."""

    decay: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    b: Tensor
    per_token: int


def unrolled(program: Program, operands: Operands, state: State | None = None) -> Unrolled:
    """Evaluates a program densely in float64.

        Hebbian      h_t = sum_s D_ts k_s w_s^T,  J_t = sum_s D_ts b_s k_s^2,
                     y_t = (h_t / I_t)^T q_t
        delta rule   (1 + L) u = w - e^T D_0 S_0,  L_ts = e_t . (D_ts kappa_s) for s < t,
                     S_t = sum_s D_ts kappa_s u_s
        full         y_t = G_t^T (H_t + Lambda)^-1 q_t

    with D_ts the product of the decays of tokens s + 1 to t.

    Args:
        program: the program of any spec.
        operands: by name.
        state: where it starts; default: nothing written.

    Returns:
        Output, final memory and importance.
    """
    spec = program.spec
    ops = explicit(program, expand_value_heads(program, operands))
    ops = {name: x.double() for name, x in ops.items()}
    if state is not None:
        parts = {name: x.double() for name, x in state._asdict().items() if x is not None}
        state = State(**parts)
    keys = ops["q"].shape[-1]
    q = (spec.scale(keys) * ops["q"])[..., None, :]
    if not q.shape[1]:
        # Nothing happened.
        v = ops["v"]
        empty = v.new_zeros(v.shape[0], v.shape[2], keys, v.shape[3])
        return Unrolled(v[:, :0], empty if state is None else state.memory, None)
    if spec.log_evidence:
        return _slots(ops, q, state)
    if spec.posterior.precision == "full":
        return _least_squares(ops, q, state)
    writes = _writes(program, ops, state)
    J, J_before, J_decayed = _importances(program, ops, writes, state)
    start = None if state is None else state.memory.mT
    n = writes.per_token
    if spec.hebbian:
        memory = _sums(writes.decay, writes.k * (writes.beta * writes.v), start)
        prior = ops.get("prior")
        total = J + _over_keys(prior) if J is not None else torch.ones_like(memory)
        mean = memory / total
        if spec.read.when == "pre":
            before = mean.new_zeros(mean[:, :1].shape)
            if start is not None:
                before = start[:, None]
                if J_before is not None:
                    before = before / (J_before[:, :1] + _over_keys(prior))
            mean = torch.cat([before, mean[:, :-1]], 1)
        y = (mean[:, n - 1 :: n] * q).sum(-1)
        if spec.read.bonus:
            same = ((ops["u"][:, None] * writes.k) * q).sum(-1)
            y = y + same * (writes.beta * writes.v)[..., 0]
        if spec.read.normalizer != "none":
            n0 = None if state is None or state.normalizer is None else state.normalizer
            mass = _sums(
                writes.decay, writes.beta * writes.k, None if n0 is None else n0[:, :, None]
            )
            total_mass = (mass * q).sum(-1)
            if spec.read.normalizer == "sum":
                y = y / (total_mass + spec.read.eps)
            else:
                y = y / total_mass.abs().clamp(min=1)
    else:
        memory = _corrected(program, ops, writes, (J, J_before, J_decayed), start)
        y = (memory[:, n - 1 :: n] * q).sum(-1)
    return Unrolled(y, memory[:, -1].mT, None if J is None else J[:, n - 1 :: n])


def importance(program: Program, operands: Operands, state: State | None = None) -> Tensor:
    """Return J after every token as a sum over the past, [B, T, HV, V, K] (V = 1 where shared)."""
    spec = program.spec
    ops = explicit(program, expand_value_heads(program, operands))
    ops = {name: x.double() for name, x in ops.items()}
    writes = _writes(program, ops, state)
    J, _, _ = _importances(program, ops, writes, state)
    if J is None:
        raise ValueError(f"program: {spec.name!r} keeps no importance over keys")
    return J[:, writes.per_token - 1 :: writes.per_token]


def _over_keys(prior: Tensor | None) -> Tensor:
    """Return a prior as [1, 1, HV, 1, K] or with K = 1."""
    assert prior is not None
    if prior.ndim == 0:
        return prior
    return (prior[:, None] if prior.ndim == 1 else prior)[None, None, :, None, :]


def _rows(x: Tensor) -> Tensor:
    """Puts a gate per head [B, M, HV] or per value [B, M, HV, V] on axes [B, M, HV, V, K]."""
    return x[..., None] if x.ndim == 4 else x[..., None, None]


def _writes(program: Program, ops: Operands, state: State | None) -> _Writes:
    spec, n = program.spec, program.spec.substeps
    v, g = ops["v"][..., None], ops.get("g")
    batch, count, heads = v.shape[:3]
    one = v.new_ones(batch, count, heads, 1, 1)
    if g is None:
        decay = one
    elif g.ndim == 1:
        decay = g.exp()[None, None, :, None, None].expand(batch, count, heads, 1, 1)
    else:
        decay = g.exp()[..., None, :] if g.ndim == 4 else g.exp()[..., None, None]
    k = 1 - decay if spec.key == "one_minus_decay" else ops["k"][..., None, :]
    beta = _rows(ops["beta"]) if "beta" in ops else one
    b = _rows(ops["b"]) if "b" in ops else one
    if n > 1 and g is not None:
        ones = torch.ones_like(decay)
        decay = torch.stack([decay, *[ones] * (n - 1)], 2).flatten(1, 2)
    if spec.steps.source != "lagged":
        return _Writes(decay, k, v, beta, b, n)
    trap = _rows(ops["trap"])
    first_k, first_v = torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])
    if state is not None and state.lag_key is not None and state.lag_value is not None:
        groups = heads // state.lag_key.shape[1]
        first_k = state.lag_key.double().repeat_interleave(groups, 1)[:, None, :, None]
        first_v = state.lag_value.double()[:, None, ..., None]
    lag_k = torch.cat([first_k, k[:, :-1]], 1)[:, :count]
    lag_v = torch.cat([first_v, v[:, :-1]], 1)[:, :count]

    def pair(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x.expand_as(y) if x.shape != y.shape else x, y], 2).flatten(1, 2)

    return _Writes(
        pair(torch.ones_like(decay), decay),
        pair(lag_k, k),
        pair(lag_v, v),
        pair(beta * (1 - trap), beta * trap),
        pair(b * (1 - trap), b * trap),
        2,
    )


def _products(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return D_ts [B, t, s, ...] (zero for s > t), and the start's own decay until t."""
    batch, count = decay.shape[:2]
    D = decay.new_zeros(batch, count, count, *decay.shape[2:])
    for t in range(count):
        if t:
            D[:, t, :t] = D[:, t - 1, :t] * decay[:, t, None]
        D[:, t, t] = 1
    return D, decay.cumprod(1)


def _sums(decay: Tensor, written: Tensor, start: Tensor | None) -> Tensor:
    """Return sum_s D_ts written_s plus the decayed start, after every write."""
    D, since = _products(decay)
    total = (D * written[:, None]).sum(2)
    return total if start is None else total + since * start[:, None]


def _importances(
    program: Program, ops: Operands, w: _Writes, state: State | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return J after, before, and between the decay and the evidence of every write."""
    spec = program.spec
    if spec.importance is None:
        return None, None, None
    decay = w.decay
    if "g_importance" in ops:
        decay = _rows(ops["g_importance"]).exp()
    start = None
    if state is not None and state.importance is not None:
        start = state.importance.double()
        start = start[:, :, None] if start.ndim == 3 else start.mT
    after = _sums(decay, w.b * w.k.square(), start)
    first = torch.zeros_like(after[:, :1]) if start is None else start[:, None]
    before = torch.cat([first.expand_as(after[:, :1]), after[:, :-1]], 1)[:, : after.shape[1]]
    return after, before, decay * before


def _corrected(
    program: Program,
    ops: Operands,
    w: _Writes,
    J: tuple[Tensor | None, Tensor | None, Tensor | None],
    start: Tensor | None,
) -> Tensor:
    """Return the mean after every write of a memory that subtracts predictions, [B, M, HV, V,
    K]."""
    spec = program.spec
    imp, p, erase = spec.importance, spec.posterior, spec.erase
    after, before, decayed = J
    ones = torch.ones_like(w.v * w.k)
    decay, k, beta = w.decay * ones, w.k * ones, w.beta
    rate = I_decayed = ones
    if imp is not None and imp.preconditioner is not None:
        assert after is not None
        level = (after + imp.preconditioner.eps).log() - ops["center"].reshape(-1, 1, 1)
        rate = imp.preconditioner.base ** (-level / (1 + level.abs())) * ones
    elif imp is not None:
        assert after is not None
        assert before is not None
        assert decayed is not None
        I_p = _over_keys(ops["prior"])
        rate, I_decayed = 1 / (after + I_p) * ones, (decayed + I_p) * ones
        decay = decay * (before + I_p) / I_decayed
    zero = torch.zeros_like(ones)
    if p.gain == "exact":
        found = (k.square() / I_decayed).sum(-1, keepdim=True)
        total = 1 + beta * found
        if p.beta == "rate":
            # Where no precision gives the rate, that of an infinite one in the limit.
            length = k.square().sum(-1, keepdim=True)
            s = beta * length
            total = torch.where(s <= 1, total - s, found / length)
        gain = beta * (k / I_decayed) / total
        if p.correction == "diagonal":
            return _sums(decay * (1 - k * gain), gain * w.v, start)
        return _triangular(decay, k, gain, w.v * ones[..., :1], start, prev=False)
    prev = erase.base == "prev"
    target = (beta * w.v) * ones[..., :1]
    gate = program.role("erase")
    own = None if gate is None else ops[gate.name][..., None, :]
    predicts = ops["p"][..., None, :] * ones if "p" in ops else k
    if erase.strength == "write":
        return _triangular(decay, beta * predicts, rate * k, target, start, prev=prev)
    assert own is not None
    if erase.side == "prediction":
        return _triangular(decay, own * predicts, rate * k, target, start, prev=prev)

    # A removal along one key and a write along another: two writes, the second one unpredicted.
    def pair(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x, y], 2).flatten(1, 2)

    both = _triangular(
        pair(decay, ones),
        pair(predicts, zero),
        pair(rate * own * predicts, rate * k),
        pair(torch.zeros_like(target), target),
        start,
        prev=prev,
    )
    return both[:, 1::2]


def _triangular(
    decay: Tensor, e: Tensor, key: Tensor, w: Tensor, start: Tensor | None, *, prev: bool
) -> Tensor:
    """Solves u_t = w_t - X_t e_t for all writes at once and sums D_ts key_s u_s."""
    D, since = _products(decay)
    count = decay.shape[1]
    if prev:
        # The prediction reads the state before this token's decay.
        seen = torch.cat([torch.zeros_like(D[:, :1]), D[:, :-1]], 1)[:, :count]
        seen_start = torch.cat([torch.ones_like(since[:, :1]), since[:, :-1]], 1)[:, :count]
    else:
        seen, seen_start = D, since
    L: Tensor = torch.einsum("bthvk,btshvk,bshvk->bhvts", e, seen, key).tril(-1)
    rhs = w[..., 0].permute(0, 2, 3, 1)
    if start is not None:
        rhs = rhs - torch.einsum("bthvk,bthvk,bhvk->bhvt", e, seen_start, start)
    eye = torch.eye(count, dtype=L.dtype)
    u = torch.linalg.solve_triangular(eye + L, rhs[..., None], upper=False, unitriangular=True)
    u = u[..., 0].permute(0, 3, 1, 2)[..., None]
    total: Tensor = (D * (key * u)[:, None]).sum(2)
    return total if start is None else total + since * start[:, None]


def _slots(ops: Operands, q: Tensor, state: State | None) -> Unrolled:
    """Return weighted means per slot: a softmax over the past of the keys' own logits."""
    k, v = ops["k"][..., None, :], ops["v"][..., None]
    batch, count, heads, _, keys = k.shape
    if state is not None:
        assert state.importance is not None
        k = torch.cat([state.importance[:, None, :, None], k], 1)
        first = state.memory.mT[:, None]
    else:
        k = torch.cat([k.new_full((batch, 1, heads, 1, keys), -torch.inf), k], 1)
        first = v.new_zeros(batch, 1, heads, v.shape[3], keys)
    v = torch.cat([first, v.expand(*v.shape[:-1], keys)], 1)
    causal = torch.arange(count + 1)[:, None] >= torch.arange(count + 1)
    logits = k[:, None].masked_fill(~causal[None, :, :, None, None, None], -torch.inf)
    weight = logits[:, 1:].softmax(2)
    mean = (weight * v[:, None]).sum(2)
    J = logits.logsumexp(2)[:, 1:]
    return Unrolled((mean * q).sum(-1), mean[:, -1].mT, J)


def _least_squares(ops: Operands, q: Tensor, state: State | None) -> Unrolled:
    k, v = ops["k"][..., None], ops["v"][..., None, :]
    beta = ops["beta"][..., None, None]
    decay = ops["g"].exp()[..., None, None] if "g" in ops else torch.ones_like(beta)
    H = _sums(decay, beta * k * k.mT, None if state is None else state.importance)
    G = _sums(decay, beta * k * v, None if state is None else state.memory)
    prior = ops["prior"]
    prior = prior.reshape(-1, 1) if prior.ndim < 2 else prior
    Lambda = torch.diag_embed(prior.expand(v.shape[2], k.shape[3]))
    solved = torch.linalg.solve(H + Lambda, q.mT)
    y = (G * solved).sum(-2)
    return Unrolled(y, G[:, -1], H)
