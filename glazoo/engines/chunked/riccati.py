"""The scan of an importance whose variance grows: z = a z / (c z + d) + u, elementwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Rows,
    Tile,
    begin,
    earlier,
    over_sequences,
    rooms_for,
    row_blocks,
    sequences,
    tile_limit,
    tiles,
)
from glazoo.kernels import loops
from glazoo.kernels.loops import Riccati, compute_dtype
from glazoo.kernels.register import register

CHUNK = 32
# Numbers of one token over all chunks of a tile: calls on fewer take as long. The backward pass
# reads whole tiles again, which should not leave the cache before.
FORWARD, BACKWARD = 16384, 4096


def _part(x: Tensor, rows: Rows, tile: Tile, dtype: torch.dtype, missing: float = 0.0) -> Tensor:
    """The tile of x [B, T, heads, D] as [b, n, C, h, D]; a view if no token is missing."""
    part = x[rows.b0 : rows.b1, tile.start : tile.stop, rows.h0 : rows.h1].to(dtype)
    if not tile.full:
        short = tile.size * tile.number - part.shape[1]
        part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, short), value=missing)
    found: Tensor = part.unflatten(1, (tile.number, tile.size))
    return found


def _put(target: Tensor | None, value: Tensor, rows: Rows, tile: Tile) -> None:
    """Writes [b, n, C, h, K] to its place in target, if any, summed where keys share a number."""
    if target is not None:
        part = target[rows.b0 : rows.b1, tile.start : tile.stop, rows.h0 : rows.h1]
        value = value.sum_to_size(*value.shape[:4], target.shape[3]).flatten(1, 2)
        part.copy_(value[:, : part.shape[1]])


def _maps(x: Riccati, rows: Rows, tile: Tile, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a, c and d of a tile; tokens that are missing leave a state as it is."""
    return (
        _part(x.a, rows, tile, dtype, missing=1),
        _part(x.c, rows, tile, dtype),
        _part(x.d, rows, tile, dtype, missing=1),
    )


def _filled(x: Riccati, there: Tensor) -> Riccati:
    """The operands of a batch whose padding leaves states as they are."""
    if x.cu_seqlens is None:
        return x
    missing = 1 - there.unsqueeze(3)
    return x._replace(a=x.a + missing, d=x.d + missing)


def _blocks(x: Riccati, width: int) -> Iterator[tuple[Rows, list[Tile]]]:
    """Blocks of rows and the tiles of each."""
    batch, count, heads, keys = x.u.shape
    for rows in row_blocks(batch, heads, heads, tile_limit(count, CHUNK, keys)):
        yield rows, tiles(count, rows.number, CHUNK, width // keys)


def _by_token(*parts: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.unbind(2) for x in parts), strict=True))


def _starts(steps: Sequence[Sequence[Tensor]], state: Tensor) -> Tensor:
    """The states that enter the chunks [b, n, h, K], from the one that enters the first.

    What the tokens of a chunk make of a state together is z -> (m00 z + m01) / (m10 z + m11).
    Nothing is negative, so nothing cancels; only ratios count, and m10 + m11 is kept at one.
    """
    top, bottom = state.new_zeros(2, 2, *steps[0][3].shape)
    top[0], bottom[1] = 1, 1
    for i, (a, c, d, u, _) in enumerate(steps):
        bottom.mul_(d).addcmul_(c, top)
        top.mul_(a).addcmul_(u, bottom)
        if i % 2:
            scale = (bottom[0] + bottom[1]).reciprocal_()
            bottom.mul_(scale)
            top.mul_(scale)
    starts = [state]
    for m00, m01, m10, m11 in zip(*(m.unbind(1) for m in (*top, *bottom)), strict=True):
        state = torch.addcmul(m01, m00, state).div_(torch.addcmul(m11, m10, state))
        starts.append(state)
    return torch.stack(starts[:-1], 1)


def _forward(x: Riccati, tokens: Any, _states: Any, results: Any, finals: Any, _kept: Any) -> None:
    (there,), (out,), (final,) = tokens, results, finals
    x = _filled(x, there)
    for rows, found in _blocks(x, FORWARD):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        state = final.new_zeros(final[corner].shape)
        if x.initial_state is not None:
            state.copy_(x.initial_state[corner])
        for tile in found:
            u = _part(x.u, rows, tile, final.dtype)
            y = torch.empty_like(u)
            steps = _by_token(*_maps(x, rows, tile, final.dtype), u, y)
            z = state.unsqueeze(1) if tile.number == 1 else _starts(steps, state)
            for a, c, d, add, new in steps:
                z = torch.addcdiv(add, a * z, torch.addcmul(d, c, z), out=new)
            state = z[:, -1]
            _put(out, y, rows, tile)
        final[corner].copy_(state)


def _backward(x: Riccati, tokens: Any, states: Any, results: Any, finals: Any, _kept: Any) -> None:
    (there, grad, value), (grad_final,), (dinitial,) = tokens, states, finals
    da, dc, dd, du = results
    dtype = dinitial.dtype
    x = _filled(x, there)
    for rows, found in _blocks(x, BACKWARD):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        state = dinitial.new_zeros(dinitial[corner].shape)
        if grad_final is not None:
            state.copy_(grad_final[corner])
        for tile in reversed(found):
            a, c, d = _maps(x, rows, tile, dtype)
            source, at = earlier(value, x.initial_state, tile)
            old = _part(source, rows, at, dtype)
            inverse = torch.addcmul(d, c, old).reciprocal_()
            slope = (inverse * a).mul_(inverse * d)
            # What the chunk's tokens give to each of them, and the factor on what its end gives.
            y = _part(grad, rows, tile, dtype).clone()
            suffix = torch.empty_like(y)
            suffix[:, :, -1] = 1
            steps = _by_token(y, suffix, slope)
            for (late, factor, s), (new, out, _) in itertools.pairwise(reversed(steps)):
                new.addcmul_(late, s)
                torch.mul(factor, s, out=out)
            first, factor, s = steps[0]
            ends = []
            chunks = zip((first * s).unbind(1), (factor * s).unbind(1), strict=True)
            for entry, total in reversed(list(chunks)):
                ends.append(state)
                state = torch.addcmul(entry, total, state)
            y.addcmul_(torch.stack(ends[::-1], 1).unsqueeze(2), suffix)
            _put(du, y, rows, tile)
            _put(da, y.mul_(old).mul_(inverse), rows, tile)
            _put(dd, y.mul_(inverse).mul_(-a), rows, tile)
            _put(dc, y.mul_(old), rows, tile)
        dinitial[corner].copy_(state)


def allocate(x: Riccati, keep: bool) -> tuple[Tensor, Tensor]:
    batch, _, heads, keys = x.u.shape
    like = x.u.new_empty((), dtype=compute_dtype(x.a, x.c, x.d, x.u))
    final = sequences(x.cu_seqlens, batch), heads, keys
    return like.new_empty(x.u.shape), like.new_empty(final)


def _there(x: Riccati) -> Tensor:
    """A one for every token; padding has zeros."""
    return x.u.new_ones(x.u.shape[:3])


def _run(x: Riccati, keep: bool) -> tuple[Tensor, Tensor]:
    out, final = found = allocate(x, keep)
    begin(final, x.initial_state)
    over_sequences(_forward, x, CHUNK, tokens=[_there(x)], results=[out], final=[final])
    return found


def _gradients(x: Riccati, grads: Any, wanted: Any, value: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    found = rooms_for(x, wanted, "a", "c", "d", "u")
    dinitial = value.new_empty(sequences(x.cu_seqlens, x.u.shape[0]), *value.shape[2:])
    begin(dinitial, grad_final)
    over_sequences(
        _backward,
        x,
        CHUNK,
        tokens=[_there(x), torch.zeros_like(value) if grad is None else grad, value],
        states=[grad_final],
        results=found,
        final=[dinitial],
    )
    return *found, dinitial, None


_riccati = register(
    "chunked_riccati",
    Riccati,
    results=("out", "final"),
    reads=("out",),
    forward=_run,
    allocate=allocate,
    gradients=_gradients,
)


def riccati(
    a: Float[Tensor, "B T HV A"],
    c: Float[Tensor, "B T HV C"],
    d: Float[Tensor, "B T HV D"],
    u: Float[Tensor, "B T HV K"],
    *,
    initial_state: Float[Tensor, "N HV K"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    operator: Callable[..., Any] = _riccati,
) -> tuple[Float[Tensor, "B T HV K"], Float[Tensor, "N HV K"]]:
    """A scan of fractions over keys, the scalar Riccati recursion of a Kalman filter.

        z_t = a_t z_{t-1} / (c_t z_{t-1} + d_t) + u_t

    All chunks at once: what the tokens of a chunk make of a state is a 2 x 2 matrix, of which the
    states at the borders follow; from these every chunk takes the steps that a loop would take. The
    backward pass is a linear scan in reverse and needs nothing but the result itself.

    Args:
        a: numerator, >= 0, of size 1 or K. Any floating dtype.
        c: what of the state is in the denominator, >= 0, of size 1 or K.
        d: rest of the denominator, >= 0, of size 1 or K; c z + d > 0.
        u: what a token adds, >= 0.
        initial_state: z_0 >= 0; None is zeros.
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.
        operator: what computes it, given the record of the operation; default: this engine's.

    Returns:
        z after every token and after the last one, both in float32 (float64 for float64 operands):
        it is a state.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    checks.tokens(u=u, a=a, c=c, d=d)
    *lead, keys = u.shape
    for name, x in (("a", a), ("c", c), ("d", d)):
        if tuple(x.shape) not in ((*lead, 1), (*lead, keys)):
            raise ValueError(
                f"{name} has shape {list(x.shape)} and u {list(u.shape)}; accepted: that of u, "
                f"with 1 or {keys} keys"
            )
    checks.packing(cu_seqlens, u)
    checks.shape("initial_state", initial_state, (sequences(cu_seqlens, lead[0]), *u.shape[2:]))
    if u.shape[1] == 1 and cu_seqlens is None:
        return loops.riccati(a, c, d, u, initial_state=initial_state)
    value, final = operator(a, c, d, u, initial_state, cu_seqlens)
    return value, final
