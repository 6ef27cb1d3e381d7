"""The importance scan as a compiled loop; `glazoo.engines.chunked.importance` says what it
computes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glazoo.engines import chunked
from glazoo.engines.chunked.common import begin, sequences
from glazoo.engines.chunked.importance import allocate
from glazoo.engines.compiled import loops
from glazoo.engines.compiled.host import borders, flat, home, parts_of_heads, room, run
from glazoo.kernels.loops import Importance
from glazoo.kernels.register import register


def _operands(x: Importance, dtype: torch.dtype) -> tuple[Any, ...]:
    a = x.b.new_zeros(1) if x.g is None else x.g.detach().to(dtype).exp()
    return borders(x.cu_seqlens, *x.b.shape[:2]), *(flat(y, dtype) for y in (x.k, x.b, a))


def _sizes(x: Importance) -> tuple[int, ...]:
    gates = 0 if x.g is None else 1 if x.g.dim() == 3 else x.g.shape[3]
    return x.b.shape[2], x.k.shape[2], x.k.shape[3], gates


def _run(x: Importance, keep: bool) -> tuple[Tensor, Tensor]:
    out, final = found = allocate(x, keep)
    begin(final, x.initial_state)
    parts = parts_of_heads(*final.shape[:2])
    made = (y.view(-1).numpy() for y in (final, out))
    given = _operands(x, out.dtype)
    run(loops.importance, final.shape[0] * parts, 1, out.numel(), *given, *made, _sizes(x), parts)
    return found


def _gradients(x: Importance, grads: Any, wanted: Any, value: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    dtype = value.dtype
    batch, tokens, heads, keys = value.shape
    count = sequences(x.cu_seqlens, batch)
    parts, sizes = parts_of_heads(count, heads), _sizes(x)
    dinitial, start = room(count, heads, keys, dtype=dtype)
    begin(dinitial, grad_final)
    lead = batch, tokens, heads
    owed = [room(1, *lead, size, dtype=dtype) for size in (keys, 1, sizes[3])]
    initial = torch.zeros_like(dinitial) if x.initial_state is None else x.initial_state
    run(
        loops.importance_backward,
        count * parts,
        1,
        4 * value.numel(),
        *_operands(x, dtype),
        flat(initial, dtype),
        flat(value, dtype),
        flat(torch.zeros_like(value) if grad is None else grad, dtype),
        start,
        *(y for _, y in owed),
        sizes,
        parts,
    )
    return *(home(made, y) for (made, _), y in zip(owed, x[:3], strict=True)), dinitial, None


_importance = register(
    "compiled_importance",
    Importance,
    results=("out", "final"),
    reads=("out",),
    forward=_run,
    allocate=allocate,
    gradients=_gradients,
)
importance = functools.partial(chunked.importance, operator=_importance)
