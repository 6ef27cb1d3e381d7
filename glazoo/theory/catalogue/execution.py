"""How a recurrence may be evaluated: whole, in pieces, packed, token by token, by any engine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from glazoo.api import attention
from glazoo.state import State
from glazoo.theory.catalogue.axes import STATE, every, preconditioned, same, without
from glazoo.theory.entry import Comparison, Domain, Entry, Kind, Op, Pair, Trial
from glazoo.theory.instances import Instance, Operands, run
from glazoo.theory.maps import take, tokens

__all__ = ["ENTRIES"]

Found = Iterator[Comparison]

_reference = functools.partial(attention, impl="reference")


def _splice(t: Trial, ops: Operands, other: Operands, cut: int) -> Operands:
    """Return `ops` before a token and `other` from it on."""
    i = t.instance
    index = torch.arange(i.T)
    head = take(t.program, ops, "T", index[:cut])
    tail = take(t.program, other, "T", index[cut:])
    out = dict(ops)
    for operand in t.program.operands:
        if operand.per_token and operand.name in ops and ops[operand.name].ndim > 2:
            out[operand.name] = torch.cat([head[operand.name], tail[operand.name]], 1)
    return out


def _causal(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    cut = t.integer(0, t.instance.T)
    a = t.run(t.spec, ops, initial_state=state).output
    b = t.run(t.spec, _splice(t, ops, t.other(), cut), initial_state=state).output
    yield Pair("output before the change", b[:, :cut], a[:, :cut])


def _segmented(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    cuts = sorted({0, i.T, t.integer(0, i.T), t.integer(0, i.T, stream=8)})
    whole = t.run(t.spec, ops, initial_state=state)
    outputs, last = [], None
    for start, end in itertools.pairwise(cuts):
        last = t.run(t.spec, tokens(t.program, ops, start, end), initial_state=state)
        outputs.append(last.output)
        state = last.final_state
    if last is None:
        return
    yield Pair("output", torch.cat(outputs, 1), whole.output)
    for part in STATE:
        x, y = getattr(last.final_state, part), getattr(whole.final_state, part)
        if y is not None:
            yield Pair(f"final {part}", x, y)


def _empty(t: Trial) -> Found:
    state = t.state()
    result = t.run(t.spec, tokens(t.program, t.operands(), 0, 0), initial_state=state)
    i = t.instance
    yield Pair("output", result.output, torch.zeros(i.B, 0, i.HV, i.V, dtype=t.dtype))
    for part in STATE:
        x = None if state is None else getattr(state, part)
        if x is not None:
            yield Pair(f"final {part}", getattr(result.final_state, part), x)


def _packed(t: Trial) -> Found:
    i = t.instance
    one = Instance(1, i.T, i.H, i.G, i.K, i.V, i.regime, i.start, i.seed)
    ops = Trial(t.op, t.spec, one, t.dtype, t.others).operands()
    inner = sorted(t.integer(0, i.T, stream=20 + n) for n in range(3))
    # An empty sequence in the middle, and with luck more of them.
    bounds = [0, inner[0], inner[0], inner[1], inner[2], i.T]
    count = len(bounds) - 1
    state = None
    if i.start:
        many = Instance(count, i.T, i.H, i.G, i.K, i.V, i.regime, True, i.seed)
        state = many.state(t.spec, t.dtype)
    packed = t.run(t.spec, ops, initial_state=state, cu_seqlens=torch.tensor(bounds))
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = None
        if state is not None:
            own = State(*(None if x is None else x[n : n + 1] for x in state))  # type: ignore[arg-type]
        alone = t.run(t.spec, tokens(t.program, ops, start, end), initial_state=own)
        yield Pair(f"output of sequence {n}", packed.output[:, start:end], alone.output)
        for part in STATE:
            x, y = getattr(packed.final_state, part), getattr(alone.final_state, part)
            if y is not None:
                yield Pair(f"final {part} of sequence {n}", x[n : n + 1], y)


def _decode(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    whole = t.run(t.spec, ops, initial_state=state)
    outputs = []
    for n in range(i.T):
        step = t.run(t.spec, tokens(t.program, ops, n, n + 1), initial_state=state)
        outputs.append(step.output)
        state = step.final_state
    if not outputs:
        return
    assert state is not None
    yield Pair("output", torch.cat(outputs, 1), whole.output)
    for part in STATE:
        y = getattr(whole.final_state, part)
        if y is not None:
            yield Pair(f"final {part}", getattr(state, part), y)


def _agrees(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    a = t.run(t.spec, ops, initial_state=state)
    yield from same(a, run(_reference, t.spec, ops, initial_state=state), parts=STATE)


def _uncertainty_agrees(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    options = {"initial_state": state, "output_uncertainty": True}
    a = t.run(t.spec, ops, **options)
    yield Pair("uncertainty", a.uncertainty, run(_reference, t.spec, ops, **options).uncertainty)


def _gradients(t: Trial) -> Found:
    """Gradients of a random projection of the outputs and of the final state."""
    with torch.enable_grad():
        ours, truth = _slopes(t, t.op), _slopes(t, _reference)
    for name, slope in ours.items():
        yield Pair(f"gradient of {name}", slope, truth[name])


def _slopes(t: Trial, op: Op) -> dict[str, Tensor]:
    ops, state, start = t.operands(), t.state(), None
    leaves = {name: x.clone().requires_grad_() for name, x in ops.items()}
    moving = dict(leaves)
    if state is not None:
        parts = {
            name: x.clone().requires_grad_() for name, x in state._asdict().items() if x is not None
        }
        leaves |= {f"initial {name}": x for name, x in parts.items()}
        if t.spec.posterior.precision == "full":
            # Symmetric: only the symmetric part of its gradient means something.
            matrix = parts["importance"]
            parts["importance"] = (matrix + matrix.mT) / 2
        start = State(**parts)
    result = run(op, t.spec, moving, initial_state=start)
    total = (result.output * t.normal(*result.output.shape)).sum()
    for n, x in enumerate(result.final_state):
        if x is not None and x.requires_grad:
            total = total + (x * t.normal(*x.shape, stream=30 + n)).sum()
    slopes: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if total.requires_grad:
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
    }


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "causal",
        "y_1..t does not depend on tokens after t",
        "any spec",
        "the same spec with other tokens after t",
        "ours",
        _causal,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(long=137),
    ),
    Entry(
        "segmented-is-whole",
        "y(x_1..T; S_0) = [y(x_1..t; S_0), y(x_t+1..T; S_t)]",
        "any spec",
        "the same spec on pieces that hand their state on",
        "ours",
        _segmented,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(long=137),
    ),
    Entry(
        "empty-keeps-the-state",
        "T = 0: no output, S_T = S_0",
        "any spec",
        "its initial state",
        "ours",
        _empty,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(tokens=(0, 0), start=True),
    ),
    Entry(
        "packed-is-separate",
        "sequences packed in one row = the same sequences alone, empty ones included",
        "any spec with cu_seqlens",
        "the same spec on every sequence",
        "ours",
        _packed,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(batch=(1, 1), long=137),
    ),
    Entry(
        "decoding-is-prefill",
        "T calls with one token = one call with T tokens",
        "any spec, one token at a time",
        "the same spec on all tokens",
        "ours",
        _decode,
        every,
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "engine-is-reference",
        "engine(x) = reference(x): outputs and final states",
        "any spec on the engine",
        "the token-by-token definition",
        "ours",
        _agrees,
        every,
        domain=Domain(long=137),
        engine=True,
    ),
    Entry(
        "engine-uncertainty-is-reference",
        "uncertainty_engine(x) = uncertainty_reference(x)",
        "any spec on the engine",
        "the token-by-token definition",
        "ours",
        _uncertainty_agrees,
        without(preconditioned),
        domain=Domain(long=137),
        engine=True,
    ),
    Entry(
        "engine-gradients-are-reference",
        "d engine / d x = d reference / d x for every operand and initial state",
        "any spec on the engine",
        "automatic differentiation of the token-by-token definition",
        "ours",
        _gradients,
        every,
        domain=Domain(
            regimes=("normal", "no_decay", "strong_decay", "zero_write", "zero_gate"), long=70
        ),
        engine=True,
    ),
)
