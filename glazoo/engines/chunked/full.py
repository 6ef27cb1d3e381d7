"""The full class: the exact posterior, one linear system per token (Mesa)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from einops import repeat
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
from glazoo.engines.chunked.gates import READ, NoGate, gate_of
from glazoo.engines.chunked.linear import CHUNK, linear
from glazoo.engines.chunked.linear import _backward as linear_backward
from glazoo.kernels import loops
from glazoo.kernels.loops import Linear, compute_dtype
from glazoo.kernels.register import register

# Numbers in the matrices of the tokens that are factored at once.
SPAN = 1 << 21
# Conjugate gradients stop when every residual is below this many machine epsilons of its right
# hand side, or after twice as many steps as there are keys.
TOLERANCE = 16


class _Systems:
    """The systems (H_t + Lambda) x_t = y_t of a tile, from the states at its chunk borders."""

    def __init__(
        self,
        k: Tensor,
        w: Tensor,
        g: Tensor | None,
        prior: Tensor,
        starts: Tensor,
        rows: Rows,
        tile: Tile,
        gradients: bool,
    ) -> None:
        dtype = starts.dtype
        self.k, self.w = load(k, rows, tile, dtype), load(w, rows, tile, dtype)
        self.decay = None if g is None else load(g, rows, tile, dtype).exp_()
        self.gate: NoGate = gate_of(g, rows, tile, dtype)
        self.floor = prior[rows.h0 : rows.h1].to(dtype).repeat(tile.number * rows.batch, 1)
        self.starts = starts
        self.gradients = gradients

    def solve(self, y: Tensor) -> Tensor:
        """x [N, C, K] for right-hand sides y [N, C, K]."""
        return self._iterate(y) if self.gradients else self._factor(y)

    def _factor(self, y: Tensor) -> Tensor:
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

    def _iterate(self, y: Tensor) -> Tensor:
        k, w, starts = self.k, self.w, self.starts
        floor = self.floor.unsqueeze(1)
        # diagonal of H_t + Lambda, the preconditioner
        ones = self.gate.head(torch.ones_like(k))
        decays = self.gate.scores(k.new_ones(*k.shape[:2], 1), k.new_ones(*k.shape[:2], 1), READ)
        scale = torch.bmm(decays, k * w)
        scale.addcmul_(ones, starts.diagonal(dim1=1, dim2=2).unsqueeze(1)).add_(floor)

        def apply(x: Tensor) -> Tensor:
            inside = torch.bmm(torch.bmm(x, k.transpose(1, 2)).mul_(decays), w)
            return inside.add_(self.gate.head(torch.bmm(x, starts))).addcmul_(x, floor)

        x = torch.zeros_like(y)
        residual = y.clone()
        direction = residual / scale
        product = (residual * direction).sum(-1, keepdim=True)
        goal = (TOLERANCE * torch.finfo(y.dtype).eps * torch.linalg.vector_norm(y, dim=-1)) ** 2
        for _ in range(2 * y.shape[2]):
            active = residual.square().sum(-1) > goal
            if not bool(active.any()):
                break
            image = apply(direction)
            curve = (direction * image).sum(-1, keepdim=True)
            moving = active.unsqueeze(-1) & (curve > 0)
            size = torch.where(moving, product / curve.where(moving, torch.ones_like(curve)), 0)
            x.addcmul_(size, direction)
            residual.addcmul_(size, image, value=-1)
            scaled = residual / scale
            new = (residual * scaled).sum(-1, keepdim=True)
            positive = product > 0
            ratio = torch.where(positive, new / product.where(positive, torch.ones_like(new)), 0)
            direction = scaled.addcmul_(ratio, direction)
            product = new
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


class Solve(NamedTuple):
    """Operands of the solution x_t = (H_t + Lambda)^{-1} q_t, H_t = a_t H_{t-1} + k_t w_t^T."""

    q: Tensor
    k: Tensor
    w: Tensor
    g: Tensor | None
    prior: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    solver: str

    def loop(self) -> Any:
        given = self._asdict()
        del given["solver"]
        return loops.solve(**given)


def _forward(x: Solve, _tokens: Any, _states: Any, results: Any, finals: Any, kept: Any) -> None:
    q, k, w, g, prior, initial, _, solver = x
    (out,), (final,) = results, finals
    borders = kept[0] if kept else None
    batch, count, heads, _ = w.shape
    dtype = final.dtype
    for rows in row_blocks(batch, heads, min(q.shape[2], k.shape[2]), row_limit(count, CHUNK)):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        shape = (rows.number, *final.shape[2:])
        if initial is None:
            state = torch.zeros(shape, dtype=dtype, device=w.device)
        else:
            state = initial[corner].to(dtype).reshape(shape)
        for tile in tiles(count, rows.number, CHUNK):
            kt, wt = load(k, rows, tile, dtype), load(w, rows, tile, dtype)
            gate = gate_of(g, rows, tile, dtype)
            writes = torch.bmm(gate.tail(kt).transpose(1, 2), wt).view(tile.number, *shape)
            total = gate.total_of(tile.number)
            border = torch.empty(tile.number + 1, *shape, dtype=dtype, device=w.device)
            border[0] = state
            for c in range(tile.number):
                carry(border[c], writes[c], None if total is None else total[c], border[c + 1])
            state = border[tile.number]
            starts = border[: tile.number].view(-1, *shape[1:])
            systems = _Systems(k, w, g, prior, starts, rows, tile, solver == "cg")
            store(out, systems.solve(load(q, rows, tile, dtype)), rows, tile)
            if borders is not None:
                part = borders[tile.chunk : tile.chunk + tile.number, *corner]
                part.copy_(starts.view(part.shape))
        final[corner].copy_(state.view(final[corner].shape))


def _backward(
    x: Solve, tokens: Any, states: Any, results: Any, finals: Any, kept: Any, dprior: Tensor | None
) -> None:
    q, k, w, g, prior, _, cu_seqlens, solver = x
    (grad, solved), (borders,) = tokens, kept
    dq, dk, dw, dg = results
    batch, count, heads, _ = w.shape
    dtype = borders.dtype
    # minus the adjoint solution, which reads the matrix as a query reads a memory
    adjoint = torch.empty(solved.shape, dtype=dtype, device=w.device)
    for rows in row_blocks(batch, heads, min(q.shape[2], k.shape[2]), row_limit(count, CHUNK)):
        corner = (slice(rows.b0, rows.b1), slice(rows.h0, rows.h1))
        for tile in tiles(count, rows.number, CHUNK):
            part = borders[tile.chunk : tile.chunk + tile.number, *corner]
            starts = part.reshape(-1, *part.shape[3:])
            systems = _Systems(k, w, g, prior, starts, rows, tile, solver == "cg")
            z = systems.solve(load(grad, rows, tile, dtype))
            store(dq, z, rows, tile)
            z.neg_()
            store(adjoint, z, rows, tile)
            if dprior is not None:
                total = z.mul_(load(solved, rows, tile, dtype)).sum(1)
                total = total.view(tile.number * rows.batch, rows.width, -1).sum(0)
                dprior[rows.h0 : rows.h1].add_(total)
    read = Linear(adjoint, k, w, g, None, cu_seqlens, "post")
    linear_backward(read, [solved], states, [None, dk, dw, dg], finals, kept)


def _allocate(x: Solve, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = x.w.shape
    like = x.w.new_empty((), dtype=compute_dtype(x.q, x.k, x.w))
    total = slots(x.cu_seqlens, batch, tokens, CHUNK) if keep else 0
    return (
        like.new_empty(x.w.shape),
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
    found = rooms_for(x, wanted, "q", "k", "w", "g")
    # summed over all tokens in the compute dtype
    dprior = borders.new_zeros(x.prior.shape) if wanted.prior else None
    dinitial = borders.new_empty(sequences(x.cu_seqlens, x.w.shape[0]), *borders.shape[1:])
    begin(dinitial, grad_final)
    over_sequences(
        functools.partial(_backward, dprior=dprior),
        x,
        CHUNK,
        tokens=[torch.zeros_like(solved) if grad is None else grad, solved],
        states=[grad_final],
        results=found,
        final=[dinitial],
        kept=[borders],
    )
    return *found, dprior, dinitial, None


_solve = register(
    "chunked_full",
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
    solver: str = "cholesky",
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> tuple[Float[Tensor, "B T HV K"], Float[Tensor, "N HV K K"]]:
    """Vectors over the precision matrix that a token finds once it is counted.

        H_t = a_t H_{t-1} + beta_t k_t k_t^T       x_t = (H_t + Lambda)^{-1} q_t

    H of every token of a chunk is built from the state at its border and factored ("cholesky"), or
    never built: "cg" runs Jacobi-preconditioned conjugate gradients for all tokens of a chunk at
    once with products in matmul form, until every residual is below 16 times the machine epsilon
    of its right-hand side or 2 K steps are done.

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
        solver: "cholesky" or "cg".
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.

    Returns:
        x and the final H in float32 (float64 for float64 operands).

    Raises:
        ValueError: for shapes that do not fit together or an unknown solver.
    """
    checks.choice("solver", solver, ("cholesky", "cg"))
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
    dtype = compute_dtype(q, k, beta)
    with loops.without_autocast(beta):
        # used more than once: its gradients are summed before they are rounded
        q, k = q.to(dtype), k.to(dtype)
        share = heads // k.shape[2]
        weighted = repeat(k, "b t h k -> b t (h share) k", share=share) if share > 1 else k
        weighted = weighted * beta.to(dtype).unsqueeze(-1)
        if k.shape[1] == 1 and cu_seqlens is None:
            return loops.solve(q, k, weighted, g, prior=prior, initial_state=initial_state)
        x, matrix = _solve(q, k, weighted, g, prior, initial_state, cu_seqlens, solver)
        return x, matrix


def full(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T Hk K"],
    w: Float[Tensor, "B T HV V"],
    beta: Float[Tensor, "B T HV"],
    g: Float[Tensor, "B T HV"] | None = None,
    *,
    prior: Float[Tensor, "HV K"],
    initial_state: tuple[Tensor, Tensor] | None = None,
    uncertainty: bool = False,
    solver: str = "cholesky",
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> tuple[
    Float[Tensor, "B T HV V"],
    tuple[Float[Tensor, "N HV K V"], Float[Tensor, "N HV K K"]],
    Float[Tensor, "B T HV"] | None,
]:
    """Exact posterior mean: ridge regression on the past, solved at every token.

        G_t = a_t G_{t-1} + k_t w_t^T       H_t = a_t H_{t-1} + beta_t k_t k_t^T
        x_t = (H_t + Lambda)^{-1} q_t       o_t = G_t^T x_t

    G and H are linear states; x is `solve`'s, and o is the linear class read with x.

    Args:
        q: queries, already scaled. Any floating dtype.
        k: keys.
        w: values times write gate, beta v; its dtype is the output's.
        beta: write gate, >= 0.
        g: natural log of the decay, <= 0, -inf allowed; None is no decay.
        prior: Lambda > 0, the diagonal of the prior precision.
        initial_state: (G_0, H_0), H_0 symmetric; None is zeros.
        uncertainty: also return q_t^T x_t.
        solver: "cholesky" or "cg".
        cu_seqlens: borders of packed sequences (then B = 1); empty sequences are allowed.

    Returns:
        o in the dtype of w, the final (G, H) in float32 (float64 for float64 operands), and the
        uncertainty in the dtype of w or None.

    Raises:
        ValueError: for shapes that do not fit together or an unknown solver.

    Reference:
        von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
        arXiv:2506.05233, equations 5 to 7.
    """
    memory, matrix = (None, None) if initial_state is None else initial_state
    checks.tokens(q=q, k=k, w=w)
    checks.state("initial_state[0]", memory, cu_seqlens, w, k.shape[3], w.shape[3])
    with loops.without_autocast(w):
        # used more than once: its gradients are summed before they are rounded
        q, k = (x.to(compute_dtype(q, k, w)) for x in (q, k))
        x, matrix = solve(
            q, k, beta, g, prior=prior, initial_state=matrix, solver=solver, cu_seqlens=cu_seqlens
        )
        out, memory = linear(x, k, w, g, initial_state=memory, cu_seqlens=cu_seqlens)
        doubt = None
        if uncertainty:
            readers = repeat(q, "b t h k -> b t (h share) k", share=x.shape[2] // q.shape[2])
            doubt = (x * readers).sum(-1).to(w.dtype)
        return out, (memory, matrix), doubt
