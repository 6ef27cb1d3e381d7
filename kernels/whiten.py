"""Keys or queries over the importance of keys, and how a memory is forgotten.

    J_t = exp(g_t) J_{t-1} + b_t k_t^2,  before = exp(g_t) J_{t-1} + prior
    I = J_t + prior ("written"),  before ("found")  or  J_{t-1} + prior ("previous")
    scaled = x / I,  f = g + log((J_{t-1} + prior) / before),  reached = sum x^2 / I

All of it is elementwise, so that it takes as long as its operands need to be read and written:
the passes of `importance` make it where they have J.
"""

from typing import Any

import torch
from torch import Tensor

from .common import IMPORTANCES, reduce_heads
from .importance import (
    carried,
    chunks_of,
    importance_backward_kernel,
    importance_kernel,
    kept_states,
    rooms,
)
from .loops import Whiten
from .operands import (
    check_choice,
    check_importance,
    check_keys,
    final_state,
    full_prior,
    given_or_zeros,
    prepare,
)
from .register import register

_RESULTS = ("scaled", "final", "f", "reached", "square", "j")


def allocate(x: Whiten, keep: bool) -> tuple[Tensor, ...]:
    """Room for all results, empty where not asked for, and for what is kept."""
    K = x.k.shape[3]
    tokens = (*x.b.shape, K)

    def wide(asked: bool, *shape: int) -> Tensor:
        return x.b.new_empty(shape if asked else (0,), dtype=torch.float32)

    f, j = wide(x.forgets, *tokens), wide(x.keeps, *tokens)
    sums = [wide(x.sums, *x.b.shape) for _ in range(2)]
    scaled = (x.k if x.x is None else x.x).new_empty(tokens)
    return scaled, final_state(x.b, K, x.cu_seqlens), f, *sums, j, kept_states(x, keep)


def forward(x: Whiten, keep: bool) -> tuple[Tensor, ...]:
    """All results, empty where not asked for, and what is kept."""
    x = prepare(x, wide=("initial_state",))
    found = allocate(x, keep)
    made = {
        name: y if y.numel() else None
        for name, y in zip((*_RESULTS, "kept"), found, strict=True)
        if name != "final"
    }
    final = found[_RESULTS.index("final")]
    carried(importance_kernel, x, x.initial_state, final, made)
    return found


def gradients(
    x: Whiten,
    grads: Any,
    _wanted: Any,
    kept: Tensor,
    dk: Tensor | None = None,
    dg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order; with dk and dg, which k and g have otherwise."""
    x = prepare(x, wide=("initial_state",))
    HK, K = x.k.shape[2:]
    room, *_ = found = allocate(x, False)
    given = {
        f"d{name}": None if y is None or not z.numel() else y.contiguous()
        for name, y, z in zip(_RESULTS, grads, found, strict=False)
    }
    given["dscaled"] = given_or_zeros(grads[0], room)
    dinitial, made = final_state(x.b, K, x.cu_seqlens), rooms(x)
    if x.x is not None:
        made["dx"] = torch.empty_like(room)
    made["dprior"] = dprior = x.prior.new_zeros(chunks_of(x).number, *x.prior.shape)
    more = {"dg_more": None if dg is None else dg.contiguous()}
    if dk is not None and x.b.shape[2] == HK:
        more["dk_more"], dk = dk.contiguous(), None
    dfinal = given.pop("dfinal")
    carried(importance_backward_kernel, x, dfinal, dinitial, made | more, kept=kept, **given)
    dx = None if x.x is None else reduce_heads(made["dx"], x.x.shape[2])
    own = reduce_heads(made["dk"], HK)
    return (
        dx,
        own if dk is None else own + dk,
        made["db"],
        made["dg"],
        dprior.sum(0),
        dinitial,
        None,
    )


_whiten = register(
    "whiten",
    Whiten,
    results=_RESULTS,
    kept=("states",),
    forward=forward,
    allocate=allocate,
    gradients=gradients,
)


def whiten(
    x: Tensor | None,
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    at: str = "written",
    forgets: bool = False,
    sums: bool = False,
    keeps: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Keys or queries over an importance, and how the mean is forgotten that it belongs to.

        J_t = exp(g_t) J_{t-1} + b_t k_t^2,  before_t = exp(g_t) J_{t-1} + prior
        I_t = J_t + prior ("written"), before_t ("found") or J_{t-1} + prior ("previous")
        scaled_t = x_t / I_t,  reached_t = sum x_t^2 / I_t,  square_t = sum x_t^2
        f_t = g_t + log((J_{t-1} + prior) / before_t)

    Args:
        x: keys or queries, [B, T, H or HV, K]; float32, float16 or bfloat16; None is k.
        k: keys, [B, T, H or HV, K].
        b: importance gate, >= 0, [B, T, HV].
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        prior: importance before the first token, > 0, [HV] or [HV, K].
        initial_state: importance above the prior before the first token, [N, HV, K]; zeros if None.
        at: which importance divides: that after the token, "written", what its decay leaves,
            "found", or that before it, "previous".
        forgets: whether to return f, which needs g.
        sums: whether to return reached and square.
        keeps: whether to return J.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        scaled [B, T, HV, K] in x's dtype and the final J [N, HV, K]; f [B, T, HV, K], reached and
            square [B, T, HV] and J [B, T, HV, K], or None; all but scaled in float32.

    Raises:
        ValueError: a shape or an option is not one of the above, or k is on no GPU.
        TypeError: a dtype that the kernels do not accept.
    """
    check_choice("at", at, IMPORTANCES)
    if forgets and g is None:
        raise ValueError(
            "forgets: got True without g; a memory that does not decay forgets nothing"
        )
    check_importance(k, b, g, initial_state, cu_seqlens)
    if x is not None:
        B, T, HV = b.shape
        check_keys("x", x, B, T, HV, k.shape[3])
    prior = full_prior(prior, b.shape[2], k.shape[3])
    scaled, final, f, reached, square, j = _whiten(
        x, k, b, g, prior, initial_state, cu_seqlens, at, forgets, sums, keeps
    )
    return (
        scaled,
        final,
        f if forgets else None,
        reached if sums else None,
        square if sums else None,
        j if keeps else None,
    )
