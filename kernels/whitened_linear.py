"""The class linear, read by queries over the importance of keys: `whiten`, then `linear`.

In one operation, so that where both give a gradient of k and g, it is added as `whiten` writes it.
"""

from typing import Any

from torch import Tensor

from .linear import forward as linear_forward
from .linear import gradients as linear_gradients
from .loops import WhitenedLinear
from .operands import (
    as_result,
    check_choice,
    check_factors,
    check_importance,
    check_operands,
    final_state,
    full_prior,
)
from .register import register
from .whiten import allocate as whiten_allocate
from .whiten import forward as whiten_forward
from .whiten import gradients as whiten_gradients


def _allocate(x: WhitenedLinear, keep: bool) -> tuple[Tensor, ...]:
    read, final, *_, j, states = whiten_allocate(x.over(), keep)
    kept = read if keep else read.new_empty(0)
    memory = final_state(x.w, x.k.shape[3], x.cu_seqlens)
    return as_result(x.w), memory, final, j, kept, states


def forward(x: WhitenedLinear, keep: bool) -> tuple[Tensor, ...]:
    """All results, and what is kept."""
    read, final, *_, j, states = whiten_forward(x.over(), keep)
    out = linear_forward(x.linear(read), keep)
    return *out, final, j, read if keep else read.new_empty(0), states


def gradients(
    x: WhitenedLinear, grads: Any, wanted: Any, read: Tensor, states: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order; those of k and g are added where they are written."""
    do, dmemory, dfinal, dj = grads[:4]
    dread, dk, dw, dg, dbeta, dinitial, _ = linear_gradients(x.linear(read), (do, dmemory), wanted)
    more = dk, dg if x.g is not None else None
    dq, dk, db, dg, dprior, dimportance, _ = whiten_gradients(
        x.over(), (dread, dfinal, None, None, None, dj), wanted, states, *more
    )
    return dq, dk, dw, db, dg, dbeta, dprior, dinitial, dimportance, None


_whitened_linear = register(
    "whitened_linear",
    WhitenedLinear,
    results=("out", "memory", "final", "j"),
    kept=("read_by", "states"),
    forward=forward,
    allocate=_allocate,
    gradients=gradients,
)


def whitened_linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    beta: Tensor | None = None,
    scale: float = 1.0,
    initial_state: tuple[Tensor, Tensor] | None = None,
    read: str = "post",
    keeps: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """Gated linear recurrence of key-value products, read by queries over the importance of keys.

        S_t = Diag(exp g_t) S_{t-1} + k_t (beta_t w_t)^T,  J_t = exp(g_t) J_{t-1} + b_t k_t^2
        o_t = scale S_t^T (q_t / (J_t + prior))      (read "pre": S_{t-1} and J_{t-1})

    Args:
        q, k, w, g, beta, scale, read: as in `linear`.
        b: importance gate, >= 0, [B, T, HV].
        prior: importance before the first token, > 0, [HV] or [HV, K].
        initial_state: S [N, HV, K, V] and J [N, HV, K], zeros if None.
        keeps: whether to return J after every token.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        o [B, T, HV, V] in w's dtype, the final S and J, and J [B, T, HV, K] or None; all but o in
            float32.

    Raises:
        ValueError: a shape or `read` is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("read", read, ("post", "pre"))
    memory, importance = (None, None) if initial_state is None else initial_state
    check_operands(w, {"q": q, "k": k}, g, [memory], cu_seqlens)
    check_factors(w, beta=beta)
    if b.shape != w.shape[:3]:
        raise ValueError(f"b: got shape {tuple(b.shape)}; expected {tuple(w.shape[:3])}")
    check_importance(k, b, g, importance, cu_seqlens)
    prior = full_prior(prior, b.shape[2], k.shape[3])
    given = (q, k, w, b, g, beta, prior, memory, importance, cu_seqlens, read, scale, keeps)
    o, memory, importance, j = _whitened_linear(*given)
    return o, (memory, importance), j if keeps else None
