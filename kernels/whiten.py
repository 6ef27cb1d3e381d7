"""Keys or queries over an importance, and how a memory is forgotten, in one pass over both.

    last = J_{t-1},  before = exp(g_t) last + prior
    I = J_t + prior  ("written")  or  before  ("found")
    scaled = x / I,  f = g + log((last + prior) / before),  reached = sum x^2 / I

All of it is elementwise, so that it takes as long as its operands need to be read and written. The
backward pass gives the gradient of J_{t-1} with token t, and writes it to the row before.
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
    make_chunks,
    reduce_heads,
)
from .importance import load_decay
from .loops import Whiten
from .operands import (
    check_choice,
    check_device,
    check_importance,
    full_prior,
    given_or_zeros,
    prepare,
    sequences,
)
from .register import register

CHUNK = 32


@triton.jit
def load_before(j, initial, row0, t0, i_n, i_h, o_t, o_k, m_tk, HV: tl.constexpr, K: tl.constexpr):
    """The importance before every token: of the row before, or the initial one."""
    o_row = ((row0 + o_t) * HV + i_h)[:, None] * K + o_k[None, :]
    m_0 = (t0 + o_t == 0)[:, None]
    b_j = tl.load(j + o_row - HV * K, mask=m_tk & (t0 + o_t > 0)[:, None], other=0.0)
    if initial is not None:
        p_0 = initial + (i_n * HV + i_h) * K + o_k[None, :] + tl.zeros_like(o_t)[:, None]
        b_j += tl.load(p_0, mask=m_tk & m_0, other=0.0)
    return b_j


@triton.jit(do_not_specialize=["T"])
def whiten_kernel(
    x,
    j,
    g,
    prior,
    initial,
    scaled,
    f,
    reached,
    square,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    FOUND: tl.constexpr,
    HEAD: tl.constexpr,
    HX: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """What is None is left out: f is how the memory is forgotten, reached and square are sums."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    i_n = bos // T if cu_seqlens is None else tl.load(chunk_ids + i_c).to(tl.int64)
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    m_t = o_t < length - t0
    o_row = (row0 + o_t) * HV + i_h
    b_reached = tl.zeros([BT], tl.float32)
    b_square = tl.zeros([BT], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        p_tk = o_row[:, None] * K + o_k[None, :]
        p_x = x + ((row0 + o_t) * HX + i_h // (HV // HX))[:, None] * K + o_k[None, :]
        b_x = tl.load(p_x, mask=m_tk, other=0.0).to(tl.float32)
        b_prior = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)[None, :]
        if FOUND or f is not None:
            b_last = load_before(j, initial, row0, t0, i_n, i_h, o_t, o_k, m_tk, HV, K)
            b_before = b_last + b_prior
            if g is not None:
                b_before = load_decay(g, row0, i_h, o_t, o_k, m_tk, HEAD, HV, K) * b_last + b_prior
        b_total = b_before if FOUND else tl.load(j + p_tk, mask=m_tk, other=0.0) + b_prior
        b_s = tl.div_rn(b_x, b_total)
        tl.store(scaled + p_tk, b_s.to(scaled.dtype.element_ty), mask=m_tk)
        if f is not None:
            p_g = g + (o_row[:, None] + tl.zeros_like(o_k)[None, :] if HEAD else p_tk)
            b_g = tl.load(p_g, mask=m_tk, other=0.0).to(tl.float32)
            b_f = b_g + tl.log(tl.div_rn(b_last + b_prior, b_before))
            tl.store(f + p_tk, b_f, mask=m_tk)
        # In one order of operations: equal to the last bit where the importance is one.
        b_reached += tl.sum(b_x * b_s, 1)
        b_square += tl.sum(b_x * b_x, 1)
    if reached is not None:
        tl.store(reached + o_row, b_reached, mask=m_t)
        tl.store(square + o_row, b_square, mask=m_t)


@triton.jit
def load_pull(x, total, dscaled, dreached, p_x, p_tk, o_row, m_tk, m_t):
    """x, its quotient, and what the gradients of the quotient and its sum send to the dividend."""
    b_x = tl.load(x + p_x, mask=m_tk, other=0.0).to(tl.float32)
    b_s = tl.div_rn(b_x, total)
    b_through = tl.div_rn(tl.load(dscaled + p_tk, mask=m_tk, other=0.0).to(tl.float32), total)
    b_r = tl.zeros_like(b_s)
    if dreached is not None:
        b_r += b_s * tl.load(dreached + o_row, mask=m_t, other=0.0)[:, None]
    return b_x, b_s, b_through, b_r


@triton.jit(do_not_specialize=["T"])
def whiten_backward_kernel(
    x,
    j,
    g,
    prior,
    initial,
    dscaled,
    df,
    dreached,
    dsquare,
    dx,
    dj,
    dg,
    dprior,
    dinitial,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    FOUND: tl.constexpr,
    HEAD: tl.constexpr,
    HX: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients of x (per value head), J, g, the prior (per chunk) and the initial J.

    J of token t is read by the next token, and where the importance is `written` by its own: row
    t - 1 of dj is written with token t, and the last row of a sequence with its own token.
    """
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    i_n = bos // T if cu_seqlens is None else tl.load(chunk_ids + i_c).to(tl.int64)
    row0 = bos + t0
    o_t = tl.arange(0, BT)
    m_t = o_t < length - t0
    m_next = m_t & (t0 + o_t > 0)
    m_last = t0 + o_t == length - 1
    o_row = (row0 + o_t) * HV + i_h
    o_x = (row0 + o_t) * HX + i_h // (HV // HX)
    b_dg = tl.zeros([BT], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        p_tk = o_row[:, None] * K + o_k[None, :]
        p_x = o_x[:, None] * K + o_k[None, :]
        b_prior = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)[None, :]
        b_last = load_before(j, initial, row0, t0, i_n, i_h, o_t, o_k, m_tk, HV, K)
        b_a = load_decay(g, row0, i_h, o_t, o_k, m_tk, HEAD, HV, K)
        b_before = b_a * b_last + b_prior
        b_total = b_before
        if not FOUND:
            b_total = tl.load(j + p_tk, mask=m_tk, other=0.0) + b_prior
        b_x, b_s, b_through, b_r = load_pull(
            x, b_total, dscaled, dreached, p_x, p_tk, o_row, m_tk, m_t
        )
        b_dx = b_through + 2.0 * b_r
        if dsquare is not None:
            b_dx += 2.0 * b_x * tl.load(dsquare + o_row, mask=m_t, other=0.0)[:, None]
        tl.store(dx + p_tk, b_dx.to(dx.dtype.element_ty), mask=m_tk)
        b_dtotal = -(b_through + b_r) * b_s
        b_dbefore = tl.zeros([BT, BK], tl.float32)
        b_dold = tl.zeros([BT, BK], tl.float32)
        b_y = tl.zeros([BT, BK], tl.float32)
        if df is not None:
            b_y += tl.load(df + p_tk, mask=m_tk, other=0.0)
            b_dold += tl.div_rn(b_y, b_last + b_prior)
            b_dbefore -= tl.div_rn(b_y, b_before)
        b_dprior = b_dtotal + b_dold + b_dbefore
        b_own = b_dtotal
        if FOUND:
            b_dbefore += b_dtotal
            b_own = tl.zeros([BT, BK], tl.float32)
        b_dlast = b_dold + b_dbefore * b_a
        p_i = dinitial + (i_n * HV + i_h) * K + o_k[None, :] + tl.zeros_like(o_t)[:, None]
        tl.store(p_i, b_dlast, mask=m_tk & (t0 + o_t == 0)[:, None])
        if not FOUND:
            # What the row before sends to its own importance.
            m_before = m_next[:, None] & m_k[None, :]
            p_before = p_tk - HV * K
            _, b_s, b_through, b_r = load_pull(
                x,
                b_last + b_prior,
                dscaled,
                dreached,
                p_x - HX * K,
                p_before,
                o_row - HV,
                m_before,
                m_next,
            )
            b_dlast -= (b_through + b_r) * b_s
        tl.store(dj + p_tk - HV * K, b_dlast, mask=m_next[:, None] & m_k[None, :])
        tl.store(dj + p_tk, b_own, mask=m_last[:, None] & m_k[None, :])
        tl.store(dprior + (i_c * HV + i_h) * K + o_k, tl.sum(b_dprior, 0), mask=m_k)
        if g is not None:
            b_y += b_dbefore * b_a * b_last
            if HEAD:
                b_dg += tl.sum(b_y, 1)
            else:
                tl.store(dg + p_tk, b_y.to(dg.dtype.element_ty), mask=m_tk)
    if g is not None and HEAD:
        tl.store(dg + o_row, b_dg.to(dg.dtype.element_ty), mask=m_t)


def whiten_tiles(K: int) -> Tiles:
    """Configuration of both passes."""
    return Tiles(min(64, triton.next_power_of_2(K)), 1, 4, 1)


def _begin(x: Whiten) -> tuple[Whiten, Chunks]:
    """Operands as the kernels take them."""
    x = prepare(x, wide=("j", "initial_state"))
    return x, make_chunks(x.j.shape[0], x.j.shape[1], x.cu_seqlens, CHUNK)


def forward(x: Whiten, _keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The quotient, how the memory is forgotten, and sums; empty where not asked for."""
    x, chunks = _begin(x)
    found = _allocate(x, False)
    scaled, f, reached, square = (y if y.numel() else None for y in found)
    if scaled is None:
        return found
    launch(
        whiten_kernel,
        chunks.number,
        whiten_tiles(x.j.shape[3]),
        x,
        chunks,
        initial=x.initial_state,
        scaled=scaled,
        f=f,
        reached=reached,
        square=square,
        FOUND=x.at == "found",
    )
    return found


def gradients(x: Whiten, grads: Any, _wanted: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x, chunks = _begin(x)
    (_, _, HV, K), HX = x.j.shape, x.x.shape[2]
    dscaled, *rooms = _allocate(x, False)
    dscaled = given_or_zeros(grads[0], dscaled)
    df, dreached, dsquare = (
        y.contiguous() if y is not None and room.numel() else None
        for y, room in zip(grads[1:], rooms, strict=True)
    )
    dx, dj = torch.empty_like(dscaled), torch.empty_like(x.j)
    dg = x.j.new_empty(0) if x.g is None else torch.empty_like(x.g)
    dprior = x.j.new_zeros(chunks.number, HV, K)
    dinitial = x.j.new_zeros(sequences(x.j, x.cu_seqlens), HV, K)
    launch(
        whiten_backward_kernel,
        chunks.number,
        whiten_tiles(K),
        x,
        chunks,
        initial=x.initial_state,
        dscaled=dscaled,
        df=df,
        dreached=dreached,
        dsquare=dsquare,
        dx=dx,
        dj=dj,
        dg=dg,
        dprior=dprior,
        dinitial=dinitial,
        FOUND=x.at == "found",
    )
    return reduce_heads(dx, HX), dj, dg, dprior.sum(0), dinitial, None


def _allocate(x: Whiten, _keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x.j.new_empty
    sums = [wide(x.j.shape[:3] if x.sums else 0, dtype=torch.float32) for _ in range(2)]
    f = wide(x.j.shape if x.forgets else 0, dtype=torch.float32)
    return x.x.new_empty(x.j.shape), f, sums[0], sums[1]


_whiten = register(
    "whiten",
    Whiten,
    results=("scaled", "f", "reached", "square"),
    forward=forward,
    allocate=_allocate,
    gradients=gradients,
)


def whiten(
    x: Tensor,
    j: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    at: str = "written",
    forgets: bool = False,
    sums: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Keys or queries over an importance, and how the mean is forgotten that it belongs to.

        before_t = exp(g_t) J_{t-1} + prior;  I_t = J_t + prior ("written") or before_t ("found")
        scaled_t = x_t / I_t,  reached_t = sum x_t^2 / I_t,  square_t = sum x_t^2
        f_t = g_t + log((J_{t-1} + prior) / before_t)

    Args:
        x: keys or queries, [B, T, H or HV, K]; float32, float16 or bfloat16.
        j: importance above the prior after every token, >= 0, [B, T, HV, K].
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        prior: importance before the first token, > 0, [HV] or [HV, K].
        initial_state: importance above the prior before the first token, [N, HV, K]; zeros if None.
        at: which importance divides, that after the token, "written", or that before it, "found".
        forgets: whether to return f, which needs g.
        sums: whether to return reached and square.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        scaled [B, T, HV, K] in x's dtype; f [B, T, HV, K], reached and square [B, T, HV] in
            float32, or None.

    Raises:
        ValueError: a shape or an option is not one of the above, or x is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("at", at, ("written", "found"))
    if j.ndim != 4:
        raise ValueError(f"j: got shape {tuple(j.shape)}; expected [B, T, HV, K]")
    if forgets and g is None:
        raise ValueError(
            "forgets: got True without g; a memory that does not decay forgets nothing"
        )
    check_device("j", j)
    check_importance(x, j[..., 0], g, initial_state, cu_seqlens)
    prior = full_prior(prior, *j.shape[2:])
    found = _whiten(x, j, g, prior, initial_state, cu_seqlens, at, forgets, sums)
    scaled, f, reached, square = found
    return scaled, f if forgets else None, reached if sums else None, square if sums else None
