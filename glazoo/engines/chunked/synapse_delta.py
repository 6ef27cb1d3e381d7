"""The synapse_delta class: delta rules with one importance per synapse, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Rows,
    Tile,
    compute_dtype,
    empty_as,
    load,
    needs_grad,
    over_sequences,
    row_blocks,
    sequences,
    slots,
    starting,
    store,
    without_autocast,
)
from glazoo.program.elementwise import exact_strength

# Tokens between two states that are kept for the backward pass.
CHUNK = 64
# Synapses that one step of the recurrence updates, per thread.
BLOCK = 65536

FIRST_ORDER, EXACT, DIAGONAL, RATE = 0, 1, 2, 3


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


def _load(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    rows: Rows,
    tile: Tile,
    dtype: torch.dtype,
    rule: int,
) -> _Tokens:
    def get(x: Tensor) -> Tensor:
        return load(x, rows, tile, dtype).transpose(0, 1).contiguous()

    gate = None if g is None else get(g)
    key, value = get(k), get(v)
    shape = (*key.shape[1:], value.shape[2])
    return _Tokens(
        get(q),
        key,
        value,
        get(beta),
        get(b),
        None if e is None else get(e),
        None if s is None else get(s),
        None if gate is None else gate.exp(),
        None if gate is None else gate.expm1().neg_(),
        key.new_ones(shape) if rule == RATE else None,
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


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    initial: tuple[Tensor | None, Tensor | None],
    rule: int,
    previous: bool,
    out: Tensor,
    doubt: Tensor | None,
    final: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor] | None,
) -> None:
    batch, tokens, heads, size = v.shape
    dtype = final[0].dtype
    keys = k.shape[3]
    for rows in _rows(batch, heads, _groups(q, k, e, s), keys * size):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, keys, size)
        mu, j = (_start(x, corner, shape, final[0]) for x in initial)
        floor = _floor(prior, rows, dtype)
        for tile in _tiles(tokens):
            if kept is not None:
                for target, value in zip(kept, (mu, j), strict=True):
                    part = target[tile.chunk, *corner]
                    part.copy_(value.view(part.shape))
            t = _load(q, k, v, beta, b, e, s, g, rows, tile, dtype, rule)
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
        for state, value in zip(final, (mu, j), strict=True):
            state[corner].copy_(value.view(state[corner].shape))


def _groups(q: Tensor, k: Tensor, e: Tensor | None, s: Tensor | None) -> int:
    return min(x.shape[2] for x in (q, k, e, s) if x is not None)


def _start(
    x: Tensor | None, corner: tuple[slice, slice], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    if x is None:
        return like.new_zeros(shape)
    return x[corner].to(like.dtype).reshape(shape)


def _floor(prior: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The prior [HV, 1 or K] of a block of rows, [R, 1 or K, 1]."""
    return prior[rows.h0 : rows.h1].to(dtype).repeat(rows.batch, 1).unsqueeze(-1)


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
    grad: Tensor,
    grad_doubt: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    grad_final: tuple[Tensor | None, Tensor | None],
    rule: int,
    previous: bool,
    kept: tuple[Tensor, Tensor],
    results: list[Tensor],
    de: Tensor | None,
    ds: Tensor | None,
    dg: Tensor | None,
    dprior: Tensor | None,
    dinitial: tuple[Tensor, Tensor],
) -> None:
    batch, tokens, heads, size = v.shape
    dtype = kept[0].dtype
    keys = k.shape[3]
    for rows in _rows(batch, heads, _groups(q, k, e, s), keys * size):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, keys, size)
        dmu, dj = (_start(x, corner, shape, kept[0]).clone() for x in grad_final)
        floor = _floor(prior, rows, dtype)
        total = None if dprior is None else torch.zeros_like(dmu)
        for tile in reversed(_tiles(tokens)):
            t = _load(q, k, v, beta, b, e, s, g, rows, tile, dtype, rule)
            dy = load(grad, rows, tile, dtype).transpose(0, 1).contiguous()
            du = None
            if grad_doubt is not None:
                du = load(grad_doubt, rows, tile, dtype).transpose(0, 1).contiguous()
            first, second = (x[tile.chunk, *corner].reshape(shape) for x in kept)
            states = [(first, second)]
            for i in range(tile.size):
                mu, j = states[-1]
                states.append(_advance(t, i, mu, j, floor, rule, previous))
            grads = _Grads(
                torch.empty_like(t.q),
                torch.empty_like(t.k),
                torch.empty_like(t.v),
                torch.empty_like(t.beta),
                torch.empty_like(t.b),
                None if de is None or t.e is None else torch.zeros_like(t.e),
                None if ds is None or t.s is None else torch.empty_like(t.s),
                None if dg is None or t.decay is None else torch.empty_like(t.decay),
                total,
            )
            for i in reversed(range(tile.size)):
                new_mu, new_j = states.pop()
                mu, j = states[-1]
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
            for target, value in zip([*results, de, ds, dg], grads[:8], strict=True):
                if target is not None and value is not None:
                    store(target, value.transpose(0, 1).contiguous(), rows, tile)
        if dprior is not None and total is not None:
            part = total.sum(-1).view(rows.batch, rows.width, -1).sum(0)
            if dprior.shape[1] == 1:
                part = part.sum(-1, keepdim=True)
            dprior[rows.h0 : rows.h1].add_(part)
        for target, value in zip(dinitial, (dmu, dj), strict=True):
            target[corner].copy_(value.view(target[corner].shape))


@torch.library.custom_op("glazoo::chunked_synapse_delta", mutates_args=())
@without_autocast
def _synapse_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    initial_mu: Tensor | None,
    initial_j: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: int,
    previous: bool,
    uncertainty: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = v.shape
    out, doubt = empty_as(v), empty_as(v, uncertainty)
    like = torch.empty((), dtype=compute_dtype(q, k, v, beta, b), device=v.device)
    shape = (sequences(cu_seqlens, batch), heads, k.shape[3], size)
    final = [starting(x, shape, like) for x in (initial_mu, initial_j)]
    total = slots(cu_seqlens, batch, tokens, CHUNK) if keep else 0
    kept = [like.new_empty(total, *shape[1:]) for _ in range(2)]

    def core(operands: Any, states: Any, results: Any, finals: Any, parts: Any) -> None:
        extra = results[1] if uncertainty else None
        arguments: list[Any] = [
            *operands,
            prior,
            states,
            rule,
            previous,
            results[0],
            extra,
            finals,
            parts or None,
        ]
        _forward(*arguments)

    over_sequences(
        core,
        cu_seqlens,
        CHUNK,
        [q, k, v, beta, b, e, s, g],
        [initial_mu, initial_j],
        [out] + [doubt] * uncertainty,
        final,
        kept if keep else [],
    )
    return out, final[0], final[1], doubt, kept[0], kept[1]


@_synapse_delta.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    initial_mu: Tensor | None,
    initial_j: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: int,
    previous: bool,
    uncertainty: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = v.shape
    dtype = compute_dtype(q, k, v, beta, b)
    shape = (heads, k.shape[3], size)
    total = slots(cu_seqlens, batch, tokens, CHUNK) if keep else 0
    count = sequences(cu_seqlens, batch)
    return (
        empty_as(v),
        v.new_empty(count, *shape, dtype=dtype),
        v.new_empty(count, *shape, dtype=dtype),
        empty_as(v, uncertainty),
        v.new_empty(total, *shape, dtype=dtype),
        v.new_empty(total, *shape, dtype=dtype),
    )


@torch.library.custom_op("glazoo::chunked_synapse_delta_backward", mutates_args=())
@without_autocast
def _synapse_delta_backward(
    grad: Tensor,
    grad_doubt: Tensor | None,
    grad_mu: Tensor | None,
    grad_j: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    cu_seqlens: Tensor | None,
    kept_mu: Tensor,
    kept_j: Tensor,
    rule: int,
    previous: bool,
    with_gate: bool,
    with_prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, size = v.shape
    found = [empty_as(x) for x in (q, k, v, beta, b)]
    de = empty_as(k if e is None else e, e is not None)
    ds = empty_as(k if s is None else s, s is not None)
    dg = empty_as(v if g is None else g, with_gate)
    dprior = kept_mu.new_zeros(prior.shape if with_prior else (0,))
    shape = (sequences(cu_seqlens, batch), heads, k.shape[3], size)
    dinitial = [starting(x, shape, kept_mu) for x in (grad_mu, grad_j)]

    def core(operands: Any, states: Any, results: Any, finals: Any, parts: Any) -> None:
        arguments: list[Any] = [
            *operands,
            prior,
            states,
            rule,
            previous,
            parts,
            results[:5],
            results[5] if e is not None else None,
            results[5 + (e is not None)] if s is not None else None,
            results[-1] if with_gate else None,
            dprior if with_prior else None,
            finals,
        ]
        _backward(*arguments)

    over_sequences(
        core,
        cu_seqlens,
        CHUNK,
        [grad, grad_doubt, q, k, v, beta, b, e, s, g],
        [grad_mu, grad_j],
        found + [de] * (e is not None) + [ds] * (s is not None) + [dg] * with_gate,
        dinitial,
        [kept_mu, kept_j],
    )
    return (*found, de, ds, dg, dprior, *dinitial)  # type: ignore[return-value]


@_synapse_delta_backward.register_fake
def _(
    grad: Tensor,
    grad_doubt: Tensor | None,
    grad_mu: Tensor | None,
    grad_j: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    cu_seqlens: Tensor | None,
    kept_mu: Tensor,
    kept_j: Tensor,
    rule: int,
    previous: bool,
    with_gate: bool,
    with_prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (sequences(cu_seqlens, v.shape[0]), v.shape[2], k.shape[3], v.shape[3])
    return (
        empty_as(q),
        empty_as(k),
        empty_as(v),
        empty_as(beta),
        empty_as(b),
        empty_as(k if e is None else e, e is not None),
        empty_as(k if s is None else s, s is not None),
        empty_as(v if g is None else g, with_gate),
        kept_mu.new_empty(prior.shape if with_prior else (0,)),
        kept_mu.new_empty(shape),
        kept_mu.new_empty(shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, b, e, s, g, prior, mu, j, cu_seqlens, rule, previous, _, _ = inputs
    ctx.save_for_backward(q, k, v, beta, b, e, s, g, prior, cu_seqlens, output[4], output[5])
    ctx.rule, ctx.previous = rule, previous
    ctx.initial = tuple(None if x is None else x.dtype for x in (mu, j))
    ctx.set_materialize_grads(False)


def _pull(
    ctx: Any, grad: Any, grad_mu: Any, grad_j: Any, grad_doubt: Any, *unused: Any
) -> tuple[Any, ...]:
    q, k, v, beta, b, e, s, g, prior, cu_seqlens, kept_mu, kept_j = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(v)
    with_gate = g is not None and ctx.needs_input_grad[7]
    with_prior = ctx.needs_input_grad[8]
    dq, dk, dv, dbeta, db, de, ds, dg, dprior, *dinitial = _synapse_delta_backward(
        grad,
        grad_doubt,
        grad_mu,
        grad_j,
        q,
        k,
        v,
        beta,
        b,
        e,
        s,
        g,
        prior,
        cu_seqlens,
        kept_mu,
        kept_j,
        ctx.rule,
        ctx.previous,
        with_gate,
        with_prior,
    )
    states = [
        None if dtype is None else x.to(dtype)
        for x, dtype in zip(dinitial, ctx.initial, strict=True)
    ]
    return (
        dq,
        dk,
        dv,
        dbeta,
        db,
        None if e is None else de,
        None if s is None else ds,
        dg if with_gate else None,
        dprior.to(prior.dtype) if with_prior else None,
        *states,
        None,
        None,
        None,
        None,
        None,
    )


_synapse_delta.register_autograd(_pull, setup_context=_setup)


def _single(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    b: Tensor,
    e: Tensor | None,
    s: Tensor | None,
    g: Tensor | None,
    prior: Tensor,
    initial: tuple[Tensor | None, Tensor | None],
    rule: int,
    previous: bool,
    uncertainty: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """One token in differentiable operations, without tiles or kept states."""
    heads = v.shape[2]
    dtype = compute_dtype(q, k, v, beta, b)

    def get(x: Tensor, down: bool) -> Tensor:
        x = x[:, 0].to(dtype)
        x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
        return x.unsqueeze(-1 if down else -2)

    key, query = get(k, True), get(q, True)
    eraser = key if e is None else get(e, True)
    value, rate, gate = get(v, False), get(beta, False), get(b, False)
    floor = prior.to(dtype).unsqueeze(-1)
    shape = (v.shape[0], heads, k.shape[3], v.shape[3])
    mu, j = (
        torch.zeros(shape, dtype=dtype, device=v.device) if x is None else x.to(dtype)
        for x in initial
    )
    if g is None:
        predicted, certainty, before = j, j + floor, mu
    else:
        decay = g[:, 0].to(dtype).exp().unsqueeze(-1)
        decay = decay.unsqueeze(-1) if g.dim() == 3 else decay
        predicted = decay * j
        certainty = predicted + floor
        before = decay * (j + floor) / certainty * mu
    seen = key if s is None else get(s, True)
    new_j = predicted + seen.square() * gate
    source = mu if previous else before
    strength, over = rate, new_j + floor
    if rule != FIRST_ORDER:
        squares, over = key.square(), certainty
        found = (squares / over).sum(-2, keepdim=True)
        # In the order of the sum above, so that both are equal, to the last bit, at importance 1.
        ones = torch.ones_like(over)
        square = (squares * ones).sum(-2, keepdim=True) if rule == RATE else None
        strength = exact_strength(rate, found, square)
    if rule == DIAGONAL:
        gain = key / over * strength
        new_mu = before * (1 - key * gain) + gain * value
    else:
        error = strength * (value - eraser.transpose(-1, -2) @ source)
        new_mu = before + key / over * error
    out = (query.transpose(-1, -2) @ new_mu).squeeze(-2).unsqueeze(1).to(v.dtype)
    doubt = None
    if uncertainty:
        spread = query.square().transpose(-1, -2) @ (new_j + floor).reciprocal()
        doubt = spread.squeeze(-2).unsqueeze(1).to(v.dtype)
    return out, (new_mu, new_j), doubt


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
    mu, j = (None, None) if initial_state is None else initial_state
    if beta.dim() == 3:
        beta = beta.unsqueeze(-1)
    if b is None:
        b, j = v.new_zeros(()), None
    elif b.dim() == 3:
        b = b.unsqueeze(-1)
    b = b.expand(v.shape)
    if prior.dim() == 1:
        prior = prior.unsqueeze(-1)
    full = {"first_order": FIRST_ORDER, "exact": EXACT, "exact_rate": RATE}
    rule = full[gain] if correction == "full" else DIAGONAL
    previous = base == "prev"
    if v.shape[1] == 1 and cu_seqlens is None:
        with torch.autocast(v.device.type, enabled=False):
            return _single(
                q, k, v, beta, b, e, evidence, g, prior, (mu, j), rule, previous, uncertainty
            )
    keep = needs_grad(q, k, v, beta, b, e, evidence, g, prior, mu, j)
    out, final_mu, final_j, doubt, _, _ = _synapse_delta(
        q,
        k,
        v,
        beta,
        b,
        e,
        evidence,
        g,
        prior,
        mu,
        j,
        cu_seqlens,
        rule,
        previous,
        uncertainty,
        keep,
    )
    return out, (final_mu, final_j), doubt if uncertainty else None
