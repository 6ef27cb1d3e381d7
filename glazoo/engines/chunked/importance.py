"""The importance scan: evidence per key, accumulated above the prior and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    begin,
    blocks,
    carry,
    earlier,
    load,
    over_sequences,
    rooms_for,
    sequences,
    store,
)
from glazoo.engines.chunked.gates import halves, levels
from glazoo.kernels import loops
from glazoo.kernels.loops import Importance, compute_dtype
from glazoo.kernels.register import register

CHUNK = 32
# Few operands are alive at once, and so little is done with each number that calls weigh more.
TILE = 1 << 18


def _decays(g: Tensor, rows: Any, tile: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Decay of every token [N, C, D] and of the whole chunk [n, R, D]; D is 1 or K."""
    part = load(g, rows, tile, dtype)
    total = part.sum(1).exp_().view(tile.number, rows.number, -1)
    return part.exp_(), total


def _forward(
    x: Importance, _tokens: Any, _states: Any, results: Any, finals: Any, _kept: Any
) -> None:
    k, b, g, initial, _ = x
    (out,), (final,) = results, finals
    batch, count, heads = b.shape
    dtype = final.dtype
    for rows, pieces in blocks(batch, count, heads, k.shape[2], CHUNK, k.shape[3], TILE):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, k.shape[3])
        if initial is None:
            state = torch.zeros(shape, dtype=dtype, device=b.device)
        else:
            state = initial[corner].to(dtype).reshape(shape)
        for tile in pieces:
            y = load(k, rows, tile, dtype)
            y.square_().mul_(load(b, rows, tile, dtype))
            total = prefix = None
            if g is None:
                y = y.cumsum(1)
            else:
                prefix, total = _decays(g, rows, tile, dtype)
                for half in levels(tile.size):
                    first, second = halves(y, half)
                    before, after = halves(prefix, half)
                    second.addcmul_(after, first[:, :, -1:])
                    after.mul_(before[:, :, -1:])
            local = y[:, -1].view(tile.number, *shape)
            border = torch.empty(tile.number + 1, *shape, dtype=dtype, device=b.device)
            border[0] = state
            for c in range(tile.number):
                carry(border[c], local[c], None if total is None else total[c], border[c + 1])
            state = border[tile.number]
            starts = border[: tile.number].view(-1, 1, shape[1])
            y = y.add_(starts) if prefix is None else y.addcmul_(starts, prefix)
            store(out, y, rows, tile)
        final[corner].copy_(state.view(final[corner].shape))


def _backward(
    x: Importance, tokens: Any, states: Any, results: Any, finals: Any, _kept: Any
) -> None:
    k, b, g, initial, _ = x
    (grad, value), (grad_final,), (dinitial,) = tokens, states, finals
    dk, db, dg = results
    batch, count, heads = b.shape
    dtype = dinitial.dtype
    for rows, pieces in blocks(batch, count, heads, k.shape[2], CHUNK, k.shape[3], TILE):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, k.shape[3])
        if grad_final is None:
            state = torch.zeros(shape, dtype=dtype, device=b.device)
        else:
            state = grad_final[corner].to(dtype).reshape(shape)
        for tile in reversed(pieces):
            y = load(grad, rows, tile, dtype)
            kt, bt = load(k, rows, tile, dtype), load(b, rows, tile, dtype)
            decay = total = suffix = None
            if g is None:
                y = y.flip(1).cumsum(1).flip(1)
            else:
                # suffix(j) = decays of j + 1 .. last token of the chunk
                decay, total = _decays(g, rows, tile, dtype)
                suffix = torch.ones_like(decay)
                suffix[:, :-1] = decay[:, 1:]
                for half in levels(tile.size):
                    first, second = halves(y, half)
                    before, after = halves(suffix, half)
                    first.addcmul_(before, second[:, :, :1])
                    before.mul_(after[:, :, :1])
            entry = y[:, 0] if decay is None else y[:, 0] * decay[:, 0]
            entry = entry.view(tile.number, *shape)
            # ends[c]: gradient of the state after chunk c - 1
            ends = torch.empty(tile.number + 1, *shape, dtype=dtype, device=b.device)
            ends[tile.number] = state
            for c in reversed(range(tile.number)):
                carry(ends[c + 1], entry[c], None if total is None else total[c], ends[c])
            state = ends[0]
            after_chunk = ends[1:].view(-1, 1, shape[1])
            y = y.add_(after_chunk) if suffix is None else y.addcmul_(after_chunk, suffix)
            if dg is not None and decay is not None:
                source, at = earlier(value, initial, tile)
                gate = load(source, rows, at, dtype).mul_(y)
                if dg.dim() == 3:
                    gate = gate.sum(-1, keepdim=True)
                store(dg, gate.mul_(decay), rows, tile)
            y.mul_(kt)
            store(db, (y * kt).sum(-1, keepdim=True), rows, tile)
            store(dk, y.mul_(bt).mul_(2), rows, tile)
        dinitial[corner].copy_(state.view(dinitial[corner].shape))


def allocate(x: Importance, keep: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads = x.b.shape
    like = x.b.new_empty((), dtype=compute_dtype(x.k, x.b))
    keys = x.k.shape[3]
    return (
        like.new_empty(batch, tokens, heads, keys),
        like.new_empty(sequences(x.cu_seqlens, batch), heads, keys),
    )


def _run(x: Importance, keep: bool) -> tuple[Tensor, Tensor]:
    out, final = found = allocate(x, keep)
    begin(final, x.initial_state)
    over_sequences(_forward, x, CHUNK, results=[out], final=[final])
    return found


def _gradients(x: Importance, grads: Any, wanted: Any, value: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    found = rooms_for(x, wanted, "k", "b", "g")
    dinitial = value.new_empty(sequences(x.cu_seqlens, x.b.shape[0]), *value.shape[2:])
    begin(dinitial, grad_final)
    over_sequences(
        _backward,
        x,
        CHUNK,
        tokens=[torch.zeros_like(value) if grad is None else grad, value],
        states=[grad_final],
        results=found,
        final=[dinitial],
    )
    return *found, dinitial, None


_importance = register(
    "chunked_importance",
    Importance,
    results=("out", "final"),
    reads=("out",),
    forward=_run,
    allocate=allocate,
    gradients=_gradients,
)


def importance(
    k: Float[Tensor, "B T Hk K"],
    b: Float[Tensor, "B T HV"],
    g: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    *,
    initial_state: Float[Tensor, "N HV K"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    operator: Callable[..., Any] = _importance,
) -> tuple[Float[Tensor, "B T HV K"], Float[Tensor, "N HV K"]]:
    """Importance above the prior, per key, for a head-shaped importance gate.

        J_t = exp(g_t) J_{t-1} + b_t k_t^2

    A chunk is scanned in log2(32) elementwise steps of doubling width, all chunks at once; the
    backward pass is the mirrored scan and needs nothing but the result itself.

    Args:
        k: keys. Any floating dtype.
        b: importance gate, >= 0.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        initial_state: J_0; None is zeros.
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.
        operator: what computes it, given the record of the operation; default: this engine's.

    Returns:
        J after every token and after the last one, both in float32 (float64 for float64 operands):
        importance is a state and is not rounded to the dtype of the keys.

    Raises:
        ValueError: for shapes that do not fit together.

    Reference:
        Bonnet et al., "Learning to Remember, Learn, and Forget in Attention-Based Models",
        ICML 2026, arXiv:2602.09075.
    """
    checks.tokens(k=k)
    checks.shape("b", b, (*k.shape[:2], b.shape[-1]))
    checks.heads(b.shape[2], k=k)
    checks.gate("g", g, k, b)
    checks.packing(cu_seqlens, b)
    count = sequences(cu_seqlens, k.shape[0])
    checks.shape("initial_state", initial_state, (count, b.shape[2], k.shape[3]))
    if k.shape[1] == 1 and cu_seqlens is None:
        return loops.importance(k, b, g, initial_state=initial_state)
    value, final = operator(k, b, g, initial_state, cu_seqlens)
    return value, final
