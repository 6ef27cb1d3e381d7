"""Tiles, packed sequences and dtype rules that all chunked operations share.

Notation (used in every module of this package)
    B batch, T tokens, H query/key heads, HV value heads, K key size, V value size, N sequences,
    C tokens of a chunk, R rows (batch x value heads) of a tile, n chunks of a tile.

The work is done tile by tile: a tile is `n` consecutive chunks of `R` rows, copied to contiguous
[n * R, C, D] buffers in the compute dtype. A tile is small enough to stay in the caches of a CPU,
so neither a full-precision copy of the operands nor repeated heads ever exist at full length.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers of a tile in its widest operand, per thread: 256 KiB of float32, some ten of which are
# alive at once.
TILE = 1 << 16
# Sequences of a pack longer than this many chunks are views of the operands, shorter ones are
# gathered into batches of similar length, at most GATHER tokens at a time.
LONG = 8
GATHER = 16384


class Tile(NamedTuple):
    """Tokens start..stop as `number` chunks of `size` tokens; a part-filled tile has one chunk."""

    start: int
    stop: int
    number: int
    size: int
    chunk: int

    @property
    def full(self) -> bool:
        return self.stop - self.start == self.number * self.size


class Rows(NamedTuple):
    """A block of batch entries b0..b1 and value heads h0..h1 (of `heads`)."""

    b0: int
    b1: int
    h0: int
    h1: int
    heads: int

    @property
    def number(self) -> int:
        return (self.b1 - self.b0) * (self.h1 - self.h0)

    @property
    def batch(self) -> int:
        return self.b1 - self.b0

    @property
    def width(self) -> int:
        return self.h1 - self.h0


def row_blocks(batch: int, heads: int, groups: int, limit: int) -> Iterator[Rows]:
    """Blocks of at most about `limit` rows; a group of heads that shares a key is never split."""
    share = heads // groups
    width = min(heads, share * max(1, limit // share))
    depth = max(1, limit // width) if width == heads else 1
    for b0 in range(0, batch, depth):
        for h0 in range(0, heads, width):
            yield Rows(b0, min(b0 + depth, batch), h0, min(h0 + width, heads), heads)


def tile_limit(tokens: int, chunk: int, width: int, tile: int = TILE) -> int:
    """Rows times chunks of a tile of `tile` numbers in operands of `width` numbers per token."""
    size = min(chunk, 1 << max(tokens - 1, 0).bit_length())
    return max(1, tile * torch.get_num_threads() // (size * width))


def blocks(
    batch: int, tokens: int, heads: int, groups: int, chunk: int, width: int, tile: int = TILE
) -> Iterator[tuple[Rows, list[Tile]]]:
    """Blocks of rows and the tiles of each."""
    limit = tile_limit(tokens, chunk, width, tile)
    for rows in row_blocks(batch, heads, groups, limit):
        yield rows, tiles(tokens, rows.number, chunk, limit)


def tiles(tokens: int, rows: int, chunk: int, limit: int) -> list[Tile]:
    """Cuts `tokens` into tiles of whole chunks and a part-filled power-of-two chunk at the end."""
    whole = tokens // chunk
    step = max(1, limit // max(rows, 1))
    found = [
        Tile(c * chunk, min(c + step, whole) * chunk, min(step, whole - c), chunk, c)
        for c in range(0, whole, step)
    ]
    rest = tokens - whole * chunk
    if rest:
        found.append(Tile(whole * chunk, tokens, 1, 1 << (rest - 1).bit_length(), whole))
    return found


def _windows(x: Tensor, buffer: Tensor, rows: Rows, tile: Tile) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views [n, b, heads, share, C, D]: of the tile's tokens in x and in the buffer."""
    share = rows.heads // x.shape[2]
    part = x[rows.b0 : rows.b1, tile.start : tile.stop, rows.h0 // share : rows.h1 // share]
    whole = part.shape[1] // tile.size
    rest = part.shape[1] - whole * tile.size
    for first, number, size in ((0, whole, tile.size), (whole, 1, rest)):
        if number and size:
            start = first * tile.size
            view = part[:, start : start + number * size].unflatten(1, (number, size))
            view = view.permute(1, 0, 3, 2, 4).unsqueeze(3)
            yield view, buffer[first : first + number, ..., :size, :]


def _shape(x: Tensor, rows: Rows, tile: Tile) -> tuple[int, ...]:
    share = rows.heads // x.shape[2]
    return (tile.number, rows.batch, rows.width // share, share, tile.size, x.shape[3])


def load(x: Tensor, rows: Rows, tile: Tile, dtype: torch.dtype) -> Tensor:
    """Copies the tile of x [B, T, heads, D] (or [B, T, heads]) to a buffer [n * R, C, D].

    Heads are repeated up to the value heads of the block and missing tokens are zeros.
    """
    if x.dim() == 3:
        x = x.unsqueeze(-1)
    shape = _shape(x, rows, tile)
    make = torch.empty if tile.full else torch.zeros
    buffer = make(shape, dtype=dtype, device=x.device)
    for view, part in _windows(x, buffer, rows, tile):
        part.copy_(view.expand(part.shape))
    return buffer.view(-1, tile.size, x.shape[3])


def store(target: Tensor | None, value: Tensor, rows: Rows, tile: Tile) -> None:
    """Writes a buffer [n * R, C, D] to its place in target, if any, summed over repeated heads."""
    if target is None:
        return
    if target.dim() == 3:
        target = target.unsqueeze(-1)
    buffer = value.view(_shape(target, rows, tile))
    if buffer.shape[3] > 1:
        buffer = buffer.sum(3, keepdim=True)
    for view, part in _windows(target, buffer, rows, tile):
        view.copy_(part)


def earlier(value: Tensor, initial: Tensor | None, tile: Tile) -> tuple[Tensor, Tile]:
    """Where the states before the tokens of a tile are, given those after every token."""
    if tile.start:
        return value, tile._replace(start=tile.start - 1, stop=tile.stop - 1)
    first = torch.zeros_like(value[:, :1]) if initial is None else initial.unsqueeze(1)
    return torch.cat((first.to(value.dtype), value[:, : tile.stop - 1]), 1), tile


class Group:
    """Sequences of a pack that are computed as one batch [rows, length].

    A long sequence is a view of the packed operands. Short ones of similar length are gathered
    with padding that changes no state: keys, values, gates and log decays of padding are zero.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        ids: list[int] | None = None,
        span: tuple[int, int] | None = None,
        spans: list[tuple[int, int]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.rows, self.length, self.span = rows, length, span
        self.ids = None if ids is None else torch.tensor(ids, device=device)
        self.index: Tensor | None = None
        if spans is not None:
            first = torch.tensor([s for s, _ in spans], device=device).unsqueeze(1)
            stop = torch.tensor([e for _, e in spans], device=device).unsqueeze(1)
            index = first + torch.arange(length, device=device)
            self.mask = index < stop
            self.index = torch.where(self.mask, index, 0)

    def take(self, x: Tensor | None) -> Tensor | None:
        """The group's tokens of x [B, T, ...] as [rows, length, ...]."""
        if x is None:
            return None
        if self.index is not None:
            found = x[0][self.index]
            mask = self.mask.reshape(self.mask.shape + (1,) * (found.dim() - 2))
            return found.masked_fill_(~mask, 0)
        return x if self.span is None else x[:, self.span[0] : self.span[1]]

    def take_state(self, x: Tensor | None) -> Tensor | None:
        if x is None or self.ids is None:
            return x
        return x[self.ids]

    def room(self, x: Tensor) -> Tensor:
        """Where the group's tokens of the result x are to be written; `put` brings them home."""
        if self.index is not None:
            return x.new_empty((self.rows, self.length, *x.shape[2:]))
        return x if self.span is None else x[:, self.span[0] : self.span[1]]

    def room_state(self, x: Tensor) -> Tensor:
        return x if self.ids is None else x.new_empty((self.rows, *x.shape[1:]))

    def put(self, x: Tensor, room: Tensor) -> None:
        if self.index is not None:
            x[0, self.index[self.mask]] = room[self.mask]

    def put_state(self, x: Tensor, room: Tensor) -> None:
        if self.ids is not None:
            x[self.ids] = room


def groups(cu_seqlens: Tensor | None, batch: int, tokens: int, chunk: int) -> list[Group]:
    """How the sequences are batched; sequences without tokens are in no group."""
    if cu_seqlens is None:
        return [Group(batch, tokens)] if batch and tokens else []
    borders = [int(x) for x in cu_seqlens.tolist()]
    found: list[Group] = []
    buckets: dict[int, list[int]] = {}
    for i, (first, stop) in enumerate(itertools.pairwise(borders)):
        length = stop - first
        if length > LONG * chunk:
            found.append(Group(1, length, [i], (first, stop)))
        elif length:
            padded = -(-length // chunk) * chunk
            if length < chunk:
                padded = 1 << (length - 1).bit_length()
            buckets.setdefault(padded, []).append(i)
    for padded, ids in sorted(buckets.items()):
        step = max(1, GATHER // padded)
        for i in range(0, len(ids), step):
            part = ids[i : i + step]
            if len(part) == 1:
                j = part[0]
                span = (borders[j], borders[j + 1])
                found.append(Group(1, span[1] - span[0], part, span))
            else:
                spans = [(borders[j], borders[j + 1]) for j in part]
                found.append(Group(len(part), padded, part, spans=spans, device=cu_seqlens.device))
    return found


def sequences(cu_seqlens: Tensor | None, batch: int) -> int:
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def slots(cu_seqlens: Tensor | None, batch: int, tokens: int, chunk: int) -> int:
    """An upper bound on the number of chunks that does not depend on the values in cu_seqlens."""
    if cu_seqlens is None:
        return batch * -(-tokens // chunk)
    return tokens // chunk + cu_seqlens.shape[0] - 1


def chunks(tokens: int, chunk: int) -> int:
    return -(-tokens // chunk)


@functools.lru_cache(maxsize=64)
def _triangle(size: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    ones = torch.ones(size, size, dtype=dtype, device=device)
    return {"later": ones.triu(), "strictly later": ones.triu(1), "earlier": ones.tril(-1)}[kind]


def triangle(size: int, kind: str, like: Tensor) -> Tensor:
    """0/1 matrix M[t, i]: "later" i >= t, "strictly later" i > t, "earlier" i < t."""
    return _triangle(size, kind, like.dtype, like.device)


Core = Callable[..., None]
# Operands of a record that are states, and that belong to no sequence; all others are per token.
STATES = ("initial_state", "h", "j")
SHARED = ("prior", "cu_seqlens")


def over_sequences(
    core: Core,
    x: Any,
    chunk: int,
    *,
    tokens: Sequence[Tensor | None] = (),
    states: Sequence[Tensor | None] = (),
    results: Sequence[Tensor | None],
    final: Sequence[Tensor],
    kept: Sequence[Tensor] = (),
) -> None:
    """Runs `core` on every batch of equally long sequences of a pack.

    Args:
        core: called with (x, tokens, states, results, final, kept) of one batch; it fills the last
            three.
        x: the record of the call; a batch gets one of its own operands and states.
        tokens: what else is [B, T, ...], the gradients of results.
        states: what else is [N, ...], the gradients of final states.
        results: [B, T, ...] each, allocated, or None where not wanted.
        final: [N, ...] each, holding what sequences without tokens give.
        kept: what is stored per chunk, [slots, ...] each; a batch gets [chunks, rows, ...].
    """
    used = 0
    for group in groups(x.cu_seqlens, x[0].shape[0], x[0].shape[1], chunk):
        number = chunks(group.length, chunk)
        total = number * group.rows
        parts = [y[used : used + total].unflatten(0, (number, group.rows)) for y in kept]
        used += total
        rooms = [None if y is None else group.room(y) for y in results]
        rooms_final = [group.room_state(y) for y in final]
        own = {
            name: group.take_state(y) if name in STATES else group.take(y)
            for name, y in x._asdict().items()
            if isinstance(y, Tensor) and name not in SHARED
        }
        core(
            x._replace(**own),
            [group.take(y) for y in tokens],
            [group.take_state(y) for y in states],
            rooms,
            rooms_final,
            parts,
        )
        for y, room in zip(results, rooms, strict=True):
            if y is not None and room is not None:
                group.put(y, room)
        for y, room in zip(final, rooms_final, strict=True):
            group.put_state(y, room)


def begin(final: Tensor, initial: Tensor | None) -> None:
    """Makes a final state that of no tokens."""
    if initial is None:
        final.zero_()
    else:
        final.copy_(initial)


def start_of(
    x: Tensor | None, corner: tuple[slice, slice], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """The states [N, HV, ..] of a block of rows, in the given shape; zeros if None."""
    if x is None:
        return like.new_zeros(shape)
    return x[corner].to(like.dtype).reshape(shape)


def floor_of(prior: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The prior [HV, 1 or K] of a block of rows, [R, 1 or K, 1]."""
    return prior[rows.h0 : rows.h1].to(dtype).repeat(rows.batch, 1).unsqueeze(-1)


def needed(x: Tensor | None) -> Tensor:
    """What an operation has because of its options."""
    assert x is not None
    return x


def rooms_for(x: Any, wanted: Any, *names: str) -> list[Tensor | None]:
    """Uninitialised gradients of operands of a record, None where none is wanted."""
    given = [getattr(x, name) if getattr(wanted, name) else None for name in names]
    return [None if y is None else empty_as(y) for y in given]


def empty_as(x: Tensor, wanted: bool = True) -> Tensor:
    """An uninitialised contiguous result like x, or a placeholder if it is not wanted."""
    return torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)


def carry(state: Tensor, writes: Tensor, total: Tensor | None, out: Tensor) -> None:
    """out = total * state + writes, the step of a linear state over one chunk."""
    if total is None:
        torch.add(writes, state, out=out)
    else:
        torch.addcmul(writes, state, total, out=out)
