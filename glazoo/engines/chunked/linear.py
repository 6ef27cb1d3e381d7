"""The Hebbian class: matmul form of a gated linear recurrence."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Tile,
    begin,
    blocks,
    carry,
    empty_as,
    load,
    over_sequences,
    rooms_for,
    sequences,
    slots,
    store,
)
from glazoo.engines.chunked.gates import READ, READ_BEFORE, gate_of
from glazoo.kernels.loops import GatedLinear, compute_dtype
from glazoo.kernels.register import register

CHUNK = 32
# Fewer operands are alive at once than of a delta rule.
TILE = 1 << 17


def _fresh(x: GatedLinear, tile: Tile) -> bool:
    """Whether a tile is one chunk that begins with nothing, of which no state is kept."""
    return x.initial_state is None and tile.start == 0 and tile.number == 1


def _forward(
    x: GatedLinear, _tokens: Any, _states: Any, results: Any, finals: Any, kept: Any
) -> None:
    """One batch of equally long sequences; `borders` [chunks, B, HV, K, V] is filled if given."""
    q, k, w, g, beta, initial, _, read, scale = x
    (out,), (final,) = results, finals
    borders = kept[0] if kept else None
    before = read == "pre"
    batch, count, heads, _ = w.shape
    dtype = final.dtype
    mode = READ_BEFORE if before else READ
    groups, width = min(q.shape[2], k.shape[2]), max(final.shape[2:])
    for rows, pieces in blocks(batch, count, heads, groups, CHUNK, width, TILE):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *final.shape[2:])
        if initial is None:
            state = torch.zeros(shape, dtype=dtype, device=w.device)
        else:
            state = initial[corner].to(dtype).reshape(shape)
        for tile in pieces:
            qt, kt, wt = (load(x, rows, tile, dtype) for x in (q, k, w))
            if scale != 1:
                qt.mul_(scale)
            if beta is not None:
                wt.mul_(load(beta, rows, tile, dtype))
            gate = gate_of(g, rows, tile, dtype, exclusive=before)
            result = torch.bmm(gate.scores(qt, kt, mode), wt)
            writes = torch.bmm(gate.tail(kt).transpose(1, 2), wt).view(tile.number, *shape)
            if _fresh(x, tile):
                state = writes[0]
                store(out, result, rows, tile)
                continue
            total = gate.total_of(tile.number)
            border = torch.empty(tile.number + 1, *shape, dtype=dtype, device=w.device)
            border[0] = state
            for c in range(tile.number):
                carry(border[c], writes[c], None if total is None else total[c], border[c + 1])
            state = border[tile.number]
            starts = border[: tile.number].view(-1, *shape[1:])
            store(out, result.baddbmm_(gate.head(qt, before), starts), rows, tile)
            if borders is not None:
                part = borders[tile.chunk : tile.chunk + tile.number, *corner]
                part.copy_(starts.view(part.shape))
        final[corner].copy_(state.view(final[corner].shape))


def _backward(
    x: GatedLinear, tokens: Any, states: Any, results: Any, finals: Any, kept: Any
) -> None:
    q, k, w, g, beta, _, _, read, scale = x
    (grad,), (grad_final,), (dinitial,), (borders,) = tokens, states, finals, kept
    dq, dk, dw, dg, dbeta = results
    before = read == "pre"
    batch, count, heads, _ = w.shape
    dtype = borders.dtype
    mode = READ_BEFORE if before else READ
    groups, width = min(q.shape[2], k.shape[2]), max(borders.shape[3:])
    for rows, pieces in blocks(batch, count, heads, groups, CHUNK, width, TILE):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *borders.shape[3:])
        if grad_final is None:
            state = torch.zeros(shape, dtype=dtype, device=w.device)
        else:
            state = grad_final[corner].to(dtype).reshape(shape)
        for tile in reversed(pieces):
            qt, kt, given, dt = (load(x, rows, tile, dtype) for x in (q, k, w, grad))
            strength = None if beta is None else load(beta, rows, tile, dtype)
            wt = given if strength is None else given * strength
            if scale != 1:
                qt.mul_(scale)
            gate = gate_of(g, rows, tile, dtype, backward=dg is not None, exclusive=before)
            inside = gate.scores(qt, kt, mode)
            dwt = torch.bmm(inside.transpose(1, 2), dt)
            # A first chunk may read nothing, and a last one not be read.
            if _fresh(x, tile):
                starts, after, dqt = None, state, torch.zeros_like(qt)
            else:
                part = borders[tile.chunk : tile.chunk + tile.number, *corner]
                starts = part.reshape(-1, *shape[1:])
                reads = gate.head(qt, before)
                dqt = gate.head_backward(torch.bmm(dt, starts.transpose(1, 2)), reads, before)
                local = torch.bmm(reads.transpose(1, 2), dt).view(tile.number, *shape)
                total = gate.total_of(tile.number)
                # gradients of the states: ends[c] is that of the state after chunk c - 1
                ends = torch.empty(tile.number + 1, *shape, dtype=dtype, device=w.device)
                ends[tile.number] = state
                for c in reversed(range(tile.number)):
                    carry(ends[c + 1], local[c], None if total is None else total[c], ends[c])
                state = ends[0]
                after = ends[1:].view(-1, *shape[1:])
            if grad_final is not None or tile.stop < count or tile.number > 1:
                writes = gate.tail(kt)
                dwt.baddbmm_(writes, after)
                dkt = gate.tail_backward(torch.bmm(wt, after.transpose(1, 2)), writes)
            else:
                dkt = torch.zeros_like(kt)
            if dbeta is not None:
                store(dbeta, (dwt * given).sum(-1, keepdim=True), rows, tile)
            store(dw, dwt if strength is None else dwt.mul_(strength), rows, tile)
            pairs = torch.bmm(dt, wt.transpose(1, 2))
            gate.scores_backward(pairs, inside, qt, kt, mode, dqt, dkt)
            store(dq, dqt if scale == 1 else dqt.mul_(scale), rows, tile)
            store(dk, dkt, rows, tile)
            if dg is not None:
                store(dg, gate.finish(starts, after), rows, tile)
        if x.initial_state is not None:
            dinitial[corner].copy_(state.view(dinitial[corner].shape))


def _allocate(x: GatedLinear, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = x.w.shape
    like = x.w.new_empty((), dtype=compute_dtype(x.q, x.k, x.w))
    shape = (heads, x.k.shape[3], size)
    total = slots(x.cu_seqlens, batch, tokens, CHUNK) if keep else 0
    return (
        empty_as(x.w),
        like.new_empty(sequences(x.cu_seqlens, batch), *shape),
        like.new_empty(total, *shape),
    )


def _run(x: GatedLinear, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, final, borders = found = _allocate(x, keep)
    begin(final, x.initial_state)
    over_sequences(_forward, x, CHUNK, results=[out], final=[final], kept=[borders] * keep)
    return found


def _gradients(
    x: GatedLinear, grads: Any, wanted: Any, borders: Tensor
) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    found = rooms_for(x, wanted, "q", "k", "w", "g", "beta")
    dinitial = borders.new_empty(sequences(x.cu_seqlens, x.w.shape[0]), *borders.shape[1:])
    if wanted.initial_state:
        begin(dinitial, grad_final)
    over_sequences(
        _backward,
        x,
        CHUNK,
        tokens=[torch.zeros_like(x.w) if grad is None else grad],
        states=[grad_final],
        results=found,
        final=[dinitial],
        kept=[borders],
    )
    return *found, dinitial, None


_linear = register(
    "chunked_linear",
    GatedLinear,
    results=("out", "final"),
    kept=("borders",),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def linear(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T Hk K"],
    w: Float[Tensor, "B T HV V"],
    g: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    *,
    beta: Float[Tensor, "B T HV"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "N HV K V"] | None = None,
    read: str = "post",
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"]]:
    """Gated linear attention in chunks of 32 tokens.

        S_t = Diag(exp g_t) S_{t-1} + k_t w_t^T        o_t = S_t^T q_t   (read "pre": S_{t-1}^T q_t)

    with w multiplied by beta and q by scale.

    With D(i, j) the product of the decays of tokens j+1 .. i, a chunk that starts at state S is

        o_i = (q_i . D(i, 0))^T S + sum_{j <= i} (q_i . D(i, j) k_j) w_j
        S'  = D(C, 0) S + sum_j (D(C, j) k_j) w_j^T

    and the backward pass runs the same matmuls in reverse from the states at the chunk borders,
    which are all that is kept (K V / 32 numbers per token and head).

    Args:
        q: queries. Any floating dtype.
        k: keys.
        w: values; their dtype is the output's.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        beta: write gate, which multiplies w; None is 1.
        scale: multiplies q.
        initial_state: S_0; None is zeros.
        read: "post" reads after the write of the token, "pre" before its decay and write.
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.

    Returns:
        o in the dtype of w, and the final state in float32 (float64 for float64 operands).

    Raises:
        ValueError: for shapes that do not fit together or an unknown `read`.

    Reference:
        Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
        ICML 2024, arXiv:2312.06635, section 4.
    """
    checks.choice("read", read, ("post", "pre"))
    checks.tokens(q=q, k=k, w=w)
    checks.heads(w.shape[2], q=q, k=k)
    checks.gate("g", g, k, w)
    checks.packing(cu_seqlens, w)
    checks.state("initial_state", initial_state, cu_seqlens, w, k.shape[3], w.shape[3])
    checks.factors(w, beta=beta)
    x = GatedLinear(q, k, w, g, beta, initial_state, cu_seqlens, read, scale)
    if w.shape[1] == 1 and cu_seqlens is None:
        out, final = x.loop()
    else:
        out, final = _linear(*x)
    return out, final
