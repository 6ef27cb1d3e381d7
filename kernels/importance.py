"""Importance over keys: J_t = exp(g_t) J_{t-1} + b_t k_t^2, and what divides by it, elementwise.

Three passes, so that one long sequence still fills a GPU: what each chunk does to an incoming
state (a factor and a term), the states that enter the chunks, and the tokens of each chunk, with
all that follows from the importance before and after each. The backward pass is the same in
reverse, of the gradient of the importance that a token finds; it begins every few tokens at a
state that the forward pass kept, so that no importance of a token is read.

A program is one warp that walks over the tokens of a chunk with all keys of a head: what it waits
for are the rows of its next few tokens, which it reads together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    IMPORTANCES,
    Chunks,
    Tiles,
    launch,
    locate_chunk,
    locate_sequence,
    make_chunks,
    reciprocal,
    reduce_heads,
)
from .loops import Importance
from .operands import (
    check_importance,
    final_state,
    is_step,
    own_state,
    prepare,
)
from .register import register
from .step import run_importance_step

CHUNK = 64
# Tokens whose rows a program reads together, and between the states that are kept.
ROWS = 4


@triton.jit
def compose(a_x, b_x, a_y, b_y):
    """Apply x -> a_x x + b_x, then x -> a_y x + b_y."""
    return a_x * a_y, a_y * b_x + b_y


@triton.jit
def choose(written, found, previous, AT: tl.constexpr):
    """One of the importances of a token."""
    if AT == 0:
        return written
    if AT == 1:
        return found
    return previous


@triton.jit
def quotient(a, b, RECIP: tl.constexpr):
    """a / b: to the last bit a where b is one, and one where both are the same."""
    if RECIP == 0:
        return tl.div_rn(a, b)
    r = reciprocal(b, RECIP)
    q = a * r
    # A fused multiplication, which leaves what the product lacks.
    return q + (a - q * b) * r


@triton.jit
def load_rows(p, t, limit, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Rows of tokens t, t + 1, ..., in float32; zeros from `limit` on."""
    found = ()
    for u in tl.static_range(ROWS):
        b_x = tl.load(p + (t + u) * STRIDE, mask=t + u < limit, other=0.0)
        found += (b_x.to(tl.float32),)  # type: ignore[assignment]
    return found


@triton.jit(do_not_specialize=["T"])
def importance_kernel(
    x,
    k,
    b,
    g,
    prior,
    entering,
    factor,
    term,
    kept,
    j,
    scaled,
    f,
    reached,
    square,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    AT: tl.constexpr,
    HEAD: tl.constexpr,
    HX: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    RECIP: tl.constexpr,
):
    """Factor and term with which a chunk maps the state that enters it or, from that state, what
    its tokens make: what is None is left out. x is k where it is None.

    kept: the state before every ROWS-th token. j: importance after every token. scaled: x over one
    (AT, a place in IMPORTANCES). f: how a mean is forgotten. reached, square: sums.
    """
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    rows = tl.minimum(length - t0, BT)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    # Of a row no more than its keys.
    limit = tl.where(m_k, rows, 0)
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_k
    p_b = b + row0 * HV + i_h
    p_tk = (row0 * HV + i_h) * K + o_k
    p_c = (i_c * HV + i_h) * K + o_k
    b_f = tl.zeros([BK], tl.float32) + 1.0
    b_j = tl.zeros([BK], tl.float32)
    if entering is not None:
        b_j += tl.load(entering + p_c, mask=m_k, other=0.0)
    if scaled is not None:
        b_prior = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    for t in range(0, rows, ROWS):
        if kept is not None:
            p_kept = ((i_c * (BT // ROWS) + t // ROWS) * HV + i_h) * K + o_k
            tl.store(kept + p_kept, b_j, mask=m_k)
        b_k = load_rows(p_k, t, limit, HK * K, ROWS)
        b_b = load_rows(p_b, t, rows, HV, ROWS)
        if g is not None:
            if HEAD:
                b_g = load_rows(g + row0 * HV + i_h, t, rows, HV, ROWS)
            else:
                b_g = load_rows(g + p_tk, t, limit, HV * K, ROWS)
        if scaled is not None:
            b_x = b_k
            if x is not None:
                p_x = x + (row0 * HX + i_h // (HV // HX)) * K + o_k
                b_x = load_rows(p_x, t, limit, HX * K, ROWS)
        for u in tl.static_range(ROWS):
            b_last = b_j
            b_a = 1.0 if g is None else tl.exp(b_g[u])
            b_kept = b_a * b_last
            b_j = b_kept + b_b[u] * b_k[u] * b_k[u]
            m_t = t + u < limit
            p_t = p_tk + (t + u) * HV * K
            if factor is not None:
                b_f *= b_a
            if j is not None:
                tl.store(j + p_t, b_j, mask=m_t)
            if scaled is not None:
                b_before = b_kept + b_prior
                if f is not None:
                    b_y = tl.log(quotient(b_last + b_prior, b_before, RECIP))
                    tl.store(f + p_t, b_g[u] + b_y, mask=m_t)
                b_total = choose(b_j + b_prior, b_before, b_last + b_prior, AT)
                b_s = quotient(b_x[u], b_total, RECIP)
                tl.store(scaled + p_t, b_s.to(scaled.dtype.element_ty), mask=m_t)
                if reached is not None:
                    # In one order of operations: equal to the last bit where importance is one.
                    o_row = (row0 + t + u) * HV + i_h
                    tl.store(reached + o_row, tl.sum(b_x[u] * b_s, 0), mask=t + u < rows)
                    tl.store(square + o_row, tl.sum(b_x[u] * b_x[u], 0), mask=t + u < rows)
    if factor is not None:
        tl.store(factor + p_c, b_f, mask=m_k)
        tl.store(term + p_c, b_j, mask=m_k)


@triton.jit(do_not_specialize=["T"])
def importance_carry_kernel(
    factor,
    term,
    outside,
    entering,
    leaving,
    cu_seqlens,
    chunk_offsets,
    T,
    REVERSE: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """State that enters every chunk and the one that leaves the sequence; from its end if REVERSE.

    outside: state that enters the sequence, zeros if None.
    """
    i_k = tl.program_id(1)
    i_n = tl.program_id(0) // HV
    i_h = tl.program_id(0) % HV
    _, _, n_t, first = locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT)
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
    tl.store(leaving + p_out, b_j, mask=m_k)


@triton.jit(do_not_specialize=["T"])
def importance_backward_kernel(
    x,
    k,
    b,
    g,
    prior,
    kept,
    dj,
    dscaled,
    df,
    dreached,
    dsquare,
    entering,
    factor,
    term,
    dx,
    dk,
    db,
    dg,
    dprior,
    dk_more,
    dg_more,
    cu_seqlens,
    chunk_ids,
    chunk_offsets,
    T,
    AT: tl.constexpr,
    HEAD: tl.constexpr,
    HX: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    RECIP: tl.constexpr,
):
    """Factor and term with which a chunk maps the gradient of the state that leaves it to that of
    the one that enters it or, from the first, gradients of x and k (per value head), b, g and the
    prior (per chunk). dk_more and dg_more are added to those of k and g.

    With P_t the gradient of the state that token t finds, y_t that of J_t in what the token makes
    of it, m_t of exp(g_t) J_{t-1} and l_t of J_{t-1}: P_t = l_t + exp(g_t) (m_t + y_t + P_{t+1}).
    """
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 >= length:
        return
    row0 = bos + t0
    rows = tl.minimum(length - t0, BT)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    limit = tl.where(m_k, rows, 0)
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K + o_k
    o_h = row0 * HV + i_h
    p_tk = o_h * K + o_k
    p_c = (i_c * HV + i_h) * K + o_k
    b_f = tl.zeros([BK], tl.float32) + 1.0
    b_p = tl.zeros([BK], tl.float32)
    b_dprior = tl.zeros([BK], tl.float32)
    if entering is not None:
        b_p += tl.load(entering + p_c, mask=m_k, other=0.0)
    if dscaled is not None:
        b_prior = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    n_r = tl.cdiv(rows, ROWS)
    for i in range(n_r):
        i_r = n_r - 1 - i
        t = i_r * ROWS
        p_kept = ((i_c * (BT // ROWS) + i_r) * HV + i_h) * K + o_k
        b_j = tl.load(kept + p_kept, mask=m_k, other=0.0)
        b_k = load_rows(p_k, t, limit, HK * K, ROWS)
        b_b = load_rows(b + o_h, t, rows, HV, ROWS)
        if g is not None:
            if HEAD:
                b_g = load_rows(g + row0 * HV + i_h, t, rows, HV, ROWS)
            else:
                b_g = load_rows(g + p_tk, t, limit, HV * K, ROWS)
        if dj is not None:
            b_dj = load_rows(dj + p_tk, t, limit, HV * K, ROWS)
        if dscaled is not None:
            b_x = b_k
            if x is not None:
                p_x = x + (row0 * HX + i_h // (HV // HX)) * K + o_k
                b_x = load_rows(p_x, t, limit, HX * K, ROWS)
            b_ds = load_rows(dscaled + p_tk, t, limit, HV * K, ROWS)
        if df is not None:
            b_df = load_rows(df + p_tk, t, limit, HV * K, ROWS)
        if dreached is not None:
            b_dr = load_rows(dreached + o_h, t, rows, HV, ROWS)
        if dsquare is not None:
            b_dq = load_rows(dsquare + o_h, t, rows, HV, ROWS)
        if dk_more is not None:
            b_dk_more = load_rows(dk_more + p_tk, t, limit, HV * K, ROWS)
        if dg_more is not None:
            if HEAD:
                b_dg_more = load_rows(dg_more + o_h, t, rows, HV, ROWS)
            else:
                b_dg_more = load_rows(dg_more + p_tk, t, limit, HV * K, ROWS)
        # Before every token, and after the last.
        b_js = (b_j,)
        b_as = ()
        for u in tl.static_range(ROWS):
            b_a = 1.0 if g is None else tl.exp(b_g[u])
            b_as += (b_a,)  # type: ignore[assignment]
            b_j = b_a * b_j + b_b[u] * b_k[u] * b_k[u]
            b_js += (b_j,)  # type: ignore[assignment]
        for u in tl.static_range(ROWS - 1, -1, -1):
            m_t = t + u < limit
            p_t = p_tk + (t + u) * HV * K
            b_kept = b_as[u] * b_js[u]
            b_dold = tl.zeros([BK], tl.float32)
            b_dkept = tl.zeros([BK], tl.float32)
            b_dx = tl.zeros([BK], tl.float32)
            if dj is not None:
                b_p += b_dj[u]
            if dscaled is not None:
                b_before = b_kept + b_prior
                b_old = b_js[u] + b_prior
                b_total = choose(b_js[u + 1] + b_prior, b_before, b_old, AT)
                b_rate = reciprocal(b_total, RECIP)
                b_s = b_x[u] * b_rate
                b_dx += b_ds[u] * b_rate
                b_dtotal = -b_dx * b_s
                if dreached is not None:
                    b_r = b_s * b_dr[u]
                    b_dtotal -= b_r * b_s
                    b_dx += 2.0 * b_r
                if dsquare is not None:
                    b_dx += 2.0 * b_x[u] * b_dq[u]
                if df is not None:
                    b_dold += b_df[u] * reciprocal(b_old, RECIP)
                    b_dkept -= b_df[u] * reciprocal(b_before, RECIP)
                b_dprior += b_dtotal + b_dold + b_dkept
                if AT == 0:
                    b_p += b_dtotal
                elif AT == 1:
                    b_dkept += b_dtotal
                else:
                    b_dold += b_dtotal
            b_dkept += b_p
            if entering is not None:
                b_y = b_p * b_k[u]
                tl.store(db + o_h + (t + u) * HV, tl.sum(b_y * b_k[u], 0), mask=t + u < rows)
                b_dk = 2.0 * b_b[u] * b_y
                if dx is not None:
                    tl.store(dx + p_t, b_dx.to(dx.dtype.element_ty), mask=m_t)
                else:
                    b_dk += b_dx
                if dk_more is not None:
                    b_dk += b_dk_more[u]
                tl.store(dk + p_t, b_dk.to(dk.dtype.element_ty), mask=m_t)
                if g is not None:
                    b_dg = b_dkept * b_kept
                    if df is not None:
                        b_dg += b_df[u]
                    if HEAD:
                        b_dg = tl.sum(b_dg, 0)
                        if dg_more is not None:
                            b_dg += b_dg_more[u]
                        tl.store(dg + o_h + (t + u) * HV, b_dg, mask=t + u < rows)
                    else:
                        if dg_more is not None:
                            b_dg += b_dg_more[u]
                        tl.store(dg + p_t, b_dg.to(dg.dtype.element_ty), mask=m_t)
            else:
                b_f *= b_as[u]
            b_p = b_dold + b_as[u] * b_dkept
    if entering is None:
        tl.store(factor + p_c, b_f, mask=m_k)
        tl.store(term + p_c, b_p, mask=m_k)
    if dprior is not None:
        tl.store(dprior + p_c, b_dprior, mask=m_k)


def scan_tiles(K: int) -> Tiles:
    """Configuration of passes that scan a tile of tokens or of chunks."""
    return Tiles(min(32, triton.next_power_of_2(K)), 1, 4, 1)


def _walk_tiles(K: int) -> Tiles:
    """Configuration of passes that walk over the tokens of a chunk."""
    return Tiles(triton.next_power_of_2(K), 1, 1 if K <= 128 else 2, 1)


# What passes over tokens take or make where there is such a thing.
_OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("x", "prior", "entering", "factor", "term")),
    **dict.fromkeys(("kept", "j", "scaled", "f", "reached", "square")),
    **dict.fromkeys(("dj", "dscaled", "df", "dreached", "dsquare", "dx", "dprior")),
    **dict.fromkeys(("dk_more", "dg_more")),
    "at": IMPORTANCES[0],
    "ROWS": ROWS,
    "exact": False,
}


def chunks_of(x: Any) -> Chunks:
    """Chunks of a record's tokens."""
    return make_chunks(x.b.shape[0], x.b.shape[1], x.cu_seqlens, CHUNK)


def kept_states(x: Any, keep: bool) -> Tensor:
    """Room for the states that the backward pass begins at, empty if there will be none."""
    number = chunks_of(x).number * (CHUNK // ROWS) if keep else 0
    return x.b.new_empty(number, x.b.shape[2], x.k.shape[3], dtype=torch.float32)


def carried(
    kernel: Any, x: Any, outside: Tensor | None, leaving: Tensor, made: Any, **own: Any
) -> None:
    """Run a pass over tokens twice: for what chunks do to a state, and for what tokens make of the
    states that enter.

    x: record of operands. outside: the state that enters a sequence. leaving: room for the one that
    leaves it. made: room for what tokens make. own: what else the pass takes.
    """
    chunks, (HV, K) = chunks_of(x), (x.b.shape[2], x.k.shape[3])
    factor, term, entering = x.b.new_empty(3, chunks.number, HV, K, dtype=torch.float32)
    own = _OPTIONAL | x._asdict() | own
    kept = made.get("kept")
    if kept is not None and (x.cu_seqlens is not None or x.b.shape[1] % CHUNK):
        # It is a result, which two calls give alike, also where there is no token.
        kept.zero_()

    def walk(**more: Any) -> None:
        launch(kernel, chunks.number, _walk_tiles(K), chunks, **(own | more))

    walk(**dict.fromkeys(made), factor=factor, term=term)
    launch(
        importance_carry_kernel,
        chunks.sequences,
        scan_tiles(K),
        chunks,
        across="K",
        factor=factor,
        term=term,
        outside=outside,
        entering=entering,
        leaving=leaving,
        T=x.b.shape[1],
        REVERSE=kernel is importance_backward_kernel,
        BC=32,
    )
    walk(**made, entering=entering)


def rooms(x: Any) -> dict[str, Tensor]:
    """Room for gradients of k (per value head), b and, if there is one, g."""
    dg = x.b.new_empty(0) if x.g is None else torch.empty_like(x.g)
    dk = x.k.new_empty(*x.b.shape, x.k.shape[3])
    return {"dk": dk, "db": torch.empty_like(x.b), "dg": dg}


def _allocate(x: Importance, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    K = x.k.shape[3]
    j = x.b.new_empty(*x.b.shape, K, dtype=torch.float32)
    return j, final_state(x.b, K, x.cu_seqlens), kept_states(x, keep)


def forward(x: Importance, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Importance after every token and at the end, float32, and what is kept."""
    if is_step(x.b, x.cu_seqlens, keep):
        state = own_state(x.initial_state, x.b, x.k.shape[3])
        j = run_importance_step(x._replace(initial_state=state))[0]
        return j, state, kept_states(x, False)
    x = prepare(x, wide=("initial_state",))
    j, final, kept = found = _allocate(x, keep)
    made = {"j": j, "kept": kept if keep else None}
    carried(importance_kernel, x, x.initial_state, final, made)
    return found


def gradients(x: Importance, grads: Any, _wanted: Any, kept: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x = prepare(x, wide=("initial_state",))
    HK, K = x.k.shape[2:]
    dj, dfinal = (None if y is None else y.contiguous() for y in grads[:2])
    dinitial, made = final_state(x.b, K, x.cu_seqlens), rooms(x)
    carried(importance_backward_kernel, x, dfinal, dinitial, made, kept=kept, dj=dj)
    return reduce_heads(made["dk"], HK), made["db"], made["dg"], dinitial, None


_importance = register(
    "importance",
    Importance,
    results=("j", "final"),
    kept=("states",),
    forward=forward,
    allocate=_allocate,
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
