"""Scan of fractions over keys, z_t = a_t z_{t-1} / (c_t z_{t-1} + d_t) + u_t, forward and backward.

Tokens compose: z -> (p z + q) / (r z + s), a matrix of nonnegative numbers whose ratios alone
count. Three passes, as `importance` takes them: the matrix of every chunk, the states that enter
the chunks, and the scan inside each chunk. The backward pass is a linear scan in reverse,
acc_t = dz_t + F_{t+1} acc_{t+1} with F = a d / (c z + d)^2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import loops
from .common import Chunks, launch, locate_chunk, locate_sequence, make_chunks
from .importance import CHUNK, compose, importance_carry_kernel, scan_tiles
from .loops import Riccati
from .operands import check_riccati, final_state, given_or_zeros, prepare
from .register import register


@triton.jit
def compose_maps(p_x, q_x, r_x, s_x, p_y, q_y, r_y, s_y):
    """Apply the map x, then y; r + s of what comes out is one."""
    r = r_y * p_x + s_y * r_x
    s = r_y * q_x + s_y * s_x
    scale = 1.0 / (r + s)
    p = (p_y * p_x + q_y * r_x) * scale
    q = (p_y * q_x + q_y * s_x) * scale
    return p, q, r * scale, s * scale


@triton.jit
def load_factor(
    x, row0, i_h, o_t, o_k, m_tk, missing, KEYS: tl.constexpr, HV: tl.constexpr, K: tl.constexpr
):
    """a, c or d as a tile [BT, BK], whether it has one number for all keys or one for each."""
    o_x = ((row0 + o_t) * HV + i_h)[:, None] + tl.zeros_like(o_k)[None, :]
    if KEYS:
        o_x = o_x * K + o_k[None, :]
    return tl.load(x + o_x, mask=m_tk, other=missing)


@triton.jit(do_not_specialize=["T"])
def riccati_scan_kernel(
    u,
    a,
    c,
    d,
    entering,
    maps,
    z,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    A_KEYS: tl.constexpr,
    C_KEYS: tl.constexpr,
    D_KEYS: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """The map of a chunk or, from the state that enters it, the state after each of its tokens."""
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
    b_a = load_factor(a, bos + t0, i_h, o_t, o_k, m_tk, 1.0, A_KEYS, HV, K)
    b_c = load_factor(c, bos + t0, i_h, o_t, o_k, m_tk, 0.0, C_KEYS, HV, K)
    b_d = load_factor(d, bos + t0, i_h, o_t, o_k, m_tk, 1.0, D_KEYS, HV, K)
    b_u = load_factor(u, bos + t0, i_h, o_t, o_k, m_tk, 0.0, True, HV, K)
    b_p, b_q, b_r, b_s = tl.associative_scan(
        (b_a + b_u * b_c, b_u * b_d, b_c, b_d), 0, compose_maps
    )
    if entering is None:
        m_end = (o_t == BT - 1)[:, None]
        p_map = maps + (i_c * HV + i_h) * 4 * K + o_k
        tl.store(p_map, tl.sum(tl.where(m_end, b_p, 0.0), 0), mask=m_k)
        tl.store(p_map + K, tl.sum(tl.where(m_end, b_q, 0.0), 0), mask=m_k)
        tl.store(p_map + 2 * K, tl.sum(tl.where(m_end, b_r, 0.0), 0), mask=m_k)
        tl.store(p_map + 3 * K, tl.sum(tl.where(m_end, b_s, 0.0), 0), mask=m_k)
    else:
        b_z = tl.load(entering + (i_c * HV + i_h) * K + o_k, mask=m_k, other=0.0)[None, :]
        b_z = (b_p * b_z + b_q) / (b_r * b_z + b_s)
        tl.store(z + ((bos + t0 + o_t) * HV + i_h)[:, None] * K + o_k[None, :], b_z, mask=m_tk)


@triton.jit(do_not_specialize=["T"])
def riccati_carry_kernel(
    maps,
    outside,
    entering,
    leaving,
    cu_seqlens,
    chunk_offsets,
    T,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """State that enters every chunk and the one that leaves the sequence; outside: that which
    enters it, zeros if None."""
    i_k = tl.program_id(1)
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    _, _, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
    o_c = tl.arange(0, BC)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    p_out = (i_n.to(tl.int64) * HV + i_h) * K + o_k
    b_z = tl.zeros([BK], tl.float32)
    if outside is not None:
        b_z += tl.load(outside + p_out, mask=m_k, other=0.0)
    if n_t > 0:
        tl.store(entering + (first * HV + i_h) * K + o_k, b_z, mask=m_k)
    for i in range(tl.cdiv(n_t, BC)):
        o_i = i * BC + o_c
        m_ck = (o_i < n_t)[:, None] & m_k[None, :]
        o_row = ((first + o_i) * HV + i_h)[:, None]
        p_map = maps + o_row * 4 * K + o_k[None, :]
        b_p = tl.load(p_map, mask=m_ck, other=1.0)
        b_q = tl.load(p_map + K, mask=m_ck, other=0.0)
        b_r = tl.load(p_map + 2 * K, mask=m_ck, other=0.0)
        b_s = tl.load(p_map + 3 * K, mask=m_ck, other=1.0)
        b_p, b_q, b_r, b_s = tl.associative_scan((b_p, b_q, b_r, b_s), 0, compose_maps)
        b_x = (b_p * b_z[None, :] + b_q) / (b_r * b_z[None, :] + b_s)
        m_next = (o_i + 1 < n_t)[:, None] & m_k[None, :]
        tl.store(entering + (o_row + HV) * K + o_k[None, :], b_x, mask=m_next)
        b_z = tl.sum(tl.where((o_c == BC - 1)[:, None], b_x, 0.0), 0)
    tl.store(leaving + p_out, b_z, mask=m_k)


@triton.jit
def load_step(
    z,
    a,
    c,
    d,
    initial,
    i_n,
    i_h,
    row0,
    t0,
    o_t,
    o_k,
    m_tk,
    A_KEYS: tl.constexpr,
    C_KEYS: tl.constexpr,
    D_KEYS: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
):
    """z before tokens, a, 1 / (c z + d), and F = a d / (c z + d)^2, 1 where there is no token."""
    m_last = m_tk & (t0 + o_t > 0)[:, None]
    b_z = tl.load(
        z + ((row0 + o_t - 1) * HV + i_h)[:, None] * K + o_k[None, :], mask=m_last, other=0.0
    )
    if initial is not None:
        p_0 = initial + (i_n * HV + i_h) * K + o_k[None, :] + tl.zeros_like(o_t)[:, None]
        b_z += tl.load(p_0, mask=m_tk & (t0 + o_t == 0)[:, None], other=0.0)
    b_a = load_factor(a, row0, i_h, o_t, o_k, m_tk, 1.0, A_KEYS, HV, K)
    b_c = load_factor(c, row0, i_h, o_t, o_k, m_tk, 0.0, C_KEYS, HV, K)
    b_d = load_factor(d, row0, i_h, o_t, o_k, m_tk, 1.0, D_KEYS, HV, K)
    b_i = 1.0 / (b_c * b_z + b_d)
    return b_z, b_a, b_i, (b_a * b_i) * (b_d * b_i)


@triton.jit
def store_factor(
    x, b_x, b_sum, row0, i_h, o_t, o_k, m_tk, KEYS: tl.constexpr, HV: tl.constexpr, K: tl.constexpr
):
    """Store the gradient of a, c or d, or add it up where it has one number for all keys."""
    if KEYS:
        tl.store(x + ((row0 + o_t) * HV + i_h)[:, None] * K + o_k[None, :], b_x, mask=m_tk)
    else:
        b_sum += tl.sum(tl.where(m_tk, b_x, 0.0), 1)
    return b_sum


@triton.jit(do_not_specialize=["T"])
def riccati_backward_kernel(
    z,
    dz,
    a,
    c,
    d,
    initial,
    entering,
    factor,
    term,
    da,
    dc,
    dd,
    du,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    A_KEYS: tl.constexpr,
    C_KEYS: tl.constexpr,
    D_KEYS: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Factor and term with which a chunk maps the gradient that comes to its end to the one that
    leaves its start or, from what comes, the gradients of its operands."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    i_n = bos // T if cu_seqlens is None else tl.load(chunk_ids + i_c).to(tl.int64)
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    o_row = (row0 + o_t) * HV + i_h
    m_t = o_t < length - t0
    b_da = tl.zeros([BT], tl.float32)
    b_dc = tl.zeros([BT], tl.float32)
    b_dd = tl.zeros([BT], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        p_c = (i_c * HV + i_h) * K + o_k
        p_tk = o_row[:, None] * K + o_k[None, :]
        b_x = tl.load(dz + p_tk, mask=m_tk, other=0.0)
        b_z, b_a, b_i, b_f = load_step(
            z, a, c, d, initial, i_n, i_h, row0, t0, o_t, o_k, m_tk,
            A_KEYS, C_KEYS, D_KEYS, HV, K,
        )  # fmt: skip
        if entering is None:
            b_f, b_x = tl.associative_scan((b_f, b_f * b_x), 0, compose, reverse=True)
            m_0 = (o_t == 0)[:, None]
            tl.store(factor + p_c, tl.sum(tl.where(m_0, b_f, 0.0), 0), mask=m_k)
            tl.store(term + p_c, tl.sum(tl.where(m_0, b_x, 0.0), 0), mask=m_k)
        else:
            m_next = ((o_t + 1 < BT) & (o_t + 1 < length - t0))[:, None] & m_k[None, :]
            _, _, _, b_f = load_step(
                z, a, c, d, initial, i_n, i_h, row0, t0, o_t + 1, o_k, m_next,
                A_KEYS, C_KEYS, D_KEYS, HV, K,
            )  # fmt: skip
            b_f, b_x = tl.associative_scan((b_f, b_x), 0, compose, reverse=True)
            b_x += b_f * tl.load(entering + p_c, mask=m_k, other=0.0)[None, :]
            tl.store(du + p_tk, b_x, mask=m_tk)
            b_x *= b_z * b_i
            b_da = store_factor(da, b_x, b_da, row0, i_h, o_t, o_k, m_tk, A_KEYS, HV, K)
            b_x *= -b_a * b_i
            b_dd = store_factor(dd, b_x, b_dd, row0, i_h, o_t, o_k, m_tk, D_KEYS, HV, K)
            b_x *= b_z
            b_dc = store_factor(dc, b_x, b_dc, row0, i_h, o_t, o_k, m_tk, C_KEYS, HV, K)
    if entering is not None:
        if not A_KEYS:
            tl.store(da + o_row, b_da, mask=m_t)
        if not C_KEYS:
            tl.store(dc + o_row, b_dc, mask=m_t)
        if not D_KEYS:
            tl.store(dd + o_row, b_dd, mask=m_t)


def _begin(x: Riccati) -> tuple[Riccati, Chunks]:
    """Operands as the kernels take them."""
    x = prepare(x, wide=("a", "c", "d", "u", "initial_state"))
    return x, make_chunks(x.u.shape[0], x.u.shape[1], x.cu_seqlens, CHUNK)


def _final(x: Riccati) -> Tensor:
    return final_state(x.u[..., 0], x.u.shape[3], x.cu_seqlens)


def _allocate(x: Riccati, _keep: bool) -> tuple[Tensor, Tensor]:
    return x.u.new_empty(x.u.shape, dtype=torch.float32), _final(x)


def forward(x: Riccati, _keep: bool) -> tuple[Tensor, Tensor]:
    """z after every token and at the end, float32."""
    x, chunks = _begin(x)
    found = z, final = _allocate(x, False)
    HV, K = x.u.shape[2:]
    tiles = scan_tiles(K)
    maps, entering = (x.u.new_empty(chunks.number, HV, *rest) for rest in ((4, K), (K,)))

    def scan(**own: Any) -> None:
        launch(riccati_scan_kernel, chunks.number, tiles, x, chunks, across="K", **own)

    scan(entering=None, maps=maps, z=None)
    launch(
        riccati_carry_kernel,
        chunks.sequences,
        tiles,
        chunks,
        across="K",
        maps=maps,
        outside=x.initial_state,
        entering=entering,
        leaving=final,
        T=x.u.shape[1],
        BC=32,
    )
    scan(entering=entering, maps=None, z=z)
    return found


def gradients(x: Riccati, grads: Any, _wanted: Any, z: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x, chunks = _begin(x)
    room, dinitial = _allocate(x, False)
    dz, dfinal = given_or_zeros(grads[0], room), given_or_zeros(grads[1], _final(x))
    tiles = scan_tiles(x.u.shape[3])
    factor, term, entering = x.u.new_empty(3, chunks.number, *x.u.shape[2:])
    found = da, dc, dd, du = [torch.empty_like(y) for y in x[:4]]

    def backward(**own: Any) -> None:
        own |= {"z": z, "dz": dz, "initial": x.initial_state}
        launch(riccati_backward_kernel, chunks.number, tiles, x, chunks, **own)

    backward(entering=None, factor=factor, term=term, da=None, dc=None, dd=None, du=None)
    launch(
        importance_carry_kernel,
        chunks.sequences,
        tiles,
        chunks,
        across="K",
        factor=factor,
        term=term,
        outside=dfinal,
        entering=entering,
        leaving=dinitial,
        T=x.u.shape[1],
        REVERSE=True,
        BC=32,
    )
    backward(entering=entering, factor=None, term=None, da=da, dc=dc, dd=dd, du=du)
    return *found, dinitial, None


_riccati = register(
    "riccati",
    Riccati,
    results=("z", "final"),
    reads=("z",),
    forward=forward,
    allocate=_allocate,
    gradients=gradients,
)


def riccati(
    a: Tensor,
    c: Tensor,
    d: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of fractions over keys, the scalar Riccati recursion of a Kalman filter.

        z_t = a_t z_{t-1} / (c_t z_{t-1} + d_t) + u_t      (elementwise over keys)

    Args:
        a: numerator, >= 0, [B, T, HV, 1 or K].
        c: what of the state is in the denominator, >= 0, [B, T, HV, 1 or K].
        d: rest of the denominator, >= 0, [B, T, HV, 1 or K]; c z + d > 0.
        u: what a token adds, >= 0, [B, T, HV, K].
        initial_state: z before the first token, >= 0, [N, HV, K]; zeros if None.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        z [B, T, HV, K] and the final z [N, HV, K], both float32.

    Raises:
        ValueError: a shape is not one of the above, or u is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_riccati(a, c, d, u, initial_state, cu_seqlens)
    if u.shape[1] == 1 and cu_seqlens is None:
        return loops.riccati(a, c, d, u, initial_state=initial_state)
    return _riccati(a, c, d, u, initial_state, cu_seqlens)
