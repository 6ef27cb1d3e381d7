"""The synapse class as a compiled loop; `glazoo.engines.chunked.synapse` says what it computes.

A block of 64 values of all keys stays in a core's first caches. Two keys and four tokens are worked
on between a load and a store of a synapse; a division per synapse and token is most of the time.

Memory: training keeps 2 K V / 64 numbers per token and head besides the operands.
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
from glazoo.kernels.loops import Synapse, compute_dtype
from glazoo.kernels.register import register


def _allocate(x: Synapse, keep: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, size = x.w.shape
    like = x.w.new_empty((), dtype=compute_dtype(x.q, x.k, x.w, x.b))
    shape = (heads, x.k.shape[3], size)
    total = slots(x.cu_seqlens, batch, tokens) if keep else 0
    counts = (*[sequences(x.cu_seqlens, batch)] * 2, *[total] * 2)
    h, j, *kept = (like.new_empty(count, *shape) for count in counts)
    return empty_as(x.w), h, j, empty_as(x.w, x.uncertainty), *kept


def _operands(x: Synapse, dtype: torch.dtype) -> tuple[Any, ...]:
    heads, keys = x.w.shape[2], x.k.shape[3]
    a = x.w.new_zeros(1) if x.g is None else x.g.detach().to(dtype).exp()
    given = (x.q, x.k, x.w, x.b, a, x.prior.expand(heads, keys))
    return borders(x.cu_seqlens, *x.w.shape[:2]), *(flat(y, dtype) for y in given)


def _sizes(x: Synapse) -> tuple[int, ...]:
    gates = 0 if x.g is None else 1 if x.g.dim() == 3 else x.g.shape[3]
    return x.w.shape[2], x.q.shape[2], x.k.shape[2], x.k.shape[3], x.w.shape[3], gates


def _run(x: Synapse, keep: bool) -> tuple[Tensor, ...]:
    out, h, j, doubt, *kept = found = _allocate(x, keep)
    begin(h, x.h)
    begin(j, x.j)
    dtype = h.dtype
    blocks = -(-x.w.shape[3] // loops.VALUES)
    rooms = [room(*y.shape, dtype=dtype) for y in (out, doubt)]
    run(
        loops.synapse,
        h.shape[0] * h.shape[1] * blocks,
        1,
        x.w.numel() * x.k.shape[3],
        *_operands(x, dtype),
        *(y.view(-1).numpy() for y in (h, j, *kept)),
        *(y for _, y in rooms),
        _sizes(x),
        int(x.read == "pre"),
        keep,
    )
    for target, (made, _) in zip((out, doubt), rooms, strict=True):
        target.copy_(made)
    return found


def _gradients(x: Synapse, grads: Any, wanted: Any, *kept: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_h, grad_j, grad_doubt = grads
    dtype = kept[0].dtype
    batch, tokens, heads, size = x.w.shape
    keys, sizes = x.k.shape[3], _sizes(x)
    count = sequences(x.cu_seqlens, batch)
    blocks = -(-size // loops.VALUES)
    parts = shares(count * heads, blocks)
    initial = [room(count, heads, keys, size, dtype=dtype) for _ in range(2)]
    for (made, _), given in zip(initial, (grad_h, grad_j), strict=True):
        begin(made, given)
    lead = batch, tokens, heads
    owed = [
        *(room(parts, *lead, keys, dtype=dtype) for _ in range(2)),
        *(room(1, *lead, size, dtype=dtype) for _ in range(2)),
        room(parts, *lead, sizes[5], dtype=dtype),
        room(parts, count, heads, keys, dtype=dtype),
    ]
    run(
        loops.synapse_backward,
        count * heads * blocks,
        blocks if parts == 1 else 1,
        4 * x.w.numel() * keys,
        *_operands(x, dtype),
        *(y for _, y in initial),
        *(flat(y, dtype) for y in kept),
        flat(torch.zeros_like(x.w) if grad is None else grad, dtype),
        flat(grad_doubt, dtype),
        *(y for _, y in owed),
        sizes,
        int(x.read == "pre"),
        parts,
    )
    dprior = owed.pop()[0].sum((0, 1)).sum_to_size(x.prior.shape)
    found = (home(made, y) for (made, _), y in zip(owed, x[:5], strict=True))
    return *found, dprior, *(made for made, _ in initial), None


_synapse = register(
    "compiled_synapse",
    Synapse,
    results=("out", "final_h", "final_j", "doubt"),
    kept=("kept_h", "kept_j"),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def _any_length(*inputs: Any) -> Any:
    x = Synapse(*inputs)
    if not few(x.cu_seqlens, x.h, *x[:8]):
        return _synapse(*inputs)
    given = (x.q, x.k, x.w, None, x.b, x.g, None, x.prior, x.h, x.j)
    return few_tokens(*given, "none", "first_order", x.read, "decayed", False, True, x.uncertainty)


synapse = functools.partial(chunked.synapse, operator=_any_length)
