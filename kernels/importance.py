"""Importance scan over keys: J_t = exp(g_t) J_{t-1} + b_t k_t^2, elementwise, forward and backward.

Three passes, so that one long sequence still fills a GPU: what each chunk does to an incoming
state (a factor and a term), the states that enter the chunks, and the scan inside each chunk. The
backward pass is the same scan in reverse, acc_t = dJ_t + exp(g_{t+1}) acc_{t+1}, with acc after the
last token the gradient of the final state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Chunks,
    Tiles,
    check_importance,
    launch,
    locate_chunk,
    locate_sequence,
    make_chunks,
    reduce_heads,
)
from .step import importance_step, is_step

CHUNK = 64


@triton.jit
def compose(a_x, b_x, a_y, b_y):
    """Apply x -> a_x x + b_x, then x -> a_y x + b_y."""
    return a_x * a_y, a_y * b_x + b_y


@triton.jit
def load_decay(g, row0, i_h, o_t, o_k, m_tk, HEAD: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    """exp(g) as a tile [BT, BK] whatever the gate's shape; 1 without a gate and where masked."""
    b_a = tl.where(m_tk, 1.0, 1.0)
    if g is not None:
        o_row = (row0 + o_t) * HV + i_h
        if HEAD:
            p_g = g + o_row[:, None] + tl.zeros_like(o_k)[None, :]
        else:
            p_g = g + o_row[:, None] * K + o_k[None, :]
        b_a = tl.exp(tl.load(p_g, mask=m_tk, other=0.0).to(tl.float32))
    return b_a


@triton.jit
def load_term(
    k, b, dj, row0, i_h, o_t, o_k, m_tk, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr
):
    """What a token adds: b k^2, or the gradient of J in the backward pass."""
    if dj is None:
        b_k = tl.load(
            k + ((row0 + o_t) * HK + i_h // (HV // HK))[:, None] * K + o_k[None, :],
            mask=m_tk,
            other=0.0,
        ).to(tl.float32)
        p_b = b + ((row0 + o_t) * HV + i_h)[:, None] + tl.zeros_like(o_k)[None, :]
        b_x = tl.load(p_b, mask=m_tk, other=0.0).to(tl.float32) * b_k * b_k
    else:
        b_x = tl.load(
            dj + ((row0 + o_t) * HV + i_h)[:, None] * K + o_k[None, :], mask=m_tk, other=0.0
        )
    return b_x


@triton.jit(do_not_specialize=["T"])
def importance_chunk_kernel(
    k,
    b,
    g,
    dj,
    factor,
    term,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    HEAD: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Factor and term with which a chunk maps the state that enters it; backward if dj is given."""
    i_k = tl.program_id(1)
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    rows = length - t0
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_tk = (o_t < rows)[:, None] & m_k[None, :]
    b_x = load_term(k, b, dj, bos + t0, i_h, o_t, o_k, m_tk, HK, HV, K)
    if dj is None:
        b_a = load_decay(g, bos + t0, i_h, o_t, o_k, m_tk, HEAD, HV, K)
        b_f, b_s = tl.associative_scan((b_a, b_x), 0, compose)
        m_end = (o_t == BT - 1)[:, None]
    else:
        m_next = (o_t + 1 < rows)[:, None] & m_k[None, :]
        b_a = load_decay(g, bos + t0 + 1, i_h, o_t, o_k, m_next, HEAD, HV, K)
        b_f, b_s = tl.associative_scan((b_a, b_x), 0, compose, reverse=True)
        m_end = (o_t == 0)[:, None]
    p_out = (i_c * HV + i_h) * K + o_k
    tl.store(factor + p_out, tl.sum(tl.where(m_end, b_f, 0.0), 0), mask=m_k)
    tl.store(term + p_out, tl.sum(tl.where(m_end, b_s, 0.0), 0), mask=m_k)


@triton.jit(do_not_specialize=["T"])
def importance_carry_kernel(
    factor,
    term,
    g,
    outside,
    entering,
    leaving,
    cu_seqlens,
    chunk_offsets,
    T,
    REVERSE: tl.constexpr,
    HEAD: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """State that enters every chunk and the one that leaves the sequence; from its end if REVERSE.

    outside: state that enters the sequence, zeros if None. The first token's own decay lies before
    the reversed scan's last step, so it is applied to what leaves.
    """
    i_k = tl.program_id(1)
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    bos, length, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_c = tl.arange(0, BC)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    p_out = (i_n.to(tl.int64) * HV + i_h) * K + o_k
    b_j = tl.zeros([BK], tl.float32)
    if outside is not None:
        b_j += tl.load(outside + p_out, mask=m_k, other=0.0).to(tl.float32)
    if n_t > 0:
        i_first = first + n_t - 1 if REVERSE else first
        tl.store(entering + (i_first * HV + i_h) * K + o_k, b_j, mask=m_k)
    for i in range(tl.cdiv(n_t, BC)):
        o_i = i * BC + o_c
        m_ck = (o_i < n_t)[:, None] & m_k[None, :]
        i_c = first + n_t - 1 - o_i if REVERSE else first + o_i
        p_c = (i_c * HV + i_h)[:, None] * K + o_k[None, :]
        b_f = tl.load(factor + p_c, mask=m_ck, other=1.0)
        b_x = tl.load(term + p_c, mask=m_ck, other=0.0)
        b_f, b_x = tl.associative_scan((b_f, b_x), 0, compose)
        b_x += b_f * b_j[None, :]
        m_next = (o_i + 1 < n_t)[:, None] & m_k[None, :]
        p_next = p_c - HV * K if REVERSE else p_c + HV * K
        tl.store(entering + p_next, b_x, mask=m_next)
        b_j = tl.sum(tl.where((o_c == BC - 1)[:, None], b_x, 0.0), 0)
    if REVERSE and g is not None:  # noqa: SIM102 (known when compiled; length is not)
        if length > 0:
            if HEAD:
                b_a = tl.load(g + bos * HV + i_h + tl.zeros_like(o_k))
            else:
                b_a = tl.load(g + (bos * HV + i_h) * K + o_k, mask=m_k, other=0.0)
            b_j *= tl.exp(b_a.to(tl.float32))
    tl.store(leaving + p_out, b_j, mask=m_k)


@triton.jit(do_not_specialize=["T"])
def importance_scan_kernel(
    k,
    b,
    g,
    entering,
    j,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    HEAD: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Importance after every token of a chunk, from the state that enters it."""
    i_k = tl.program_id(1)
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_tk = (o_t < length - t0)[:, None] & m_k[None, :]
    b_x = load_term(k, b, None, bos + t0, i_h, o_t, o_k, m_tk, HK, HV, K)
    b_a = load_decay(g, bos + t0, i_h, o_t, o_k, m_tk, HEAD, HV, K)
    b_f, b_s = tl.associative_scan((b_a, b_x), 0, compose)
    b_j = tl.load(entering + (i_c * HV + i_h) * K + o_k, mask=m_k, other=0.0)
    b_s += b_f * b_j[None, :]
    tl.store(j + ((bos + t0 + o_t) * HV + i_h)[:, None] * K + o_k[None, :], b_s, mask=m_tk)


@triton.jit(do_not_specialize=["T"])
def importance_backward_kernel(
    k,
    b,
    g,
    j,
    dj,
    initial,
    entering,
    dk,
    db,
    dg,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    HEAD: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients of k (per value head), b and g, from the gradient that enters at a chunk's end."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    i_n = bos // T if cu_seqlens is None else tl.load(chunk_ids + i_c).to(tl.int64)
    row0 = bos + t0
    rows = length - t0
    o_t = tl.arange(0, BT)
    o_row = (row0 + o_t) * HV + i_h
    m_t = o_t < rows
    b_b = tl.load(b + o_row, mask=m_t, other=0.0).to(tl.float32)
    b_db = tl.zeros([BT], tl.float32)
    b_dg = tl.zeros([BT], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        b_x = load_term(k, b, dj, row0, i_h, o_t, o_k, m_tk, HK, HV, K)
        m_next = (o_t + 1 < rows)[:, None] & m_k[None, :]
        b_a = load_decay(g, row0 + 1, i_h, o_t, o_k, m_next, HEAD, HV, K)
        b_f, b_s = tl.associative_scan((b_a, b_x), 0, compose, reverse=True)
        b_j = tl.load(entering + (i_c * HV + i_h) * K + o_k, mask=m_k, other=0.0)
        b_s += b_f * b_j[None, :]
        p_k = ((row0 + o_t) * HK + i_h // (HV // HK))[:, None] * K + o_k[None, :]
        b_k = tl.load(k + p_k, mask=m_tk, other=0.0).to(tl.float32)
        b_x = b_s * b_k
        b_db += tl.sum(b_x * b_k, 1)
        p_tk = o_row[:, None] * K + o_k[None, :]
        tl.store(dk + p_tk, (2.0 * b_b[:, None] * b_x).to(dk.dtype.element_ty), mask=m_tk)
        if g is not None:
            m_last = (t0 + o_t > 0)[:, None] & m_tk
            b_last = tl.load(j + p_tk - HV * K, mask=m_last, other=0.0)
            if initial is not None:
                m_0 = (t0 + o_t == 0)[:, None] & m_k[None, :]
                p_0 = initial + (i_n * HV + i_h) * K + o_k[None, :] + tl.zeros_like(o_t)[:, None]
                b_last += tl.load(p_0, mask=m_0, other=0.0).to(tl.float32)
            b_y = load_decay(g, row0, i_h, o_t, o_k, m_tk, HEAD, HV, K) * b_last * b_s
            if HEAD:
                b_dg += tl.sum(b_y, 1)
            else:
                tl.store(dg + p_tk, b_y.to(dg.dtype.element_ty), mask=m_tk)
    tl.store(db + o_row, b_db.to(db.dtype.element_ty), mask=m_t)
    if g is not None and HEAD:
        tl.store(dg + o_row, b_dg.to(dg.dtype.element_ty), mask=m_t)


def importance_tiles(K: int) -> Tiles:
    """Configuration of the chunk-parallel passes."""
    return Tiles(min(32, triton.next_power_of_2(K)), 1, 4, 1)


def _enter(
    k: Tensor,
    b: Tensor,
    g: Tensor | None,
    dj: Tensor | None,
    outside: Tensor | None,
    chunks: Chunks,
) -> tuple[Tensor, Tensor]:
    """State that enters every chunk and the one that leaves; of the reversed scan with dj."""
    T, HV = b.shape[1:]
    HK, K = k.shape[2:]
    tiles = importance_tiles(K)
    blocks = -(-K // tiles.BK)
    factor = b.new_empty(chunks.count, HV, K, dtype=torch.float32)
    term = torch.empty_like(factor)
    entering = torch.empty_like(factor)
    leaving = b.new_empty(chunks.sequences, HV, K, dtype=torch.float32)
    head = g is not None and g.ndim == 3
    launch(
        importance_chunk_kernel,
        (chunks.count * HV, blocks),
        tiles,
        k=k,
        b=b,
        g=g,
        dj=dj,
        factor=factor,
        term=term,
        **chunks.arguments(),
        T=T,
        HEAD=head,
        HK=HK,
        HV=HV,
        K=K,
        BK=tiles.BK,
    )
    launch(
        importance_carry_kernel,
        (chunks.sequences * HV, blocks),
        tiles,
        factor=factor,
        term=term,
        g=g,
        outside=outside,
        entering=entering,
        leaving=leaving,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.offsets,
        T=T,
        REVERSE=dj is not None,
        HEAD=head,
        HV=HV,
        K=K,
        BT=chunks.size,
        BC=32,
        BK=tiles.BK,
    )
    return entering, leaving


def run_importance_forward(
    k: Tensor,
    b: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Importance after every token and at the end, float32."""
    k, b = k.contiguous(), b.contiguous()
    g = None if g is None else g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    B, T, HV = b.shape
    HK, K = k.shape[2:]
    chunks = make_chunks(B, T, cu_seqlens, CHUNK)
    entering, final = _enter(k, b, g, None, initial_state, chunks)
    tiles = importance_tiles(K)
    j = b.new_empty(B, T, HV, K, dtype=torch.float32)
    launch(
        importance_scan_kernel,
        (chunks.count * HV, -(-K // tiles.BK)),
        tiles,
        k=k,
        b=b,
        g=g,
        entering=entering,
        j=j,
        **chunks.arguments(),
        T=T,
        HEAD=g is not None and g.ndim == 3,
        HK=HK,
        HV=HV,
        K=K,
        BK=tiles.BK,
    )
    return j, final


importance_forward = torch.library.custom_op(
    "glazoo::importance", run_importance_forward, mutates_args=()
)


@importance_forward.register_fake
def _(k, b, g, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    B, T, HV = b.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    j = b.new_empty(B, T, HV, k.shape[3], dtype=torch.float32)
    return j, b.new_empty(sequences, HV, k.shape[3], dtype=torch.float32)


def run_importance_backward(
    dj: Tensor,
    dfinal: Tensor,
    j: Tensor,
    k: Tensor,
    b: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, b, g (empty without a gate) and of the initial state."""
    dj, dfinal, k, b = dj.contiguous(), dfinal.contiguous(), k.contiguous(), b.contiguous()
    g = None if g is None else g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    B, T, HV = b.shape
    HK, K = k.shape[2:]
    chunks = make_chunks(B, T, cu_seqlens, CHUNK)
    entering, dinitial = _enter(k, b, g, dj, dfinal, chunks)
    dk = k.new_empty(B, T, HV, K)
    db = torch.empty_like(b)
    dg = b.new_empty(0) if g is None else torch.empty_like(g)
    tiles = importance_tiles(K)
    launch(
        importance_backward_kernel,
        (chunks.count * HV,),
        tiles,
        k=k,
        b=b,
        g=g,
        j=j,
        dj=dj,
        initial=initial_state,
        entering=entering,
        dk=dk,
        db=db,
        dg=dg,
        **chunks.arguments(),
        T=T,
        HEAD=g is not None and g.ndim == 3,
        HK=HK,
        HV=HV,
        K=K,
        BK=tiles.BK,
    )
    return reduce_heads(dk, HK), db, dg, dinitial


importance_backward = torch.library.custom_op(
    "glazoo::importance_backward", run_importance_backward, mutates_args=()
)


@importance_backward.register_fake
def _(dj, dfinal, j, k, b, g, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(k), like(b), b.new_empty(0) if g is None else like(g), like(dfinal)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[0], *inputs)


def _backward(ctx, dj, dfinal):  # type: ignore[no-untyped-def]
    g, initial_state = ctx.saved_tensors[3:5]
    dk, db, dg, dinitial = importance_backward(dj, dfinal, *ctx.saved_tensors)
    dg = None if g is None else dg
    return dk, db, dg, None if initial_state is None else dinitial, None


importance_forward.register_autograd(_backward, setup_context=_setup_context)


def importance(
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Importance accumulated over keys.

        J_t = exp(g_t) J_{t-1} + b_t k_t^2      (elementwise over keys)

    Args:
        k: keys, [B, T, H or HV, K].
        b: importance gate, >= 0, [B, T, HV].
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        initial_state: [N, HV, K], zeros if None.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        J [B, T, HV, K] and the final J [N, HV, K], both float32.

    Raises:
        ValueError: a shape is not one of the above, or k is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_importance(k, b, g, initial_state, cu_seqlens)
    if is_step(b.shape[1], cu_seqlens, k, b, g, initial_state):
        if initial_state is None:
            state = b.new_zeros(b.shape[0], b.shape[2], k.shape[3], dtype=torch.float32)
        else:
            state = initial_state.to(
                torch.float32, memory_format=torch.contiguous_format, copy=True
            )
        return importance_step(k, b, g, state=state), state
    start = None if initial_state is None else initial_state.to(torch.float32)
    return importance_forward(k, b, g, start, cu_seqlens)
