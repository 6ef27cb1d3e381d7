"""Importance as one number, over other axes or as a matrix, and what forgetting makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glazoo.spec import Gate, Posterior, Spec, SpecError, Steps, metaplasticize
from glazoo.state import State
from glazoo.theory.catalogue.axes import (
    changed,
    corrected,
    default_erase,
    discounts,
    expanded,
    frozen,
    full,
    has,
    has_variance,
    heads_of,
    hebbian,
    isotropic,
    log_evidence,
    noisy,
    observes,
    observing,
    plain,
    prior_of,
    rate,
    rate_of,
    relative,
    rotated,
    same,
    still,
    where,
    with_gain,
    without,
    without_importance,
)
from glazoo.theory.entry import Bound, Comparison, Domain, Entry, Kind, Pair, Trial, curve
from glazoo.theory.instances import Operands
from glazoo.theory.maps import expand_value_heads, in_basis

__all__ = ["ENTRIES"]

Found = Iterator[Comparison]


def _decay(t: Trial, ops: Operands) -> Tensor:
    """Return the decay of every key channel, [B, T, HV, K], in float64."""
    i = t.instance
    one = torch.ones(i.B, i.T, i.HV, i.K, dtype=torch.float64)
    g = ops.get("g")
    if g is None:
        return one
    g = g.double()
    if g.ndim == 1:
        return g.exp()[:, None] * one
    return (g if g.ndim == 4 else g[..., None]).exp() * one


def _kalman(t: Trial) -> Found:
    """The filter as textbooks have it, token by token."""
    ops, gate = observing(t, expand_value_heads(t.program, t.operands()))
    ops, i = {name: x.double() for name, x in ops.items()}, t.instance
    variance = 1 / prior_of(ops).expand(i.HV, i.K)
    P = torch.diag_embed(variance).expand(i.B, -1, -1, -1)
    mean = torch.zeros(i.B, i.HV, i.K, i.V, dtype=torch.float64)
    decay, outputs, doubts = _decay(t, ops), [ops["v"][:, :0]], [gate[:, :0].double()]
    for n in range(i.T):
        A = torch.diag_embed(decay[:, n])
        noise = (1 - decay[:, n].square()) * variance
        if "noise" in ops:
            noise = ops["noise"][:, n].reshape(i.B, i.HV, -1).expand(-1, -1, i.K)
        P, mean = A @ P @ A + torch.diag_embed(noise), A @ mean
        k, r = ops["k"][:, n, ..., None], gate[:, n, :, None, None].double()
        gain = r * P @ k / (1 + r * k.mT @ P @ k)
        mean, P = mean + gain @ (ops["v"][:, n, :, None] - k.mT @ mean), P - gain @ k.mT @ P
        q = t.scale * ops["q"][:, n, ..., None]
        outputs.append((q.mT @ mean).transpose(1, 2))
        doubts.append((q.mT @ P @ q)[None, ..., 0, 0].transpose(0, 1))
    result = t.run(t.spec, ops, output_uncertainty=True)
    yield Pair("output", result.output, torch.cat(outputs, 1))
    yield Pair("uncertainty", result.uncertainty, torch.cat(doubts, 1))


def _information(t: Trial) -> Found:
    """The filter in its information form, a mean that is never divided before it is read."""
    ops = {n: x.double() for n, x in expand_value_heads(t.program, t.operands()).items()}
    i, decay, beta = t.instance, _decay(t, ops), ops.get("beta")
    variance = 1 / prior_of(ops).expand(i.HV, i.K)[..., None]
    precision = (1 / variance).expand(i.B, -1, -1, -1)
    mean = torch.zeros(i.B, i.HV, i.K, i.V, dtype=torch.float64)
    outputs = [ops["v"][:, :0]]
    for n in range(i.T):
        a, k = decay[:, n, ..., None], ops["k"][:, n, ..., None]
        noise = (1 - a.square()) * variance
        if "noise" in ops:
            noise = ops["noise"][:, n].reshape(i.B, i.HV, -1, 1)
        spread = a.square() + noise * precision
        mean, precision = a * mean / spread, precision / spread
        v, b = ops["v"][:, n], ops["b"][:, n].reshape(i.B, i.HV, 1, -1)
        if beta is not None:
            v = beta[:, n].reshape(i.B, i.HV, -1) * v
        mean, precision = mean + k * v[..., None, :], precision + b * k.square()
        outputs.append((t.scale * ops["q"][:, n, ..., None] * mean / precision).sum(2)[:, None])
    yield Pair("output", t.run(t.spec, ops).output, torch.cat(outputs, 1))


def _of_precision(spec: Spec, precision: str) -> Spec:
    """Return a spec with another precision, over the keys themselves."""
    imp, correction = spec.importance, spec.posterior.correction
    assert imp is not None
    evidence = "outer_product" if precision == "full" else "key_squared"
    if correction != "full":
        correction = "diagonal" if precision == "diagonal" else "none"
    posterior = spec.posterior.model_copy(update={"precision": precision, "correction": correction})
    importance = imp.model_copy(update={"evidence": evidence, "basis": "own"})
    return changed(spec, posterior=posterior, importance=importance)


def _on_a_line(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    direction = t.normal(i.B, 1, i.H, i.K)
    length = 0.2 + 0.8 * t.uniform(*ops["k"].shape[:-1], 1)
    ops["k"] = length * direction / direction.norm(dim=-1, keepdim=True)
    right = ops | {"prior": prior_of(ops).expand(-1, i.K)}
    left = ops | {"b": i.K * ops["b"]}
    a, b = t.run(t.spec, left), t.run(_of_precision(t.spec, "full"), right)
    yield Pair("output", a.output, b.output)


def _one_hot(t: Trial) -> Found:
    ops = t.operands()
    a, b = (
        t.run(spec, ops, output_uncertainty=True)
        for spec in (t.spec, _of_precision(t.spec, "diagonal"))
    )
    yield Pair("output", a.output, b.output)
    yield Pair("uncertainty", a.uncertainty, b.uncertainty)


def _turned(t: Trial) -> Found:
    ops, state, i = expand_value_heads(t.program, t.operands()), t.state(), t.instance
    assert t.spec.importance is not None
    own = changed(t.spec, importance=t.spec.importance.model_copy(update={"basis": "own"}))
    right = {name: x for name, x in ops.items() if name != "basis"}
    for name in ("q", "k"):
        right[name] = torch.einsum("bthk,hkj->bthj", ops[name], ops["basis"])

    def over_axes(state: State | None) -> State | None:
        if state is None or t.spec.turned:
            return state
        return state._replace(memory=ops["basis"].to(state.memory.dtype).mT @ state.memory)

    a = t.run(t.spec, ops, initial_state=state, output_uncertainty=True)
    b = t.run(own, right, initial_state=over_axes(state), output_uncertainty=True)
    a = a._replace(final_state=over_axes(a.final_state))
    yield from same(a, b, parts=("memory", "importance") if i.T else ())
    yield Pair("uncertainty", a.uncertainty, b.uncertainty)


def _any_basis(t: Trial) -> Found:
    ops, state, i = t.operands(), t.state(), t.instance
    basis, _ = torch.linalg.qr(t.normal(i.H, i.K, i.K).double())
    left = ops | {"b": torch.zeros_like(ops["b"]), "prior": torch.ones_like(ops["prior"])}
    outputs = []
    for turn in (ops["basis"], basis.to(t.dtype)):
        start = None
        if state is not None and state.importance is not None:
            start = state._replace(importance=torch.zeros_like(state.importance))
            start = in_basis(t.spec, {"basis": turn}, start)
        outputs.append(t.run(t.spec, left | {"basis": turn}, initial_state=start).output)
    yield Pair("output", *outputs)


def _kept(t: Trial, ops: Operands) -> Tensor:
    """Return what a decay leaves of the variance along every axis, [B, T, HV, K or 1]."""
    keep = _decay(t, ops).square()
    if rotated(t.spec):
        keep = torch.einsum("bthk,hkj->bthj", keep, ops["basis"].double().square())
    return keep.mean(-1, keepdim=True) if isotropic(t.spec) else keep


def _as_noise(t: Trial, noise: Tensor) -> Tensor:
    """Return noise [B, T, HV, K or 1] as the operand."""
    assert t.spec.importance is not None
    one = t.spec.importance.noise.shape == "head"
    return (noise[..., 0] if one else noise).clamp(min=0).to(t.dtype)


def _at_the_prior(t: Trial) -> Found:
    ops, state = expand_value_heads(t.program, t.operands()), t.state()
    assert t.spec.importance is not None
    gateless = changed(t.spec, importance=t.spec.importance.model_copy(update={"noise": Gate()}))
    right = {name: x for name, x in ops.items() if name != "noise"}
    if t.spec.importance.noise.shape == "head":
        # One number for all keys.
        ops["prior"] = prior_of(ops)[:, 0]
        right["prior"] = ops["prior"]
    noise = _as_noise(t, (1 - _kept(t, ops)) / prior_of(ops).double())
    yield from same(
        t.run(t.spec, ops | {"noise": noise}, initial_state=state),
        t.run(gateless, right, initial_state=state),
        parts=("memory", "importance"),
    )


def _reset(t: Trial) -> Found:
    """The noise of every token is what its variance lacks of one."""
    ops, i, state = expand_value_heads(t.program, t.operands()), t.instance, None
    ops["prior"] = torch.ones_like(ops["prior"])
    keep, outputs = _kept(t, ops), []
    for n in range(i.T):
        token = {
            name: x[:, n : n + 1] if x.ndim > 3 or x.shape[:2] == (i.B, i.T) else x
            for name, x in ops.items()
            if name != "basis"
        }
        if "basis" in ops:
            token["basis"] = ops["basis"]
        total = torch.ones_like(keep[:, n])
        if state is not None:
            assert state.importance is not None
            total = state.importance.double() + 1
        token["noise"] = _as_noise(t, (1 - keep[:, n] / total)[:, None])
        result = t.run(t.spec, token, initial_state=state)
        outputs.append(result.output)
        state = result.final_state
    if not outputs:
        return
    source = with_gain(changed(t.spec, posterior=_FROZEN, importance=None), "first_order")
    expected = t.run(source, without_importance(ops)).output
    yield Pair("output", torch.cat(outputs, 1), expected)


def _energy(t: Trial, ops: Operands, state: State) -> Tensor:
    """Return sum_kj L_kj mu_k mu_j of every value channel, [B, HV, V]."""
    memory, J = state.memory.double(), state.importance
    assert J is not None
    J, prior = J.double(), prior_of(ops).double()
    if full(t.spec):
        prior = prior.expand(memory.shape[1:3])
        if t.spec.forgetting == "diffuse":
            total = torch.diag_embed(1 / prior) + J
        else:
            total = torch.diag_embed(prior) + J
        energy: Tensor = (memory * torch.linalg.solve(total, memory)).sum(2)
        return energy
    total = (J if J.ndim == 4 else J[..., None]) + prior[..., None]
    weight = total if t.spec.memory_is_mean else 1 / total
    return (weight * memory.square()).sum(2)


def _fades(t: Trial) -> Found:
    ops, _ = observing(t, expand_value_heads(t.program, t.operands()))
    ops["v"] = torch.zeros_like(ops["v"])
    yield from _walk(t, ops, lambda state: _energy(t, ops, state))


def _shrinks(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    ops["v"] = torch.zeros_like(ops["v"])

    def norm(state: State) -> Tensor:
        memory = state.memory.double()
        if not t.spec.memory_is_mean:
            assert state.importance is not None
            memory = memory / (state.importance + prior_of(ops)).double()[..., None]
        length: Tensor = memory.norm(dim=2)
        return length

    yield from _walk(t, ops, norm)


def _walk(t: Trial, ops: Operands, size: Any) -> Found:
    """Bound a size of the state after every token by that before it."""
    state = t.state()
    assert state is not None
    for n in range(t.instance.T):
        token = {
            o.name: ops[o.name][:, n : n + 1]
            if o.per_token and ops[o.name].ndim > 2
            else ops[o.name]
            for o in t.program.operands
        }
        after = t.run(t.spec, token, initial_state=state).final_state
        yield Bound(f"size after token {n}", size(after), size(state))
        state = after


def _axis(t: Trial, ops: Operands, index: int = 0) -> Tensor:
    """Return an axis of the importance per value head, [HV, K]."""
    i = t.instance
    if rotated(t.spec):
        return ops["basis"][..., index]
    axis = torch.zeros(i.HV, i.K, dtype=t.dtype)
    axis[:, index] = 1
    return axis


def _sequence(t: Trial, keys: Tensor, values: Tensor, precision: Tensor) -> Any:
    """Store values [T, V] under keys [T, HV, K] with an observation's precision [HV], without
    forgetting, at a prior of one; each token reads its own key."""
    i, count = t.instance, values.shape[0]
    drawn = still(expand_value_heads(t.program, t.operands()))
    k = keys[None].expand(i.B, -1, -1, -1).to(t.dtype)
    gate = precision.to(t.dtype).expand(i.B, count, i.HV)
    v = values[None, :, None].expand(i.B, -1, i.HV, -1).to(t.dtype)
    ops: Operands = {"q": k, "k": k, "v": v if "beta" in drawn else gate[..., None] * v}
    for operand in t.program.operands:
        name, dims = operand.name, operand.shapes[-1]
        if name in ops:
            continue
        x = drawn[name]
        if operand.role in ("write", "importance"):
            factor = i.K if operand.role == "importance" and isotropic(t.spec) else 1
            rated = operand.role == "write" and rate(t.spec)
            x = rate_of(gate, k) if rated else factor * gate
            x = expanded(x, values.shape[1]) if dims[-1] == "V" else x
        elif operand.role == "prior":
            x = torch.ones_like(x)
        elif operand.per_token and x.ndim > 1:
            x = x.new_zeros(i.B, count, *x.shape[2:])
        ops[name] = x
    return ops


def _repeats(t: Trial) -> Found:
    """The weights of all values of one key, by values of their own channels."""
    i = t.instance
    count, R = i.T, 0.2 + t.uniform(i.HV).double()
    axis = _axis(t, expand_value_heads(t.program, t.operands()))
    ops = _sequence(t, axis.expand(count, -1, -1), torch.eye(count, dtype=t.dtype), 1 / R)
    y = t.run(t.spec, ops, scale=1.0).output.double()
    n = torch.arange(1, count + 1, dtype=torch.float64)[:, None, None]
    seen = torch.ones(count, count, dtype=torch.float64).tril()[:, None]
    yield Pair("weights", y, (seen / (n + R[:, None])).expand_as(y))
    error = (1 - y.sum(-1)).square() + R * y.square().sum(-1)
    n = n[..., 0]
    yield Pair("error", error, ((R / (R + n)).square() + n * R / (R + n).square()).expand_as(error))


def _plateau(t: Trial) -> Found:
    i = t.instance
    count, beta = i.T, 0.1 + 0.8 * t.uniform(i.HV).double()
    ops = _sequence(t, _axis(t, {}).expand(count, -1, -1), torch.eye(count, dtype=t.dtype), beta)
    y = t.run(t.spec, ops, scale=1.0).output.double()
    n = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    left, noise = (1 - beta) ** n, beta / (2 - beta)
    error, spread = (1 - y.sum(-1)).square(), y.square().sum(-1)
    yield Pair("error of the signal", error, left.square().expand_as(error))
    yield Pair("error of the noise", spread, (noise * (1 - left.square())).expand_as(spread))


def _random_walk(t: Trial) -> Found:
    i, count = t.instance, 64
    Q, R = 0.3 + 0.7 * t.uniform(i.HV).double(), 0.5 + 1.5 * t.uniform(i.HV, stream=9).double()
    values = torch.zeros(count, 1, dtype=t.dtype)
    values[-1] = 1
    axis = _axis(t, expand_value_heads(t.program, t.operands()))
    ops = _sequence(t, axis.expand(count, -1, -1), values, 1 / R)
    noise = ops["noise"]
    ops["noise"] = (Q if noise.ndim == 3 else Q[:, None]).to(t.dtype).expand_as(noise)
    gain = t.run(t.spec, ops, scale=1.0).output[:, -1, :, 0].double()
    p = (Q + (Q.square() + 4 * Q * R).sqrt()) / 2
    yield Pair("gain", gain, (p / (p + R)).expand_as(gain))


def _collision(t: Trial) -> Found:
    i, n = t.instance, t.integer(1, 16)
    R, c = 0.2 + t.uniform(i.HV).double(), 0.1 + 0.8 * t.uniform(i.HV, stream=9).double()
    drawn = expand_value_heads(t.program, t.operands())
    A, other = _axis(t, drawn), _axis(t, drawn, 1)
    B = c[:, None] * A + (1 - c.square()).sqrt()[:, None] * other
    keys = torch.stack([*[A] * n, B.to(A.dtype), torch.zeros_like(A)])
    values = torch.zeros(n + 2, 1, dtype=t.dtype)
    values[n] = 1
    ops = _sequence(t, keys, values, 1 / R)
    ops["q"] = A.expand(i.B, n + 2, -1, -1)
    damage = t.run(t.spec, ops, scale=1.0).output[:, n, :, 0].double()
    p = R / (R + n) if t.spec.importance is not None else torch.ones_like(R)
    expected = c * p / (R + c.square() * p + 1 - c.square())
    yield Pair("damage", damage, expected.expand_as(damage))


def _small_steps(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    # Where the steps are small already.
    ops["k"] = ops["k"] / (1 + ops["k"].norm(dim=-1, keepdim=True))
    delta = with_gain(t.spec, "first_order")
    limit = t.run(t.spec, ops, initial_state=state).output

    def steps(x: float) -> Tensor:
        n = round(1 / x)
        right = {
            name: y.repeat_interleave(n, 1) if name in ("k", "v", "beta") else y
            for name, y in ops.items()
        }
        many = changed(delta, steps=Steps(count=n))
        y: Tensor = t.run(many, right | {"beta": x * right["beta"]}, initial_state=state).output
        return y

    yield curve("output against 1 / n", (1 / 32, 1 / 64, 1 / 128), steps, lambda x: limit)


def _exponential(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    left = ops | {"q": ops["k"], "beta": 3 * ops["beta"]}
    error = ops["v"] - t.run(t.spec, left, initial_state=state, scale=1.0).output
    idle = left | {"beta": torch.zeros_like(ops["beta"])}
    before = ops["v"] - t.run(t.spec, idle, initial_state=state, scale=1.0).output
    square = heads_of(ops, "k", t.instance.HV).square().sum(-1)
    beta = left["beta"]
    kept = (-(beta * square if beta.ndim == 3 else beta * square[..., None])).exp()
    yield Pair("error after", error, (kept if kept.ndim == 4 else kept[..., None]) * before)


def _no_units(t: Trial) -> Found:
    assert t.spec.importance is not None
    floor = t.spec.importance.prior.floor
    prior = t.spec.importance.prior.model_copy(update={"floor": 1e-12 * floor})
    floorless = changed(t.spec, importance=t.spec.importance.model_copy(update={"prior": prior}))
    ops = t.operands()
    ops["mix"] = torch.ones_like(ops["mix"])
    # In units of the floor, so that it is seen.
    ops["beta"] = 1e6 * floor * ops["beta"]
    limit = t.run(floorless, ops).output
    yield curve(
        "output against x",
        (1e-1, 1e-2, 1e-3, 1e-4),
        lambda x: t.run(t.spec, ops | {"beta": ops["beta"] / x}).output,
        lambda x: limit,
    )


def _refused(t: Trial) -> Found:
    """What a decay per key does to the mean of a matrix that tempers."""
    try:
        metaplasticize(t.spec, precision="full", forgetting="temper")
        refused = False
    except SpecError:
        refused = True
    yield Pair("refused", torch.tensor([float(refused)]), torch.ones(1))
    x, a = t.normal(2000, 3, 2).double(), t.uniform(2000, 3).double()
    H, prior = 100 * x @ x.mT, torch.eye(3, dtype=torch.float64)
    root = a.sqrt()
    decayed = root[:, :, None] * H * root[:, None] + prior
    step = torch.linalg.solve(decayed, a[..., None] * (H + prior))
    most = torch.linalg.matrix_norm(step, 2).amax()
    yield Bound("largest stretch of the mean", torch.full_like(most, 2.0), most)


_GENERIC = Domain(
    regimes=("normal",), batch=(1, 1), tokens=(5, 7), heads=(1, 1), groups=(1, 2), keys=(3, 4),
    values=(2, 3), start=False,
)  # fmt: skip
_FROZEN = Posterior(precision="frozen", correction="full")
_LYAPUNOV = where(
    observes,
    has_variance,
    lambda s: full(s) or hebbian(s),
    without(frozen, log_evidence, relative),
    # Of what one number or other axes leave out, the count of a direction may grow unseen.
    without(lambda s: s.forgetting == "diffuse" and (isotropic(s) or rotated(s))),
)
# One number counts a K-th of an observation, which a Hebbian memory predicts as a whole.
_SAME_COUNT = without(lambda s: isotropic(s) and hebbian(s) and s.forgetting == "diffuse")
_ALONG_AXES = where(observes, has_variance, _SAME_COUNT, without(frozen, log_evidence, relative))

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "growing-variance-is-a-kalman-filter",
        "P' = A P A + Q,  K = P' k / (k.P' k + 1 / b),  mu = A mu + K (v - k^T A mu),  b = beta",
        "a spec with full precision whose variance grows",
        "the filter as textbooks have it; without a gate Q = (1 - A^2) / I_p",
        "Kalman, 1960",
        _kalman,
        where(full, observes, lambda s: s.forgetting == "diffuse"),
        condition="b = beta, or the precision whose rate it is",
        domain=Domain(start=False),
    ),
    Entry(
        "growing-variance-in-information-form",
        "I' = I / (a^2 + p I),  h' = a h / (a^2 + p I),  I = I' + b k^2,  h = h' + k (beta v)^T",
        "a Hebbian spec whose variances grow, one per key or synapse",
        "the filter in its information form (Kalman Linear Attention); mu = h / I",
        "arXiv:2602.10743",
        _information,
        where(
            hebbian,
            has_variance,
            has("b"),
            lambda s: s.forgetting == "diffuse" and s.key == "operand",
            plain,
            without(full, isotropic, rotated),
        ),
        domain=Domain(start=False),
    ),
    Entry(
        "one-number-is-full-on-a-line",
        "k_t = c_t u: isotropic X(K b) = full X(b)",
        "a spec with one importance for all keys, whose keys have one direction",
        "the same spec with full precision",
        "ours",
        _on_a_line,
        where(
            isotropic,
            observes,
            _SAME_COUNT,
            lambda s: s.decay.shape != "key",
            without(discounts),
        ),
        condition="keys on a line",
        domain=Domain(start=False),
    ),
    Entry(
        "full-is-diagonal-on-one-hot-keys",
        "k_t in {+-e_j}: full X = diagonal X",
        "a spec with full precision and an importance gate",
        "the same spec with one importance per key",
        "ours",
        _one_hot,
        where(full, observes, has("b")),
        condition="keys are signed basis vectors",
        domain=Domain(regimes=("one_hot",), start=False),
    ),
    Entry(
        "other-axes-turn-the-keys",
        "X(q, k; R) = X(R^T q, R^T k)",
        "a spec whose importance is over other axes, with at most one decay per head",
        "the same spec over its own axes, on turned queries and keys",
        "ours",
        _turned,
        where(
            rotated,
            observes,
            lambda s: s.decay.shape != "key",
            # Its synapses would correct their own part alone.
            without(lambda s: hebbian(s) and s.forgetting == "diffuse"),
        ),
    ),
    Entry(
        "no-importance-has-no-axes",
        "b = 0, I_p = 1: X(q, k; R) is the same for all R",
        "a spec whose importance is over other axes",
        "the same spec with another basis",
        "ours",
        _any_basis,
        where(rotated, without(noisy, discounts)),
    ),
    Entry(
        "noise-at-the-prior's-level-is-none",
        "noise = (1 - a^2) / I_p: X = X without a gate for it",
        "a spec with a noise gate",
        "the same spec without",
        "ours",
        _at_the_prior,
        noisy,
    ),
    Entry(
        "reset-covariance-is-the-source",
        "noise_t = 1 - a_t^2 / I_{t-1}, so that I' = 1: the delta rule it was made of, whatever b",
        "a delta rule with the exact gain and a noise gate",
        "its source (Gated DeltaNet)",
        "arXiv:2605.31163",
        _reset,
        where(noisy, rate, without(full), lambda s: s.steps.count == 1),
        condition="I_p = 1",
        domain=Domain(start=False),
    ),
    Entry(
        "what-nothing-renews-fades",
        "v = 0: mu_t^T I_t mu_t <= mu_{t-1}^T I_{t-1} mu_{t-1}",
        "a Hebbian spec, or one with full precision and b = beta",
        "the same before the token",
        "ours",
        _fades,
        _LYAPUNOV,
        kind=Kind.INEQUALITY,
        domain=Domain(start=True),
    ),
    Entry(
        "one-number-never-enlarges-the-mean",
        "v = 0: |mu_t| <= |mu_{t-1}|",
        "a spec with one importance for all keys, Hebbian or with the exact gain",
        "the same before the token",
        "ours",
        _shrinks,
        where(isotropic, observes, lambda s: hebbian(s) or s.posterior.gain == "exact"),
        kind=Kind.INEQUALITY,
        domain=Domain(start=True),
    ),
    Entry(
        "matrices-with-decays-per-key-do-not-temper",
        "mu' = (A^1/2 H A^1/2 + 1)^-1 A (H + 1) mu may be longer than twice mu: refused",
        "a frozen spec with a decay per key: its full precision with forgetting = temper",
        "the largest of 2000 such maps",
        "ours",
        _refused,
        where(frozen, lambda s: s.decay.shape == "key"),
        kind=Kind.INEQUALITY,
        domain=Domain(tokens=(1, 1)),
    ),
    Entry(
        "repeats-are-averaged",
        "n values of one key, noise variance R: weights 1 / (n + R), error (R^2 + n R) / (n + R)^2",
        "a spec with importance, b = beta = 1 / R, one number: b = K / R",
        "the formula",
        "ours",
        _repeats,
        _ALONG_AXES,
        condition="I_p = 1, no forgetting, the key is an axis of the importance",
        domain=Domain(tokens=(1, 9), keys=(2, 5), start=False),
    ),
    Entry(
        "delta-rule-keeps-the-noise-of-repeats",
        "n noisy values of one key: error (1 - beta)^2n + R beta / (2 - beta) (1 - (1 - beta)^2n)",
        "a frozen delta rule",
        "the formula",
        "ours",
        _plateau,
        where(frozen, observes, corrected("first_order"), has("beta")),
        condition="no forgetting",
        domain=Domain(tokens=(1, 9), keys=(2, 5), start=False),
    ),
    Entry(
        "random-walk-has-a-stationary-gain",
        "a = 1, noise Q, one key: gain -> p / (p + R),  p = (Q + (Q^2 + 4 Q R)^1/2) / 2",
        "a spec with a noise gate after 64 tokens",
        "the formula",
        "Kalman, 1960",
        _random_walk,
        where(noisy, observes, _SAME_COUNT),
        condition="I_p = 1, the key is an axis of the importance",
        domain=Domain(tokens=(1, 1), keys=(2, 5), start=False),
    ),
    Entry(
        "importance-shields-from-collisions",
        "A seen n times, B at cosine c: B weighs c p / (R + c^2 p + 1 - c^2) at A, p = R / (R + n)",
        "a delta rule with the exact gain, or full precision; frozen: p = 1",
        "the formula",
        "ours",
        _collision,
        where(
            observes,
            lambda s: full(s) or corrected("exact")(s),
            without(isotropic, relative),
        ),
        condition="I_p = 1, no forgetting, A is an axis of the importance",
        domain=Domain(tokens=(1, 1), keys=(2, 5), start=False),
    ),
    Entry(
        "a-relative-prior-has-no-units",
        "y(beta / x) -> y(beta) without a floor as x -> 0, where I_p = c |H| + floor, error ~ x",
        "a spec with a relative prior, its read solved throughout (mix = 1)",
        "the same spec without a floor",
        "arXiv:2511.21016",
        _no_units,
        where(relative, has("mix")),
        kind=Kind.LIMIT,
        condition="keys in general position",
        domain=_GENERIC,
        rate=1.0,
    ),
    Entry(
        "flow-is-many-small-steps",
        "n steps of beta / n -> flow as n -> inf, error ~ 1 / n",
        "a delta rule as a flow",
        "the delta rule with n steps per token",
        "arXiv:2512.12602",
        _small_steps,
        where(frozen, corrected("flow"), plain, default_erase, has("beta")),
        kind=Kind.LIMIT,
        domain=_GENERIC,
        rate=1.0,
    ),
    Entry(
        "flow-forgets-exponentially",
        "v - mu_t^T k = exp(-beta k.k) (v - mu'^T k)",
        "a delta rule as a flow, its last write at 3 beta",
        "its error before the write",
        "arXiv:2512.12602",
        _exponential,
        where(frozen, corrected("flow"), plain, default_erase, has("beta")),
        domain=Domain(tokens=(1, 1)),
    ),
)
