"""The synapse_delta class as a compiled loop; `glazoo.engines.chunked.synapse_delta` says what it
computes.

Memory: training keeps 2 K V / 64 numbers per token and head besides the operands; the backward pass
recomputes the states of 64 tokens of a head's 64 values.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glazoo.engines import chunked
from glazoo.engines.chunked.common import begin, empty_as, sequences
from glazoo.engines.compiled import loops
from glazoo.engines.compiled.host import borders, flat, home, room, run, shares, slots
from glazoo.engines.compiled.step import few, few_tokens
from glazoo.kernels.loops import SynapseDelta, compute_dtype
from glazoo.kernels.register import register

_RULES = {"first_order": loops.FIRST_ORDER, "exact": loops.EXACT, "exact_rate": loops.RATE}


def _allocate(x: SynapseDelta, keep: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, size = x.v.shape
    like = x.v.new_empty((), dtype=compute_dtype(x.q, x.k, x.v, x.beta, x.b))
    shape = (heads, x.k.shape[3], size)
    total = slots(x.cu_seqlens, batch, tokens) if keep else 0
    counts = (*[sequences(x.cu_seqlens, batch)] * 2, *[total] * 2)
    mu, j, *kept = (like.new_empty(count, *shape) for count in counts)
    return empty_as(x.v), mu, j, empty_as(x.v, x.uncertainty), *kept


def _operands(x: SynapseDelta, dtype: torch.dtype) -> tuple[tuple[Any, ...], Any, Any]:
    """Operands up to the decay, what the decay takes away, and the prior."""
    heads, keys = x.v.shape[2], x.k.shape[3]
    g = None if x.g is None else x.g.detach().to(dtype)
    a, rest = (x.v.new_zeros(1),) * 2 if g is None else (g.exp(), g.expm1().neg_())
    k = flat(x.k, dtype)
    e, s = (k if y is None else flat(y, dtype) for y in (x.e, x.evidence))
    given = (flat(y, dtype) for y in (x.v, x.beta, x.b, a))
    cu = borders(x.cu_seqlens, *x.v.shape[:2])
    prior = flat(x.prior.expand(heads, keys), dtype)
    return (cu, flat(x.q, dtype), k, e, s, *given), flat(rest, dtype), prior


def _sizes(x: SynapseDelta) -> tuple[int, ...]:
    gates = 0 if x.g is None else 1 if x.g.dim() == 3 else x.g.shape[3]
    e, s = (x.k if y is None else y for y in (x.e, x.evidence))
    heads = (y.shape[2] for y in (x.v, x.q, x.k, e, s))
    return *heads, x.k.shape[3], x.v.shape[3], gates, x.beta.shape[3]


def _rule(x: SynapseDelta) -> tuple[int, bool]:
    rule = loops.DIAGONAL if x.correction == "diagonal" else _RULES[x.gain]
    return rule, x.base == "prev"


def _run(x: SynapseDelta, keep: bool) -> tuple[Tensor, ...]:
    out, mu, j, doubt, *kept = found = _allocate(x, keep)
    begin(mu, x.h)
    begin(j, x.j)
    dtype = mu.dtype
    given, _, prior = _operands(x, dtype)
    rooms = [room(*y.shape, dtype=dtype) for y in (out, doubt)]
    run(
        loops.synapse_delta,
        mu.shape[0] * mu.shape[1] * -(-x.v.shape[3] // loops.VALUES),
        1,
        x.v.numel() * x.k.shape[3],
        *given,
        prior,
        *(y.view(-1).numpy() for y in (mu, j, *kept)),
        *(y for _, y in rooms),
        _sizes(x),
        *_rule(x),
        keep,
    )
    for target, (made, _) in zip((out, doubt), rooms, strict=True):
        target.copy_(made)
    return found


def _gradients(
    x: SynapseDelta, grads: Any, wanted: Any, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    grad, grad_mu, grad_j, grad_doubt = grads
    dtype = kept[0].dtype
    batch, tokens, heads, size = x.v.shape
    keys, sizes = x.k.shape[3], _sizes(x)
    gates, rates = sizes[-2:]
    count = sequences(x.cu_seqlens, batch)
    blocks = -(-size // loops.VALUES)
    parts = shares(count * heads, blocks)
    initial = [room(count, heads, keys, size, dtype=dtype) for _ in range(2)]
    for (made, _), start in zip(initial, (grad_mu, grad_j), strict=True):
        begin(made, start)
    lead = batch, tokens, heads
    dq, dk = (room(parts, *lead, keys, dtype=dtype) for _ in range(2))
    de, ds = (dk if y is None else room(parts, *lead, keys, dtype=dtype) for y in (x.e, x.evidence))
    dv, db = (room(1, *lead, size, dtype=dtype) for _ in range(2))
    dbeta = room(parts if rates == 1 else 1, *lead, rates, dtype=dtype)
    dg = room(parts, *lead, gates, dtype=dtype)
    dprior = room(parts, count, heads, keys, dtype=dtype)
    given, rest, prior = _operands(x, dtype)
    run(
        loops.synapse_delta_backward,
        count * heads * blocks,
        blocks if parts == 1 else 1,
        8 * x.v.numel() * keys,
        *given,
        rest,
        prior,
        *(y for _, y in initial),
        *(flat(y, dtype) for y in kept),
        flat(torch.zeros_like(x.v) if grad is None else grad, dtype),
        flat(grad_doubt, dtype),
        *(y for _, y in (dq, dk, de, ds, dv, dbeta, db, dg, dprior)),
        sizes,
        *_rule(x),
        parts,
    )
    owed = (dq, dk, dv, dbeta, db, dg, de, ds)
    found = [home(made, y) for (made, _), y in zip(owed, x[:8], strict=True)]
    total = dprior[0].sum((0, 1)).sum_to_size(x.prior.shape)
    return *found, total, *(made for made, _ in initial), None


_synapse_delta = register(
    "compiled_synapse_delta",
    SynapseDelta,
    results=("out", "final_mu", "final_j", "doubt"),
    kept=("kept_mu", "kept_j"),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def _any_length(*inputs: Any) -> Any:
    x = SynapseDelta(*inputs)
    if x.evidence is not None or not few(x.cu_seqlens, x.h, *x[:11]):
        return _synapse_delta(*inputs)
    given = (x.q, x.k, x.v, x.beta, x.b, x.g, x.e, x.prior, x.h, x.j)
    options = (x.correction, x.gain, "post", x.base, False, True, x.uncertainty)
    return few_tokens(*given, *options)


synapse_delta = functools.partial(chunked.synapse_delta, operator=_any_length)
