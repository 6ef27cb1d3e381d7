"""Packed sequences: several documents in one row, which no state and no convolution may cross."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Packed", "convolve_apart", "find_packed"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the documents in a batch begin."""

    starts: Tensor
    """[B, T], true at the first token of every document; always at the first of a row."""

    @functools.cached_property
    def documents(self) -> Tensor:
        """Index of every token's document within its row, [B, T]."""
        return self.starts.cumsum(1) - 1

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """Bounds of all documents of all rows laid end to end, [N + 1]."""
        bounds = self.starts.flatten().nonzero().flatten()
        return torch.cat([bounds, bounds.new_tensor([self.starts.numel()])])

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every token, [B, T] each, where every document has a row of its own."""
        rows = (self.starts.flatten().cumsum(0) - 1).view_as(self.starts)
        return rows, self.positions

    def apart(self, x: Tensor, fill: float = 0) -> Tensor:
        """Return every document a row of its own: [B, T, ...] to [N, L, ...], filled on the
        right."""
        rows, columns = self.places
        shape = (int(rows.max()) + 1, int(columns.max()) + 1, *x.shape[2:])
        return x.new_full(shape, fill).index_put((rows, columns), x)

    def together(self, x: Tensor) -> Tensor:
        """Undo `apart`."""
        return x[self.places]

    @functools.cached_property
    def positions(self) -> Tensor:
        """Position of every token within its document, [B, T]."""
        t = torch.arange(self.starts.shape[1], device=self.starts.device).expand_as(self.starts)
        return t - torch.where(self.starts, t, 0).cummax(1).values


def find_packed(
    rows: int,
    tokens: int,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Packed | None:
    """Return where packed documents begin, or None if every row is one document.

    Args:
        rows: B.
        tokens: T.
        position_ids: positions [B, T] that start again at each document.
        cu_seqlens: bounds [N + 1] of the documents of all rows, laid end to end.
        seq_idx: document of each token, [B, T].
        attention_mask: [B, T], 0 at padding, if there is one.

    Raises:
        ValueError: two of them disagree, the bounds are not those of the rows, or rows are packed
            and padded at once.
    """
    found: dict[str, Tensor] = {}
    # Every entry: whether a token other than a row's first begins a document, [B, T - 1].
    if seq_idx is not None:
        ids = _rows("seq_idx", seq_idx, rows, tokens)
        found["seq_idx"] = ids[:, 1:] != ids[:, :-1]
    if cu_seqlens is not None:
        found["cu_seq_lens_q"] = _starts(cu_seqlens, rows, tokens)[:, 1:]
    # More axes than two are the positions of images.
    if position_ids is not None and position_ids.dim() == 2:
        positions = _rows("position_ids", position_ids, rows, tokens)
        found["position_ids"] = positions[:, 1:] != positions[:, :-1] + 1
    padded = False
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -tokens:].bool()
        padded = not bool(real.all())
        # Positions of padding are anything: a document begins where it follows a real token.
        found = {name: x & real[:, 1:] & real[:, :-1] for name, x in found.items()}
    if tokens < 2 or not any(bool(x.any()) for x in found.values()):
        return None
    (first, inside), *rest = found.items()
    for name, other in rest:
        if not torch.equal(other, inside):
            raise ValueError(
                f"packed sequences: {first} and {name} let documents begin at different tokens; "
                "pass one of them, or make them agree"
            )
    if padded:
        raise ValueError(
            "packed sequences: the batch has padding (zeros in attention_mask) and several "
            "documents in a row; pass rows without padding and no attention_mask"
        )
    return Packed(torch.cat([torch.ones_like(inside[:, :1]), inside], 1))


def _rows(name: str, x: Tensor, rows: int, tokens: int) -> Tensor:
    if x.shape[-1] != tokens or x.numel() not in (tokens, rows * tokens):
        raise ValueError(
            f"{name}: got shape {list(x.shape)}, expected [{rows}, {tokens}], that of the tokens"
        )
    return x.reshape(x.numel() // max(tokens, 1) or 1, tokens).expand(rows, tokens)


def _starts(cu_seqlens: Tensor, rows: int, tokens: int) -> Tensor:
    bounds = cu_seqlens.flatten().long()
    ordered = bounds.numel() > 1 and not bool((bounds[1:] < bounds[:-1]).any())
    if not ordered or int(bounds[0]) != 0 or int(bounds[-1]) != rows * tokens:
        raise ValueError(
            f"cu_seq_lens_q: got {_short(bounds.tolist())}, expected 0, the end of each "
            f"document in order, and {rows * tokens} last, the number of tokens"
        )
    starts = torch.zeros(rows * tokens + 1, dtype=torch.bool, device=bounds.device)
    starts[bounds] = True
    return starts[:-1].view(rows, tokens)


def _short(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return f"[{shown}{', ...' if len(values) > 6 else ''}]"


def convolve_apart(
    convolution: Callable[..., Tensor], packed: Packed, x: Tensor, weight: Any = None, *args: Any
) -> Tensor:
    """Run a causal convolution that crosses no document's start.

    The documents are moved apart by as many zeros as the convolution looks back, so that the
    source's own function computes each as if it stood alone.

    Args:
        convolution: the source's function of x [B, C, T].
        packed: where documents begin.
        x: [B, C, T].
        weight: [C, W].
        args: further arguments of the function.

    Returns:
        [B, C, T].
    """
    given = () if weight is None else (weight, *args)
    taps = (weight if weight is not None else convolution.keywords["weight"]).shape[-1]  # type: ignore[attr-defined]
    rows, channels, tokens = x.shape
    at = torch.arange(tokens, device=x.device) + (taps - 1) * packed.documents
    at = at[:, None].expand(rows, channels, tokens)
    length = tokens + (taps - 1) * int(packed.documents.max())
    spread = x.new_zeros(rows, channels, length).scatter(2, at, x)
    return convolution(spread, *given).gather(2, at)
