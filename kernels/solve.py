"""Vectors over a precision matrix: x_t = (Hm_t + Lambda)^-1 q_t, Hm_t = a_t Hm_{t-1} + b_t k k^T.

`linear` read with x is the full posterior. By conjugate gradients for several tokens at once: with
Hm_s the matrix at the start of a chunk, P the decay since and D that between two tokens,

    Hm_t y = P_t Hm_s y + sum_{j <= t} D_tj b_j k_j (k_j . y)

is three matmuls for all tokens of a block. Backward, z = (Hm + Lambda)^-1 dx is one more solve;
then dq = z, dLambda = -sum_t z x, and the gradient of Hm is -z x^T: that of `linear` with queries
z, keys k, values b k and output gradients -x.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Tiles,
    launch,
    locate_chunk,
    make_chunks,
    power_of_two,
    reduce_heads,
    split_log,
)
from .linear import gradients as linear_gradients
from .loops import GatedLinear, Solve
from .operands import (
    check_precision,
    check_state,
    full_prior,
    given_or_zeros,
    prepare,
    sequences,
)
from .register import register
from .synapse import border_states

# Tokens between two stored matrices; tokens that one program solves for.
BORDER = 64
BLOCK = 16
# Conjugate gradients end after this many times the key size, or when every residual of a block is
# this small against its right-hand side (rounding of float32 leaves about that much).
ROUNDS = 2
TOLERANCE = 1e-6


@triton.jit
def apply(b_x, b_d, b_first, b_p, p_room, p_k, p_h, o_r, o_t, o_k, rows, KEYS: tl.constexpr,
          K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """(Hm + Lambda) x of every token; what contracts over keys is read back in slices of BC."""
    m_k = o_k < K
    tl.store(p_room + o_r[:, None] * BK + o_k[None, :], b_x)
    tl.debug_barrier()
    b_s = tl.zeros(b_d.shape, tl.float32)
    b_y = tl.zeros(b_x.shape, tl.float32)
    o_c = tl.arange(0, BC)
    for i in range(tl.cdiv(K, BC)):
        c = i * BC + o_c
        b_c = tl.load(p_room + o_r[:, None] * BK + c[None, :])
        m_ct = (c < K)[:, None] & (o_t < rows)[None, :]
        b_k = tl.load(p_k + o_t[None, :] * KEYS + c[:, None], mask=m_ct, other=0.0).to(tl.float32)
        b_h = tl.load(
            p_h + c[:, None] * K + o_k[None, :], mask=(c < K)[:, None] & m_k[None, :], other=0.0
        )
        b_s = tl.dot(b_c, b_k, b_s, input_precision=PREC, out_dtype=tl.float32)
        b_y = tl.dot(b_c * b_first[:, None], b_h, b_y, input_precision=PREC, out_dtype=tl.float32)
    m_tk = (o_t < rows)[:, None] & m_k[None, :]
    b_k = tl.load(p_k + o_t[:, None] * KEYS + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
    b_y = tl.dot(b_s * b_d, b_k, b_y, input_precision=PREC, out_dtype=tl.float32)
    tl.debug_barrier()
    return b_y + b_p[None, :] * b_x


@triton.jit(do_not_specialize=["T"])
def solve_kernel(r, k, beta, g, prior, state, room, x, cu_seqlens, chunk_ids, chunk_offsets, T,
                      ROUNDS: tl.constexpr, TOLERANCE: tl.constexpr, HR: tl.constexpr, HK:
                      tl.constexpr,
                      HV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
                      BK: tl.constexpr, BC: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """x = (Hm + Lambda)^-1 r of BR tokens, by conjugate gradients preconditioned with the diagonal
    Lambda."""
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_h = tl.program_id(0) % HV
    bos, t0, length = locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT)
    if t0 + tl.program_id(1) * BR >= length:
        return
    row0 = bos + t0
    rows = length - t0
    o_t = tl.arange(0, BT)
    o_i = tl.arange(0, BR)
    o_r = tl.program_id(1) * BR + o_i
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    m_rk = (o_r < rows)[:, None] & m_k[None, :]
    m_t = o_t < rows
    m_s = o_r[:, None] >= o_t[None, :]
    b_beta = tl.load(beta + (row0 + o_t) * HV + i_h, mask=m_t, other=0.0).to(tl.float32)
    b_first = tl.full([BR], 1.0, tl.float32)
    b_d = tl.where(m_s, b_beta[None, :], 0.0)
    if g is not None:
        b_g = tl.load(g + (row0 + o_t) * HV + i_h, mask=m_t, other=0.0).to(tl.float32)
        b_hi, b_lo = split_log(b_g)
        c_hi = tl.cumsum(b_hi, 0)
        c_lo = tl.cumsum(b_lo, 0)
        r_hi = tl.sum(tl.where(m_s, b_hi[None, :], 0.0), 1)
        r_lo = tl.sum(tl.where(m_s, b_lo[None, :], 0.0), 1)
        b_first = tl.exp(tl.minimum(r_hi + r_lo, 0.0))
        b_x = (r_hi[:, None] - c_hi[None, :]) + (r_lo[:, None] - c_lo[None, :])
        b_d *= tl.exp(tl.minimum(b_x, 0.0))
    b_p = tl.load(prior + i_h * K + o_k, mask=m_k, other=1.0)
    p_r = r + ((row0 + o_r) * HR + i_h // (HV // HR))[:, None] * K + o_k[None, :]
    p_k = k + (row0 * HK + i_h // (HV // HK)) * K
    p_h = state + (i_c * HV + i_h) * (K * K)
    p_room = room + ((i_c * HV + i_h) * (BT // BR) + tl.program_id(1)) * (BR * BK)
    b_r = tl.load(p_r, mask=m_rk, other=0.0).to(tl.float32)
    b_y = tl.zeros([BR, BK], tl.float32)
    b_z = b_r / b_p[None, :]
    b_v = b_z
    b_rz = tl.sum(b_r * b_z, 1)
    b_goal = b_rz * (TOLERANCE * TOLERANCE)
    left = tl.sum(tl.where(b_rz > b_goal, 1, 0), 0)
    i = 0
    while (i < ROUNDS * K) & (left > 0):
        b_av = apply(
            b_v, b_d, b_first, b_p, p_room, p_k, p_h, o_i, o_t, o_k, rows, HK * K, K, BK, BC, PREC
        )
        b_vav = tl.sum(b_v * b_av, 1)
        # A token that is done stays where it is.
        b_alpha = tl.where(b_rz > b_goal, b_rz / tl.where(b_vav > 0.0, b_vav, 1.0), 0.0)
        b_y += b_alpha[:, None] * b_v
        b_r -= b_alpha[:, None] * b_av
        b_z = b_r / b_p[None, :]
        b_new = tl.sum(b_r * b_z, 1)
        b_v = b_z + (b_new / tl.where(b_rz > 0.0, b_rz, 1.0))[:, None] * b_v
        b_rz = b_new
        left = tl.sum(tl.where(b_rz > b_goal, 1, 0), 0)
        i += 1
    tl.store(x + ((row0 + o_r) * HV + i_h)[:, None] * K + o_k[None, :], b_y, mask=m_rk)


def solve_sizes(K: int, dtype: torch.dtype) -> tuple[Tiles, int, int]:
    """Configuration, keys of a slice and tokens between two stored matrices, such that no register
    spills; exact products of float32 take three times as many."""
    BK = power_of_two(K)
    if dtype != torch.float32:
        return Tiles(BK, BK, 4 if BK <= 64 else 8, 1), BK if BK <= 64 else 32, BORDER
    if BK <= 128:
        return Tiles(BK, BK, 4 if BK <= 32 else 8, 1), min(BK, 32), BORDER
    return Tiles(BK, BK, 8, 1), 16, min(BORDER, 32)


def _weighted(k: Tensor, beta: Tensor) -> Tensor:
    """beta k for every value head, in k's dtype."""
    k = k.repeat_interleave(beta.shape[2] // k.shape[2], 2)
    return (k * beta.unsqueeze(3)).to(k.dtype)


def forward(x: Solve, _keep: bool) -> tuple[Tensor, Tensor]:
    """x = (Hm + Lambda)^-1 q in float32 and the final Hm."""
    x = prepare(x)
    (B, T, HV), K = x.beta.shape, x.k.shape[3]
    tiles, BC, border = solve_sizes(K, x.k.dtype)
    chunks = make_chunks(B, T, x.cu_seqlens, border)
    state, _, final, _ = border_states(
        x.k, _weighted(x.k, x.beta), None, x.g, x.initial_state, None, chunks
    )
    room = x.q.new_empty(chunks.number, HV, border, tiles.BK, dtype=torch.float32)
    found, _ = _allocate(x, False)
    launch(
        solve_kernel,
        (chunks.number * HV, border // BLOCK),
        tiles,
        x,
        chunks,
        r=x.q,
        state=state,
        room=room,
        x=found,
        ROUNDS=ROUNDS,
        TOLERANCE=TOLERANCE,
        BR=BLOCK,
        BC=BC,
    )
    return found, final


def gradients(x: Solve, grads: Any, wanted: Any, solved: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x = prepare(x)
    HV, HK = x.beta.shape[2], x.k.shape[2]
    room, final = _allocate(x, False)
    dx, dfinal = given_or_zeros(grads[0], room), given_or_zeros(grads[1], final)
    z, _ = forward(x._replace(q=dx), False)
    read = GatedLinear(
        z, x.k, _weighted(x.k, x.beta), x.g, None, x.initial_state, x.cu_seqlens, "post", 1.0
    )
    found = linear_gradients(read, ((-solved).to(x.k.dtype), dfinal), wanted)
    _, dk, dw, dg, _, dmatrix, _ = found
    assert dk is not None
    assert dw is not None
    wide = x.k.repeat_interleave(HV // HK, 2)
    dbeta = (dw.float() * wide.float()).sum(3)
    dk = dk + reduce_heads((dw * x.beta.unsqueeze(3)).to(x.k.dtype), HK)
    dprior = -(z * solved).sum((0, 1))
    return reduce_heads(z, x.q.shape[2]), dk, dbeta, dg, dprior, dmatrix, None


def _allocate(x: Solve, _keep: bool) -> tuple[Tensor, Tensor]:
    (*lead, HV), K = x.beta.shape, x.k.shape[3]
    final = sequences(x.beta, x.cu_seqlens), HV, K, K
    found, matrix = (x.q.new_empty(shape, dtype=torch.float32) for shape in ((*lead, HV, K), final))
    return found, matrix


_solve = register(
    "solve",
    Solve,
    results=("x", "final"),
    reads=("x",),
    forward=forward,
    allocate=_allocate,
    gradients=gradients,
)


def solve(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectors over the precision matrix that a token finds once it is counted.

        Hm_t = a_t Hm_{t-1} + beta_t k_t k_t^T        x_t = (Hm_t + Diag(prior))^-1 q_t

    Args:
        q: right-hand sides, [B, T, H or HV, K].
        k: keys, [B, T, H or HV, K]; float32, float16 or bfloat16.
        beta: weight of a token in the precision, >= 0, [B, T, HV].
        g: natural log decay, <= 0, -inf allowed, [B, T, HV]; None is no decay.
        prior: precision before the first token, > 0, [HV] or [HV, K].
        initial_state: Hm [N, HV, K, K], symmetric; zeros if None.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.

    Returns:
        x [B, T, HV, K] and the final Hm, in float32.

    Raises:
        ValueError: a shape is not one of the above, or an operand is on no GPU.
        TypeError: a dtype that the kernels do not accept.

    Reference: von Oswald et al., MesaNet: Sequence Modeling by Locally Optimal Test-Time Training
    (arXiv:2506.05233), the mesa layer and its conjugate gradients over chunks.
    """
    HV, K = check_precision(q, k, beta, g, cu_seqlens)
    check_state(initial_state, (sequences(beta, cu_seqlens), HV, K, K))
    matrix = None if initial_state is None else initial_state.to(torch.float32)
    x, matrix = _solve(q.to(k.dtype), k, beta, g, full_prior(prior, HV, K), matrix, cu_seqlens)
    return x, matrix
