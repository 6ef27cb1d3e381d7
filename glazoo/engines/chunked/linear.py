"""The Hebbian class: matmul form of a gated linear recurrence."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    carry,
    compute_dtype,
    empty_as,
    load,
    needs_grad,
    over_sequences,
    repeat_heads,
    row_blocks,
    row_limit,
    sequences,
    slots,
    starting,
    store,
    tiles,
    without_autocast,
)
from glazoo.engines.chunked.gates import READ, READ_BEFORE, gate_of

CHUNK = 64


def _forward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    before: bool,
    out: Tensor,
    final: Tensor,
    borders: Tensor | None,
) -> None:
    """One batch of equally long sequences; `borders` [chunks, B, HV, K, V] is filled if given."""
    batch, tokens, heads, _ = w.shape
    dtype = final.dtype
    mode = READ_BEFORE if before else READ
    for rows in row_blocks(batch, heads, min(q.shape[2], k.shape[2]), row_limit(tokens, CHUNK)):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *final.shape[2:])
        if initial is None:
            state = torch.zeros(shape, dtype=dtype, device=w.device)
        else:
            state = initial[corner].to(dtype).reshape(shape)
        for tile in tiles(tokens, rows.number, CHUNK):
            qt, kt, wt = (load(x, rows, tile, dtype) for x in (q, k, w))
            gate = gate_of(g, rows, tile, dtype, exclusive=before)
            result = torch.bmm(gate.scores(qt, kt, mode), wt)
            writes = torch.bmm(gate.tail(kt).transpose(1, 2), wt).view(tile.number, *shape)
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
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    borders: Tensor,
    before: bool,
    dq: Tensor,
    dk: Tensor,
    dw: Tensor,
    dg: Tensor | None,
    dinitial: Tensor,
) -> None:
    batch, tokens, heads, _ = w.shape
    dtype = borders.dtype
    mode = READ_BEFORE if before else READ
    for rows in row_blocks(batch, heads, min(q.shape[2], k.shape[2]), row_limit(tokens, CHUNK)):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *borders.shape[3:])
        if grad_final is None:
            state = torch.zeros(shape, dtype=dtype, device=w.device)
        else:
            state = grad_final[corner].to(dtype).reshape(shape)
        for tile in reversed(tiles(tokens, rows.number, CHUNK)):
            qt, kt, wt, dt = (load(x, rows, tile, dtype) for x in (q, k, w, grad))
            gate = gate_of(g, rows, tile, dtype, backward=dg is not None, exclusive=before)
            starts = borders[tile.chunk : tile.chunk + tile.number, *corner].reshape(-1, *shape[1:])
            reads, writes = gate.head(qt, before), gate.tail(kt)
            local = torch.bmm(reads.transpose(1, 2), dt).view(tile.number, *shape)
            total = gate.total_of(tile.number)
            # gradients of the states: ends[c] is that of the state after chunk c - 1
            ends = torch.empty(tile.number + 1, *shape, dtype=dtype, device=w.device)
            ends[tile.number] = state
            for c in reversed(range(tile.number)):
                carry(ends[c + 1], local[c], None if total is None else total[c], ends[c])
            state = ends[0]
            after = ends[1:].view(-1, *shape[1:])
            inside = gate.scores(qt, kt, mode)
            dwt = torch.bmm(inside.transpose(1, 2), dt).baddbmm_(writes, after)
            store(dw, dwt, rows, tile)
            dkt = gate.tail_backward(torch.bmm(wt, after.transpose(1, 2)), writes)
            dqt = gate.head_backward(torch.bmm(dt, starts.transpose(1, 2)), reads, before)
            pairs = torch.bmm(dt, wt.transpose(1, 2))
            gate.scores_backward(pairs, inside, qt, kt, mode, dqt, dkt)
            store(dq, dqt, rows, tile)
            store(dk, dkt, rows, tile)
            if dg is not None:
                store(dg, gate.finish(starts, after), rows, tile)
        dinitial[corner].copy_(state.view(dinitial[corner].shape))


@torch.library.custom_op("glazoo::chunked_linear", mutates_args=())
@without_autocast
def _linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    before: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = w.shape
    out = empty_as(w)
    like = torch.empty((), dtype=compute_dtype(q, k, w), device=w.device)
    final = starting(initial, (sequences(cu_seqlens, batch), heads, k.shape[3], size), like)
    total = slots(cu_seqlens, batch, tokens, CHUNK) if keep else 0
    borders = like.new_empty(total, *final.shape[1:])

    def core(operands: Any, states: Any, results: Any, finals: Any, kept: Any) -> None:
        arguments: list[Any] = [
            *operands,
            *states,
            before,
            *results,
            *finals,
            kept[0] if kept else None,
        ]
        _forward(*arguments)

    over_sequences(
        core, cu_seqlens, CHUNK, [q, k, w, g], [initial], [out], [final], [borders] * keep
    )
    return out, final, borders


@_linear.register_fake
def _(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    before: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = w.shape
    dtype = compute_dtype(q, k, w)
    shape = (heads, k.shape[3], size)
    total = slots(cu_seqlens, batch, tokens, CHUNK) if keep else 0
    return (
        empty_as(w),
        w.new_empty(sequences(cu_seqlens, batch), *shape, dtype=dtype),
        w.new_empty(total, *shape, dtype=dtype),
    )


@torch.library.custom_op("glazoo::chunked_linear_backward", mutates_args=())
@without_autocast
def _linear_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    borders: Tensor,
    before: bool,
    with_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, size = w.shape
    dq, dk, dw = empty_as(q), empty_as(k), empty_as(w)
    dg = empty_as(w if g is None else g, with_gate)
    shape = (sequences(cu_seqlens, batch), heads, k.shape[3], size)
    dinitial = starting(grad_final, shape, borders)

    def core(operands: Any, states: Any, results: Any, finals: Any, kept: Any) -> None:
        gate = results[3] if with_gate else None
        arguments: list[Any] = [
            operands[0],
            *states,
            *operands[1:],
            *kept,
            before,
            *results[:3],
            gate,
            *finals,
        ]
        _backward(*arguments)

    results = [dq, dk, dw] + [dg] * with_gate
    over_sequences(
        core, cu_seqlens, CHUNK, [grad, q, k, w, g], [grad_final], results, [dinitial], [borders]
    )
    return dq, dk, dw, dg, dinitial


@_linear_backward.register_fake
def _(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    borders: Tensor,
    before: bool,
    with_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (sequences(cu_seqlens, w.shape[0]), w.shape[2], k.shape[3], w.shape[3])
    dg = empty_as(w if g is None else g, with_gate)
    return empty_as(q), empty_as(k), empty_as(w), dg, borders.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, w, g, initial, cu_seqlens, before, _ = inputs
    ctx.save_for_backward(q, k, w, g, cu_seqlens, output[2])
    ctx.before = before
    ctx.initial = None if initial is None else initial.dtype
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, grad: Any, grad_final: Any, grad_borders: Any) -> tuple[Any, ...]:
    q, k, w, g, cu_seqlens, borders = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(w)
    with_gate = g is not None and ctx.needs_input_grad[3]
    dq, dk, dw, dg, dinitial = _linear_backward(
        grad, grad_final, q, k, w, g, cu_seqlens, borders, ctx.before, with_gate
    )
    return (
        dq,
        dk,
        dw,
        dg if with_gate else None,
        None if ctx.initial is None else dinitial.to(ctx.initial),
        None,
        None,
        None,
    )


_linear.register_autograd(_pull, setup_context=_setup)


def _step(
    q: Tensor, k: Tensor, w: Tensor, g: Tensor | None, initial: Tensor | None, before: bool
) -> tuple[Tensor, Tensor]:
    """One token: elementwise update of the state and one matrix-vector product."""
    heads = w.shape[2]
    dtype = compute_dtype(q, k, w)
    read = repeat_heads(q[:, 0], heads).to(dtype).unsqueeze(-2)
    write = repeat_heads(k[:, 0], heads).to(dtype).unsqueeze(-1) * w[:, 0].to(dtype).unsqueeze(-2)
    if initial is None:
        new = write
    else:
        old = initial.to(dtype)
        if g is not None:
            decay = g[:, 0].to(dtype).exp().unsqueeze(-1)
            new = write + old * (decay.unsqueeze(-1) if g.dim() == 3 else decay)
        else:
            new = write + old
    if not before:
        source = new
    elif initial is None:
        source = torch.zeros_like(new)
    else:
        source = initial.to(dtype)
    return (read @ source).squeeze(-2).unsqueeze(1).to(w.dtype), new


def linear(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T Hk K"],
    w: Float[Tensor, "B T HV V"],
    g: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    *,
    initial_state: Float[Tensor, "N HV K V"] | None = None,
    read: str = "post",
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"]]:
    """Gated linear attention in chunks of 64 tokens.

        S_t = Diag(exp g_t) S_{t-1} + k_t w_t^T        o_t = S_t^T q_t   (read "pre": S_{t-1}^T q_t)

    With D(i, j) the product of the decays of tokens j+1 .. i, a chunk that starts at state S is

        o_i = (q_i . D(i, 0))^T S + sum_{j <= i} (q_i . D(i, j) k_j) w_j
        S'  = D(C, 0) S + sum_j (D(C, j) k_j) w_j^T

    and the backward pass runs the same matmuls in reverse from the states at the chunk borders,
    which are all that is kept (K V / 64 numbers per token and head).

    Args:
        q: queries, already scaled. Any floating dtype.
        k: keys.
        w: values times write gate; its dtype is the output's.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
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
    before = read == "pre"
    if w.shape[1] == 1 and cu_seqlens is None:
        with torch.autocast(w.device.type, enabled=False):
            return _step(q, k, w, g, initial_state, before)
    keep = needs_grad(q, k, w, g, initial_state)
    out, final, _ = _linear(q, k, w, g, initial_state, cu_seqlens, before, keep)
    return out, final
