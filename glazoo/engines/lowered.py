"""Runs a program on kernel classes: derives each kernel's operands, calls it, and assembles output
and state.

`chunked` and `triton` share this module; they differ in the core operations that they hand to
`run`, and in the dtype in which these take their tokens (q, k, v and what follows from them). What
follows from several operands is computed in the compute dtype and rounded once, where it is handed
over; gates, states and normalisers are never rounded.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from glazoo.engines.call import Call, Result
from glazoo.engines.posterior import forgetting, over
from glazoo.program import Kernel
from glazoo.spec import Preconditioner
from glazoo.state import State

__all__ = ["Core", "run", "token_dtype"]


class Core(Protocol):
    """The core operations of an engine, one per kernel class, and the importance scan.

    An engine may have one more, `posterior_step`: a token of decoding of the classes whose
    importance is one vector over keys, in one piece and without gradients.
    """

    linear: Any
    delta: Any
    importance: Any
    synapse: Any
    synapse_delta: Any
    full: Any


class _Rounded:
    """Core operations that get their tokens in one dtype, and their gates as they are."""

    def __init__(self, core: Core, dtype: torch.dtype) -> None:
        self.core, self.dtype = core, dtype
        # Not every engine has it.
        self.one_step: Any = getattr(core, "posterior_step", None)

    def linear(self, q: Tensor, k: Tensor, w: Tensor, *gates: Tensor | None, **options: Any) -> Any:
        return self.core.linear(*self.round(q, k, w), *gates, **options)

    def delta(
        self, q: Tensor, e: Tensor, k: Tensor, w: Tensor, g: Tensor | None, **options: Any
    ) -> Any:
        return self.core.delta(*self.round(q, e, k, w), g, **options)

    def importance(self, k: Tensor, *gates: Tensor | None, **options: Any) -> Any:
        return self.core.importance(*self.round(k), *gates, **options)

    def synapse(
        self, q: Tensor, k: Tensor, w: Tensor, *gates: Tensor | None, **options: Any
    ) -> Any:
        return self.core.synapse(*self.round(q, k, w), *gates, **options)

    def synapse_delta(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor | None,
        e: Tensor | None,
        evidence: Tensor | None,
        **options: Any,
    ) -> Any:
        e, evidence = (None if x is None else x.to(self.dtype) for x in (e, evidence))
        tokens = self.round(q, k, v)
        return self.core.synapse_delta(*tokens, *gates, e=e, evidence=evidence, **options)

    def posterior_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor | None,
        e: Tensor | None,
        **options: Any,
    ) -> Any:
        e = None if e is None else e.to(self.dtype)
        return self.one_step(*self.round(q, k, v), *gates, e=e, **options)

    def full(self, q: Tensor, k: Tensor, w: Tensor, *gates: Tensor | None, **options: Any) -> Any:
        return self.core.full(*self.round(q, k, w), *gates, **options)

    def round(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(self.dtype) for x in tokens)


class _Tokens(NamedTuple):
    """Operands per sub-token."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    b: Tensor | None
    g_importance: Tensor | None
    p: Tensor | None
    """The key that predicts, where it is not k; times its own gate, if it has one."""
    removal: Tensor | None
    """The key along which is removed, where it is not k."""
    cu_seqlens: Tensor | None


class _Core(NamedTuple):
    """What a class gives back: output, memory, importance, uncertainty."""

    output: Tensor
    memory: Tensor
    importance: Tensor | None = None
    uncertainty: Tensor | None = None


def token_dtype(call: Call) -> torch.dtype:
    """Gives the narrowest dtype that holds the tokens of a call as they came."""
    tokens = [call.operands[o.name].dtype for o in call.program.operands if not o.wide]
    return functools.reduce(torch.promote_types, tokens)


def run(call: Call, core: Core, dtype: torch.dtype | None = None) -> Result:
    """Runs a program on the given core operations.

    Args:
        call: the validated call.
        core: the engine's core operations.
        dtype: dtype in which these take their tokens; the compute dtype if None.

    Returns:
        Output [B, T, HV, V], state, and uncertainty if asked for.
    """
    spec, state, wide = call.program.spec, call.initial_state, call.compute_dtype
    narrow = wide if dtype is None else dtype
    operands = {
        o.name: call.operands[o.name].to(wide if o.wide else narrow) for o in call.program.operands
    }
    call = replace(call, operands=operands)
    rounded = _Rounded(core, narrow)
    kernel = call.program.kernel
    with torch.autocast(device_type=call.operands["q"].device.type, enabled=False):
        x, lag = _sub_tokens(call)
        forms = {Kernel.SYNAPSE: _synapse, Kernel.SYNAPSE_DELTA: _synapse_delta, Kernel.FULL: _full}
        part = forms.get(kernel, _key_importance)(call, rounded, x)
        count = x.v.shape[1] // max(call.operands["q"].shape[1], 1)
        if count > 1:
            last = slice(count - 1, None, count)
            uncertainty = None if part.uncertainty is None else part.uncertainty[:, last]
            part = part._replace(output=part.output[:, last], uncertainty=uncertainty)
        output = part.output
        if spec.read.bonus:
            same = (
                call.operands["u"]
                * _to_value_heads(x.k, call.groups)
                * _to_value_heads(x.q, call.groups)
            )
            output = output + same.sum(-1, keepdim=True) * _times(x.beta, x.v)
        normalizer = None
        if spec.read.normalizer != "none":
            ones = _times(x.beta, x.v.new_ones(1).expand(*x.v.shape[:-1], 1))
            start = (
                None if state is None or state.normalizer is None else state.normalizer[..., None]
            )
            mass, sums = rounded.linear(
                x.q, x.k, ones, x.g, initial_state=start, cu_seqlens=x.cu_seqlens
            )
            normalizer, mass = sums[..., 0], mass.to(wide)
            output = output / (
                mass + spec.read.eps if spec.read.normalizer == "sum" else mass.abs().clamp(min=1)
            )
        uncertainty = None if part.uncertainty is None else part.uncertainty.to(wide)
    return Result(output, State(part.memory, part.importance, normalizer, *lag), uncertainty)


def _to_value_heads(x: Tensor, groups: int) -> Tensor:
    """Repeats the query/key heads of [B, T, H, ...] for the value heads that read them."""
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def _squares(q: Tensor, call: Call) -> Tensor:
    """Gives q^2 as the value heads see it, in the compute dtype: [B, T, HV, K]."""
    return _to_value_heads(q, call.groups).to(call.compute_dtype).square()


def _times(gate: Tensor | None, x: Tensor) -> Tensor:
    """Multiplies [B, T, HV, D] by a gate [B, T, HV] or [B, T, HV, D]."""
    if gate is None:
        return x
    return x * (gate if gate.ndim == x.ndim else gate[..., None])


def _interleave(*parts: Tensor) -> Tensor:
    """Puts sub-tokens side by side: n times [B, T, ...] gives [B, n T, ...]."""
    return torch.stack(parts, 2).flatten(1, 2)


def _positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Gives each packed token's sequence, and whether it is that sequence's first."""
    t = torch.arange(tokens, device=cu_seqlens.device)
    # `right`: a token belongs to the last sequence that starts at or before it, never to an empty
    # one.
    sequence = torch.searchsorted(cu_seqlens, t, right=True) - 1
    return sequence, t == cu_seqlens[sequence]


def _previous(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Shifts [B, T, ...] by one token; `first` [N, ...] (default zeros) stands before each
    sequence."""
    if x.shape[1] == 0:
        return x
    start = x.new_zeros(x.shape[:1] + x.shape[2:]) if first is None else first.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([start[:, None], x[:, :-1]], 1)
    sequence, is_first = _positions(cu_seqlens, x.shape[1])
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    if first is None:
        return torch.where(is_first.view(1, -1, *[1] * (x.ndim - 2)), torch.zeros_like(x), shifted)
    return torch.where(is_first.view(1, -1, *[1] * (x.ndim - 2)), start[sequence][None], shifted)


def _last(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Gives each sequence's last token [N, ...], or `first` where the sequence is empty, in the
    dtype of a state."""
    n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    zeros = x.new_zeros(n, *x.shape[2:], dtype=dtype)
    start = zeros if first is None else first.to(dtype)
    if x.shape[1] == 0:
        return start
    if cu_seqlens is None:
        return x[:, -1].to(dtype)
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).view(-1, *[1] * (x.ndim - 2))
    return torch.where(empty, start, x[0, (cu_seqlens[1:] - 1).clamp(min=0)].to(dtype))


def _sub_tokens(call: Call) -> tuple[_Tokens, tuple[Tensor | None, Tensor | None]]:
    """Expands several writes per token into sub-tokens, and forms erase keys, removals and the
    scaled query."""
    spec, ops, groups = call.program.spec, call.operands, call.groups
    q, v, cu = ops["q"] * call.scale, ops["v"], call.cu_seqlens
    g = ops.get("g")
    if g is not None and g.ndim == 1:
        g = g.expand(*q.shape[:2], g.shape[0])
    if spec.key == "one_minus_decay":
        assert g is not None
        k = -torch.expm1(g).to(q.dtype)
    else:
        k = ops["k"]
    beta, b = ops.get("beta"), ops.get("b")
    p = _to_value_heads(ops["p"], groups) if "p" in ops else None
    removal = None
    if spec.erase.strength == "own":
        gate = call.program.role("erase")
        assert gate is not None
        own = ops[gate.name]
        key = _to_value_heads(k, groups) if p is None else p
        p, removal = (own * key, None) if spec.erase.side == "prediction" else (key, own * key)
    tokens = _Tokens(q, k, v, g, beta, b, ops.get("g_importance"), p, removal, cu)
    n = spec.steps.count
    if n == 1:
        return tokens, (None, None)
    cu = None if cu is None else cu * n
    if spec.steps.source == "projected":
        # Only the last sub-token of a token is read, only the first one decays.
        q = _interleave(*[torch.zeros_like(q)] * (n - 1), q)
        g = None if g is None else _interleave(g, *[torch.zeros_like(g)] * (n - 1))
        return tokens._replace(q=q, g=g, cu_seqlens=cu), (None, None)
    state, trap = call.initial_state, ops["trap"]
    lag_key = None if state is None else state.lag_key
    lag_value = None if state is None else state.lag_value
    before_k = _previous(k, lag_key, call.cu_seqlens)
    before_v = _previous(v, lag_value, call.cu_seqlens)

    def taps(gate: Tensor | None) -> Tensor:
        if gate is None:
            return _interleave(1 - trap, trap)
        now = trap if gate.ndim == trap.ndim else trap[..., None]
        return _interleave(gate * (1 - now), gate * now)

    expanded = tokens._replace(
        q=_interleave(torch.zeros_like(q), q),
        k=_interleave(before_k, k),
        v=_interleave(before_v, v),
        g=None if g is None else _interleave(torch.zeros_like(g), g),
        beta=taps(beta),
        b=None if b is None else taps(b),
        cu_seqlens=cu,
    )
    dtype = call.compute_dtype
    last_key = _last(k, lag_key, call.cu_seqlens, dtype)
    return expanded, (last_key, _last(v, lag_value, call.cu_seqlens, dtype))


def _memory(call: Call) -> Tensor | None:
    return None if call.initial_state is None else call.initial_state.memory


def _importance(call: Call) -> Tensor | None:
    return None if call.initial_state is None else call.initial_state.importance


def _pair(call: Call) -> tuple[Tensor, Tensor] | None:
    """Gives memory and importance at the start, for the classes that keep both per synapse."""
    memory, importance = _memory(call), _importance(call)
    if memory is None:
        return None
    if importance is None:
        importance = torch.zeros_like(memory)
    return memory, importance


def _log_evidence(call: Call, x: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulates log sum exp of the keys: z_t, z_{t-1} and z at each sequence's end, over key
    heads."""
    groups, start, dtype = call.groups, _importance(call), call.compute_dtype
    k = _to_value_heads(x.k, groups).to(dtype)
    if start is None:
        n = k.shape[0] if x.cu_seqlens is None else len(x.cu_seqlens) - 1
        start = k.new_full((n, *k.shape[2:]), -torch.inf)
    if x.cu_seqlens is None:
        z = torch.logcumsumexp(k, 1) if k.shape[1] else k
        z = torch.logaddexp(z, start[:, None])
    else:
        # Segmented scan by doubling: after i rounds z_t covers the last 2^i tokens of its sequence.
        sequence, _ = _positions(x.cu_seqlens, k.shape[1])
        z, reach = k, 1
        while reach < k.shape[1]:
            same = torch.cat(
                [
                    torch.zeros_like(sequence[:reach], dtype=torch.bool),
                    sequence[reach:] == sequence[:-reach],
                ]
            )
            moved = torch.cat([torch.zeros_like(z[:, :reach]), z[:, :-reach]], 1)
            z = torch.logaddexp(z, moved.masked_fill(~same[None, :, None, None], -torch.inf))
            reach *= 2
        z = torch.logaddexp(z, start[sequence][None])
    return z, _previous(z, start, x.cu_seqlens), _last(z, start, x.cu_seqlens, dtype)


def _key_importance(call: Call, core: _Rounded, x: _Tokens) -> _Core:
    """Programs whose importance, if any, is one vector over keys: the matmul classes `linear` and
    `delta`."""
    spec, groups = call.program.spec, call.groups
    imp = spec.importance
    start, q, k, g = _memory(call), x.q, x.k, x.g
    if imp is None:
        unc = _squares(q, call).sum(-1) if call.uncertainty else None
        return _corrected(call, core, x, k, None, g, None)._replace(uncertainty=unc)
    if spec.log_evidence:
        z, before, last = _log_evidence(call, x)
        written = (_to_value_heads(k, groups) - z).exp()
        o, memory = core.linear(
            q, written, x.v, before - z, initial_state=start, cu_seqlens=x.cu_seqlens
        )
        unc = (_squares(q, call) * (-z).exp()).sum(-1) if call.uncertainty else None
        return _Core(o, memory, last, unc)
    if imp.preconditioner is None and _is_step(call, core, x):
        return _step(call, core, x)
    own = g if x.g_importance is None else x.g_importance
    total, last = core.importance(
        k, x.b, own, initial_state=_importance(call), cu_seqlens=x.cu_seqlens
    )
    if imp.preconditioner is not None:
        factor = _precondition(imp.preconditioner, total, call.operands["center"])
        part = _corrected(call, core, x, factor * _to_value_heads(k, groups), None, g, None)
        return part._replace(importance=last)
    prior, p = call.operands["prior"], spec.posterior
    previous = None
    if spec.read.when == "pre" or g is not None or p.gain == "exact":
        previous = _previous(total, _importance(call), x.cu_seqlens)
    read = total if spec.read.when == "post" or previous is None else previous
    unc = (_squares(q, call) / (read + prior)).sum(-1) if call.uncertainty else None
    if spec.hebbian:
        o, memory = core.linear(
            over(_to_value_heads(q, groups), read, prior),
            k,
            _times(x.beta, x.v),
            g,
            initial_state=start,
            read=spec.read.when,
            cu_seqlens=x.cu_seqlens,
        )
        return _Core(o, memory, last, unc)
    found: Tensor | None = None
    forget: Tensor | None = None
    if previous is not None and g is not None:
        forget, found = forgetting(previous, g if g.ndim == 4 else g[..., None], prior)
    elif previous is not None:
        found = previous + prior
    part = _corrected(call, core, x, k, (total, prior), forget, found)
    return part._replace(importance=last, uncertainty=unc)


def _is_step(call: Call, core: _Rounded, x: _Tokens) -> bool:
    """Whether this is a token of decoding that the engine has in one piece, wanted without
    gradients."""
    if x.v.shape[1] != 1 or x.cu_seqlens is not None or x.removal is not None:
        return False
    given = [*x, *(call.initial_state or ()), call.operands["prior"]]
    wanted = any(y is not None and y.requires_grad for y in given)
    return core.one_step is not None and not (wanted and torch.is_grad_enabled())


def _step(call: Call, core: _Rounded, x: _Tokens) -> _Core:
    spec, memory, importance = call.program.spec, _memory(call), _importance(call)
    assert x.b is not None
    o, (memory, importance), unc = core.posterior_step(
        x.q,
        x.k,
        x.v,
        x.beta,
        x.b,
        x.g,
        e=x.p,
        prior=call.operands["prior"],
        initial_state=None if memory is None or importance is None else (memory, importance),
        correction="none" if spec.hebbian else spec.posterior.correction,
        gain=spec.posterior.gain,
        read=spec.read.when,
        base=spec.erase.base,
        own=spec.erase.strength == "own",
        uncertainty=call.uncertainty,
    )
    return _Core(o, memory, importance, unc)


def _corrected(
    call: Call,
    core: _Rounded,
    x: _Tokens,
    k: Tensor,
    after: tuple[Tensor, Tensor] | None,
    g: Tensor | None,
    before: Tensor | None,
) -> _Core:
    """Runs a program on `linear` or `delta`, given importance after the token's own evidence (J and
    the prior) and before it (I')."""
    spec, groups, start = call.program.spec, call.groups, _memory(call)
    p, cu = spec.posterior, x.cu_seqlens
    if p.correction == "none":
        o, memory = core.linear(
            x.q, k, _times(x.beta, x.v), g, initial_state=start, read=spec.read.when, cu_seqlens=cu
        )
        return _Core(o, memory)
    if p.gain == "exact":
        key = _to_value_heads(k, groups)
        scaled = key if before is None else key / before
        rate = 1 / (1 + _times(x.beta, (key * scaled).sum(-1, keepdim=True)))
        rate = rate[..., 0] if x.beta is None else x.beta * rate[..., 0]
        if p.correction == "diagonal":
            gain = rate[..., None] * scaled
            kept = torch.log1p(-key * gain)
            g = kept if g is None else kept + (g if g.ndim == 4 else g[..., None])
            o, memory = core.linear(x.q, gain, x.v, g, initial_state=start, cu_seqlens=cu)
            return _Core(o, memory)
        o, memory = core.delta(
            x.q, _times(rate, key), scaled, _times(rate, x.v), g, initial_state=start, cu_seqlens=cu
        )
        return _Core(o, memory)
    e = _to_value_heads(x.k, groups) if x.p is None else x.p
    if spec.erase.strength == "write":
        e = _times(x.beta, e)
    w = _times(x.beta, x.v)
    if x.removal is not None:
        return _remove_then_write(call, core, x, e, w, after, g)
    if after is not None:
        k = over(_to_value_heads(k, groups), *after)
    o, memory = core.delta(
        x.q, e, k, w, g, initial_state=start, base=spec.erase.base, cu_seqlens=cu
    )
    return _Core(o, memory)


def _remove_then_write(
    call: Call,
    core: _Rounded,
    x: _Tokens,
    e: Tensor,
    w: Tensor,
    after: tuple[Tensor, Tensor] | None,
    g: Tensor | None,
) -> _Core:
    """Removal and write along different keys: two sub-tokens, of which only the second is read."""
    assert x.removal is not None
    removal, k = x.removal, _to_value_heads(x.k, call.groups)
    if after is not None:
        removal, k = over(removal, *after), over(k, *after)
    o, memory = core.delta(
        _interleave(torch.zeros_like(x.q), x.q),
        _interleave(e, torch.zeros_like(e)),
        _interleave(removal, k),
        _interleave(torch.zeros_like(w), w),
        None if g is None else _interleave(g, torch.zeros_like(g)),
        initial_state=_memory(call),
        base=call.program.spec.erase.base,
        cu_seqlens=None if x.cu_seqlens is None else 2 * x.cu_seqlens,
    )
    return _Core(o[:, 1::2], memory)


def _precondition(p: Preconditioner, importance: Tensor, center: Tensor) -> Tensor:
    """Gives base^(-softsign(log(J + eps) - center)), in [1 / base, base]."""
    x = (importance + p.eps).log() - center[:, None]
    return (-math.log(p.base) * x / (1 + x.abs())).exp()


def _synapse(call: Call, core: _Rounded, x: _Tokens) -> _Core:
    o, (memory, importance), unc = core.synapse(
        x.q,
        x.k,
        _times(x.beta, x.v),
        x.b,
        x.g,
        prior=call.operands["prior"].expand(-1, x.k.shape[-1]),
        initial_state=_pair(call),
        read=call.program.spec.read.when,
        uncertainty=call.uncertainty,
        cu_seqlens=x.cu_seqlens,
    )
    return _Core(o, memory, importance, unc)


def _synapse_delta(call: Call, core: _Rounded, x: _Tokens) -> _Core:
    spec = call.program.spec
    k, v, beta, p, q, g, cu = x.k, x.v, x.beta, x.p, x.q, x.g, x.cu_seqlens
    evidence, removes = None, x.removal is not None
    if spec.erase.strength == "own":
        # The write gate acts on the value alone.
        v, beta = _times(beta, v), None
    if x.removal is not None:
        # Two sub-tokens; the first sees all evidence, so that both use the same importance.
        assert p is not None
        key = _to_value_heads(k, call.groups)
        evidence = _interleave(key, torch.zeros_like(key))
        q, k, v = (
            _interleave(torch.zeros_like(q), q),
            _interleave(x.removal, key),
            _interleave(torch.zeros_like(v), v),
        )
        p, g = (
            _interleave(p, torch.zeros_like(p)),
            None if g is None else _interleave(g, torch.zeros_like(g)),
        )
        cu = None if cu is None else 2 * cu
    if beta is None:
        beta = v.new_ones(v.shape[:3], dtype=call.compute_dtype)
    b = x.b if x.b is None or not removes else _interleave(x.b, x.b)
    # The class keeps one importance per synapse; a head-shaped one is equal for all value channels.
    shared = b is not None and b.ndim == 3
    if b is not None and shared:
        b = b[..., None].expand(v.shape)
    prior, start = call.operands.get("prior"), _pair(call)
    if start is not None and start[1].ndim == 3:
        start = start[0], start[1][..., None].expand(start[0].shape)
    o, (memory, importance), unc = core.synapse_delta(
        q,
        k,
        v,
        beta,
        b,
        g,
        e=p,
        evidence=evidence,
        prior=k.new_ones(v.shape[2], k.shape[-1], dtype=call.compute_dtype)
        if prior is None
        else prior.expand(-1, k.shape[-1]),
        gain=spec.posterior.gain,
        correction=spec.posterior.correction,
        base=spec.erase.base,
        initial_state=start,
        uncertainty=call.uncertainty and spec.metaplastic,
        cu_seqlens=cu,
    )
    if removes:
        o, unc = o[:, 1::2], None if unc is None else unc[:, 1::2]
    if shared:
        importance, unc = importance[..., 0], None if unc is None else unc[..., 0]
    if call.uncertainty and not spec.metaplastic:
        unc = _squares(x.q, call).sum(-1)
    return _Core(o, memory, importance if spec.metaplastic else None, unc)


def _full(call: Call, core: _Rounded, x: _Tokens) -> _Core:
    o, (memory, importance), unc = core.full(
        x.q,
        x.k,
        _times(x.beta, x.v),
        x.beta,
        x.g,
        prior=call.operands["prior"].expand(-1, x.k.shape[-1]),
        initial_state=_pair(call),
        uncertainty=call.uncertainty,
        cu_seqlens=x.cu_seqlens,
    )
    return _Core(o, memory, importance, unc)
