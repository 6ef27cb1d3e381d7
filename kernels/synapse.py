"""Importance of every synapse, chunked: the hosts of `synapse_kernels`, which says what they do.

Backward they run on one segment of the sequence after another, from its end, so that what the
passes leave to each other is never held for all tokens at once.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .common import (
    Chunks,
    Tiles,
    current_target,
    gate_kind,
    launch,
    make_chunks,
    power_of_two,
    reduce_heads,
)
from .loops import Synapse
from .operands import (
    as_result,
    check_choice,
    check_device,
    check_operands,
    check_step,
    final_state,
    full_prior,
    given_or_zeros,
    is_step,
    own_state,
    prepare,
)
from .register import register, register_step
from .synapse_kernels import (
    synapse_carry_kernel,
    synapse_columns_kernel,
    synapse_finish_kernel,
    synapse_gradient_kernel,
    synapse_keep_kernel,
    synapse_local_kernel,
    synapse_output_kernel,
    synapse_state_kernel,
    synapse_step_kernel,
)

# Tokens between two stored states, forward and backward, and tokens of a block of the backward
# pass.
BORDER = 128
BACKWARD_BORDER = 256
SUB = 16
# Tokens of one product in the pass from border to border.
STATE_ROWS = 64
# The backward pass may always hold this much, whatever the size of the problem.
SCRATCH_FLOOR = 64 << 20
RECIPROCALS = ("approximate", "exact")


def state_tiles(K: int, V: int, dtype: torch.dtype, gate: int) -> Tiles:
    """Exact products of float32 take three times the registers."""
    wide = dtype != torch.float32
    BK = min(64 if wide else 32, power_of_two(K))
    # Triton 3.9 cannot pipeline accumulators that nothing but products changes on sm_100.
    stages = 2 if wide and (gate or not current_target().startswith("sm_10")) else 1
    return Tiles(BK, min(32, power_of_two(V)), 4, stages)


def walk_tiles(K: int, V: int, crowded: bool) -> Tiles:
    """All keys of some values, 64 synapses a thread, 32 where a read keeps more of each alive."""
    BK = power_of_two(K)
    size = 1024 if crowded else 2048
    BV = max(8, size // BK)
    return Tiles(BK, BV, max(1, BK * BV // size), 1)


def local_tiles(K: int, V: int, crowded: bool) -> Tiles:
    """32 synapses a thread, four states of each live in registers; 16 where a read keeps more
    alive."""
    # In one warp sm_90's register allocation spills.
    warps = 2 if crowded and V > 32 and current_target() == "sm_90" else 1
    return Tiles(16 if crowded else min(32, power_of_two(K)), 32 * warps, warps, 1)


def carry_tiles(K: int, V: int) -> Tiles:
    return Tiles(min(16, power_of_two(K)), min(64, power_of_two(V)), 2, 1)


def gradient_tiles(V: int, dtype: torch.dtype, crowded: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(1, 16, 1, 1)
    # Two warps have no fewer values each, but ptxas finds registers for them.
    return Tiles(1, min(64 if crowded else 32, power_of_two(V)), 2 if crowded else 1, 1)


def step_tiles(K: int, V: int) -> Tiles:
    BK = power_of_two(K)
    return Tiles(BK, max(8, 4096 // BK), 4, 1)


def border_states(
    k: Tensor,
    w: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    j: Tensor | None,
    chunks: Chunks,
) -> tuple[Tensor, Any, Tensor, Any]:
    """h and J at the start of every chunk, and the final ones; no J without b."""
    (HV, V), K = w.shape[2:], k.shape[3]
    rows = min(STATE_ROWS if w.dtype != torch.float32 else STATE_ROWS // 2, chunks.BT)
    state_h = w.new_empty(chunks.number, HV, K, V, dtype=torch.float32)
    final_h = w.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32)
    state_j, final_j = None, None
    if b is not None:
        state_j, final_j = torch.empty_like(state_h), torch.empty_like(final_h)
    keep = None
    if g is not None and g.ndim == 4:
        keep = torch.empty_like(g, dtype=torch.float32)
        tiles = Tiles(min(32, power_of_two(K)), 1, 1, 1)
        launch(
            synapse_keep_kernel, chunks.number, tiles, chunks, across="K", g=g, keep=keep, BS=rows
        )
    launch(
        synapse_state_kernel,
        chunks.sequences,
        state_tiles(K, V, w.dtype, gate_kind(g)),
        chunks,
        across="KV",
        k=k,
        w=w,
        b=b,
        g=g,
        keep=keep,
        initial_h=h,
        initial_j=j,
        state_h=state_h,
        state_j=state_j,
        final_h=final_h,
        final_j=final_j,
        BS=rows,
    )
    return state_h, state_j, final_h, final_j


def _begin(x: Synapse, border: int) -> tuple[Synapse, Chunks]:
    """Operands as the kernels take them, w, q and k of one dtype."""
    x = prepare(x, x.w.dtype, ("q", "k"), ("h", "j"))
    return x, make_chunks(x.w.shape[0], x.w.shape[1], x.cu_seqlens, border)


def _rooms(x: Synapse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the output, both final states, and the uncertainty (or nothing)."""
    h = final_state(x.w, x.k.shape[3], x.cu_seqlens)
    u = as_result(x.w) if x.uncertainty else x.w.new_empty(0)
    return as_result(x.w), h, torch.empty_like(h), u


def forward(x: Synapse, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final h and J, uncertainty (empty if not asked for)."""
    K, V = x.k.shape[3], x.w.shape[3]
    if is_step(x.w, x.cu_seqlens, keep):
        h, j = (own_state(y, x.w, K) for y in (x.h, x.j))
        out, doubt = step(x._replace(h=h, j=j))
        return out, h, j, doubt
    x, chunks = _begin(x, BORDER)
    state_h, state_j, h, j = border_states(x.k, x.w, x.b, x.g, x.h, x.j, chunks)
    o = torch.empty_like(x.w)
    u = torch.empty_like(x.w) if x.uncertainty else None
    # A read before the write keeps one more vector alive: too much where registers are scarce.
    before = x.read == "pre" and current_target().startswith("sm_10")
    launch(
        synapse_output_kernel,
        chunks.number,
        walk_tiles(K, V, x.uncertainty or before),
        x,
        chunks,
        across="V",
        state_h=state_h,
        state_j=state_j,
        o=o,
        u=u,
    )
    return o, h, j, x.w.new_empty(0) if u is None else u


def operand_type(dtype: torch.dtype) -> Any:
    """Return what the triangular products multiply; float16 has too little range for 1 / I."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def segment_chunks(chunks: Chunks, HV: int, K: int, V: int, block_bytes: int) -> int:
    """Chunks of a segment: its blocks take a sixteenth of two float32 states for all blocks, or the
    floor."""
    per_chunk = chunks.BT // SUB
    whole = chunks.number * per_chunk * HV * 8 * K * V
    return max(
        1, min(chunks.number, max(SCRATCH_FLOOR, whole // 16) // (per_chunk * HV * block_bytes))
    )


def gradients(x: Synapse, grads: Any, _wanted: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, in order."""
    x, chunks = _begin(x, BACKWARD_BORDER)
    B, T, HV, V = x.w.shape
    HQ, HK, K = x.q.shape[2], x.k.shape[2], x.k.shape[3]
    gate, operand = gate_kind(x.g), operand_type(x.w.dtype)
    do = given_or_zeros(grads[0], as_result(x.w))
    du = grads[3].contiguous() if x.uncertainty and grads[3] is not None else None
    state_h, state_j, final_h, final_j = border_states(x.k, x.w, x.b, x.g, x.h, x.j, chunks)
    carry_h, carry_j = (
        own_state(y, x.w, K) if y is not None else torch.zeros_like(final_h) for y in grads[1:3]
    )
    # A read before the write keeps one more vector alive, which the register allocation of some
    # targets has no room for.
    target = current_target()
    blackwell = target.startswith("sm_10")
    before = x.read == "pre" and (blackwell or (gate == 2 and target == "sm_80"))
    local = local_tiles(K, V, du is not None or before)
    carry, grad = carry_tiles(K, V), gradient_tiles(V, x.w.dtype, blackwell and du is not None)
    NV, NZ = -(-V // grad.BV), -(-V // carry.BV)
    kept = torch.bfloat16 if x.w.dtype == torch.bfloat16 else torch.float32
    rows, sums_ = 2 * K + (0, 6, 6 * K)[gate], 4 if du is None else 5
    block = 4 * (K * V * kept.itemsize + SUB * (rows + NV * sums_ * K) + (NZ + 1) * K)
    size = segment_chunks(chunks, HV, K, V, block)
    blocks = size * (chunks.BT // SUB)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.w.new_empty(blocks, HV, *shape, dtype=dtype)

    enter, turn = scratch(2, K, V, dtype=kept), scratch(2, K, V, dtype=kept)
    columns, parts = scratch(rows, SUB), scratch(NV, sums_, K, SUB)
    decay, z = (scratch(K), scratch(NZ, K)) if gate else (None, None)
    carry_z = x.w.new_empty(chunks.sequences, HV, NZ, K, dtype=torch.float32) if gate else None
    dq, dk = x.q.new_empty(B, T, HV, K), x.k.new_empty(B, T, HV, K)
    dw, db = torch.empty_like(x.w), torch.empty_like(x.b)
    dg = None if x.g is None else torch.empty_like(x.g)
    dprior = torch.zeros_like(x.prior)
    carried = {"carry_h": carry_h, "carry_j": carry_j, "carry_z": carry_z}
    shared = {
        "state_h": state_h,
        "state_j": state_j,
        "final_h": final_h,
        "final_j": final_j,
        "do": do,
        "du": du,
        "enter": enter,
        "turn": turn,
        "decay": decay,
        "columns": columns,
        "parts": parts,
        "z": z,
        "SUB": SUB,
        "SPLIT": operand == tl.float32,
    }
    keyed = Tiles(min(64, power_of_two(K)), 1, 1, 1), Tiles(min(32, power_of_two(K)), 1, 1, 1)
    for first in reversed(range(0, chunks.number, size)):
        count = min(size, chunks.number - first)
        sums = x.w.new_zeros(count * (chunks.BT // SUB), HV, K, dtype=torch.float32)
        at: dict[str, Any] = {**shared, "c_first": first}
        launch(synapse_local_kernel, count, local, x, chunks, across="KV", **at)
        launch(
            synapse_carry_kernel,
            chunks.sequences,
            carry,
            x,
            chunks,
            across="KV",
            T=T,
            c_end=first + count,
            **carried,
            **at,
        )
        number = sums.shape[0]
        launch(synapse_columns_kernel, number, keyed[0], x, chunks, across="K", **at)
        launch(
            synapse_gradient_kernel,
            number,
            grad,
            x,
            chunks,
            across="V",
            dw=dw,
            db=db,
            OPERAND=operand,
            **at,
        )
        launch(
            synapse_finish_kernel,
            number,
            keyed[1],
            x,
            chunks,
            dq=dq,
            dk=dk,
            dg=dg,
            dprior=sums,
            DOUBT=du is not None,
            NV=NV,
            NZ=NZ,
            **at,
        )
        dprior += sums.sum(0)
    dq, dk = reduce_heads(dq, HQ), reduce_heads(dk, HK)
    return dq, dk, dw, db, dg, dprior, carry_h, carry_j, None


_synapse = register(
    "synapse",
    Synapse,
    results=("out", "final_h", "final_j", "doubt"),
    forward=forward,
    allocate=lambda x, keep: _rooms(x),
    gradients=gradients,
)


def step(x: Synapse) -> tuple[Tensor, Tensor]:
    """Output and uncertainty (empty if not asked for) of one token; h and j are updated in
    place."""
    x = prepare(x)
    o = torch.empty_like(x.w)
    u = torch.empty_like(x.w) if x.uncertainty else None
    tiles = step_tiles(x.k.shape[3], x.w.shape[3])
    launch(synapse_step_kernel, x.w.shape[0], tiles, x, across="V", o=o, u=u)
    return o, x.w.new_empty(0) if u is None else u


_synapse_step = register_step(
    "synapse_step",
    Synapse,
    results=("out", "doubt"),
    updates=("h", "j"),
    step=step,
    allocate=lambda x: _rooms(x)[::3],
)


def _check(*given: Any, reciprocal: str) -> Synapse:
    """Checked operands, with the prior of every key."""
    x = Synapse._make((*given, reciprocal == "exact"))
    check_choice("read", x.read, ("post", "pre"))
    check_operands(x.w, {"q": x.q, "k": x.k}, x.g, [x.h, x.j], x.cu_seqlens)
    if x.b.shape != x.w.shape:
        raise ValueError(f"b: got shape {tuple(x.b.shape)}; expected that of w, {tuple(x.w.shape)}")
    check_device("b", x.b)
    check_choice("reciprocal", reciprocal, RECIPROCALS)
    return x._replace(prior=full_prior(x.prior, x.w.shape[2], x.k.shape[3]))


def synapse_step(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    state: tuple[Tensor, Tensor],
    read: str = "post",
    uncertainty: bool = False,
    reciprocal: str = "approximate",
) -> tuple[Tensor, Tensor | None]:
    """One token of `synapse`, without gradients; both states are updated in place.

    Args:
        q, k, w, b, g, prior, read, uncertainty, reciprocal: as in `synapse`, T = 1.
        state: h and J, contiguous float32 [B, HV, K, V].

    Returns:
        o [B, 1, HV, V] in w's dtype and the uncertainty, likewise, or None.

    Raises:
        ValueError: a shape, an option or a state is not one of the above.
        TypeError: a dtype that the kernels do not accept.
    """
    check_step("w", w, k.shape[3], *state)
    x = _check(q, k, w, b, g, prior, *state, None, read, uncertainty, reciprocal=reciprocal)
    o, u = _synapse_step(*x)
    return o, u if uncertainty else None


def synapse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    read: str = "post",
    uncertainty: bool = False,
    cu_seqlens: Tensor | None = None,
    reciprocal: str = "approximate",
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """Gated linear memory read through an importance of its own for every synapse.

        h_t = Diag(exp g_t) h_{t-1} + k_t w_t^T
        J_t = Diag(exp g_t) J_{t-1} + (k_t^2) b_t^T
        o_t = (h_t / (J_t + prior))^T q_t           (read "pre": h_{t-1}, J_{t-1})
        u_t = (1 / (J_t + prior))^T q_t^2           uncertainty

    Args:
        q: queries, scaled, [B, T, H or HV, K].
        k: keys, [B, T, H or HV, K].
        w: values times write gate, [B, T, HV, V]; float32, float16 or bfloat16.
        b: importance gate, >= 0, [B, T, HV, V].
        g: natural log decay, <= 0, -inf allowed; [B, T, HV] or [B, T, HV, K]; None is no decay.
        prior: importance before the first token, > 0, [HV] or [HV, K].
        initial_state: h and J, both [N, HV, K, V]; zeros if None.
        read: "post" or "pre".
        uncertainty: whether to return u.
        cu_seqlens: int64 [N + 1], packs N sequences into B = 1; empty ones allowed.
        reciprocal: "approximate" (one unit in the last place) or "exact" (correctly rounded,
            slower).

    Returns:
        o [B, T, HV, V] in w's dtype, the final h and J, [N, HV, K, V] in float32, and u like o,
            or None.

    Raises:
        ValueError: a shape or an option is not one of the above, or w is on no GPU.
        TypeError: a dtype that the kernels do not accept.

    Reference: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based Models
    (arXiv:2602.09075), the recurrence of Palimpsa in its natural parameters.
    """
    start = initial_state or (None, None)
    options = (cu_seqlens, read, uncertainty)
    x = _check(q, k, w, b, g, prior, *start, *options, reciprocal=reciprocal)
    o, h, j, u = _synapse(*x)
    return o, (h, j), u if uncertainty else None
