"""The synapse class: one importance per synapse, two linear states read through their ratio."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Rows,
    Tile,
    begin,
    carry,
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
from glazoo.engines.chunked.gates import NoGate, gate_of
from glazoo.kernels import loops
from glazoo.kernels.loops import Synapse, compute_dtype
from glazoo.kernels.register import register

# Tokens between two states that are kept for the backward pass.
CHUNK = 256
# Tokens that the per-token loop walks; states at these borders come from matmuls.
SUB = 16
# Synapses that one step of the loop updates per thread; fewer pay for more calls, more leave the
# caches of a core.
BLOCK = 65536
# Synapses of all sub-chunk states of a tile.
SPAN = 1 << 20


def _tiles(tokens: int) -> list[Tile]:
    found = []
    for chunk, start in enumerate(range(0, tokens, CHUNK)):
        stop = min(start + CHUNK, tokens)
        size = min(SUB, 1 << (stop - start - 1).bit_length())
        found.append(Tile(start, stop, -(-(stop - start) // size), size, chunk))
    return found


def _rows(batch: int, heads: int, groups: int, synapses: int) -> Iterator[Rows]:
    return row_blocks(batch, heads, groups, max(1, SPAN * SUB // (CHUNK * synapses)))


def _spans(count: int, synapses: int) -> Iterator[slice]:
    """Slices of the independent sub-chunks of a tile, each small enough for the caches."""
    step = max(1, BLOCK * torch.get_num_threads() // synapses)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


class _Tile(NamedTuple):
    """Operands of a tile [n * R, C, .] and the states at the start of every sub-chunk."""

    q: Tensor
    k: Tensor
    w: Tensor
    b: Tensor
    decay: Tensor | None
    gate: NoGate
    keys: Tensor
    squares: Tensor
    h: Tensor
    j: Tensor


def _prepare(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None,
    state: tuple[Tensor, Tensor],
    rows: Rows,
    tile: Tile,
    backward: bool = False,
) -> tuple[_Tile, tuple[Tensor, Tensor]]:
    """Loads a tile and scans the linear states over its sub-chunks by matmuls."""
    dtype = state[0].dtype
    qt, kt, wt, bt = (load(x, rows, tile, dtype) for x in (q, k, w, b))
    gate = gate_of(g, rows, tile, dtype, backward)
    decay = None if g is None else load(g, rows, tile, dtype).exp_()
    total = gate.total_of(tile.number)
    found, final = [], []
    factors = (gate.tail(kt), gate.tail(kt.square()))
    for keys, values, start in zip(factors, (wt, bt), state, strict=True):
        writes = torch.bmm(keys.transpose(1, 2), values).view(tile.number, *start.shape)
        border = start.new_empty(tile.number + 1, *start.shape)
        border[0] = start
        for c in range(tile.number):
            carry(border[c], writes[c], None if total is None else total[c], border[c + 1])
        found.append(border[: tile.number].view(-1, *start.shape[1:]))
        final.append(border[tile.number])
    made = _Tile(qt, kt, wt, bt, decay, gate, *factors, found[0], found[1])
    return made, (final[0], final[1])


def _stack(first: Tensor, second: Tensor, span: slice, dim: int) -> tuple[Tensor, ...]:
    """Per token, the rows of both operands of a span, [2 N, D] with an axis of 1 at dim."""
    both = torch.stack((first[span], second[span])).permute(2, 0, 1, 3)
    return both.flatten(1, 2).contiguous().unsqueeze(dim).unbind(0)


def _each(x: Tensor, span: slice, dim: int) -> tuple[Tensor, ...]:
    """Per token, the rows of a span, [N, D] with an axis of 1 at dim."""
    return x[span].transpose(0, 1).contiguous().unsqueeze(dim).unbind(0)


def _read(
    t: _Tile, span: slice, floor: Tensor, before: bool, out: Tensor, doubt: Tensor | None
) -> None:
    """The per-token loop of a span of sub-chunks; fills out (and doubt) [N, C, V].

    h and J are one array of 2 N rows, so that each step updates both in one pass.
    """
    keys = _stack(t.k, t.k.square(), span, -1)
    values = _stack(t.w, t.b, span, -2)
    decay = None if t.decay is None else _stack(t.decay, t.decay, span, -1)
    query = _each(t.q, span, -2)
    squares = None if doubt is None else _each(t.q.square(), span, -2)
    state = torch.cat((t.h[span], t.j[span]))
    h, j = state.chunk(2)
    ratio = torch.empty_like(h)
    steps, count, size = len(keys), h.shape[0], h.shape[2]
    result = out.new_empty(steps, count, 1, size)
    spread = torch.empty_like(result) if doubt is not None else None
    into = result.unbind(0)
    into_spread = () if spread is None else spread.unbind(0)

    def read(i: int) -> None:
        torch.add(j, floor, out=ratio)
        if squares is None:
            torch.div(h, ratio, out=ratio)
        else:
            ratio.reciprocal_()
            torch.bmm(squares[i], ratio, out=into_spread[i])
            ratio.mul_(h)
        torch.bmm(query[i], ratio, out=into[i])

    for i in range(steps):
        if before:
            read(i)
        if decay is not None:
            state.mul_(decay[i])
        state.addcmul_(keys[i], values[i])
        if not before:
            read(i)
    out[span] = result.squeeze(2).transpose(0, 1)
    if doubt is not None and spread is not None:
        doubt[span] = spread.squeeze(2).transpose(0, 1)


def _forward(x: Synapse, _tokens: Any, _states: Any, results: Any, finals: Any, kept: Any) -> None:
    q, k, w, b, g, prior, *initial, _, read, _, _ = x
    out, doubt = results
    batch, count, heads, size = w.shape
    dtype = finals[0].dtype
    synapses = k.shape[3] * size
    for rows in _rows(batch, heads, min(q.shape[2], k.shape[2]), synapses):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, k.shape[3], size)
        h, j = (start_of(y, corner, shape, finals[0]) for y in initial)
        floor = floor_of(prior, rows, dtype)
        for tile in _tiles(count):
            if kept:
                for store_in, value in zip(kept, (h, j), strict=True):
                    part = store_in[tile.chunk, *corner]
                    part.copy_(value.view(part.shape))
            t, (h, j) = _prepare(q, k, w, b, g, (h, j), rows, tile)
            result = torch.empty_like(t.w)
            spread = None if doubt is None else torch.empty_like(t.w)
            floors = floor.repeat(tile.number, 1, 1)
            for span in _spans(result.shape[0], synapses):
                _read(t, span, floors[span], read == "pre", result, spread)
            store(out, result, rows, tile)
            if doubt is not None:
                store(doubt, needed(spread), rows, tile)
        for state, value in zip(finals, (h, j), strict=True):
            state[corner].copy_(value.view(state[corner].shape))


def _room(pieces: list[Tile], rows: int, synapses: int, like: Tensor) -> Tensor:
    """Room for the states of all tokens of any span of these tiles."""
    longest = max(tile.size for tile in pieces)
    widest = max(tile.number * rows for tile in pieces)
    span = next(_spans(widest, synapses))
    return like.new_empty(longest + 1, 2 * span.stop, *like.shape[3:])


class _Local(NamedTuple):
    """Gradients from reads inside a sub-chunk, [n * R, C, .]; h and j: of its start state."""

    q: Tensor
    k: Tensor
    w: Tensor
    b: Tensor
    g: Tensor | None
    prior: Tensor | None
    h: Tensor
    j: Tensor


def _unread(
    t: _Tile,
    span: slice,
    floor: Tensor,
    before: bool,
    grad: Tensor,
    grad_doubt: Tensor | None,
    local: _Local,
    room: Tensor,
) -> None:
    """The per-token loop forward (states only) and backward (gradients) of a span.

    The states of its tokens are kept in room [C + 1, at least 2 N, K, V], which all spans share.
    """
    keys, values = _stack(t.k, t.k.square(), span, -1), _stack(t.w, t.b, span, -2)
    decay = None if t.decay is None else _stack(t.decay, t.decay, span, -1)
    query, dy = _each(t.q, span, -1), _each(grad, span, -2)
    du = squares = None
    if grad_doubt is not None:
        du, squares = _each(grad_doubt, span, -2), _each(t.q.square(), span, -1)
    start = torch.cat((t.h[span], t.j[span]))
    steps, rows = len(keys), start.shape[0]
    state = room[: steps + 1, :rows].unbind(0)
    state[0].copy_(start)
    for i in range(steps):
        if decay is None:
            torch.addcmul(state[i], keys[i], values[i], out=state[i + 1])
        else:
            torch.mul(state[i], decay[i], out=state[i + 1])
            state[i + 1].addcmul_(keys[i], values[i])
    halves = [x.chunk(2) for x in state]
    grads = torch.zeros_like(start)
    backward = grads.transpose(1, 2)
    dh, dj = grads.chunk(2)
    both = torch.empty_like(start)
    inverse, slope, scratch = (torch.empty_like(dh) for _ in range(3))
    turned = scratch.transpose(1, 2)
    size, width = start.shape[2], start.shape[1]
    dq = start.new_empty(steps, rows // 2, 1, width)
    dvalues = start.new_empty(steps, rows, 1, size)
    dkeys = start.new_empty(steps, rows, 1, width)
    dg = None if local.g is None else start.new_empty(steps, rows, width)
    dprior = None if local.prior is None else torch.zeros_like(dh)
    into_q, into_values, into_keys = dq.unbind(0), dvalues.unbind(0), dkeys.unbind(0)
    into_g = () if dg is None else dg.unbind(0)
    columns = [x.transpose(1, 2) for x in keys]

    def unread(i: int, at: int) -> None:
        h, j = halves[at]
        torch.add(j, floor, out=inverse).reciprocal_()
        torch.mul(inverse, query[i], out=slope).mul_(dy[i])
        dh.add_(slope)
        torch.mul(inverse, h, out=scratch)
        torch.bmm(dy[i], turned, out=into_q[i])
        scratch.mul_(slope)
        if du is not None and squares is not None:
            reader = 2 * torch.bmm(du[i], inverse.transpose(1, 2))
            into_q[i].addcmul_(reader, query[i].transpose(1, 2))
            inverse.square_().mul_(squares[i])
            scratch.addcmul_(inverse, du[i])
        dj.sub_(scratch)
        if dprior is not None:
            dprior.sub_(scratch)

    for i in reversed(range(steps)):
        if not before:
            unread(i, i + 1)
        torch.bmm(columns[i], grads, out=into_values[i])
        torch.bmm(values[i], backward, out=into_keys[i])
        if decay is not None:
            if dg is not None:
                torch.mul(state[i], grads, out=both)
                torch.sum(both, -1, out=into_g[i])
            grads.mul_(decay[i])
        if before:
            unread(i, i)

    def home(x: Tensor) -> Tensor:
        return rearrange(x, "t n 1 d -> n t d")

    through_h, through_j = (home(x) for x in dkeys.chunk(2, dim=1))
    local.q[span] = home(dq)
    local.k[span] = torch.addcmul(through_h, through_j, t.k[span], value=2)
    for target, value in zip((local.w, local.b), dvalues.chunk(2, dim=1), strict=True):
        target[span] = home(value)
    local.h[span], local.j[span] = dh, dj
    if dg is not None and local.g is not None and t.decay is not None:
        first, second = dg.chunk(2, dim=1)
        total = (first + second).transpose(0, 1)
        if local.g.shape[2] == 1:
            total = total.sum(-1, keepdim=True)
        torch.mul(total, t.decay[span], out=local.g[span])
    if dprior is not None and local.prior is not None:
        local.prior[span] = dprior.sum(-1)


def _backward(
    x: Synapse,
    tokens: Any,
    states: Any,
    results: Any,
    finals: Any,
    kept: Any,
    dprior: Tensor | None,
) -> None:
    q, k, w, b, g, prior, _, _, _, read, _, _ = x
    grad, grad_doubt = tokens
    dq, dk, dw, db, dg = results
    before = read == "pre"
    batch, count, heads, size = w.shape
    dtype = kept[0].dtype
    synapses = k.shape[3] * size
    for rows in _rows(batch, heads, min(q.shape[2], k.shape[2]), synapses):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, k.shape[3], size)
        state = [start_of(y, corner, shape, kept[0]) for y in states]
        floor = floor_of(prior, rows, dtype)
        pieces = list(reversed(_tiles(count)))
        room = _room(pieces, rows.number, synapses, kept[0])
        for tile in pieces:
            start = tuple(y[tile.chunk, *corner].reshape(shape) for y in kept)
            t, _ = _prepare(
                q, k, w, b, g, (start[0], start[1]), rows, tile, backward=dg is not None
            )
            dy = load(grad, rows, tile, dtype)
            du = None if grad_doubt is None else load(grad_doubt, rows, tile, dtype)
            local = _Local(
                torch.empty_like(t.q),
                torch.empty_like(t.k),
                torch.empty_like(t.w),
                torch.empty_like(t.b),
                None if dg is None else torch.empty_like(needed(t.decay)),
                None if dprior is None else t.k.new_empty(t.k.shape[0], t.k.shape[2]),
                torch.empty_like(t.h),
                torch.empty_like(t.j),
            )
            floors = floor.repeat(tile.number, 1, 1)
            for span in _spans(t.k.shape[0], synapses):
                _unread(t, span, floors[span], before, dy, du, local, room)
            # what later sub-chunks read came through the state at the end of this one
            total = t.gate.total_of(tile.number)
            after = []
            for i, entry in enumerate((local.h, local.j)):
                entries = entry.view(tile.number, *shape)
                ends = entry.new_empty(tile.number + 1, *shape)
                ends[tile.number] = state[i]
                for c in reversed(range(tile.number)):
                    carry(ends[c + 1], entries[c], None if total is None else total[c], ends[c])
                state[i] = ends[0]
                after.append(ends[1:].view(-1, *shape[1:]))
            local.w.baddbmm_(t.keys, after[0])
            local.b.baddbmm_(t.squares, after[1])
            through = torch.bmm(t.w, after[0].transpose(1, 2))
            local.k.add_(t.gate.tail_backward(through, t.keys))
            through = torch.bmm(t.b, after[1].transpose(1, 2))
            local.k.addcmul_(t.gate.tail_backward(through, t.squares), t.k, value=2)
            if dg is not None and local.g is not None:
                t.gate.finish(t.h, after[0])
                local.g.add_(t.gate.finish(t.j, after[1]))
                store(dg, local.g, rows, tile)
            for target, value in ((dq, local.q), (dk, local.k), (dw, local.w), (db, local.b)):
                store(target, value, rows, tile)
            if dprior is not None and local.prior is not None:
                part = local.prior.view(tile.number * rows.batch, rows.width, -1).sum(0)
                if dprior.shape[1] == 1:
                    part = part.sum(-1, keepdim=True)
                dprior[rows.h0 : rows.h1].add_(part)
        for target, value in zip(finals, state, strict=True):
            target[corner].copy_(value.view(target[corner].shape))


def _allocate(x: Synapse, keep: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, size = x.w.shape
    like = x.w.new_empty((), dtype=compute_dtype(x.q, x.k, x.w, x.b))
    shape = (heads, x.k.shape[3], size)
    total = slots(x.cu_seqlens, batch, tokens, CHUNK) if keep else 0
    counts = (*[sequences(x.cu_seqlens, batch)] * 2, *[total] * 2)
    h, j, *kept = (like.new_empty(count, *shape) for count in counts)
    return empty_as(x.w), h, j, empty_as(x.w, x.uncertainty), *kept


def _run(x: Synapse, keep: bool) -> tuple[Tensor, ...]:
    out, h, j, doubt, *kept = found = _allocate(x, keep)
    begin(h, x.h)
    begin(j, x.j)
    over_sequences(
        _forward,
        x,
        CHUNK,
        results=[out, doubt if x.uncertainty else None],
        final=[h, j],
        kept=kept if keep else [],
    )
    return found


def _gradients(x: Synapse, grads: Any, wanted: Any, *kept: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_h, grad_j, grad_doubt = grads
    found = rooms_for(x, wanted, "q", "k", "w", "b", "g")
    # summed over all tokens in the compute dtype
    dprior = kept[0].new_zeros(x.prior.shape) if wanted.prior else None
    shape = (sequences(x.cu_seqlens, x.w.shape[0]), *kept[0].shape[1:])
    dinitial = [kept[0].new_empty(shape) for _ in range(2)]
    begin(dinitial[0], grad_h)
    begin(dinitial[1], grad_j)
    over_sequences(
        functools.partial(_backward, dprior=dprior),
        x,
        CHUNK,
        tokens=[torch.zeros_like(x.w) if grad is None else grad, grad_doubt],
        states=[grad_h, grad_j],
        results=found,
        final=dinitial,
        kept=kept,
    )
    return *found, dprior, *dinitial, None


_synapse = register(
    "chunked_synapse",
    Synapse,
    results=("out", "final_h", "final_j", "doubt"),
    kept=("kept_h", "kept_j"),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def synapse(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T Hk K"],
    w: Float[Tensor, "B T HV V"],
    b: Float[Tensor, "B T HV V"],
    g: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    *,
    prior: Float[Tensor, " HV"] | Float[Tensor, "HV K"],
    initial_state: tuple[Tensor, Tensor] | None = None,
    read: str = "post",
    uncertainty: bool = False,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    operator: Callable[..., Any] = _synapse,
) -> tuple[
    Float[Tensor, "B T HV V"],
    tuple[Float[Tensor, "N HV K V"], Float[Tensor, "N HV K V"]],
    Float[Tensor, "B T HV V"] | None,
]:
    """Palimpsa in its natural parameters: memory and importance of every synapse.

        h_t = Diag(exp g_t) h_{t-1} + k_t w_t^T        J_t = Diag(exp g_t) J_{t-1} + k_t^2 b_t^T
        o_t = (h_t / (J_t + I_p))^T q_t                (read "pre": of the states of t - 1)

    h and J are linear, so their values every 16 tokens come from matmuls; all these sub-chunks are
    then walked at once, token by token, in arrays that fit in the cache.

    Memory: training keeps 2 K V / 256 numbers per token and head besides the operands (the states
    every 256 tokens) and recomputes the states of single tokens, 16 tokens of a few rows at a time.

    Gradients: with r = 1 / (J + I_p), X = h r and dy the gradient of o, a read owes

        dX = q dy^T      dh = dX . r      dJ = -dX . X . r      dq = X dy      dI_p = sum dJ

    to the states; dh and dJ are carried backward by the decays to dh_acc and dJ_acc, from which

        dw = dh_acc^T k      db = dJ_acc^T k^2      dk = dh_acc w + 2 k . (dJ_acc b)
        dg_t = exp(g_t) (<h_{t-1}, dh_acc_t> + <J_{t-1}, dJ_acc_t>)       (per key or per head).

    Inside a sub-chunk the loop does this; the part that flows through the state at its end is the
    linear class's backward pass, in matmuls.

    Args:
        q: queries, already scaled. Any floating dtype.
        k: keys.
        w: values times write gate; its dtype is the output's.
        b: importance gate per value channel, >= 0.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        prior: importance I_p > 0 of a synapse that was never written.
        initial_state: (h_0, J_0); None is zeros.
        read: "post" reads after the write of the token, "pre" before its decay and write.
        uncertainty: also return sum_k q_k^2 / (J_t + I_p)_k.
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.
        operator: what computes it, given the record of the operation; default: this engine's.

    Returns:
        o in the dtype of w, the final (h, J) in float32 (float64 for float64 operands), and the
        uncertainty in the dtype of w or None.

    Raises:
        ValueError: for shapes that do not fit together or an unknown `read`.

    Reference:
        Bonnet et al., "Learning to Remember, Learn, and Forget in Attention-Based Models",
        ICML 2026, arXiv:2602.09075.
    """
    checks.choice("read", read, ("post", "pre"))
    checks.tokens(q=q, k=k, w=w, b=b)
    checks.heads(w.shape[2], q=q, k=k)
    checks.shape("b", b, tuple(w.shape))
    checks.gate("g", g, k, w)
    checks.packing(cu_seqlens, w)
    heads, keys = w.shape[2], k.shape[3]
    checks.shape("prior", prior, (heads,), (heads, keys))
    for i, x in enumerate(initial_state or ()):
        checks.state(f"initial_state[{i}]", x, cu_seqlens, w, keys, w.shape[3])
    if w.shape[1] == 1 and cu_seqlens is None and operator is _synapse:
        return loops.synapse(
            q,
            k,
            w,
            b,
            g,
            prior=prior,
            initial_state=initial_state,
            read=read,
            uncertainty=uncertainty,
        )
    if prior.dim() == 1:
        prior = prior.unsqueeze(-1)
    h, j = initial_state or (None, None)
    out, h, j, doubt = operator(q, k, w, b, g, prior, h, j, cu_seqlens, read, uncertainty, True)
    return out, (h, j), doubt if uncertainty else None
