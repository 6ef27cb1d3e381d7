"""Checks of operand shapes: errors that name the argument, what came and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor


def choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def tokens(**operands: Tensor | None) -> None:
    """All operands are [B, T, heads, size] with the same B and T."""
    given = {name: x for name, x in operands.items() if x is not None}
    (first, reference), *_ = given.items()
    for name, x in given.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: [B, T, heads, size]")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; accepted: floating dtypes")
        if x.shape[:2] != reference.shape[:2]:
            raise ValueError(
                f"{name} has batch and tokens {tuple(x.shape[:2])}; accepted: those of "
                f"{first}, {tuple(reference.shape[:2])}"
            )


def heads(number: int, **operands: Tensor | None) -> None:
    """Query and key heads divide the value heads; key sizes agree."""
    given = {name: x for name, x in operands.items() if x is not None}
    (first, reference), *_ = given.items()
    shared = {x.shape[2] for x in given.values()} - {number}
    for name, x in given.items():
        if x.shape[2] == 0 or number % x.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} heads; accepted: a divisor of {number}")
        if len(shared) > 1:
            counts = {n: y.shape[2] for n, y in given.items()}
            raise ValueError(f"heads are {counts}; accepted: {number} or one common divisor of it")
        if x.shape[3] != reference.shape[3]:
            raise ValueError(
                f"{name} has key size {x.shape[3]}; accepted: that of {first}, {reference.shape[3]}"
            )


def gate(name: str, g: Tensor | None, k: Tensor, w: Tensor) -> None:
    """A log decay [B, T, HV] or [B, T, HV, K]."""
    if g is None:
        return
    lead = tuple(w.shape[:3])
    accepted = [lead, (*lead, k.shape[3])]
    if tuple(g.shape) not in accepted:
        shown = " or ".join(str(list(a)) for a in accepted)
        raise ValueError(f"{name} has shape {list(g.shape)}; accepted: {shown}")


def shape(name: str, x: Tensor | None, *accepted: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) not in accepted:
        shown = " or ".join(str(list(a)) for a in accepted)
        raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {shown}")


def factors(w: Tensor, **gates: Tensor | None) -> None:
    """Gates [B, T, HV]."""
    for name, x in gates.items():
        shape(name, x, tuple(w.shape[:3]))


def packing(cu_seqlens: Tensor | None, w: Tensor) -> None:
    if cu_seqlens is None:
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; accepted: [N + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; accepted: int64, int32")
    if w.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs one packed row, B = 1; the batch is {w.shape[0]}")


def state(
    name: str, x: Tensor | None, cu_seqlens: Tensor | None, w: Tensor, rows: int, columns: int
) -> None:
    if x is None:
        return
    count = w.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape(name, x, (count, w.shape[2], rows, columns))
