"""What the hosts of all loops share: flat operands, sequences, and threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glazoo.engines.compiled import loops

# Multiplications below which a call is shorter than what a second thread costs.
SMALL = 1 << 20

NUMBERS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
"""The types of what the loops compute with."""


def lies_flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of which the address says all."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.is_contiguous() and not x.is_neg() else x.contiguous().resolve_neg()


def flat(x: Tensor | None, dtype: torch.dtype) -> Any:
    """An operand as the loops take it, empty for None."""
    if x is None:
        return torch.empty(0, dtype=dtype).numpy()
    return x.detach().to(dtype).contiguous().view(-1).numpy()


def room(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Zeros, and the same memory as the loops take it."""
    made = torch.zeros(shape, dtype=dtype)
    return made, made.view(-1).numpy()


def borders(cu_seqlens: Tensor | None, batch: int, tokens: int) -> Any:
    """Borders of the sequences among the tokens of all batch entries."""
    if cu_seqlens is None:
        return np.arange(batch + 1, dtype=np.int64) * tokens
    return cu_seqlens.numpy().astype(np.int64)


def slots(cu_seqlens: Tensor | None, batch: int, tokens: int) -> int:
    """How many states are kept: every KEPT tokens of every sequence, at slots that follow from
    where it begins."""
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return batch * tokens // loops.KEPT + sequences


def shares(units: int, blocks: int) -> int:
    """How many blocks of values of a head have sums of their own: one where there are enough heads
    for all threads."""
    return 1 if units >= 2 * torch.get_num_threads() else blocks


def parts_of_heads(sequences: int, heads: int) -> int:
    """Into how many shares a scan cuts the heads, so that every thread has one."""
    return max(1, min(heads, -(-torch.get_num_threads() // max(sequences, 1))))


def home(x: Tensor, like: Tensor | None) -> Tensor | None:
    """Gradients [parts, B, T, HV, channels], summed over parts and over the heads that share."""
    if like is None:
        return None
    x = x.sum(0) if x.shape[0] > 1 else x[0]
    if x.dim() > 3 and like.shape[2] != x.shape[2]:
        x = x.unflatten(2, (like.shape[2], -1)).sum(3)
    return x.reshape(like.shape)


_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    """A forked process has no threads but one."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)


def run(loop: Callable[..., None], units: int, step: int, work: int, *operands: Any) -> None:
    """Run a loop over all units, `step` of them at a time, on as many threads as torch uses.

    The calling thread takes its share, so that nothing waits for a thread of the pool that another
    call keeps busy.
    """
    global _pool
    threads = min(torch.get_num_threads(), -(-units // step)) if work > SMALL else 1
    if threads <= 1:
        loop(0, units, *operands)
        return
    todo = iter(range(0, units, step))

    def take() -> None:
        for first in todo:
            loop(first, min(first + step, units), *operands)

    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="glazoo")
    others: Sequence[Future[None]] = [_pool.submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        # One that has not begun finds nothing to do.
        if not other.cancel():
            other.result()
