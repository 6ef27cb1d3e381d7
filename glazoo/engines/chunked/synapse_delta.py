"""The synapse_delta class: delta rules with one importance per synapse, token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Rows,
    Tile,
    begin,
    empty_as,
    floor_of,
    load,
    needed,
    over_sequences,
    rooms_for,
    row_blocks,
    sequences,
    slots,
    start_of,
    store,
)
from glazoo.kernels import loops
from glazoo.kernels.loops import SynapseDelta, compute_dtype
from glazoo.kernels.register import register
from glazoo.program.elementwise import exact_strength

# Tokens between two states that are kept for the backward pass.
CHUNK = 64
# Synapses that one step of the recurrence updates, per thread.
BLOCK = 65536

FIRST_ORDER, EXACT, DIAGONAL, RATE = 0, 1, 2, 3
# Operands per token, in the order of their gradients below.
OPERANDS = ("q", "k", "v", "beta", "b", "e", "evidence", "g")


def _tiles(tokens: int) -> list[Tile]:
    found = []
    for chunk, start in enumerate(range(0, tokens, CHUNK)):
        stop = min(start + CHUNK, tokens)
        found.append(Tile(start, stop, 1, stop - start, chunk))
    return found


def _rows(batch: int, heads: int, groups: int, synapses: int) -> Iterator[Rows]:
    limit = max(1, BLOCK * torch.get_num_threads() // synapses)
    return row_blocks(batch, heads, groups, limit)


class _Tokens(NamedTuple):
    """Operands of a tile, tokens first: [C, R, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    b: Tensor
    e: Tensor | None
    s: Tensor | None
    decay: Tensor | None
    rest: Tensor | None
    ones: Tensor | None
    """[R, K, V], for a rate."""


def _load(x: SynapseDelta, rows: Rows, tile: Tile, dtype: torch.dtype) -> _Tokens:
    def get(y: Tensor | None) -> Any:
        return None if y is None else load(y, rows, tile, dtype).transpose(0, 1).contiguous()

    gate = get(x.g)
    ones = None
    if x.gain == "exact_rate":
        shape = (rows.number, x.k.shape[3], x.v.shape[3])
        ones = torch.ones(shape, dtype=dtype, device=x.k.device)
    return _Tokens(
        get(x.q),
        get(x.k),
        get(x.v),
        get(x.beta),
        get(x.b),
        get(x.e),
        get(x.evidence),
        None if gate is None else gate.exp(),
        None if gate is None else gate.expm1().neg_(),
        ones,
    )


def _down(x: Tensor) -> Tensor:
    """A vector over keys as a column [R, K, 1]."""
    return x.unsqueeze(-1)


def _along(x: Tensor) -> Tensor:
    """A vector over values as a row [R, 1, V]."""
    return x.unsqueeze(-2)


def _over_keys(x: Tensor, state: Tensor) -> Tensor:
    """sum_k x_k state_kv, [R, V]."""
    return torch.bmm(x.unsqueeze(1), state).squeeze(1)


def _over_values(x: Tensor, state: Tensor) -> Tensor:
    """sum_v x_v state_kv, [R, K]."""
    return torch.bmm(x.unsqueeze(1), state.transpose(1, 2)).squeeze(1)


class _Step(NamedTuple):
    """Intermediate values of one token that its backward pass reads."""

    predicted: Tensor
    certainty: Tensor
    before: Tensor


def _predict(t: _Tokens, i: int, mu: Tensor, j: Tensor, floor: Tensor) -> _Step:
    """J' = a J, I' = J' + I_p, mu' = a (J + I_p) / I' mu."""
    if t.decay is None:
        return _Step(j, j + floor, mu)
    decay = _down(t.decay[i])
    predicted = j * decay
    certainty = predicted + floor
    before = (j + floor).mul_(decay).div_(certainty).mul_(mu)
    return _Step(predicted, certainty, before)


def _advance(
    t: _Tokens, i: int, mu: Tensor, j: Tensor, floor: Tensor, rule: int, previous: bool
) -> tuple[Tensor, Tensor]:
    """One token; returns new (mu, J)."""
    step = _predict(t, i, mu, j, floor)
    k, v, beta = t.k[i], t.v[i], t.beta[i]
    seen = k if t.s is None else t.s[i]
    new_j = torch.addcmul(step.predicted, _down(seen.square()), _along(t.b[i]))
    if rule == DIAGONAL:
        strength, inverse, _, _ = _strength(t, i, step.certainty)
        gain = inverse.mul_(_down(k)).mul_(_along(strength))
        kept = torch.mul(gain, _down(k)).neg_().add_(1).mul_(step.before)
        return kept.addcmul_(gain, _along(v)), new_j
    eraser = k if t.e is None else t.e[i]
    error = v - _over_keys(eraser, mu if previous else step.before)
    if rule == FIRST_ORDER:
        strength, inverse = beta, (new_j + floor).reciprocal_()
    else:
        strength, inverse, _, _ = _strength(t, i, step.certainty)
    gain = inverse.mul_(_down(k))
    return torch.addcmul(step.before, gain, _along(error * strength)), new_j


def _strength(
    t: _Tokens, i: int, certainty: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Strength [R, V] of the exact gain, 1 / I' [R, K, V], and the sums [R, V] of k^2 / I' and, for
    a rate, of k^2."""
    inverse, squares = certainty.reciprocal(), t.k[i].square()
    found = _over_keys(squares, inverse)
    # In the order of the sum above, so that both are equal, to the last bit, at importance 1.
    square = None if t.ones is None else _over_keys(squares, t.ones)
    return exact_strength(t.beta[i], found, square), inverse, found, square


def _rule(x: SynapseDelta) -> int:
    full = {"first_order": FIRST_ORDER, "exact": EXACT, "exact_rate": RATE}
    return DIAGONAL if x.correction == "diagonal" else full[x.gain]


def _forward(
    x: SynapseDelta, _tokens: Any, _states: Any, results: Any, finals: Any, kept: Any
) -> None:
    out, doubt = results
    rule, previous = _rule(x), x.base == "prev"
    batch, count, heads, size = x.v.shape
    dtype = finals[0].dtype
    keys = x.k.shape[3]
    for rows in _rows(batch, heads, _groups(x), keys * size):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, keys, size)
        mu, j = (start_of(y, corner, shape, finals[0]) for y in (x.h, x.j))
        floor = floor_of(x.prior, rows, dtype)
        for tile in _tiles(count):
            if kept:
                for target, value in zip(kept, (mu, j), strict=True):
                    part = target[tile.chunk, *corner]
                    part.copy_(value.view(part.shape))
            t = _load(x, rows, tile, dtype)
            result = t.v.new_empty(tile.size, rows.number, size)
            spread = None if doubt is None else torch.empty_like(result)
            for i in range(tile.size):
                mu, j = _advance(t, i, mu, j, floor, rule, previous)
                result[i] = _over_keys(t.q[i], mu)
                if spread is not None:
                    spread[i] = _over_keys(t.q[i].square(), (j + floor).reciprocal_())
            store(out, result.transpose(0, 1).contiguous(), rows, tile)
            if doubt is not None and spread is not None:
                store(doubt, spread.transpose(0, 1).contiguous(), rows, tile)
        for state, value in zip(finals, (mu, j), strict=True):
            state[corner].copy_(value.view(state[corner].shape))


def _groups(x: SynapseDelta) -> int:
    return min(y.shape[2] for y in (x.q, x.k, x.e, x.evidence) if y is not None)


class _Grads(NamedTuple):
    """Gradients of a tile's operands, tokens first."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    b: Tensor
    e: Tensor | None
    s: Tensor | None
    g: Tensor | None
    prior: Tensor | None


def _retreat(
    t: _Tokens,
    i: int,
    mu: Tensor,
    j: Tensor,
    new_mu: Tensor,
    new_j: Tensor,
    floor: Tensor,
    rule: int,
    previous: bool,
    dy: Tensor,
    du: Tensor | None,
    dmu: Tensor,
    dj: Tensor,
    grads: _Grads,
) -> tuple[Tensor, Tensor]:
    """One token backward: gradients of (mu, J) before it, given those after it."""
    step = _predict(t, i, mu, j, floor)
    q, k, v, beta = t.q[i], t.k[i], t.v[i], t.beta[i]
    squares = k.square()
    dmu.addcmul_(_down(q), _along(dy))
    grads.q[i] = _over_values(dy, new_mu)
    # gradient of I = J + I_p where it is read
    dtotal = None
    inverse = None
    if du is not None or rule == FIRST_ORDER:
        inverse = (new_j + floor).reciprocal_()
    if du is not None and inverse is not None:
        grads.q[i].addcmul_(q, _over_values(du, inverse), value=2)
        dtotal = inverse.square().mul_(_down(q.square())).mul_(_along(du)).neg_()
    dcertainty = None
    dprevious = None
    dbeta_row = None
    eraser = k if t.e is None else t.e[i]
    if rule == FIRST_ORDER:
        assert inverse is not None
        missed = v - _over_keys(eraser, mu if previous else step.before)
        error = missed * beta
        scaled = dmu * inverse
        derror = _over_keys(k, scaled)
        dk = _over_values(error, scaled)
        through = scaled.mul_(inverse).mul_(_down(k)).mul_(_along(error))
        dtotal = through.neg_() if dtotal is None else dtotal.sub_(through)
        dbeta_row = derror * missed
        derror = derror * beta
        grads.v[i] = derror
    else:
        strength, inverse, found, square = _strength(t, i, step.certainty)
        scaled = dmu * inverse
        if rule != DIAGONAL:
            error = v - _over_keys(eraser, mu if previous else step.before)
            along = _over_keys(k, scaled)
            dstrength = along * error
            derror = along * strength
            grads.v[i] = derror
            weighted = strength * error
            dk = _over_values(weighted, scaled)
            dcertainty = scaled.mul_(inverse).mul_(_down(k)).mul_(_along(weighted)).neg_()
        else:
            # every synapse corrects its own part of the prediction
            miss = torch.addcmul(_along(v).expand_as(mu), _down(k), step.before, value=-1)
            gain = torch.mul(inverse, _down(k)).mul_(_along(strength))
            kept = torch.mul(gain, dmu)
            grads.v[i] = kept.sum(1)
            dk = kept.mul_(step.before).sum(2).neg_()
            dprevious = torch.mul(gain, _down(k)).neg_().add_(1).mul_(dmu)
            scaled.mul_(miss)
            dstrength = _over_keys(k, scaled)
            dk.add_(_over_values(strength, scaled))
            dcertainty = scaled.mul_(inverse).mul_(_down(k)).mul_(_along(strength)).neg_()
            derror = None
        dbeta_row, dsum, dsquare = _strength_backward(beta, strength, found, square, dstrength)
        dk.addcmul_(k, _over_values(dsum, inverse), value=2)
        if dsquare is not None:
            dk.addcmul_(k, dsquare.sum(-1, keepdim=True), value=2)
        dcertainty.addcmul_(inverse.square_().mul_(_down(squares)), _along(dsum), value=-1)
    if grads.beta.shape[2] == 1:
        dbeta_row = dbeta_row.sum(-1, keepdim=True)
    grads.beta[i] = dbeta_row
    dbefore = dmu if dprevious is None else dprevious
    dmu_direct = None
    if derror is not None:
        source = mu if previous else step.before
        derase = _over_values(derror, source).neg_()
        if grads.e is None:
            dk.add_(derase)
        else:
            grads.e[i] = derase
        if previous:
            dmu_direct = (_down(eraser) * _along(derror)).neg_()
        else:
            dbefore = torch.addcmul(dbefore, _down(eraser), _along(derror), value=-1)
    # observe: J = J' + s^2 b, with s = k unless it is given
    dnew = dj if dtotal is None else dj.add_(dtotal)
    seen = _over_values(t.b[i], dnew)
    if t.s is None or grads.s is None:
        grads.b[i] = _over_keys(squares, dnew)
        dk.addcmul_(k, seen, value=2)
    else:
        grads.b[i] = _over_keys(t.s[i].square(), dnew)
        grads.s[i] = seen.mul_(t.s[i]).mul_(2)
    grads.k[i] = dk
    # predict
    dpredicted = dnew if dcertainty is None else dnew + dcertainty
    if grads.prior is not None:
        if dtotal is not None:
            grads.prior.add_(dtotal)
        if dcertainty is not None:
            grads.prior.add_(dcertainty)
    if t.decay is None or t.rest is None:
        old_mu = dbefore if dmu_direct is None else dbefore + dmu_direct
        return old_mu.clone() if old_mu is dmu else old_mu, dpredicted.clone()
    decay, rest = _down(t.decay[i]), _down(t.rest[i])
    reach = dbefore * step.before
    if grads.g is not None:
        own = (reach * floor).div_(step.certainty).addcmul_(step.predicted, dpredicted)
        total = own.sum(-1)
        grads.g[i] = total.sum(-1, keepdim=True) if grads.g.shape[2] == 1 else total
    # mu' = a (J + I_p) / (a J + I_p) mu
    inner = (dbefore * mu).mul_(decay * rest).div_(step.certainty).div_(step.certainty)
    old_j = torch.mul(dpredicted, decay).addcmul_(inner, floor)
    if grads.prior is not None:
        grads.prior.addcmul_(inner, j, value=-1)
    old_mu = (j + floor).mul_(decay).div_(step.certainty).mul_(dbefore)
    if dmu_direct is not None:
        old_mu.add_(dmu_direct)
    return old_mu, old_j


def _strength_backward(
    beta: Tensor, strength: Tensor, found: Tensor, square: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the strength by beta and by the sums of k^2 / I' and k^2."""
    if square is None:
        # strength = beta / (1 + beta found)
        return grad / (1 + beta * found).square(), -grad * strength.square(), None
    # strength = beta / D, with D = 1 - s + beta found, or found / square from s = 1 on
    s = beta * square
    most = s.clamp(min=1)
    total = (most - s + beta * found) / most
    by_total = -grad * strength / total
    below = s < 1
    dbeta = grad / torch.where(below, total.square(), total)
    return dbeta, by_total * beta / most, by_total * torch.where(below, -beta, -found / square**2)


def _backward(
    x: SynapseDelta,
    tokens: Any,
    states: Any,
    results: Any,
    finals: Any,
    kept: Any,
    dprior: Tensor | None,
) -> None:
    grad, grad_doubt = tokens
    rule, previous = _rule(x), x.base == "prev"
    batch, count, heads, size = x.v.shape
    dtype = kept[0].dtype
    keys = x.k.shape[3]
    for rows in _rows(batch, heads, _groups(x), keys * size):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, keys, size)
        dmu, dj = (start_of(y, corner, shape, kept[0]).clone() for y in states)
        floor = floor_of(x.prior, rows, dtype)
        total = None if dprior is None else torch.zeros_like(dmu)
        for tile in reversed(_tiles(count)):
            t = _load(x, rows, tile, dtype)
            dy = load(grad, rows, tile, dtype).transpose(0, 1).contiguous()
            du = None
            if grad_doubt is not None:
                du = load(grad_doubt, rows, tile, dtype).transpose(0, 1).contiguous()
            first, second = (y[tile.chunk, *corner].reshape(shape) for y in kept)
            walked = [(first, second)]
            for i in range(tile.size):
                mu, j = walked[-1]
                walked.append(_advance(t, i, mu, j, floor, rule, previous))
            grads = _Grads(
                torch.empty_like(t.q),
                torch.empty_like(t.k),
                torch.empty_like(t.v),
                torch.empty_like(t.beta),
                torch.empty_like(t.b),
                None if t.e is None else torch.zeros_like(t.e),
                None if t.s is None else torch.empty_like(t.s),
                None if results[-1] is None else torch.empty_like(needed(t.decay)),
                total,
            )
            for i in reversed(range(tile.size)):
                new_mu, new_j = walked.pop()
                mu, j = walked[-1]
                dmu, dj = _retreat(
                    t,
                    i,
                    mu,
                    j,
                    new_mu,
                    new_j,
                    floor,
                    rule,
                    previous,
                    dy[i],
                    None if du is None else du[i],
                    dmu,
                    dj,
                    grads,
                )
            for target, value in zip(results, grads[:8], strict=True):
                if target is not None:
                    store(target, needed(value).transpose(0, 1).contiguous(), rows, tile)
        if dprior is not None and total is not None:
            part = total.sum(-1).view(rows.batch, rows.width, -1).sum(0)
            if dprior.shape[1] == 1:
                part = part.sum(-1, keepdim=True)
            dprior[rows.h0 : rows.h1].add_(part)
        for target, value in zip(finals, (dmu, dj), strict=True):
            target[corner].copy_(value.view(target[corner].shape))


def _allocate(x: SynapseDelta, keep: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, size = x.v.shape
    like = x.v.new_empty((), dtype=compute_dtype(x.q, x.k, x.v, x.beta, x.b))
    shape = (heads, x.k.shape[3], size)
    total = slots(x.cu_seqlens, batch, tokens, CHUNK) if keep else 0
    counts = (*[sequences(x.cu_seqlens, batch)] * 2, *[total] * 2)
    mu, j, *kept = (like.new_empty(count, *shape) for count in counts)
    return empty_as(x.v), mu, j, empty_as(x.v, x.uncertainty), *kept


def _run(x: SynapseDelta, keep: bool) -> tuple[Tensor, ...]:
    out, mu, j, doubt, *kept = found = _allocate(x, keep)
    begin(mu, x.h)
    begin(j, x.j)
    over_sequences(
        _forward,
        x,
        CHUNK,
        results=[out, doubt if x.uncertainty else None],
        final=[mu, j],
        kept=kept if keep else [],
    )
    return found


def _gradients(
    x: SynapseDelta, grads: Any, wanted: Any, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    grad, grad_mu, grad_j, grad_doubt = grads
    found = dict(zip(OPERANDS, rooms_for(x, wanted, *OPERANDS), strict=True))
    # summed over all tokens in the compute dtype
    found["prior"] = kept[0].new_zeros(x.prior.shape) if wanted.prior else None
    shape = (sequences(x.cu_seqlens, x.v.shape[0]), *kept[0].shape[1:])
    dinitial = [kept[0].new_empty(shape) for _ in range(2)]
    begin(dinitial[0], grad_mu)
    begin(dinitial[1], grad_j)
    over_sequences(
        functools.partial(_backward, dprior=found["prior"]),
        x,
        CHUNK,
        tokens=[torch.zeros_like(x.v) if grad is None else grad, grad_doubt],
        states=[grad_mu, grad_j],
        results=[found[name] for name in OPERANDS],
        final=dinitial,
        kept=kept,
    )
    return *(found[name] for name in x._fields[:9]), *dinitial, None


_synapse_delta = register(
    "chunked_synapse_delta",
    SynapseDelta,
    results=("out", "final_mu", "final_j", "doubt"),
    kept=("kept_mu", "kept_j"),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def synapse_delta(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T HV V"],
    beta: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV V"],
    b: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV 1"] | Float[Tensor, "B T HV V"] | None,
    g: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    *,
    e: Float[Tensor, "B T He K"] | None = None,
    evidence: Float[Tensor, "B T Hs K"] | None = None,
    prior: Float[Tensor, " HV"] | Float[Tensor, "HV K"],
    gain: str = "first_order",
    correction: str = "full",
    initial_state: tuple[Tensor, Tensor | None] | None = None,
    base: str = "decayed",
    uncertainty: bool = False,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    operator: Callable[..., Any] = _synapse_delta,
) -> tuple[
    Float[Tensor, "B T HV V"],
    tuple[Float[Tensor, "N HV K V"], Float[Tensor, "N HV K V"]],
    Float[Tensor, "B T HV V"] | None,
]:
    """Delta rule whose gain and forgetting are those of a posterior with one precision per synapse.

        J' = a J_{t-1}     I' = J' + I_p     J_t = J' + k^2 b^T     I_t = J_t + I_p
        mu' = (a (J_{t-1} + I_p) / I') . mu_{t-1}                  X = mu' or, base "prev", mu_{t-1}

        first_order, full      mu_t = mu' + (k / I_t) . (beta (v - X^T e))^T
        exact, full            mu_t = mu' + G . (v - X^T e)^T
        exact, diagonal        mu_t = mu' . (1 - k G) + G . v^T
        with the exact gain    G = (k / I') . beta / (1 + beta sum_j k_j^2 / I'_j)
        exact_rate             G = (k / I') . beta / ((m - s + beta sum_j k_j^2 / I'_j) / m)
                               with s = beta k.k,  m = max(s, 1)

    The gain of one token depends on the importance of every synapse before it, so there is no
    matmul form: tokens are walked one by one, all rows at once, in arrays that fit in the cache.

    Memory: training keeps 2 K V / 64 numbers per token and head besides the operands (the states
    every 64 tokens); the backward pass recomputes the states of 64 tokens of a block of rows.

    Gradients: with M the gradient of mu_t and N that of J_t (from later tokens), r = 1 / I_t,

        M += q dy^T        dq = mu_t dy
        first_order        de_v = sum_k (M r k) beta      dI = -M r^2 k (beta err)
        exact, full        ds = sum_k (M k / I') err      dI' = -M k s err / I'^2,  s the strength
        exact, diagonal    dG = M (v - k mu')             dmu' = M (1 - k G)
        forgetting         c = dmu' mu a (1 - a) / I'^2   dJ_{t-1} = a (N + dI + dI') + c I_p
                           dI_p += dI + dI' - c J_{t-1}
                           dg = sum dmu' mu' I_p / I' + J' (N + dI + dI')

    and the strength s = beta / D, D = 1 + beta z - [rate] beta k.k, z = sum k^2 / I', gives
    dbeta = ds / D^2, dz = -ds s^2 to k and I', and [rate] -dz to k.k.

    Args:
        q: queries, already scaled. Any floating dtype.
        k: keys.
        v: values, without the write gate; its dtype is the output's.
        beta: write gate.
        b: importance gate, >= 0; None freezes the importance at the prior (J stays 0).
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        e: erase keys of correction "full"; None is k.
        evidence: keys s that importance counts, J_t = J' + s^2 b^T; None is k.
        prior: importance I_p > 0 of a synapse that was never written.
        gain: "first_order", "exact" (beta is the observation's precision) or "exact_rate" (beta k
            is the step at importance 1).
        correction: "full" or, with the exact gain, "diagonal".
        initial_state: (mu_0, J_0); None is zeros.
        base: the state that is corrected, "decayed" or "prev".
        uncertainty: also return sum_k q_k^2 / I_t,k.
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.
        operator: what computes it, given the record of the operation; default: this engine's.

    Returns:
        o in the dtype of v, the final (mu, J) in float32 (float64 for float64 operands), and the
        uncertainty in the dtype of v or None.

    Raises:
        ValueError: for shapes that do not fit together, an unknown option, or correction
            "diagonal" with another gain than "exact".

    Reference:
        Bonnet et al., "Learning to Remember, Learn, and Forget in Attention-Based Models",
        ICML 2026, arXiv:2602.09075; the diagonal correction is Liu et al., "Longhorn: State Space
        Models are Amortized Online Learners", ICLR 2025, arXiv:2407.14207, equation 8.
    """
    checks.choice("gain", gain, ("first_order", "exact", "exact_rate"))
    checks.choice("correction", correction, ("full", "diagonal"))
    checks.choice("base", base, ("decayed", "prev"))
    if correction == "diagonal" and gain != "exact":
        raise ValueError(f"correction 'diagonal' comes with gain {gain!r}; accepted: 'exact'")
    checks.tokens(q=q, k=k, v=v, e=e, evidence=evidence)
    heads, keys = v.shape[2], k.shape[3]
    checks.heads(heads, q=q, k=k, e=e, evidence=evidence)
    lead = tuple(v.shape[:3])
    checks.shape("beta", beta, lead, (*lead, 1), tuple(v.shape))
    checks.shape("b", b, lead, (*lead, 1), tuple(v.shape))
    checks.gate("g", g, k, v)
    checks.packing(cu_seqlens, v)
    checks.shape("prior", prior, (heads,), (heads, keys))
    for i, x in enumerate(initial_state or ()):
        checks.state(f"initial_state[{i}]", x, cu_seqlens, v, keys, v.shape[3])
    mu, j = initial_state or (None, None)
    if b is None:
        j = None
    if v.shape[1] == 1 and cu_seqlens is None and operator is _synapse_delta:
        return loops.synapse_delta(
            q,
            k,
            v,
            beta,
            b,
            g,
            e=e,
            evidence=evidence,
            prior=prior,
            gain=gain,
            correction=correction,
            initial_state=(mu, j),
            base=base,
            uncertainty=uncertainty,
        )
    if beta.dim() == 3:
        beta = beta.unsqueeze(-1)
    b = v.new_zeros(()) if b is None else b.unsqueeze(-1) if b.dim() == 3 else b
    b = b.expand(v.shape)
    if prior.dim() == 1:
        prior = prior.unsqueeze(-1)
    out, mu, j, doubt = operator(
        q,
        k,
        v,
        beta,
        b,
        g,
        e,
        evidence,
        prior,
        mu,
        j,
        cu_seqlens,
        gain,
        correction,
        base,
        uncertainty,
        True,
    )
    return out, (mu, j), doubt if uncertainty else None
