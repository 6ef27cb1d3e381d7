"""Chunk-parallel kernels that `linear` and `delta` share.

Inside a chunk with start state h (decays written as products over tokens, `(j, i]` excludes j):

    P_i = prod (start, i]      R_j = prod (j, end]      A_ij = q_i . prod (j, i] k_j   for j <= i
    o = (q P) h + A w          h_next = prod(chunk) h + (k R)^T w

A key-shaped decay gives each key its own products. They are multiplied up hierarchically: a pair
(i, j) whose positions part at blocks of S tokens needs prod (block start, i] and
prod (j, block end], both products of numbers in [0, 1]. Nothing is divided and no difference of
sums is taken, so a decay of exactly zero stays exact.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Chunks,
    Tiles,
    beside,
    chunk_tiles,
    decay_between,
    decay_from_start,
    halves,
    launch,
    level_mask,
    level_mask_by_pairs,
    load_blocks,
    load_chunk,
    load_factors,
    load_pairs,
    locate_chunk,
    log2_decay,
    power_of_two,
    reader_decay,
    split_log,
    whole_decay,
    widen,
    writer_decay,
)


@triton.jit(do_not_specialize=["T"])
def chunk_gate_kernel(
    g,
    sums,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    HV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Sums of both parts of a head-shaped log decay from the chunk's start to each token."""
    i_c = tl.program_id(0).to(tl.int64)
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    o_t = tl.arange(0, BT)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_th = (o_t < length - t0)[:, None] & (o_h < HV)[None, :]
    o_th = (bos + t0) * HV + o_t[:, None] * HV + o_h[None, :]
    b_hi, b_lo = split_log(tl.load(g + o_th, mask=m_th, other=0.0).to(tl.float32))
    tl.store(sums + 2 * o_th, tl.cumsum(b_hi, 0), mask=m_th)
    tl.store(sums + 2 * o_th + 1, tl.cumsum(b_lo, 0), mask=m_th)


@triton.jit
def block_diagonal(b_d, BT: tl.constexpr):
    """[BT, BT] with the blocks [BT / 16, 16, 16] on its diagonal."""
    o_b = tl.arange(0, BT // 16)
    m_d = (o_b[:, None] == o_b[None, :])[:, None, :, None]
    return tl.reshape(tl.where(m_d, b_d[:, :, None, :], 0.0), [BT, BT])


@triton.jit
def invert_unit_lower(b_l, BT: tl.constexpr, PREC: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L, blocks of 1, 2, 4, .. tokens merged in turn.

    With M the inverse of the block diagonal and O the blocks that the next size adds, it is
    M - M O M: no power of L appears, so the result is as accurate as substitution.
    """
    NB: tl.constexpr = BT // 16
    o_b = tl.arange(0, NB)
    o_i = tl.arange(0, 16)
    m_d = o_b[:, None] == o_b[None, :]
    b_x = tl.where(m_d[:, None, :, None], tl.reshape(b_l, [NB, 16, NB, 16]), 0.0)
    b_d = tl.sum(b_x, 2)
    b_m = tl.where((o_i[:, None] == o_i[None, :])[None, :, :], 1.0, 0.0) + tl.zeros(
        [NB, 16, 16], tl.float32
    )
    for i in range(1, 16):
        m_i = (o_i == i)[None, :, None]
        b_row = tl.sum(tl.where(m_i, b_d, 0.0), 1)
        b_new = tl.sum(b_row[:, :, None] * b_m, 1)
        b_m = tl.where(m_i, b_m - b_new[:, None, :], b_m)
    b_m = block_diagonal(b_m, BT)
    o_t = tl.arange(0, BT)
    for level in tl.static_range(4, 8):
        if (1 << level) < BT:
            b_o = tl.where(level_mask(o_t, o_t, level), b_l, 0.0)
            b_o = tl.dot(b_o, b_m, input_precision=PREC, out_dtype=tl.float32)
            b_m -= tl.dot(b_m, b_o, input_precision=PREC, out_dtype=tl.float32)
    return b_m


@triton.jit(do_not_specialize=["T"])
def chunk_solve_kernel(
    e,
    k,
    gate,
    erase,
    matrix,
    inverse,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    HE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
):
    """(I + L)^-1 of a chunk, L[i, j] = erase_i e_i . prod (j, i] k_j, j < i.

    With a key-shaped gate L is `matrix`.
    """
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    m_t = o_t < length - t0
    if GATE == 2:
        p_m = matrix + (row0 * HV + i_h) * BT + o_t[:, None] * (HV * BT) + o_t[None, :]
        b_l = tl.load(p_m, mask=m_t[:, None], other=0.0)
    else:
        b_l = tl.zeros([BT, BT], tl.float32)
        for i_k in range(tl.cdiv(K, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            p_e = e + (row0 * HE + i_h // (HV // HE)) * K + o_t[:, None] * (HE * K) + o_k[None, :]
            p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_t[None, :] * (HK * K) + o_k[:, None]
            b_e = tl.load(p_e, mask=m_t[:, None] & m_k[None, :], other=0.0)
            b_k = tl.load(p_k, mask=m_k[:, None] & m_t[None, :], other=0.0)
            b_l = tl.dot(b_e, b_k, b_l, input_precision=PREC, out_dtype=tl.float32)
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            r_hi, r_lo = reader_decay(p_d, o_t, length - t0, HV, SHIFT)
            c_hi, c_lo = writer_decay(p_d, o_t, length - t0, HV)
            b_l *= decay_between(r_hi[:, None], r_lo[:, None], c_hi[None, :], c_lo[None, :])
        if erase is not None:
            b_l *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
        b_l = tl.where(o_t[:, None] > o_t[None, :], b_l, 0.0)
    b_m = invert_unit_lower(b_l, BT, PREC)
    p_out = inverse + (row0 * HV + i_h) * BT + o_t[:, None] * (HV * BT) + o_t[None, :]
    tl.store(p_out, b_m.to(inverse.dtype.element_ty), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T"])
def chunk_near_kernel(
    q,
    e,
    k,
    g,
    erase,
    write,
    score,
    matrix,
    q_near,
    e_near,
    k_near,
    gate,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    SHIFT_Q: tl.constexpr,
    SHIFT_E: tl.constexpr,
    SCALE: tl.constexpr,
    HQ: tl.constexpr,
    HE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
):
    """Scores of the pairs inside a block of 16 tokens of a chunk with a key-shaped gate; and q, e
    and k decayed within the block, and the block's decay, for `chunk_far_kernel`.

    score[i, j] = SCALE q_i . prod (j, i] write_j k_j for j <= i, and matrix[i, j] = erase_i e_i .
    prod (j, i] write_j k_j for j < i; with SHIFT prod (j, i) and j < i. One warp, so that none
    waits for another at every level.
    """
    NB: tl.constexpr = BT // 16
    i_b = tl.program_id(0) % NB
    i_h = tl.program_id(0) // NB % HV
    i_c = (tl.program_id(0) // (NB * HV)).to(tl.int64)
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 + 16 * i_b >= length:
        return
    row0 = bos + t0
    p_g = g + (row0 * HV + i_h) * K
    p_blocks = gate + ((i_c * HV + i_h) * NB + i_b) * K
    o_x = tl.arange(0, 16)
    o_t = i_b * 16 + o_x
    o_row = o_t[:, None]
    m_t = o_t < length - t0
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_row * (HK * K)
    p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_row * (HQ * K)
    p_e = p_q
    if e is not None:
        p_e = e + (row0 * HE + i_h // (HV // HE)) * K + o_row * (HE * K)
    p_out = (row0 * HV + i_h) * K + o_row * (HV * K)
    b_s = tl.zeros([16, 16], tl.float32)
    b_m = tl.zeros([16, 16], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        m_tk = m_t[:, None] & m_k
        o_2 = o_k[None, :]
        b_k = tl.load(p_k + o_2, mask=m_tk, other=0.0)
        b_q = tl.load(p_q + o_2, mask=m_tk, other=0.0)
        # A reader's product starts at its own decay, or at 1 where it reads before that decay.
        b_g = log2_decay(tl.load(p_g + o_row * (HV * K) + o_2, mask=m_tk, other=0.0))
        b_a = tl.exp2(b_g)
        b_hi, b_lo = halves(b_g)
        b_x = b_q.to(tl.float32)
        if not SHIFT_Q:
            b_y = tl.dot(b_q, tl.trans(b_k), input_precision=PREC, out_dtype=tl.float32)
            b_s += tl.where(o_x[:, None] == o_x[None, :], b_y, 0.0)
            b_x *= b_a
        b_z = b_x
        if e is not None:
            b_z = tl.load(p_e + o_2, mask=m_tk, other=0.0).to(tl.float32)
            if not SHIFT_E:
                b_z *= b_a
        b_p = tl.full([16, BK], 1.0, tl.float32)
        b_r = tl.full([16, BK], 1.0, tl.float32)
        for level in tl.static_range(4):
            m_s = level_mask(o_x, o_x, level)
            b_kt = tl.trans((b_k * b_r).to(b_k.dtype))
            b_xp = (b_x * b_p).to(b_k.dtype)
            b_y = tl.dot(b_xp, b_kt, input_precision=PREC, out_dtype=tl.float32)
            b_s += tl.where(m_s, b_y, 0.0)
            if matrix is not None:
                b_zp = (b_z * b_p).to(b_k.dtype)
                b_y = tl.dot(b_zp, b_kt, input_precision=PREC, out_dtype=tl.float32)
                b_m += tl.where(m_s, b_y, 0.0)
            b_p, b_r = widen(b_p, b_r, beside(b_hi, b_lo, o_x, level), o_row, level)
        # The same at every token: what is before it, its own and what is after it.
        b_y = b_p * b_a * b_r
        tl.store(p_blocks + o_2 + tl.zeros_like(o_row), b_y, mask=m_k & (o_x == 0)[:, None])
        b_x *= b_p
        tl.store(q_near + p_out + o_2, b_x.to(q_near.dtype.element_ty), mask=m_tk)
        b_r *= b_k
        tl.store(k_near + p_out + o_2, b_r.to(k_near.dtype.element_ty), mask=m_tk)
        if e is not None:
            b_z *= b_p
            tl.store(e_near + p_out + o_2, b_z.to(e_near.dtype.element_ty), mask=m_tk)
    p_2 = (row0 * HV + i_h) * BT + o_row * (HV * BT) + o_t[None, :]
    b_s *= SCALE
    if write is not None:
        b_f = load_factors(write, row0, o_t, m_t, i_h, HV)[None, :]
        b_s *= b_f
        b_m *= b_f
    tl.store(score + p_2, b_s.to(score.dtype.element_ty), mask=m_t[:, None])
    if matrix is not None:
        if erase is not None:
            b_m *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
        tl.store(matrix + p_2, b_m, mask=m_t[:, None])


@triton.jit(do_not_specialize=["T"])
def chunk_far_kernel(
    q_near,
    e_near,
    k_near,
    gate,
    erase,
    write,
    score,
    matrix,
    qg,
    eg,
    kg,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    SCALE: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
):
    """Scores of the pairs of a chunk in different blocks of 16 tokens; and the decayed q P, e P and
    k R, times what multiplies them. Given is what `chunk_near_kernel` leaves."""
    NB: tl.constexpr = BT // 16
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    rows = length - t0
    p_blocks = gate + (i_c * HV + i_h) * (NB * K)
    o_t = tl.arange(0, BT)
    o_row = o_t[:, None]
    m_t = o_t < rows
    p_out = (row0 * HV + i_h) * K + o_row * (HV * K)
    # Of blocks of 16 tokens that lie beside each other in a block of 32, and of those of 32.
    b_s = tl.zeros([BT, BT], tl.float32)
    b_s2 = tl.zeros([BT, BT], tl.float32)
    b_m = tl.zeros([BT, BT], tl.float32)
    b_m2 = tl.zeros([BT, BT], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        m_tk = m_t[:, None] & m_k
        p_2 = p_out + o_k[None, :]
        b_k = tl.load(k_near + p_2, mask=m_tk, other=0.0)
        b_q = tl.load(q_near + p_2, mask=m_tk, other=0.0)
        b_e = b_q
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PREC, out_dtype=tl.float32)
        if eg is not None:
            b_e = tl.load(e_near + p_2, mask=m_tk, other=0.0)
        if matrix is not None:
            b_m = tl.dot(b_e, tl.trans(b_k), b_m, input_precision=PREC, out_dtype=tl.float32)
        b_p = tl.full([BT, BK], 1.0, tl.float32)
        b_r = tl.full([BT, BK], 1.0, tl.float32)
        b_y = load_blocks(p_blocks, o_row >> 4 ^ 1, o_k[None, :], m_k, rows, K)
        b_p, b_r = widen(b_p, b_r, b_y, o_row, 4)
        if BT > 32:
            b_kt = tl.trans((b_k * b_r).to(b_k.dtype))
            b_x = (b_q * b_p).to(b_k.dtype)
            b_s2 = tl.dot(b_x, b_kt, b_s2, input_precision=PREC, out_dtype=tl.float32)
            if matrix is not None:
                b_x = (b_e * b_p).to(b_k.dtype)
                b_m2 = tl.dot(b_x, b_kt, b_m2, input_precision=PREC, out_dtype=tl.float32)
            b_y = load_pairs(p_blocks, o_row >> 5 ^ 1, o_k[None, :], m_k, rows, K)
            b_p, b_r = widen(b_p, b_r, b_y, o_row, 5)
        b_r *= b_k
        if write is not None:
            b_r *= load_factors(write, row0, o_t, m_t, i_h, HV)[:, None]
        tl.store(kg + p_2, b_r.to(kg.dtype.element_ty), mask=m_tk)
        tl.store(qg + p_2, (b_q * (b_p * SCALE)).to(qg.dtype.element_ty), mask=m_tk)
        if eg is not None:
            if erase is not None:
                b_p *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
            tl.store(eg + p_2, (b_e * b_p).to(eg.dtype.element_ty), mask=m_tk)
    p_2 = (row0 * HV + i_h) * BT + o_row * (HV * BT) + o_t[None, :]
    m_2 = m_t[:, None] & ((o_t >> 4)[:, None] != (o_t >> 4)[None, :])
    m_s = level_mask_by_pairs(o_t, o_t, 4)
    m_s2 = level_mask_by_pairs(o_t, o_t, 5)
    b_s = tl.where(m_s, b_s, tl.where(m_s2, b_s2, 0.0)) * SCALE
    b_m = tl.where(m_s, b_m, tl.where(m_s2, b_m2, 0.0))
    if write is not None:
        b_f = load_factors(write, row0, o_t, m_t, i_h, HV)[None, :]
        b_s *= b_f
        b_m *= b_f
    tl.store(score + p_2, b_s.to(score.dtype.element_ty), mask=m_2)
    if matrix is not None:
        if erase is not None:
            b_m *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
        tl.store(matrix + p_2, b_m, mask=m_2)


@triton.jit(do_not_specialize=["T"])
def chunk_output_kernel(
    q,
    k,
    w,
    gate,
    write,
    state,
    score,
    o,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """o = SCALE ((q P) h + A (write w)).

    With a key-shaped gate q arrives as q P and A as `score`, both multiplied.
    """
    i_v = tl.program_id(1)
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    o_row = o_t[:, None]
    m_t = o_t < length - t0
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_o = tl.zeros([BT, BV], tl.float32)
    b_s = tl.zeros([BT, BT], tl.float32)
    p_h = state + (i_c * HV + i_h) * (K * V)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_row * (HQ * K) + o_k[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(
            p_h + o_k[:, None] * V + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0
        )
        b_o = tl.dot(b_q, b_h, b_o, input_precision=PREC, out_dtype=tl.float32)
        if GATE != 2:
            p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_t[None, :] * (HK * K) + o_k[:, None]
            b_kt = tl.load(p_k, mask=m_k[:, None] & m_t[None, :], other=0.0)
            b_s = tl.dot(b_q, b_kt, b_s, input_precision=PREC, out_dtype=tl.float32)
    if GATE == 2:
        p_s = score + (row0 * HV + i_h) * BT + o_row * (HV * BT) + o_t[None, :]
        b_s = tl.load(p_s, mask=m_t[:, None], other=0.0).to(tl.float32)
    else:
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            r_hi, r_lo = reader_decay(p_d, o_t, length - t0, HV, SHIFT)
            c_hi, c_lo = writer_decay(p_d, o_t, length - t0, HV)
            b_o *= decay_from_start(r_hi, r_lo)[:, None]
            b_s *= decay_between(r_hi[:, None], r_lo[:, None], c_hi[None, :], c_lo[None, :])
        b_o *= SCALE
        b_s *= SCALE
        if write is not None:
            b_s *= load_factors(write, row0, o_t, m_t, i_h, HV)[None, :]
        if SHIFT:
            b_s = tl.where(o_t[:, None] > o_t[None, :], b_s, 0.0)
        else:
            b_s = tl.where(o_t[:, None] >= o_t[None, :], b_s, 0.0)
    p_w = (row0 * HV + i_h) * V + o_row * (HV * V) + o_v[None, :]
    m_tv = m_t[:, None] & m_v[None, :]
    b_w = tl.load(w + p_w, mask=m_tv, other=0.0)
    b_o = tl.dot(b_s.to(b_w.dtype), b_w, b_o, input_precision=PREC, out_dtype=tl.float32)
    tl.store(o + p_w, b_o.to(o.dtype.element_ty), mask=m_tv)


@triton.jit(do_not_specialize=["T"])
def chunk_dvalue_kernel(
    q,
    k,
    gate,
    write,
    do,
    dstate,
    score,
    dw,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """dw = write (SCALE A^T do, plus (k R) dh_next if HAS_STATE).

    With a key-shaped gate k arrives as k R and A as `score`, both multiplied.
    """
    i_v = tl.program_id(1)
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    o_row = o_t[:, None]
    m_t = o_t < length - t0
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_dw = tl.zeros([BT, BV], tl.float32)
    b_s = tl.zeros([BT, BT], tl.float32)
    p_h = dstate
    if HAS_STATE:
        p_h = dstate + (i_c * HV + i_h) * (K * V)
    if HAS_STATE or GATE != 2:
        for i_k in range(tl.cdiv(K, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_row * (HK * K) + o_k[None, :]
            b_k = tl.load(p_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
            if HAS_STATE:
                m_kv = m_k[:, None] & m_v[None, :]
                b_h = tl.load(p_h + o_k[:, None] * V + o_v[None, :], mask=m_kv, other=0.0)
                b_dw = tl.dot(b_k, b_h, b_dw, input_precision=PREC, out_dtype=tl.float32)
            if GATE != 2:
                p_q = (
                    q + (row0 * HQ + i_h // (HV // HQ)) * K + o_t[None, :] * (HQ * K) + o_k[:, None]
                )
                b_qt = tl.load(p_q, mask=m_k[:, None] & m_t[None, :], other=0.0)
                b_s = tl.dot(b_k, b_qt, b_s, input_precision=PREC, out_dtype=tl.float32)
    if GATE == 2:
        p_s = score + (row0 * HV + i_h) * BT + o_t[None, :] * (HV * BT) + o_t[:, None]
        b_s = tl.load(p_s, mask=m_t[None, :], other=0.0).to(tl.float32)
    else:
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            r_hi, r_lo = reader_decay(p_d, o_t, length - t0, HV, SHIFT)
            c_hi, c_lo = writer_decay(p_d, o_t, length - t0, HV)
            e_hi, e_lo = whole_decay(p_d, length - t0, HV, BT)
            b_dw *= decay_between(e_hi, e_lo, c_hi, c_lo)[:, None]
            b_s *= decay_between(r_hi[None, :], r_lo[None, :], c_hi[:, None], c_lo[:, None])
        b_s *= SCALE
        if write is not None:
            b_f = load_factors(write, row0, o_t, m_t, i_h, HV)[:, None]
            b_dw *= b_f
            b_s *= b_f
        if SHIFT:
            b_s = tl.where(o_t[:, None] < o_t[None, :], b_s, 0.0)
        else:
            b_s = tl.where(o_t[:, None] <= o_t[None, :], b_s, 0.0)
    p_w = (row0 * HV + i_h) * V + o_row * (HV * V) + o_v[None, :]
    m_tv = m_t[:, None] & m_v[None, :]
    b_do = tl.load(do + p_w, mask=m_tv, other=0.0)
    b_dw = tl.dot(b_s.to(b_do.dtype), b_do, b_dw, input_precision=PREC, out_dtype=tl.float32)
    tl.store(dw + p_w, b_dw.to(dw.dtype.element_ty), mask=m_tv)


@triton.jit
def load_product(state, dstate, p_state, o_k, o_v, m_k, m_v, V: tl.constexpr):
    """Entries of a state times those of its gradient, each loaded for this.

    Of tiles that are also operands of products Triton keeps one copy, and copies the next states
    into it while products of sm_90 still read it.
    """
    p_h = p_state + o_k[:, None] * V + o_v[None, :]
    m_h = m_k[:, None] & m_v[None, :]
    b_h = tl.load(state + p_h, mask=m_h, other=0.0).to(tl.float32)
    return b_h * tl.load(dstate + p_h, mask=m_h, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "dg_stride"])
def chunk_dkey_kernel(
    q,
    e,
    k,
    w,
    gate,
    erase,
    write,
    state,
    dstate,
    do,
    dw,
    dq,
    de,
    dk,
    dg,
    dfactor,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    dg_stride,
    GATE: tl.constexpr,
    HAS_E: tl.constexpr,
    SAME: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT_Q: tl.constexpr,
    SHIFT_E: tl.constexpr,
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
    """Gradients of q, e, k and g of a chunk, for one tile of keys. No gate or a head-shaped one.

    q is multiplied by SCALE, e by erase, k by write: dfactor, of these two, is a sum over the tile.
    SAME: e is k, and dk that of both.
    e reads the state with output gradient -dw (dw: gradient of the values the delta rule is given).
    The gate's gradient at t sums what every pair (writer before t, reader at or after t)
    contributes. Pairs with one end outside the chunk are summed directly; pairs inside are a
    difference of two sums. Where the decay is exactly zero the gradient is exactly zero.
    """
    i_k = tl.program_id(1)
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    rows = length - t0
    o_t = tl.arange(0, BT)
    o_row = o_t[:, None]
    m_t = o_t < rows
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_de = tl.zeros([BT, BK], tl.float32)
    b_ds = tl.zeros([BT, BT], tl.float32)
    b_dl = tl.zeros([BT, BT], tl.float32)
    # By key, so that no warp waits for another in the loop.
    b_last = tl.zeros([BK], tl.float32)
    p_state = (i_c * HV + i_h) * (K * V)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_tv = m_t[:, None] & m_v[None, :]
        p_w = (row0 * HV + i_h) * V + o_row * (HV * V) + o_v[None, :]
        p_h = p_state + o_k[None, :] * V + o_v[:, None]
        b_do = tl.load(do + p_w, mask=m_tv, other=0.0)
        b_w = tl.load(w + p_w, mask=m_tv, other=0.0)
        b_h = tl.load(state + p_h, mask=m_v[:, None] & m_k[None, :], other=0.0)
        b_dh = tl.load(dstate + p_h, mask=m_v[:, None] & m_k[None, :], other=0.0)
        b_ds = tl.dot(b_do, tl.trans(b_w), b_ds, input_precision=PREC, out_dtype=tl.float32)
        b_dq = tl.dot(b_do, b_h, b_dq, input_precision=PREC, out_dtype=tl.float32)
        b_dk = tl.dot(b_w, b_dh, b_dk, input_precision=PREC, out_dtype=tl.float32)
        if GATE != 0:
            b_last += tl.sum(load_product(state, dstate, p_state, o_k, o_v, m_k, m_v, V), 1)
        if HAS_E:
            b_dw = tl.load(dw + p_w, mask=m_tv, other=0.0)
            b_dl = tl.dot(b_dw, tl.trans(b_w), b_dl, input_precision=PREC, out_dtype=tl.float32)
            b_de = tl.dot(b_dw, b_h, b_de, input_precision=PREC, out_dtype=tl.float32)
    if HAS_E:
        b_dl = -b_dl
        b_de = -b_de
    b_k = tl.load(
        k + (row0 * HK + i_h // (HV // HK)) * K + o_row * (HK * K) + o_k[None, :],
        mask=m_tk,
        other=0.0,
    )
    b_q = tl.load(
        q + (row0 * HQ + i_h // (HV // HQ)) * K + o_row * (HQ * K) + o_k[None, :],
        mask=m_tk,
        other=0.0,
    )
    b_dq *= SCALE
    b_ds *= SCALE
    if write is not None:
        b_f = load_factors(write, row0, o_t, m_t, i_h, HV)
        b_k = (b_k * b_f[:, None]).to(b_k.dtype)
    b_e = b_q
    if HAS_E:
        p_e = e + (row0 * HE + i_h // (HV // HE)) * K + o_row * (HE * K) + o_k[None, :]
        b_e = tl.load(p_e, mask=m_tk, other=0.0)
    b_x = tl.zeros([BT], tl.float32)
    b_z = tl.zeros([BT], tl.float32)
    b_now = tl.zeros([BT], tl.float32)
    if GATE == 1:
        p_d = gate + (row0 * HV + i_h) * 2
        r_hi, r_lo = reader_decay(p_d, o_t, rows, HV, SHIFT_Q)
        c_hi, c_lo = writer_decay(p_d, o_t, rows, HV)
        e_hi, e_lo = whole_decay(p_d, rows, HV, BT)
        b_dq *= decay_from_start(r_hi, r_lo)[:, None]
        b_dk *= decay_between(e_hi, e_lo, c_hi, c_lo)[:, None]
        b_ds *= decay_between(r_hi[:, None], r_lo[:, None], c_hi[None, :], c_lo[None, :])
        b_z = tl.sum(b_k * b_dk, 1)
    # A token's read of its own write passes no decay: it is added after the gate's sums.
    b_own = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_ds, 0.0), 1)
    b_s = tl.where(o_t[:, None] > o_t[None, :], b_ds, 0.0).to(b_k.dtype)
    b_dq = tl.dot(b_s, b_k, b_dq, input_precision=PREC, out_dtype=tl.float32)
    b_ik = tl.dot(tl.trans(b_s), b_q, input_precision=PREC, out_dtype=tl.float32)
    if HAS_E:
        if GATE == 1:
            r_hi, r_lo = reader_decay(p_d, o_t, rows, HV, SHIFT_E)
            b_de *= decay_from_start(r_hi, r_lo)[:, None]
            b_dl *= decay_between(r_hi[:, None], r_lo[:, None], c_hi[None, :], c_lo[None, :])
        b_s = tl.where(o_t[:, None] > o_t[None, :], b_dl, 0.0).to(b_k.dtype)
        b_de = tl.dot(b_s, b_k, b_de, input_precision=PREC, out_dtype=tl.float32)
        b_y = tl.sum(b_e * b_de, 1)
        if erase is not None:
            # Not the tile of e, for which registers would have no room.
            b_f = load_factors(erase, row0, o_t, m_t, i_h, HV)
            b_s = (b_s * b_f[:, None]).to(b_k.dtype)
            p_factor = dfactor + i_k.to(tl.int64) * dg_stride + (row0 + o_t) * HV + i_h
            tl.store(p_factor, b_y, mask=m_t)
            b_y *= b_f
        b_ik = tl.dot(tl.trans(b_s), b_e, b_ik, input_precision=PREC, out_dtype=tl.float32)
    if GATE == 1:
        b_x = tl.sum(b_q * b_dq, 1)
        if SHIFT_Q:
            b_now += b_x
        if HAS_E:
            b_x += b_y
            if SHIFT_E:
                b_now += b_y
        b_x -= tl.sum(b_k * b_ik, 1)
        b_total = tl.sum(b_last, 0) * decay_from_start(e_hi, e_lo)
        b_dg = tl.cumsum(b_x, 0, reverse=True) - b_now + tl.cumsum(b_z, 0) - b_z + b_total
        r_hi, r_lo = reader_decay(p_d, o_t, rows, HV, True)
        b_dg = tl.where(decay_between(c_hi, c_lo, r_hi, r_lo) == 0.0, 0.0, b_dg)
        p_dg = dg + i_k.to(tl.int64) * dg_stride + (row0 + o_t) * HV + i_h
        tl.store(p_dg, b_dg, mask=m_t)
    b_dk += b_ik
    if not SHIFT_Q:
        b_dq += b_own[:, None] * b_k
        b_dk += b_own[:, None] * b_q
    p_out = (row0 * HV + i_h) * K + o_row * (HV * K) + o_k[None, :]
    tl.store(dq + p_out, b_dq.to(dq.dtype.element_ty), mask=m_tk)
    if write is not None:
        # Read again, after that store: kept until here, it takes registers.
        p_factor = dfactor + i_k.to(tl.int64) * dg_stride + (row0 + o_t) * HV + i_h
        p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_row * (HK * K) + o_k[None, :]
        b_given = tl.load(p_k, mask=m_tk, other=0.0)
        tl.store(p_factor, tl.sum(b_given * b_dk, 1), mask=m_t)
        b_dk *= load_factors(write, row0, o_t, m_t, i_h, HV)[:, None]
    if erase is not None:
        b_de *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
    if SAME:
        b_dk += b_de
    tl.store(dk + p_out, b_dk.to(dk.dtype.element_ty), mask=m_tk)
    if HAS_E and not SAME:
        tl.store(de + p_out, b_de.to(de.dtype.element_ty), mask=m_tk)


@triton.jit(do_not_specialize=["T"])
def chunk_dscore_kernel(
    w,
    do,
    dw,
    dscore,
    dsolve,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    SCALE: tl.constexpr,
    HAS_E: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradients of the scores, SCALE do w^T, and of L, -dw w^T. Neither is masked."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    m_t = o_t < length - t0
    b_ds = tl.zeros([BT, BT], tl.float32)
    b_dl = tl.zeros([BT, BT], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_tv = m_t[:, None] & m_v[None, :]
        p_w = (row0 * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_wt = tl.trans(tl.load(w + p_w, mask=m_tv, other=0.0))
        b_do = tl.load(do + p_w, mask=m_tv, other=0.0)
        b_ds = tl.dot(b_do, b_wt, b_ds, input_precision=PREC, out_dtype=tl.float32)
        if HAS_E:
            b_dw = tl.load(dw + p_w, mask=m_tv, other=0.0)
            b_dl = tl.dot(b_dw, b_wt, b_dl, input_precision=PREC, out_dtype=tl.float32)
    p_out = (row0 * HV + i_h) * BT + o_t[:, None] * (HV * BT) + o_t[None, :]
    tl.store(dscore + p_out, (b_ds * SCALE).to(dscore.dtype.element_ty), mask=m_t[:, None])
    if HAS_E:
        tl.store(dsolve + p_out, (-b_dl).to(dsolve.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def multiplied(b_x, b_y, m_xy, PREC: tl.constexpr):
    """A product that is accumulated into no other; m_xy: where it is wanted.

    Of products of sm_90 that feed each other through other operations Triton 3.6 forgets a fence.
    """
    b_z = tl.dot(b_x, b_y, input_precision=PREC, out_dtype=tl.float32)
    return tl.where(m_xy, b_z, 0.0)


@triton.jit(do_not_specialize=["T"])
def chunk_dfar_kernel(
    q_near,
    e_near,
    k_near,
    w,
    gate,
    erase,
    write,
    state,
    dstate,
    do,
    dw,
    dscore,
    dsolve,
    dq_near,
    de_near,
    dk_near,
    dg_far,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    SCALE: tl.constexpr,
    SHIFT_Q: tl.constexpr,
    SHIFT_E: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradients of what `chunk_near_kernel` leaves of q, e and k, from outside their blocks of 16
    tokens; and what that gives the gate. For one tile of keys.

    As `chunk_dkey_kernel`: pairs inside the chunk are a difference of two sums for the gate.
    """
    NB: tl.constexpr = BT // 16
    i_k = tl.program_id(1)
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    rows = length - t0
    o_t = tl.arange(0, BT)
    o_row = o_t[:, None]
    m_t = o_t < rows
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    b_q = tl.zeros([BT, BK], tl.float32)
    b_k = tl.zeros([BT, BK], tl.float32)
    b_e = tl.zeros([BT, BK], tl.float32)
    b_last = tl.zeros([BK, BV], tl.float32)
    p_state = (i_c * HV + i_h) * (K * V)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_tv = m_t[:, None] & m_v[None, :]
        m_vk = m_v[:, None] & m_k[None, :]
        p_w = (row0 * HV + i_h) * V + o_row * (HV * V) + o_v[None, :]
        p_h = p_state + o_k[None, :] * V + o_v[:, None]
        b_do = tl.load(do + p_w, mask=m_tv, other=0.0)
        b_w = tl.load(w + p_w, mask=m_tv, other=0.0)
        b_h = tl.load(state + p_h, mask=m_vk, other=0.0)
        b_dh = tl.load(dstate + p_h, mask=m_vk, other=0.0)
        b_q = tl.dot(b_do, b_h, b_q, input_precision=PREC, out_dtype=tl.float32)
        b_k = tl.dot(b_w, b_dh, b_k, input_precision=PREC, out_dtype=tl.float32)
        b_last += load_product(state, dstate, p_state, o_k, o_v, m_k, m_v, V)
        if e_near is not None:
            b_dw = tl.load(dw + p_w, mask=m_tv, other=0.0)
            b_e = tl.dot(b_dw, b_h, b_e, input_precision=PREC, out_dtype=tl.float32)
    # From the chunk's borders to those of its halves, if it has more than two blocks of 16.
    p_blocks = gate + (i_c * HV + i_h) * (NB * K)
    b_one = tl.full([BT, BK], 1.0, tl.float32)
    o_2 = o_k[None, :]
    m_2 = m_k[None, :]
    b_y = load_blocks(p_blocks, o_row >> 4 ^ 1, o_2, m_2, rows, K)
    b_p, b_r = widen(b_one, b_one, b_y, o_row, 4)
    b_q *= SCALE
    p_2 = (row0 * HV + i_h) * K + o_row * (HV * K) + o_2
    b_kn = tl.load(k_near + p_2, mask=m_tk, other=0.0)
    b_qn = tl.load(q_near + p_2, mask=m_tk, other=0.0)
    if write is not None:
        b_f = load_factors(write, row0, o_t, m_t, i_h, HV)[:, None]
        b_kn = (b_kn * b_f).to(b_kn.dtype)
    b_en = b_qn
    if e_near is not None:
        b_e = -b_e
        b_en = tl.load(e_near + p_2, mask=m_tk, other=0.0)
        if erase is not None:
            b_f = load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
            b_en = (b_en * b_f).to(b_en.dtype)
    # Of the pairs inside the chunk.
    b_ik = tl.zeros([BT, BK], tl.float32)
    p_s = (row0 * HV + i_h) * BT + o_row * (HV * BT) + o_t[None, :]
    if BT > 32:
        m_s = m_t[:, None] & level_mask(o_t, o_t, 5)
        b_y = load_pairs(p_blocks, o_row >> 5 ^ 1, o_2, m_2, rows, K)
        b_p2, b_r2 = widen(b_one, b_one, b_y, o_row, 5)
        b_q *= b_p2
        b_k *= b_r2
        b_y = (b_kn * b_r).to(b_kn.dtype)
        b_z = tl.load(dscore + p_s, mask=m_s, other=0.0)
        b_q += multiplied(b_z, b_y, m_tk, PREC)
        b_x = (b_qn * b_p).to(b_kn.dtype)
        b_ik += multiplied(tl.trans(b_z), b_x, m_tk, PREC)
        if e_near is not None:
            b_e *= b_p2
            b_z = tl.load(dsolve + p_s, mask=m_s, other=0.0)
            b_e += multiplied(b_z, b_y, m_tk, PREC)
            b_x = (b_en * b_p).to(b_kn.dtype)
            b_ik += multiplied(tl.trans(b_z), b_x, m_tk, PREC)
    b_q *= b_p
    b_k *= b_r
    b_ik *= b_r
    m_s = m_t[:, None] & level_mask(o_t, o_t, 4)
    b_z = tl.load(dscore + p_s, mask=m_s, other=0.0)
    b_q += multiplied(b_z, b_kn, m_tk, PREC)
    b_ik += multiplied(tl.trans(b_z), b_qn, m_tk, PREC)
    b_late = b_qn * b_q
    b_now = tl.zeros([BT, BK], tl.float32)
    if SHIFT_Q:
        b_now += b_late
    tl.store(dq_near + p_2, b_q.to(dq_near.dtype.element_ty), mask=m_tk)
    if e_near is not None:
        b_e *= b_p
        b_z = tl.load(dsolve + p_s, mask=m_s, other=0.0)
        b_e += multiplied(b_z, b_kn, m_tk, PREC)
        b_ik += multiplied(tl.trans(b_z), b_en, m_tk, PREC)
        tl.store(de_near + p_2, b_e.to(de_near.dtype.element_ty), mask=m_tk)
        b_e *= b_en
        b_late += b_e
        if SHIFT_E:
            b_now += b_e
    b_late -= b_kn * b_ik
    tl.store(dk_near + p_2, (b_k + b_ik).to(dk_near.dtype.element_ty), mask=m_tk)
    b_k *= b_kn
    b_last = tl.sum(b_last, 1) * load_chunk(p_blocks, o_k, m_k, rows, K, NB)
    b_dg = tl.cumsum(b_late, 0, reverse=True) - b_now + tl.cumsum(b_k, 0) - b_k + b_last[None, :]
    tl.store(dg_far + p_2, b_dg, mask=m_tk)


@triton.jit(do_not_specialize=["T"])
def chunk_dnear_kernel(
    q,
    e,
    k,
    g,
    erase,
    write,
    dscore,
    dsolve,
    dq_near,
    de_near,
    dk_near,
    dg_far,
    dq,
    de,
    dk,
    dg,
    dfactor,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    SAME: tl.constexpr,
    SHIFT_Q: tl.constexpr,
    SHIFT_E: tl.constexpr,
    HQ: tl.constexpr,
    HE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradients of q, e, k and g of a block of 16 tokens of a chunk with a key-shaped gate, given
    what comes from outside the block; one warp, as `chunk_near_kernel`.

    SAME: e is k, and dk that of both. dfactor: of what multiplies e or k.
    """
    NB: tl.constexpr = BT // 16
    i_b = tl.program_id(0) % NB
    i_h = tl.program_id(0) // NB % HV
    i_c = (tl.program_id(0) // (NB * HV)).to(tl.int64)
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 + 16 * i_b >= length:
        return
    row0 = bos + t0
    p_g = g + (row0 * HV + i_h) * K
    o_x = tl.arange(0, 16)
    o_t = i_b * 16 + o_x
    o_row = o_t[:, None]
    m_t = o_t < length - t0
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_row * (HK * K)
    p_q = q + (row0 * HQ + i_h // (HV // HQ)) * K + o_row * (HQ * K)
    p_out = (row0 * HV + i_h) * K + o_row * (HV * K)
    p_s = (row0 * HV + i_h) * BT + o_row * (HV * BT) + o_t[None, :]
    b_ds = tl.load(dscore + p_s, mask=m_t[:, None], other=0.0)
    # A token's read of its own write passes no decay: it is added after the gate's sums.
    b_own = tl.where(o_x[:, None] == o_x[None, :], b_ds.to(tl.float32), 0.0)
    b_own = tl.sum(b_own, 1)[:, None]
    p_e = p_q
    b_dl = b_ds
    if e is not None:
        p_e = e + (row0 * HE + i_h // (HV // HE)) * K + o_row * (HE * K)
        b_dl = tl.load(dsolve + p_s, mask=m_t[:, None], other=0.0)
    b_c = tl.full([16, 1], 1.0, tl.float32)
    b_f = tl.full([16, 1], 1.0, tl.float32)
    if write is not None:
        b_c *= load_factors(write, row0, o_t, m_t, i_h, HV)[:, None]
    if erase is not None:
        b_f *= load_factors(erase, row0, o_t, m_t, i_h, HV)[:, None]
    b_dfactor = tl.zeros([16], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        m_tk = m_t[:, None] & m_k
        o_2 = o_k[None, :]
        b_k = tl.load(p_k + o_2, mask=m_tk, other=0.0)
        b_q = tl.load(p_q + o_2, mask=m_tk, other=0.0)
        b_given = b_k
        if write is not None:
            b_k = (b_k * b_c).to(b_k.dtype)
        b_e = b_q
        if e is not None:
            b_e = tl.load(p_e + o_2, mask=m_tk, other=0.0)
            if erase is not None:
                b_given = b_e
                b_e = (b_e * b_f).to(b_e.dtype)
        b_g = log2_decay(tl.load(p_g + o_row * (HV * K) + o_2, mask=m_tk, other=0.0))
        b_a = tl.exp2(b_g)
        b_hi, b_lo = halves(b_g)
        b_p = tl.full([16, BK], 1.0, tl.float32)
        b_r = tl.full([16, BK], 1.0, tl.float32)
        b_dq = tl.zeros([16, BK], tl.float32)
        b_de = tl.zeros([16, BK], tl.float32)
        b_dk = tl.zeros([16, BK], tl.float32)
        for level in tl.static_range(4):
            m_s = level_mask(o_x, o_x, level)
            b_kr = (b_k * b_r).to(b_k.dtype)
            b_pq = b_p if SHIFT_Q else b_p * b_a
            b_z = tl.where(m_s, b_ds, 0.0).to(b_k.dtype)
            b_dq += tl.dot(b_z, b_kr, input_precision=PREC, out_dtype=tl.float32) * b_pq
            b_x = (b_q * b_pq).to(b_k.dtype)
            b_y = tl.dot(tl.trans(b_z), b_x, input_precision=PREC, out_dtype=tl.float32)
            if e is not None:
                b_pe = b_p if SHIFT_E else b_p * b_a
                b_z = tl.where(m_s, b_dl, 0.0).to(b_k.dtype)
                b_de += tl.dot(b_z, b_kr, input_precision=PREC, out_dtype=tl.float32) * b_pe
                b_x = (b_e * b_pe).to(b_k.dtype)
                b_y = tl.dot(tl.trans(b_z), b_x, b_y, input_precision=PREC, out_dtype=tl.float32)
            b_dk += b_y * b_r
            b_p, b_r = widen(b_p, b_r, beside(b_hi, b_lo, o_x, level), o_row, level)
        p_2 = p_out + o_2
        b_late = b_q * b_dq - b_k * b_dk
        b_now = tl.zeros([16, BK], tl.float32)
        if SHIFT_Q:
            b_now += b_q * b_dq
        if e is not None:
            b_late += b_e * b_de
            if SHIFT_E:
                b_now += b_e * b_de
        b_dg = tl.load(dg_far + p_2, mask=m_tk, other=0.0)
        b_dg += tl.cumsum(b_late, 0, reverse=True) - b_now
        b_dg = tl.where(b_a == 0.0, 0.0, b_dg)
        tl.store(dg + p_2, b_dg.to(dg.dtype.element_ty), mask=m_tk)
        b_dq += tl.load(dq_near + p_2, mask=m_tk, other=0.0) * (b_p if SHIFT_Q else b_p * b_a)
        b_dk += tl.load(dk_near + p_2, mask=m_tk, other=0.0) * b_r
        if not SHIFT_Q:
            b_dq += b_own * b_k
            b_dk += b_own * b_q
        tl.store(dq + p_2, b_dq.to(dq.dtype.element_ty), mask=m_tk)
        if write is not None:
            b_dfactor += tl.sum(b_given * b_dk, 1)
            b_dk *= b_c
        if e is not None:
            b_de += tl.load(de_near + p_2, mask=m_tk, other=0.0) * (b_p if SHIFT_E else b_p * b_a)
            if erase is not None:
                b_dfactor += tl.sum(b_given * b_de, 1)
                b_de *= b_f
            if SAME:
                b_dk += b_de
            else:
                tl.store(de + p_2, b_de.to(de.dtype.element_ty), mask=m_tk)
        tl.store(dk + p_2, b_dk.to(dk.dtype.element_ty), mask=m_tk)
    if dfactor is not None:
        tl.store(dfactor + (row0 + o_t) * HV + i_h, b_dfactor, mask=m_t)


def chunk_tokens(dtype: torch.dtype) -> int:
    """Tokens of a chunk; float32 tiles take twice the room."""
    return 32 if dtype == torch.float32 else 64


class Gate(NamedTuple):
    """A decay as the kernels take it, and what operands are multiplied by.

    GATE: 0 none, 1 one per head, 2 one per key. gate, float32: what `chunk_gate_kernel` makes of g
    (GATE 1, [B, T, HV, 2]), or decays of blocks of 16 tokens, which `chunk_near_kernel` fills
    (GATE 2, [chunks, HV, BT / 16, K]). scale: of q.
    [B, T, HV] or None: write, of k, in `linear`; erase and beta, of e and w, in `delta`.
    """

    GATE: int
    g: Tensor | None
    gate: Tensor | None
    scale: float = 1.0
    write: Tensor | None = None
    erase: Tensor | None = None
    beta: Tensor | None = None


def chunk_gate(g: Tensor | None, chunks: Chunks, **factors: Any) -> Gate:
    """Prepare a gate [B, T, HV] or [B, T, HV, K], or none, and `factors` of operands."""
    if g is None:
        return Gate(0, None, None, **factors)
    if g.ndim == 3:
        HV = g.shape[2]
        sums = g.new_empty(*g.shape, 2, dtype=torch.float32)
        BH = min(16, power_of_two(HV))
        grid = (chunks.number, -(-HV // BH))
        launch(chunk_gate_kernel, grid, Tiles(1, 1, 4, 1), chunks, g=g, sums=sums, BH=BH)
        return Gate(1, g, sums, **factors)
    HV, K = g.shape[2:]
    blocks = g.new_empty(chunks.number, HV, chunks.BT // 16, K, dtype=torch.float32)
    return Gate(2, g, blocks, **factors)


class Decayed(NamedTuple):
    """q, e (or none) and k of every value head, [B, T, HV, K], multiplied by their decays."""

    q: Tensor
    e: Any
    k: Tensor


class Near(NamedTuple):
    """The same decayed within blocks of 16 tokens, as `chunk_near_kernel` leaves them."""

    q_near: Tensor
    e_near: Tensor | None
    k_near: Tensor


def chunk_solve(
    e: Tensor, k: Tensor, gate: Gate, matrix: Tensor | None, heads: int, chunks: Chunks, shift: bool
) -> Tensor:
    """Triangular inverse of every chunk, for HV `heads` (see `chunk_solve_kernel`)."""
    B, T, _, K = k.shape
    inverse = k.new_empty(B, T, heads, chunks.BT)
    launch(
        chunk_solve_kernel,
        chunks.number,
        chunk_tiles("chunk_solve_kernel", K, K, k.dtype),
        chunks,
        gate,
        e=e,
        k=k,
        matrix=matrix,
        inverse=inverse,
        SHIFT=shift,
    )
    return inverse


def chunk_readers(
    q: Tensor,
    e: Tensor | None,
    k: Tensor,
    gate: Gate,
    chunks: Chunks,
    shift_q: bool,
    shift_e: bool,
    solve: bool,
) -> tuple[Tensor, Tensor | None, Near, Decayed]:
    """Scores of q, the matrix to `solve`, and q, e, k decayed within blocks of 16 tokens and within
    the chunk, with a key-shaped gate; fills the gate's decays of blocks."""
    assert gate.g is not None
    B, T, HV, K = gate.g.shape
    score = k.new_empty(B, T, HV, chunks.BT)
    matrix = k.new_empty(B, T, HV, chunks.BT, dtype=torch.float32) if solve else None
    q_near, q_far, k_near, k_far = (k.new_empty(gate.g.shape) for _ in range(4))
    e_near, e_far = (None if e is None else torch.empty_like(q_near) for _ in range(2))
    near, far = Near(q_near, e_near, k_near), Decayed(q_far, e_far, k_far)
    launch(
        chunk_near_kernel,
        (chunks.number * HV * (chunks.BT // 16),),
        chunk_tiles("chunk_near_kernel", K, K, k.dtype),
        chunks,
        gate,
        near,
        q=q,
        e=e,
        k=k,
        score=score,
        matrix=matrix,
        SHIFT_Q=shift_q,
        SHIFT_E=shift_e,
    )
    launch(
        chunk_far_kernel,
        chunks.number,
        chunk_tiles("chunk_far_kernel", K, K, k.dtype),
        chunks,
        gate,
        near,
        score=score,
        matrix=matrix,
        qg=far.q,
        eg=far.e,
        kg=far.k,
    )
    return score, matrix, near, far


def chunk_output(
    q: Tensor,
    k: Tensor | None,
    w: Tensor,
    gate: Gate,
    state: Tensor,
    score: Tensor | None,
    chunks: Chunks,
    shift: bool,
) -> Tensor:
    """o = (q P) h + A w for every chunk (see `chunk_output_kernel`)."""
    o = torch.empty_like(w)
    launch(
        chunk_output_kernel,
        chunks.number,
        chunk_tiles("chunk_output_kernel", q.shape[3], w.shape[3], w.dtype),
        chunks,
        gate,
        across="V",
        q=q,
        k=k,
        w=w,
        state=state,
        score=score,
        o=o,
        SHIFT=shift,
    )
    return o


def chunk_dvalue(
    q: Tensor | None,
    k: Tensor,
    gate: Gate,
    do: Tensor,
    dstate: Tensor | None,
    score: Tensor | None,
    chunks: Chunks,
    shift: bool,
) -> Tensor:
    """A^T do, plus (k R) dh_next with `dstate`, for every chunk (see `chunk_dvalue_kernel`)."""
    dw = torch.empty_like(do)
    launch(
        chunk_dvalue_kernel,
        chunks.number,
        chunk_tiles("chunk_dvalue_kernel", k.shape[3], do.shape[3], do.dtype),
        chunks,
        gate,
        across="V",
        q=q,
        k=k,
        do=do,
        dstate=dstate,
        score=score,
        dw=dw,
        SHIFT=shift,
        HAS_STATE=dstate is not None,
    )
    return dw


def chunk_dscore(
    w: Tensor, do: Tensor, dw: Tensor | None, chunks: Chunks, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the scores and, with dw, of what is solved (see `chunk_dscore_kernel`)."""
    B, T, HV, V = w.shape
    dscore = w.new_empty(B, T, HV, chunks.BT)
    dsolve = None if dw is None else torch.empty_like(dscore)
    launch(
        chunk_dscore_kernel,
        chunks.number,
        chunk_tiles("chunk_dscore_kernel", V, V, w.dtype),
        chunks,
        w=w,
        do=do,
        dw=dw,
        dscore=dscore,
        dsolve=dsolve,
        scale=scale,
        HAS_E=dw is not None,
    )
    return dscore, dsolve


def chunk_dkey(
    q: Tensor,
    e: Tensor | None,
    k: Tensor,
    w: Tensor,
    gate: Gate,
    state: Tensor,
    dstate: Tensor,
    do: Tensor,
    dw: Tensor | None,
    chunks: Chunks,
    shift_q: bool,
    shift_e: bool,
    near: Near | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, e, k per value head, of g, and of what multiplies k or e; empty where absent.
    Where e is k, that of k is of both. near: of `chunk_readers`, with a key-shaped gate."""
    (B, T, HV, V), K = w.shape, q.shape[3]
    dq = w.new_empty(B, T, HV, K)
    dk = torch.empty_like(dq)
    same = e is k
    de = w.new_empty(0) if e is None or same else torch.empty_like(dq)
    multiplied = gate.write is not None or gate.erase is not None
    of: dict[str, Any] = {"q": q, "e": e, "k": k, "dq": dq, "de": de, "dk": dk, "SAME": same}
    shifts: dict[str, Any] = {"SHIFT_Q": shift_q, "SHIFT_E": shift_e}
    outside: dict[str, Any] = {"w": w, "state": state, "dstate": dstate, "do": do, "dw": dw}
    if near is None:
        tiles = chunk_tiles("chunk_dkey_kernel", K, V, w.dtype, e is not None)
        blocks = -(-K // tiles.BK)
        dg = w.new_empty(0 if gate.g is None else blocks, B, T, HV, dtype=torch.float32)
        dfactor = w.new_empty(blocks if multiplied else 0, B, T, HV, dtype=torch.float32)
        launch(
            chunk_dkey_kernel,
            chunks.number,
            tiles,
            chunks,
            gate,
            across="K",
            **of,
            **outside,
            **shifts,
            dg=dg,
            dfactor=dfactor,
            dg_stride=B * T * HV,
            HAS_E=e is not None,
        )
        dg = dg if gate.g is None else _over_tiles(dg)
        return dq, de, dk, dg, _over_tiles(dfactor) if multiplied else dfactor
    assert gate.g is not None
    dscore, dsolve = chunk_dscore(w, do, dw, chunks, gate.scale)
    shared: dict[str, Any] = {
        "dscore": dscore,
        "dsolve": dsolve,
        "dq_near": torch.empty_like(near.q_near),
        "de_near": None if e is None else torch.empty_like(near.q_near),
        "dk_near": torch.empty_like(near.q_near),
        "dg_far": torch.empty_like(gate.g, dtype=torch.float32),
    }
    launch(
        chunk_dfar_kernel,
        chunks.number,
        chunk_tiles("chunk_dfar_kernel", K, V, w.dtype),
        chunks,
        gate,
        near,
        across="K",
        **outside,
        **shifts,
        **shared,
    )
    dg = torch.empty_like(gate.g)
    dfactor = w.new_empty((B, T, HV) if multiplied else 0, dtype=torch.float32)
    launch(
        chunk_dnear_kernel,
        (chunks.number * HV * (chunks.BT // 16),),
        chunk_tiles("chunk_dnear_kernel", K, K, w.dtype, e is not None),
        chunks,
        gate,
        **of,
        **shifts,
        **shared,
        dg=dg,
        dfactor=dfactor if multiplied else None,
    )
    return dq, de, dk, dg, dfactor


def _over_tiles(x: Tensor) -> Tensor:
    """The sum over tiles of keys."""
    return x[0] if x.shape[0] == 1 else x.sum(0)
