"""Importance scan over keys: J_t = exp(g_t) J_{t-1} + b_t k_t^2, elementwise, forward and backward.

Three passes, so that one long sequence still fills a GPU: what each chunk does to an incoming
state (a factor and a term), the states that enter the chunks, and the scan inside each chunk. The
backward pass is the same scan in reverse, acc_t = dJ_t + exp(g_{t+1}) acc_{t+1}, with acc after the
last token the gradient of the final state.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Chunks,
    Tiles,
    launch,
    locate_chunk,
    locate_sequence,
    make_chunks,
    reduce_heads,
)
from .loops import Importance
from .operands import (
    check_importance,
    final_state,
    given_or_zeros,
    is_step,
    own_state,
    prepare,
)
from .register import register
from .step import run_importance_step

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
    """Return what a token adds: b k^2, or the gradient of J in the backward pass."""
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
    x: Importance, dj: Tensor | None, outside: Tensor | None, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """State that enters every chunk and the one that leaves; of the reversed scan with dj."""
    HV, K = x.b.shape[2], x.k.shape[3]
    tiles = importance_tiles(K)
    factor = x.b.new_empty(chunks.number, HV, K, dtype=torch.float32)
    term, entering = torch.empty_like(factor), torch.empty_like(factor)
    leaving = final_state(x.b, K, x.cu_seqlens)
    launch(
        importance_chunk_kernel,
        chunks.number,
        tiles,
        x,
        chunks,
        across="K",
        dj=dj,
        factor=factor,
        term=term,
    )
    launch(
        importance_carry_kernel,
        chunks.sequences,
        tiles,
        x,
        chunks,
        across="K",
        factor=factor,
        term=term,
        outside=outside,
        entering=entering,
        leaving=leaving,
        T=x.b.shape[1],
        REVERSE=dj is not None,
        BC=32,
    )
    return entering, leaving


def _begin(x: Importance) -> tuple[Importance, Chunks]:
    """Operands as the kernels take them."""
    x = prepare(x, wide=("initial_state",))
    return x, make_chunks(x.b.shape[0], x.b.shape[1], x.cu_seqlens, CHUNK)


def forward(x: Importance, keep: bool) -> tuple[Tensor, Tensor]:
    """Importance after every token and at the end, float32."""
    if is_step(x.b, x.cu_seqlens, keep):
        state = own_state(x.initial_state, x.b, x.k.shape[3])
        return *run_importance_step(x._replace(initial_state=state)), state
    x, chunks = _begin(x)
    entering, final = _enter(x, None, x.initial_state, chunks)
    j, K = _tokens(x), x.k.shape[3]
    launch(
        importance_scan_kernel,
        chunks.number,
        importance_tiles(K),
        x,
        chunks,
        across="K",
        entering=entering,
        j=j,
    )
    return j, final


def gradients(x: Importance, grads: Any, _wanted: Any, j: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x, chunks = _begin(x)
    HK, K = x.k.shape[2:]
    dj = given_or_zeros(grads[0], _tokens(x))
    dfinal = given_or_zeros(grads[1], final_state(x.b, K, x.cu_seqlens))
    entering, dinitial = _enter(x, dj, dfinal, chunks)
    dk = x.k.new_empty(dj.shape)
    db = torch.empty_like(x.b)
    dg = x.b.new_empty(0) if x.g is None else torch.empty_like(x.g)
    launch(
        importance_backward_kernel,
        chunks.number,
        importance_tiles(K),
        x,
        chunks,
        j=j,
        dj=dj,
        initial=x.initial_state,
        entering=entering,
        dk=dk,
        db=db,
        dg=dg,
    )
    return reduce_heads(dk, HK), db, dg, dinitial, None


def _tokens(x: Importance) -> Tensor:
    """Room for the importance after every token."""
    return x.b.new_empty(*x.b.shape, x.k.shape[3], dtype=torch.float32)


_importance = register(
    "importance",
    Importance,
    results=("j", "final"),
    reads=("j",),
    forward=forward,
    allocate=lambda x, keep: (_tokens(x), final_state(x.b, x.k.shape[3], x.cu_seqlens)),
    gradients=gradients,
)


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
    return _importance(k, b, g, initial_state, cu_seqlens)
