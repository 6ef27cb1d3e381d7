"""Vectors over a precision matrix, one linear system per token (Mesa)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines.chunked import checks
from glazoo.engines.chunked.common import (
    Rows,
    Tile,
    begin,
    blocks,
    carry,
    load,
    over_sequences,
    rooms_for,
    sequences,
    slots,
    store,
)
from glazoo.engines.chunked.gates import READ, HeadGate, NoGate
from glazoo.engines.chunked.linear import CHUNK
from glazoo.engines.chunked.linear import _backward as linear_backward
from glazoo.kernels import loops
from glazoo.kernels.loops import GatedLinear, Solve, compute_dtype
from glazoo.kernels.register import register

# Conjugate gradients take one step more from where a residual is below this many machine epsilons
# of its right-hand side. Tokens that take more than K + SPARE steps are factored.
TOLERANCE = 16
SPARE = 4
# Numbers in the matrices of the tokens that are factored at once.
SPAN = 1 << 21


class _Systems:
    """The systems (H_t + Lambda) x_t = y_t of a tile: matrices [n, R, K, K] that its chunks begin
    with, to be filled in, and tokens [n * R, C, ...] of each."""

    starts: Tensor

    def __init__(self, x: Solve, rows: Rows, tile: Tile, dtype: torch.dtype) -> None:
        self.rows, self.tile = rows, tile
        self.k, self.beta = (self.load(y, dtype) for y in (x.k, x.beta))
        self.g = None if x.g is None else self.load(x.g, dtype)
        self.gate = NoGate(tile.size) if self.g is None else HeadGate(self.g)
        floor = x.prior[rows.h0 : rows.h1].to(dtype)
        self.floor = floor.repeat(tile.number * rows.batch, 1).unsqueeze(1)

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return load(x, self.rows, self.tile, dtype)

    def begin(self, state: Tensor) -> Tensor:
        """Fills in all matrices from the first; gives that after the tile."""
        number = self.tile.number
        writes = torch.bmm(self.gate.tail(self.k).transpose(1, 2), self.k * self.beta)
        writes, total = writes.view(number, *state.shape), self.gate.total_of(number)
        border = state.new_empty(number + 1, *state.shape)
        border[0] = state
        for c in range(number):
            carry(border[c], writes[c], None if total is None else total[c], border[c + 1])
        self.starts = border[:number]
        return border[number]

    def solve(self, y: Tensor) -> Tensor:
        """Solutions [n * R, C, K] of right-hand sides."""
        x, done = self._iterate(y)
        if not bool(done.all()):
            self._factor(y, ~done, x)
        return x

    def _iterate(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions by conjugate gradients, and which tokens have got one, [n * R, C]."""
        starts = self.starts.flatten(0, 1)
        # With ones on the diagonal of what the part's first token finds.
        scale = torch.rsqrt(starts.diagonal(dim1=1, dim2=2).unsqueeze(1) + self.floor)
        starts = (starts * scale).mul_(scale.transpose(1, 2))
        k, floor = self.k * scale, self.floor * scale.square()
        kt = k.transpose(1, 2).contiguous()
        weights = self.gate.scores(torch.ones_like(self.beta), self.beta, READ)
        # Squares of small numbers, as gradients are, underflow.
        size = y.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(y.dtype).tiny)
        residual = (y / size).mul_(scale)
        direction, x = residual.clone(), torch.zeros_like(y)
        square = residual.square().sum(-1, keepdim=True)
        goal = square * (TOLERANCE * torch.finfo(y.dtype).eps) ** 2
        # Not a number is not done.
        active = ~(square == 0)
        for _ in range(y.shape[2] + SPARE):
            if not bool(active.any()):
                break
            image = direction * floor
            image.baddbmm_(self.gate.head(direction), starts)
            image.baddbmm_(torch.bmm(direction, kt).mul_(weights), k)
            curve = (direction * image).sum(-1, keepdim=True)
            step = (square / curve).masked_fill_(~active, 0)
            x.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1)
            new = residual.square().sum(-1, keepdim=True)
            direction.mul_((new / square).masked_fill_(~active, 0)).add_(residual)
            active &= ~((square <= goal) | (new == 0))
            square = new
        return x.mul_(scale).mul_(size), ~active.squeeze(-1)

    def _factor(self, y: Tensor, left: Tensor, x: Tensor) -> None:
        """Fills in x of the tokens that are left [N, C]: their matrices are built and factored."""
        _, steps, keys = y.shape
        starts = self.starts.flatten(0, 1)
        rows = left.any(1).nonzero().squeeze(1)
        for part in rows.split(max(1, SPAN // (steps * keys * keys))):
            k, state, chosen = self.k[part], starts[part], left[part]
            w = k * self.beta[part]
            decay = None if self.g is None else self.g[part].exp()
            matrices = y.new_empty(*k.shape, keys)
            for i in range(steps):
                outer = w[:, i].unsqueeze(-1), k[:, i].unsqueeze(-2)
                old = state if decay is None else state * decay[:, i].unsqueeze(-1)
                state = torch.addcmul(old, *outer, out=matrices[:, i])
            found, right = matrices[chosen], y[part][chosen]
            found.diagonal(dim1=1, dim2=2).add_(self.floor[part].expand_as(k)[chosen])
            factor, failed = torch.linalg.cholesky_ex(found)
            solved = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
            bad = failed > 0
            if bool(bad.any()):
                solved[bad] = _regularised(found[bad], right[bad])
            x[part] = x[part].masked_scatter(chosen.unsqueeze(2), solved)


def _regularised(matrices: Tensor, y: Tensor) -> Tensor:
    """Solves systems that are not positive definite after rounding.

    The state carries errors of a unit of rounding of its largest entry, so this much is added to
    the diagonal; it changes the system no more than the rounding of the state has.
    """
    double = matrices.double().tril()
    double = double + double.tril(-1).transpose(-1, -2)
    size = matrices.shape[-1]
    noise = size * torch.finfo(matrices.dtype).eps
    largest = double.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp_min(1e-300)
    solved = torch.zeros_like(y, dtype=torch.float64)
    todo = torch.arange(matrices.shape[0], device=matrices.device)
    while todo.numel() and noise < 1:
        shifted = double[todo].clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_((noise * largest[todo]).unsqueeze(-1))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        good = failed == 0
        right = y[todo[good]].double().unsqueeze(-1)
        solved[todo[good]] = torch.cholesky_solve(right, factor[good]).squeeze(-1)
        todo = todo[~good]
        noise *= 16
    return solved.to(y.dtype)


def _forward(x: Solve, _tokens: Any, _states: Any, results: Any, finals: Any, kept: Any) -> None:
    (out,), (final,) = results, finals
    borders = kept[0] if kept else None
    batch, count, heads, keys = out.shape
    groups = min(x.q.shape[2], x.k.shape[2])
    for rows, pieces in blocks(batch, count, heads, groups, CHUNK, x.k.shape[3]):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        state = final.new_zeros(rows.number, keys, keys)
        if x.initial_state is not None:
            state.copy_(x.initial_state[corner].flatten(0, 1))
        for tile in pieces:
            systems = _Systems(x, rows, tile, final.dtype)
            state = systems.begin(state)
            store(out, systems.solve(systems.load(x.q, final.dtype)), rows, tile)
            if borders is not None:
                part = borders[tile.chunk : tile.chunk + tile.number, *corner]
                part.copy_(systems.starts.view(part.shape))
        final[corner].copy_(state.view(final[corner].shape))


def _backward(
    x: Solve, tokens: Any, states: Any, results: Any, finals: Any, kept: Any, dprior: Tensor | None
) -> None:
    (grad, solved), (borders,) = tokens, kept
    dq, dk, dw, dg, dbeta = results
    batch, count, heads, _ = solved.shape
    # minus the adjoint solution, which reads the matrix as a query reads a memory
    adjoint = torch.empty_like(solved)
    groups = min(x.q.shape[2], x.k.shape[2])
    for rows, pieces in blocks(batch, count, heads, groups, CHUNK, x.k.shape[3]):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        for tile in pieces:
            systems = _Systems(x, rows, tile, borders.dtype)
            part = borders[tile.chunk : tile.chunk + tile.number, *corner]
            systems.starts = part.flatten(1, 2)
            z = systems.solve(systems.load(grad, borders.dtype))
            store(dq, z, rows, tile)
            z.neg_()
            store(adjoint, z, rows, tile)
            if dprior is not None:
                total = z.mul_(systems.load(solved, borders.dtype)).sum(1)
                dprior[rows.h0 : rows.h1] += total.view(-1, rows.width, total.shape[1]).sum(0)
    w, initial = _wide(x.k, x.beta), x.initial_state
    read = GatedLinear(adjoint, x.k, w, x.g, x.beta, initial, x.cu_seqlens, "post", 1.0)
    linear_backward(read, [solved], states, [None, dk, dw, dg, dbeta], finals, kept)


def _wide(k: Tensor, beta: Tensor) -> Tensor:
    """Keys in the compute dtype, for every value head."""
    return k.to(compute_dtype(k, beta)).repeat_interleave(beta.shape[2] // k.shape[2], 2)


def _allocate(x: Solve, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, heads), size = x.beta.shape, x.k.shape[3]
    like = x.beta.new_empty((), dtype=compute_dtype(x.q, x.k, x.beta))
    total = slots(x.cu_seqlens, batch, tokens, CHUNK) if keep else 0
    return (
        like.new_empty(batch, tokens, heads, size),
        like.new_empty(sequences(x.cu_seqlens, batch), heads, size, size),
        like.new_empty(total, heads, size, size),
    )


def _run(x: Solve, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, final, borders = found = _allocate(x, keep)
    begin(final, x.initial_state)
    over_sequences(_forward, x, CHUNK, results=[out], final=[final], kept=[borders] * keep)
    return found


def _gradients(
    x: Solve, grads: Any, wanted: Any, solved: Tensor, borders: Tensor
) -> tuple[Tensor | None, ...]:
    grad, grad_final = grads
    dq, dg, dbeta = rooms_for(x, wanted, "q", "g", "beta")
    # keys write twice, H = a H + k w^T with w = beta k: summed before they are rounded
    dk, dw = borders.new_empty(x.k.shape), torch.empty_like(solved)
    # summed over all tokens in the compute dtype
    dprior = borders.new_zeros(x.prior.shape) if wanted.prior else None
    dinitial = borders.new_empty(sequences(x.cu_seqlens, x.beta.shape[0]), *borders.shape[1:])
    begin(dinitial, grad_final)
    over_sequences(
        functools.partial(_backward, dprior=dprior),
        x,
        CHUNK,
        tokens=[torch.zeros_like(solved) if grad is None else grad, solved],
        states=[grad_final],
        results=[dq, dk, dw, dg, dbeta],
        final=[dinitial],
        kept=[borders],
    )
    dk += dw.unflatten(2, (dk.shape[2], -1)).sum(3)
    return dq, dk, dbeta, dg, dprior, dinitial, None


_solve = register(
    "chunked_solve",
    Solve,
    results=("x", "final"),
    kept=("borders",),
    reads=("x",),
    forward=_run,
    allocate=_allocate,
    gradients=_gradients,
)


def solve(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T Hk K"],
    beta: Float[Tensor, "B T HV"],
    g: Float[Tensor, "B T HV"] | None = None,
    *,
    prior: Float[Tensor, "HV K"],
    initial_state: Float[Tensor, "N HV K K"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> tuple[Float[Tensor, "B T HV K"], Float[Tensor, "N HV K K"]]:
    """Vectors over the precision matrix that a token finds once it is counted.

        H_t = a_t H_{t-1} + beta_t k_t k_t^T       x_t = (H_t + Lambda)^{-1} q_t

    Conjugate gradients for all tokens of a chunk at once, with products in matmul form: few where H
    is small against Lambda, and no matrix of a single token exists. A token whose residual is not
    below 16 times the machine epsilon of its right-hand side after about K of them, of an
    ill-conditioned system, is solved by the Cholesky factor of its matrix.

    Gradients: with z = (H + Lambda)^{-1} dx they are dq = z, dLambda = -z . x and dH = -z x^T, and
    the latter goes through the linear class's backward pass (query -z, output gradient x).

    Memory: training keeps K^2 / 32 numbers per token and head (states at chunk borders) and x;
    matrices that are factored exist for a few hundred tokens at a time.

    A system that is not positive definite after rounding of the state (Lambda below one unit of
    rounding of H) is solved with that unit added to its diagonal.

    Args:
        q: right-hand sides. Any floating dtype.
        k: keys.
        beta: weight of a token, >= 0.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        prior: Lambda > 0, the diagonal of the prior precision.
        initial_state: H_0, symmetric; None is zeros.
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.

    Returns:
        x and the final H in float32 (float64 for float64 operands).

    Raises:
        ValueError: for shapes that do not fit together.

    Reference:
        von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
        arXiv:2506.05233, equations 5 to 7.
    """
    checks.tokens(q=q, k=k)
    heads, keys = beta.shape[2], k.shape[3]
    checks.heads(heads, q=q, k=k)
    lead = (*k.shape[:2], heads)
    checks.shape("beta", beta, lead)
    checks.shape("g", g, lead)
    checks.shape("prior", prior, (heads, keys))
    checks.packing(cu_seqlens, beta)
    count = sequences(cu_seqlens, k.shape[0])
    checks.shape("initial_state", initial_state, (count, heads, keys, keys))
    if k.shape[1] == 1 and cu_seqlens is None:
        return loops.solve(q, k, beta, g, prior=prior, initial_state=initial_state)
    x, matrix = _solve(q, k, beta, g, prior, initial_state, cu_seqlens)
    return x, matrix
