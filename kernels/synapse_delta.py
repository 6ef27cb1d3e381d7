"""Delta rules with an importance of their own for every synapse, token after token.

    J'_t = a_t J_{t-1}         J_t = J'_t + c_t^2 b_t^T         I' = J' + prior,  I = J + prior
    mu'_t = (a_t I_{t-1} / I'_t) mu_{t-1}                       (frozen: mu' = a mu, J = 0)

    first_order:        mu = mu' + (k / I) (beta (v - x^T e))^T
    exact:              mu = mu' + G * (v - x^T e)^T            G = (k / I') gamma^T
    exact, diagonal:    mu = mu' * (1 - k G) + G v^T

with gamma = beta / (1 + beta z), z = sum_k k^2 / I', and x = mu', or mu_{t-1} for the base "prev".
Where beta is a rate, gamma = beta / ((m - s + beta z) / m) with s = beta sum_k k^2, m = max(s, 1).

A gain that differs from synapse to synapse does not factor, so there is no matmul form: the states
stay in registers, and programs share the work by heads and values. Backward, the states at some
tokens are stored, and from there those of every token of a piece are computed again. Gradients of
what all values share are added up atomically where several programs share the values, so that
their last bits may differ from run to run on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    GAINS,
    Tiles,
    current_target,
    gate_kind,
    launch,
    locate_sequence,
    make_chunks,
    power_of_two,
    reciprocal,
    reduce_heads,
)
from .loops import SynapseDelta
from .operands import (
    as_result,
    check_choice,
    check_device,
    check_operands,
    check_step,
    final_state,
    full_prior,
    given_or_zeros,
    is_step,
    own_state,
    prepare,
    spread,
)
from .register import register, register_step
from .synapse import RECIPROCALS


@triton.jit
def load_decay(g, row, o_k, m_k, GATE: tl.constexpr, K: tl.constexpr):
    """exp(g) of a token as a column of keys, 1 without a gate."""
    if GATE == 0:
        b_a = tl.where(m_k, 1.0, 1.0)
    elif GATE == 1:
        b_a = tl.exp(tl.load(g + row + o_k * 0).to(tl.float32))
    else:
        b_a = tl.exp(tl.load(g + row * K + o_k, mask=m_k, other=0.0).to(tl.float32))
    return b_a


@triton.jit
def load_key(x, row, i_h, o_k, m_k, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    """A vector over keys of a token, of the head that a value head reads."""
    p_x = x + (row * H + i_h // (HV // H)) * K + o_k
    return tl.load(p_x, mask=m_k, other=0.0).to(tl.float32)


@triton.jit
def load_value(x, row, o_v, m_v, V: tl.constexpr):
    return tl.load(x + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)


@triton.jit
def add(p_x, b_x, m_x, PARTS: tl.constexpr):
    """Store, or add to what other programs add to."""
    if PARTS == 1:
        tl.store(p_x, b_x, mask=m_x)
    else:
        tl.atomic_add(p_x, b_x, mask=m_x, sem="relaxed")


@triton.jit
def gain_total(b_k, b_before, b_beta, EXACT: tl.constexpr):
    """Return what the exact gain divides beta by; and for a rate (EXACT 2) s and sum k^2, else
    twice 0."""
    b_z = b_beta * tl.sum((b_k * b_k)[:, None] * b_before, 0)
    b_s = b_z * 0.0
    b_n = b_s
    if EXACT == 2:
        # In the order of the sum above: equal to it, to the last bit, at importance 1.
        b_n = tl.sum((b_k * b_k)[:, None] + tl.zeros_like(b_before), 0)
        b_s = b_beta * b_n
        b_most = tl.maximum(b_s, 1.0)
        b_z = (b_most - b_s + b_z) / b_most
    else:
        b_z += 1.0
    return b_z, b_s, b_n


@triton.jit
def correct(
    b_m,
    b_j,
    b_a,
    b_k,
    b_e,
    b_c,
    b_p,
    b_v,
    b_beta,
    b_b,
    FROZEN: tl.constexpr,
    EXACT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PREV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """mu and J after a token, and 1 / I."""
    if FROZEN:
        b_before = reciprocal(b_p, RECIP)[:, None] + tl.zeros_like(b_m)
        b_after = b_before
        b_x = b_a[:, None] * b_m
    else:
        b_i = b_j + b_p[:, None]
        b_j = b_a[:, None] * b_j
        b_before = reciprocal(b_j + b_p[:, None], RECIP)
        b_x = (b_a[:, None] * b_i * b_before) * b_m
        b_j += (b_c * b_c)[:, None] * b_b[None, :]
        b_after = reciprocal(b_j + b_p[:, None], RECIP)
    if DIAGONAL:
        b_u = b_v
    elif PREV:
        b_u = b_v - tl.sum(b_m * b_e[:, None], 0)
    else:
        b_u = b_v - tl.sum(b_x * b_e[:, None], 0)
    if EXACT:
        b_gamma = b_beta / gain_total(b_k, b_before, b_beta, EXACT)[0]
        b_g = b_k[:, None] * b_before
        if DIAGONAL:
            b_x -= b_x * (b_k[:, None] * b_g * b_gamma[None, :])
        b_m = b_x + b_g * (b_gamma * b_u)[None, :]
    else:
        b_m = b_x + (b_k[:, None] * b_after) * (b_beta * b_u)[None, :]
    return b_m, b_j, b_after


@triton.jit(do_not_specialize=["T"])
def synapse_delta_kernel(
    q,
    k,
    e,
    c,
    v,
    beta,
    b,
    g,
    prior,
    initial_m,
    initial_j,
    final_m,
    final_j,
    o,
    u,
    kept,
    cu_seqlens,
    kept_offsets,
    T,
    PIECE: tl.constexpr,
    GATE: tl.constexpr,
    EXACT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PREV: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HE: tl.constexpr,
    HC: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """Output and final states; or, with `kept`, the states before every PIECE tokens."""
    FROZEN: tl.constexpr = b is None
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, length, _, first = locate_sequence(i_n, T, cu_seqlens, kept_offsets, PIECE)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    p_s = (i_n * HV + i_h) * (K * V) + o_kv
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_m = tl.zeros([BK, BV], tl.float32)
    b_j = tl.zeros([BK, BV], tl.float32)
    if initial_m is not None:
        b_m += tl.load(initial_m + p_s, mask=m_kv, other=0.0)
        if not FROZEN:
            b_j += tl.load(initial_j + p_s, mask=m_kv, other=0.0)
    for t in range(length):
        row = (bos + t) * HV + i_h
        if kept is not None:  # noqa: SIM102
            if t % PIECE == 0:
                p_x = ((first + t // PIECE) * HV + i_h) * (2 * K * V) + o_kv
                tl.store(kept + p_x, b_m, mask=m_kv)
                if not FROZEN:
                    tl.store(kept + p_x + K * V, b_j, mask=m_kv)
        b_a = load_decay(g, row, o_k, m_k, GATE, K)
        b_k = load_key(k, bos + t, i_h, o_k, m_k, HK, HV, K)
        b_e = load_key(e, bos + t, i_h, o_k, m_k, HE, HV, K)
        b_c = load_key(c, bos + t, i_h, o_k, m_k, HC, HV, K)
        b_v = load_value(v, row, o_v, m_v, V)
        b_beta = load_value(beta, row, o_v, m_v, V)
        b_b = b_v
        if not FROZEN:
            b_b = load_value(b, row, o_v, m_v, V)
        b_m, b_j, b_r = correct(
            b_m,
            b_j,
            b_a,
            b_k,
            b_e,
            b_c,
            b_p,
            b_v,
            b_beta,
            b_b,
            FROZEN,
            EXACT,
            DIAGONAL,
            PREV,
            RECIP,
        )
        if kept is None:
            b_q = load_key(q, bos + t, i_h, o_k, m_k, HQ, HV, K)
            b_o = tl.sum(b_m * b_q[:, None], 0)
            tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
            if u is not None:
                b_u = tl.sum(b_r * (b_q * b_q)[:, None], 0)
                tl.store(u + row * V + o_v, b_u.to(u.dtype.element_ty), mask=m_v)
    if kept is None:
        tl.store(final_m + p_s, b_m, mask=m_kv)
        tl.store(final_j + p_s, b_j, mask=m_kv)


@triton.jit(do_not_specialize=["T"])
def synapse_delta_backward_kernel(
    q,
    k,
    e,
    c,
    v,
    beta,
    b,
    g,
    prior,
    kept,
    trace,
    do,
    du,
    dfinal_m,
    dfinal_j,
    dq,
    dk,
    de,
    dc,
    dv,
    dbeta,
    db,
    dg,
    dprior,
    dm,
    dj,
    cu_seqlens,
    kept_offsets,
    T,
    PIECE: tl.constexpr,
    GATE: tl.constexpr,
    EXACT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PREV: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HE: tl.constexpr,
    HC: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """Every gradient; what all values share is added up. trace: room for a piece's states."""
    FROZEN: tl.constexpr = b is None
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1)
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, length, n_p, first = locate_sequence(i_n, T, cu_seqlens, kept_offsets, PIECE)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    p_s = (i_n * HV + i_h) * (K * V) + o_kv
    p_trace = trace + (i_n * HV + i_h) * PIECE * (2 * K * V) + o_kv
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_dp = tl.zeros([BK], tl.float32)
    b_dm = tl.load(dfinal_m + p_s, mask=m_kv, other=0.0)
    b_dj = tl.zeros([BK, BV], tl.float32)
    if not FROZEN:
        b_dj += tl.load(dfinal_j + p_s, mask=m_kv, other=0.0)
    for i in range(n_p):
        i_p = n_p - 1 - i
        p_x = ((first + i_p) * HV + i_h) * (2 * K * V) + o_kv
        b_m = tl.load(kept + p_x, mask=m_kv, other=0.0)
        b_j = tl.zeros([BK, BV], tl.float32)
        if not FROZEN:
            b_j += tl.load(kept + p_x + K * V, mask=m_kv, other=0.0)
        n_t = tl.minimum(length - i_p * PIECE, PIECE)
        for t in range(n_t):
            tl.store(p_trace + t * (2 * K * V), b_m, mask=m_kv)
            if not FROZEN:
                tl.store(p_trace + t * (2 * K * V) + K * V, b_j, mask=m_kv)
            tok = bos + i_p * PIECE + t
            row = tok * HV + i_h
            b_a = load_decay(g, row, o_k, m_k, GATE, K)
            b_k = load_key(k, tok, i_h, o_k, m_k, HK, HV, K)
            b_e = load_key(e, tok, i_h, o_k, m_k, HE, HV, K)
            b_c = load_key(c, tok, i_h, o_k, m_k, HC, HV, K)
            b_v = load_value(v, row, o_v, m_v, V)
            b_beta = load_value(beta, row, o_v, m_v, V)
            b_b = b_v
            if not FROZEN:
                b_b = load_value(b, row, o_v, m_v, V)
            b_m, b_j, _ = correct(
                b_m,
                b_j,
                b_a,
                b_k,
                b_e,
                b_c,
                b_p,
                b_v,
                b_beta,
                b_b,
                FROZEN,
                EXACT,
                DIAGONAL,
                PREV,
                RECIP,
            )
        # Threads may read what others wrote.
        tl.debug_barrier()
        for s in range(n_t):
            t = n_t - 1 - s
            tok = bos + i_p * PIECE + t
            row = tok * HV + i_h
            row_k = row * K
            b_a = load_decay(g, row, o_k, m_k, GATE, K)
            b_q = load_key(q, tok, i_h, o_k, m_k, HQ, HV, K)
            b_k = load_key(k, tok, i_h, o_k, m_k, HK, HV, K)
            b_e = load_key(e, tok, i_h, o_k, m_k, HE, HV, K)
            b_c = load_key(c, tok, i_h, o_k, m_k, HC, HV, K)
            b_v = load_value(v, row, o_v, m_v, V)
            b_beta = load_value(beta, row, o_v, m_v, V)
            b_do = load_value(do, row, o_v, m_v, V)
            b_m = tl.load(p_trace + t * (2 * K * V), mask=m_kv, other=0.0)
            # Forward once more: x is mu', before and after are 1 / I' and 1 / I, y is mu.
            if FROZEN:
                b_before = reciprocal(b_p, RECIP)[:, None] + tl.zeros_like(b_m)
                b_after = b_before
                b_rho = b_a[:, None] + tl.zeros_like(b_m)
            else:
                b_b = load_value(b, row, o_v, m_v, V)
                b_j = tl.load(p_trace + t * (2 * K * V) + K * V, mask=m_kv, other=0.0)
                b_before = reciprocal(b_a[:, None] * b_j + b_p[:, None], RECIP)
                b_rho = b_a[:, None] * (b_j + b_p[:, None]) * b_before
                b_after = b_a[:, None] * b_j + (b_c * b_c)[:, None] * b_b[None, :]
                b_after = reciprocal(b_after + b_p[:, None], RECIP)
            b_x = b_rho * b_m
            b_u = b_v
            if not DIAGONAL:
                if PREV:
                    b_u -= tl.sum(b_m * b_e[:, None], 0)
                else:
                    b_u -= tl.sum(b_x * b_e[:, None], 0)
            if EXACT:
                b_den, b_s, b_n = gain_total(b_k, b_before, b_beta, EXACT)
                b_den = 1.0 / b_den
                b_gamma = b_beta * b_den
                b_kr = b_k[:, None] * b_before
                b_y = b_x + b_kr * (b_gamma * b_u)[None, :]
                if DIAGONAL:
                    b_y -= b_x * (b_k[:, None] * b_kr * b_gamma[None, :])
            else:
                b_kr = b_k[:, None] * b_after
                b_y = b_x + b_kr * (b_beta * b_u)[None, :]
            # What is read.
            b_dm += b_q[:, None] * b_do[None, :]
            b_dq = tl.sum(b_y * b_do[None, :], 1)
            b_di = tl.zeros([BK, BV], tl.float32)
            if du is not None:
                b_du = load_value(du, row, o_v, m_v, V)
                b_dq += 2.0 * b_q * tl.sum(b_after * b_du[None, :], 1)
                b_di -= (b_q * b_q)[:, None] * b_du[None, :] * b_after * b_after
            add(dq + row_k + o_k, b_dq, m_k, NV)
            # What is written: the gain, then the error.
            b_dx = b_dm
            if EXACT:
                if DIAGONAL:
                    b_dx = b_dm * (1.0 - b_k[:, None] * b_kr * b_gamma[None, :])
                    b_w = b_dm * (b_v[None, :] - b_k[:, None] * b_x)
                    b_dk = -tl.sum(b_dm * b_x * b_kr * b_gamma[None, :], 1)
                else:
                    b_w = b_dm * b_u[None, :]
                    b_dk = tl.zeros([BK], tl.float32)
                b_derr = tl.sum(b_dm * b_kr, 0) * b_gamma
                b_dgamma = tl.sum(b_w * b_kr, 0)
                b_dbeta = b_dgamma * b_den * b_den
                b_ds = -b_dgamma * b_gamma * b_gamma
                if EXACT == 2:
                    # From s = 1 on, the total is z / sum k^2, whatever beta is.
                    b_full = b_s >= 1.0
                    b_n = 1.0 / tl.where(b_full, b_n, 1.0)
                    b_dbeta = tl.where(b_full, b_dgamma * b_den, b_dbeta)
                    b_s = tl.where(b_full, b_dgamma * b_gamma * b_n, -b_ds)
                    b_ds = tl.where(b_full, -b_s * b_den, b_ds)
                    b_dk += 2.0 * b_k * tl.sum(b_s, 0)
                tl.store(dbeta + row * V + o_v, b_dbeta.to(dbeta.dtype.element_ty), mask=m_v)
                b_w *= b_gamma[None, :]
                b_dk += tl.sum((b_w + 2.0 * b_k[:, None] * b_ds[None, :]) * b_before, 1)
                b_dr = b_k[:, None] * (b_w + b_k[:, None] * b_ds[None, :])
                b_dn = -b_dr * b_before * b_before
            else:
                b_derr = tl.sum(b_dm * b_kr, 0)
                b_w = b_dm * (b_beta * b_u)[None, :] * b_after
                b_dk = tl.sum(b_w, 1)
                b_di -= b_k[:, None] * b_w * b_after
                tl.store(dbeta + row * V + o_v, (b_derr * b_u).to(dbeta.dtype.element_ty), mask=m_v)
                b_derr *= b_beta
                b_dn = tl.zeros([BK, BV], tl.float32)
            tl.store(dv + row * V + o_v, b_derr.to(dv.dtype.element_ty), mask=m_v)
            add(dk + row_k + o_k, b_dk, m_k, NV)
            # What is predicted.
            if not DIAGONAL:
                if PREV:
                    add(de + row_k + o_k, -tl.sum(b_m * b_derr[None, :], 1), m_k, NV)
                else:
                    add(de + row_k + o_k, -tl.sum(b_x * b_derr[None, :], 1), m_k, NV)
                    b_dx -= b_e[:, None] * b_derr[None, :]
            b_dm = b_rho * b_dx
            if not DIAGONAL:  # noqa: SIM102
                if PREV:
                    b_dm -= b_e[:, None] * b_derr[None, :]
            # Importance, then the decay of both states.
            b_dx *= b_m
            b_dp += tl.sum(b_di + b_dn, 1)
            if FROZEN:
                b_da = tl.sum(b_dx, 1)
            else:
                b_dj += b_di
                add(dc + row_k + o_k, 2.0 * b_c * tl.sum(b_dj * b_b[None, :], 1), m_k, NV)
                b_w = tl.sum(b_dj * (b_c * b_c)[:, None], 0)
                tl.store(db + row * V + o_v, b_w.to(db.dtype.element_ty), mask=m_v)
                b_dn -= b_dx * b_rho * b_before
                b_dp -= tl.sum(b_dx * b_rho * b_before, 1)
                b_dj += b_dn
                b_dx *= b_before
                b_da = tl.sum(b_dx * (b_j + b_p[:, None]) + b_dj * b_j, 1)
                b_dx *= b_a[:, None]
                b_dp += tl.sum(b_dx, 1)
                b_dj = b_a[:, None] * b_dj + b_dx
            if GATE > 0:
                add(dg + row_k + o_k, b_a * b_da, m_k, NV)
        tl.debug_barrier()
    tl.store(dprior + ((i_n * HV + i_h) * NV + i_v) * K + o_k, b_dp, mask=m_k)
    tl.store(dm + p_s, b_dm, mask=m_kv)
    tl.store(dj + p_s, b_dj, mask=m_kv)


@triton.jit
def synapse_delta_step_kernel(
    q,
    k,
    e,
    c,
    v,
    beta,
    b,
    g,
    prior,
    m,
    j,
    o,
    u,
    GATE: tl.constexpr,
    EXACT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PREV: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HE: tl.constexpr,
    HC: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RECIP: tl.constexpr,
):
    """One token; both states updated in place."""
    FROZEN: tl.constexpr = b is None
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row = i_n * HV + i_h
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    p_s = row * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    b_m = tl.load(m + p_s, mask=m_kv, other=0.0)
    b_j = tl.load(j + p_s, mask=m_kv, other=0.0)
    b_a = load_decay(g, row, o_k, m_k, GATE, K)
    b_q = load_key(q, i_n, i_h, o_k, m_k, HQ, HV, K)
    b_k = load_key(k, i_n, i_h, o_k, m_k, HK, HV, K)
    b_e = load_key(e, i_n, i_h, o_k, m_k, HE, HV, K)
    b_c = load_key(c, i_n, i_h, o_k, m_k, HC, HV, K)
    b_v = load_value(v, row, o_v, m_v, V)
    b_beta = load_value(beta, row, o_v, m_v, V)
    b_b = b_v
    if not FROZEN:
        b_b = load_value(b, row, o_v, m_v, V)
    b_m, b_j, b_r = correct(
        b_m, b_j, b_a, b_k, b_e, b_c, b_p, b_v, b_beta, b_b, FROZEN, EXACT, DIAGONAL, PREV, RECIP
    )
    tl.store(m + p_s, b_m, mask=m_kv)
    if not FROZEN:
        tl.store(j + p_s, b_j, mask=m_kv)
    b_o = tl.sum(b_m * b_q[:, None], 0)
    tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    if u is not None:
        b_u = tl.sum(b_r * (b_q * b_q)[:, None], 0)
        tl.store(u + row * V + o_v, b_u.to(u.dtype.element_ty), mask=m_v)


# Tokens between two stored pairs of states in the backward pass; as many are held at a time.
PIECE = 64


def forward_tiles(K: int, V: int, frozen_gate: bool = False) -> Tiles:
    """All keys of some values, 32 synapses a thread, one warp where that suffices: sums over keys
    stay in it. frozen_gate: a walk over tokens with a gate but no importance."""
    BK = power_of_two(K)
    # In one warp the register allocation of these targets spills, in two that of sm_90.
    warps = 2 if frozen_gate and current_target().startswith(("sm_8", "sm_10")) else 1
    BV = min(max(8, warps * 1024 // BK), power_of_two(V))
    return Tiles(BK, BV, max(1, BK * BV // 1024), 1)


def backward_tiles(K: int, V: int) -> Tiles:
    """Eight synapses a thread: some twenty numbers of each are alive at once."""
    BK = power_of_two(K)
    BV = min(2048 // BK, power_of_two(V))
    return Tiles(BK, BV, max(1, BK * BV // 256), 1)


def _rooms(x: SynapseDelta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the output, both final states, and the uncertainty (or nothing)."""
    m = final_state(x.v, x.k.shape[3], x.cu_seqlens)
    u = as_result(x.v) if x.uncertainty else x.v.new_empty(0)
    return as_result(x.v), m, torch.empty_like(m), u


def forward(x: SynapseDelta, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final mu and J, uncertainty (empty if not asked for); e, evidence and beta given."""
    K, V = x.k.shape[3], x.v.shape[3]
    if is_step(x.v, x.cu_seqlens, keep):
        m, j = own_state(x.h, x.v, K), own_state(None if x.b is None else x.j, x.v, K)
        o, u = step(x._replace(h=m, j=j))
        return o, m, j, u
    x = prepare(x, wide=("h", "j"))
    found = o, final_m, final_j, u = _rooms(x)
    launch(
        synapse_delta_kernel,
        final_m.shape[0],
        forward_tiles(K, V, x.b is None and x.g is not None),
        x,
        across="V",
        c=x.evidence,
        initial_m=x.h,
        initial_j=x.j,
        final_m=final_m,
        final_j=final_j,
        o=o,
        u=u if x.uncertainty else None,
        kept=None,
        # No states are kept: any table of offsets serves.
        kept_offsets=x.cu_seqlens,
        PIECE=PIECE,
    )
    return found


def gradients(x: SynapseDelta, grads: Any, _wanted: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x = prepare(x, wide=("h", "j"))
    v, K, V = x.v, x.k.shape[3], x.v.shape[3]
    o, m, j, _ = _rooms(x)
    do, dm, dj = (given_or_zeros(*pair) for pair in zip(grads, (o, m, j), strict=False))
    du = grads[3].contiguous() if x.uncertainty and grads[3] is not None else None
    B, T, HV, _ = v.shape
    chunks = make_chunks(B, T, x.cu_seqlens, PIECE)
    kept = v.new_empty(chunks.number, HV, 2, K, V, dtype=torch.float32)
    launch(
        synapse_delta_kernel,
        chunks.sequences,
        forward_tiles(K, V, x.b is None and x.g is not None),
        x,
        across="V",
        c=x.evidence,
        initial_m=x.h,
        initial_j=x.j,
        final_m=None,
        final_j=None,
        o=None,
        u=None,
        kept=kept,
        kept_offsets=chunks.chunk_offsets,
        PIECE=PIECE,
    )
    tiles = backward_tiles(K, V)
    NV = -(-V // tiles.BV)
    trace = v.new_empty(chunks.sequences, HV, PIECE, 2, K, V, dtype=torch.float32)

    def part(there: bool) -> Tensor:
        return v.new_zeros(B, T, HV, K, dtype=torch.float32) if there else v.new_empty(0)

    dq, dk = part(True), part(True)
    de, dc, dg = part(x.correction == "full"), part(x.b is not None), part(x.g is not None)
    dprior = v.new_empty(chunks.sequences, HV, NV, K, dtype=torch.float32)
    dv, dbeta = torch.empty_like(v), torch.empty_like(x.beta)
    db = v.new_empty(0) if x.b is None else torch.empty_like(x.b)
    dm0, dj0 = torch.empty_like(dm), torch.empty_like(dj)
    launch(
        synapse_delta_backward_kernel,
        chunks.sequences,
        tiles,
        x,
        across="V",
        c=x.evidence,
        kept=kept,
        trace=trace,
        do=do,
        du=du,
        dfinal_m=dm,
        dfinal_j=dj,
        dq=dq,
        dk=dk,
        de=de,
        dc=dc,
        dv=dv,
        dbeta=dbeta,
        db=db,
        dg=dg,
        dprior=dprior,
        dm=dm0,
        dj=dj0,
        kept_offsets=chunks.chunk_offsets,
        PIECE=PIECE,
    )

    def whole(found: Tensor, y: Any) -> Tensor | None:
        return reduce_heads(found, y.shape[2]) if found.numel() else None

    return (
        whole(dq, x.q),
        whole(dk, x.k),
        dv,
        dbeta,
        db,
        dg.sum(3) if gate_kind(x.g) == 1 else dg,
        whole(de, x.e),
        whole(dc, x.evidence),
        dprior.sum((0, 2)),
        dm0,
        dj0,
        None,
    )


_synapse_delta = register(
    "synapse_delta",
    SynapseDelta,
    results=("out", "final_mu", "final_j", "doubt"),
    forward=forward,
    allocate=lambda x, keep: _rooms(x),
    gradients=gradients,
)


def step(x: SynapseDelta) -> tuple[Tensor, Tensor]:
    """Output and uncertainty (empty if not asked for) of one token; h and j are updated in
    place."""
    x = prepare(x)
    o, _, _, u = _rooms(x)
    launch(
        synapse_delta_step_kernel,
        x.v.shape[0],
        forward_tiles(x.k.shape[3], x.v.shape[3]),
        x,
        across="V",
        c=x.evidence,
        m=x.h,
        o=o,
        u=u if x.uncertainty else None,
    )
    return o, u


_synapse_delta_step = register_step(
    "synapse_delta_step",
    SynapseDelta,
    results=("out", "doubt"),
    updates=("h", "j"),
    step=step,
    allocate=lambda x: _rooms(x)[::3],
)


def _check(*given: Any, reciprocal: str) -> SynapseDelta:
    """Checked operands, all of them there but b, g and the states."""
    x = SynapseDelta._make((*given, reciprocal == "exact"))
    check_choice("gain", x.gain, GAINS)
    check_choice("correction", x.correction, ("full", "diagonal"))
    check_choice("base", x.base, ("decayed", "prev"))
    check_choice("reciprocal", reciprocal, RECIPROCALS)
    if x.correction == "diagonal" and x.gain != "exact":
        raise ValueError(
            f"correction: got 'diagonal' with gain {x.gain!r}; accepted with it is 'full'"
        )
    e = x.k if x.e is None else x.e
    c = x.k if x.evidence is None else x.evidence
    keys = {"q": x.q, "k": x.k, "e": e, "evidence": c}
    check_operands(x.v, keys, x.g, [x.h, x.j], x.cu_seqlens)
    for name, y in keys.items():
        check_device(name, y)
    return x._replace(
        beta=spread("beta", x.beta, x.v),
        b=None if x.b is None else spread("b", x.b, x.v),
        e=e,
        evidence=c,
        prior=full_prior(x.prior, x.v.shape[2], x.k.shape[3]),
    )


def synapse_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    g: Tensor | None = None,
    *,
    e: Tensor | None = None,
    evidence: Tensor | None = None,
    prior: Tensor,
    state: tuple[Tensor, Tensor],
    gain: str = "first_order",
    correction: str = "full",
    base: str = "decayed",
    uncertainty: bool = False,
    reciprocal: str = "approximate",
) -> tuple[Tensor, Tensor | None]:
    """One token of `synapse_delta`, without gradients; both states are updated in place.

    Args:
        state: mu and J, contiguous float32 [B, HV, K, V]; J stays as it is without b.
        All others: as in `synapse_delta`, T = 1.

    Returns:
        o [B, 1, HV, V] in v's dtype and the uncertainty, likewise, or None.

    Raises:
        ValueError: a shape, an option or a state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    check_step("v", v, k.shape[3], *state)
    given = (q, k, v, beta, b, g, e, evidence, prior, *state, None)
    x = _check(*given, gain, correction, base, uncertainty, reciprocal=reciprocal)
    o, u = _synapse_delta_step(*x)
    return o, u if uncertainty else None


def synapse_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    g: Tensor | None = None,
    *,
    e: Tensor | None = None,
    evidence: Tensor | None = None,
    prior: Tensor,
    gain: str = "first_order",
    correction: str = "full",
    initial_state: tuple[Tensor, Tensor] | None = None,
    base: str = "decayed",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
    reciprocal: str = "approximate",
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """Delta rule whose gain has an importance of its own for every synapse.

        J' = a J, I' = J' + prior, J = J' + evidence^2 b^T, I = J + prior
        mu' = (a I_{t-1} / I') mu_{t-1}
        first_order:       mu = mu' + (k / I) (beta (v - x^T e))^T
        exact:             mu = mu' + G * (v - x^T e)^T
        exact, diagonal:   mu = mu' * (1 - k G) + G v^T
        o_t = mu_t^T q_t,  u_t = (1 / I_t)^T q_t^2, the uncertainty

    with x = mu' (base "decayed") or mu_{t-1} ("prev"), G = (k / I') gamma^T,
    gamma = beta / (1 + beta sum k^2 / I') and, where the gain is "exact_rate",
    gamma = beta / ((m - s + beta sum k^2 / I') / m) with s = beta sum k^2, m = max(s, 1).

    Args:
        q: queries, scaled, [B, T, H or HV, K].
        k: keys, [B, T, H or HV, K].
        v: values, [B, T, HV, V]; float32, float16 or bfloat16.
        beta: write gate, [B, T, HV] or [B, T, HV, 1 or V]; None is 1.
        b: importance gate, >= 0, like beta; None keeps the importance at the prior.
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        e: erase keys, like k; None is k.
        evidence: keys whose squares the importance counts, like k; None is k.
        prior: importance before the first token, > 0, [HV] or [HV, K].
        gain: "first_order", "exact" (beta is the observation's precision) or "exact_rate" (beta k
            is the step at importance 1).
        correction: "full" or, with the gain "exact", "diagonal".
        initial_state: mu and J, both [N, HV, K, V]; zeros if None.
        base: "decayed" or "prev", which mean the prediction reads.
        uncertainty: whether to return u.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.
        reciprocal: "approximate" (one unit in the last place) or "exact" (correctly rounded,
            slower).

    Returns:
        o [B, T, HV, V] in v's dtype, the final mu and J, [N, HV, K, V] in float32, and u like
            o, or None.

    Raises:
        ValueError: a shape or an option is not one of the above, or v is on no GPU.
        TypeError: a dtype that the kernels do not accept.

    Reference: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based Models
    (arXiv:2602.09075), predict and correct steps; Longhorn (arXiv:2407.14207) is the exact gain
    with the diagonal correction and no b.
    """
    start = initial_state or (None, None)
    given = (q, k, v, beta, b, g, e, evidence, prior, *start, cu_seqlens)
    x = _check(*given, gain, correction, base, uncertainty, reciprocal=reciprocal)
    o, m, j, u = _synapse_delta(*x)
    return o, (m, j), u if uncertainty else None
