"""One token of decoding per class.

The steps of one recurrence update its state in place. `posterior_step` runs two, the importance and
what it preconditions, in one launch; several programs read the importance that one of them writes,
so it gives new states instead, and copies none.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import GAINS, Tiles, current_target, launch, power_of_two
from .loops import GatedDelta, GatedLinear, Importance
from .operands import (
    as_result,
    check_choice,
    check_device,
    check_factors,
    check_importance,
    check_operands,
    check_step,
    final_state,
    prepare,
)
from .register import register_step


@triton.jit
def linear_step_kernel(
    q,
    k,
    w,
    g,
    beta,
    state,
    o,
    SCALE: tl.constexpr,
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
    """S = Diag(exp g) S + k (beta w)^T, o = SCALE S^T q of the new state, or of the old one if
    PRE."""
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
    if beta is not None:
        b_w *= tl.load(beta + row).to(tl.float32)
    b_old = b_s
    if g is not None:
        if KEYED:
            b_s *= tl.exp(tl.load(g + row * K + o_k, mask=m_k, other=0.0).to(tl.float32))[:, None]
        else:
            b_s *= tl.exp(tl.load(g + row).to(tl.float32))
    b_s += b_k[:, None] * b_w[None, :]
    tl.store(p_s, b_s, mask=m_kv)
    b_q *= SCALE
    b_o = tl.sum(b_old * b_q[:, None], 0) if PRE else tl.sum(b_s * b_q[:, None], 0)
    tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)


@triton.jit
def delta_step_kernel(
    q,
    e,
    k,
    w,
    g,
    beta,
    erase,
    state,
    o,
    SCALE: tl.constexpr,
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
    """S' = Diag(exp g) S, S = S' + k (beta w - erase X^T e)^T, X = S' or the old S if PREV,
    o = SCALE S^T q."""
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
    if beta is not None:
        b_w *= tl.load(beta + row).to(tl.float32)
    if erase is not None:
        b_e *= tl.load(erase + row).to(tl.float32)
    b_q *= SCALE
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


@triton.jit
def load_step_gate(x, row, o, m, KIND: tl.constexpr, SIZE: tl.constexpr):
    """A gate as a vector: one number for all channels if KIND is 1, one for each if 2, 1 if 0."""
    b_x = tl.where(m, 1.0, 1.0)
    if KIND == 1:
        b_x *= tl.load(x + row).to(tl.float32)
    if KIND == 2:
        b_x *= tl.load(x + row * SIZE + o, mask=m, other=1.0).to(tl.float32)
    return b_x


@triton.jit
def posterior_step_kernel(
    q,
    k,
    e,
    v,
    beta,
    b,
    g,
    prior,
    memory,
    importance,
    o,
    u,
    new_memory,
    new_importance,
    DELTA: tl.constexpr,
    EXACT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRE: tl.constexpr,
    PREV: tl.constexpr,
    OWN: tl.constexpr,
    GATE: tl.constexpr,
    BETA: tl.constexpr,
    PRIOR: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HE: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Importance, then the memory that it preconditions, then the read, of one token."""
    i_n = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    row = i_n * HV + i_h
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    p_s = row * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.zeros([BK, BV], tl.float32)
    b_j = tl.zeros([BK], tl.float32)
    if memory is not None:
        b_s += tl.load(memory + p_s, mask=m_kv, other=0.0)
    if importance is not None:
        b_j += tl.load(importance + row * K + o_k, mask=m_k, other=0.0)
    b_q = tl.load(q + (i_n * HQ + i_h // (HV // HQ)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + (i_n * HK + i_h // (HV // HK)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_p = load_step_gate(prior, i_h, o_k, m_k, PRIOR, K)
    b_a = load_step_gate(g, row, o_k, m_k, GATE, K)
    if GATE != 0:
        b_a = tl.exp(b_a)
    b_old = b_j + b_p
    b_j *= b_a
    b_before = b_j + b_p
    b_j += tl.load(b + row).to(tl.float32) * b_k * b_k
    b_after = b_j + b_p
    if tl.program_id(1) == 0:
        tl.store(new_importance + row * K + o_k, b_j, mask=m_k)
        if u is not None:
            b_i = b_old if PRE else b_after
            tl.store(u + row, tl.sum(b_q * b_q / b_i, 0))
    if DELTA:
        b_x = b_s
        b_s *= (b_a * b_old / b_before)[:, None]
        if EXACT:
            b_r = tl.load(beta + row).to(tl.float32) if BETA == 1 else 1.0
            b_c = b_k / b_before
            b_x = b_r * tl.sum(b_k * b_c, 0)
            if EXACT == 2:
                b_w = b_r * tl.sum(b_k * b_k, 0)
                b_m = tl.maximum(b_w, 1.0)
                b_r /= (b_m - b_w + b_x) / b_m
            else:
                b_r /= 1.0 + b_x
            if DIAGONAL:
                b_s += (b_r * b_c)[:, None] * (b_v[None, :] - b_k[:, None] * b_s)
            else:
                # In the order of the delta rule's own step.
                b_w = b_r * b_v - tl.sum(b_s * (b_r * b_k)[:, None], 0)
                b_s += b_c[:, None] * b_w[None, :]
        else:
            b_e = b_k
            if e is not None:
                p_e = e + (i_n * HE + i_h // (HV // HE)) * K + o_k
                b_e = tl.load(p_e, mask=m_k, other=0.0).to(tl.float32)
            b_x = tl.sum((b_x if PREV else b_s) * b_e[:, None], 0)
            b_w = load_step_gate(beta, row, o_v, m_v, BETA, V)
            b_w = b_w * b_v - b_x if OWN else b_w * (b_v - b_x)
            b_s += (b_k / b_after)[:, None] * b_w[None, :]
    else:
        b_q /= b_old if PRE else b_after
        b_x = b_s
        b_w = b_v * load_step_gate(beta, row, o_v, m_v, BETA, V)
        b_s = b_a[:, None] * b_s + b_k[:, None] * b_w[None, :]
    tl.store(new_memory + p_s, b_s, mask=m_kv)
    if PRE:
        b_s = b_x
    b_o = tl.sum(b_s * b_q[:, None], 0)
    tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)


def step_tiles(K: int, V: int, warps: int = 4) -> Tiles:
    """All keys of some values, 32 numbers of the state a thread."""
    BK = power_of_two(K)
    return Tiles(BK, min(power_of_two(V), warps * 1024 // BK), warps, 1)


def _run_step(kernel: Any, x: Any) -> tuple[Tensor]:
    x = prepare(x)
    o = torch.empty_like(x.w)
    tiles = step_tiles(x.k.shape[3], x.w.shape[3])
    launch(kernel, x.w.shape[0], tiles, x, across="V", state=x.initial_state, o=o)
    return (o,)


def run_linear_step(x: GatedLinear) -> tuple[Tensor]:
    """Output of one token; the state is updated in place."""
    return _run_step(linear_step_kernel, x)


def run_delta_step(x: GatedDelta) -> tuple[Tensor]:
    """Output of one token; the state is updated in place."""
    return _run_step(delta_step_kernel, x if x.e is not None else x._replace(e=x.k))


def run_importance_step(x: Importance) -> tuple[Tensor]:
    """A copy of the state, which is updated in place."""
    x = prepare(x)
    (B, _, HV), K = x.b.shape, x.k.shape[3]
    j = x.b.new_empty(B, 1, HV, K, dtype=torch.float32)
    tiles = Tiles(power_of_two(K), 1, 1, 1)
    launch(importance_step_kernel, B, tiles, x, state=x.initial_state, j=j)
    return (j,)


class Posterior(NamedTuple):
    """Operands of `posterior_step`."""

    q: Tensor
    k: Tensor
    e: Tensor | None
    v: Tensor
    beta: Tensor | None
    b: Tensor
    g: Tensor | None
    prior: Tensor
    memory: Tensor | None
    importance: Tensor | None
    correction: str
    gain: str
    read: str
    base: str
    own: bool
    uncertainty: bool


def _posterior_results(x: Posterior) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the output, the new memory and importance, the uncertainty (or nothing)."""
    v, K = x.v, x.k.shape[3]
    u = v.new_empty(v.shape[:3] if x.uncertainty else (0,), dtype=torch.float32)
    return as_result(v), final_state(v, K, None), final_state(x.b, K, None), u


def run_posterior_step(x: Posterior) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, new memory, new importance, uncertainty (empty if not asked for)."""
    x = prepare(x)
    found = o, new_memory, new_importance, u = _posterior_results(x)
    # In four warps sm_100's register allocation spills.
    spills = x.correction == "diagonal" and current_target().startswith("sm_10")
    launch(
        posterior_step_kernel,
        x.v.shape[0],
        step_tiles(x.k.shape[3], x.v.shape[3], 2 if spills else 4),
        x,
        across="V",
        o=o,
        u=u if x.uncertainty else None,
        new_memory=new_memory,
        new_importance=new_importance,
    )
    return found


def _output(x: Any) -> tuple[Tensor]:
    return (as_result(x.w),)


_linear_step = register_step(
    "linear_step",
    GatedLinear,
    results=("out",),
    updates=("initial_state",),
    step=run_linear_step,
    allocate=_output,
)
_delta_step = register_step(
    "delta_step",
    GatedDelta,
    results=("out",),
    updates=("initial_state",),
    step=run_delta_step,
    allocate=_output,
)
_importance_step = register_step(
    "importance_step",
    Importance,
    results=("j",),
    updates=("initial_state",),
    step=run_importance_step,
    allocate=lambda x: (final_state(x.b, x.k.shape[3], None).unsqueeze(1),),
)
_posterior_step = register_step(
    "posterior_step",
    Posterior,
    results=("out", "new_memory", "new_importance", "doubt"),
    step=run_posterior_step,
    allocate=_posterior_results,
)


def linear_step(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    beta: Tensor | None = None,
    scale: float = 1.0,
    read: str = "post",
) -> Tensor:
    """One token of `linear`, without gradients; `state` [B, HV, K, V] float32 is updated in place.

    Args:
        q, k, w, g, beta, scale, read: as in `linear`, T = 1.
        state: contiguous float32 [B, HV, K, V].

    Returns:
        o [B, 1, HV, V] in w's dtype.

    Raises:
        ValueError: a shape, `read` or the state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("read", read, ("post", "pre"))
    check_step("w", w, k.shape[3], state)
    check_operands(w, {"q": q, "k": k}, g, [], None)
    check_factors(w, beta=beta)
    return _linear_step(q, k, w, g, beta, state, None, read, scale)


def delta_step(
    q: Tensor,
    e: Tensor | None,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    scale: float = 1.0,
    base: str = "decayed",
) -> Tensor:
    """One token of `delta`, without gradients; `state` [B, HV, K, V] float32 is updated in place.

    Args:
        q, e, k, w, g, beta, erase, scale, base: as in `delta`, T = 1.
        state: contiguous float32 [B, HV, K, V].

    Returns:
        o [B, 1, HV, V] in w's dtype.

    Raises:
        ValueError: a shape, `base` or the state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("base", base, ("decayed", "prev"))
    check_step("w", w, k.shape[3], state)
    keys = {"q": q, "k": k} if e is None else {"q": q, "e": e, "k": k}
    check_operands(w, keys, g, [], None)
    check_factors(w, beta=beta, erase=erase)
    return _delta_step(q, e, k, w, g, beta, erase, state, None, base, scale)


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
    check_step("b", b, k.shape[3], state)
    check_importance(k, b, g, None, None)
    return _importance_step(k, b, g, state, None)


def posterior_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    e: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    correction: str = "none",
    gain: str = "first_order",
    read: str = "post",
    base: str = "decayed",
    own: bool = False,
    uncertainty: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """One token of a memory with an importance over keys, in one launch and without gradients.

        J' = a J, I' = J' + prior, J = J' + b k^2, I = J + prior
        none:               h = Diag(a) h + k (beta v)^T,  o = (h / I)^T q  (read "pre": old h, I)
        otherwise:          mu' = (a I_{t-1} / I') mu_{t-1},  o = mu^T q
        full, first_order:  mu = mu' + (k / I) (beta (v - x^T e))^T  (own: beta v - x^T e)
        full, exact:        mu = mu' + G (v - mu'^T k)^T
        diagonal, exact:    mu = mu' (1 - k G) + G v^T
        u = sum_k q_k^2 / I_k, the uncertainty

    with a = exp(g), x = mu' (base "decayed") or mu_{t-1} ("prev"),
    G = beta (k / I') / (1 + beta sum k^2 / I') and, where the gain is "exact_rate",
    G = beta (k / I') / ((m - s + beta sum k^2 / I') / m) with s = beta sum k^2, m = max(s, 1).

    Args:
        q: queries, scaled, [B, 1, H or HV, K].
        k: keys, [B, 1, H or HV, K].
        v: values, [B, 1, HV, V]; float32, float16 or bfloat16.
        beta: write gate, [B, 1, HV], without the exact gain also [B, 1, HV, V]; None is 1.
        b: importance gate, >= 0, [B, 1, HV].
        g: natural log decay, <= 0, -inf allowed; [B, 1, HV] or [B, 1, HV, K]; None is no decay.
        prior: importance before the first token, > 0, [HV], [HV, 1] or [HV, K].
        e: erase keys of the first-order delta rule, [B, 1, H or HV, K]; None is k.
        initial_state: memory [B, HV, K, V] and J [B, HV, K]; zeros if None.
        correction: "none", "full" or, with the exact gain, "diagonal".
        gain: "first_order", "exact" (beta is the observation's precision) or, with the correction
            "full", "exact_rate" (beta k is the step at importance 1).
        read: "post" or, without a correction, "pre".
        base: the mean that the first-order delta rule predicts from, "decayed" or "prev".
        own: whether e holds the erase gate, so that beta acts on v alone.
        uncertainty: whether to return u.

    Returns:
        o [B, 1, HV, V] in v's dtype, the new memory and J in float32, and u [B, 1, HV] in float32
            or None.

    Raises:
        ValueError: a shape or an option is not one of the above, or v is on no GPU.
        TypeError: a dtype that the kernels do not accept.

    Reference: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based Models
    (arXiv:2602.09075), predict and correct steps.
    """
    for name, choice, accepted in (
        ("correction", correction, ("none", "full", "diagonal")),
        ("gain", gain, GAINS),
        ("read", read, ("post", "pre")),
        ("base", base, ("decayed", "prev")),
    ):
        check_choice(name, choice, accepted)
    gains = {"none": ("first_order",), "diagonal": ("exact",)}
    if gain not in gains.get(correction, (gain,)):
        raise ValueError(
            f"gain: got {gain!r} with correction {correction!r}; "
            f"accepted with it is {gains[correction][0]!r}"
        )
    if read == "pre" and correction != "none":
        raise ValueError(f"read: got 'pre' with correction {correction!r}; accepted is 'post'")
    check_step("v", v, k.shape[3])
    keys = {"q": q, "k": k} | ({} if e is None else {"e": e})
    start = (None, None) if initial_state is None else initial_state
    check_operands(v, keys, g, start[:1], None)
    B, _, HV, V = v.shape
    K = k.shape[3]
    if tuple(b.shape) != (B, 1, HV):
        raise ValueError(f"b: got shape {tuple(b.shape)}; expected {(B, 1, HV)}")
    check_importance(k, b, g, start[1], None)
    wide = [(B, 1, HV), (B, 1, HV, V)] if gain == "first_order" else [(B, 1, HV)]
    if beta is not None and tuple(beta.shape) not in wide:
        raise ValueError(
            f"beta: got shape {tuple(beta.shape)}; expected {' or '.join(map(str, wide))}"
        )
    if tuple(prior.shape) not in ((HV,), (HV, 1), (HV, K)):
        raise ValueError(f"prior: got shape {tuple(prior.shape)}; expected {(HV,)} or {(HV, K)}")
    for name, x in (keys | {"b": b, "beta": beta, "g": g, "prior": prior}).items():
        if x is not None:
            check_device(name, x)
    o, *state, u = _posterior_step(
        q,
        k,
        e,
        v,
        beta,
        b,
        g,
        prior[:, 0] if tuple(prior.shape) == (HV, 1) else prior,
        *(None if x is None else x.to(torch.float32) for x in start),
        correction,
        gain,
        read,
        base,
        own,
        uncertainty,
    )
    return o, (state[0], state[1]), u if uncertainty else None
