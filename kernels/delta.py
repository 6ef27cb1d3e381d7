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
    check_operands,
    decay_between,
    decay_from_start,
    dot_precision,
    given_or_zeros,
    launch,
    locate_sequence,
    make_chunks,
    reader_decay,
    reduce_heads,
    state_tiles,
    whole_decay,
    writer_decay,
)
from .step import delta_step, is_step, step_state


@triton.jit(do_not_specialize=["T"])
def delta_state_kernel(
    e,
    k,
    w,
    gate,
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

    With a key-shaped gate e and k arrive as e P and k R. BK covers K.
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
            p_a = gate + (i_c * HV + i_h) * (BT * K) + (BT - 2) * K + o_k
            b_h *= tl.load(p_a, mask=m_k, other=0.0)[:, None]
        b_x = tl.dot(b_e, b_hc, input_precision=PREC, out_dtype=tl.float32)
        if GATE == 1:
            b_x *= decay_from_start(r_hi, r_lo)[:, None]
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
    inverse,
    dfinal,
    dstate,
    dinitial,
    dw,
    cu_seqlens,
    chunk_offsets,
    T,
    GATE: tl.constexpr,
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

    du: what the outputs of a token's own chunk send to u. With a key-shaped gate q, e and k arrive
    as q P, e P and k R. BK covers K.
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
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            c_hi, c_lo = writer_decay(p_d, o_t, length - i_t * BT, HV)
            r_hi, r_lo = reader_decay(p_d, o_t, length - i_t * BT, HV, SHIFT)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_do = (b_do * decay_from_start(c_hi, c_lo)[:, None]).to(b_do.dtype)
            b_dh *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT * K) + (BT - 2) * K + o_k
            b_dh *= tl.load(p_a, mask=m_k, other=0.0)[:, None]
        b_x = tl.dot(b_k, b_dhc, input_precision=PREC, out_dtype=tl.float32)
        if GATE == 1:
            b_x *= decay_between(e_hi, e_lo, c_hi, c_lo)[:, None]
        b_x = (b_du + b_x).to(b_m.dtype)
        b_dw = tl.dot(b_m, b_x, input_precision=PREC, out_dtype=tl.float32)
        tl.store(dw + p_w, b_dw.to(dw.dtype.element_ty), mask=m_tv)
        if GATE == 1:
            b_dw *= decay_from_start(r_hi, r_lo)[:, None]
        b_dh = tl.dot(b_q, b_do, b_dh, input_precision=PREC, out_dtype=tl.float32)
        b_dh = tl.dot(b_e, (-b_dw).to(b_e.dtype), b_dh, input_precision=PREC, out_dtype=tl.float32)
    tl.store(dinitial + i_state + o_kv, b_dh, mask=m_kv)


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
    HV, K, V = w.shape[2], k.shape[3], w.shape[3]
    tiles = state_tiles("delta_state_kernel", K, V, w.dtype, chunks.sequences * HV)
    state = w.new_empty(chunks.count, HV, K, V)
    final = w.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32)
    u = torch.empty_like(w)
    launch(
        delta_state_kernel,
        (chunks.sequences * HV, -(-V // tiles.BV)),
        tiles,
        e=e,
        k=k,
        w=w,
        gate=gate.data,
        inverse=inverse,
        initial=initial,
        state=state,
        final=final,
        u=u,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.offsets,
        T=w.shape[1],
        GATE=gate.kind,
        SHIFT=prev,
        HE=e.shape[2],
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BT=chunks.size,
        BK=tiles.BK,
        BV=tiles.BV,
        PREC=dot_precision(w.dtype),
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
    HV, K, V = do.shape[2], k.shape[3], do.shape[3]
    tiles = state_tiles("delta_dstate_kernel", K, V, do.dtype, chunks.sequences * HV)
    dstate = do.new_empty(chunks.count, HV, K, V)
    dinitial = torch.empty_like(dfinal)
    dw = torch.empty_like(do)
    launch(
        delta_dstate_kernel,
        (chunks.sequences * HV, -(-V // tiles.BV)),
        tiles,
        q=q,
        e=e,
        k=k,
        do=do,
        du=du,
        gate=gate.data,
        inverse=inverse,
        dfinal=dfinal,
        dstate=dstate,
        dinitial=dinitial,
        dw=dw,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.offsets,
        T=do.shape[1],
        GATE=gate.kind,
        SHIFT=prev,
        HQ=q.shape[2],
        HE=e.shape[2],
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BT=chunks.size,
        BK=tiles.BK,
        BV=tiles.BV,
        PREC=dot_precision(do.dtype),
    )
    return dstate, dinitial, dw


def run_delta_forward(
    q: Tensor,
    e: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    prev: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the chunks' triangular inverses for the backward pass."""
    q, e, k, w = (x.contiguous() for x in (q, e, k, w))
    g = None if g is None else g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    chunks = make_chunks(w.shape[0], w.shape[1], cu_seqlens, chunk_tokens(w.dtype))
    gate = chunk_gate(g, chunks)
    score = None
    matrix = None
    if gate.kind == 2:
        score, matrix, q, decayed, k = chunk_readers(q, e, k, gate, chunks, False, prev, True)
        assert decayed is not None
        e = decayed
    inverse = chunk_solve(e, k, gate, matrix, w.shape[2], chunks, prev)
    del matrix
    state, final, u = _delta_state(e, k, w, gate, inverse, initial_state, chunks, prev)
    return chunk_output(q, k, u, gate, state, score, chunks, False), final, inverse


delta_forward = torch.library.custom_op("glazoo::delta", run_delta_forward, mutates_args=())


@delta_forward.register_fake
def _(q, e, k, w, g, initial_state, cu_seqlens, prev):  # type: ignore[no-untyped-def]
    B, T, HV, V = w.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = w.new_empty(sequences, HV, k.shape[3], V, dtype=torch.float32)
    inverse = w.new_empty(B, T, HV, chunk_tokens(w.dtype))
    return torch.empty_like(w, memory_format=torch.contiguous_format), final, inverse


def run_delta_backward(
    do: Tensor,
    dfinal: Tensor,
    inverse: Tensor,
    q: Tensor,
    e: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    prev: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, e, k, w, g (empty without a gate) and of the initial state."""
    do, dfinal = do.contiguous(), dfinal.contiguous()
    q, e, k, w = (x.contiguous() for x in (q, e, k, w))
    g = None if g is None else g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    chunks = make_chunks(w.shape[0], w.shape[1], cu_seqlens, chunk_tokens(w.dtype))
    gate = chunk_gate(g, chunks)
    score = None
    qg, eg, kg = q, e, k
    if gate.kind == 2:
        score, _, qg, decayed, kg = chunk_readers(q, e, k, gate, chunks, False, prev, False)
        assert decayed is not None
        eg = decayed
    state, _, u = _delta_state(eg, kg, w, gate, inverse, initial_state, chunks, prev)
    du = chunk_dvalue(qg, kg, gate, do, None, score, chunks, False)
    dstate, dinitial, dw = _delta_dstate(qg, eg, kg, do, du, gate, inverse, dfinal, chunks, prev)
    del du, score, qg, eg, kg
    dq, de, dk, dg = chunk_dkey(q, e, k, u, gate, state, dstate, do, dw, chunks, False, prev)
    return (
        reduce_heads(dq, q.shape[2]),
        reduce_heads(de, e.shape[2]),
        reduce_heads(dk, k.shape[2]),
        dw,
        dg,
        dinitial,
    )


delta_backward = torch.library.custom_op(
    "glazoo::delta_backward", run_delta_backward, mutates_args=()
)


@delta_backward.register_fake
def _(do, dfinal, inverse, q, e, k, w, g, initial_state, cu_seqlens, prev):  # type: ignore[no-untyped-def]
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    dg = w.new_empty(0) if g is None else like(g)
    return like(q), like(e), like(k), like(w), dg, like(dfinal)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.prev = inputs
    # Without this the backward pass would be handed zeros for the inverses, as large as they are.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, do, dfinal, _):  # type: ignore[no-untyped-def]
    _, _, _, k, w, g, initial_state, cu_seqlens = ctx.saved_tensors
    do, dfinal = given_or_zeros(do, dfinal, k, w, cu_seqlens)
    *grads, dg, dinitial = delta_backward(do, dfinal, *ctx.saved_tensors, ctx.prev)
    dg = None if g is None else dg
    return *grads, dg, None if initial_state is None else dinitial, None, None


delta_forward.register_autograd(_backward, setup_context=_setup_context)


def delta(
    q: Tensor,
    e: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    base: str = "decayed",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule with separate erase and write keys.

        S'_t = Diag(exp g_t) S_{t-1}
        S_t = S'_t + k_t (w_t - X_t^T e_t)^T,   X = S' (base "decayed") or S_{t-1} (base "prev")
        o_t = S_t^T q_t

    Args:
        q: queries, scaled, [B, T, H or HV, K].
        e: erase keys (write gate included), [B, T, H or HV, K].
        k: write keys, [B, T, H or HV, K].
        w: values times write gate, [B, T, HV, V]; float32, float16 or bfloat16.
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        initial_state: [N, HV, K, V], zeros if None.
        base: the state that predicts, "decayed" or "prev".
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        o [B, T, HV, V] in w's dtype and the final state [N, HV, K, V] in float32.

    Raises:
        ValueError: a shape or `base` is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    if base not in ("decayed", "prev"):
        raise ValueError(f"base: got {base!r}; accepted are 'decayed' and 'prev'")
    check_operands(w, {"q": q, "e": e, "k": k}, g, initial_state, cu_seqlens)
    if is_step(w.shape[1], cu_seqlens, q, e, k, w, g, initial_state):
        state = step_state(initial_state, w, k.shape[3])
        return delta_step(q, e, k, w, g, state=state, base=base), state
    start = None if initial_state is None else initial_state.to(torch.float32)
    q, e, k = (x.to(w.dtype) for x in (q, e, k))
    o, final, _ = delta_forward(q, e, k, w, g, start, cu_seqlens, base == "prev")
    return o, final
