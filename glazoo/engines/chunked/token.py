"""A token of decoding in as few tensor operations as it takes, and a loop over none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glazoo.engines.call import Call, Given, Result, TokenRun
from glazoo.kernels.loops import without_autocast
from glazoo.program import OneToken
from glazoo.program.elementwise import exact_strength
from glazoo.state import State


def token(call: Call, given: Given, piece: OneToken) -> TokenRun | None:
    """Prepare all of a token of decoding that does not depend on its numbers.

    Args:
        call: a valid call.
        given: what it was made of.
        piece: its program.

    Returns:
        What runs calls like it; None for what has an entry per synapse.
    """
    if piece.synapse:
        return None
    wide, scale, heads = call.compute_dtype, call.scale, call.operands["v"].shape[2]
    asked, exact = call.uncertainty, piece.gain != "first_order"
    rate, post, none = piece.gain == "exact_rate", piece.read == "post", piece.correction == "none"
    fixed = {n: x.to(wide) for n, x in call.operands.items() if not isinstance(given[n], Tensor)}

    def row(x: Tensor) -> Tensor:
        """A token's vectors as rows [B, HV, 1, D]."""
        x = x.transpose(1, 2)
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)

    def gate(x: Tensor) -> Tensor:
        """A token's gate as rows, [B, HV, 1, D] or [B, HV, 1, 1]; a fixed one has no token."""
        if x.dim() == 1:
            return x.view(1, -1, 1, 1)
        return x.transpose(1, 2) if x.dim() == 4 else x.transpose(1, 2).unsqueeze(-1)

    def take(given: Given, name: str | None) -> Any:
        if name is None:
            return None
        x: Any = fixed.get(name)
        if x is None:
            x = given[name]
        return x if x is None or x.dtype == wide else x.to(wide)

    def run_token(given: Given, state: State | None) -> Result:
        q, v = row(take(given, "q")), row(take(given, "v"))
        g = take(given, piece.g)
        beta, b = take(given, piece.beta), take(given, piece.b)
        beta = None if beta is None else gate(beta)
        with without_autocast(q):
            if scale != 1:
                q = q * scale
            k = -gate(g).expm1() if piece.tied else row(take(given, "k"))
            e = k if piece.p is None else row(take(given, piece.p))
            if piece.erase is not None:
                e = gate(take(given, piece.erase)) * e
            decay = None if g is None else gate(g).exp()
            factor, gain, strength, reader, importance = decay, k, beta, q, None
            doubt = None
            if b is not None:
                prior = take(given, "prior")
                prior = prior.reshape(-1, 1, prior.shape[-1] if prior.dim() == 2 else 1)
                importance = gate(b) * (k * k)
                if state is None:
                    old = torch.zeros_like(importance)
                else:
                    assert state.importance is not None
                    old = state.importance.to(wide).unsqueeze(2)
                kept = old if decay is None else decay * old
                importance = kept + importance
                seen = (importance if post else old) + prior
                if none:
                    reader = q / seen
                else:
                    found = kept + prior
                    if decay is not None:
                        factor = decay * (old + prior) / found
                    gain = k / (found if exact else importance + prior)
                if asked:
                    doubt = (q * q / seen).sum(-1)
            elif asked:
                doubt = (q * q).sum(-1)
            if exact:
                square = (k * k).sum(-1, keepdim=True) if rate else None
                strength = exact_strength(beta, (k * gain).sum(-1, keepdim=True), square)
            if state is None:
                memory = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
            else:
                memory = state.memory if state.memory.dtype == wide else state.memory.to(wide)
            decayed = memory if factor is None else factor.mT * memory
            own = piece.erase is not None
            if none or own or piece.correction == "diagonal":
                v = v if strength is None else strength * v
            if piece.correction == "diagonal":
                own_gain = gain if strength is None else gain * strength
                new = decayed * (1 - k * own_gain).mT + gain.mT * v
            elif none:
                new = torch.addcmul(decayed, gain.mT, v)
            else:
                error = v - e @ (decayed if piece.base == "decayed" else memory)
                if not (own or strength is None):
                    error = strength * error
                new = torch.addcmul(decayed, gain.mT, error)
            y = reader @ (new if post else memory)
        return Result(
            y.transpose(1, 2),
            State(new, None if importance is None else importance.squeeze(2)),
            None if doubt is None else doubt.transpose(1, 2),
        )

    return run_token
