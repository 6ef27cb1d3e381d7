"""The scan of fractions as a compiled loop; `glazoo.engines.chunked.riccati` says what it
computes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glazoo.engines import chunked
from glazoo.engines.chunked.common import begin, sequences
from glazoo.engines.chunked.riccati import allocate
from glazoo.engines.compiled import loops
from glazoo.engines.compiled.host import borders, flat, home, parts_of_heads, room, run
from glazoo.kernels.loops import Riccati
from glazoo.kernels.register import register


def _sizes(x: Riccati) -> tuple[int, ...]:
    return x.u.shape[2], *(y.shape[3] for y in (x.u, x.a, x.c, x.d))


def _run(x: Riccati, keep: bool) -> tuple[Tensor, Tensor]:
    out, final = found = allocate(x, keep)
    begin(final, x.initial_state)
    parts = parts_of_heads(*final.shape[:2])
    run(
        loops.riccati,
        final.shape[0] * parts,
        1,
        4 * out.numel(),
        borders(x.cu_seqlens, *x.u.shape[:2]),
        *(flat(y, out.dtype) for y in x[:4]),
        *(y.view(-1).numpy() for y in (final, out)),
        _sizes(x),
        parts,
    )
    return found


def _gradients(x: Riccati, grads: Any, wanted: Any, value: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    dtype = value.dtype
    count, heads, keys = sequences(x.cu_seqlens, x.u.shape[0]), *value.shape[2:]
    parts = parts_of_heads(count, heads)
    dinitial, start = room(count, heads, keys, dtype=dtype)
    begin(dinitial, grad_final)
    owed = [room(1, *y.shape, dtype=dtype) for y in x[:4]]
    initial = torch.zeros_like(dinitial) if x.initial_state is None else x.initial_state
    run(
        loops.riccati_backward,
        count * parts,
        1,
        8 * value.numel(),
        borders(x.cu_seqlens, *x.u.shape[:2]),
        *(flat(y, dtype) for y in (*x[:3], initial, value)),
        flat(torch.zeros_like(value) if grad is None else grad, dtype),
        start,
        *(y for _, y in owed),
        _sizes(x),
        parts,
    )
    return *(home(made, y) for (made, _), y in zip(owed, x[:4], strict=True)), dinitial, None


_riccati = register(
    "compiled_riccati",
    Riccati,
    results=("out", "final"),
    reads=("out",),
    forward=_run,
    allocate=allocate,
    gradients=_gradients,
)
riccati = functools.partial(chunked.riccati, operator=_riccati)
