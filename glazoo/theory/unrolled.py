"""Every recurrence without recurrence: all tokens at once, as weighted sums over the past.

A Hebbian memory is a decayed sum of writes. A memory that subtracts predictions is one too, of
writes that solve a triangular system; the full posterior is a least squares problem, or, where the
variance grows, a Gaussian process. These forms hold every pair of tokens in memory and are here to
check engines, never to replace one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from glazoo.program import Program
from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.instances import Operands
from glazoo.theory.maps import expand_value_heads, explicit

__all__ = ["Unrolled", "importance", "unrolled", "with_prior"]


class Unrolled(NamedTuple):
    """What the dense form gives, in float64."""

    output: Tensor
    """[B, T, HV, V]."""
    memory: Tensor
    """[B, HV, K, V], after the last token."""
    importance: Tensor | None
    """J after every token [B, T, HV, V, K] ([B, T, HV, K, K] for full precision)."""


class _Writes(NamedTuple):
    """What is written, on axes [B, M, HV, V, K]; a size of one broadcasts. Keys are in the basis of
    the memory."""

    decay: Tensor
    noise: Tensor | None
    k: Tensor
    v: Tensor
    beta: Tensor
    b: Tensor
    e: Tensor
    """The key that predicts, times its own gate if it has one, but not the write gate."""
    removal: Tensor | None
    """The key along which is removed, where it is not the written one."""
    per_token: int


class _Precision(NamedTuple):
    """Importance at every write."""

    J: Tensor
    """After it, above the prior, [B, M, HV, V, K]; a matrix over keys [B, M, HV, K, K], or its
    covariance above that of the prior."""
    before: Callable[[Tensor], Tensor]
    """Divides vectors [B, M, HV, V, K] by the importance that each write finds."""
    after: Callable[[Tensor], Tensor]
    """Divides them by the one that it leaves."""
    forget: Tensor
    """What the decay leaves of the mean: a factor, or for a precision matrix a matrix."""


def unrolled(program: Program, operands: Operands, state: State | None = None) -> Unrolled:
    """Evaluates a program densely in float64.

        Hebbian      h_t = sum_s D_ts k_s w_s^T,  J_t = sum_s D_ts b_s k_s^2,
                     y_t = (h_t / I_t)^T q_t
        delta rule   (1 + L) u = w - e^T D_0 S_0,  L_ts = e_t . (D_ts kappa_s) for s < t,
                     S_t = sum_s D_ts kappa_s u_s
        full         y_t = G_t^T (H_t + Lambda)^-1 q_t, or one linear system for all means
        diffuse      I_t = (A_t I_0 + B_t) / (C_t I_0 + D_t) from products of 2 x 2 matrices; full:
                     P_t = Var(x_t | k_s^T x_s + noise / b_s, s <= t), x_t a Gaussian process

    with D_ts the product of the decays of tokens s + 1 to t.

    Args:
        program: the program of any spec.
        operands: by name.
        state: where it starts; default: nothing written.

    Returns:
        Output, final memory and importance.
    """
    spec = program.spec
    ops, state = _doubles(program, operands, state)
    keys = ops["q"].shape[-1]
    q = (spec.scale(keys) * ops["q"])[..., None, :]
    if not q.shape[1]:
        # Nothing happened.
        v = ops["v"]
        empty = v.new_zeros(v.shape[0], v.shape[2], keys, v.shape[3])
        return Unrolled(v[:, :0], empty if state is None else state.memory, None)
    if spec.log_evidence:
        return _slots(ops, q, state)
    w = _writes(program, ops, state)
    if spec.turned:
        q = _turn(q, ops["basis"])
    precision = None if spec.importance is None else _precision(program, ops, w, state)
    memory, mean = _memory(program, ops, w, precision, state)
    n = w.per_token
    if spec.read.when == "pre":
        before = mean.new_zeros(mean[:, :1].shape)
        if state is not None:
            before = state.memory.mT[:, None]
            if precision is not None and not spec.memory_is_mean:
                before = before / (_start(state, mean) + _over_keys(ops["prior"]))
        mean = torch.cat([before, mean[:, :-1]], 1)
    y = (mean[:, n - 1 :: n] * q).sum(-1)
    if "mix" in ops:
        mix = ops["mix"][..., None]
        y = mix * y + (1 - mix) * (memory[:, n - 1 :: n] * q).sum(-1)
    if spec.read.bonus:
        same = ((ops["u"][:, None] * w.k) * q).sum(-1)
        y = y + same * (w.beta * w.v)[..., 0]
    if spec.read.normalizer != "none":
        n0 = None if state is None or state.normalizer is None else state.normalizer
        mass = _sums(w.decay, w.beta * w.k, None if n0 is None else n0[:, :, None])
        total_mass = (mass[:, n - 1 :: n] * q).sum(-1)
        if spec.read.normalizer == "sum":
            y = y / (total_mass + spec.read.eps)
        else:
            y = y / total_mass.abs().clamp(min=1)
    J = None if precision is None else precision.J[:, n - 1 :: n]
    return Unrolled(y, memory[:, -1].mT, J)


def importance(program: Program, operands: Operands, state: State | None = None) -> Tensor:
    """Return J after every token as a sum over the past, [B, T, HV, V, K] (V = 1 where shared);
    for full precision the matrix [B, T, HV, K, K], H or the covariance above that of the prior."""
    spec = program.spec
    if spec.importance is None:
        raise ValueError(f"program: {spec.name!r} keeps no importance over keys")
    ops, state = _doubles(program, operands, state)
    w = _writes(program, ops, state)
    return _precision(program, ops, w, state).J[:, w.per_token - 1 :: w.per_token]


def _doubles(
    program: Program, operands: Operands, state: State | None
) -> tuple[Operands, State | None]:
    """Return operands per value head, decays spelt out, and the state, in float64."""
    ops = explicit(program, expand_value_heads(program, operands))
    ops = {name: x.double() for name, x in ops.items()}
    return ops, None if state is None else state.map(Tensor.double)


def _over_keys(prior: Tensor) -> Tensor:
    """Return a prior as [1, 1, HV, 1, K] or with K = 1."""
    if prior.ndim == 0:
        return prior
    return (prior[:, None] if prior.ndim == 1 else prior)[None, None, :, None, :]


def _rows(x: Tensor) -> Tensor:
    """Puts a gate per head [B, M, HV] or per value [B, M, HV, V] on axes [B, M, HV, V, K]."""
    return x[..., None] if x.ndim == 4 else x[..., None, None]


def _channels(x: Tensor) -> Tensor:
    """Puts a gate per head [B, M, HV] or per key [B, M, HV, K] on axes [B, M, HV, V, K]."""
    return x[..., None, :] if x.ndim == 4 else x[..., None, None]


def _turn(x: Tensor, basis: Tensor) -> Tensor:
    """Return vectors [B, M, HV, V, K] in the basis of the importance [HV, K, K]."""
    return torch.einsum("bmhvk,hkj->bmhvj", x, basis)


def _writes(program: Program, ops: Operands, state: State | None) -> _Writes:
    spec, n = program.spec, program.spec.substeps
    v, g, noise = ops["v"][..., None], ops.get("g"), ops.get("noise")
    batch, count, heads = v.shape[:3]
    one = v.new_ones(batch, count, heads, 1, 1)
    if g is None:
        decay = one[:, ::n]
    elif g.ndim == 1:
        decay = g.exp()[None, None, :, None, None].expand(batch, count // n, heads, 1, 1)
    else:
        decay = _channels(g.exp())
    noise = None if noise is None else _channels(noise)
    k = 1 - decay if spec.key == "one_minus_decay" else ops["k"][..., None, :]
    beta = _rows(ops["beta"]) if "beta" in ops else one
    b = _rows(ops["b"]) if "b" in ops else beta
    e = ops["p"][..., None, :] if "p" in ops else k
    gate, removal = program.role("erase"), None
    if gate is not None:
        own = ops[gate.name][..., None, :] * e
        e, removal = (e, own) if spec.erase.side == "removal" else (own, None)
    if spec.turned:
        k, e = (_turn(x, ops["basis"]) for x in (k, e))
    if n > 1:
        decay = _first(decay, 1, n)
        noise = None if noise is None else _first(noise, 0, n)
    if spec.steps.source != "lagged":
        return _Writes(decay, noise, k, v, beta, b, e, removal, n)
    trap = _rows(ops["trap"])
    first_k, first_v = torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])
    if state is not None and state.lag_key is not None and state.lag_value is not None:
        groups = heads // state.lag_key.shape[1]
        first_k = state.lag_key.repeat_interleave(groups, 1)[:, None, :, None]
        first_k = _turn(first_k, ops["basis"]) if spec.turned else first_k
        first_v = state.lag_value[:, None, ..., None]
    lag_k = torch.cat([first_k, k[:, :-1]], 1)[:, :count]
    lag_v = torch.cat([first_v, v[:, :-1]], 1)[:, :count]

    def pair(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x.expand_as(y) if x.shape != y.shape else x, y], 2).flatten(1, 2)

    keys = pair(lag_k, k)
    return _Writes(
        pair(torch.ones_like(decay), decay),
        None if noise is None else pair(torch.zeros_like(noise), noise),
        keys,
        pair(lag_v, v),
        pair(beta * (1 - trap), beta * trap),
        pair(b * (1 - trap), b * trap),
        keys,
        None,
        2,
    )


def _first(x: Tensor, later: float, n: int) -> Tensor:
    """Return what acts on a token as what acts on its first write, with a number for the others."""
    rest = torch.full_like(x, later)
    return torch.stack([x, *[rest] * (n - 1)], 2).flatten(1, 2)


def _products(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return D_ts [B, t, s, ...] (zero for s > t), and the start's own decay until t."""
    batch, count = decay.shape[:2]
    D = decay.new_zeros(batch, count, count, *decay.shape[2:])
    for t in range(count):
        if t:
            D[:, t, :t] = D[:, t - 1, :t] * decay[:, t, None]
        D[:, t, t] = 1
    return D, decay.cumprod(1)


def _sums(decay: Tensor, written: Tensor, start: Tensor | None) -> Tensor:
    """Return sum_s D_ts written_s plus the decayed start, after every write."""
    D, since = _products(decay)
    total = (D * written[:, None]).sum(2)
    return total if start is None else total + since * start[:, None]


def _start(state: State | None, like: Tensor) -> Tensor:
    """Return the importance above the prior that a state has, [B, 1, HV, V, K]."""
    if state is None or state.importance is None:
        return like.new_zeros(like.shape[0], 1, *like.shape[2:])
    x = state.importance
    return (x[:, :, None] if x.ndim == 3 else x.mT)[:, None]


def _shifted(x: Tensor, first: Tensor) -> Tensor:
    """Return what every write finds of what it leaves."""
    return torch.cat([first.expand_as(x[:, :1]), x[:, :-1]], 1)


def _precision(program: Program, ops: Operands, w: _Writes, state: State | None) -> _Precision:
    spec, imp = program.spec, program.spec.importance
    assert imp is not None
    if spec.posterior.precision == "full":
        return (_process if spec.forgetting == "diffuse" else _matrices)(spec, ops, w, state)
    axes = imp.basis == "rotated" and not spec.turned
    isotropic = spec.posterior.precision == "isotropic"
    square, keep = (_turn(w.k, ops["basis"]) if axes else w.k).square(), w.decay.square()
    if axes and keep.shape[-1] > 1:
        keep = _turn(keep, ops["basis"].square())
    if isotropic:
        square, keep = square.mean(-1, keepdim=True), keep.mean(-1, keepdim=True)
    evidence = w.b * square
    start, I_p = _start(state, evidence), _over_keys(ops.get("prior", square.new_zeros(())))
    forget = w.decay
    if spec.forgetting == "diffuse":
        J, decayed = _moebius(keep, w.noise, evidence, start, I_p)
    elif spec.forgetting == "discount":
        total = _sums(w.decay, evidence, (start + I_p)[:, 0])
        J, decayed = total - I_p, w.decay * _shifted(total, start + I_p) - I_p
        forget = torch.ones_like(forget)
    else:
        decay = w.decay
        if "g_importance" in ops:
            decay = _rows(ops["g_importance"]).exp()
        J = _sums(decay, evidence, start[:, 0])
        before = _shifted(J, start)
        decayed = decay * before
        if imp.preconditioner is None:
            forget = forget * (before + I_p) / (decayed + I_p)
    if imp.preconditioner is not None:
        level = (J + imp.preconditioner.eps).log() - ops["center"].reshape(-1, 1, 1)
        factor = imp.preconditioner.base ** (-level / (1 + level.abs()))
        return _Precision(J, lambda x: x, lambda x: x * factor, forget)

    def over(x: Tensor, total: Tensor) -> Tensor:
        if axes:
            return _turn(_turn(x, ops["basis"]) / total, ops["basis"].mT)
        return x / total

    return _Precision(J, lambda x: over(x, decayed + I_p), lambda x: over(x, J + I_p), forget)


def _moebius(
    keep: Tensor, noise: Tensor | None, evidence: Tensor, start: Tensor, I_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Return J after every write and before its evidence where the variance grows: the image of the
    start under products of 2 x 2 matrices."""
    if noise is None:
        # z = a^2 z / (l z + 1) + u on what lies above the prior.
        a, c, d, shift = keep, (1 - keep) / I_p, torch.ones_like(keep), torch.zeros_like(I_p)
    else:
        # z = z / (n z + a^2) + u on all of it.
        a, c, d, shift = torch.ones_like(keep), noise, keep, I_p
    a, c, d, u = torch.broadcast_tensors(a, c, d, evidence)
    maps = torch.stack([torch.stack([a + u * c, u * d], -1), torch.stack([c, d], -1)], -2)
    product, products = torch.eye(2, dtype=u.dtype).expand(maps.shape[0], *maps.shape[2:]), []
    for t in range(maps.shape[1]):
        product = maps[:, t] @ product
        # A common factor changes no map.
        product = product / product.abs().amax((-1, -2), keepdim=True)
        products.append(product)
    if not maps.shape[1]:
        return u, u
    z = (start + shift).expand_as(u[:, :1])
    image = torch.stack(products, 1) @ torch.stack([z, torch.ones_like(z)], -1)[..., None]
    after = image[..., 0, 0] / image[..., 1, 0]
    found = _shifted(after, z)
    return after - shift, a * found / (c * found + d) - shift


def _through(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a product with symmetric matrices [B, M, HV, K, K]."""
    return lambda x: x @ matrix


def _matrices(spec: Spec, ops: Operands, w: _Writes, state: State | None) -> _Precision:
    """Precision matrices as sums over the past."""
    first = None if state is None else state.importance
    H = _sums(w.decay, w.b * w.k * w.k.mT, first)
    before = _shifted(H, torch.zeros_like(H[:, :1]) if first is None else first[:, None])
    found, left = with_prior(spec, ops, w.decay * before), with_prior(spec, ops, H)
    return _Precision(
        H,
        lambda x: torch.linalg.solve(found, x.mT).mT,
        lambda x: torch.linalg.solve(left, x.mT).mT,
        torch.linalg.solve(found, w.decay * with_prior(spec, ops, before)),
    )


def with_prior(spec: Spec, operands: Operands, H: Tensor) -> Tensor:
    """Return matrices [B, T, HV, K, K] above the prior with it."""
    prior, imp = operands["prior"].to(H.dtype), spec.importance
    prior = prior if prior.ndim == 2 else prior.reshape(-1, 1)
    if imp is not None and imp.prior.shape == "relative":
        prior = prior * torch.linalg.matrix_norm(H)[..., None] + imp.prior.floor
    return H + torch.diag_embed(prior.expand(H.shape[:-1]))


def _process(_: Spec, ops: Operands, w: _Writes, state: State | None) -> _Precision:
    """The memory as a Gaussian process x_t = a_t x_{t-1} + noise: its covariance over all tokens,
    conditioned on what was seen, k_s^T x_s with precision b_s."""
    k, decay = w.k[..., 0, :], (w.decay * torch.ones_like(w.k))[..., 0, :]
    variance = _over_keys(1 / ops["prior"])[..., 0, :]
    D, since = _products(decay)
    # Above that of the prior, which the decay's own noise keeps where it is.
    above = torch.zeros_like(torch.diag_embed(decay))
    if state is not None and state.importance is not None:
        above = since[..., None] * state.importance[:, None] * since[..., None, :]
    if w.noise is not None:
        lost = w.noise[..., 0, :] - (1 - decay.square()) * variance
        above = above + torch.diag_embed((D.square() * lost[:, None]).sum(2))
    whole = above + torch.diag_embed(variance.expand_as(decay))
    seen = (whole @ k[..., None])[..., 0]
    # Cov(x_t, k_s^T x_s) for s <= t, and for s > t by symmetry where it is needed.
    cross = D * seen[:, None]
    gram = torch.einsum("bthk,btshk->bhts", k, cross)
    gram = gram.tril() + gram.tril(-1).mT
    count = k.shape[1]
    root = w.b[..., 0, 0].sqrt().movedim(1, 2)

    def given(past: Tensor) -> Tensor:
        """Return what the observations of a mask [t, s] take away, [B, M, HV, K, K]."""
        r = root[:, :, None] * past.to(root.dtype)
        system = r[..., None] * gram[:, :, None] * r[..., None, :]
        system = system + torch.eye(count, dtype=system.dtype)
        c = r[..., None] * cross.movedim(3, 1)
        taken: Tensor = c.mT @ torch.linalg.solve(system, c)
        return taken.movedim(1, 2)

    before = torch.ones(count, count, dtype=torch.bool).tril(-1)
    C = above - given(before | torch.eye(count, dtype=torch.bool))
    found = whole - given(before)
    left = C + torch.diag_embed(variance.expand_as(decay))
    return _Precision(C, _through(found), _through(left), w.decay)


def _memory(
    program: Program, ops: Operands, w: _Writes, precision: _Precision | None, state: State | None
) -> tuple[Tensor, Tensor]:
    """Return memory and mean after every write, [B, M, HV, V, K]."""
    spec, start = program.spec, None if state is None else state.memory.mT
    target = w.beta * w.v * torch.ones_like(w.v * w.k)[..., :1]
    if spec.sums_writes:
        memory = _sums(w.decay, w.k * (w.beta * w.v), start)
        return memory, memory if precision is None else precision.after(memory)
    if precision is None:
        precision = _Precision(w.b, lambda x: x, lambda x: x, w.decay)
    if spec.hebbian:
        mean = _observed(program, w, precision, target, start)
    elif spec.memory_is_mean:
        mean = _corrected(program, w, precision, target, start)
    else:
        return _solved(program, ops, w, precision, target, state)
    return mean, mean


def _observed(
    program: Program, w: _Writes, precision: _Precision, target: Tensor, start: Tensor | None
) -> Tensor:
    """The mean of a Hebbian memory whose variance grows."""
    p, imp = program.spec.posterior, program.spec.importance
    assert imp is not None
    if p.precision == "diagonal" and imp.basis == "own":
        # Every synapse corrects its own part: I' of it is left.
        left = 1 - w.b * w.k * precision.after(w.k)
        return _sums(precision.forget * left, precision.after(w.k) * target, start)
    found = precision.before(w.k)
    gain = found / (1 + w.b * (w.k * found).sum(-1, keepdim=True))
    ones = torch.ones_like(target * w.k)
    e = w.b * w.k * ones
    return _triangular(precision.forget * ones, e, gain * ones, target, start, prev=False)


def _gain(program: Program, w: _Writes, precision: _Precision) -> tuple[Tensor, Tensor]:
    """Return the key along which a prediction error is written, and its strength."""
    p = program.spec.posterior
    length = w.k.square().sum(-1, keepdim=True)
    if p.gain == "first_order":
        return precision.after(w.k), w.beta
    key = precision.before(w.k)
    found = (w.k * key).sum(-1, keepdim=True)
    if p.gain == "flow":
        rate = -torch.expm1(-w.beta * found) / found.clamp(min=1e-300)
        return key, torch.where(found > 0, rate, w.beta)
    total = 1 + w.beta * found
    if p.beta == "rate":
        # Where no precision gives the rate, that of an infinite one in the limit.
        s = w.beta * length
        total = torch.where(s <= 1, total - s, found / length)
    return key, w.beta / total


def _corrected(
    program: Program, w: _Writes, precision: _Precision, target: Tensor, start: Tensor | None
) -> Tensor:
    """Return the mean after every write of a memory that subtracts predictions."""
    p, erase = program.spec.posterior, program.spec.erase
    ones = torch.ones_like(w.v * w.k)
    key, strength = _gain(program, w, precision)
    forget, prev = precision.forget * ones, erase.base == "prev"
    if p.correction == "diagonal":
        gain = key * strength
        return _sums(forget * (1 - w.k * gain), gain * w.v, start)
    if p.gain != "first_order":
        value = w.v * ones[..., :1]
        return _triangular(forget, w.k * ones, key * strength * ones, value, start, prev=False)
    e = (w.beta * w.e if erase.strength == "write" else w.e) * ones
    if w.removal is None:
        return _triangular(forget, e, key * ones, target, start, prev=prev)

    # A removal along one key and a write along another: two writes, the second one unpredicted.
    def pair(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x, y], 2).flatten(1, 2)

    both = _triangular(
        pair(forget, ones),
        pair(e, torch.zeros_like(ones)),
        pair(precision.after(w.removal) * ones, key * ones),
        pair(torch.zeros_like(target), target),
        start,
        prev=prev,
    )
    return both[:, 1::2]


def _solved(
    program: Program,
    ops: Operands,
    w: _Writes,
    precision: _Precision,
    target: Tensor,
    state: State | None,
) -> tuple[Tensor, Tensor]:
    """Return memory and mean of a precision matrix that is tempered and predicts with its mean: one
    linear system for the means of all writes,

        mu_t - (1 - key_t e_t^T) F_t mu_{t-1} = key_t w_t^T,  F_t = a_t L'_t^-1 L_{t-1}
    """
    p, erase, F = program.spec.posterior, program.spec.erase, precision.forget
    key, strength = _gain(program, w, precision)
    e = w.beta * w.e if erase.strength == "write" else w.e
    if p.gain != "first_order":
        key, e, target = key * strength, w.k, w.v * torch.ones_like(target)
    step = F - key.mT @ (e @ F if erase.base == "decayed" else e)
    right = (key * target).mT
    if state is not None:
        assert state.importance is not None
        first = with_prior(program.spec, ops, state.importance)
        right[:, 0] += step[:, 0] @ torch.linalg.solve(first, state.memory)
    batch, count, heads, keys, values = right.shape
    system = right.new_zeros(batch, heads, count, keys, count, keys)
    for t in range(count):
        system[:, :, t, :, t] = torch.eye(keys, dtype=system.dtype)
        if t:
            system[:, :, t, :, t - 1] = -step[:, t]
    flat = torch.linalg.solve(system.flatten(4).flatten(2, 3), right.transpose(1, 2).flatten(2, 3))
    mean = flat.view(batch, heads, count, keys, values).transpose(1, 2).mT
    return mean @ with_prior(program.spec, ops, precision.J), mean


def _triangular(
    decay: Tensor, e: Tensor, key: Tensor, w: Tensor, start: Tensor | None, *, prev: bool
) -> Tensor:
    """Solves u_t = w_t - X_t e_t for all writes at once and sums D_ts key_s u_s."""
    D, since = _products(decay)
    count = decay.shape[1]
    if prev:
        # The prediction reads the state before this token's decay.
        seen = torch.cat([torch.zeros_like(D[:, :1]), D[:, :-1]], 1)[:, :count]
        seen_start = torch.cat([torch.ones_like(since[:, :1]), since[:, :-1]], 1)[:, :count]
    else:
        seen, seen_start = D, since
    L: Tensor = torch.einsum("bthvk,btshvk,bshvk->bhvts", e, seen, key).tril(-1)
    rhs = w[..., 0].permute(0, 2, 3, 1)
    if start is not None:
        rhs = rhs - torch.einsum("bthvk,bthvk,bhvk->bhvt", e, seen_start, start)
    eye = torch.eye(count, dtype=L.dtype)
    u = torch.linalg.solve_triangular(eye + L, rhs[..., None], upper=False, unitriangular=True)
    u = u[..., 0].permute(0, 3, 1, 2)[..., None]
    total: Tensor = (D * (key * u)[:, None]).sum(2)
    return total if start is None else total + since * start[:, None]


def _slots(ops: Operands, q: Tensor, state: State | None) -> Unrolled:
    """Return weighted means per slot: a softmax over the past of the keys' own logits."""
    k, v = ops["k"][..., None, :], ops["v"][..., None]
    batch, count, heads, _, keys = k.shape
    if state is not None:
        assert state.importance is not None
        k = torch.cat([state.importance[:, None, :, None], k], 1)
        first = state.memory.mT[:, None]
    else:
        k = torch.cat([k.new_full((batch, 1, heads, 1, keys), -torch.inf), k], 1)
        first = v.new_zeros(batch, 1, heads, v.shape[3], keys)
    v = torch.cat([first, v.expand(*v.shape[:-1], keys)], 1)
    causal = torch.arange(count + 1)[:, None] >= torch.arange(count + 1)
    logits = k[:, None].masked_fill(~causal[None, :, :, None, None, None], -torch.inf)
    weight = logits[:, 1:].softmax(2)
    mean = (weight * v[:, None]).sum(2)
    J = logits.logsumexp(2)[:, 1:]
    return Unrolled((mean * q).sum(-1), mean[:, -1].mT, J)
