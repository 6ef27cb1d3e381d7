"""The traceable engine: every core operation in plain ATen operations, for graphs that other
programs run.

Captured by `torch.export`, `torch.onnx.export` or `torch.compile`, an operation is one `scan` over
tokens whose body is the class's rule of `glazoo.kernels.loops`: no operator of our own, no loop
that is unrolled over tokens and no control flow that depends on data, so that the graph holds for
any number of tokens. Called eagerly it is the same body in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glazoo.kernels import loops
from glazoo.kernels.loops import compute_dtype, scaled, times
from glazoo.program.core import PosteriorStep, Whiten, WhitenedLinear

__all__ = [
    "covariance",
    "delta",
    "importance",
    "linear",
    "posterior_step",
    "riccati",
    "solve",
    "synapse",
    "synapse_delta",
    "whiten",
    "whitened_linear",
]

posterior_step: PosteriorStep | None = None
"""A token is several operations here, as any number of them."""
whiten: Whiten | None = None
whitened_linear: WhitenedLinear | None = None
"""Keys are divided by steps here."""

Tokens = Sequence[Tensor | None]
Rule = Callable[[Tokens, Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]
"""Maps tokens [B, T, ...] and the states before them to outputs [B, T, ...] and states after."""


def _scan(
    rule: Rule, tokens: Tokens, states: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs [B, T, ...] of all tokens and the states after each sequence's last."""
    given = [x for x in tokens if x is not None]
    count = given[0].shape[1]
    if not torch.compiler.is_compiling() and count == 0:
        # The states of sequences without tokens; outputs are those of the rows.
        found, _ = rule(tokens, [s[: given[0].shape[0]] for s in states])
        return list(found), list(states)

    def one(old: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        rest = iter(x)
        token = [None if y is None else next(rest).unsqueeze(1) for y in tokens]
        if cu_seqlens is None:
            found, new = rule(token, old)
        else:
            # A pack has the states of all sequences, of which a token changes its own.
            own = next(rest)
            found, new = rule(token, [s.index_select(0, own) for s in old])
            sequence = torch.arange(old[0].shape[0], device=own.device) == own
            new = [
                torch.where(sequence.view(-1, *[1] * (s.dim() - 1)), n, s)
                for n, s in zip(new, old, strict=True)
            ]
        # What a scan gives must be no view of what it takes, nor one of the other.
        return [_copied(s) for s in new], [_copied(y.squeeze(1)) for y in found]

    along = [x.movedim(1, 0) for x in given]
    if cu_seqlens is not None:
        at = torch.arange(count, device=cu_seqlens.device)[:, None]
        along.append((at >= cu_seqlens[1:]).sum(1, keepdim=True))
    if torch.compiler.is_compiling():
        # Prepared here only: it imports the compiler.
        from torch._higher_order_ops.scan import scan

        after, rows = scan(one, list(states), along)
    else:
        after, kept = list(states), []
        for x in zip(*(y.unbind(0) for y in along), strict=True):
            after, row = one(after, x)
            kept.append(row)
        rows = [torch.stack(x) for x in zip(*kept, strict=True)]
    return [y.movedim(0, 1) for y in rows], list(after)


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _start(
    given: Tensor | None, like: Tensor, cu_seqlens: Tensor | None, *shape: int, dtype: torch.dtype
) -> Tensor:
    """Return an initial state [N, HV, ...], zeros if none is given."""
    if given is not None:
        # A scan wants to carry what it was given, strides included.
        return given.to(dtype).contiguous()
    rows = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(rows, like.shape[2], *shape, dtype=dtype, device=like.device)


def linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    read: str = "post",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention, as `glazoo.kernels.loops.linear`."""
    q, w = scaled(q, scale), times(beta, w).to(w.dtype)

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        o, s = loops.linear(*x, initial_state=states[0], read=read)  # type: ignore[arg-type]
        return [o], [s]

    dtype = compute_dtype(q, k, w)
    start = _start(initial_state, w, cu_seqlens, k.shape[3], w.shape[3], dtype=dtype)
    (o,), (s,) = _scan(rule, (q, k, w, g), [start], cu_seqlens)
    return o, s


def delta(
    q: Tensor,
    e: Tensor | None,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    base: str = "decayed",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule, as `glazoo.kernels.loops.delta`."""
    q, e, w = scaled(q, scale), times(erase, k if e is None else e), times(beta, w).to(w.dtype)

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        o, s = loops.delta(*x, initial_state=states[0], base=base)  # type: ignore[arg-type]
        return [o], [s]

    dtype = compute_dtype(q, e, k, w)
    start = _start(initial_state, w, cu_seqlens, k.shape[3], w.shape[3], dtype=dtype)
    (o,), (s,) = _scan(rule, (q, e, k, w, g), [start], cu_seqlens)
    return o, s


def importance(
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The importance of every token, as `glazoo.kernels.loops.importance`."""

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        j, new = loops.importance(*x, initial_state=states[0])  # type: ignore[arg-type]
        return [j], [new]

    start = _start(initial_state, b, cu_seqlens, k.shape[3], dtype=compute_dtype(k, b))
    (j,), (final,) = _scan(rule, (k, b, g), [start], cu_seqlens)
    return j, final


def riccati(
    a: Tensor,
    c: Tensor,
    d: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The importance under diffusion, as `glazoo.kernels.loops.riccati`."""

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z, new = loops.riccati(*x, initial_state=states[0])  # type: ignore[arg-type]
        return [z], [new]

    start = _start(initial_state, u, cu_seqlens, u.shape[3], dtype=compute_dtype(a, c, d, u))
    (z,), (final,) = _scan(rule, (a, c, d, u), [start], cu_seqlens)
    return z, final


def synapse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    read: str = "post",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """One importance per synapse, as `glazoo.kernels.loops.synapse`."""

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        o, new, u = loops.synapse(
            *x,  # type: ignore[arg-type]
            prior=prior,
            initial_state=tuple(states),  # type: ignore[arg-type]
            read=read,
            uncertainty=uncertainty,
        )
        return [o] if u is None else [o, u], list(new)

    dtype = compute_dtype(q, k, w, b)
    starts = [
        _start(x, w, cu_seqlens, k.shape[3], w.shape[3], dtype=dtype)
        for x in initial_state or (None, None)
    ]
    (o, *u), (h, j) = _scan(rule, (q, k, w, b, g), starts, cu_seqlens)
    return o, (h, j), u[0] if uncertainty else None


def synapse_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    g: Tensor | None = None,
    *,
    e: Tensor | None = None,
    evidence: Tensor | None = None,
    prior: Tensor,
    gain: str = "first_order",
    correction: str = "full",
    initial_state: tuple[Tensor, Tensor] | None = None,
    base: str = "decayed",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """A gain or decay per synapse, as `glazoo.kernels.loops.synapse_delta`."""

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        q, k, v, beta, b, g, e, evidence = x
        o, new, u = loops.synapse_delta(
            q,  # type: ignore[arg-type]
            k,  # type: ignore[arg-type]
            v,  # type: ignore[arg-type]
            beta,
            b,
            g,
            e=e,
            evidence=evidence,
            prior=prior,
            gain=gain,
            correction=correction,
            initial_state=tuple(states),  # type: ignore[arg-type]
            base=base,
            uncertainty=uncertainty,
        )
        return [o] if u is None else [o, u], list(new)

    dtype = compute_dtype(q, k, v, beta, b)
    starts = [
        _start(x, v, cu_seqlens, k.shape[3], v.shape[3], dtype=dtype)
        for x in initial_state or (None, None)
    ]
    if b is None:
        # Nothing is observed: the importance is the prior's.
        starts[1] = torch.zeros_like(starts[1])
    (o, *u), (mu, j) = _scan(rule, (q, k, v, beta, b, g, e, evidence), starts, cu_seqlens)
    return o, (mu, j), u[0] if uncertainty else None


def _solved(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve a symmetric positive definite system [..., K, K] for one right side [..., K].

    Gauss-Jordan elimination, which such a matrix needs no pivots for: exporters have no operation
    for a factorisation, and the number of steps of an iteration depends on data.
    """
    size = rhs.shape[-1]
    rest = torch.cat([matrix, rhs.unsqueeze(-1)], -1)
    row = torch.arange(size, device=rhs.device).unsqueeze(-1)
    for j in range(size):
        pivot = rest[..., j : j + 1, 1:] / rest[..., j : j + 1, :1]
        rest = torch.where(row == j, pivot, rest[..., 1:] - rest[..., :1] * pivot)
    return rest.squeeze(-1)


def solve(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Full precision, as `glazoo.kernels.loops.solve`."""
    keys, dtype = k.shape[3], compute_dtype(q, k, beta)
    floor = torch.diag_embed(prior.to(dtype).reshape(prior.shape[0], -1).expand(-1, keys))

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        q, k, w, g = x
        assert q is not None
        assert k is not None
        assert w is not None
        # H = a H + k (beta k)^T is a linear state, which is read otherwise.
        _, new = loops.linear(k, k, w, g, initial_state=states[0])
        heads = w.shape[2]
        q = q.repeat_interleave(heads // q.shape[2], 2)
        return [_solved(new + floor, q.squeeze(1)).unsqueeze(1) if q.shape[1] else q], [new]

    q, k = q.to(dtype), k.to(dtype)
    rate = beta.to(dtype) if beta.dim() == 4 else beta.to(dtype).unsqueeze(-1)
    weighted = rate * k.repeat_interleave(beta.shape[2] // k.shape[2], 2)
    start = _start(initial_state, beta, cu_seqlens, keys, keys, dtype=dtype)
    (x,), (final,) = _scan(rule, (q, k, weighted, g), [start], cu_seqlens)
    return x, final


def covariance(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The covariance of a Kalman filter, as `glazoo.kernels.loops.covariance`."""

    def rule(x: Tokens, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found, spread, new = loops.covariance(
            *x,  # type: ignore[arg-type]
            prior=prior,
            initial_state=states[0],
        )
        return [found, spread], [new]

    keys = k.shape[3]
    start = _start(initial_state, b, cu_seqlens, keys, keys, dtype=compute_dtype(q, k, b))
    (found, spread), (final,) = _scan(rule, (q, k, b, g, noise), [start], cu_seqlens)
    return found, spread, final
