"""What every spec shares: linearity, permutations, resets, and how operands enter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.catalogue.axes import (
    STATE,
    discounts,
    every,
    frozen,
    full,
    has,
    isotropic,
    log_evidence,
    own_decay,
    rotated,
    same,
    token_decay,
    where,
    without,
)
from glazoo.theory.entry import Comparison, Domain, Entry, Kind, Pair, Trial
from glazoo.theory.instances import Operands
from glazoo.theory.maps import (
    expand_value_heads,
    take,
    take_state,
    values_as_heads,
    values_as_heads_state,
)

__all__ = ["ENTRIES"]

Found = Iterator[Comparison]


def _moved(t: Trial, dim: str, index: Tensor, also: dict[str, Tensor] | None = None) -> Found:
    """Moves an axis of all operands and of the state; the result must move along."""
    ops, state = t.operands(), t.state()
    moves = {dim: index} | (also or {})
    right, right_state = ops, state
    for axis, order in moves.items():
        right = take(t.program, right, axis, order)
        if right_state is not None:
            state_axis = "N" if axis == "B" else axis
            right_state = take_state(t.program, right_state, state_axis, order)
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, right, initial_state=right_state)
    expected, final = a.output, a.final_state
    for axis, order in moves.items():
        at = {"B": 0, "HV": 2, "V": 3}.get(axis)
        expected = expected if at is None else expected.index_select(at, order)
        final = take_state(t.program, final, "N" if axis == "B" else axis, order)
    yield Pair("output", b.output, expected)
    for part in STATE:
        x, y = getattr(b.final_state, part), getattr(final, part)
        if y is not None:
            yield Pair(f"final {part}", x, y)


def _permute_batch(t: Trial) -> Found:
    yield from _moved(t, "B", t.permutation(t.instance.B))


def _permute_heads(t: Trial) -> Found:
    order, groups = t.permutation(t.instance.H), t.instance.G
    within = (order[:, None] * groups + torch.arange(groups)).flatten()
    yield from _moved(t, "H", order, {"HV": within})


def _permute_values(t: Trial) -> Found:
    yield from _moved(t, "V", t.permutation(t.instance.V))


def _permute_keys(t: Trial) -> Found:
    yield from _moved(t, "K", t.permutation(t.instance.K))


def _rotate_keys(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    rotation, _ = torch.linalg.qr(t.normal(i.K, i.K).double())
    rotation = rotation.to(t.dtype)
    right = dict(ops)
    for name in ("q", "k", "p"):
        if name in ops:
            right[name] = ops[name] @ rotation
    if "basis" in ops:
        right["basis"] = rotation.T @ ops["basis"]
    elif "prior" in ops:
        right["prior"] = ops["prior"] = ops["prior"].mean(-1, keepdim=True).expand_as(ops["prior"])
    right_state = state
    # Axes of its own turn along.
    memory_turns = torch.eye(i.K, dtype=t.dtype) if t.spec.turned else rotation.T
    if state is not None:
        memory, importance = memory_turns @ state.memory, state.importance
        if importance is not None and full(t.spec):
            importance = rotation.T @ importance @ rotation
        key, mass = state.lag_key, state.normalizer
        right_state = State(
            memory,
            importance,
            None if mass is None else mass @ rotation,
            None if key is None else key @ rotation,
            state.lag_value,
        )
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, right, initial_state=right_state)
    yield Pair("output", b.output, a.output)
    yield Pair("final memory", b.final_state.memory, memory_turns @ a.final_state.memory)


def _rotatable(spec: Spec) -> bool:
    """Nothing in it singles out a key channel."""
    imp, read = spec.importance, spec.read
    own = spec.posterior.precision == "diagonal" or spec.posterior.correction == "diagonal"
    return (
        (rotated(spec) or not own)
        and spec.decay.shape != "key"
        and (rotated(spec) or imp is None or imp.noise.shape != "key")
        and spec.erase.strength == "write"
        and not read.bonus
    )


def _groups(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    index = torch.arange(t.instance.HV) // t.instance.G
    right_state = None if state is None else take_state(t.program, state, "H", index)
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, expand_value_heads(t.program, ops), initial_state=right_state)
    yield from same(a, b, parts=("memory", "importance", "normalizer", "lag_value"))


def _values_are_heads(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    right_state = None if state is None else values_as_heads_state(t.program, state)
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, values_as_heads(t.program, ops), initial_state=right_state)
    yield Pair("output", a.output.flatten(2)[..., None], b.output)
    mapped = values_as_heads_state(t.program, a.final_state)
    for part in STATE:
        x, y = getattr(mapped, part), getattr(b.final_state, part)
        if x is not None and part != "lag_key":
            yield Pair(f"final {part}", x, y)


def _superposition(t: Trial) -> Found:
    ops, state, c = t.operands(), t.state(), -1.7
    v = t.other()["v"]
    second = None
    both = None
    if state is not None:
        memory = t.normal(*state.memory.shape)
        second = state._replace(memory=memory)
        both = state._replace(memory=state.memory + c * memory)
        if state.lag_value is not None:
            lag = t.normal(*state.lag_value.shape, stream=6)
            second = second._replace(lag_value=lag)
            both = both._replace(lag_value=state.lag_value + c * lag)
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, ops | {"v": v}, initial_state=second)
    both_sides = t.run(t.spec, ops | {"v": ops["v"] + c * v}, initial_state=both)
    yield Pair("output", both_sides.output, a.output + c * b.output)
    yield Pair(
        "final memory",
        both_sides.final_state.memory,
        a.final_state.memory + c * b.final_state.memory,
    )


def _linear_query(t: Trial) -> Found:
    ops, state, c = t.operands(), t.state(), 2.3
    q = t.other()["q"]
    a = t.run(t.spec, ops, initial_state=state).output
    b = t.run(t.spec, ops | {"q": q}, initial_state=state).output
    both = t.run(t.spec, ops | {"q": ops["q"] + c * q}, initial_state=state).output
    yield Pair("output", both, a + c * b)


def _scaled_query(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    a = t.run(t.spec, ops, initial_state=state).output
    b = t.run(t.spec, ops | {"q": t.scale * ops["q"]}, initial_state=state, scale=1.0).output
    c = t.run(t.spec, ops | {"q": t.scale / 2 * ops["q"]}, initial_state=state, scale=2.0).output
    yield Pair("output at the default scale", a, b)
    yield Pair("output at scale 2", c, b)


def _idle(t: Trial, ops: Operands, count: int) -> Operands:
    """Return tokens that write nothing and forget nothing."""
    n = t.spec.substeps
    out = {}
    for operand in t.program.operands:
        if operand.name not in ops:
            continue
        x = ops[operand.name]
        if operand.per_token:
            steps = count * n if "nT" in operand.shapes[0] else count
            x = x.new_full((x.shape[0], steps, *x.shape[2:]), operand.idle or 0.0)
            if operand.role == "query":
                x = t.normal(*x.shape)
        out[operand.name] = x
    return out


def _join(t: Trial, *parts: Operands) -> Operands:
    out = dict(parts[0])
    for operand in t.program.operands:
        if operand.per_token and operand.name in out:
            out[operand.name] = torch.cat([p[operand.name] for p in parts], 1)
    return out


def _idle_tokens(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    cut, count = t.integer(0, i.T), 2
    head = take(t.program, ops, "T", torch.arange(cut))
    tail = take(t.program, ops, "T", torch.arange(cut, i.T))
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, _join(t, head, _idle(t, ops, count), tail), initial_state=state)
    kept = torch.cat([b.output[:, :cut], b.output[:, cut + count :]], 1)
    yield Pair("output", kept, a.output)
    for part in ("memory", "importance", "normalizer"):
        x, y = getattr(a.final_state, part), getattr(b.final_state, part)
        if x is not None:
            yield Pair(f"final {part}", y, x)


def _zero_write(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    left = ops | {"beta": torch.zeros_like(ops["beta"])}
    a = t.run(t.spec, left, initial_state=state)
    b = t.run(t.spec, left | {"v": t.other()["v"]}, initial_state=state)
    yield from same(a, b, parts=("memory", "importance", "normalizer"))


def _reset(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    at = t.integer(0, i.T - 1)
    gone = {}
    for operand in t.program.operands:
        if operand.role in ("decay", "importance_decay"):
            g = ops[operand.name].clone()
            g[:, at * (t.spec.substeps if "nT" in operand.shapes[0] else 1)] = -torch.inf
            gone[operand.name] = g
    ops = ops | gone
    late = take(t.program, ops, "T", torch.arange(at, i.T))
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, late)
    # A read before the decay still sees what was there.
    first = 1 if t.spec.read.when == "pre" else 0
    yield Pair("output", a.output[:, at + first :], b.output[:, first:])
    for part in ("memory", "importance", "normalizer"):
        x, y = getattr(a.final_state, part), getattr(b.final_state, part)
        if x is not None:
            yield Pair(f"final {part}", x, y)


def _decay_adds(t: Trial) -> Found:
    """Two idle tokens forget as much as one with the product of their decays."""
    ops, i, state = t.operands(), t.instance, t.state()
    first, second = _idle(t, ops, 1), _idle(t, ops, 1)
    g = -t.uniform(*first["g"].shape)
    h = -t.uniform(*first["g"].shape, stream=7)
    if state is None or not i.B:
        return
    together = first | {"g": g + h}
    a = t.run(t.spec, _join(t, first | {"g": g}, second | {"g": h}), initial_state=state)
    b = t.run(t.spec, together, initial_state=state)
    for part in ("memory", "importance", "normalizer"):
        x, y = getattr(a.final_state, part), getattr(b.final_state, part)
        if x is not None:
            yield Pair(f"final {part}", x, y)


def _importance_ignores_values(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    a = t.run(t.spec, ops, initial_state=state).final_state.importance
    other = t.other()
    b = t.run(t.spec, ops | {"v": other["v"], "q": other["q"]}, initial_state=state)
    yield Pair("final importance", a, b.final_state.importance)


def _key_sign(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    sign = 1 - 2 * (t.uniform(i.K) < 0.5).to(t.dtype)
    right = dict(ops)
    for operand in t.program.operands:
        if operand.role in ("query", "key", "erase_key"):
            right[operand.name] = ops[operand.name] * sign
        elif operand.role == "basis":
            right[operand.name] = ops[operand.name] * sign[:, None]
    # Axes of its own flip along.
    flips = torch.ones_like(sign[:, None]) if t.spec.turned else sign[:, None]
    right_state = None
    if state is not None:
        importance, mass, key = state.importance, state.normalizer, state.lag_key
        if importance is not None and full(t.spec):
            importance = importance * sign * sign[:, None]
        right_state = State(
            state.memory * flips,
            importance,
            None if mass is None else mass * sign,
            None if key is None else key * sign,
            state.lag_value,
        )
    a = t.run(t.spec, ops, initial_state=state)
    b = t.run(t.spec, right, initial_state=right_state)
    yield Pair("output", b.output, a.output)
    yield Pair("final memory", b.final_state.memory, a.final_state.memory * flips)


_no_lag = where(lambda s: s.steps.source == "projected")

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "linear-in-values",
        "y(v + c v', S_0 + c S_0') = y(v, S_0) + c y(v', S_0')",
        "any spec",
        "the sum of two runs",
        "ours",
        _superposition,
        every,
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "linear-in-queries",
        "y(q + c q') = y(q) + c y(q')",
        "a spec that does not normalise its read",
        "the sum of two runs",
        "ours",
        _linear_query,
        lambda s: s.read.normalizer == "none",
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "scale-multiplies-the-query",
        "y(q; scale) = y(scale q; 1),  default scale K^-1/2 or the spec's number",
        "any spec",
        "the same spec on a rescaled query",
        "ours",
        _scaled_query,
        every,
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "batch-permutes",
        "y(P x) = P y(x) for permutations P of sequences",
        "any spec",
        "the same spec on permuted operands and state",
        "ours",
        _permute_batch,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(batch=(2, 3)),
    ),
    Entry(
        "heads-permute",
        "y(P x) = P y(x) for permutations P of query/key heads with their value heads",
        "any spec",
        "the same spec on permuted operands and state",
        "ours",
        _permute_heads,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(heads=(2, 3)),
    ),
    Entry(
        "value-channels-permute",
        "y(v P) = y(v) P for permutations P of value channels",
        "any spec",
        "the same spec on permuted operands and state",
        "ours",
        _permute_values,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(values=(2, 3)),
    ),
    Entry(
        "key-channels-permute",
        "y(q P, k P, ..) = y(q, k, ..) for permutations P of key channels",
        "any spec",
        "the same spec on permuted operands and state",
        "ours",
        _permute_keys,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(keys=(2, 5)),
    ),
    Entry(
        "key-channels-flip",
        "y(q D, k D, ..) = y(q, k, ..) for diagonal D of signs",
        "any spec whose key is an operand and no logarithm",
        "the same spec with flipped key channels",
        "ours",
        _key_sign,
        where(lambda s: s.key == "operand" and s.read.normalizer != "sum", without(log_evidence)),
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "keys-rotate",
        "y(q R, k R, ..) = y(q, k, ..) for orthogonal R",
        "specs in which no key channel is special",
        "the same spec on rotated keys and queries",
        "ours",
        _rotate_keys,
        _rotatable,
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "value-head-reads-its-group",
        "value head j reads query/key head floor(j / (HV / H))",
        "any spec with grouped heads",
        "the same spec with repeated query/key heads",
        "ours",
        _groups,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(heads=(2, 3), groups=(2, 2), start=None),
    ),
    Entry(
        "value-channels-are-heads",
        "HV heads of V channels = HV V heads of one channel",
        "any spec",
        "the same spec with every value channel as a head",
        "ours",
        _values_are_heads,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(values=(2, 3)),
    ),
    Entry(
        "idle-tokens-change-nothing",
        "k = 0, v = 0, gates 0, a = 1: the state stays",
        "any spec with a decay per token or none, and no lag",
        "the same spec without these tokens",
        "ours",
        _idle_tokens,
        where(
            _no_lag,
            without(log_evidence),
            lambda s: s.decay.shape == "none" or token_decay(s),
        ),
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "zero-write-gate-hides-values",
        "beta = 0: y and the state do not depend on v",
        "a spec with a write gate",
        "the same spec on other values",
        "ours",
        _zero_write,
        has("beta"),
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "zero-decay-resets",
        "a_t = 0: what follows does not depend on what was before token t",
        "a spec with a decay per token that predicts from the decayed state",
        "the same spec started at token t",
        "ours",
        _reset,
        where(
            token_decay,
            _no_lag,
            without(discounts),
            lambda s: s.erase.base == "decayed" and (not own_decay(s) or s.steps.count == 1),
        ),
        kind=Kind.INVARIANCE,
        domain=Domain(tokens=(1, 9)),
    ),
    Entry(
        "forgetting-composes",
        "idle tokens with decays a and a' = one idle token with decay a a'",
        "a spec with a decay per token, no lag",
        "the same spec with one token less",
        "ours",
        _decay_adds,
        where(
            token_decay,
            _no_lag,
            lambda s: s.key == "operand",
            # A mean of products is not the product of means.
            lambda s: s.decay.shape == "head" or not (isotropic(s) or rotated(s)),
        ),
        kind=Kind.INVARIANCE,
        domain=Domain(tokens=(1, 1), start=True),
    ),
    Entry(
        "importance-ignores-values-and-queries",
        "I_t is a function of keys and gates",
        "a spec with importance",
        "the same spec on other values and queries",
        "ours",
        _importance_ignores_values,
        without(frozen),
        kind=Kind.INVARIANCE,
    ),
)
