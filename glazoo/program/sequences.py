"""Tokens, sub-tokens and packed sequences: what steps do along the token axis."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["interleave", "last", "log_sums", "positions", "previous"]


def interleave(*parts: Float[Tensor, "B T ..."]) -> Float[Tensor, "B nT ..."]:
    """Put n sub-tokens side by side: n times [B, T, ...] gives [B, n T, ...]."""
    return torch.stack(parts, 2).flatten(1, 2)


def positions(cu_seqlens: Int[Tensor, "N1"], tokens: int) -> tuple[Tensor, Tensor]:
    """Return each packed token's sequence, and whether it is that sequence's first."""
    t = torch.arange(tokens, device=cu_seqlens.device)
    # `right`: a token belongs to the last sequence that starts at or before it, never to an empty
    # one.
    sequence = torch.searchsorted(cu_seqlens, t, right=True) - 1
    return sequence, t == cu_seqlens[sequence]


def previous(
    x: Float[Tensor, "B T ..."],
    first: Float[Tensor, "N ..."] | None,
    cu_seqlens: Int[Tensor, "N1"] | None,
) -> Float[Tensor, "B T ..."]:
    """Shift by one token; `first` (default zeros) stands before each sequence."""
    if x.shape[1] == 0:
        return x
    if cu_seqlens is None:
        start = x.new_zeros(x.shape[:1] + x.shape[2:]) if first is None else first.to(x.dtype)
        # Of x alone a slice would have T - 1 tokens, which no graph of any T takes to be one.
        return torch.cat([start[:, None], x], 1)[:, : x.shape[1]]
    sequence, is_first = positions(cu_seqlens, x.shape[1])
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x], 1)[:, : x.shape[1]]
    start = torch.zeros_like(x) if first is None else first.to(x.dtype)[sequence][None]
    return torch.where(is_first.view(1, -1, *[1] * (x.ndim - 2)), start, shifted)


def last(
    x: Float[Tensor, "B T ..."],
    first: Float[Tensor, "N ..."] | None,
    cu_seqlens: Int[Tensor, "N1"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "N ..."]:
    """Return each sequence's last token in the dtype of a state, or `first` (default zeros) where
    the sequence is empty."""
    n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    zeros = x.new_zeros(n, *x.shape[2:], dtype=dtype)
    start = zeros if first is None else first.to(dtype)
    if x.shape[1] == 0:
        return start
    if cu_seqlens is None:
        return x[:, -1].to(dtype)
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).view(-1, *[1] * (x.ndim - 2))
    return torch.where(empty, start, x[0, (cu_seqlens[1:] - 1).clamp(min=0)].to(dtype))


def log_sums(
    x: Float[Tensor, "B T ..."],
    first: Float[Tensor, "N ..."],
    cu_seqlens: Int[Tensor, "N1"] | None,
) -> Float[Tensor, "B T ..."]:
    """Return log(exp(first) + sum of exp(x) up to each token), within each sequence.

    Args:
        x: logarithms.
        first: what each sequence starts from.
        cu_seqlens: bounds of packed sequences.

    Returns:
        The logarithms of the sums.
    """
    if cu_seqlens is None:
        z = torch.logcumsumexp(x, 1) if x.shape[1] else x
        return torch.logaddexp(z, first[:, None])
    # Segmented scan by doubling: after i rounds z_t covers the last 2^i tokens of its sequence.
    sequence, _ = positions(cu_seqlens, x.shape[1])
    z, reach = x, 1
    while reach < x.shape[1]:
        start = torch.zeros_like(sequence[:reach], dtype=torch.bool)
        same = torch.cat([start, sequence[reach:] == sequence[:-reach]])
        moved = torch.cat([torch.zeros_like(z[:, :reach]), z[:, :-reach]], 1)
        z = torch.logaddexp(z, moved.masked_fill(~same[None, :, None, None], -torch.inf))
        reach *= 2
    return torch.logaddexp(z, first[sequence][None])
