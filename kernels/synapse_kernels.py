"""Kernels of `synapse`: h and J decay together, a token reads h / (J + prior).

    h_t = Diag(exp g_t) h_{t-1} + k_t w_t^T
    J_t = Diag(exp g_t) J_{t-1} + (k_t^2) b_t^T
    o_t = (h_t / I_t)^T q_t          I = J + prior

Both states are linear, so a matmul pass gives them at the borders of chunks. Inside a chunk every
synapse and token needs a reciprocal of its own: the forward pass walks the tokens with the states
in registers.

Backward, with r = 1 / I, X = h r and dy the gradient of o:

    dh_i = q_i (dy_i r_i)        dI_i = -q_i (dy_i r_i X_i)        dq_i = sum_v dy_i X_i
    G, Q = dh, dI summed over the tokens that follow, decayed
    dw = sum_k G k     db = sum_k Q k^2     dk = sum_v G w + 2 k sum_v Q b     dprior = sum_t,v dI

    1. local    walks the tokens as the forward pass does; leaves, for each block of SUB tokens,
                the states that enter it and the block's own share of dh and -dI at its start;
    2. carry    turns the shares into G and -Q at the end of each block, last block first;
    3. gradient takes each block alone, key by key: the SUB tokens of a key are triangular products
                on the matmul units, forward for h and I, transposed for G and Q, so that only
                sums over v cross lanes;
    4. finish   sums over tiles of v and turns per-token terms into the gate's gradient.

The gate's gradient is dL/dg_t = <G_t, a_t h_{t-1}> + <Q_t, a_t J_{t-1}>. Within a block it is
summed up from the block's end, where it is the inner product of carried gradient and state: with
read_t = sum (dh_t h + dI_t J) and write_t = <G_t, k w^T> + <Q_t, k^2 b^T> it is
dg_t = end + sum_{s >= t} (read_s - write_s), s > t for the reads of a read before the write.
"""

import triton
import triton.language as tl

from .common import locate_chunk, locate_sequence, reciprocal, split_log


@triton.jit
def exponential(x, RECIP: tl.constexpr):
    """2^x, as exact as `reciprocal`; numbers below 2^-126 are zero on a GPU."""
    if RECIP == 1:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif RECIP == 2:
        return tl.inline_asm_elementwise(
            "v_exp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit(do_not_specialize=["T"])
def synapse_keep_kernel(
    g,
    keep,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    """Key-shaped decay from each token, its own excluded, to the end of its block of BS tokens."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_t = tl.arange(0, BS)
    m_k = (o_k < K)[None, :]
    for i in range(BT // BS):
        t = t0 + i * BS + o_t
        p_g = ((bos + t) * HV + i_h)[:, None] * K + o_k[None, :]
        # Sums of numbers of one sign: nothing cancels, and -inf stays what it is.
        m_next = ((o_t + 1 < BS) & (t + 1 < length))[:, None] & m_k
        b_g = tl.load(g + p_g + HV * K, mask=m_next, other=0.0).to(tl.float32)
        b_g = tl.exp(tl.minimum(tl.cumsum(b_g, 0, reverse=True), 0.0))
        tl.store(keep + p_g, b_g, mask=(t < length)[:, None] & m_k)


@triton.jit(do_not_specialize=["T"])
def synapse_state_kernel(
    k,
    w,
    b,
    g,
    keep,
    initial_h,
    initial_j,
    state_h,
    state_j,
    final_h,
    final_j,
    cu_seqlens,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """h and J at the start of every chunk of BT tokens, BS tokens at a time, and the final ones; h
    alone without b."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(1) % NK
    i_v = tl.program_id(1) // NK
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    bos, length, _, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_t = tl.arange(0, BS)
    o_row = o_t.to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_n.to(tl.int64) * HV + i_h) * (K * V)
    b_h = tl.zeros([BK, BV], tl.float32)
    b_j = tl.zeros([BK, BV], tl.float32)
    if initial_h is not None:
        b_h += tl.load(initial_h + i_state + o_kv, mask=m_kv, other=0.0)
        if b is not None:
            b_j += tl.load(initial_j + i_state + o_kv, mask=m_kv, other=0.0)
    p_k = k + (bos * HK + i_h // (HV // HK)) * K + o_row[None, :] * (HK * K) + o_k[:, None]
    p_w = (bos * HV + i_h) * V + o_row[:, None] * (HV * V) + o_v[None, :]
    if GATE == 1:
        p_g = g + bos * HV + i_h + o_row * HV
    if GATE == 2:
        p_g = (bos * HV + i_h) * K + o_row[None, :] * (HV * K) + o_k[:, None]
    for i in range(tl.cdiv(length, BS)):
        t = i * BS + o_t
        if i % (BT // BS) == 0:
            p_h = ((first + i // (BT // BS)) * HV + i_h) * (K * V) + o_kv
            tl.store(state_h + p_h, b_h, mask=m_kv)
            if b is not None:
                tl.store(state_j + p_h, b_j, mask=m_kv)
        m_t = t < length
        m_kt = m_k[:, None] & m_t[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_k = tl.load(p_k, mask=m_kt, other=0.0).to(tl.float32)
        b_w = tl.load(w + p_w, mask=m_tv, other=0.0).to(tl.float32)
        b_q = b_k * b_k
        # A token's write decays by the gates of the tokens after it in the block: sums of
        # the same sign.
        m_next = (o_t + 1 < BS) & (t + 1 < length)
        if GATE == 1:
            b_r = tl.load(p_g + HV, mask=m_next, other=0.0).to(tl.float32)
            b_r = tl.exp(tl.minimum(tl.cumsum(b_r, 0, reverse=True), 0.0))[None, :]
            b_a = tl.exp(tl.sum(tl.load(p_g, mask=m_t, other=0.0).to(tl.float32), 0))
            b_k *= b_r
            b_q *= b_r
            b_h *= b_a
            b_j *= b_a
            p_g += BS * HV
        if GATE == 2:
            b_r = tl.load(keep + p_g, mask=m_kt, other=0.0)
            p_a = (bos + i * BS) * (HV * K) + i_h * K + o_k
            b_a = tl.exp(tl.load(g + p_a, mask=m_k, other=0.0).to(tl.float32))
            b_a = (b_a * tl.load(keep + p_a, mask=m_k, other=0.0))[:, None]
            b_k *= b_r
            b_q *= b_r
            b_h *= b_a
            b_j *= b_a
            p_g += BS * HV * K
        b_h = tl.dot(b_k, b_w, b_h, input_precision=PREC, out_dtype=tl.float32)
        if b is not None:
            b_b = tl.load(b + p_w, mask=m_tv, other=0.0).to(tl.float32)
            b_j = tl.dot(b_q, b_b, b_j, input_precision=PREC, out_dtype=tl.float32)
        p_k += BS * HK * K
        p_w += BS * HV * V
    tl.store(final_h + i_state + o_kv, b_h, mask=m_kv)
    if b is not None:
        tl.store(final_j + i_state + o_kv, b_j, mask=m_kv)


@triton.jit
def advance(b_h, b_i, b_a, b_k, b_p, b_w, b_b, GATE: tl.constexpr):
    """h and I one token further; the prior's own decay is given back through (1 - a) prior."""
    b_i2 = (b_k * b_k)[:, None] * b_b[None, :]
    if GATE == 0:
        b_h = b_h + b_k[:, None] * b_w[None, :]
        b_i = b_i + b_i2
    elif GATE == 1:
        b_h = b_a * b_h + b_k[:, None] * b_w[None, :]
        b_i = b_a * b_i + (b_i2 + (b_p - b_a * b_p)[:, None])
    else:
        b_h = b_a[:, None] * b_h + b_k[:, None] * b_w[None, :]
        b_i = b_a[:, None] * b_i + (b_i2 + (b_p - b_a * b_p)[:, None])
    return b_h, b_i


@triton.jit(do_not_specialize=["T"])
def synapse_output_kernel(
    q,
    k,
    w,
    b,
    g,
    prior,
    state_h,
    state_j,
    o,
    u,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    PRE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """Output of a chunk, token after token, all keys of BV values in registers; u: uncertainty, if
    asked for."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    p_s = (i_c * HV + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_h = tl.load(state_h + p_s, mask=m_kv, other=0.0)
    b_i = tl.load(state_j + p_s, mask=m_kv, other=0.0) + b_p[:, None]
    p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_k
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_k
    p_w = (row0 * HV + i_h) * V + o_v
    if GATE == 1:
        p_g = g + row0 * HV + i_h
    if GATE == 2:
        p_g = g + (row0 * HV + i_h) * K + o_k
    for _ in range(tl.minimum(length - t0, BT)):
        b_q = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_w = tl.load(w + p_w, mask=m_v, other=0.0).to(tl.float32)
        b_b = tl.load(b + p_w, mask=m_v, other=0.0).to(tl.float32)
        b_a = b_p
        if GATE == 1:
            b_a = tl.exp(tl.load(p_g).to(tl.float32))
            p_g += HV
        if GATE == 2:
            b_a = tl.exp(tl.load(p_g, mask=m_k, other=0.0).to(tl.float32))
            p_g += HV * K
        if PRE:
            b_r = reciprocal(b_i, RECIP)
            b_x = b_h * b_r
            b_h, b_i = advance(b_h, b_i, b_a, b_k, b_p, b_w, b_b, GATE)
        else:
            b_h, b_i = advance(b_h, b_i, b_a, b_k, b_p, b_w, b_b, GATE)
            b_r = reciprocal(b_i, RECIP)
            b_x = b_h * b_r
        b_o = tl.sum(b_x * b_q[:, None], 0)
        tl.store(o + p_w, b_o.to(o.dtype.element_ty), mask=m_v)
        if u is not None:
            b_u = tl.sum(b_r * (b_q * b_q)[:, None], 0)
            tl.store(u + p_w, b_u.to(u.dtype.element_ty), mask=m_v)
        p_q += HQ * K
        p_k += HK * K
        p_w += HV * V


@triton.jit(do_not_specialize=["T", "c_first"])
def synapse_local_kernel(
    q,
    k,
    w,
    b,
    g,
    prior,
    state_h,
    state_j,
    do,
    du,
    enter,
    turn,
    decay,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    c_first,
    GATE: tl.constexpr,
    PRE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    SUB: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """Per block of SUB tokens: h and I that enter it, its share of dh and dI at its start, its
    decay."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(1) % NK
    i_v = tl.program_id(1) // NK
    i_s = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    i_c = i_s + c_first
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    rows = tl.minimum(length - t0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    p_s = (i_c * HV + i_h) * (K * V) + o_kv
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_h = tl.load(state_h + p_s, mask=m_kv, other=0.0)
    b_i = tl.load(state_j + p_s, mask=m_kv, other=0.0) + b_p[:, None]
    p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K
    p_w = (row0 * HV + i_h) * V
    if GATE == 1:
        p_g = g + row0 * HV + i_h
    if GATE == 2:
        p_g = g + (row0 * HV + i_h) * K
    for i in range(tl.cdiv(rows, SUB)):
        i_b = (i_s * (BT // SUB) + i) * HV + i_h
        p_b = i_b * (2 * K * V) + o_kv
        tl.store(enter + p_b, b_h.to(enter.dtype.element_ty), mask=m_kv)
        tl.store(enter + p_b + K * V, b_i.to(enter.dtype.element_ty), mask=m_kv)
        b_dh = tl.zeros([BK, BV], tl.float32)
        b_di = tl.zeros([BK, BV], tl.float32)
        b_d = tl.full([BK], 1.0, tl.float32)
        for _ in tl.range(0, tl.minimum(rows - i * SUB, SUB), loop_unroll_factor=2):
            b_q = tl.load(p_q + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_k = tl.load(p_k + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_w = tl.load(w + p_w + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_b = tl.load(b + p_w + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_do = tl.load(do + p_w + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_a = b_p
            if GATE == 1:
                b_a = tl.exp(tl.load(p_g).to(tl.float32))
                p_g += HV
            if GATE == 2:
                b_a = tl.exp(tl.load(p_g + o_k, mask=m_k, other=0.0).to(tl.float32))
                p_g += HV * K
            if PRE:
                b_qd = b_q * b_d
                b_r = reciprocal(b_i, RECIP)
                b_x = b_h * b_r
            b_h, b_i = advance(b_h, b_i, b_a, b_k, b_p, b_w, b_b, GATE)
            if GATE > 0:
                b_d *= b_a
            if not PRE:
                b_qd = b_q * b_d
                b_r = reciprocal(b_i, RECIP)
                b_x = b_h * b_r
            b_y = b_r * b_do[None, :]
            b_dh += b_qd[:, None] * b_y
            b_y *= b_x
            if du is not None:
                b_du = tl.load(du + p_w + o_v, mask=m_v, other=0.0).to(tl.float32)
                b_y += b_q[:, None] * (b_r * b_r * b_du[None, :])
            b_di += b_qd[:, None] * b_y
            p_q += HQ * K
            p_k += HK * K
            p_w += HV * V
        tl.store(turn + p_b, b_dh.to(turn.dtype.element_ty), mask=m_kv)
        tl.store(turn + p_b + K * V, b_di.to(turn.dtype.element_ty), mask=m_kv)
        if GATE > 0:  # noqa: SIM102
            if i_v == 0:
                tl.store(decay + i_b * K + o_k, b_d, mask=m_k)


@triton.jit(do_not_specialize=["T", "c_first", "c_end"])
def synapse_carry_kernel(
    enter,
    turn,
    decay,
    prior,
    final_h,
    final_j,
    carry_h,
    carry_j,
    carry_z,
    z,
    cu_seqlens,
    chunk_offsets,
    T,
    c_first,
    c_end,
    GATE: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    SUB: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """G and -Q at the end of every block of a segment, and the inner product of G, Q with the
    states there.

    carry_*: what enters the segment from its end, replaced by what leaves it.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_k = tl.program_id(1) % NK
    i_v = tl.program_id(1) // NK
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    _, length, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    c_lo = tl.maximum(first, c_first)
    c_hi = tl.minimum(first + n_t, c_end)
    if c_lo >= c_hi:
        return
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = i_n.to(tl.int64) * HV + i_h
    p_s = i_state * (K * V) + o_kv
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_dh = tl.load(carry_h + p_s, mask=m_kv, other=0.0)
    b_dj = -tl.load(carry_j + p_s, mask=m_kv, other=0.0)
    if GATE > 0:
        p_z = (i_state * NV + i_v) * K + o_k
        if c_hi == first + n_t:
            b_z = tl.sum(b_dh * tl.load(final_h + p_s, mask=m_kv, other=0.0), 1)
            b_z -= tl.sum(b_dj * tl.load(final_j + p_s, mask=m_kv, other=0.0), 1)
        else:
            b_z = tl.load(carry_z + p_z, mask=m_k, other=0.0)
    i_last = (c_hi - c_first) * (BT // SUB) - 1
    if c_hi == first + n_t:
        i_last = (c_hi - 1 - c_first) * (BT // SUB) + (length - (n_t - 1) * BT - 1) // SUB
    n_b = i_last - (c_lo - c_first) * (BT // SUB) + 1
    for i in range(n_b.to(tl.int32)):
        i_b = (i_last - i) * HV + i_h
        p_b = i_b * (2 * K * V) + o_kv
        b_x = tl.load(turn + p_b, mask=m_kv, other=0.0).to(tl.float32)
        b_y = tl.load(turn + p_b + K * V, mask=m_kv, other=0.0).to(tl.float32)
        tl.store(turn + p_b, b_dh.to(turn.dtype.element_ty), mask=m_kv)
        tl.store(turn + p_b + K * V, b_dj.to(turn.dtype.element_ty), mask=m_kv)
        if GATE > 0:
            tl.store(z + (i_b * NV + i_v) * K + o_k, b_z, mask=m_k)
            b_d = tl.load(decay + i_b * K + o_k, mask=m_k, other=0.0)[:, None]
            b_dh *= b_d
            b_dj *= b_d
        b_dh += b_x
        b_dj += b_y
        if GATE > 0:
            b_h = tl.load(enter + p_b, mask=m_kv, other=0.0).to(tl.float32)
            b_j = tl.load(enter + p_b + K * V, mask=m_kv, other=0.0).to(tl.float32) - b_p[:, None]
            b_z = tl.sum(b_dh * b_h - b_dj * b_j, 1)
    tl.store(carry_h + p_s, b_dh, mask=m_kv)
    tl.store(carry_j + p_s, -b_dj, mask=m_kv)
    if GATE > 0:
        tl.store(carry_z + p_z, b_z, mask=m_k)


@triton.jit
def locate_block(
    i_b, T, cu_seqlens, chunk_ids, chunk_offsets, c_first, BT: tl.constexpr, SUB: tl.constexpr
):
    """First row of a block of a segment and the rows it has, at most SUB, none or fewer past the
    end."""
    i_c = c_first + i_b // (BT // SUB)
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    t0 += (i_b % (BT // SUB)).to(tl.int32) * SUB
    return bos + t0, length - t0


@triton.constexpr_function
def column_rows(GATE, K):
    """Rows of SUB numbers per block and head: q and k of every key, then six of the gate, of every
    key if it has one."""
    return 2 * K + (0, 6, 6 * K)[GATE]


@triton.jit(do_not_specialize=["T", "c_first"])
def synapse_columns_kernel(
    q,
    k,
    g,
    columns,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    c_first,
    GATE: tl.constexpr,
    PRE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    SUB: tl.constexpr,
    SPLIT: tl.constexpr,
    BK: tl.constexpr,
):
    """Return what the keys of a block need, the tokens of a key side by side: q, k and, of the
    gate, the decays from the block's start to each read and from each write to the block's end, and
    its sums, in bits, from the start to each read and each write. SPLIT: both parts of the sums;
    else they are added, exact enough where the decay between two tokens is then rounded to
    bfloat16."""
    ROWS: tl.constexpr = column_rows(GATE, K)
    i_b = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row0, rows = locate_block(i_b, T, cu_seqlens, chunk_ids, chunk_offsets, c_first, BT, SUB)
    if rows <= 0:
        return
    o_t = tl.arange(0, SUB)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = (o_k < K)[:, None]
    m_kt = m_k & (o_t < rows)[None, :]
    p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_t[None, :] * (HQ * K) + o_k[:, None]
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_t[None, :] * (HK * K) + o_k[:, None]
    p_out = columns + (i_b * HV + i_h) * (ROWS * SUB) + o_k[:, None] * SUB + o_t[None, :]
    tl.store(p_out, tl.load(p_q, mask=m_kt, other=0.0).to(tl.float32), mask=m_k)
    tl.store(p_out + K * SUB, tl.load(p_k, mask=m_kt, other=0.0).to(tl.float32), mask=m_k)
    if GATE > 0:
        p_out += 2 * K * SUB
        STEP: tl.constexpr = SUB if GATE == 1 else K * SUB
        if GATE == 1:
            # One row of sums, that of key 0, whose program alone writes it.
            p_g = g + row0 * HV + i_h + o_t[None, :] * HV + o_k[:, None] * 0
            m_k = (o_k == 0)[:, None]
        else:
            p_g = g + (row0 * HV + i_h) * K + o_t[None, :] * (HV * K) + o_k[:, None]
        # Below the floor a decay is zero, and so is every product with it.
        b_g = tl.load(p_g, mask=m_kt, other=0.0).to(tl.float32) * 1.4426950408889634
        b_hi, b_lo = split_log(tl.maximum(b_g, -160.0))
        c_hi = tl.cumsum(b_hi, 1)
        c_lo = tl.cumsum(b_lo, 1)
        e_hi = tl.sum(b_hi, 1)[:, None] - c_hi
        e_lo = tl.sum(b_lo, 1)[:, None] - c_lo
        if PRE:
            b_hi = c_hi - b_hi
            b_lo = c_lo - b_lo
        else:
            b_hi = c_hi
            b_lo = c_lo
        tl.store(p_out, tl.exp2(tl.minimum(b_hi + b_lo, 0.0)), mask=m_k)
        tl.store(p_out + STEP, tl.exp2(tl.minimum(e_hi + e_lo, 0.0)), mask=m_k)
        if SPLIT:
            tl.store(p_out + 2 * STEP, b_hi, mask=m_k)
            tl.store(p_out + 3 * STEP, c_hi, mask=m_k)
            tl.store(p_out + 4 * STEP, b_lo, mask=m_k)
            tl.store(p_out + 5 * STEP, c_lo, mask=m_k)
        else:
            tl.store(p_out + 2 * STEP, b_hi + b_lo, mask=m_k)
            tl.store(p_out + 3 * STEP, c_hi + c_lo, mask=m_k)


@triton.jit
def load_decay(p_c, o_t, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """Log2 decay from a column's write to a row's read, where that comes later, and the first two
    of the gate's rows."""
    r_x = tl.load(p_c + 2 * STEP + o_t)
    c_x = tl.load(p_c + 3 * STEP + o_t)
    b_x = r_x[:, None] - c_x[None, :]
    if SPLIT:
        r_x = tl.load(p_c + 4 * STEP + o_t)
        c_x = tl.load(p_c + 5 * STEP + o_t)
        b_x += r_x[:, None] - c_x[None, :]
    return b_x, tl.load(p_c + o_t), tl.load(p_c + STEP + o_t)


@triton.jit(do_not_specialize=["T", "c_first"])
def synapse_gradient_kernel(
    columns,
    w,
    b,
    g,
    prior,
    enter,
    turn,
    do,
    du,
    dw,
    db,
    parts,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    c_first,
    GATE: tl.constexpr,
    PRE: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    SUB: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PREC: tl.constexpr,
):
    """dw and db of a block, and sums over BV values of what the gradients of q, k, prior and gate
    need."""
    ROWS: tl.constexpr = column_rows(GATE, K)
    NP: tl.constexpr = 4 if du is None else 5
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1)
    i_b = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row0, rows = locate_block(i_b, T, cu_seqlens, chunk_ids, chunk_offsets, c_first, BT, SUB)
    if rows <= 0:
        return
    o_t = tl.arange(0, SUB)
    m_t = o_t < rows
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    m_tv = m_t[:, None] & m_v[None, :]
    p_w = (row0 * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
    b_w = tl.load(w + p_w, mask=m_tv, other=0.0)
    b_b = tl.load(b + p_w, mask=m_tv, other=0.0)
    b_do = tl.load(do + p_w, mask=m_tv, other=0.0).to(tl.float32)
    if du is not None:
        b_du = tl.load(du + p_w, mask=m_tv, other=0.0).to(tl.float32)
    x_w = b_w.to(OPERAND)
    x_b = b_b.to(OPERAND)
    b_w = b_w.to(tl.float32)
    b_b = b_b.to(tl.float32)
    b_dw = tl.zeros([SUB, BV], tl.float32)
    b_db = tl.zeros([SUB, BV], tl.float32)
    m_s = o_t[:, None] > o_t[None, :] if PRE else o_t[:, None] >= o_t[None, :]
    p_c = columns + (i_b * HV + i_h) * (ROWS * SUB)
    p_b = (i_b * HV + i_h) * (2 * K * V)
    p_p = parts + ((i_b * HV + i_h) * NV + i_v) * (NP * K * SUB)
    b_s = tl.where(m_s, 1.0, 0.0)
    b_first = tl.full([SUB], 1.0, tl.float32)
    b_last = b_first
    if GATE == 1:
        b_e, b_first, b_last = load_decay(p_c + 2 * K * SUB, o_t, SUB, SPLIT)
        b_s = tl.where(m_s, tl.exp2(tl.minimum(b_e, 0.0)), 0.0)
    if GATE == 2:
        b_s = tl.where(m_s, 0.0, -8192.0)
    # A product with the identity changes nothing but the layout: what is then computed from
    # it in the loop is an operand of the products there without passing through shared memory.
    m_x = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_r = tl.dot(m_x, tl.trans(b_s), input_precision=PREC, out_dtype=tl.float32)
    b_s = tl.dot(m_x, b_s, input_precision=PREC, out_dtype=tl.float32)
    b_c = tl.zeros([SUB, SUB], tl.float32) + o_t.to(tl.float32)[None, :]
    b_c = tl.dot(m_x, b_c, input_precision=PREC, out_dtype=tl.float32)
    for i_k in range(tl.cdiv(K, SUB)):
        # The states at the border enter as one more product, whose other operand picks
        # the loop's key.
        o_k = i_k * SUB + o_t
        m_kv = (o_k < K)[:, None] & m_v[None, :]
        p_kv = p_b + o_k[:, None] * V + o_v[None, :]
        x_h = tl.load(enter + p_kv, mask=m_kv, other=0.0).to(OPERAND)
        x_i = tl.load(enter + p_kv + K * V, mask=m_kv, other=1.0).to(OPERAND)
        x_dh = tl.load(turn + p_kv, mask=m_kv, other=0.0).to(OPERAND)
        x_di = tl.load(turn + p_kv + K * V, mask=m_kv, other=0.0).to(OPERAND)
        for i in range(tl.minimum(K - i_k * SUB, SUB)):
            b_q = tl.load(p_c + o_t)
            b_k = tl.load(p_c + K * SUB + o_t)
            b_p = tl.load(prior + i_h * K + i_k * SUB + i)
            m_i = b_c == i * 1.0
            if GATE == 2:
                b_e, b_first, b_last = load_decay(p_c + 2 * K * SUB, o_t, K * SUB, SPLIT)
                b_d = exponential(tl.minimum(b_e, b_s), RECIP)
                x_r = tl.trans((b_d * b_q[:, None]).to(OPERAND))
            else:
                b_d = b_s
                x_r = (b_r * b_q[None, :]).to(OPERAND)
            x_f = tl.where(m_i, b_first[:, None], 0.0).to(OPERAND)
            x_l = tl.where(m_i, b_last[:, None], 0.0).to(OPERAND)
            b_k2 = b_k * b_k
            b_h = tl.dot(x_f, x_h, input_precision=PREC, out_dtype=tl.float32)
            b_i = tl.zeros([SUB, BV], tl.float32) + (b_p - b_first * b_p)[:, None]
            b_i = tl.dot(x_f, x_i, b_i, input_precision=PREC, out_dtype=tl.float32)
            x_s = (b_d * b_k[None, :]).to(OPERAND)
            b_h = tl.dot(x_s, x_w, b_h, input_precision=PREC, out_dtype=tl.float32)
            x_s = (b_d * b_k2[None, :]).to(OPERAND)
            b_i = tl.dot(x_s, x_b, b_i, input_precision=PREC, out_dtype=tl.float32)
            b_i = reciprocal(b_i, RECIP)
            b_h *= b_i
            tl.store(p_p + o_t, tl.sum(b_do * b_h, 1))
            b_y = b_do * b_i
            b_z = b_y * b_h
            if du is not None:
                b_x = b_i * b_du
                tl.store(p_p + 4 * K * SUB + o_t, tl.sum(b_x, 1))
                b_z += b_q[:, None] * (b_i * b_x)
            tl.store(p_p + K * SUB + o_t, tl.sum(b_z, 1))
            b_x = tl.dot(x_l, x_dh, input_precision=PREC, out_dtype=tl.float32)
            b_x = tl.dot(x_r, b_y.to(OPERAND), b_x, input_precision=PREC, out_dtype=tl.float32)
            b_dw += b_k[:, None] * b_x
            tl.store(p_p + 2 * K * SUB + o_t, tl.sum(b_x * b_w, 1))
            b_x = tl.dot(x_l, x_di, input_precision=PREC, out_dtype=tl.float32)
            b_x = tl.dot(x_r, b_z.to(OPERAND), b_x, input_precision=PREC, out_dtype=tl.float32)
            b_db += b_k2[:, None] * b_x
            tl.store(p_p + 3 * K * SUB + o_t, tl.sum(b_x * b_b, 1))
            p_c += SUB
            p_p += SUB
    tl.store(dw + p_w, b_dw.to(dw.dtype.element_ty), mask=m_tv)
    tl.store(db + p_w, -b_db.to(db.dtype.element_ty), mask=m_tv)


@triton.jit(do_not_specialize=["T", "c_first"])
def synapse_finish_kernel(
    columns,
    parts,
    g,
    prior,
    z,
    dq,
    dk,
    dg,
    dprior,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    c_first,
    GATE: tl.constexpr,
    PRE: tl.constexpr,
    DOUBT: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    NV: tl.constexpr,
    NZ: tl.constexpr,
    BT: tl.constexpr,
    SUB: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients of q and k (per value head) and of the gate of a block, its share of that of the
    prior."""
    ROWS: tl.constexpr = column_rows(GATE, K)
    NP: tl.constexpr = 5 if DOUBT else 4
    i_b = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row0, rows = locate_block(i_b, T, cu_seqlens, chunk_ids, chunk_offsets, c_first, BT, SUB)
    if rows <= 0:
        return
    i_b = i_b * HV + i_h
    o_t = tl.arange(0, SUB)
    b_read = tl.zeros([SUB], tl.float32)
    b_write = tl.zeros([SUB], tl.float32)
    b_end = tl.zeros([BK], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_kt = m_k[:, None] & (o_t < rows)[None, :]
        o_kt = o_k[:, None] * SUB + o_t[None, :]
        b_q = tl.load(columns + i_b * (ROWS * SUB) + o_kt, mask=m_kt, other=0.0)
        b_k = tl.load(columns + i_b * (ROWS * SUB) + K * SUB + o_kt, mask=m_kt, other=0.0)
        b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=0.0)
        b_dq = tl.zeros([BK, SUB], tl.float32)
        b_di = tl.zeros([BK, SUB], tl.float32)
        b_wh = tl.zeros([BK, SUB], tl.float32)
        b_wj = tl.zeros([BK, SUB], tl.float32)
        b_u = tl.zeros([BK, SUB], tl.float32)
        for i_v in range(NV):
            p_p = parts + (i_b * NV + i_v) * (NP * K * SUB) + o_kt
            b_dq += tl.load(p_p, mask=m_kt, other=0.0)
            b_di += tl.load(p_p + K * SUB, mask=m_kt, other=0.0)
            b_wh += tl.load(p_p + 2 * K * SUB, mask=m_kt, other=0.0)
            b_wj += tl.load(p_p + 3 * K * SUB, mask=m_kt, other=0.0)
            if DOUBT:
                b_u += tl.load(p_p + 4 * K * SUB, mask=m_kt, other=0.0)
        b_di *= -b_q
        b_wj *= -b_k
        p_tk = (row0 * HV + i_h) * K + o_t[None, :] * (HV * K) + o_k[:, None]
        tl.store(dk + p_tk, (b_wh + 2.0 * b_wj).to(dk.dtype.element_ty), mask=m_kt)
        tl.store(dprior + i_b * K + o_k, tl.sum(b_di, 1), mask=m_k)
        b_di = -b_p[:, None] * b_di
        if DOUBT:
            b_u *= b_q
            b_dq += 2.0 * b_u
            b_di -= b_q * b_u
        tl.store(dq + p_tk, b_dq.to(dq.dtype.element_ty), mask=m_kt)
        if GATE > 0:
            b_wh = b_k * (b_wh + b_wj)
            b_z = tl.zeros([BK], tl.float32)
            for i_v in range(NZ):
                b_z += tl.load(z + (i_b * NZ + i_v) * K + o_k, mask=m_k, other=0.0)
            if GATE == 1:
                b_read += tl.sum(b_di, 0)
                b_write += tl.sum(b_wh, 0)
                b_end += b_z
            else:
                b_dg = tl.cumsum(b_di - b_wh, 1, reverse=True) + b_z[:, None]
                if PRE:
                    b_dg -= b_di
                b_g = tl.load(g + p_tk, mask=m_kt, other=0.0).to(tl.float32)
                b_dg = tl.where(tl.exp(b_g) == 0.0, 0.0, b_dg)
                tl.store(dg + p_tk, b_dg.to(dg.dtype.element_ty), mask=m_kt)
    if GATE == 1:
        b_dg = tl.cumsum(b_read - b_write, 0, reverse=True) + tl.sum(b_end, 0)
        if PRE:
            b_dg -= b_read
        m_t = o_t < rows
        p_g = row0 * HV + i_h + o_t * HV
        b_g = tl.load(g + p_g, mask=m_t, other=0.0).to(tl.float32)
        b_dg = tl.where(tl.exp(b_g) == 0.0, 0.0, b_dg)
        tl.store(dg + p_g, b_dg.to(dg.dtype.element_ty), mask=m_t)


@triton.jit
def synapse_step_kernel(
    q,
    k,
    w,
    b,
    g,
    prior,
    h,
    j,
    o,
    u,
    GATE: tl.constexpr,
    PRE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """One token; both states updated in place."""
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row = i_n * HV + i_h
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    p_s = row * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_h = tl.load(h + p_s, mask=m_kv, other=0.0)
    b_j = tl.load(j + p_s, mask=m_kv, other=0.0)
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_q = tl.load(q + (i_n * HQ + i_h // (HV // HQ)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + (i_n * HK + i_h // (HV // HK)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_w = tl.load(w + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_b = tl.load(b + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    if PRE:
        b_r = reciprocal(b_j + b_p[:, None], RECIP)
        b_x = b_h * b_r
    if GATE == 1:
        b_a = tl.exp(tl.load(g + row).to(tl.float32))
        b_h *= b_a
        b_j *= b_a
    if GATE == 2:
        b_a = tl.exp(tl.load(g + row * K + o_k, mask=m_k, other=0.0).to(tl.float32))[:, None]
        b_h *= b_a
        b_j *= b_a
    b_h += b_k[:, None] * b_w[None, :]
    b_j += (b_k * b_k)[:, None] * b_b[None, :]
    tl.store(h + p_s, b_h, mask=m_kv)
    tl.store(j + p_s, b_j, mask=m_kv)
    if not PRE:
        b_r = reciprocal(b_j + b_p[:, None], RECIP)
        b_x = b_h * b_r
    b_o = tl.sum(b_x * b_q[:, None], 0)
    tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    if u is not None:
        b_u = tl.sum(b_r * (b_q * b_q)[:, None], 0)
        tl.store(u + row * V + o_v, b_u.to(u.dtype.element_ty), mask=m_v)
