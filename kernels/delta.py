"""Gated delta rule, chunked: what is written is the error of a prediction of the value.

    S'_t = Diag(exp g_t) S_{t-1}
    u_t = w_t - X_t^T e_t        X = S' ("decayed") or S_{t-1} ("prev")
    S_t = S'_t + k_t u_t^T,      o_t = S_t^T q_t

Given u this is the recurrence of `linear`. Inside a chunk with start state h and
L_ij = e_i . prod (j, i] k_j, j < i, the u solve (I + L) u = w - (e P) h, so one triangular inverse
per chunk gives them all:

    x = w - (e P) h            u = (I + L)^-1 x
    dx = (I + L)^-T du         dL = -dx u^T           d(e P) = -dx h^T

that is, e is a second reader of the state whose output gradient is -dx, and dw = dx.
"""

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
    chunk_solve,
    chunk_tokens,
)
from .common import (
    Chunks,
    Tiles,
    decay_between,
    decay_from_start,
    launch,
    load_chunk,
    load_factors,
    locate_sequence,
    make_chunks,
    power_of_two,
    reader_decay,
    reduce_heads,
    state_tiles,
    whole_decay,
    writer_decay,
)
from .loops import GatedDelta
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
from .step import run_delta_step

# Tokens and heads of a program that multiplies by the write gate.
WRITE_ROWS = 32


@triton.jit(do_not_specialize=["T"])
def delta_state_kernel(
    e,
    k,
    w,
    gate,
    beta,
    erase,
    inverse,
    initial,
    state,
    final,
    u,
    cu_seqlens,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    HE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """State at the start of every chunk, the final one, and the written values u.

    w and e are multiplied by beta and erase. With a key-shaped gate e and k arrive as e P,
    multiplied, and k R. BK covers K.
    """
    i_v = tl.program_id(1)
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    bos, length, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_t = tl.arange(0, BT)
    o_row = o_t.to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_n.to(tl.int64) * HV + i_h) * (K * V)
    b_h = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        b_h += tl.load(initial + i_state + o_kv, mask=m_kv, other=0.0).to(tl.float32)
    for i_t in range(n_t):
        i_c = first + i_t
        row0 = bos + i_t * BT
        m_t = i_t * BT + o_t < length
        m_tv = m_t[:, None] & m_v[None, :]
        p_h = state + (i_c * HV + i_h) * (K * V) + o_kv
        p_e = e + (row0 * HE + i_h // (HV // HE)) * K + o_row[:, None] * (HE * K) + o_k[None, :]
        p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_row[None, :] * (HK * K) + o_k[:, None]
        p_w = (row0 * HV + i_h) * V + o_row[:, None] * (HV * V) + o_v[None, :]
        p_m = inverse + (row0 * HV + i_h) * BT + o_row[:, None] * (HV * BT) + o_t[None, :]
        b_e = tl.load(p_e, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_k = tl.load(p_k, mask=m_k[:, None] & m_t[None, :], other=0.0)
        b_w = tl.load(w + p_w, mask=m_tv, other=0.0)
        b_m = tl.load(p_m, mask=m_t[:, None], other=0.0)
        b_hc = b_h.to(state.dtype.element_ty)
        tl.store(p_h, b_hc, mask=m_kv)
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            r_hi, r_lo = reader_decay(p_d, o_t, length - i_t * BT, HV, SHIFT)
            c_hi, c_lo = writer_decay(p_d, o_t, length - i_t * BT, HV)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_h *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT // 16 * K)
            b_h *= load_chunk(p_a, o_k, m_k, length - i_t * BT, K, BT // 16)[:, None]
        b_x = tl.dot(b_e, b_hc, input_precision=PREC, out_dtype=tl.float32)
        if GATE == 1:
            b_x *= decay_from_start(r_hi, r_lo)[:, None]
        if GATE != 2 and erase is not None:
            b_x *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
        if beta is not None:
            b_w = b_w * load_factors(beta, row0, o_t, m_t, i_h, HV)[:, None]
        b_x = (b_w - b_x).to(b_m.dtype)
        b_u = tl.dot(b_m, b_x, input_precision=PREC, out_dtype=tl.float32)
        tl.store(u + p_w, b_u.to(u.dtype.element_ty), mask=m_tv)
        if GATE == 1:
            b_u *= decay_between(e_hi, e_lo, c_hi, c_lo)[:, None]
        b_h = tl.dot(b_k, b_u.to(b_k.dtype), b_h, input_precision=PREC, out_dtype=tl.float32)
    tl.store(final + i_state + o_kv, b_h, mask=m_kv)


@triton.jit(do_not_specialize=["T"])
def delta_dstate_kernel(
    q,
    e,
    k,
    do,
    du,
    gate,
    erase,
    inverse,
    dfinal,
    dstate,
    dinitial,
    dw,
    cu_seqlens,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    HQ: tl.constexpr,
    HE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradient of the state at the end of every chunk, of the initial one, and of w.

    du: what the outputs of a token's own chunk send to u. q and e are multiplied by SCALE and
    erase. With a key-shaped gate q, e and k arrive as q P and e P, multiplied, and k R. BK covers
    K.
    """
    i_v = tl.program_id(1)
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    bos, length, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_t = tl.arange(0, BT)
    o_row = o_t.to(tl.int64)
    o_k = tl.arange(0, BK)
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
        m_tv = m_t[:, None] & m_v[None, :]
        m_kt = m_k[:, None] & m_t[None, :]
        p_h = dstate + (i_c * HV + i_h) * (K * V) + o_kv
        p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_row[None, :] * (HQ * K) + o_k[:, None]
        p_e = e + (row0 * HE + i_h // (HV // HE)) * K + o_row[None, :] * (HE * K) + o_k[:, None]
        p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_row[:, None] * (HK * K) + o_k[None, :]
        p_w = (row0 * HV + i_h) * V + o_row[:, None] * (HV * V) + o_v[None, :]
        p_m = inverse + (row0 * HV + i_h) * BT + o_row[None, :] * (HV * BT) + o_t[:, None]
        b_q = tl.load(p_q, mask=m_kt, other=0.0)
        b_e = tl.load(p_e, mask=m_kt, other=0.0)
        b_k = tl.load(p_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_do = tl.load(do + p_w, mask=m_tv, other=0.0)
        b_du = tl.load(du + p_w, mask=m_tv, other=0.0)
        b_m = tl.load(p_m, mask=m_t[None, :], other=0.0)
        b_dhc = b_dh.to(dstate.dtype.element_ty)
        tl.store(p_h, b_dhc, mask=m_kv)
        if GATE == 0 and SCALE != 1.0:
            b_do = (b_do.to(tl.float32) * SCALE).to(b_do.dtype)
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            c_hi, c_lo = writer_decay(p_d, o_t, length - i_t * BT, HV)
            r_hi, r_lo = reader_decay(p_d, o_t, length - i_t * BT, HV, SHIFT)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_do = (b_do * (decay_from_start(c_hi, c_lo) * SCALE)[:, None]).to(b_do.dtype)
            b_dh *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT // 16 * K)
            b_dh *= load_chunk(p_a, o_k, m_k, length - i_t * BT, K, BT // 16)[:, None]
        b_x = tl.dot(b_k, b_dhc, input_precision=PREC, out_dtype=tl.float32)
        if GATE == 1:
            b_x *= decay_between(e_hi, e_lo, c_hi, c_lo)[:, None]
        b_x = (b_du + b_x).to(b_m.dtype)
        b_dw = tl.dot(b_m, b_x, input_precision=PREC, out_dtype=tl.float32)
        tl.store(dw + p_w, b_dw.to(dw.dtype.element_ty), mask=m_tv)
        if GATE == 1:
            b_dw *= decay_from_start(r_hi, r_lo)[:, None]
        if GATE != 2 and erase is not None:
            b_dw *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
        b_dh = tl.dot(b_q, b_do, b_dh, input_precision=PREC, out_dtype=tl.float32)
        b_dh = tl.dot(b_e, (-b_dw).to(b_e.dtype), b_dh, input_precision=PREC, out_dtype=tl.float32)
    tl.store(dinitial + i_state + o_kv, b_dh, mask=m_kv)


@triton.jit(do_not_specialize=["number"])
def delta_write_kernel(
    w, dx, beta, dw, dbeta, number, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr
):
    """Gradients of w and beta from that of their product. BV covers V."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_r = o_r < number
    m_rv = m_r[:, None] & (o_v < V)[None, :]
    p_rv = o_r[:, None] * V + o_v[None, :]
    b_dx = tl.load(dx + p_rv, mask=m_rv, other=0.0).to(tl.float32)
    b_w = tl.load(w + p_rv, mask=m_rv, other=0.0).to(tl.float32)
    b_beta = tl.load(beta + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(dw + p_rv, (b_dx * b_beta[:, None]).to(dw.dtype.element_ty), mask=m_rv)
    tl.store(dbeta + o_r, tl.sum(b_w * b_dx, 1).to(dbeta.dtype.element_ty), mask=m_r)


def _delta_write(w: Tensor, dx: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    dw, dbeta = torch.empty_like(dx), torch.empty_like(beta)
    launch(
        delta_write_kernel,
        (-(-beta.numel() // WRITE_ROWS),),
        Tiles(1, power_of_two(w.shape[3]), 4, 1),
        w=w,
        dx=dx,
        beta=beta,
        dw=dw,
        dbeta=dbeta,
        number=beta.numel(),
        BR=WRITE_ROWS,
    )
    return dw, dbeta


def _delta_state(
    e: Tensor,
    k: Tensor,
    w: Tensor,
    gate: Gate,
    inverse: Tensor,
    initial: Tensor | None,
    chunks: Chunks,
    prev: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (HV, V), K = w.shape[2:], k.shape[3]
    state = w.new_empty(chunks.number, HV, K, V)
    final = w.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32)
    u = torch.empty_like(w)
    launch(
        delta_state_kernel,
        chunks.sequences,
        state_tiles("delta_state_kernel", K, V, w.dtype, chunks.sequences * HV),
        chunks,
        gate,
        across="V",
        e=e,
        k=k,
        w=w,
        inverse=inverse,
        initial=initial,
        state=state,
        final=final,
        u=u,
        SHIFT=prev,
    )
    return state, final, u


def _delta_dstate(
    q: Tensor,
    e: Tensor,
    k: Tensor,
    do: Tensor,
    du: Tensor,
    gate: Gate,
    inverse: Tensor,
    dfinal: Tensor,
    chunks: Chunks,
    prev: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (HV, V), K = do.shape[2:], k.shape[3]
    dstate = do.new_empty(chunks.number, HV, K, V)
    dinitial = torch.empty_like(dfinal)
    dw = torch.empty_like(do)
    launch(
        delta_dstate_kernel,
        chunks.sequences,
        state_tiles("delta_dstate_kernel", K, V, do.dtype, chunks.sequences * HV),
        chunks,
        gate,
        across="V",
        q=q,
        e=e,
        k=k,
        do=do,
        du=du,
        inverse=inverse,
        dfinal=dfinal,
        dstate=dstate,
        dinitial=dinitial,
        dw=dw,
        SHIFT=prev,
    )
    return dstate, dinitial, dw


def _begin(x: GatedDelta) -> tuple[GatedDelta, Chunks, Gate]:
    """Operands as the kernels take them, of one dtype."""
    x = prepare(x, x.w.dtype, ("q", "e", "k"), ("initial_state",))
    chunks = make_chunks(x.w.shape[0], x.w.shape[1], x.cu_seqlens, chunk_tokens(x.w.dtype))
    return x, chunks, chunk_gate(x.g, chunks, scale=x.scale, erase=x.erase, beta=x.beta)


def _erase_key(x: GatedDelta) -> Tensor:
    """e, or k itself where none is given."""
    return x.k if x.e is None else x.e


def forward(x: GatedDelta, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the chunks' triangular inverses if there is a backward pass."""
    if is_step(x.w, x.cu_seqlens, keep):
        state = own_state(x.initial_state, x.w, x.k.shape[3])
        return *run_delta_step(x._replace(initial_state=state)), state, x.w.new_empty(0)
    prev = x.base == "prev"
    x, chunks, gate = _begin(x)
    q, e, k, score, matrix = x.q, _erase_key(x), x.k, None, None
    if gate.GATE == 2:
        score, matrix, _, (q, e, k) = chunk_readers(q, e, k, gate, chunks, False, prev, True)
    inverse = chunk_solve(e, k, gate, matrix, x.w.shape[2], chunks, prev)
    del matrix
    state, final, u = _delta_state(e, k, x.w, gate, inverse, x.initial_state, chunks, prev)
    out = chunk_output(q, k, u, gate, state, score, chunks, False)
    return out, final, inverse if keep else x.w.new_empty(0)


def gradients(
    x: GatedDelta, grads: Any, _wanted: Any, inverse: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    prev = x.base == "prev"
    x, chunks, gate = _begin(x)
    q, e, k, w = x.q, _erase_key(x), x.k, x.w
    do = given_or_zeros(grads[0], as_result(w))
    dfinal = given_or_zeros(grads[1], final_state(w, k.shape[3], x.cu_seqlens))
    qg, eg, kg, score, near = q, e, k, None, None
    if gate.GATE == 2:
        score, _, near, far = chunk_readers(q, e, k, gate, chunks, False, prev, False)
        qg, eg, kg = far
        del far
    state, _, u = _delta_state(eg, kg, w, gate, inverse, x.initial_state, chunks, prev)
    du = chunk_dvalue(qg, kg, gate, do, None, score, chunks, False)
    dstate, dinitial, dw = _delta_dstate(qg, eg, kg, do, du, gate, inverse, dfinal, chunks, prev)
    del du, score, qg, eg, kg
    dq, de, dk, dg, derase = chunk_dkey(
        q, e, k, u, gate, state, dstate, do, dw, chunks, False, prev, near
    )
    dq, dk = reduce_heads(dq, q.shape[2]), reduce_heads(dk, k.shape[2])
    erased = None if e is k else reduce_heads(de, e.shape[2])
    dbeta = None
    if x.beta is not None:
        dw, dbeta = _delta_write(w, dw, x.beta)
    return dq, erased, dk, dw, dg, dbeta, derase, dinitial, None


def _allocate(x: GatedDelta, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = (*x.w.shape[:3], chunk_tokens(x.w.dtype)) if keep else (0,)
    return as_result(x.w), final_state(x.w, x.k.shape[3], x.cu_seqlens), x.w.new_empty(kept)


_delta = register(
    "delta",
    GatedDelta,
    results=("out", "final"),
    kept=("inverse",),
    forward=forward,
    allocate=_allocate,
    gradients=gradients,
)


def delta(
    q: Tensor,
    e: Tensor | None,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    scale: float = 1.0,
    base: str = "decayed",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule with separate erase and write keys.

        S'_t = Diag(exp g_t) S_{t-1}
        S_t = S'_t + k_t (beta_t w_t - erase_t X_t^T e_t)^T
        o_t = scale S_t^T q_t

    with X = S' (base "decayed") or S_{t-1} (base "prev").

    Args:
        q: queries, [B, T, H or HV, K].
        e: erase keys, [B, T, H or HV, K]; None is k.
        k: write keys, [B, T, H or HV, K].
        w: values, [B, T, HV, V]; float32, float16 or bfloat16.
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        beta: write gate, [B, T, HV]; None is 1.
        erase: erase gate, [B, T, HV]; None is 1.
        scale: of the queries.
        initial_state: [N, HV, K, V], zeros if None.
        base: the state that predicts, "decayed" or "prev".
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        o [B, T, HV, V] in w's dtype and the final state [N, HV, K, V] in float32.

    Raises:
        ValueError: a shape or `base` is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("base", base, ("decayed", "prev"))
    keys = {"q": q, "k": k} if e is None else {"q": q, "e": e, "k": k}
    check_operands(w, keys, g, [initial_state], cu_seqlens)
    check_factors(w, beta=beta, erase=erase)
    return _delta(q, e, k, w, g, beta, erase, initial_state, cu_seqlens, base, scale)
