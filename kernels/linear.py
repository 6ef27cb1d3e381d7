"""Gated linear recurrence, chunked: S_t = Diag(exp g_t) S_{t-1} + k_t w_t^T, o_t = S_t^T q_t."""

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
from .step import is_step, linear_step, step_state


@triton.jit(do_not_specialize=["T"])
def linear_state_kernel(
    k,
    w,
    gate,
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
    """State at the start of every chunk, and the final one. With a key gate k arrives as k R."""
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
        if GATE == 1:
            p_d = gate + ((bos + i_t * BT) * HV + i_h) * 2
            c_hi, c_lo = writer_decay(p_d, o_t, length - i_t * BT, HV)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_k = (b_k * decay_between(e_hi, e_lo, c_hi, c_lo)[None, :]).to(b_k.dtype)
            b_h *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT * K) + (BT - 2) * K + o_k
            b_h *= tl.load(p_a, mask=m_k, other=0.0)[:, None]
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
    """Gradient of the state at the end of every chunk, and of the initial one.

    With a key-shaped gate q arrives as q P.
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
        if GATE == 1:
            p_d = gate + (row0 * HV + i_h) * 2
            r_hi, r_lo = reader_decay(p_d, o_t, length - i_t * BT, HV, SHIFT)
            e_hi, e_lo = whole_decay(p_d, length - i_t * BT, HV, BT)
            b_q = (b_q * decay_from_start(r_hi, r_lo)[None, :]).to(b_q.dtype)
            b_dh *= decay_from_start(e_hi, e_lo)
        if GATE == 2:
            p_a = gate + (i_c * HV + i_h) * (BT * K) + (BT - 2) * K + o_k
            b_dh *= tl.load(p_a, mask=m_k, other=0.0)[:, None]
        b_dh = tl.dot(b_q, b_do, b_dh, input_precision=PREC, out_dtype=tl.float32)
    tl.store(dinitial + i_state + o_kv, b_dh, mask=m_kv)


def _linear_state(
    k: Tensor,
    w: Tensor,
    gate: Gate,
    initial: Tensor | None,
    chunks: Chunks,
) -> tuple[Tensor, Tensor]:
    heads, value_heads, K, V = k.shape[2], w.shape[2], k.shape[3], w.shape[3]
    tiles = state_tiles("linear_state_kernel", K, V, w.dtype)
    state = w.new_empty(chunks.count, value_heads, K, V)
    final = w.new_empty(chunks.sequences, value_heads, K, V, dtype=torch.float32)
    launch(
        linear_state_kernel,
        (chunks.sequences * value_heads, -(-K // tiles.BK) * -(-V // tiles.BV)),
        tiles,
        k=k,
        w=w,
        gate=gate.data,
        initial=initial,
        state=state,
        final=final,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.offsets,
        T=w.shape[1],
        GATE=gate.kind,
        HK=heads,
        HV=value_heads,
        K=K,
        V=V,
        BT=chunks.size,
        BK=tiles.BK,
        BV=tiles.BV,
        PREC=dot_precision(w.dtype),
    )
    return state, final


def _linear_dstate(
    q: Tensor,
    do: Tensor,
    gate: Gate,
    dfinal: Tensor,
    chunks: Chunks,
    pre: bool,
) -> tuple[Tensor, Tensor]:
    heads, value_heads, K, V = q.shape[2], do.shape[2], q.shape[3], do.shape[3]
    tiles = state_tiles("linear_dstate_kernel", K, V, do.dtype)
    dstate = do.new_empty(chunks.count, value_heads, K, V)
    dinitial = torch.empty_like(dfinal)
    launch(
        linear_dstate_kernel,
        (chunks.sequences * value_heads, -(-K // tiles.BK) * -(-V // tiles.BV)),
        tiles,
        q=q,
        do=do,
        gate=gate.data,
        dfinal=dfinal,
        dstate=dstate,
        dinitial=dinitial,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.offsets,
        T=do.shape[1],
        GATE=gate.kind,
        SHIFT=pre,
        HQ=heads,
        HV=value_heads,
        K=K,
        V=V,
        BT=chunks.size,
        BK=tiles.BK,
        BV=tiles.BV,
        PREC=dot_precision(do.dtype),
    )
    return dstate, dinitial


def run_linear_forward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    pre: bool,
) -> tuple[Tensor, Tensor]:
    """Output and final state; operands of one dtype. `pre`: read before the write."""
    q, k, w = q.contiguous(), k.contiguous(), w.contiguous()
    g = None if g is None else g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    chunks = make_chunks(w.shape[0], w.shape[1], cu_seqlens, chunk_tokens(w.dtype))
    gate = chunk_gate(g, chunks)
    if gate.kind == 2:
        score, _, qg, _, kg = chunk_readers(q, None, k, gate, chunks, pre, False, False)
        state, final = _linear_state(kg, w, gate, initial_state, chunks)
        return chunk_output(qg, None, w, gate, state, score, chunks, pre), final
    state, final = _linear_state(k, w, gate, initial_state, chunks)
    return chunk_output(q, k, w, gate, state, None, chunks, pre), final


linear_forward = torch.library.custom_op("glazoo::linear", run_linear_forward, mutates_args=())


@linear_forward.register_fake
def _(q, k, w, g, initial_state, cu_seqlens, pre):  # type: ignore[no-untyped-def]
    sequences = w.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = w.new_empty(sequences, w.shape[2], k.shape[3], w.shape[3], dtype=torch.float32)
    return torch.empty_like(w, memory_format=torch.contiguous_format), final


def run_linear_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w, g (empty without a gate) and of the initial state."""
    do, dfinal = do.contiguous(), dfinal.contiguous()
    q, k, w = q.contiguous(), k.contiguous(), w.contiguous()
    g = None if g is None else g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    chunks = make_chunks(w.shape[0], w.shape[1], cu_seqlens, chunk_tokens(w.dtype))
    gate = chunk_gate(g, chunks)
    if gate.kind == 2:
        score, _, qg, _, kg = chunk_readers(q, None, k, gate, chunks, pre, False, False)
        state, _ = _linear_state(kg, w, gate, initial_state, chunks)
        dstate, dinitial = _linear_dstate(qg, do, gate, dfinal, chunks, pre)
        dw = chunk_dvalue(None, kg, gate, do, dstate, score, chunks, pre)
        del score, qg, kg
    else:
        state, _ = _linear_state(k, w, gate, initial_state, chunks)
        dstate, dinitial = _linear_dstate(q, do, gate, dfinal, chunks, pre)
        dw = chunk_dvalue(q, k, gate, do, dstate, None, chunks, pre)
    dq, _, dk, dg = chunk_dkey(q, None, k, w, gate, state, dstate, do, None, chunks, pre, False)
    return reduce_heads(dq, q.shape[2]), reduce_heads(dk, k.shape[2]), dw, dg, dinitial


linear_backward = torch.library.custom_op(
    "glazoo::linear_backward", run_linear_backward, mutates_args=()
)


@linear_backward.register_fake
def _(do, dfinal, q, k, w, g, initial_state, cu_seqlens, pre):  # type: ignore[no-untyped-def]
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    dg = w.new_empty(0) if g is None else like(g)
    return like(q), like(k), like(w), dg, like(dfinal)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.pre = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, do, dfinal):  # type: ignore[no-untyped-def]
    _, k, w, g, initial_state, cu_seqlens = ctx.saved_tensors
    do, dfinal = given_or_zeros(do, dfinal, k, w, cu_seqlens)
    dq, dk, dw, dg, dinitial = linear_backward(do, dfinal, *ctx.saved_tensors, ctx.pre)
    dg = None if g is None else dg
    return dq, dk, dw, dg, None if initial_state is None else dinitial, None, None


linear_forward.register_autograd(_backward, setup_context=_setup_context)


def linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    read: str = "post",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear recurrence of key-value products.

        S_t = Diag(exp g_t) S_{t-1} + k_t w_t^T
        o_t = S_t^T q_t              (read "pre": o_t = S_{t-1}^T q_t, before decay and write of t)

    Args:
        q: queries, scaled, [B, T, H or HV, K].
        k: keys, [B, T, H or HV, K].
        w: values times write gate, [B, T, HV, V]; float32, float16 or bfloat16.
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        initial_state: [N, HV, K, V], zeros if None.
        read: "post" or "pre".
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        o [B, T, HV, V] in w's dtype and the final state [N, HV, K, V] in float32.

    Raises:
        ValueError: a shape or `read` is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    if read not in ("post", "pre"):
        raise ValueError(f"read: got {read!r}; accepted are 'post' and 'pre'")
    check_operands(w, {"q": q, "k": k}, g, initial_state, cu_seqlens)
    if is_step(w.shape[1], cu_seqlens, q, k, w, g, initial_state):
        state = step_state(initial_state, w, k.shape[3])
        return linear_step(q, k, w, g, state=state, read=read), state
    start = None if initial_state is None else initial_state.to(torch.float32)
    return linear_forward(q.to(w.dtype), k.to(w.dtype), w, g, start, cu_seqlens, read == "pre")
