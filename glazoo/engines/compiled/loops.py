"""The compiled loops. One file: what is kept of a loop on disk is as old as the file that it is in.

Operands are flat and contiguous: tokens of all sequences [T, heads, channels], states [N, HV, K, V]
or [N, HV, K]; what a call is without is empty, and `cu` holds the borders of the sequences. A unit
is one sequence's value head's block of VALUES values; its states stay in the caches. `shift` is 1
where a read sees the state before its own token: a step is then a token's write and the next
token's read, and the first writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import carray, types
from numba.extending import intrinsic

# A whole number of every CPU's vectors. A constant, so that the compiler knows all distances.
VALUES = 64
# Steps between two states that are kept for the backward pass.
KEPT = 64
# Steps whose operands are brought to the cache together.
BLOCK = 32
# Steps of the class `synapse` between a load and a store of a synapse.
STEPS = 4
# Rules of the class `synapse_delta`.
FIRST_ORDER, EXACT, DIAGONAL, RATE = 0, 1, 2, 3
# Of the narrowest dtype: a whole number would make float64 of float32.
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
_TINY = np.finfo(np.float32).tiny


def _compiled(*fastmath: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when it is first called, and keep it on disk where a folder is for that.

    fastmath: what the compiler may do besides what is written. Never that it assumes that there is
    no infinity or that everything is a number.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        options["fastmath"] = set(fastmath) if fastmath else False
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written
            return numba.njit(**options)(function)

    return decorate


# Sums in any order, products fused with sums, and the sign of a zero not kept.
_loop = _compiled("contract", "nsz", "reassoc")
# As written: the rules of an exact gain agree to the last bit where they should.
_literal = _compiled()


@_loop
def _flush(x: Any) -> None:
    """Forget what has decayed to less than normal numbers, which take many times as long."""
    for i in range(x.shape[0]):
        if abs(x[i]) < _TINY:
            x[i] = 0


@_loop
def _fill(x: Any, value: float) -> None:
    for i in range(x.shape[0]):
        x[i] = value


@_loop
def _gather(
    target: Any, source: Any, first: int, start: int, stop: int, heads: int, head: int, low: int,
    channels: int, width: int, stride: int,
) -> None:  # fmt: skip
    """Read rows first.. of a head, its channels low.. of `channels`; zeros where no token is.

    target: rows `stride` apart, of which the first `width` numbers are written.
    """
    for u in range(-(-target.shape[0] // stride)):
        row = target[u * stride : u * stride + width]
        if start <= first + u < stop:
            at = ((first + u) * heads + head) * channels + low
            given = source[at : at + width]
            for i in range(width):
                row[i] = given[i]
        else:
            for i in range(width):
                row[i] = 0


@_loop
def _scatter(
    target: Any, source: Any, first: int, start: int, stop: int, heads: int, head: int, low: int,
    channels: int, width: int, stride: int, add: bool,
) -> None:  # fmt: skip
    """Write, or add, what `_gather` would read."""
    for u in range(-(-source.shape[0] // stride)):
        if start <= first + u < stop:
            at = ((first + u) * heads + head) * channels + low
            row, given = target[at : at + width], source[u * stride : u * stride + width]
            for i in range(width):
                row[i] = row[i] + given[i] if add else given[i]


@_loop
def _turn(
    target: Any, source: Any, first: int, start: int, stop: int, heads: int, head: int,
    channels: int, keys: int, steps: int, stride: int, rest: float,
) -> None:  # fmt: skip
    """Read rows as columns [keys, steps], `stride` apart; one channel serves all keys."""
    for u in range(steps):
        at = ((first + u) * heads + head) * channels
        there = start <= first + u < stop
        for i in range(keys):
            value = target.dtype.type(rest)
            if there:
                value = source[at + i if channels > 1 else at]
            target[(i * steps + u) * stride] = value


@_loop
def _turn_back(
    target: Any, source: Any, base: int, first: int, start: int, stop: int, heads: int, head: int,
    channels: int, steps: int,
) -> None:  # fmt: skip
    """Add columns [channels, steps] to rows."""
    for u in range(steps):
        if start <= first + u < stop:
            at = base + ((first + u) * heads + head) * channels
            for i in range(channels):
                target[at + i] += source[i * steps + u]


@_loop
def _state(
    state: Any, h: Any, j: Any, row: int, keys: int, low: int, size: int, load: bool
) -> None:
    """Load a unit's two states, a key's side by side, or store them."""
    width, second = min(VALUES, size - low), state[VALUES:]
    if load:
        _gather(state, h, row, 0, row + keys, 1, 0, low, size, width, 2 * VALUES)
        _gather(second, j, row, 0, row + keys, 1, 0, low, size, width, 2 * VALUES)
    else:
        _scatter(h, state, row, 0, row + keys, 1, 0, low, size, width, 2 * VALUES, False)
        _scatter(j, second, row, 0, row + keys, 1, 0, low, size, width, 2 * VALUES, False)


@_loop
def synapse(
    first: int, last: int, cu: Any, q: Any, k: Any, w: Any, b: Any, a: Any, prior: Any, h: Any,
    j: Any, kept_h: Any, kept_j: Any, out: Any, doubt: Any, sizes: Any, shift: int, keep: int,
) -> None:  # fmt: skip
    heads, heads_q, heads_k, keys, size, gates = sizes
    number, even = -(-size // VALUES), keys + keys % 2
    state = np.zeros(2 * even * VALUES, w.dtype)
    tokens = np.zeros(3 * BLOCK * VALUES, w.dtype)
    spread, importance = np.zeros(BLOCK * VALUES, w.dtype), np.zeros(VALUES, w.dtype)
    # Per key and step its decay, key and query; those of a key that is not there are no matter.
    scalars = np.ones(3 * even * BLOCK, w.dtype)
    floor = np.ones(even, w.dtype)
    for unit in range(first, last):
        n, head, low = unit // number // heads, unit // number % heads, unit % number * VALUES
        width = min(VALUES, size - low)
        start, stop = cu[n], cu[n + 1]
        head_q, head_k = head // (heads // heads_q), head // (heads // heads_k)
        floor[:keys] = prior[head * keys : (head + 1) * keys]
        if even > keys:
            _fill(state[2 * keys * VALUES :], 0)
            _fill(scalars[3 * keys * BLOCK :], 0)
        _state(state, h, j, (n * heads + head) * keys, keys, low, size, True)
        steps = stop - start + shift
        for s in range(0, steps, BLOCK):
            _flush(state)
            if keep and s % KEPT == 0:
                slot = start // KEPT + n + s // KEPT
                _state(state, kept_h, kept_j, (slot * heads + head) * keys, keys, low, size, False)
            t = start + s - shift
            written, gated = tokens[VALUES:], tokens[2 * VALUES :]
            _gather(written, w, t, start, stop, heads, head, low, size, width, 3 * VALUES)
            _gather(gated, b, t, start, stop, heads, head, low, size, width, 3 * VALUES)
            _turn(scalars[1:], k, t, start, stop, heads_k, head_k, keys, keys, BLOCK, 3, 0)
            _turn(scalars[2:], q, t + shift, start, stop, heads_q, head_q, keys, keys, BLOCK, 3, 0)
            if gates:
                _turn(scalars, a, t, start, stop, heads, head, gates, keys, BLOCK, 3, 1)
            for u in range(0, min(BLOCK, steps - s), STEPS):
                rows = tokens[3 * u * VALUES : 3 * (u + STEPS) * VALUES]
                doubts = spread[u * VALUES : (u + STEPS) * VALUES]
                _fill(doubts, 0)
                for c in range(STEPS):
                    for v in range(VALUES):
                        rows[3 * c * VALUES + v] = 0
                if doubt.shape[0]:
                    for i in range(keys):
                        own = scalars[3 * (i * BLOCK + u) : 3 * (i * BLOCK + u + STEPS)]
                        importance[:] = state[(2 * i + 1) * VALUES : 2 * (i + 1) * VALUES]
                        for c in range(STEPS):
                            decay, key, query, p = (
                                own[3 * c],
                                own[3 * c + 1],
                                own[3 * c + 2],
                                floor[i],
                            )
                            gate, row = rows[(3 * c + 2) * VALUES :], doubts[c * VALUES :]
                            for v in range(VALUES):
                                y = decay * importance[v] + key * key * gate[v]
                                importance[v] = y
                                row[v] += query * (query / (y + p))
                # Two keys at a time, which share what they load of a step.
                for i in range(0, even, 2):
                    own = scalars[3 * (i * BLOCK + u) : 3 * (i * BLOCK + u + STEPS)]
                    other = scalars[3 * ((i + 1) * BLOCK + u) : 3 * ((i + 1) * BLOCK + u + STEPS)]
                    p, r = floor[i], floor[i + 1]
                    pair = state[2 * i * VALUES : 2 * (i + 2) * VALUES]
                    for v in range(VALUES):
                        x, y = pair[v], pair[VALUES + v]
                        xx, yy = pair[2 * VALUES + v], pair[3 * VALUES + v]
                        for c in range(STEPS):
                            value, gate = (
                                rows[(3 * c + 1) * VALUES + v],
                                rows[(3 * c + 2) * VALUES + v],
                            )
                            decay, key, query = own[3 * c], own[3 * c + 1], own[3 * c + 2]
                            x, y = decay * x + key * value, decay * y + key * key * gate
                            read = query * (x / (y + p))
                            decay, key, query = other[3 * c], other[3 * c + 1], other[3 * c + 2]
                            xx, yy = decay * xx + key * value, decay * yy + key * key * gate
                            rows[3 * c * VALUES + v] += read + query * (xx / (yy + r))
                        pair[v], pair[VALUES + v] = x, y
                        pair[2 * VALUES + v], pair[3 * VALUES + v] = xx, yy
            r = start + s
            _scatter(out, tokens, r, start, stop, heads, head, low, size, width, 3 * VALUES, False)
            if doubt.shape[0]:
                _scatter(
                    doubt, spread, r, start, stop, heads, head, low, size, width, VALUES, False
                )
        _state(state, h, j, (n * heads + head) * keys, keys, low, size, False)


@_loop
def synapse_backward(
    first: int, last: int, cu: Any, q: Any, k: Any, w: Any, b: Any, a: Any, prior: Any, dh: Any,
    dj: Any, kept_h: Any, kept_j: Any, dy: Any, du: Any, dq: Any, dk: Any, dw: Any, db: Any,
    da: Any, dprior: Any, sizes: Any, shift: int, parts: int,
) -> None:  # fmt: skip
    """parts: how many blocks of values have gradients of keys and decays of their own."""
    heads, heads_q, heads_k, keys, size, gates = sizes
    number, total, sequences = -(-size // VALUES), cu[-1], cu.shape[0] - 1
    state, grad = np.zeros(2 * keys * VALUES, w.dtype), np.zeros(2 * keys * VALUES, w.dtype)
    # Per step its value, gate, gradient of the output, of value and gate, and of the doubt.
    tokens = np.zeros(6 * KEPT * VALUES, w.dtype)
    walk = np.zeros(2 * (KEPT + 1) * VALUES, w.dtype)
    rate, key = np.ones(keys * KEPT, w.dtype), np.zeros(keys * KEPT, w.dtype)
    query, dquery = np.zeros(keys * KEPT, w.dtype), np.zeros(keys * KEPT, w.dtype)
    dkey, drate = np.zeros(keys * KEPT, w.dtype), np.zeros(keys * KEPT, w.dtype)
    for unit in range(first, last):
        n, head, low = unit // number // heads, unit // number % heads, unit % number * VALUES
        width, part = min(VALUES, size - low), unit % number % parts
        start, stop = cu[n], cu[n + 1]
        head_q, head_k = head // (heads // heads_q), head // (heads // heads_k)
        if width < VALUES:
            # No sum over values may find those of the block before.
            _fill(tokens, 0)
            _fill(state, 0)
            _fill(grad, 0)
        _state(grad, dh, dj, (n * heads + head) * keys, keys, low, size, True)
        steps = stop - start + shift
        at_prior = ((part * sequences + n) * heads + head) * keys
        for back in range(-(-steps // KEPT)):
            s = (-(-steps // KEPT) - 1 - back) * KEPT
            count = min(KEPT, steps - s)
            slot = start // KEPT + n + s // KEPT
            _state(state, kept_h, kept_j, (slot * heads + head) * keys, keys, low, size, True)
            t, r = start + s - shift, start + s
            ahead, wide = tokens[VALUES:], 6 * VALUES
            _gather(tokens, w, t, start, stop, heads, head, low, size, width, wide)
            _gather(ahead, b, t, start, stop, heads, head, low, size, width, wide)
            ahead = tokens[2 * VALUES :]
            _gather(ahead, dy, r, start, stop, heads, head, low, size, width, wide)
            if du.shape[0]:
                ahead = tokens[5 * VALUES :]
                _gather(ahead, du, r, start, stop, heads, head, low, size, width, wide)
            for u in range(KEPT):
                _fill(tokens[(6 * u + 3) * VALUES : (6 * u + 5) * VALUES], 0)
            _turn(key, k, t, start, stop, heads_k, head_k, keys, keys, KEPT, 1, 0)
            _turn(query, q, r, start, stop, heads_q, head_q, keys, keys, KEPT, 1, 0)
            if gates:
                _turn(rate, a, t, start, stop, heads, head, gates, keys, KEPT, 1, 1)
                _fill(drate, 0)
            for i in range(keys):
                p = prior[head * keys + i]
                for v in range(2 * VALUES):
                    walk[v] = state[2 * i * VALUES + v]
                for u in range(count):
                    ai, ki = rate[i * KEPT + u], key[i * KEPT + u]
                    step = walk[2 * u * VALUES : 2 * (u + 2) * VALUES]
                    given = tokens[6 * u * VALUES : 6 * (u + 1) * VALUES]
                    for v in range(VALUES):
                        step[2 * VALUES + v] = ai * step[v] + ki * given[v]
                        step[3 * VALUES + v] = ai * step[VALUES + v] + ki * ki * given[VALUES + v]
                    if (s + u + 1) % BLOCK == 0:
                        _flush(step[2 * VALUES :])
                own = grad[2 * i * VALUES : 2 * (i + 1) * VALUES]
                prior_sum = walk[0] * ZERO
                for late in range(count):
                    u = count - 1 - late
                    ai, ki, qi = rate[i * KEPT + u], key[i * KEPT + u], query[i * KEPT + u]
                    step = walk[2 * u * VALUES : 2 * (u + 2) * VALUES]
                    given = tokens[6 * u * VALUES : 6 * (u + 1) * VALUES]
                    sum_q, sum_h, sum_j, sum_a, sum_p = (
                        ai * ZERO,
                        ai * ZERO,
                        ai * ZERO,
                        ai * ZERO,
                        ai * ZERO,
                    )
                    if du.shape[0]:
                        for v in range(VALUES):
                            inverse = ONE / (step[3 * VALUES + v] + p)
                            owed = TWO * qi * given[5 * VALUES + v] * inverse
                            sum_q += owed
                            owed *= qi * inverse / TWO
                            own[VALUES + v] -= owed
                            sum_p += owed
                    for v in range(VALUES):
                        inverse = ONE / (step[3 * VALUES + v] + p)
                        mean = step[2 * VALUES + v] * inverse
                        sum_q += given[2 * VALUES + v] * mean
                        slope = qi * given[2 * VALUES + v] * inverse
                        x, owed = own[v] + slope, slope * mean
                        sum_p += owed
                        y = own[VALUES + v] - owed
                        sum_h += x * given[v]
                        sum_j += y * given[VALUES + v]
                        given[3 * VALUES + v] += x * ki
                        given[4 * VALUES + v] += y * (ki * ki)
                        x, y = ai * x, ai * y
                        sum_a += x * step[v] + y * step[VALUES + v]
                        own[v], own[VALUES + v] = x, y
                    dquery[i * KEPT + u] = sum_q
                    dkey[i * KEPT + u] = sum_h + TWO * ki * sum_j
                    if gates == 1:
                        drate[u] += sum_a
                    elif gates:
                        drate[i * KEPT + u] = sum_a
                    prior_sum += sum_p
                _flush(own)
                dprior[at_prior + i] -= prior_sum
            base = part * total * heads
            _turn_back(dq, dquery, base * keys, r, start, stop, heads, head, keys, KEPT)
            _turn_back(dk, dkey, base * keys, t, start, stop, heads, head, keys, KEPT)
            if gates:
                _turn_back(da, drate, base * gates, t, start, stop, heads, head, gates, KEPT)
            ahead = tokens[3 * VALUES :]
            _scatter(
                dw,
                ahead,
                t,
                start,
                min(stop, t + count),
                heads,
                head,
                low,
                size,
                width,
                wide,
                False,
            )
            ahead = tokens[4 * VALUES :]
            _scatter(
                db,
                ahead,
                t,
                start,
                min(stop, t + count),
                heads,
                head,
                low,
                size,
                width,
                wide,
                False,
            )
        _state(grad, dh, dj, (n * heads + head) * keys, keys, low, size, False)


@_loop
def _broadcast(
    target: Any, source: Any, first: int, start: int, stop: int, heads: int, head: int, low: int,
    channels: int, width: int, stride: int,
) -> None:  # fmt: skip
    """`_gather`, where one channel serves all."""
    if channels > 1:
        _gather(target, source, first, start, stop, heads, head, low, channels, width, stride)
        return
    for u in range(target.shape[0] // stride):
        if start <= first + u < stop:
            value = source[(first + u) * heads + head]
            for i in range(width):
                target[u * stride + i] = value


@_literal
def _advance(
    state: Any, floor: Any, a: Any, k: Any, e: Any, s: Any, v: Any, beta: Any, b: Any, error: Any,
    strength: Any, found: Any, square: Any, rule: int, previous: bool, gates: int,
) -> None:  # fmt: skip
    """One token of the class synapse_delta. Fills error v - X^T e, strength and, of an exact gain,
    the sums of k^2 / I' and, of a rate, of k^2."""
    keys = floor.shape[0]
    for c in range(VALUES):
        error[c] = 0
        found[c] = 0
        square[c] = 0
    for i in range(keys):
        pair, p = state[2 * i * VALUES : 2 * (i + 1) * VALUES], floor[i]
        squared = k[i] * k[i]
        if previous:
            for c in range(VALUES):
                error[c] += e[i] * pair[c]
        if gates:
            decay = a[i]
            for c in range(VALUES):
                old = pair[VALUES + c]
                j = decay * old
                pair[c] = (old + p) * decay / (j + p) * pair[c]
                pair[VALUES + c] = j
        if not previous:
            for c in range(VALUES):
                error[c] += e[i] * pair[c]
        if rule != FIRST_ORDER:
            for c in range(VALUES):
                found[c] += squared * (ONE / (pair[VALUES + c] + p))
        if rule == RATE:
            for c in range(VALUES):
                square[c] += squared
    for c in range(VALUES):
        error[c] = v[c] - error[c]
        strength[c] = beta[c]
    if rule == RATE:
        for c in range(VALUES):
            rate = beta[c] * square[c]
            most = max(rate, ONE)
            strength[c] = beta[c] / ((most - rate + beta[c] * found[c]) / most)
    elif rule != FIRST_ORDER:
        for c in range(VALUES):
            strength[c] = beta[c] / (ONE + beta[c] * found[c])
    for i in range(keys):
        pair, p, key = state[2 * i * VALUES : 2 * (i + 1) * VALUES], floor[i], k[i]
        squared = s[i] * s[i]
        if rule == FIRST_ORDER:
            for c in range(VALUES):
                pair[VALUES + c] += squared * b[c]
                pair[c] += ONE / (pair[VALUES + c] + p) * key * (error[c] * strength[c])
        elif rule == DIAGONAL:
            for c in range(VALUES):
                gain = ONE / (pair[VALUES + c] + p) * key * strength[c]
                pair[c] = pair[c] * (ONE - gain * key) + gain * v[c]
                pair[VALUES + c] += squared * b[c]
        else:
            for c in range(VALUES):
                pair[c] += ONE / (pair[VALUES + c] + p) * key * (error[c] * strength[c])
                pair[VALUES + c] += squared * b[c]


@_literal
def synapse_delta(
    first: int, last: int, cu: Any, q: Any, k: Any, e: Any, s: Any, v: Any, beta: Any, b: Any,
    a: Any, prior: Any, h: Any, j: Any, kept_h: Any, kept_j: Any, out: Any, doubt: Any,
    sizes: Any, rule: int, previous: bool, keep: int,
) -> None:  # fmt: skip
    heads, heads_q, heads_k, heads_e, heads_s, keys, size, gates, rates = sizes
    number = -(-size // VALUES)
    state = np.zeros(2 * keys * VALUES, v.dtype)
    rate, key = np.ones(keys * BLOCK, v.dtype), np.zeros(keys * BLOCK, v.dtype)
    eraser, seen = np.zeros(keys * BLOCK, v.dtype), np.zeros(keys * BLOCK, v.dtype)
    query = np.zeros(keys * BLOCK, v.dtype)
    value, gate = np.zeros(BLOCK * VALUES, v.dtype), np.zeros(BLOCK * VALUES, v.dtype)
    write, read = np.zeros(BLOCK * VALUES, v.dtype), np.zeros(BLOCK * VALUES, v.dtype)
    spread = np.zeros(BLOCK * VALUES, v.dtype)
    error, strength = np.zeros(VALUES, v.dtype), np.zeros(VALUES, v.dtype)
    found, square = np.zeros(VALUES, v.dtype), np.zeros(VALUES, v.dtype)
    for unit in range(first, last):
        n, head, low = unit // number // heads, unit // number % heads, unit % number * VALUES
        width = min(VALUES, size - low)
        start, stop = cu[n], cu[n + 1]
        floor = prior[head * keys : (head + 1) * keys]
        _state(state, h, j, (n * heads + head) * keys, keys, low, size, True)
        for t in range(start, stop, BLOCK):
            _flush(state)
            if keep and (t - start) % KEPT == 0:
                slot = start // KEPT + n + (t - start) // KEPT
                _state(state, kept_h, kept_j, (slot * heads + head) * keys, keys, low, size, False)
            _gather(value, v, t, start, stop, heads, head, low, size, width, VALUES)
            _gather(gate, b, t, start, stop, heads, head, low, size, width, VALUES)
            _broadcast(write, beta, t, start, stop, heads, head, low, rates, width, VALUES)
            _gather(query, q, t, start, stop, heads_q, head * heads_q // heads, 0, keys, keys, keys)
            _gather(key, k, t, start, stop, heads_k, head * heads_k // heads, 0, keys, keys, keys)
            _gather(
                eraser, e, t, start, stop, heads_e, head * heads_e // heads, 0, keys, keys, keys
            )
            _gather(seen, s, t, start, stop, heads_s, head * heads_s // heads, 0, keys, keys, keys)
            if gates:
                _broadcast(rate, a, t, start, stop, heads, head, 0, gates, keys, keys)
            for u in range(min(BLOCK, stop - t)):
                at, to = slice(u * keys, (u + 1) * keys), slice(u * VALUES, (u + 1) * VALUES)
                _advance(
                    state, floor, rate[at], key[at], eraser[at], seen[at], value[to], write[to],
                    gate[to], error, strength, found, square, rule, previous, gates,
                )  # fmt: skip
                row, doubts, reader = read[to], spread[to], query[at]
                for c in range(VALUES):
                    row[c] = 0
                    doubts[c] = 0
                for i in range(keys):
                    pair, qi = state[2 * i * VALUES : 2 * (i + 1) * VALUES], reader[i]
                    for c in range(VALUES):
                        row[c] += qi * pair[c]
                    if doubt.shape[0]:
                        p = floor[i]
                        for c in range(VALUES):
                            doubts[c] += qi * qi / (pair[VALUES + c] + p)
            _scatter(out, read, t, start, stop, heads, head, low, size, width, VALUES, False)
            if doubt.shape[0]:
                _scatter(
                    doubt, spread, t, start, stop, heads, head, low, size, width, VALUES, False
                )
        _state(state, h, j, (n * heads + head) * keys, keys, low, size, False)


@_loop
def _retreat(
    walk: Any, grad: Any, floor: Any, a: Any, rest: Any, q: Any, k: Any, e: Any, s: Any, v: Any,
    beta: Any, b: Any, dy: Any, du: Any, error: Any, strength: Any, found: Any, square: Any,
    dq: Any, dk: Any, de: Any, ds: Any, dv: Any, dbeta: Any, db: Any, da: Any, dprior: Any,
    rooms: Any, rule: int, previous: bool, gates: int, doubted: bool,
) -> None:  # fmt: skip
    """One token of the class synapse_delta backward; the letters are those of its docstring.

    walk: states before the token and after it; rooms: [8, VALUES].
    """
    keys = floor.shape[0]
    new = walk[2 * keys * VALUES :]
    along, weighted, missed = (
        rooms[:VALUES],
        rooms[VALUES : 2 * VALUES],
        rooms[2 * VALUES : 3 * VALUES],
    )
    dsum, dsquare = rooms[3 * VALUES : 4 * VALUES], rooms[4 * VALUES : 5 * VALUES]
    # Per key: mu', I' and 1 / I or 1 / I', and the gradients of mu', I and I'.
    own = rooms[5 * VALUES : 11 * VALUES]
    for c in range(VALUES):
        along[c], dv[c], db[c], dsum[c], dsquare[c] = 0, 0, 0, 0, 0
    for turn in range(2):
        for i in range(keys):
            p, ki, qi, ai = floor[i], k[i], q[i], a[i]
            pair, after = (
                walk[2 * i * VALUES : 2 * (i + 1) * VALUES],
                new[2 * i * VALUES : 2 * (i + 1) * VALUES],
            )
            mine = grad[2 * i * VALUES : 2 * (i + 1) * VALUES]
            if gates:
                for c in range(VALUES):
                    total = ai * pair[VALUES + c] + p
                    own[c] = (pair[VALUES + c] + p) * ai / total * pair[c]
                    own[VALUES + c] = total
            else:
                for c in range(VALUES):
                    own[c] = pair[c]
                    own[VALUES + c] = pair[VALUES + c] + p
            if rule == FIRST_ORDER:
                for c in range(VALUES):
                    own[2 * VALUES + c] = ONE / (after[VALUES + c] + p)
            else:
                for c in range(VALUES):
                    own[2 * VALUES + c] = ONE / own[VALUES + c]
            if turn == 0:
                total = ai * ZERO
                for c in range(VALUES):
                    mine[c] += qi * dy[c]
                    total += dy[c] * after[c]
                dq[i] += total
                if rule == DIAGONAL:
                    for c in range(VALUES):
                        scaled = mine[c] * own[2 * VALUES + c] * ki
                        dv[c] += scaled * strength[c]
                        along[c] += scaled * (v[c] - ki * own[c])
                else:
                    for c in range(VALUES):
                        along[c] += ki * (mine[c] * own[2 * VALUES + c])
                continue
            sum_k, sum_q, sum_p, sum_s, sum_a = (
                ai * ZERO,
                ai * ZERO,
                ai * ZERO,
                ai * ZERO,
                ai * ZERO,
            )
            # Of mu', of I after the token and of I' before it.
            if rule == DIAGONAL:
                for c in range(VALUES):
                    inverse = own[2 * VALUES + c]
                    scaled, gain = mine[c] * inverse, inverse * ki * strength[c]
                    sum_k -= gain * mine[c] * own[c]
                    own[3 * VALUES + c] = (ONE - gain * ki) * mine[c]
                    scaled *= strength[c] * (v[c] - ki * own[c])
                    sum_k += scaled
                    own[4 * VALUES + c] = 0
                    own[5 * VALUES + c] = -scaled * inverse * ki
            else:
                for c in range(VALUES):
                    scaled = weighted[c] * (mine[c] * own[2 * VALUES + c])
                    sum_k += scaled
                    scaled *= own[2 * VALUES + c] * ki
                    own[3 * VALUES + c] = mine[c]
                    own[4 * VALUES + c] = -scaled
                    own[5 * VALUES + c] = 0
                if rule != FIRST_ORDER:
                    for c in range(VALUES):
                        own[5 * VALUES + c] = own[4 * VALUES + c]
                        own[4 * VALUES + c] = 0
            if rule != FIRST_ORDER:
                for c in range(VALUES):
                    inverse = own[2 * VALUES + c]
                    sum_k += TWO * ki * (dsum[c] * inverse + dsquare[c])
                    own[5 * VALUES + c] -= inverse * inverse * (ki * ki) * dsum[c]
            if doubted:
                for c in range(VALUES):
                    inverse = ONE / (after[VALUES + c] + p)
                    sum_q += TWO * qi * (du[c] * inverse)
                    own[4 * VALUES + c] -= inverse * inverse * (qi * qi) * du[c]
                dq[i] += sum_q
            dk[i] += sum_k
            ei, si = e[i], s[i]
            if rule != DIAGONAL:
                sum_e = ai * ZERO
                if previous:
                    for c in range(VALUES):
                        sum_e -= missed[c] * pair[c]
                else:
                    for c in range(VALUES):
                        sum_e -= missed[c] * own[c]
                        own[3 * VALUES + c] -= ei * missed[c]
                de[i] += sum_e
            for c in range(VALUES):
                total = mine[VALUES + c] + own[4 * VALUES + c]
                sum_s += b[c] * total
                db[c] += si * si * total
                sum_p += own[4 * VALUES + c] + own[5 * VALUES + c]
                # From here on of J' before the token.
                own[5 * VALUES + c] += total
            ds[i] += TWO * si * sum_s
            if gates:
                lost = rest[i]
                for c in range(VALUES):
                    j, inverse = pair[VALUES + c], ONE / own[VALUES + c]
                    dbefore, dj = own[3 * VALUES + c], own[5 * VALUES + c]
                    sum_a += dbefore * own[c] * p * inverse + ai * j * dj
                    inner = dbefore * pair[c] * (ai * lost) * inverse * inverse
                    sum_p -= inner * j
                    mine[VALUES + c] = dj * ai + inner * p
                    mine[c] = (j + p) * ai * inverse * dbefore
                da[i % gates] += sum_a
            else:
                for c in range(VALUES):
                    mine[c] = own[3 * VALUES + c]
                    mine[VALUES + c] = own[5 * VALUES + c]
            if previous and rule != DIAGONAL:
                for c in range(VALUES):
                    mine[c] -= ei * missed[c]
            dprior[i] += sum_p
        if turn == 0:
            for c in range(VALUES):
                # missed: from here on the gradient of the error
                if rule == DIAGONAL:
                    missed[c], weighted[c] = 0, 0
                else:
                    missed[c] = along[c] * strength[c]
                    dv[c] = missed[c]
                    weighted[c] = strength[c] * error[c]
                    along[c] *= error[c]
            if rule == FIRST_ORDER:
                for c in range(VALUES):
                    dbeta[c] = along[c]
            elif rule == RATE:
                for c in range(VALUES):
                    rate = beta[c] * square[c]
                    most = max(rate, ONE)
                    total = (most - rate + beta[c] * found[c]) / most
                    owed = -along[c] * strength[c] / total
                    below = rate < ONE
                    dbeta[c] = along[c] / (total * total if below else total)
                    dsum[c] = owed * beta[c] / most
                    dsquare[c] = owed * (-beta[c] if below else -found[c] / (square[c] * square[c]))
            else:
                for c in range(VALUES):
                    total = ONE + beta[c] * found[c]
                    dbeta[c] = along[c] / (total * total)
                    dsum[c] = -along[c] * strength[c] * strength[c]


@_loop
def synapse_delta_backward(
    first: int, last: int, cu: Any, q: Any, k: Any, e: Any, s: Any, v: Any, beta: Any, b: Any,
    a: Any, rest: Any, prior: Any, dh: Any, dj: Any, kept_h: Any, kept_j: Any, dy: Any, du: Any,
    dq: Any, dk: Any, de: Any, ds: Any, dv: Any, dbeta: Any, db: Any, da: Any, dprior: Any,
    sizes: Any, rule: int, previous: bool, parts: int,
) -> None:  # fmt: skip
    """parts: how many blocks of values have gradients of keys and decays of their own."""
    heads, heads_q, heads_k, heads_e, heads_s, keys, size, gates, rates = sizes
    number, total, sequences = -(-size // VALUES), cu[-1], cu.shape[0] - 1
    cell = 2 * keys * VALUES
    grad, walk = np.zeros(cell, v.dtype), np.zeros((KEPT + 1) * cell, v.dtype)
    rate, lost = np.ones(keys * KEPT, v.dtype), np.zeros(keys * KEPT, v.dtype)
    key, query = np.zeros(keys * KEPT, v.dtype), np.zeros(keys * KEPT, v.dtype)
    eraser, seen = np.zeros(keys * KEPT, v.dtype), np.zeros(keys * KEPT, v.dtype)
    # Value, write gate, importance gate, their gradients, those of output and doubt, and what
    # `_advance` gives.
    rows = np.zeros((12, KEPT * VALUES), v.dtype)
    rooms = np.zeros(11 * VALUES, v.dtype)
    for unit in range(first, last):
        n, head, low = unit // number // heads, unit // number % heads, unit % number * VALUES
        width, part = min(VALUES, size - low), unit % number % parts
        start, stop = cu[n], cu[n + 1]
        floor = prior[head * keys : (head + 1) * keys]
        at_prior = ((part * sequences + n) * heads + head) * keys
        dfloor = dprior[at_prior : at_prior + keys]
        if width < VALUES:
            _fill(rows.reshape(-1), 0)
            _fill(walk, 0)
            _fill(grad, 0)
        _state(grad, dh, dj, (n * heads + head) * keys, keys, low, size, True)
        for back in range(-(-(stop - start) // KEPT)):
            chunk = -(-(stop - start) // KEPT) - 1 - back
            t = start + chunk * KEPT
            slot = start // KEPT + n + chunk
            _state(walk[:cell], kept_h, kept_j, (slot * heads + head) * keys, keys, low, size, True)
            _gather(rows[0], v, t, start, stop, heads, head, low, size, width, VALUES)
            _broadcast(rows[1], beta, t, start, stop, heads, head, low, rates, width, VALUES)
            _gather(rows[2], b, t, start, stop, heads, head, low, size, width, VALUES)
            _gather(rows[3], dy, t, start, stop, heads, head, low, size, width, VALUES)
            if du.shape[0]:
                _gather(rows[4], du, t, start, stop, heads, head, low, size, width, VALUES)
            _gather(query, q, t, start, stop, heads_q, head * heads_q // heads, 0, keys, keys, keys)
            _gather(key, k, t, start, stop, heads_k, head * heads_k // heads, 0, keys, keys, keys)
            _gather(
                eraser, e, t, start, stop, heads_e, head * heads_e // heads, 0, keys, keys, keys
            )
            _gather(seen, s, t, start, stop, heads_s, head * heads_s // heads, 0, keys, keys, keys)
            if gates:
                _broadcast(rate, a, t, start, stop, heads, head, 0, gates, keys, keys)
                _broadcast(lost, rest, t, start, stop, heads, head, 0, gates, keys, keys)
            count = min(KEPT, stop - t)
            for u in range(count):
                at, to = slice(u * keys, (u + 1) * keys), slice(u * VALUES, (u + 1) * VALUES)
                before, after = (
                    walk[u * cell : (u + 1) * cell],
                    walk[(u + 1) * cell : (u + 2) * cell],
                )
                if u % BLOCK == 0:
                    _flush(before)
                for c in range(cell):
                    after[c] = before[c]
                _advance(
                    after, floor, rate[at], key[at], eraser[at], seen[at], rows[0, to], rows[1, to],
                    rows[2, to], rows[5, to], rows[6, to], rows[7, to], rows[8, to], rule, previous,
                    gates,
                )  # fmt: skip
            for late in range(count):
                u = count - 1 - late
                at, to = slice(u * keys, (u + 1) * keys), slice(u * VALUES, (u + 1) * VALUES)
                base = (part * total + t + u) * heads + head
                own = slice(base * keys, (base + 1) * keys)
                if u % BLOCK == 0:
                    _flush(grad)
                _retreat(
                    walk[u * cell : (u + 2) * cell], grad, floor, rate[at], lost[at], query[at],
                    key[at], eraser[at], seen[at], rows[0, to], rows[1, to], rows[2, to],
                    rows[3, to], rows[4, to], rows[5, to], rows[6, to], rows[7, to], rows[8, to],
                    dq[own], dk[own], de[own], ds[own], rows[9, to], rows[10, to], rows[11, to],
                    da[base * gates : (base + 1) * gates], dfloor, rooms, rule, previous, gates,
                    du.shape[0] > 0,
                )  # fmt: skip
                if rates == 1:
                    for c in range(width):
                        dbeta[base] += rows[10, u * VALUES + c]
            _scatter(dv, rows[9], t, start, stop, heads, head, low, size, width, VALUES, False)
            _scatter(db, rows[11], t, start, stop, heads, head, low, size, width, VALUES, False)
            if rates > 1:
                _scatter(
                    dbeta, rows[10], t, start, stop, heads, head, low, size, width, VALUES, False
                )
        _state(grad, dh, dj, (n * heads + head) * keys, keys, low, size, False)


@_literal
def importance(
    first: int, last: int, cu: Any, k: Any, b: Any, a: Any, j: Any, out: Any, sizes: Any, parts: int
) -> None:
    """Units first..last: a sequence's share of the heads."""
    heads, heads_k, keys, gates = sizes
    for unit in range(first, last):
        n, part = unit // parts, unit % parts
        for t in range(cu[n], cu[n + 1]):
            for head in range(part * heads // parts, (part + 1) * heads // parts):
                at = t * heads + head
                state = j[(n * heads + head) * keys : (n * heads + head + 1) * keys]
                row, gate = out[at * keys : (at + 1) * keys], b[at]
                from_k = (t * heads_k + head * heads_k // heads) * keys
                key = k[from_k : from_k + keys]
                if gates > 1:
                    decay = a[at * keys : (at + 1) * keys]
                    for i in range(keys):
                        state[i] = decay[i] * state[i] + gate * (key[i] * key[i])
                else:
                    one = a[at] if gates else gate * ZERO + ONE
                    for i in range(keys):
                        state[i] = one * state[i] + gate * (key[i] * key[i])
                for i in range(keys):
                    # What has decayed to nothing: see _flush.
                    if state[i] < _TINY:
                        state[i] = 0
                    row[i] = state[i]


@_loop
def importance_backward(
    first: int, last: int, cu: Any, k: Any, b: Any, a: Any, j: Any, value: Any, grad: Any, dj: Any,
    dk: Any, db: Any, da: Any, sizes: Any, parts: int,
) -> None:  # fmt: skip
    heads, heads_k, keys, gates = sizes
    for unit in range(first, last):
        n, part = unit // parts, unit % parts
        for late in range(cu[n + 1] - cu[n]):
            t = cu[n + 1] - 1 - late
            for head in range(part * heads // parts, (part + 1) * heads // parts):
                at = t * heads + head
                from_k = (t * heads_k + head * heads_k // heads) * keys
                key, gate = k[from_k : from_k + keys], b[at]
                row, state = dk[at * keys : (at + 1) * keys], (n * heads + head) * keys
                own, given = dj[state : state + keys], grad[at * keys : (at + 1) * keys]
                total = gate * ZERO
                for i in range(keys):
                    x = own[i] + given[i]
                    if abs(x) < _TINY:
                        x = x * ZERO
                    own[i] = x
                    row[i] = TWO * gate * key[i] * x
                    total += x * (key[i] * key[i])
                db[at] = total
                if gates:
                    old = j[state : state + keys]
                    if t > cu[n]:
                        old = value[(at - heads) * keys : (at - heads + 1) * keys]
                    if gates > 1:
                        decay, rate = (
                            a[at * keys : (at + 1) * keys],
                            da[at * keys : (at + 1) * keys],
                        )
                        for i in range(keys):
                            own[i] *= decay[i]
                            rate[i] = own[i] * old[i]
                    else:
                        total = gate * ZERO
                        for i in range(keys):
                            own[i] *= a[at]
                            total += own[i] * old[i]
                        da[at] = total


@_loop
def riccati(
    first: int, last: int, cu: Any, a: Any, c: Any, d: Any, u: Any, z: Any, out: Any, sizes: Any,
    parts: int,
) -> None:  # fmt: skip
    """Units first..last: a sequence's share of the heads."""
    heads, keys, size_a, size_c, size_d = sizes
    step_a, step_c, step_d = min(size_a - 1, 1), min(size_c - 1, 1), min(size_d - 1, 1)
    for unit in range(first, last):
        n, part = unit // parts, unit % parts
        for t in range(cu[n], cu[n + 1]):
            for head in range(part * heads // parts, (part + 1) * heads // parts):
                at = t * heads + head
                state = z[(n * heads + head) * keys : (n * heads + head + 1) * keys]
                top, rate, rest = a[at * size_a :], c[at * size_c :], d[at * size_d :]
                row, added = out[at * keys : (at + 1) * keys], u[at * keys : (at + 1) * keys]
                for i in range(keys):
                    total = rate[i * step_c] * state[i] + rest[i * step_d]
                    row[i] = top[i * step_a] * state[i] / total + added[i]
                    state[i] = row[i]


@_loop
def riccati_backward(
    first: int, last: int, cu: Any, a: Any, c: Any, d: Any, z: Any, value: Any, grad: Any, dz: Any,
    da: Any, dc: Any, dd: Any, du: Any, sizes: Any, parts: int,
) -> None:  # fmt: skip
    heads, keys, size_a, size_c, size_d = sizes
    step_a, step_c, step_d = min(size_a - 1, 1), min(size_c - 1, 1), min(size_d - 1, 1)
    for unit in range(first, last):
        n, part = unit // parts, unit % parts
        for late in range(cu[n + 1] - cu[n]):
            t = cu[n + 1] - 1 - late
            for head in range(part * heads // parts, (part + 1) * heads // parts):
                at, state = t * heads + head, (n * heads + head) * keys
                own, given = dz[state : state + keys], grad[at * keys : (at + 1) * keys]
                old = z[state : state + keys]
                if t > cu[n]:
                    old = value[(at - heads) * keys : (at - heads + 1) * keys]
                top, rate, rest = a[at * size_a :], c[at * size_c :], d[at * size_d :]
                dtop, drate, drest = da[at * size_a :], dc[at * size_c :], dd[at * size_d :]
                row = du[at * keys : (at + 1) * keys]
                for i in range(keys):
                    x = own[i] + given[i]
                    if abs(x) < _TINY:
                        x = x * ZERO
                    row[i] = x
                    inverse = ONE / (rate[i * step_c] * old[i] + rest[i * step_d])
                    x = x * inverse
                    dtop[i * step_a] += x * old[i]
                    x = x * top[i * step_a] * inverse
                    own[i] = x * rest[i * step_d]
                    x = x * old[i]
                    drest[i * step_d] -= x
                    drate[i * step_c] -= x * old[i]


def _pointer_of(_: Any, address: Any, like: Any) -> Any:
    """An address as that of numbers like `like`."""
    pointer: Any = types.CPointer
    signature = pointer(like)(address, like)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return signature, generate


_pointer: Any = intrinsic(_pointer_of)


@_literal
def _at(address: int, count: int, like: Any) -> Any:
    """Return what lies at an address, as a flat array; nothing, if nothing lies there."""
    return carray(_pointer(address, like), (count if address else 0,))


@_literal
def _arrays(places: Any, sizes: Any, like: Any, state: int, doubts: int) -> Any:
    """Operands, states and results of a token as flat arrays.

    places: the addresses of q, k, e, v, beta, b, g, prior, erase, memory, importance, and of what
    is made of them: out, doubt, memory and importance; 0 where there is none.
    sizes: batch, tokens, heads, heads of q, k and e, keys, values, values of beta; how many numbers
    lie between the decays of tokens, heads and keys, and between the priors of heads and keys.
    state, doubts: numbers of a head's importance, and of its doubt.
    """
    batch, tokens, heads, heads_q, heads_k, heads_e, keys, size, rates = sizes[:9]
    rows, n = batch * tokens, batch * heads
    return (
        _at(places[0], rows * heads_q * keys, like),
        _at(places[1], rows * heads_k * keys, like),
        _at(places[2], rows * heads_e * keys, like),
        _at(places[3], rows * heads * size, like),
        _at(places[4], rows * heads * rates, like),
        _at(places[5], rows * heads * state // keys, like),
        _at(places[6], rows * heads * keys, like),
        _at(places[7], heads * keys, like),
        _at(places[8], rows * heads * keys, like),
        _at(places[9], n * keys * size, like),
        _at(places[10], n * state, like),
        _at(places[11], rows * heads * size, like),
        _at(places[12], rows * heads * doubts, like),
        _at(places[13], n * keys * size, like),
        _at(places[14], n * state, like),
    )


@_literal
def _keyed(
    t: int, head: int, q: Any, k: Any, e: Any, g: Any, erase: Any, reader: Any, key: Any,
    eraser: Any, decay: Any, sizes: Any, tied: int, scale: Any,
) -> None:  # fmt: skip
    """Read what a token has per key: query, key, erase key and decay."""
    _, _, heads, heads_q, heads_k, heads_e, keys, _, _, gate_t, gate_h, gate_k, _, _ = sizes
    queries = q[(t * heads_q + head * heads_q // heads) * keys :]
    written = k[(t * heads_k + head * heads_k // heads) * keys :]
    removed = e[(t * heads_e + head * heads_e // heads) * keys :]
    gates, own = g[t * gate_t + head * gate_h :], erase[(t * heads + head) * keys :]
    for i in range(keys):
        reader[i] = queries[i] * scale
        if tied:
            key[i] = -np.expm1(gates[i * gate_k])
        else:
            key[i] = written[i]
        eraser[i] = removed[i] if e.shape[0] else key[i]
    if erase.shape[0]:
        for i in range(keys):
            eraser[i] = own[i] * eraser[i]
    if gate_k:
        for i in range(keys):
            decay[i] = np.exp(gates[i])
    elif g.shape[0]:
        one = np.exp(gates[0])
        for i in range(keys):
            decay[i] = one


@_literal
def step(first: int, last: int, places: Any, sizes: Any, rules: Any, scale: Any) -> None:
    """Tokens of linear (kind 0), delta (1) and the diagonal correction (2), and the importance over
    keys, if there is a b, that preconditions them; of value heads first..last of the batch.

    places, sizes: as `_arrays` says; the scale of queries is of the numbers' type.
    rules: kind; the gain, 0 the first order, 1 exact, 2 exact where beta is a rate; whether a read
    is before the write, an error is that of the state before its decay, beta acts on values alone,
    and the key is what the decay leaves room for. Without an importance every number is that of
    importance 1, to the last bit.
    """
    kind, exact, pre, previous, own, tied = rules
    _, tokens, heads, _, _, _, keys, size, rates, _, _, _, prior_h, prior_k = sizes
    q, k, e, v, beta, b, g, prior, erase, memory, j, out, doubt, new, new_j = _arrays(
        places, sizes, scale, keys, 1
    )
    error, spread = np.empty(size, v.dtype), np.empty(keys, v.dtype)
    factor, gain = np.empty(keys, v.dtype), np.empty(keys, v.dtype)
    reader, eraser = np.empty(keys, v.dtype), np.empty(keys, v.dtype)
    key, decays = np.empty(keys, v.dtype), np.ones(keys, v.dtype)
    zero = scale * ZERO
    one = zero + ONE
    for row in range(first, last):
        head, state, floor = row % heads, row * keys, row % heads * prior_h
        old_cells, old_j = memory, j
        if not memory.shape[0]:
            old_cells = new
            for i in range(state * size, (state + keys) * size):
                new[i] = 0
        if b.shape[0] and not j.shape[0]:
            old_j = new_j
            for i in range(state, state + keys):
                new_j[i] = 0
        for token in range(tokens):
            t = row // heads * tokens + token
            at = t * heads + head
            value, result = v[at * size : (at + 1) * size], out[at * size : (at + 1) * size]
            rate = beta[at * rates : (at + 1) * rates]
            _keyed(t, head, q, k, e, g, erase, reader, key, eraser, decays, sizes, tied, scale)
            found, square, total = zero, zero, zero
            strength = one
            if rates == 1:
                strength = rate[0]
            for i in range(keys):
                decay = decays[i]
                factor[i], gain[i], seen = decay, key[i], one
                if b.shape[0]:
                    p = prior[floor + i * prior_k]
                    old = old_j[state + i]
                    kept = decay * old
                    after = kept + b[at] * (key[i] * key[i])
                    new_j[state + i] = after
                    seen = old + p if pre else after + p
                    if kind:
                        factor[i] = decay * (old + p) / (kept + p)
                        gain[i] = key[i] / (kept + p if exact else after + p)
                spread[i] = reader[i] * reader[i] / seen
                if b.shape[0] and not kind:
                    reader[i] = reader[i] / seen
                found += key[i] * gain[i]
                square += key[i] * key[i]
            if doubt.shape[0]:
                for i in range(keys):
                    total += spread[i]
                doubt[at] = total
            if exact:
                given = strength
                if exact == 1:
                    strength = given / (ONE + given * found)
                else:
                    reached = given * square
                    most = max(reached, one)
                    strength = given / ((most - reached + given * found) / most)
            for c in range(size):
                result[c] = 0
                error[c] = value[c] * (
                    rate[c] if rates > 1 and not (kind and not own) else strength
                )
            if kind == 1:
                if rates <= 1 and not own:
                    for i in range(keys):
                        eraser[i] = strength * eraser[i]
                if rates > 1 and not own:
                    for c in range(size):
                        error[c] = value[c]
                for i in range(keys):
                    cells, part = old_cells[(state + i) * size :], eraser[i]
                    if not previous:
                        for c in range(size):
                            error[c] -= part * (factor[i] * cells[c])
                    else:
                        for c in range(size):
                            error[c] -= part * cells[c]
                if rates > 1 and not own:
                    for c in range(size):
                        error[c] *= rate[c]
            for i in range(keys):
                cells = old_cells[(state + i) * size : (state + i + 1) * size]
                into = new[(state + i) * size : (state + i + 1) * size]
                if pre:
                    for c in range(size):
                        result[c] += reader[i] * cells[c]
                if kind == 2:
                    step_size = gain[i] * strength
                    for c in range(size):
                        into[c] = (
                            factor[i] * cells[c] * (ONE - key[i] * step_size) + step_size * value[c]
                        )
                else:
                    for c in range(size):
                        into[c] = factor[i] * cells[c] + gain[i] * error[c]
                if not pre:
                    for c in range(size):
                        result[c] += reader[i] * into[c]
            old_cells, old_j = new, new_j


@_literal
def _find(
    cells: Any, counts: Any, lines: Any, width: int, decay: Any, p: Any, part: Any, squared: Any,
    gated: bool, exact: int, previous: int,
) -> None:  # fmt: skip
    """Decay a key's synapses; add what they predict, and what an exact gain finds."""
    if previous:
        for c in range(width):
            lines[3 * VALUES + c] += part * cells[c]
    if gated:
        for c in range(width):
            kept = decay * counts[c]
            cells[c] = (counts[c] + p) * decay / (kept + p) * cells[c]
            counts[c] = kept
    if not previous:
        for c in range(width):
            lines[3 * VALUES + c] += part * cells[c]
    if exact:
        for c in range(width):
            lines[4 * VALUES + c] += squared * (ONE / (counts[c] + p))


@_literal
def _leave(
    cells: Any, counts: Any, lines: Any, width: int, decay: Any, p: Any, key: Any, query: Any,
    kind: int, exact: int,
) -> None:  # fmt: skip
    """Write a key's synapses, and add what is read of them."""
    squared = key * key
    if kind == 0:
        for c in range(width):
            x = decay * cells[c] + key * lines[c]
            y = decay * counts[c] + squared * lines[2 * VALUES + c]
            cells[c] = x
            counts[c] = y
            lines[5 * VALUES + c] += query * (x / (y + p))
    elif kind == 2:
        for c in range(width):
            gain = ONE / (counts[c] + p) * key * lines[VALUES + c]
            x = cells[c] * (ONE - gain * key) + gain * lines[c]
            cells[c] = x
            counts[c] += squared * lines[2 * VALUES + c]
            lines[5 * VALUES + c] += query * x
    elif exact:
        for c in range(width):
            x = cells[c] + ONE / (counts[c] + p) * key * lines[3 * VALUES + c]
            cells[c] = x
            counts[c] += squared * lines[2 * VALUES + c]
            lines[5 * VALUES + c] += query * x
    else:
        for c in range(width):
            y = counts[c] + squared * lines[2 * VALUES + c]
            x = cells[c] + ONE / (y + p) * key * lines[3 * VALUES + c]
            cells[c] = x
            counts[c] = y
            lines[5 * VALUES + c] += query * x


@_literal
def synapse_step(
    first: int, last: int, places: Any, sizes: Any, rules: Any, scale: Any
) -> None:  # fmt: skip
    """Tokens as `step` takes them, with an importance per synapse, or with a gain per synapse and,
    if there is no b, an importance of one."""
    kind, exact, pre, previous, own, tied = rules
    _, tokens, heads, _, _, _, keys, size, rates, _, _, _, prior_h, prior_k = sizes
    doubts = size if places[5] else 1
    q, k, e, v, beta, b, g, prior, erase, memory, j, out, doubt, new, new_j = _arrays(
        places, sizes, scale, keys * size, doubts
    )
    # A block of values, one line below the other: value, strength, evidence, error, what is found,
    # read, doubt, read before. The compiler knows that they do not overlap, and how long they are.
    lines = np.zeros(8 * VALUES, v.dtype)
    counted = new_j if b.shape[0] else np.zeros(keys * size, v.dtype)
    reader, eraser = np.empty(keys, v.dtype), np.empty(keys, v.dtype)
    key, decays = np.empty(keys, v.dtype), np.ones(keys, v.dtype)
    zero = scale * ZERO
    one = zero + ONE
    for row in range(first, last):
        head, state, floor = row % heads, row * keys * size, row % heads * prior_h
        into = new[state : state + keys * size]
        if memory.shape[0]:
            into[:] = memory[state : state + keys * size]
        else:
            into[:] = 0
        into = counted[state : state + keys * size] if b.shape[0] else counted
        if j.shape[0]:
            into[:] = j[state : state + keys * size]
        else:
            into[:] = 0
        for token in range(tokens):
            t = row // heads * tokens + token
            at = t * heads + head
            _keyed(t, head, q, k, e, g, erase, reader, key, eraser, decays, sizes, tied, scale)
            square = zero
            for i in range(keys):
                square += key[i] * key[i]
            for low in range(0, size, VALUES):
                width = min(VALUES, size - low)
                _fill(lines, 0)
                alone = own or not kind
                for c in range(width):
                    strength = one
                    if rates:
                        strength = beta[at * rates + (low + c if rates > 1 else 0)]
                    lines[c] = v[at * size + low + c] * (strength if alone else one)
                    lines[VALUES + c] = one if alone else strength
                    lines[2 * VALUES + c] = b[at * size + low + c] if b.shape[0] else zero
                for i in range(keys if kind else 0):
                    cells = new[state + i * size + low :]
                    counts = counted[(state if b.shape[0] else 0) + i * size + low :]
                    p = prior[floor + i * prior_k] if b.shape[0] else one
                    gated, part, squared = g.shape[0] > 0, eraser[i], key[i] * key[i]
                    # The same, but for what the compiler knows.
                    if width == VALUES:
                        _find(
                            cells, counts, lines, VALUES, decays[i], p, part, squared, gated, exact,
                            previous,
                        )  # fmt: skip
                    else:
                        _find(
                            cells, counts, lines, width, decays[i], p, part, squared, gated, exact,
                            previous,
                        )  # fmt: skip
                for c in range(width if kind else 0):
                    given, found = lines[VALUES + c], lines[4 * VALUES + c]
                    if exact == 1:
                        lines[VALUES + c] = given / (ONE + given * found)
                    elif exact:
                        reached = given * square
                        most = max(reached, one)
                        lines[VALUES + c] = given / ((most - reached + given * found) / most)
                    error = lines[c] - lines[3 * VALUES + c]
                    lines[3 * VALUES + c] = error * lines[VALUES + c]
                for i in range(keys):
                    cells = new[state + i * size + low :]
                    counts = counted[(state if b.shape[0] else 0) + i * size + low :]
                    p, query = prior[floor + i * prior_k] if b.shape[0] else one, reader[i]
                    if pre:
                        for c in range(width):
                            lines[7 * VALUES + c] += query * (cells[c] / (counts[c] + p))
                            lines[6 * VALUES + c] += query * (query / (counts[c] + p))
                    if width == VALUES:
                        _leave(
                            cells, counts, lines, VALUES, decays[i], p, key[i], query, kind, exact
                        )
                    else:
                        _leave(
                            cells, counts, lines, width, decays[i], p, key[i], query, kind, exact
                        )
                    if doubt.shape[0] and not pre:
                        for c in range(width):
                            lines[6 * VALUES + c] += query * (query / (counts[c] + p))
                for c in range(width):
                    out[at * size + low + c] = lines[(7 if pre else 5) * VALUES + c]
                for c in range(min(doubts, width) if doubt.shape[0] else 0):
                    doubt[at * doubts + (low + c if doubts > 1 else 0)] = lines[6 * VALUES + c]


@_loop
def _product(x: Any, y: Any) -> Any:
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@_loop
def _softplus(z: Any) -> Any:
    # Above it torch's is the line, too.
    return z if z > 20 else np.log1p(np.exp(z))


@_loop
def importance_gate(
    first: int, last: int, places: Any, sizes: Any, rules: Any, factor: Any, most: Any
) -> None:  # fmt: skip
    """The importance gate of tokens first..last.

    places: the addresses of the layer's input, b_down, b_up, b_bias, b_scale, the write gate, keys,
    and of what is made of them; 0 where there is none.
    sizes: tokens; channels of the input, rank, value heads, channels of b a head, heads of k, keys.
    rules: what the write gate is, 0 nothing, 1 a factor, 2 a rate whose precision is one, `most` at
    most; whether z opens by softplus; kappa, 0 one, 1 clamped, 2 by softplus.
    factor, most: of the numbers' type.
    """
    rows, width, rank, heads, channels, heads_k, keys = sizes
    tie, soft, clamp = rules
    size = rank if rank else width
    x, down = _at(places[0], rows * width, factor), _at(places[1], rank * width, factor)
    up = _at(places[2], heads * channels * size, factor)
    bias = _at(places[3], heads * channels, factor)
    scale = _at(places[4], heads, factor)
    write = _at(places[5], rows * heads, factor)
    k = _at(places[6], rows * heads_k * keys, factor)
    out = _at(places[7], rows * heads * channels, factor)
    low = np.empty(rank, x.dtype)
    zero = factor * ZERO
    one = zero + ONE
    for t in range(first, last):
        inner = x[t * width : (t + 1) * width]
        for r in range(rank):
            low[r] = _product(inner, down[r * width : (r + 1) * width])
        if rank:
            inner = low
        for head in range(heads):
            seen, kappa = one, one
            if tie:
                seen = write[t * heads + head]
            if tie == 2:
                at = (t * heads_k + head * heads_k // heads) * keys
                key = k[at : at + keys]
                rest = one - seen * _product(key, key)
                seen = seen / rest if rest * most > seen else most
            if clamp:
                kappa = scale[head]
                kappa = max(kappa, zero) if clamp == 1 else _softplus(kappa)
            for c in range(head * channels, (head + 1) * channels):
                z = _product(inner, up[c * size : (c + 1) * size])
                if bias.shape[0]:
                    z += bias[c]
                opening = _softplus(z) if soft else factor / (one + np.exp(-z))
                out[t * heads * channels + c] = opening * seen * kappa
