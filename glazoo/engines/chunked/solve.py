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
    carry,
    load,
    over_sequences,
    rooms_for,
    row_blocks,
    row_limit,
    sequences,
    slots,
    store,
    tiles,
)
from glazoo.engines.chunked.gates import gate_of
from glazoo.engines.chunked.linear import CHUNK
from glazoo.engines.chunked.linear import _backward as linear_backward
from glazoo.kernels import loops
from glazoo.kernels.loops import Linear, Solve, compute_dtype
from glazoo.kernels.register import register

# Numbers in the matrices of the tokens that are factored at once.
SPAN = 1 << 21


class _Systems:
    """The systems (H_t + Lambda) x_t = y_t of a tile, from the states at its chunk borders."""

    def __init__(self, x: Solve, starts: Tensor, rows: Rows, tile: Tile) -> None:
        dtype = starts.dtype
        self.k = load(x.k, rows, tile, dtype)
        self.w = self.k * load(x.beta, rows, tile, dtype)
        self.decay = None if x.g is None else load(x.g, rows, tile, dtype).exp_()
        self.floor = x.prior[rows.h0 : rows.h1].to(dtype).repeat(tile.number * rows.batch, 1)
        self.starts = starts

    def solve(self, y: Tensor) -> Tensor:
        """x [N, C, K] for right-hand sides y [N, C, K]."""
        count, steps, keys = y.shape
        x = torch.empty_like(y)
        step = max(1, SPAN // (steps * keys * keys))
        for first in range(0, count, step):
            span = slice(first, min(first + step, count))
            k, w = self.k[span], self.w[span]
            matrices = y.new_empty(k.shape[0], steps, keys, keys)
            state = self.starts[span]
            for i in range(steps):
                outer = (w[:, i].unsqueeze(-1), k[:, i].unsqueeze(-2))
                new = matrices[:, i]
                if self.decay is None:
                    torch.addcmul(state, *outer, out=new)
                else:
                    torch.mul(state, self.decay[span][:, i].unsqueeze(-1), out=new)
                    new.addcmul_(*outer)
                state = new
            diagonal = matrices.diagonal(dim1=2, dim2=3)
            diagonal.add_(self.floor[span].unsqueeze(1))
            factor, failed = torch.linalg.cholesky_ex(matrices)
            solved = torch.cholesky_solve(y[span].unsqueeze(-1), factor).squeeze(-1)
            if bool(failed.any()):
                bad = failed > 0
                solved[bad] = _regularised(matrices[bad], y[span][bad])
            x[span] = solved
        return x


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
    dtype = final.dtype
    groups = min(x.q.shape[2], x.k.shape[2])
    for rows in row_blocks(batch, heads, groups, row_limit(count, CHUNK)):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, keys, keys)
        if x.initial_state is None:
            state = torch.zeros(shape, dtype=dtype, device=out.device)
        else:
            state = x.initial_state[corner].to(dtype).reshape(shape)
        for tile in tiles(count, rows.number, CHUNK):
            kt = load(x.k, rows, tile, dtype)
            wt = kt * load(x.beta, rows, tile, dtype)
            gate = gate_of(x.g, rows, tile, dtype)
            writes = torch.bmm(gate.tail(kt).transpose(1, 2), wt).view(tile.number, *shape)
            total = gate.total_of(tile.number)
            border = torch.empty(tile.number + 1, *shape, dtype=dtype, device=out.device)
            border[0] = state
            for c in range(tile.number):
                carry(border[c], writes[c], None if total is None else total[c], border[c + 1])
            state = border[tile.number]
            starts = border[: tile.number].view(-1, *shape[1:])
            systems = _Systems(x, starts, rows, tile)
            store(out, systems.solve(load(x.q, rows, tile, dtype)), rows, tile)
            if borders is not None:
                part = borders[tile.chunk : tile.chunk + tile.number, *corner]
                part.copy_(starts.view(part.shape))
        final[corner].copy_(state.view(final[corner].shape))


def _backward(
    x: Solve, tokens: Any, states: Any, results: Any, finals: Any, kept: Any, dprior: Tensor | None
) -> None:
    (grad, solved), (borders,) = tokens, kept
    dq, dk, dw, dg = results
    batch, count, heads, _ = solved.shape
    dtype = borders.dtype
    # minus the adjoint solution, which reads the matrix as a query reads a memory
    adjoint = torch.empty_like(solved)
    groups = min(x.q.shape[2], x.k.shape[2])
    for rows in row_blocks(batch, heads, groups, row_limit(count, CHUNK)):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        for tile in tiles(count, rows.number, CHUNK):
            part = borders[tile.chunk : tile.chunk + tile.number, *corner]
            systems = _Systems(x, part.reshape(-1, *part.shape[3:]), rows, tile)
            z = systems.solve(load(grad, rows, tile, dtype))
            store(dq, z, rows, tile)
            z.neg_()
            store(adjoint, z, rows, tile)
            if dprior is not None:
                total = z.mul_(load(solved, rows, tile, dtype)).sum(1)
                total = total.view(tile.number * rows.batch, rows.width, -1).sum(0)
                dprior[rows.h0 : rows.h1].add_(total)
    w = _wide(x.k, x.beta) * x.beta.unsqueeze(3)
    read = Linear(adjoint, x.k, w, x.g, None, x.cu_seqlens, "post")
    linear_backward(read, [solved], states, [None, dk, dw, dg], finals, kept)


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
    dq, dg = rooms_for(x, wanted, "q", "g")
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
        results=[dq, dk, dw, dg],
        final=[dinitial],
        kept=[borders],
    )
    dbeta = (_wide(x.k, x.beta) * dw).sum(3)
    dk += (dw * x.beta.unsqueeze(3)).unflatten(2, (dk.shape[2], -1)).sum(3)
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

    H of every token of a chunk is built from the state at its border and factored.

    Gradients: with z = (H + Lambda)^{-1} dx they are dq = z, dLambda = -z . x and dH = -z x^T, and
    the latter goes through the linear class's backward pass (query -z, output gradient x).

    Memory: training keeps K^2 / 64 numbers per token and head (states at chunk borders) and x;
    matrices of single tokens exist for a few hundred tokens at a time.

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
