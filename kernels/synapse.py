"""Importance of every synapse, chunked: h and J decay together, a token reads h / (J + prior).

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

They run on one segment of the sequence after another, from its end, so that what they pass to each
other is never held for all tokens at once.

The gate's gradient is dL/dg_t = <G_t, a_t h_{t-1}> + <Q_t, a_t J_{t-1}>. Within a block it is
summed up from the block's end, where it is the inner product of carried gradient and state: with
read_t = sum (dh_t h + dI_t J) and write_t = <G_t, k w^T> + <Q_t, k^2 b^T> it is
dg_t = end + sum_{s >= t} (read_s - write_s), s > t for the reads of a read before the write.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Chunks,
    Tiles,
    check_device,
    check_operands,
    check_step,
    current_target,
    dot_precision,
    launch,
    locate_chunk,
    locate_sequence,
    make_chunks,
    power_of_two,
    reduce_heads,
    split_log,
)

# Tokens between two stored states, forward and backward, and tokens of a block of the backward
# pass.
BORDER = 128
BACKWARD_BORDER = 256
SUB = 16
# Tokens of one product in the pass from border to border.
STATE_ROWS = 64
# The backward pass may always hold this much, whatever the size of the problem.
SCRATCH_FLOOR = 64 << 20


@triton.jit
def reciprocal(x, RECIP: tl.constexpr):
    """1 / x of a positive normal number: 0 correctly rounded, 1 and 2 to one unit in the last
    place."""
    if RECIP == 1:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif RECIP == 2:
        return tl.inline_asm_elementwise(
            "v_rcp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


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
    """What the keys of a block need, the tokens of a key side by side: q, k and, of the gate, the
    decays from the block's start to each read and from each write to the block's end, and its sums,
    in bits, from the start to each read and each write. SPLIT: both parts of the sums; else they
    are added, exact enough where the decay between two tokens is then rounded to bfloat16."""
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


def gate_kind(g: Tensor | None) -> int:
    """0 no gate, 1 one per head, 2 one per key."""
    return 0 if g is None else g.ndim - 2


def reciprocal_kind(exact: bool) -> int:
    """How `reciprocal` divides on the current target; the interpreter always divides exactly."""
    target = current_target()
    if exact or target == "interpreter":
        return 0
    return 1 if target.startswith("sm_") else 2


def state_tiles(K: int, V: int, dtype: torch.dtype, gate: int) -> Tiles:
    """Exact products of float32 take three times the registers."""
    wide = dtype != torch.float32
    BK = min(64 if wide else 32, power_of_two(K))
    # Triton 3.9 cannot pipeline accumulators that nothing but products changes on sm_100.
    stages = 2 if wide and (gate or not current_target().startswith("sm_10")) else 1
    return Tiles(BK, min(32, power_of_two(V)), 4, stages)


def walk_tiles(K: int, V: int, crowded: bool) -> Tiles:
    """All keys of some values, 64 synapses a thread, 32 where a read keeps more of each alive."""
    BK = power_of_two(K)
    size = 1024 if crowded else 2048
    BV = max(8, size // BK)
    return Tiles(BK, BV, max(1, BK * BV // size), 1)


def local_tiles(K: int, V: int, crowded: bool) -> Tiles:
    """32 synapses a thread, four states of each live in registers; 16 where a read keeps more
    alive."""
    # In one warp sm_90's register allocation spills.
    warps = 2 if crowded and V > 32 and current_target() == "sm_90" else 1
    return Tiles(16 if crowded else min(32, power_of_two(K)), 32 * warps, warps, 1)


def carry_tiles(K: int, V: int) -> Tiles:
    return Tiles(min(16, power_of_two(K)), min(64, power_of_two(V)), 2, 1)


def gradient_tiles(V: int, dtype: torch.dtype, crowded: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(1, 16, 1, 1)
    # Two warps have no fewer values each, but ptxas finds registers for them.
    return Tiles(1, min(64 if crowded else 32, power_of_two(V)), 2 if crowded else 1, 1)


def step_tiles(K: int, V: int) -> Tiles:
    BK = power_of_two(K)
    return Tiles(BK, max(8, 4096 // BK), 4, 1)


def border_states(
    k: Tensor,
    w: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    j: Tensor | None,
    chunks: Chunks,
) -> tuple[Tensor, Any, Tensor, Any]:
    """h and J at the start of every chunk, and the final ones; no J without b."""
    HV, V = w.shape[2:]
    K = k.shape[3]
    tiles = state_tiles(K, V, w.dtype, gate_kind(g))
    rows = min(STATE_ROWS if w.dtype != torch.float32 else STATE_ROWS // 2, chunks.size)
    state_h = w.new_empty(chunks.count, HV, K, V, dtype=torch.float32)
    final_h = w.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32)
    state_j, final_j = None, None
    if b is not None:
        state_j, final_j = torch.empty_like(state_h), torch.empty_like(final_h)
    keep = None
    if g is not None and g.ndim == 4:
        keep = torch.empty_like(g, dtype=torch.float32)
        BK = min(32, power_of_two(K))
        launch(
            synapse_keep_kernel,
            (chunks.count * HV, -(-K // BK)),
            Tiles(BK, 1, 1, 1),
            g=g,
            keep=keep,
            **chunks.arguments(),
            T=w.shape[1],
            HV=HV,
            K=K,
            BS=rows,
            BK=BK,
        )
    launch(
        synapse_state_kernel,
        (chunks.sequences * HV, -(-K // tiles.BK) * -(-V // tiles.BV)),
        tiles,
        k=k,
        w=w,
        b=b,
        g=g,
        keep=keep,
        initial_h=h,
        initial_j=j,
        state_h=state_h,
        state_j=state_j,
        final_h=final_h,
        final_j=final_j,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.offsets,
        T=w.shape[1],
        GATE=gate_kind(g),
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BT=chunks.size,
        BS=rows,
        BK=tiles.BK,
        BV=tiles.BV,
        PREC=dot_precision(w.dtype),
    )
    return state_h, state_j, final_h, final_j


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def run_synapse_forward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None,
    prior: Tensor,
    h: Tensor | None,
    j: Tensor | None,
    cu_seqlens: Tensor | None,
    pre: bool,
    uncertainty: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final h and J, uncertainty (empty if not asked for); prior float32 [HV, K]."""
    q, k, w, b, g, prior, h, j = contiguous(q, k, w, b, g, prior, h, j)
    B, T, HV, V = w.shape
    K = k.shape[3]
    chunks = make_chunks(B, T, cu_seqlens, BORDER)
    state_h, state_j, final_h, final_j = border_states(k, w, b, g, h, j, chunks)
    o = torch.empty_like(w)
    u = torch.empty_like(w) if uncertainty else None
    # A read before the write keeps one more vector alive: too much where registers are scarce.
    tiles = walk_tiles(K, V, uncertainty or (pre and current_target().startswith("sm_10")))
    launch(
        synapse_output_kernel,
        (chunks.count * HV, -(-V // tiles.BV)),
        tiles,
        q=q,
        k=k,
        w=w,
        b=b,
        g=g,
        prior=prior,
        state_h=state_h,
        state_j=state_j,
        o=o,
        u=u,
        T=T,
        **chunks.arguments(),
        GATE=gate_kind(g),
        PRE=pre,
        HQ=q.shape[2],
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BK=tiles.BK,
        BV=tiles.BV,
        RECIP=reciprocal_kind(exact),
    )
    return o, final_h, final_j, w.new_empty(0) if u is None else u


synapse_forward = torch.library.custom_op("glazoo::synapse", run_synapse_forward, mutates_args=())


@synapse_forward.register_fake
def _(q, k, w, b, g, prior, h, j, cu_seqlens, pre, uncertainty, exact):  # type: ignore[no-untyped-def]
    sequences = w.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = w.new_empty(sequences, w.shape[2], k.shape[3], w.shape[3], dtype=torch.float32)
    o = torch.empty_like(w, memory_format=torch.contiguous_format)
    u = torch.empty_like(o) if uncertainty else w.new_empty(0)
    return o, final, torch.empty_like(final), u


def operand_type(dtype: torch.dtype) -> Any:
    """What the triangular products multiply; float16 has too little range for 1 / I."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def segment_chunks(chunks: Chunks, HV: int, K: int, V: int, block_bytes: int) -> int:
    """Chunks of a segment: its blocks take a sixteenth of two float32 states for all blocks, or the
    floor."""
    per_chunk = chunks.size // SUB
    whole = chunks.count * per_chunk * HV * 8 * K * V
    return max(
        1, min(chunks.count, max(SCRATCH_FLOOR, whole // 16) // (per_chunk * HV * block_bytes))
    )


def run_synapse_backward(
    do: Tensor,
    dh: Tensor,
    dj: Tensor,
    du: Tensor | None,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None,
    prior: Tensor,
    h: Tensor | None,
    j: Tensor | None,
    cu_seqlens: Tensor | None,
    pre: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w, b, g (empty without a gate), prior, initial h and J."""
    do, du, q, k, w, b, g, prior, h, j = contiguous(do, du, q, k, w, b, g, prior, h, j)
    B, T, HV, V = w.shape
    HQ, HK, K = q.shape[2], k.shape[2], k.shape[3]
    gate, recip, operand = gate_kind(g), reciprocal_kind(exact), operand_type(w.dtype)
    chunks = make_chunks(B, T, cu_seqlens, BACKWARD_BORDER)
    where = chunks.arguments()
    state_h, state_j, final_h, final_j = border_states(k, w, b, g, h, j, chunks)
    carry_h = dh.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    carry_j = dj.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    # A read before the write keeps one more vector alive, which the register allocation of some
    # targets has no room for.
    target = current_target()
    blackwell = target.startswith("sm_10")
    crowded = du is not None or (pre and (blackwell or (gate == 2 and target == "sm_80")))
    walk = local_tiles(K, V, crowded)
    carry, grad = carry_tiles(K, V), gradient_tiles(V, w.dtype, blackwell and du is not None)
    NK, NV, NZ = -(-K // walk.BK), -(-V // grad.BV), -(-V // carry.BV)
    kept = torch.bfloat16 if w.dtype == torch.bfloat16 else torch.float32
    rows, sums_ = 2 * K + (0, 6, 6 * K)[gate], 4 if du is None else 5
    block = 4 * (K * V * kept.itemsize + SUB * (rows + NV * sums_ * K) + (NZ + 1) * K)
    size = segment_chunks(chunks, HV, K, V, block)
    blocks = size * (chunks.size // SUB)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return w.new_empty(blocks, HV, *shape, dtype=dtype)

    enter, turn = scratch(2, K, V, dtype=kept), scratch(2, K, V, dtype=kept)
    columns, parts = scratch(rows, SUB), scratch(NV, sums_, K, SUB)
    decay, z = (scratch(K), scratch(NZ, K)) if gate else (None, None)
    carry_z = None if g is None else w.new_empty(chunks.sequences, HV, NZ, K, dtype=torch.float32)
    dq, dk = q.new_empty(B, T, HV, K), k.new_empty(B, T, HV, K)
    dw, db = torch.empty_like(w), torch.empty_like(b)
    dg = None if g is None else torch.empty_like(g)
    dprior = torch.zeros_like(prior)
    for first in reversed(range(0, chunks.count, size)):
        count = min(size, chunks.count - first)
        sums = w.new_zeros(count * (chunks.size // SUB), HV, K, dtype=torch.float32)
        launch(
            synapse_local_kernel,
            (count * HV, NK * -(-V // walk.BV)),
            walk,
            q=q,
            k=k,
            w=w,
            b=b,
            g=g,
            prior=prior,
            state_h=state_h,
            state_j=state_j,
            do=do,
            du=du,
            enter=enter,
            turn=turn,
            decay=decay,
            **where,
            T=T,
            c_first=first,
            GATE=gate,
            PRE=pre,
            HQ=HQ,
            HK=HK,
            HV=HV,
            K=K,
            V=V,
            SUB=SUB,
            BK=walk.BK,
            BV=walk.BV,
            RECIP=recip,
        )
        launch(
            synapse_carry_kernel,
            (chunks.sequences * HV, -(-K // carry.BK) * NZ),
            carry,
            enter=enter,
            turn=turn,
            decay=decay,
            prior=prior,
            final_h=final_h,
            final_j=final_j,
            carry_h=carry_h,
            carry_j=carry_j,
            carry_z=carry_z,
            z=z,
            cu_seqlens=chunks.cu_seqlens,
            chunk_offsets=chunks.offsets,
            T=T,
            c_first=first,
            c_end=first + count,
            GATE=gate,
            HV=HV,
            K=K,
            V=V,
            BT=chunks.size,
            SUB=SUB,
            BK=carry.BK,
            BV=carry.BV,
        )
        columns_tile = Tiles(min(64, power_of_two(K)), 1, 1, 1)
        launch(
            synapse_columns_kernel,
            (sums.shape[0] * HV, -(-K // columns_tile.BK)),
            columns_tile,
            q=q,
            k=k,
            g=g,
            columns=columns,
            **where,
            T=T,
            c_first=first,
            GATE=gate,
            PRE=pre,
            HQ=HQ,
            HK=HK,
            HV=HV,
            K=K,
            SUB=SUB,
            SPLIT=operand == tl.float32,
            BK=columns_tile.BK,
        )
        launch(
            synapse_gradient_kernel,
            (sums.shape[0] * HV, NV),
            grad,
            columns=columns,
            w=w,
            b=b,
            g=g,
            prior=prior,
            enter=enter,
            turn=turn,
            do=do,
            du=du,
            dw=dw,
            db=db,
            parts=parts,
            **where,
            T=T,
            c_first=first,
            GATE=gate,
            PRE=pre,
            HV=HV,
            K=K,
            V=V,
            SUB=SUB,
            BV=grad.BV,
            RECIP=recip,
            SPLIT=operand == tl.float32,
            OPERAND=operand,
            PREC=dot_precision(w.dtype),
        )
        launch(
            synapse_finish_kernel,
            (sums.shape[0] * HV,),
            Tiles(min(32, power_of_two(K)), 1, 1, 1),
            columns=columns,
            parts=parts,
            g=g,
            prior=prior,
            z=z,
            dq=dq,
            dk=dk,
            dg=dg,
            dprior=sums,
            **where,
            T=T,
            c_first=first,
            GATE=gate,
            PRE=pre,
            DOUBT=du is not None,
            HV=HV,
            K=K,
            NV=NV,
            NZ=NZ,
            SUB=SUB,
            BK=min(32, power_of_two(K)),
        )
        dprior += sums.sum(0)
    return (
        reduce_heads(dq, HQ),
        reduce_heads(dk, HK),
        dw,
        db,
        w.new_empty(0) if dg is None else dg,
        dprior,
        carry_h,
        carry_j,
    )


synapse_backward = torch.library.custom_op(
    "glazoo::synapse_backward", run_synapse_backward, mutates_args=()
)


@synapse_backward.register_fake
def _(do, dh, dj, du, q, k, w, b, g, prior, h, j, cu_seqlens, pre, exact):  # type: ignore[no-untyped-def]
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    dg = w.new_empty(0) if g is None else like(g)
    return like(q), like(k), like(w), like(b), dg, like(prior), like(dh), like(dj)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.pre, ctx.uncertainty, ctx.exact = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do, dh, dj, du):  # type: ignore[no-untyped-def]
    q, k, w, b, g, prior, h, j, cu_seqlens = ctx.saved_tensors
    du = du if ctx.uncertainty else None
    dq, dk, dw, db, dg, dprior, dh, dj = synapse_backward(
        do, dh, dj, du, q, k, w, b, g, prior, h, j, cu_seqlens, ctx.pre, ctx.exact
    )
    if g is None:
        dg = None
    if h is None:
        dh = dj = None
    return dq, dk, dw, db, dg, dprior, dh, dj, None, None, None, None


synapse_forward.register_autograd(_backward, setup_context=_setup_context)


def full_prior(prior: Tensor, HV: int, K: int) -> Tensor:
    """A prior [HV] or [HV, K] as float32 [HV, K]."""
    if tuple(prior.shape) not in ((HV,), (HV, K)):
        raise ValueError(f"prior: got shape {tuple(prior.shape)}; expected {(HV,)} or {(HV, K)}")
    prior = prior.to(torch.float32)
    return prior if prior.ndim == 2 else prior.unsqueeze(1).expand(HV, K)


def check_states(
    states: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Both initial states in float32, or two None."""
    if states is None:
        return None, None
    for x in states:
        if tuple(x.shape) != shape:
            raise ValueError(f"initial_state: got shape {tuple(x.shape)}; expected two of {shape}")
    return states[0].to(torch.float32), states[1].to(torch.float32)


def wants_gradient(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def run_synapse_step(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None,
    prior: Tensor,
    h: Tensor,
    j: Tensor,
    pre: bool,
    uncertainty: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Output and uncertainty (empty if not asked for) of one token; h and j are updated in
    place."""
    q, k, w, b, g, prior = contiguous(q, k, w, b, g, prior)
    HV, V = w.shape[2:]
    K = k.shape[3]
    o = torch.empty_like(w)
    u = torch.empty_like(w) if uncertainty else None
    tiles = step_tiles(K, V)
    launch(
        synapse_step_kernel,
        (w.shape[0] * HV, -(-V // tiles.BV)),
        tiles,
        q=q,
        k=k,
        w=w,
        b=b,
        g=g,
        prior=prior,
        h=h,
        j=j,
        o=o,
        u=u,
        GATE=gate_kind(g),
        PRE=pre,
        HQ=q.shape[2],
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BK=tiles.BK,
        BV=tiles.BV,
        RECIP=reciprocal_kind(exact),
    )
    return o, w.new_empty(0) if u is None else u


_synapse_step = torch.library.custom_op(
    "glazoo::synapse_step", run_synapse_step, mutates_args=("h", "j")
)


@_synapse_step.register_fake
def _(q, k, w, b, g, prior, h, j, pre, uncertainty, exact):  # type: ignore[no-untyped-def]
    o = torch.empty_like(w, memory_format=torch.contiguous_format)
    return o, torch.empty_like(o) if uncertainty else w.new_empty(0)


def _check(
    q: Tensor, k: Tensor, w: Tensor, b: Tensor, g: Tensor | None, read: str, cu: Tensor | None
) -> None:
    if read not in ("post", "pre"):
        raise ValueError(f"read: got {read!r}; accepted are 'post' and 'pre'")
    check_operands(w, {"q": q, "k": k}, g, None, cu)
    if b.shape != w.shape:
        raise ValueError(f"b: got shape {tuple(b.shape)}; expected that of w, {tuple(w.shape)}")
    check_device("b", b)


def check_reciprocal(reciprocal: str) -> bool:
    if reciprocal not in ("approximate", "exact"):
        raise ValueError(f"reciprocal: got {reciprocal!r}; accepted are 'approximate' and 'exact'")
    return reciprocal == "exact"


def synapse_step(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    state: tuple[Tensor, Tensor],
    read: str = "post",
    uncertainty: bool = False,
    reciprocal: str = "approximate",
) -> tuple[Tensor, Tensor | None]:
    """One token of `synapse`, without gradients; both states are updated in place.

    Args:
        q, k, w, b, g, prior, read, uncertainty, reciprocal: as in `synapse`, T = 1.
        state: h and J, contiguous float32 [B, HV, K, V].

    Returns:
        o [B, 1, HV, V] in w's dtype and the uncertainty, likewise, or None.

    Raises:
        ValueError: a shape, an option or a state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    if w.ndim < 2 or w.shape[1] != 1:
        raise ValueError(f"w: got shape {tuple(w.shape)}; a step takes one token, T = 1")
    _check(q, k, w, b, g, read, None)
    exact = check_reciprocal(reciprocal)
    HV, K = w.shape[2], k.shape[3]
    for x in state:
        check_step(x, (w.shape[0], HV, K, w.shape[3]))
    o, u = _synapse_step(
        q, k, w, b, g, full_prior(prior, HV, K), *state, read == "pre", uncertainty, exact
    )
    return o, u if uncertainty else None


def synapse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    read: str = "post",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
    reciprocal: str = "approximate",
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """Gated linear memory read through an importance of its own for every synapse.

        h_t = Diag(exp g_t) h_{t-1} + k_t w_t^T
        J_t = Diag(exp g_t) J_{t-1} + (k_t^2) b_t^T
        o_t = (h_t / (J_t + prior))^T q_t           (read "pre": h_{t-1}, J_{t-1})
        u_t = (1 / (J_t + prior))^T q_t^2           uncertainty

    Args:
        q: queries, scaled, [B, T, H or HV, K].
        k: keys, [B, T, H or HV, K].
        w: values times write gate, [B, T, HV, V]; float32, float16 or bfloat16.
        b: importance gate, >= 0, [B, T, HV, V].
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        prior: importance before the first token, > 0, [HV] or [HV, K].
        initial_state: h and J, both [N, HV, K, V]; zeros if None.
        read: "post" or "pre".
        uncertainty: whether to return u.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.
        reciprocal: "approximate" (one unit in the last place) or "exact" (correctly rounded,
            slower).

    Returns:
        o [B, T, HV, V] in w's dtype, the final h and J, [N, HV, K, V] in float32, and u like o,
            or None.

    Raises:
        ValueError: a shape or an option is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.

    Reference: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based Models
    (arXiv:2602.09075), the recurrence of Palimpsa in its natural parameters.
    """
    _check(q, k, w, b, g, read, cu_seqlens)
    exact = check_reciprocal(reciprocal)
    HV, V = w.shape[2:]
    K = k.shape[3]
    sequences = w.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, j = check_states(initial_state, (sequences, HV, K, V))
    prior = full_prior(prior, HV, K)
    if w.shape[1] == 1 and cu_seqlens is None and not wants_gradient(q, k, w, b, g, prior, h, j):
        if h is None or j is None:
            h = w.new_zeros(sequences, HV, K, V, dtype=torch.float32)
            state = h, torch.zeros_like(h)
        else:
            state = (
                h.clone(memory_format=torch.contiguous_format),
                j.clone(memory_format=torch.contiguous_format),
            )
        o, u = _synapse_step(q, k, w, b, g, prior, *state, read == "pre", uncertainty, exact)
        return o, state, u if uncertainty else None
    q, k = q.to(w.dtype), k.to(w.dtype)
    o, h, j, u = synapse_forward(
        q, k, w, b, g, prior, h, j, cu_seqlens, read == "pre", uncertainty, exact
    )
    return o, (h, j), u if uncertainty else None
