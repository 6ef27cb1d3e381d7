"""A token of decoding in one compiled piece: of linear, of delta, and of either with an importance
over keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glazoo.engines import chunked
from glazoo.engines.compiled import loops
from glazoo.kernels.loops import compute_dtype
from glazoo.kernels.register import register_step, wants_derivative

_KINDS = {"none": 0, "full": 1, "diagonal": 2}
_GAINS = {"first_order": 0, "exact": 1, "exact_rate": 2}


class Token(NamedTuple):
    """Operands of one token [B, 1, ...] and the states before it; no b: no importance."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    b: Tensor | None
    g: Tensor | None
    e: Tensor | None
    prior: Tensor | None
    memory: Tensor | None
    importance: Tensor | None
    correction: str
    gain: str
    read: str
    base: str
    own: bool


def _allocate(x: Token) -> tuple[Tensor, ...]:
    batch, _, heads, size = x.v.shape
    keys = x.k.shape[3]
    like = x.v.new_empty((), dtype=compute_dtype(x.q, x.k, x.v))
    scanned = x.b is not None
    return (
        torch.empty_like(x.v, memory_format=torch.contiguous_format),
        like.new_empty(batch, heads, keys, size),
        like.new_empty((batch, heads, keys) if scanned else 0),
        like.new_empty((batch, 1, heads) if scanned else 0),
    )


def _step(x: Token) -> tuple[Tensor, ...]:
    found = out, new, new_j, doubt = _allocate(x)
    dtype = new.dtype
    wide = out if out.dtype == dtype else out.to(dtype)
    empty = torch.empty(0, dtype=dtype)

    def flat(y: Tensor | None) -> Any:
        if y is None:
            return empty.numpy()
        y = y.detach()
        if y.dtype != dtype:
            y = y.to(dtype)
        return y.reshape(-1).numpy()

    heads, keys, size = x.v.shape[2], x.k.shape[3], x.v.shape[3]
    gates = 0 if x.g is None else x.g.numel() // (x.v.numel() // size)
    rates = 0 if x.beta is None else x.beta.numel() // (x.v.numel() // size)
    priors = 0 if x.prior is None else x.prior.numel() // heads
    e = x.k if x.e is None else x.e
    memory = torch.zeros_like(new) if x.memory is None else x.memory
    importance = x.importance
    if importance is None and x.b is not None:
        importance = torch.zeros_like(new_j)
    loops.step(
        flat(x.q),
        flat(x.k),
        flat(e),
        flat(x.v),
        flat(x.beta),
        flat(x.b),
        flat(None if x.g is None else x.g.to(dtype).exp()),
        flat(x.prior),
        flat(memory),
        flat(importance),
        wide.view(-1).numpy(),
        doubt.view(-1).numpy(),
        new.view(-1).numpy(),
        new_j.view(-1).numpy(),
        (heads, x.q.shape[2], x.k.shape[2], e.shape[2], keys, size, gates, rates, priors),
        _KINDS[x.correction],
        _GAINS[x.gain],
        int(x.read == "pre"),
        int(x.base == "prev"),
        int(x.own),
    )
    if wide is not out:
        out.copy_(wide)
    return found


_token = register_step(
    "compiled_step",
    Token,
    results=("out", "new_memory", "new_importance", "doubt"),
    step=_step,
    allocate=_allocate,
)


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
    """One token of a memory with an importance over keys, without gradients: what
    `glazoo.kernels.posterior_step` computes, on a CPU."""
    memory, importance = initial_state or (None, None)
    out, memory, importance, doubt = _token(
        q, k, v, beta, b, g, e, prior, memory, importance, correction, gain, read, base, own
    )
    return out, (memory, importance), doubt if uncertainty else None


def _single(cu_seqlens: Tensor | None, *operands: Tensor | None) -> bool:
    """Whether this is a token of decoding: one, of which no derivative is asked for."""
    some = operands[0]
    assert some is not None
    return some.shape[1] == 1 and cu_seqlens is None and not wants_derivative(*operands)


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
    """Linear attention, `glazoo.engines.chunked.linear`, whose token of decoding is one loop."""
    if not _single(cu_seqlens, q, k, w, g, initial_state):
        return chunked.linear(
            q, k, w, g, initial_state=initial_state, read=read, cu_seqlens=cu_seqlens
        )
    given = (q, k, w, None, None, g, None, None, initial_state, None)
    out, final, *_ = _token(*given, "none", "first_order", read, "decayed", False)
    return out, final


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
    """The delta rule, `glazoo.engines.chunked.delta`, whose token of decoding is one loop."""
    if not _single(cu_seqlens, q, e, k, w, g, initial_state):
        return chunked.delta(
            q, e, k, w, g, initial_state=initial_state, base=base, cu_seqlens=cu_seqlens
        )
    given = (q, k, w, None, None, g, e, None, initial_state, None)
    out, final, *_ = _token(*given, "full", "first_order", "post", base, True)
    return out, final
