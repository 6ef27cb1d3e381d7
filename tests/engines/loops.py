"""Per-token loops of the core operations: the oracle of the chunked engine's tests.

Each is the recurrence written down, one token after the other, in the dtype of its operands, and
differentiated by autograd. They share no code with the engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def spread(x: Tensor, heads: int) -> Tensor:
    """Repeats the heads of x [B, T, H, ...] up to `heads`."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def column(g: Tensor | None, t: int, like: Tensor) -> Tensor:
    """exp(g_t) as [B, HV, 1 or K, 1]."""
    if g is None:
        return torch.ones((), dtype=like.dtype)
    decay = g[:, t].exp().unsqueeze(-1)
    return decay.unsqueeze(-1) if g.dim() == 3 else decay


def stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows, dim=1) if rows else like


def linear(q, k, w, g=None, *, initial_state=None, read="post"):
    batch, tokens, heads, size = w.shape
    q, k = spread(q, heads), spread(k, heads)
    state = w.new_zeros(batch, heads, k.shape[3], size) if initial_state is None else initial_state
    out = []
    for t in range(tokens):
        new = column(g, t, w) * state + k[:, t].unsqueeze(-1) * w[:, t].unsqueeze(-2)
        source = new if read == "post" else state
        out.append((source * q[:, t].unsqueeze(-1)).sum(-2))
        state = new
    return stack(out, w), state


def delta(q, e, k, w, g=None, *, initial_state=None, base="decayed"):
    batch, tokens, heads, size = w.shape
    q, e, k = spread(q, heads), spread(e, heads), spread(k, heads)
    state = w.new_zeros(batch, heads, k.shape[3], size) if initial_state is None else initial_state
    out = []
    for t in range(tokens):
        decayed = column(g, t, w) * state
        source = decayed if base == "decayed" else state
        error = w[:, t] - (source * e[:, t].unsqueeze(-1)).sum(-2)
        state = decayed + k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        out.append((state * q[:, t].unsqueeze(-1)).sum(-2))
    return stack(out, w), state


def delta_at_once(q, e, k, w, g=None, *, initial_state=None, base="decayed"):
    """The delta rule as one triangular system over all tokens, another way to round it."""
    batch, tokens, heads, size = w.shape
    q, e, k = spread(q, heads), spread(e, heads), spread(k, heads)
    keys = k.shape[3]
    state = w.new_zeros(batch, heads, keys, size) if initial_state is None else initial_state
    # between[t][:, :, j]: product of the decays of tokens j .. t, of j = 0 .. t + 1
    row = w.new_ones(batch, heads, 1, keys)
    between = [row]
    for t in range(tokens):
        decay = column(g, t, w).squeeze(-1).unsqueeze(-2) if g is not None else row.new_ones(())
        row = torch.cat((row * decay, w.new_ones(batch, heads, 1, keys)), dim=2)
        between.append(row)
    reads, system, start = [], [], []
    for t in range(tokens):
        key = k[:, : t + 1].transpose(1, 2)
        past = between[t + 1] if base == "decayed" else between[t]
        erase = (past[:, :, 1 : t + 1] * key[:, :, :t] * e[:, t].unsqueeze(2)).sum(-1)
        read = (between[t + 1][:, :, 1 : t + 2] * key * q[:, t].unsqueeze(2)).sum(-1)
        system.append(torch.nn.functional.pad(erase, (0, tokens - t)))
        reads.append(torch.nn.functional.pad(read, (0, tokens - t - 1)))
        start.append(past[:, :, 0] * e[:, t])
    if not tokens:
        return w, state
    right = w.transpose(1, 2) - torch.stack(start, 2) @ state
    matrix = torch.stack(system, 2)[..., :tokens] + torch.eye(tokens, dtype=w.dtype)
    errors = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
    first = torch.stack([between[t + 1][:, :, 0] * q[:, t] for t in range(tokens)], 2)
    out = torch.stack(reads, 2) @ errors + first @ state
    tail = between[tokens][:, :, 1:] * k.transpose(1, 2)
    final = between[tokens][:, :, 0].unsqueeze(-1) * state + tail.transpose(-1, -2) @ errors
    return out.transpose(1, 2), final


def importance(k, b, g=None, *, initial_state=None):
    batch, tokens, heads = b.shape
    k = spread(k, heads)
    state = b.new_zeros(batch, heads, k.shape[3]) if initial_state is None else initial_state
    out = []
    for t in range(tokens):
        state = column(g, t, b).squeeze(-1) * state + b[:, t].unsqueeze(-1) * k[:, t] ** 2
        out.append(state)
    return stack(out, k), state


def spread_prior(prior: Tensor) -> Tensor:
    """prior [HV] or [HV, K] as [HV, 1 or K, 1]."""
    return prior.view(prior.shape[0], -1, 1)


def synapse(q, k, w, b, g=None, *, prior, initial_state=None, read="post", uncertainty=False):
    batch, tokens, heads, size = w.shape
    q, k = spread(q, heads), spread(k, heads)
    zero = w.new_zeros(batch, heads, k.shape[3], size)
    h, j = (zero, zero) if initial_state is None else initial_state
    floor = spread_prior(prior)
    out, doubt = [], []
    for t in range(tokens):
        decay = column(g, t, w)
        key, query = k[:, t].unsqueeze(-1), q[:, t].unsqueeze(-1)
        new_h = decay * h + key * w[:, t].unsqueeze(-2)
        new_j = decay * j + key**2 * b[:, t].unsqueeze(-2)
        read_h, read_j = (new_h, new_j) if read == "post" else (h, j)
        out.append((read_h / (read_j + floor) * query).sum(-2))
        doubt.append((query**2 / (read_j + floor)).sum(-2))
        h, j = new_h, new_j
    return stack(out, w), (h, j), stack(doubt, w) if uncertainty else None


def synapse_delta(
    q,
    k,
    v,
    beta,
    b,
    g=None,
    *,
    e=None,
    prior,
    gain="first_order",
    correction="full",
    initial_state=None,
    base="decayed",
    uncertainty=False,
):
    batch, tokens, heads, size = v.shape
    e = k if e is None else e
    q, k, e = spread(q, heads), spread(k, heads), spread(e, heads)
    zero = v.new_zeros(batch, heads, k.shape[3], size)
    mu, j = (zero, zero) if initial_state is None else initial_state
    if b is None:
        j = torch.zeros_like(mu)
    floor = spread_prior(prior)
    beta = beta.unsqueeze(-1) if beta.dim() == 3 else beta
    out, doubt = [], []
    for t in range(tokens):
        decay = column(g, t, v)
        key, query, eraser = (x[:, t].unsqueeze(-1) for x in (k, q, e))
        rate = beta[:, t].unsqueeze(-2)
        value = v[:, t].unsqueeze(-2)
        predicted = decay * j
        if b is None:
            new_j, before = j, decay * mu
        else:
            gate = b[:, t].unsqueeze(-1) if b.dim() == 3 else b[:, t]
            new_j = predicted + key**2 * gate.unsqueeze(-2)
            before = decay * (j + floor) / (predicted + floor) * mu
        if gain == "first_order":
            source = before if base == "decayed" else mu
            error = rate * value - rate * (source * eraser).sum(-2, keepdim=True)
            new_mu = before + key / (new_j + floor) * error
        else:
            certainty = predicted + floor
            found = (key**2 / certainty).sum(-2, keepdim=True)
            total = 1 + rate * found
            if gain == "exact_rate":
                length = key.square().sum(-2, keepdim=True)
                s = rate * length
                # No 0 / 0 where a key is zero, nor its gradient.
                unit = length.where(length > 0, torch.ones_like(length))
                total = torch.where(s < 1, total - s, found / unit)
            strength = rate / total
            step = key / certainty * strength
            if correction == "full":
                source = before if base == "decayed" else mu
                new_mu = before + step * (value - (source * eraser).sum(-2, keepdim=True))
            else:
                new_mu = before * (1 - key * step) + step * value
        mu, j = new_mu, new_j
        out.append((mu * query).sum(-2))
        doubt.append((query**2 / (j + floor)).sum(-2))
    return stack(out, v), (mu, j), stack(doubt, v) if uncertainty else None


def full(q, k, w, beta, g=None, *, prior, initial_state=None, uncertainty=False):
    batch, tokens, heads, size = w.shape
    q, k = spread(q, heads), spread(k, heads)
    keys = k.shape[3]
    if initial_state is None:
        memory, matrix = (
            w.new_zeros(batch, heads, keys, size),
            w.new_zeros(batch, heads, keys, keys),
        )
    else:
        memory, matrix = initial_state
    out, doubt = [], []
    for t in range(tokens):
        decay = column(g, t, w)
        key = k[:, t].unsqueeze(-1)
        memory = decay * memory + key * w[:, t].unsqueeze(-2)
        matrix = decay * matrix + beta[:, t, :, None, None] * key * key.transpose(-1, -2)
        solved = torch.linalg.solve(matrix + torch.diag_embed(prior), q[:, t].unsqueeze(-1))
        out.append((memory * solved).sum(-2))
        doubt.append((q[:, t].unsqueeze(-1) * solved).sum((-1, -2)))
    return stack(out, w), (memory, matrix), stack(doubt, beta) if uncertainty else None


def packed(
    loop: Callable[..., tuple],
    operands: Sequence[Tensor | None],
    borders: Sequence[int],
    states: Sequence[Tensor] | Tensor | None,
    **options: object,
) -> list[tuple]:
    """Runs a loop on each sequence of a pack with its own initial state."""
    found = []
    for i, (first, stop) in enumerate(itertools.pairwise(borders)):
        part = [None if x is None else x[:, first:stop] for x in operands]
        if states is None:
            state = None
        elif isinstance(states, Tensor):
            state = states[i : i + 1]
        else:
            state = tuple(s[i : i + 1] for s in states)
        found.append(loop(*part, initial_state=state, **options))
    return found
