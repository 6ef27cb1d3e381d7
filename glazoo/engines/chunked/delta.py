"""The delta class: UT/WY form of gated delta rules with separate erase and write keys."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Rows,
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
from glazoo.engines.chunked.gates import ERASE, READ, READ_BEFORE, NoGate, corners, gate_of
from glazoo.kernels.loops import GatedDelta, compute_dtype
from glazoo.kernels.register import register

CHUNK = 32
# Diagonal blocks of the triangular system of this size are inverted by substitution, larger ones
# by block elimination, which is matmuls.
BLOCK = 8


def _unit_lower_inverse(system: Tensor) -> Tensor:
    """Inverse of I + strictly lower part of system [N, C, C]."""
    count, size, _ = system.shape
    block = min(BLOCK, size)
    parts = system.view(count, size // block, block, size // block, block)
    parts = parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, block, block)
    unit = torch.eye(block, dtype=system.dtype, device=system.device).expand_as(parts)
    solved: Tensor = torch.linalg.solve_triangular(parts, unit, upper=False, unitriangular=True)
    if block == size:
        return solved.contiguous()
    inverse = torch.zeros_like(system)
    target = inverse.view(count, size // block, block, size // block, block)
    target.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).copy_(solved.view(count, -1, block, block))
    half = block
    while half < size:
        number = size // (2 * half)
        both = inverse.view(count, number, 2 * half, number, 2 * half)
        both = both.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        first = both[:, :, :half, :half].reshape(-1, half, half)
        second = both[:, :, half:, half:].reshape(-1, half, half)
        below = corners(system, half).reshape(-1, half, half)
        below = torch.bmm(torch.bmm(second, below), first)
        corners(inverse, half).copy_(below.neg_().view(count, number, half, half))
        half *= 2
    return inverse


class _System:
    """What the forward and the backward pass of a tile both need."""

    def __init__(
        self,
        x: GatedDelta,
        rows: Rows,
        tile: Tile,
        dtype: torch.dtype,
        inverse: Tensor | None = None,
        backward: bool = False,
    ) -> None:
        previous = x.base == "prev"
        self.q, self.k = load(x.q, rows, tile, dtype), load(x.k, rows, tile, dtype)
        if x.scale != 1:
            self.q.mul_(x.scale)
        # The erase key as it is given, and times its gate.
        self.eraser = self.e = self.k if x.e is None else load(x.e, rows, tile, dtype)
        self.strength = None
        if x.erase is not None:
            self.strength = load(x.erase, rows, tile, dtype)
            self.e = self.eraser * self.strength
        self.gate: NoGate = gate_of(x.g, rows, tile, dtype, backward, exclusive=previous)
        self.previous = previous
        self.mode = READ_BEFORE if previous else ERASE
        self.read = self.gate.scores(self.q, self.k, READ)
        self.erase = self.gate.scores(self.e, self.k, self.mode)
        self.inverse = _unit_lower_inverse(self.erase) if inverse is None else inverse
        self.reads = self.gate.head(self.q)
        self.erases = self.gate.head(self.e, previous)
        self.writes = self.gate.tail(self.k)


def _groups(x: GatedDelta) -> int:
    """Groups of value heads that share a query or a key, of which a tile splits none."""
    return min(y.shape[2] for y in (x.q, x.e, x.k) if y is not None)


def _part(kept: Tensor, tile: Tile, corner: tuple[slice, slice]) -> Tensor:
    """Where a tile keeps what kept [chunks, B, HV, ...] holds of it, [n, b, h, ...]."""
    return kept[tile.chunk : tile.chunk + tile.number, *corner]


def _forward(
    x: GatedDelta, _tokens: Any, _states: Any, results: Any, finals: Any, kept: Any
) -> None:
    w, beta, initial = x.w, x.beta, x.initial_state
    (out,), (final,) = results, finals
    batch, count, heads, _ = w.shape
    dtype, groups = final.dtype, _groups(x)
    width = max(final.shape[2:])
    for rows, pieces in blocks(batch, count, heads, groups, CHUNK, width):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *final.shape[2:])
        if initial is None:
            state = torch.zeros(shape, dtype=dtype, device=w.device)
        else:
            state = initial[corner].to(dtype).reshape(shape)
        for tile in pieces:
            wt = load(w, rows, tile, dtype)
            if beta is not None:
                wt.mul_(load(beta, rows, tile, dtype))
            s = _System(x, rows, tile, dtype)
            split = (tile.number, rows.number, tile.size, -1)
            errors = torch.bmm(s.inverse, wt)
            cells = errors.view(split)
            erases = torch.bmm(s.inverse, s.erases).view(split)
            writes = s.writes.view(split).transpose(2, 3)
            total = s.gate.total_of(tile.number)
            border = torch.empty(tile.number + 1, *shape, dtype=dtype, device=w.device)
            border[0] = state
            for c in range(tile.number):
                cells[c].baddbmm_(erases[c], border[c], alpha=-1)
                if total is None:
                    torch.baddbmm(border[c], writes[c], cells[c], out=border[c + 1])
                else:
                    torch.mul(border[c], total[c], out=border[c + 1])
                    border[c + 1].baddbmm_(writes[c], cells[c])
            state = border[tile.number]
            starts = border[: tile.number].view(-1, *shape[1:])
            result = torch.bmm(s.read, errors).baddbmm_(s.reads, starts)
            store(out, result, rows, tile)
            if kept:
                borders, inverses, errors_kept = kept
                # A part-filled chunk uses the first rows (and columns) of its room.
                for room, found in (
                    (_part(borders, tile, corner), starts),
                    (_part(inverses, tile, corner)[..., : tile.size, : tile.size], s.inverse),
                    (_part(errors_kept, tile, corner)[..., : tile.size, :], errors),
                ):
                    room.copy_(found.view(room.shape))
        final[corner].copy_(state.view(final[corner].shape))


def _backward(
    x: GatedDelta, tokens: Any, states: Any, results: Any, finals: Any, kept: Any
) -> None:
    (grad,), (grad_final,), (dinitial,) = tokens, states, finals
    dq, de, dk, dw, dg, dbeta, derase = results
    borders, inverses, errors_kept = kept
    batch, count, heads, _ = grad.shape
    dtype, groups = borders.dtype, _groups(x)
    width = max(borders.shape[3:])
    for rows, pieces in blocks(batch, count, heads, groups, CHUNK, width):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *borders.shape[3:])
        if grad_final is None:
            state = torch.zeros(shape, dtype=dtype, device=grad.device)
        else:
            state = grad_final[corner].to(dtype).reshape(shape)
        for tile in reversed(pieces):
            dt = load(grad, rows, tile, dtype)
            inverse = _part(inverses, tile, corner)[..., : tile.size, : tile.size]
            inverse = inverse.reshape(-1, tile.size, tile.size)
            s = _System(x, rows, tile, dtype, inverse, dg is not None)
            split = (tile.number, rows.number, tile.size, -1)
            starts = _part(borders, tile, corner).reshape(-1, *shape[1:])
            errors = _part(errors_kept, tile, corner)[..., : tile.size, :]
            errors = errors.reshape(-1, tile.size, shape[2])
            # the adjoint of the triangular solve, for both what the chunk reads and what it leaves
            adjoint = s.inverse.transpose(1, 2)
            right = torch.bmm(adjoint, torch.bmm(s.read.transpose(1, 2), dt))
            cells = right.view(split)
            leaves = torch.bmm(adjoint, s.writes).view(split)
            local = torch.bmm(s.reads.transpose(1, 2), dt).view(tile.number, *shape)
            erases = s.erases.view(split).transpose(2, 3)
            total = s.gate.total_of(tile.number)
            ends = torch.empty(tile.number + 1, *shape, dtype=dtype, device=grad.device)
            ends[tile.number] = state
            for c in reversed(range(tile.number)):
                cells[c].baddbmm_(leaves[c], ends[c + 1])
                carry(ends[c + 1], local[c], None if total is None else total[c], ends[c])
                ends[c].baddbmm_(erases[c], cells[c], alpha=-1)
            state = ends[0]
            after = ends[1:].view(-1, *shape[1:])
            gate = s.gate
            dqt = gate.head_backward(torch.bmm(dt, starts.transpose(1, 2)), s.reads)
            left = right.neg()
            det = gate.head_backward(torch.bmm(left, starts.transpose(1, 2)), s.erases, s.previous)
            dkt = gate.tail_backward(torch.bmm(errors, after.transpose(1, 2)), s.writes)
            pairs = torch.bmm(dt, errors.transpose(1, 2))
            gate.scores_backward(pairs, s.read, s.q, s.k, READ, dqt, dkt)
            pairs = torch.bmm(left, errors.transpose(1, 2))
            gate.scores_backward(pairs, s.erase, s.e, s.k, s.mode, det, dkt)
            store(dq, dqt if x.scale == 1 else dqt.mul_(x.scale), rows, tile)
            if x.beta is not None:
                if dbeta is not None:
                    product = right * load(x.w, rows, tile, dtype)
                    store(dbeta, product.sum(-1, keepdim=True), rows, tile)
                right.mul_(load(x.beta, rows, tile, dtype))
            store(dw, right, rows, tile)
            if s.strength is not None:
                if derase is not None:
                    store(derase, (det * s.eraser).sum(-1, keepdim=True), rows, tile)
                det.mul_(s.strength)
            if x.e is None:
                dkt.add_(det)
            store(de, det, rows, tile)
            store(dk, dkt, rows, tile)
            if dg is not None:
                store(dg, gate.finish(starts, after), rows, tile)
        dinitial[corner].copy_(state.view(dinitial[corner].shape))


def _allocate(x: GatedDelta, keep: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, size = x.w.shape
    like = x.w.new_empty((), dtype=compute_dtype(x.q, x.k, x.w))
    shape = (heads, x.k.shape[3], size)
    total = slots(x.cu_seqlens, batch, tokens, CHUNK) if keep else 0
    return (
        empty_as(x.w),
        like.new_empty(sequences(x.cu_seqlens, batch), *shape),
        like.new_empty(total, *shape),
        like.new_empty(total, heads, CHUNK, CHUNK),
        like.new_empty(total, heads, CHUNK, size),
    )


def _run(x: GatedDelta, keep: bool) -> tuple[Tensor, ...]:
    out, final, *kept = found = _allocate(x, keep)
    begin(final, x.initial_state)
    over_sequences(_forward, x, CHUNK, results=[out], final=[final], kept=kept if keep else [])
    return found


def _gradients(x: GatedDelta, grads: Any, wanted: Any, *kept: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    found = rooms_for(x, wanted, "q", "e", "k", "w", "g", "beta", "erase")
    shape = (sequences(x.cu_seqlens, x.w.shape[0]), *kept[0].shape[1:])
    dinitial = kept[0].new_empty(shape)
    begin(dinitial, grad_final)
    over_sequences(
        _backward,
        x,
        CHUNK,
        tokens=[torch.zeros_like(x.w) if grad is None else grad],
        states=[grad_final],
        results=found,
        final=[dinitial],
        kept=kept,
    )
    return *found, dinitial, None


_delta = register(
    "chunked_delta",
    GatedDelta,
    results=("out", "final"),
    kept=("borders", "inverses", "errors"),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def delta(
    q: Float[Tensor, "B T Hq K"],
    e: Float[Tensor, "B T He K"] | None,
    k: Float[Tensor, "B T Hk K"],
    w: Float[Tensor, "B T HV V"],
    g: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    *,
    beta: Float[Tensor, "B T HV"] | None = None,
    erase: Float[Tensor, "B T HV"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "N HV K V"] | None = None,
    base: str = "decayed",
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"]]:
    """Gated delta rule with separate erase and write keys, in chunks of 32 tokens.

        S'_t = Diag(exp g_t) S_{t-1}        S_t = S'_t + k_t u_t^T        o_t = S_t^T q_t
        u_t  = w_t - X_t^T e_t              X_t = S'_t (base "decayed") or S_{t-1} (base "prev")

    with w multiplied by beta, e by erase and q by scale.

    With D(i, j) the product of the decays of tokens j+1 .. i (without that of i for base "prev"
    where e_i reads), the u of a chunk that starts at state S solve a unit lower triangular system,

        (I + E) u = w - (e . D(., 0)) S,        E_ij = e_i . D(i, j) k_j  for j < i

    whose inverse is formed once per chunk; given u the rest is the linear class. The backward pass
    has kept u, the inverses and the states at chunk borders: V + 32 + K V / 32 numbers per token
    and head.

    Args:
        q: queries. Any floating dtype.
        e: erase keys; None is k.
        k: write keys.
        w: values; their dtype is the output's.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        beta: write gate, which multiplies w; None is 1.
        erase: erase gate, which multiplies e: the write gate for Gated DeltaNet; None is 1.
        scale: multiplies q.
        initial_state: S_0; None is zeros.
        base: the state that is corrected, "decayed" or "prev".
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.

    Returns:
        o in the dtype of w, and the final state in float32 (float64 for float64 operands).

    Raises:
        ValueError: for shapes that do not fit together or an unknown `base`.

    Reference:
        Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", ICLR 2025,
        arXiv:2412.06464, section 3.3.
    """
    checks.choice("base", base, ("decayed", "prev"))
    checks.tokens(q=q, e=e, k=k, w=w)
    checks.heads(w.shape[2], q=q, e=e, k=k)
    checks.gate("g", g, k, w)
    checks.packing(cu_seqlens, w)
    checks.state("initial_state", initial_state, cu_seqlens, w, k.shape[3], w.shape[3])
    checks.factors(w, beta=beta, erase=erase)
    x = GatedDelta(q, e, k, w, g, beta, erase, initial_state, cu_seqlens, base, scale)
    if w.shape[1] == 1 and cu_seqlens is None:
        out, final = x.loop()
    else:
        out, final = _delta(*x)
    return out, final
