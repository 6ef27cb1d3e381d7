"""Single tokens, and a few of them, in one compiled piece: of linear, of delta, of either with an
importance over keys, and of synapses.

The loops take addresses: a token costs little but its calls, and an array that numba is given is
one of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from glazoo.engines import chunked
from glazoo.engines.call import Call, Given, Result, TokenRun
from glazoo.engines.compiled import loops
from glazoo.engines.compiled.host import NUMBERS, lies_flat, run
from glazoo.kernels.loops import compute_dtype, scaled, times
from glazoo.kernels.register import register_step, wants_derivative
from glazoo.program import OneToken
from glazoo.state import State

_KINDS = {"none": 0, "full": 1, "diagonal": 2}
_GAINS = {"first_order": 0, "exact": 1, "exact_rate": 2}

# Tokens up to which a loop over them is faster than matrix products.
FEW = 16


class _Layout(NamedTuple):
    """What the loops are told besides addresses, of operands that lie flat."""

    synapse: bool
    sizes: tuple[int, ...]
    rules: tuple[int, ...]
    scale: Any

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor | None,
        e: Tensor | None,
        v: Tensor,
        beta: Tensor | None,
        g: Tensor | None,
        prior: Tensor | None,
        *,
        rules: tuple[str, str, str, str],
        own: bool,
        synapse: bool,
        scale: float,
        dtype: torch.dtype,
    ) -> _Layout:
        """Read the layout off the operands; rules: correction, gain, read and base."""
        batch, tokens, heads, size = v.shape
        rows = batch * tokens * heads
        keyed = v if k is None else k
        gate = 0 if g is None else g.numel() // (heads if g.dim() == 1 else rows)
        priors = 0 if prior is None or prior.dim() == 0 else prior.numel() // heads
        correction, gain, read, base = rules
        return cls(
            synapse,
            (
                *(batch, tokens, heads, q.shape[2], keyed.shape[2]),
                *((keyed if e is None else e).shape[2], q.shape[3], size),
                0 if beta is None else beta.numel() // rows,
                *(0 if g is None or g.dim() == 1 else heads * gate, gate, int(gate > 1)),
                *(priors, int(priors > 1)),
            ),
            (
                *(_KINDS[correction], _GAINS[gain], int(read == "pre"), int(base == "prev")),
                *(int(own), int(k is None)),
            ),
            NUMBERS[dtype](scale),
        )

    def run(self, places: tuple[int, ...]) -> None:
        """Run the loop on what lies at the addresses."""
        batch, tokens, heads, _, _, _, keys, size, *_ = self.sizes
        rows, loop = batch * heads, loops.synapse_step if self.synapse else loops.step
        work = rows * tokens * keys * size
        run(loop, rows, -(-rows // 8), work, places, self.sizes, self.rules, self.scale)


class Token(NamedTuple):
    """Operands of a few tokens [B, T, ...] and the states before them; no b: no importance."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    b: Tensor | None
    g: Tensor | None
    e: Tensor | None
    prior: Tensor | None
    memory: Tensor | None
    importance: Tensor | None
    correction: str
    gain: str
    read: str
    base: str
    own: bool
    synapse: bool
    uncertainty: bool


def _allocate(x: Token) -> tuple[Tensor, ...]:
    batch, tokens, heads, size = x.v.shape
    like = x.v.new_empty((), dtype=compute_dtype(x.q, x.k, x.v))
    cells, doubts = (batch, heads, x.k.shape[3], size), (batch, tokens, heads, size)
    axes = 4 if x.synapse else 3
    return (
        torch.empty_like(x.v, memory_format=torch.contiguous_format),
        like.new_empty(cells),
        like.new_empty(0 if x.b is None else cells[:axes]),
        like.new_empty(doubts[:axes] if x.uncertainty else 0),
    )


def _step(x: Token) -> tuple[Tensor, ...]:
    found = out, new, new_j, doubt = _allocate(x)
    dtype = new.dtype
    wide = out if out.dtype == dtype else out.to(dtype)
    flat = [None if y is None else lies_flat(y.detach(), dtype) for y in x[:10]]
    q, k, v, beta, b, g, e, prior, memory, importance = flat
    assert q is not None
    assert v is not None
    layout = _Layout.of(
        q, k, e, v, beta, g, prior,
        rules=(x.correction, x.gain, x.read, x.base),
        own=x.own, synapse=x.synapse, scale=1.0, dtype=dtype,
    )  # fmt: skip
    operands = (q, k, k if e is None else e, v, beta, b, g, prior, None, memory, importance)
    made = (wide, doubt, new, new_j)
    layout.run(tuple(0 if y is None else y.data_ptr() for y in (*operands, *made)))
    if wide is not out:
        out.copy_(wide)
    return found


few_tokens = register_step(
    "compiled_step",
    Token,
    results=("out", "new_memory", "new_importance", "doubt"),
    step=_step,
    allocate=_allocate,
)


def token(call: Call, given: Given, piece: OneToken) -> TokenRun | None:
    """Prepare all of a token of decoding that does not depend on its numbers.

    Args:
        call: a valid call.
        given: what it was made of.
        piece: its program.

    Returns:
        What runs calls like it; None, if nothing is to be computed.
    """
    x, dtype, start = call.operands, call.compute_dtype, call.initial_state
    if any(y.numel() == 0 for y in x.values()):
        return None
    # In the order in which the loops take them. What is no tensor is the same for all calls.
    names = ("q", "k", piece.p or "k", "v", piece.beta, piece.b, "g", "prior", piece.erase)
    fixed: list[Tensor] = []
    moving: list[tuple[int, str]] = []
    places = [0] * len(names)
    for i, name in enumerate(names):
        if name is not None and name in x:
            if isinstance(given[name], Tensor):
                moving.append((i, name))
            else:
                fixed.append(lies_flat(x[name], dtype))
                places[i] = fixed[-1].data_ptr()
    own = {name: y if isinstance(y := given[name], Tensor) else x[name] for name in x}
    q, v = own["q"], own["v"]
    layout = _Layout.of(
        q, own.get("k"), own.get(piece.p or ""), v, own.get(piece.beta or ""), own.get("g"),
        own.get("prior"),
        rules=(piece.correction, piece.gain, piece.read, piece.base),
        own=piece.erase is not None, synapse=piece.synapse, scale=call.scale, dtype=dtype,
    )  # fmt: skip
    batch, tokens, heads, size = v.shape
    cells, doubts = (batch, heads, q.shape[3], size), (batch, tokens, heads, size)
    scanned, asked = piece.b is not None, call.uncertainty
    axes = 4 if piece.synapse else 3
    parts = 0 if start is None else 2 if scanned else 1

    def address(x: Any, held: list[Tensor]) -> int:
        if x.dtype is not dtype or not x.is_contiguous() or x.is_neg():
            x = lies_flat(x, dtype)
            held.append(x)
        at: int = x.data_ptr()
        return at

    def run_token(given: Given, state: State | None) -> Result | None:
        # What has an address lives until the loop has run: what is fixed, and copies.
        held = fixed.copy()
        at = places.copy()
        for i, name in moving:
            at[i] = address(given[name], held)
            if not at[i]:
                return None
        if parts:
            assert state is not None
            at.append(address(state.memory, held))
            at.append(address(state.importance, held) if parts > 1 else 0)
        else:
            at += (0, 0)
        out = torch.empty(doubts, dtype=dtype, device="cpu")
        memory = torch.empty(cells, dtype=dtype, device="cpu")
        importance = doubt = None
        if scanned:
            importance = torch.empty(cells[:axes], dtype=dtype, device="cpu")
        if asked:
            shape = doubts if scanned and axes == 4 else doubts[:3]
            doubt = torch.empty(shape, dtype=dtype, device="cpu")
        at += (
            out.data_ptr(),
            0 if doubt is None else doubt.data_ptr(),
            memory.data_ptr(),
            0 if importance is None else importance.data_ptr(),
        )
        layout.run(tuple(at))
        return Result(out, State(memory, importance), doubt)

    return run_token


def few(cu_seqlens: Tensor | None, start: Tensor | None, *operands: Tensor | None) -> bool:
    """Whether these are tokens of decoding: one, or a few that go on from a state, of which no
    derivative is asked for and which no transform of `torch.func` stands for.

    Without a state they may be a layer's that is computed again for its gradients, where it has to
    give the same to the last bit.
    """
    some = operands[0]
    assert some is not None
    if not 0 < some.shape[1] <= (1 if start is None else FEW) or cu_seqlens is not None:
        return False
    return peek_interpreter_stack() is None and not wants_derivative(start, *operands)


def posterior_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    b: Tensor,
    g: Tensor | None = None,
    *,
    prior: Tensor,
    e: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    correction: str = "none",
    gain: str = "first_order",
    read: str = "post",
    base: str = "decayed",
    own: bool = False,
    uncertainty: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """One token of a memory with an importance over keys, without gradients: what
    `glazoo.kernels.posterior_step` computes, on a CPU."""
    memory, importance = initial_state or (None, None)
    given = (q, k, v, beta, b, g, e, prior, memory, importance)
    options = (correction, gain, read, base, own, False, uncertainty)
    out, memory, importance, doubt = few_tokens(*given, *options)
    return out, (memory, importance), doubt if uncertainty else None


def linear(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    read: str = "post",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention, `glazoo.engines.chunked.linear`, of which a few tokens are one loop."""
    if not few(cu_seqlens, initial_state, q, k, w, g, beta):
        return chunked.linear(
            q, k, w, g,
            beta=beta, scale=scale, initial_state=initial_state, read=read, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    given = (scaled(q, scale), k, w, beta, None, g, None, None, initial_state, None)
    options = ("none", "first_order", read, "decayed", False, False, False)
    out, final, *_ = few_tokens(*given, *options)
    return out, final


def delta(
    q: Tensor,
    e: Tensor | None,
    k: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    base: str = "decayed",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule, `glazoo.engines.chunked.delta`, of which a few tokens are one loop."""
    if not few(cu_seqlens, initial_state, q, e, k, w, g, beta, erase):
        return chunked.delta(
            q, e, k, w, g,
            beta=beta, erase=erase, scale=scale,
            initial_state=initial_state, base=base, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    e = times(erase, k if e is None else e)
    given = (scaled(q, scale), k, w, beta, None, g, e, None, initial_state, None)
    options = ("full", "first_order", "post", base, True, False, False)
    out, final, *_ = few_tokens(*given, *options)
    return out, final
