"""Gated linear recurrence, chunked: S_t = Diag(exp g_t) S_{t-1} + k_t w_t^T, o_t = S_t^T q_t."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk import (
    Gate,
    chunk_dkey,
    chunk_dvalue,
    chunk_gate,
    chunk_output,
    chunk_readers,
    chunk_tokens,
)
from .common import (
    Chunks,
    decay_between,
    decay_from_start,
    launch,
    load_chunk,
    load_factors,
    locate_sequence,
    make_chunks,
    reader_decay,
    reduce_heads,
    state_tiles,
    whole_decay,
    writer_decay,
)
from .loops import GatedLinear
from .operands import (
    as_result,
    check_choice,
    check_factors,
    check_operands,
    final_state,
    given_or_zeros,
    is_step,
    own_state,
    prepare,
)
from .register import register
from .step import run_linear_step


@triton.jit(do_not_specialize=["T"])
def linear_state_kernel(
    k,
    w,
    gate,
    write,
    initial,
    state,
    final,
    cu_seqlens,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """State at the start of every chunk, and the final one; k is multiplied by write.

    With a key-shaped gate k arrives as k R, multiplied.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(1) % NK
    i_v = tl.program_id(1) // NK
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    bos, length, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_t = tl.arange(0, BT)
    o_row = o_t.to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_n.to(tl.int64) * HV + i_h) * (K * V)
    b_h = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        b_h += tl.load(initial + i_state + o_kv, mask=m_kv, other=0.0).to(tl.float32)
    p_k = k + (bos * HK + i_h // (HV // HK)) * K + o_row[None, :] * (HK * K) + o_k[:, None]
    p_w = w + (bos * HV + i_h) * V + o_row[:, None] * (HV * V) + o_v[None, :]
    for i_t in range(n_t):
        i_c = first + i_t
        m_t = i_t * BT + o_t < length
        p_h = state + (i_c * HV + i_h) * (K * V) + o_kv
        tl.store(p_h, b_h.to(state.dtype.element_ty), mask=m_kv)
        b_k = tl.load(p_k, mask=m_k[:, None] & m_t[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_t[:, None] & m_v[None, :], other=0.0)
        if GATE != 2 and write is not None:
            b_f = load_factors(write, bos + i_t * BT, o_t, m_t, i_h, HV)
        if GATE == 0 and write is not None:
            b_k = (b_k * b_f[None, :]).to(b_k.dtype)
        if GATE == 1:
            p_d = gate + ((bos + i_t * BT) * HV + i_h) * 2
            c_hi, c_lo = writer_decay(p_d, o_t, length - i_t * BT, HV)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_r = decay_between(e_hi, e_lo, c_hi, c_lo)
            if write is not None:
                b_r *= b_f
            b_k = (b_k * b_r[None, :]).to(b_k.dtype)
            b_h *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT // 16 * K)
            b_h *= load_chunk(p_a, o_k, m_k, length - i_t * BT, K, BT // 16)[:, None]
        b_h = tl.dot(b_k, b_w, b_h, input_precision=PREC, out_dtype=tl.float32)
        p_k += BT * HK * K
        p_w += BT * HV * V
    tl.store(final + i_state + o_kv, b_h, mask=m_kv)


@triton.jit(do_not_specialize=["T"])
def linear_dstate_kernel(
    q,
    do,
    gate,
    dfinal,
    dstate,
    dinitial,
    cu_seqlens,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    HQ: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradient of the state at the end of every chunk, and of the initial one; q is multiplied by
    SCALE.

    With a key-shaped gate q arrives as q P, multiplied.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(1) % NK
    i_v = tl.program_id(1) // NK
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    bos, length, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_t = tl.arange(0, BT)
    o_row = o_t.to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_n.to(tl.int64) * HV + i_h) * (K * V)
    b_dh = tl.load(dfinal + i_state + o_kv, mask=m_kv, other=0.0).to(tl.float32)
    for i in range(n_t):
        i_t = n_t - 1 - i
        i_c = first + i_t
        row0 = bos + i_t * BT
        m_t = i_t * BT + o_t < length
        p_h = dstate + (i_c * HV + i_h) * (K * V) + o_kv
        tl.store(p_h, b_dh.to(dstate.dtype.element_ty), mask=m_kv)
        p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_row[None, :] * (HQ * K) + o_k[:, None]
        p_o = do + (row0 * HV + i_h) * V + o_row[:, None] * (HV * V) + o_v[None, :]
        b_q = tl.load(p_q, mask=m_k[:, None] & m_t[None, :], other=0.0)
        b_do = tl.load(p_o, mask=m_t[:, None] & m_v[None, :], other=0.0)
        if GATE == 0 and SCALE != 1.0:
            b_q = (b_q.to(tl.float32) * SCALE).to(b_q.dtype)
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            r_hi, r_lo = reader_decay(p_d, o_t, length - i_t * BT, HV, SHIFT)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_q = (b_q * (decay_from_start(r_hi, r_lo) * SCALE)[None, :]).to(b_q.dtype)
            b_dh *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT // 16 * K)
            b_dh *= load_chunk(p_a, o_k, m_k, length - i_t * BT, K, BT // 16)[:, None]
        b_dh = tl.dot(b_q, b_do, b_dh, input_precision=PREC, out_dtype=tl.float32)
    tl.store(dinitial + i_state + o_kv, b_dh, mask=m_kv)


def _linear_state(
    k: Tensor, w: Tensor, gate: Gate, initial: Tensor | None, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    (HV, V), K = w.shape[2:], k.shape[3]
    state = w.new_empty(chunks.number, HV, K, V)
    final = w.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32)
    launch(
        linear_state_kernel,
        chunks.sequences,
        state_tiles("linear_state_kernel", K, V, w.dtype),
        chunks,
        gate,
        across="KV",
        k=k,
        w=w,
        initial=initial,
        state=state,
        final=final,
    )
    return state, final


def _linear_dstate(
    q: Tensor, do: Tensor, gate: Gate, dfinal: Tensor, chunks: Chunks, pre: bool
) -> tuple[Tensor, Tensor]:
    (HV, V), K = do.shape[2:], q.shape[3]
    dstate = do.new_empty(chunks.number, HV, K, V)
    dinitial = torch.empty_like(dfinal)
    launch(
        linear_dstate_kernel,
        chunks.sequences,
        state_tiles("linear_dstate_kernel", K, V, do.dtype),
        chunks,
        gate,
        across="KV",
        q=q,
        do=do,
        dfinal=dfinal,
        dstate=dstate,
        dinitial=dinitial,
        SHIFT=pre,
    )
    return dstate, dinitial


def _begin(x: GatedLinear) -> tuple[GatedLinear, Chunks, Gate]:
    """Operands as the kernels take them, of one dtype."""
    x = prepare(x, x.w.dtype, ("q", "k"), ("initial_state",))
    chunks = make_chunks(x.w.shape[0], x.w.shape[1], x.cu_seqlens, chunk_tokens(x.w.dtype))
    return x, chunks, chunk_gate(x.g, chunks, scale=x.scale, write=x.beta)


def forward(x: GatedLinear, keep: bool) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    if is_step(x.w, x.cu_seqlens, keep):
        state = own_state(x.initial_state, x.w, x.k.shape[3])
        return *run_linear_step(x._replace(initial_state=state)), state
    pre = x.read == "pre"
    x, chunks, gate = _begin(x)
    if gate.GATE == 2:
        score, _, _, far = chunk_readers(x.q, None, x.k, gate, chunks, pre, False, False)
        state, final = _linear_state(far.k, x.w, gate, x.initial_state, chunks)
        return chunk_output(far.q, None, x.w, gate, state, score, chunks, pre), final
    state, final = _linear_state(x.k, x.w, gate, x.initial_state, chunks)
    return chunk_output(x.q, x.k, x.w, gate, state, None, chunks, pre), final


def gradients(x: GatedLinear, grads: Any, _wanted: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    pre = x.read == "pre"
    x, chunks, gate = _begin(x)
    do = given_or_zeros(grads[0], as_result(x.w))
    dfinal = given_or_zeros(grads[1], final_state(x.w, x.k.shape[3], x.cu_seqlens))
    near = None
    if gate.GATE == 2:
        score, _, near, far = chunk_readers(x.q, None, x.k, gate, chunks, pre, False, False)
        state, _ = _linear_state(far.k, x.w, gate, x.initial_state, chunks)
        dstate, dinitial = _linear_dstate(far.q, do, gate, dfinal, chunks, pre)
        dw = chunk_dvalue(None, far.k, gate, do, dstate, score, chunks, pre)
        del score, far
    else:
        state, _ = _linear_state(x.k, x.w, gate, x.initial_state, chunks)
        dstate, dinitial = _linear_dstate(x.q, do, gate, dfinal, chunks, pre)
        dw = chunk_dvalue(x.q, x.k, gate, do, dstate, None, chunks, pre)
    dq, _, dk, dg, dbeta = chunk_dkey(
        x.q, None, x.k, x.w, gate, state, dstate, do, None, chunks, pre, False, near
    )
    dq, dk = reduce_heads(dq, x.q.shape[2]), reduce_heads(dk, x.k.shape[2])
    return dq, dk, dw, dg, dbeta, dinitial, None


def _allocate(x: GatedLinear, _keep: bool) -> tuple[Tensor, Tensor]:
    return as_result(x.w), final_state(x.w, x.k.shape[3], x.cu_seqlens)


_linear = register(
    "linear",
    GatedLinear,
    results=("out", "final"),
    forward=forward,
    allocate=_allocate,
    gradients=gradients,
)


def linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    read: str = "post",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear recurrence of key-value products.

        S_t = Diag(exp g_t) S_{t-1} + k_t (beta_t w_t)^T
        o_t = scale S_t^T q_t        (read "pre": scale S_{t-1}^T q_t, before decay and write of t)

    Args:
        q: queries, [B, T, H or HV, K].
        k: keys, [B, T, H or HV, K].
        w: values, [B, T, HV, V]; float32, float16 or bfloat16.
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        beta: write gate, [B, T, HV]; None is 1.
        scale: of the queries.
        initial_state: [N, HV, K, V], zeros if None.
        read: "post" or "pre".
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        o [B, T, HV, V] in w's dtype and the final state [N, HV, K, V] in float32.

    Raises:
        ValueError: a shape or `read` is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("read", read, ("post", "pre"))
    check_operands(w, {"q": q, "k": k}, g, [initial_state], cu_seqlens)
    check_factors(w, beta=beta)
    return _linear(q, k, w, g, beta, initial_state, cu_seqlens, read, scale)
