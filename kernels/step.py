"""One token of decoding per class, the state updated in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Tiles,
    check_importance,
    check_operands,
    check_step,
    launch,
    power_of_two,
)


@triton.jit
def linear_step_kernel(
    q,
    k,
    w,
    g,
    state,
    o,
    KEYED: tl.constexpr,
    PRE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """S = Diag(exp g) S + k w^T, o = S^T q of the new state, or of the old one if PRE."""
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row = i_n * HV + i_h
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    p_s = state + row * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(p_s, mask=m_kv, other=0.0)
    b_q = tl.load(q + (i_n * HQ + i_h // (HV // HQ)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + (i_n * HK + i_h // (HV // HK)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_w = tl.load(w + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_old = b_s
    if g is not None:
        if KEYED:
            b_s *= tl.exp(tl.load(g + row * K + o_k, mask=m_k, other=0.0).to(tl.float32))[:, None]
        else:
            b_s *= tl.exp(tl.load(g + row).to(tl.float32))
    b_s += b_k[:, None] * b_w[None, :]
    tl.store(p_s, b_s, mask=m_kv)
    b_o = tl.sum(b_old * b_q[:, None], 0) if PRE else tl.sum(b_s * b_q[:, None], 0)
    tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)


@triton.jit
def delta_step_kernel(
    q,
    e,
    k,
    w,
    g,
    state,
    o,
    KEYED: tl.constexpr,
    PREV: tl.constexpr,
    HQ: tl.constexpr,
    HE: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """S' = Diag(exp g) S, S = S' + k (w - X^T e)^T, X = S' or the old S if PREV, o = S^T q."""
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row = i_n * HV + i_h
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    p_s = state + row * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(p_s, mask=m_kv, other=0.0)
    b_q = tl.load(q + (i_n * HQ + i_h // (HV // HQ)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_e = tl.load(e + (i_n * HE + i_h // (HV // HE)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + (i_n * HK + i_h // (HV // HK)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_w = tl.load(w + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_old = b_s
    if g is not None:
        if KEYED:
            b_s *= tl.exp(tl.load(g + row * K + o_k, mask=m_k, other=0.0).to(tl.float32))[:, None]
        else:
            b_s *= tl.exp(tl.load(g + row).to(tl.float32))
    if PREV:
        b_w -= tl.sum(b_old * b_e[:, None], 0)
    else:
        b_w -= tl.sum(b_s * b_e[:, None], 0)
    b_s += b_k[:, None] * b_w[None, :]
    tl.store(p_s, b_s, mask=m_kv)
    tl.store(o + row * V + o_v, tl.sum(b_s * b_q[:, None], 0).to(o.dtype.element_ty), mask=m_v)


@triton.jit
def importance_step_kernel(
    k,
    b,
    g,
    state,
    j,
    KEYED: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
):
    """J = exp(g) J + b k^2."""
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row = i_n * HV + i_h
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_j = tl.load(state + row * K + o_k, mask=m_k, other=0.0)
    b_k = tl.load(k + (i_n * HK + i_h // (HV // HK)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    if g is not None:
        if KEYED:
            b_j *= tl.exp(tl.load(g + row * K + o_k, mask=m_k, other=0.0).to(tl.float32))
        else:
            b_j *= tl.exp(tl.load(g + row).to(tl.float32))
    b_j += tl.load(b + row).to(tl.float32) * b_k * b_k
    tl.store(state + row * K + o_k, b_j, mask=m_k)
    tl.store(j + row * K + o_k, b_j, mask=m_k)


def step_tiles(K: int, V: int) -> Tiles:
    """A program holds 4096 numbers of the state, all keys of some values."""
    BK = power_of_two(K)
    return Tiles(BK, min(power_of_two(V), 4096 // BK), 4, 1)


def run_linear_step(
    q: Tensor, k: Tensor, w: Tensor, g: Tensor | None, state: Tensor, pre: bool
) -> Tensor:
    HV, V = w.shape[2:]
    K = k.shape[3]
    tiles = step_tiles(K, V)
    w = w.contiguous()
    o = torch.empty_like(w)
    launch(
        linear_step_kernel,
        (w.shape[0] * HV, -(-V // tiles.BV)),
        tiles,
        q=q.contiguous(),
        k=k.contiguous(),
        w=w,
        g=None if g is None else g.contiguous(),
        state=state,
        o=o,
        KEYED=g is not None and g.ndim == 4,
        PRE=pre,
        HQ=q.shape[2],
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BK=tiles.BK,
        BV=tiles.BV,
    )
    return o


_linear_step = torch.library.custom_op(
    "glazoo::linear_step", run_linear_step, mutates_args=("state",)
)


@_linear_step.register_fake
def _(q, k, w, g, state, pre):  # type: ignore[no-untyped-def]
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def run_delta_step(
    q: Tensor, e: Tensor, k: Tensor, w: Tensor, g: Tensor | None, state: Tensor, prev: bool
) -> Tensor:
    HV, V = w.shape[2:]
    K = k.shape[3]
    tiles = step_tiles(K, V)
    w = w.contiguous()
    o = torch.empty_like(w)
    launch(
        delta_step_kernel,
        (w.shape[0] * HV, -(-V // tiles.BV)),
        tiles,
        q=q.contiguous(),
        e=e.contiguous(),
        k=k.contiguous(),
        w=w,
        g=None if g is None else g.contiguous(),
        state=state,
        o=o,
        KEYED=g is not None and g.ndim == 4,
        PREV=prev,
        HQ=q.shape[2],
        HE=e.shape[2],
        HK=k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BK=tiles.BK,
        BV=tiles.BV,
    )
    return o


_delta_step = torch.library.custom_op("glazoo::delta_step", run_delta_step, mutates_args=("state",))


@_delta_step.register_fake
def _(q, e, k, w, g, state, prev):  # type: ignore[no-untyped-def]
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def run_importance_step(k: Tensor, b: Tensor, g: Tensor | None, state: Tensor) -> Tensor:
    B, _, HV = b.shape
    HK, K = k.shape[2:]
    j = b.new_empty(B, 1, HV, K, dtype=torch.float32)
    tiles = Tiles(power_of_two(K), 1, 1, 1)
    launch(
        importance_step_kernel,
        (B * HV,),
        tiles,
        k=k.contiguous(),
        b=b.contiguous(),
        g=None if g is None else g.contiguous(),
        state=state,
        j=j,
        KEYED=g is not None and g.ndim == 4,
        HK=HK,
        HV=HV,
        K=K,
        BK=tiles.BK,
    )
    return j


_importance_step = torch.library.custom_op(
    "glazoo::importance_step", run_importance_step, mutates_args=("state",)
)


@_importance_step.register_fake
def _(k, b, g, state):  # type: ignore[no-untyped-def]
    return b.new_empty(b.shape[0], 1, b.shape[2], k.shape[3], dtype=torch.float32)


def is_step(tokens: int, cu_seqlens: Tensor | None, *operands: Tensor | None) -> bool:
    """Whether a call is one token of decoding, of which nobody wants a gradient."""
    return (
        tokens == 1
        and cu_seqlens is None
        and not (
            torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
        )
    )


def step_state(initial: Tensor | None, w: Tensor, keys: int) -> Tensor:
    """A state of its own for a step to update: a copy of `initial`, or zeros."""
    if initial is None:
        return w.new_zeros(w.shape[0], w.shape[2], keys, w.shape[3], dtype=torch.float32)
    return initial.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _one_token(name: str, x: Tensor) -> None:
    if x.ndim < 2 or x.shape[1] != 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; a step takes one token, T = 1")


def linear_step(
    q: Tensor, k: Tensor, w: Tensor, g: Tensor | None = None, *, state: Tensor, read: str = "post"
) -> Tensor:
    """One token of `linear`, without gradients; `state` [B, HV, K, V] float32 is updated in place.

    Args:
        q, k, w, g, read: as in `linear`, T = 1.
        state: contiguous float32 [B, HV, K, V].

    Returns:
        o [B, 1, HV, V] in w's dtype.

    Raises:
        ValueError: a shape, `read` or the state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    if read not in ("post", "pre"):
        raise ValueError(f"read: got {read!r}; accepted are 'post' and 'pre'")
    _one_token("w", w)
    check_operands(w, {"q": q, "k": k}, g, None, None)
    check_step(state, (w.shape[0], w.shape[2], k.shape[3], w.shape[3]))
    return _linear_step(q, k, w, g, state, read == "pre")


def delta_step(
    q: Tensor,
    e: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    base: str = "decayed",
) -> Tensor:
    """One token of `delta`, without gradients; `state` [B, HV, K, V] float32 is updated in place.

    Args:
        q, e, k, w, g, base: as in `delta`, T = 1.
        state: contiguous float32 [B, HV, K, V].

    Returns:
        o [B, 1, HV, V] in w's dtype.

    Raises:
        ValueError: a shape, `base` or the state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    if base not in ("decayed", "prev"):
        raise ValueError(f"base: got {base!r}; accepted are 'decayed' and 'prev'")
    _one_token("w", w)
    check_operands(w, {"q": q, "e": e, "k": k}, g, None, None)
    check_step(state, (w.shape[0], w.shape[2], k.shape[3], w.shape[3]))
    return _delta_step(q, e, k, w, g, state, base == "prev")


def importance_step(k: Tensor, b: Tensor, g: Tensor | None = None, *, state: Tensor) -> Tensor:
    """One token of `importance`, without gradients; `state` [B, HV, K] float32 is updated in place.

    Args:
        k, b, g: as in `importance`, T = 1.
        state: contiguous float32 [B, HV, K].

    Returns:
        A copy of the new state, [B, 1, HV, K].

    Raises:
        ValueError: a shape or the state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    _one_token("b", b)
    check_importance(k, b, g, None, None)
    check_step(state, (b.shape[0], b.shape[2], k.shape[3]))
    return _importance_step(k, b, g, state)
