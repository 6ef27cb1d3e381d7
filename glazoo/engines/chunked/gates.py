"""Decay inside a chunk: products of decays between two tokens, and their gradients.

With a_t = exp(g_t), the chunked forms need, for tokens j < i of one chunk,

    head(i) = a_1 .. a_i   tail(j) = a_{j+1} .. a_C   total = a_1 .. a_C   D(i, j) = a_{j+1} .. a_i

and `exclusive` forms without a_i (the reader sees the state before the decay of its own token).
Ratios of cumulative products overflow and differences of cumulative logs cancel, so none is formed.
The chunk is halved recursively instead: for a block of 2 s tokens with middle m,

    D(i, j) = (a_{m} .. a_i) (a_{j+1} .. a_{m-1}),    i in the second half, j in the first,

where both factors are products inside a half, built from those of the quarters. Every factor is in
[0, 1]: a decay of exactly 0 is exact, a strong one underflows to 0 and nothing can become NaN. With
a decay per key, each of the log2(C) levels is one matmul per block between rows and columns that
carry one factor each. Where all decays of a block multiply to no less than exp(-MILD), the levels
inside it are one matmul: with P_i the product from the block's start, D(i, j) = P_i (1 / P_j).

The gradient of g_t is the sum over pairs j < t <= i of the products that contain a_t. It is summed
over such pairs only (never as a difference of two cumulative sums), so that a strong decay has the
small gradient that it should have instead of rounding noise. Inside a mild block, where no product
is small, it is the difference of two sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glazoo.engines.chunked.common import Rows, Tile, load, triangle

# The log of what a decay per key may shrink a number by inside a block that is one matmul. The
# gradient of a log decay there has the rounding noise of sums at most exp(MILD) times larger.
MILD = 12.0


def _mild_block(g: Tensor) -> int:
    """The largest block size at which all log decays g [N, C, K] of a block add up to at least
    -MILD; 1 if there is none, or if the answer would make a GPU wait."""
    size = g.shape[1]
    if g.device.type != "cpu":
        return 1
    sums = g
    found = 1
    while found < size:
        sums = sums[:, 0::2] + sums[:, 1::2]
        if not bool(sums.amin() >= -MILD):
            break
        found *= 2
    return found


def _diagonal_blocks(x: Tensor, block: int) -> Tensor:
    """View of x [N, C, C]: its blocks on the diagonal, [N, C / s, s, s]."""
    count = x.shape[1] // block
    blocks = x.view(x.shape[0], count, block, count, block)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def levels(size: int) -> list[int]:
    """Half sizes of the blocks, smallest first."""
    return [1 << i for i in range(size.bit_length() - 1)]


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """x [N, C, D] as the first and the second halves of its blocks, [N, C / 2s, s, D] each."""
    blocks = x.view(x.shape[0], x.shape[1] // (2 * half), 2, half, x.shape[2])
    return blocks[:, :, 0], blocks[:, :, 1]


def corners(x: Tensor, half: int) -> Tensor:
    """View of x [N, C, C]: rows of the second half, columns of the first, [N, C / 2s, s, s]."""
    count = x.shape[1] // (2 * half)
    blocks = x.view(x.shape[0], count, 2 * half, count, 2 * half)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)[:, :, half:, :half]


def _spread(reader: Tensor, writer: Tensor, exclusive: bool, target: tuple[Tensor, Tensor]) -> None:
    """Adds what a product from j < t to i >= t owes to g_t, given its value by reader and writer.

    reader, writer and target [.., s, D]: the first of target is where the writers are.
    """
    size = reader.shape[-2]
    if size > 1:
        target[0].add_(torch.matmul(triangle(size, "earlier", writer), writer))
        kind = "strictly later" if exclusive else "later"
        target[1].add_(torch.matmul(triangle(size, kind, reader), reader))
    elif not exclusive:
        target[1].add_(reader)


class Scores(NamedTuple):
    """Who reads: `exclusive` skips the decay of the reader's own token, `strict` its own write."""

    exclusive: bool = False
    strict: bool = False


READ = Scores()
READ_BEFORE = Scores(exclusive=True, strict=True)
ERASE = Scores(strict=True)


class NoGate:
    """No decay: the products are 1."""

    total: Tensor | None = None

    def __init__(self, size: int) -> None:
        self.size = size

    def head(self, x: Tensor, exclusive: bool = False) -> Tensor:
        return x

    def tail(self, x: Tensor) -> Tensor:
        return x

    def scores(self, x: Tensor, k: Tensor, mode: Scores) -> Tensor:
        return torch.bmm(x, k.transpose(1, 2)).tril_(-1 if mode.strict else 0)

    def scores_backward(
        self,
        grad: Tensor,
        value: Tensor,
        x: Tensor,
        k: Tensor,
        mode: Scores,
        dx: Tensor,
        dk: Tensor,
    ) -> None:
        """Adds the gradients of x and k, given that of value = scores(x, k); overwrites `grad`."""
        grad.tril_(-1 if mode.strict else 0)
        dk.baddbmm_(grad.transpose(1, 2), x)
        dx.baddbmm_(grad, k)

    def head_backward(self, grad: Tensor, value: Tensor, exclusive: bool = False) -> Tensor:
        """Gradient of x, given that of value = head(x)."""
        return grad

    def tail_backward(self, grad: Tensor, value: Tensor) -> Tensor:
        """Gradient of x, given that of value = tail(x)."""
        return grad

    def total_of(self, count: int) -> Tensor | None:
        """The decay over a whole chunk, [n, R, 1 or K, 1]."""
        if self.total is None:
            return None
        return self.total.view(count, -1, self.total.shape[-1], 1)

    def finish(self, starts: Tensor | None, after: Tensor) -> Tensor:
        """Gradient of g; starts and after [N, K, V]: state before, gradient of that behind."""
        raise NotImplementedError


class HeadGate(NoGate):
    """One decay per head and token, g [N, C, 1]."""

    def __init__(self, g: Tensor, backward: bool = False) -> None:
        super().__init__(g.shape[1])
        count = g.shape[0]
        prefix = g.clone()
        suffix = torch.zeros_like(g)
        # D(i, j), with ones on the diagonal
        decays = torch.zeros(count, self.size, self.size, dtype=g.dtype, device=g.device)
        decays.diagonal(dim1=1, dim2=2).fill_(1)
        for half in levels(self.size):
            first, second = halves(prefix, half)
            before, _ = halves(suffix, half)
            torch.mul(second.exp(), before.exp().transpose(2, 3), out=corners(decays, half))
            before.add_(second[:, :, -1:])
            second.add_(first[:, :, -1:])
        self.decays = decays
        self._shifted: Tensor | None = None
        self._head = prefix.exp_()
        self._tail = suffix.exp_()
        self.total: Tensor = self._head[:, -1:]
        self._pairs: dict[bool, Tensor] = {}
        self._grad = torch.zeros_like(g) if backward else None

    def _matrix(self, mode: Scores) -> Tensor:
        if not mode.exclusive:
            return self.decays
        if self._shifted is None:
            # the decay of token i left out: row i is row i - 1 with its diagonal
            self._shifted = torch.zeros_like(self.decays)
            self._shifted[:, 1:] = self.decays[:, :-1]
        return self._shifted

    def _factor(self, exclusive: bool) -> Tensor:
        if not exclusive:
            return self._head
        shifted = torch.ones_like(self._head)
        shifted[:, 1:] = self._head[:, :-1]
        return shifted

    def head(self, x: Tensor, exclusive: bool = False) -> Tensor:
        return x * self._factor(exclusive)

    def tail(self, x: Tensor) -> Tensor:
        return x * self._tail

    def scores(self, x: Tensor, k: Tensor, mode: Scores) -> Tensor:
        value = torch.bmm(x, k.transpose(1, 2)).mul_(self._matrix(mode))
        if mode.strict and not mode.exclusive:
            value.diagonal(dim1=1, dim2=2).zero_()
        return value

    def scores_backward(
        self,
        grad: Tensor,
        value: Tensor,
        x: Tensor,
        k: Tensor,
        mode: Scores,
        dx: Tensor,
        dk: Tensor,
    ) -> None:
        if self._grad is not None:
            # the diagonal of the product is of no token's decay and does not matter
            pairs = grad * value
            held = self._pairs.get(mode.exclusive)
            self._pairs[mode.exclusive] = pairs if held is None else held.add_(pairs)
        grad.mul_(self._matrix(mode))
        if mode.strict and not mode.exclusive:
            grad.diagonal(dim1=1, dim2=2).zero_()
        dk.baddbmm_(grad.transpose(1, 2), x)
        dx.baddbmm_(grad, k)

    def head_backward(self, grad: Tensor, value: Tensor, exclusive: bool = False) -> Tensor:
        if self._grad is not None:
            kind = "strictly later" if exclusive else "later"
            self._owe((grad * value).sum(-1), kind)
        return grad * self._factor(exclusive)

    def tail_backward(self, grad: Tensor, value: Tensor) -> Tensor:
        if self._grad is not None:
            self._owe((grad * value).sum(-1), "earlier")
        return grad * self._tail

    def _owe(self, tokens: Tensor, kind: str) -> None:
        """Adds to g_t the sum of tokens [N, C] on one side of t. As a product of two matrices: one
        matrix times many vectors is fifteen times slower."""
        assert self._grad is not None
        side = triangle(self.size, kind, tokens).t()
        self._grad.view(tokens.shape).addmm_(tokens, side)

    def finish(self, starts: Tensor | None, after: Tensor) -> Tensor:
        assert self._grad is not None
        for exclusive, pairs in self._pairs.items():
            earlier = triangle(self.size, "strictly later", pairs)
            # Y[i, t] = sum of pairs (i, j) with j < t
            sums = (pairs.view(-1, self.size) @ earlier).view_as(pairs)
            sums.tril_(-1 if exclusive else 0)
            self._grad.add_(sums.sum(1).unsqueeze(-1))
        if starts is None:
            return self._grad
        through = (starts * after).sum((1, 2)).view(-1, 1, 1)
        return self._grad.addcmul_(through, self.total)


class KeyGate(NoGate):
    """One decay per key and token, g [N, C, K]."""

    def __init__(self, g: Tensor, backward: bool = False, exclusive: bool = False) -> None:
        super().__init__(g.shape[1])
        self.total: Tensor = g.sum(1, keepdim=True).exp_()
        prefix = g.exp()
        suffix = torch.ones_like(g)
        before_own = torch.ones_like(g) if exclusive else None
        self._block = _mild_block(g)
        inside, inside_own = prefix, before_own
        self._levels: list[tuple[int, Tensor, Tensor | None, Tensor]] = []
        for half in levels(self.size):
            if half == self._block:
                inside = prefix.clone()
                inside_own = None if before_own is None else before_own.clone()
            first, second = halves(prefix, half)
            before, _ = halves(suffix, half)
            whole = first[:, :, -1:]
            held = None if before_own is None else halves(before_own, half)[1]
            if half >= self._block:
                self._levels.append(
                    (
                        half,
                        second.clone(memory_format=torch.contiguous_format),
                        None if held is None else held.clone(memory_format=torch.contiguous_format),
                        before.clone(memory_format=torch.contiguous_format),
                    )
                )
            before.mul_(second[:, :, -1:])
            second.mul_(whole)
            if held is not None:
                held.mul_(whole)
        self._head = prefix
        self._own = before_own
        self._tail = suffix
        self._inside = inside, inside_own, inside.reciprocal() if self._block > 1 else inside
        self._grad = torch.zeros_like(g) if backward else None
        # what products inside mild blocks owe, by token: readers minus writers
        self._net = torch.zeros_like(g) if backward and self._block > 1 else None

    def _factor(self, exclusive: bool) -> Tensor:
        if exclusive:
            assert self._own is not None
            return self._own
        return self._head

    def head(self, x: Tensor, exclusive: bool = False) -> Tensor:
        return x * self._factor(exclusive)

    def tail(self, x: Tensor) -> Tensor:
        return x * self._tail

    def _level(
        self, level: tuple[int, Tensor, Tensor | None, Tensor], x: Tensor, k: Tensor, mode: Scores
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        half, inclusive, own, column = level
        row = own if mode.exclusive else inclusive
        assert row is not None
        readers = halves(x, half)[1] * row
        writers = halves(k, half)[0] * column
        return half, row, column, readers, writers

    def _mild(self, x: Tensor, k: Tensor, mode: Scores) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors and products of readers and writers inside the mild blocks, [N C / s, s, K]."""
        inclusive, own, column = self._inside
        row = own if mode.exclusive else inclusive
        assert row is not None
        split = (-1, self._block, x.shape[2])
        return row.view(split), column.view(split), (x * row).view(split), (k * column).view(split)

    def scores(self, x: Tensor, k: Tensor, mode: Scores) -> Tensor:
        count, size, depth = x.shape
        mild = None
        if self._block > 1:
            _, _, readers, writers = self._mild(x, k, mode)
            mild = torch.bmm(readers, writers.transpose(1, 2)).tril_(-1 if mode.strict else 0)
            if self._block == size:
                return mild
        value = torch.zeros(count, size, size, dtype=x.dtype, device=x.device)
        if mild is not None:
            blocks = _diagonal_blocks(value, self._block)
            blocks.copy_(mild.view(blocks.shape))
        for level in self._levels:
            half, _, _, readers, writers = self._level(level, x, k, mode)
            block = torch.bmm(
                readers.view(-1, half, depth), writers.view(-1, half, depth).transpose(1, 2)
            )
            corners(value, half).copy_(block.view(count, -1, half, half))
        if mild is None and not mode.strict:
            value.diagonal(dim1=1, dim2=2).copy_((x * k).sum(-1))
        return value

    def scores_backward(
        self,
        grad: Tensor,
        value: Tensor,
        x: Tensor,
        k: Tensor,
        mode: Scores,
        dx: Tensor,
        dk: Tensor,
    ) -> None:
        depth = x.shape[2]
        if not mode.strict:
            own = grad.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            dx.addcmul_(k, own)
            dk.addcmul_(x, own)
        if self._block > 1:
            split = (-1, self._block, depth)
            row, column, readers, writers = self._mild(x, k, mode)
            block = _diagonal_blocks(grad, self._block).reshape(-1, self._block, self._block)
            block = block.tril_(-1)
            reader = torch.bmm(block, writers)
            writer = torch.bmm(block.transpose(1, 2), readers)
            dx.view(split).addcmul_(reader, row)
            dk.view(split).addcmul_(writer, column)
            if self._net is not None:
                net = self._net.view(split)
                net.addcmul_(writer, writers, value=-1)
                if mode.exclusive:
                    net[:, :-1].addcmul_(reader[:, 1:], readers[:, 1:])
                else:
                    net.addcmul_(reader, readers)
        for level in self._levels:
            half, row, column, readers, writers = self._level(level, x, k, mode)
            block = corners(grad, half).reshape(-1, half, half)
            reader = torch.bmm(block, writers.view(-1, half, depth)).view_as(readers)
            writer = torch.bmm(block.transpose(1, 2), readers.view(-1, half, depth))
            writer = writer.view_as(writers)
            halves(dx, half)[1].addcmul_(reader, row)
            halves(dk, half)[0].addcmul_(writer, column)
            if self._grad is not None:
                _spread(
                    reader.mul_(readers),
                    writer.mul_(writers),
                    mode.exclusive,
                    halves(self._grad, half),
                )

    def head_backward(self, grad: Tensor, value: Tensor, exclusive: bool = False) -> Tensor:
        if self._grad is not None:
            reader = grad * value
            kind = "strictly later" if exclusive else "later"
            self._grad.add_(torch.matmul(triangle(self.size, kind, reader), reader))
        return grad * self._factor(exclusive)

    def tail_backward(self, grad: Tensor, value: Tensor) -> Tensor:
        if self._grad is not None:
            writer = grad * value
            self._grad.add_(torch.matmul(triangle(self.size, "earlier", writer), writer))
        return grad * self._tail

    def finish(self, starts: Tensor | None, after: Tensor) -> Tensor:
        assert self._grad is not None
        if self._net is not None:
            net = self._net.view(-1, self._block, self._net.shape[2])
            self._grad.view(net.shape).add_(torch.matmul(triangle(self._block, "later", net), net))
        if starts is None:
            return self._grad
        through = (starts * after).sum(2).unsqueeze(1)
        return self._grad.addcmul_(through, self.total)


def gate_of(
    g: Tensor | None,
    rows: Rows,
    tile: Tile,
    dtype: torch.dtype,
    backward: bool = False,
    exclusive: bool = False,
) -> NoGate:
    """The gate of a tile, from g None, [B, T, HV] or [B, T, HV, K]."""
    if g is None:
        return NoGate(tile.size)
    part = load(g, rows, tile, dtype)
    if g.dim() == 3:
        return HeadGate(part, backward)
    return KeyGate(part, backward, exclusive)
