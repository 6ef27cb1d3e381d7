"""What is exact inference, what bounds it, and what importance and uncertainty do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.catalogue.axes import (
    bayesian,
    corrected,
    default_erase,
    discounts,
    expanded,
    frozen,
    full,
    has,
    heads_of,
    hebbian,
    isotropic,
    log_evidence,
    named,
    noisy,
    observes,
    observing,
    own_decay,
    plain,
    preconditioned,
    prior_of,
    rate,
    relative,
    rotated,
    still,
    tempered,
    tempers,
    where,
    without,
)
from glazoo.theory.entry import Bound, Comparison, Domain, Entry, Kind, Pair, Trial
from glazoo.theory.exact import posterior
from glazoo.theory.instances import Operands
from glazoo.theory.maps import expand_value_heads
from glazoo.theory.unrolled import importance, unrolled, with_prior
from glazoo.zoo import load

__all__ = ["ENTRIES"]

Found = Iterator[Comparison]


def _per_head(x: Tensor) -> Tensor:
    """Moves the heads of [B, T, HV, ...] before the tokens."""
    return x.movedim(2, 1)


def _head_decay(t: Trial, ops: Operands) -> Tensor | None:
    """Return a decay per head and token [B, HV, T], as the exact posterior forgets."""
    g = ops.get("g")
    if g is None:
        return None
    if g.ndim == 1:
        return g[None, :, None].expand(t.instance.B, -1, t.instance.T)
    return _per_head(g if g.ndim == 3 else g[..., 0])


def _unrolled(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    result, dense = t.run(t.spec, ops, initial_state=state), unrolled(t.program, ops, state)
    yield Pair("output", result.output, dense.output)
    yield Pair("final memory", result.final_state.memory, dense.memory)
    if dense.importance is not None and t.instance.T:
        last = dense.importance[:, -1]
        if not full(t.spec):
            last = last.mT
        found = result.final_state.importance
        yield Pair("final importance", found, last[..., 0] if found.ndim == 3 else last)


def _predict_correct(t: Trial) -> Found:
    """mu' = (a I_prev / I') mu; mu = mu' + (w k - b k^2 mu') / I."""
    ops, state, i = expand_value_heads(t.program, t.operands()), t.state(), t.instance
    ops = {name: x.double() for name, x in ops.items()}
    I_p = prior_of(ops)[:, :, None]
    J = torch.zeros(i.B, i.HV, i.K, i.V, dtype=torch.float64)
    mean = torch.zeros_like(J)
    if state is not None:
        assert state.importance is not None
        start = state.importance.double()
        J = start[..., None].expand_as(J) if start.ndim == 3 else start
        mean = state.memory.double() / (J + I_p)
    outputs = []
    for n in range(i.T):
        a: Tensor | float = 1.0
        if "g" in ops:
            g = ops["g"] if ops["g"].ndim == 1 else ops["g"][:, n]
            a = g.exp()[:, None, None] if g.ndim == 1 else g.exp()[..., None]
            a = a[..., None] if g.ndim == 2 else a
        k = 1 - a if t.spec.key == "one_minus_decay" else ops["k"][:, n, :, :, None]
        assert isinstance(k, Tensor)
        b = ops["b"][:, n, :, None]
        b = b if b.ndim == 4 else b[..., None]
        w = ops["v"][:, n, :, None]
        if "beta" in ops:
            beta = ops["beta"][:, n, :, None]
            w = w * (beta if beta.ndim == 4 else beta[..., None])
        predicted = a * (J + I_p) / (a * J + I_p) * mean
        J = a * J + b * k.square()
        mean = predicted + (k * w - b * k.square() * predicted) / (J + I_p)
        outputs.append((mean * (t.scale * ops["q"][:, n, :, :, None])).sum(2))
    y = torch.stack(outputs, 1) if outputs else ops["v"]
    yield Pair("output", t.run(t.spec, t.operands(), initial_state=state).output, y)


def _exact(t: Trial) -> Found:
    left, gate = observing(t, t.operands())
    if "g" in left and left["g"].ndim == 4:
        left["g"] = expanded(left["g"][..., 0], t.instance.K)
    result = t.run(t.spec, left, output_uncertainty=True)
    yield from _against_posterior(t, left, gate, result)


def _against_posterior(t: Trial, ops: Operands, gate: Tensor, result: object) -> Found:
    i = t.instance
    q, k = (_per_head(heads_of(ops, name, i.HV)).double() for name in ("q", "k"))
    v, g = _per_head(ops["v"]).double(), _head_decay(t, ops)
    outputs, variances = [], []
    for h in range(i.HV):
        truth = posterior(
            k[:, h],
            v[:, h],
            _per_head(gate)[:, h],
            g=None if g is None else g[:, h],
            prior=prior_of(ops).expand(i.HV, i.K)[h],
            discount=discounts(t.spec),
        )
        outputs.append(truth.predict(t.scale * q[:, h]))
        variances.append(truth.variance(t.scale * q[:, h]))
    yield Pair("output", result.output, torch.stack(outputs, 2))  # type: ignore[attr-defined]
    uncertainty = result.uncertainty  # type: ignore[attr-defined]
    variance = torch.stack(variances, 2)
    yield Pair("uncertainty", uncertainty, variance if uncertainty.ndim == 4 else variance[..., 0])


def _least_squares(t: Trial) -> Found:
    """Without forgetting: the last output solves a regularised least squares problem."""
    i = t.instance
    ops, gate = observing(t, still(expand_value_heads(t.program, t.operands())))
    y = t.run(t.spec, ops).output
    root = gate.sqrt().double()[..., None]
    k, v = (_per_head(root * ops[name].double()) for name in ("k", "v"))
    prior = torch.diag_embed(prior_of(ops).double().sqrt().expand(i.HV, i.K))
    k = torch.cat([k, prior.expand(i.B, -1, -1, -1)], 2)
    v = torch.cat([v, v.new_zeros(i.B, i.HV, i.K, i.V)], 2)
    # The pseudo-inverse knows nothing of normal equations.
    memory = torch.linalg.pinv(k) @ v
    q = t.scale * ops["q"][:, -1].double()
    yield Pair("last output", y[:, -1], torch.einsum("bhkv,bhk->bhv", memory, q))


def _steps(t: Trial, ops: Operands) -> Iterator[tuple[int, Tensor, Operands, State]]:
    """Walks token by token: the decayed mean before each token, and the state after it."""
    i, state = t.instance, t.state()
    mean = torch.zeros(i.B, i.HV, i.K, i.V, dtype=torch.float64)
    if state is not None:
        mean = state.memory.double()
    for n in range(i.T):
        token = {name: x[:, n : n + 1] if x.ndim > 2 else x for name, x in ops.items()}
        decayed = mean
        if "g" in ops and ops["g"].ndim > 2:
            a = ops["g"][:, n].double().exp()
            decayed = mean * (a[..., None, None] if a.ndim == 2 else a[..., None])
        elif "g" in ops:
            decayed = mean * ops["g"].double().exp()[:, None, None]
        state = t.run(t.spec, token, initial_state=state).final_state
        assert state is not None
        yield n, decayed, token, state
        mean = state.memory.double()


def _one_step(t: Trial, ops: Operands, precision: Tensor) -> Found:
    """Every token is one exact update of a prior N(decayed mean, 1)."""
    for n, decayed, token, state in _steps(t, ops):
        k, v = token["k"].double(), token["v"].double()
        for h in range(t.instance.HV):
            truth = posterior(
                k[:, :, h], v[:, :, h], precision[:, n : n + 1, h], start=decayed[:, h]
            )
            yield Pair(f"mean after token {n}", state.memory[:, h], truth.mean[:, 0])


def _exact_step(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    precision = ops["beta"]
    yield from _one_step(t, ops, precision)


def _sigmoid_step(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    # x with beta = sigmoid(x): precision exp(x) = beta / (1 - beta).
    logit = t.normal(*ops["beta"].shape)
    ops = ops | {"beta": logit.sigmoid()}
    yield from _one_step(t, ops, logit.double().exp())


def _dropped(t: Trial) -> Found:
    """(1 + beta k k^T)^-1, then only its diagonal acts on the mean."""
    ops = expand_value_heads(t.program, t.operands())
    for n, decayed, token, state in _steps(t, ops):
        k, v, beta = (token[name].double()[:, 0] for name in ("k", "v", "beta"))
        beta = beta if beta.ndim == 3 else expanded(beta, v.shape[-1])
        system = beta[..., None, None] * (k[..., :, None] * k[..., None, :])[:, :, None]
        inverse = torch.linalg.inv(system + torch.eye(k.shape[-1], dtype=torch.float64))
        gain = torch.einsum("bhvkj,bhj->bhkv", inverse, k) * beta[:, :, None]
        kept = inverse.diagonal(dim1=-2, dim2=-1).mT
        yield Pair(f"mean after token {n}", state.memory, kept * decayed + gain * v[:, :, None])


def _gradient_step(t: Trial) -> Found:
    """mu = mu' - beta grad of |v - mu^T k|^2 / 2 at mu'."""
    ops = expand_value_heads(t.program, t.operands())
    for n, decayed, token, state in _steps(t, ops):
        k, v, beta = (token[name].double()[:, 0] for name in ("k", "v", "beta"))
        with torch.enable_grad():
            mean = decayed.detach().requires_grad_()
            loss = (v - torch.einsum("bhkv,bhk->bhv", mean, k)).square().sum() / 2
            (slope,) = torch.autograd.grad(loss, mean)
        yield Pair(f"mean after token {n}", state.memory, decayed - beta[..., None, None] * slope)


def _recall(t: Trial) -> Found:
    ops = t.operands()
    left = ops | {"beta": torch.ones_like(ops["beta"]), "q": ops["k"]}
    n = t.spec.substeps
    left["q"] = ops["k"][:, n - 1 :: n]
    y = t.run(t.spec, left, initial_state=t.state(), scale=1.0).output
    yield Pair("recalled value", y, ops["v"][:, n - 1 :: n])


def _beyond_one(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    n = t.spec.substeps
    fast = {"beta": 1 + ops["beta"], "q": ops["k"][:, n - 1 :: n]}
    error = ops["v"] - t.run(t.spec, ops | fast, initial_state=state, scale=1.0).output
    idle = fast | {"beta": torch.zeros_like(ops["beta"])}
    before = ops["v"] - t.run(t.spec, ops | idle, initial_state=state, scale=1.0).output
    square = heads_of(ops, "k", t.instance.HV).square().sum(-1, keepdim=True)
    known = fast["beta"] * (square if ops["beta"].ndim == 4 else square[..., 0])
    yield Pair(
        "error after", error, (1 - (known if known.ndim == 4 else known[..., None])) * before
    )


def _contraction(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    n = t.spec.substeps
    probe = ops | {"q": ops["k"][:, n - 1 :: n]}
    error = ops["v"] - t.run(t.spec, probe, initial_state=state, scale=1.0).output
    idle = probe | {"beta": torch.zeros_like(ops["beta"])}
    before = ops["v"] - t.run(t.spec, idle, initial_state=state, scale=1.0).output
    yield Bound("error after the write", error.abs(), before.abs())
    if t.spec.importance is None:
        squared = heads_of(ops, "k", t.instance.HV).square().sum(-1)
        beta = ops["beta"]
        rate = 1 + (beta * squared if beta.ndim == 3 else beta * squared[..., None])
        yield Pair("error after", error, before / (rate if rate.ndim == 4 else rate[..., None]))


def _bounded_gain(t: Trial) -> Found:
    """0 <= 1 - k G <= 1 without values: no synapse grows or changes its sign."""
    ops, state = t.operands(), t.state()
    assert state is not None
    silent = ops | {"v": torch.zeros_like(ops["v"])}
    after = t.run(t.spec, silent, initial_state=state).final_state.memory
    before = state.memory
    yield Bound("size", after.abs(), before.abs())
    yield Bound("sign", torch.zeros_like(after), after * before.sign())


def _returns_to_prior(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    assert state is not None
    assert state.importance is not None
    gate = "b" if "b" in ops else "beta"
    left = ops | {gate: torch.zeros_like(ops[gate])}
    g = ops.get("g_importance", ops.get("g"))
    kept = torch.ones(1, dtype=t.dtype)
    if g is not None and g.ndim == 1:
        kept = (g * t.instance.T).exp()[None, :, None] if t.instance.T else kept
    elif g is not None:
        kept = g.sum(1).exp()
        kept = kept[..., None] if g.ndim == 3 else kept
    if kept.ndim == 3 and state.importance.ndim == 4:
        kept = kept[..., None]
    result = t.run(t.spec, left, initial_state=state).final_state.importance
    yield Pair("final importance", result, kept * state.importance)


def _window(t: Trial) -> Found:
    """A geometric series bounds what importance remembers."""
    ops, i = t.operands(), t.instance
    g = ops.get("g_importance", ops.get("g"))
    assert g is not None
    J = t.run(t.spec, ops).final_state.importance
    a = g.exp().amax()
    k = 1 - ops["g"].exp() if t.spec.key == "one_minus_decay" else ops["k"]
    most = ops["b"].amax() * k.square().amax() * t.spec.substeps if i.T else a * 0
    yield Bound("final importance", J, (most / (1 - a)).expand_as(J))
    yield Bound("importance above the prior", torch.zeros_like(J), J)


def _variance_returns(t: Trial) -> Found:
    """Nothing observed: 1 / I - 1 / I_p decays as the mean's square does."""
    ops, state, i = expand_value_heads(t.program, t.operands()), t.state(), t.instance
    assert state is not None
    assert state.importance is not None
    gate = "b" if "b" in ops else "beta"
    last = t.run(t.spec, ops | {gate: torch.zeros_like(ops[gate])}, initial_state=state)
    found, start = last.final_state.importance.double(), state.importance.double()
    keep = torch.ones(i.B, i.T, i.HV, i.K, dtype=torch.float64)
    if "g" in ops:
        g = ops["g"].double()
        g = g[None, None].expand(i.B, i.T, -1) if g.ndim == 1 else g
        keep = (2 * (g if g.ndim == 4 else g[..., None])).exp() * keep
    if full(t.spec):
        root = keep.sqrt().prod(1)
        yield Pair("final covariance", found, root[..., None] * start * root[..., None, :])
        return
    if rotated(t.spec):
        keep = torch.einsum("bthk,hkj->bthj", keep, ops["basis"].double().square())
    if isotropic(t.spec):
        keep = keep.mean(-1, keepdim=True)
    prior = prior_of(ops).double()
    above, before = 1 / (found + prior) - 1 / prior, 1 / (start + prior) - 1 / prior
    yield Pair("final variance", above, keep.prod(1) * before)


def _monotone(t: Trial) -> Found:
    ops = still(t.operands())
    left = ops | {"q": ops["q"][:, :1].expand_as(ops["q"])}
    u = t.run(t.spec, left, initial_state=t.state(), output_uncertainty=True).uncertainty
    yield Bound("uncertainty", u[:, 1:], u[:, :-1])


def _on_axes(t: Trial, ops: Operands, x: Tensor) -> Tensor:
    """Return queries [B, T, HV, K] along the axes of the importance."""
    if not rotated(t.spec):
        return x
    basis = expand_value_heads(t.program, ops)["basis"].to(x.dtype)
    return torch.einsum("bthk,hkj->bthj", x, basis)


def _below_prior(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    u = t.run(t.spec, ops, output_uncertainty=True).uncertainty
    q = _on_axes(t, ops, t.scale * heads_of(ops, "q", i.HV))
    limit = (q.square() / prior_of(ops)).sum(-1)
    yield Bound("uncertainty", u, limit if u.ndim == 3 else limit[..., None])
    yield Bound("minus uncertainty", -u, torch.zeros_like(u))


def _variance(t: Trial) -> Found:
    ops, state, i = t.operands(), t.state(), t.instance
    u = t.run(t.spec, ops, initial_state=state, output_uncertainty=True).uncertainty
    J = importance(t.program, ops, state)
    q = _on_axes(t, ops, t.scale * heads_of(ops, "q", i.HV).double())
    if full(t.spec):
        column = q[..., None]
        if t.spec.forgetting == "diffuse":
            variance = 1 / prior_of(ops).double().expand(i.HV, i.K)
            spread = (J + torch.diag_embed(variance)) @ column
        else:
            spread = torch.linalg.solve(with_prior(t.spec, ops, J), column)
        yield Pair("uncertainty", u, (column * spread).sum((-1, -2)))
        return
    if t.spec.read.when == "pre":
        first = torch.zeros_like(J[:, :1])
        if state is not None:
            assert state.importance is not None
            start = state.importance.double()
            first = (start[:, :, None] if start.ndim == 3 else start.mT)[:, None]
        J = torch.cat([first, J[:, :-1]], 1)[:, : i.T]
    expected = (q.square()[..., None, :] / (J + prior_of(ops).double()[:, None])).sum(-1)
    yield Pair("uncertainty", u, expected if u.ndim == 4 else expected[..., 0])


def _mean_field(t: Trial) -> Found:
    """1 / Lambda_jj <= (Lambda^-1)_jj."""
    ops, i = t.operands(), t.instance
    axis = t.integer(0, i.K - 1)
    q = torch.zeros_like(ops["q"])
    q[..., axis] = 1
    gate = t.uniform(i.B, i.T, i.HV)
    left = ops | {"q": q, "beta": gate, "b": expanded(gate, i.V)}
    right = {name: left[name] for name in ("q", "k", "v", "g", "beta", "prior")}
    u = t.run(t.spec, left, output_uncertainty=True, scale=1.0).uncertainty
    exact = t.run(load("mesanet"), right, output_uncertainty=True, scale=1.0).uncertainty
    yield Bound("marginal variance", u, exact[..., None].expand_as(u))


def _units(t: Trial) -> Found:
    ops, c = t.operands(), 0.5 + 2 * float(t.uniform(1))
    right = dict(ops)
    for name in ("beta", "b", "prior"):
        if name in ops:
            right[name] = c * ops[name]
    if "noise" in ops:
        right["noise"] = ops["noise"] / c
    if rate(t.spec):
        # c r as a rate, where beta is the rate of r
        square = heads_of(ops, "k", t.instance.HV).square().sum(-1)
        known = ops["beta"] * (square if ops["beta"].ndim == 3 else square[..., None])
        right["beta"] = right["beta"] / (1 + (c - 1) * known)
    a = t.run(t.spec, ops, output_uncertainty=True)
    b = t.run(t.spec, right, output_uncertainty=True)
    yield Pair("output", a.output, b.output)
    yield Pair("uncertainty", a.uncertainty, c * b.uncertainty)


def _exchange(t: Trial) -> tuple[object, object]:
    ops, i, n = still(t.operands()), t.instance, t.spec.substeps
    order = t.permutation(i.T)
    steps = (order[:, None] * n + torch.arange(n)).flatten()
    right = {
        o.name: (
            ops[o.name][:, steps if "nT" in o.shapes[0] else order]
            if o.per_token and ops[o.name].ndim > 2
            else ops[o.name]
        )
        for o in t.program.operands
        if o.name in ops
    }
    state = t.state()
    a = t.run(t.spec, ops, initial_state=state).final_state
    return a, t.run(t.spec, right, initial_state=state).final_state


def _exchangeable(t: Trial) -> Found:
    a, b = _exchange(t)
    for part in ("memory", "importance", "normalizer"):
        x, y = getattr(a, part), getattr(b, part)
        if x is not None:
            yield Pair(f"final {part}", x, y)


def _not_exchangeable(t: Trial) -> Found:
    a, b = _exchange(t)
    moved = (a.memory - b.memory).abs().max()  # type: ignore[attr-defined]
    yield Bound("least change of the memory", torch.full_like(moved, 1e-6), moved)


def _slot_shift(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    shift = 3 * t.normal(1, 1, i.H, i.K)
    a, b = t.run(t.spec, ops), t.run(t.spec, ops | {"k": ops["k"] + shift})
    yield Pair("output", a.output, b.output)
    moved = shift[0].repeat_interleave(i.G, 1)
    yield Pair("final importance", a.final_state.importance + moved, b.final_state.importance)


_PALIMPSA = "arXiv:2602.09075"
_GENERIC = Domain(
    regimes=("normal",), batch=(1, 1), tokens=(4, 7), heads=(1, 1), groups=(1, 2), keys=(3, 4),
    values=(2, 3), start=False,
)  # fmt: skip


def _accumulates(spec: Spec) -> bool:
    """Its state is a sum over tokens, in one or the other parameterisation."""
    own = spec.posterior.precision == "diagonal" and not rotated(spec)
    variances = spec.importance is not None and spec.hebbian and (own or full(spec))
    # Or it predicts with all that was seen.
    exact = full(spec) and not has("b")(spec)
    return spec.sums_writes or spec.log_evidence or variances or exact


_UNIT_STEP = where(frozen, default_erase, plain, has("beta"), lambda s: s.write.shape == "head")

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "hebbian-is-a-weighted-sum",
        "h_t = sum_s D_ts k_s w_s^T,  J_t = sum_s D_ts b_s k_s^2,  y_t = (h_t / I_t)^T q_t",
        "a spec that subtracts no prediction",
        "the dense sum over all pairs of tokens",
        f"arXiv:2405.21060, section 3; {_PALIMPSA}",
        _unrolled,
        where(lambda s: s.sums_writes, without(full, log_evidence)),
        domain=Domain(long=70),
    ),
    Entry(
        "delta-rule-solves-a-triangular-system",
        "(1 + L) u = w - e^T D S_0,  L_ts = e_t . D_ts k_s (s < t),  S_t = sum_s D_ts k_s u_s",
        "a spec that subtracts a prediction, or whose variance grows, over the dense importance",
        "the dense triangular solve over all pairs of tokens",
        "arXiv:2406.06484, section 3",
        _unrolled,
        where(lambda s: s.memory_is_mean, without(full, log_evidence)),
        domain=Domain(long=70),
    ),
    Entry(
        "log-evidence-is-a-softmax-over-time",
        "mu_t = sum_s softmax_{s <= t}(k_s) v_s per slot",
        "a spec with evidence e^k",
        "a softmax over the past of every key channel",
        "arXiv:2405.21022, section 3",
        _unrolled,
        log_evidence,
        domain=Domain(long=70),
    ),
    Entry(
        "full-precision-is-a-normal-equation",
        "y_t = (sum_s D_ts beta_s k_s v_s^T)^T (sum_s D_ts beta_s k_s k_s^T + Lambda)^-1 q_t",
        "a spec with full precision that sums its writes",
        "normal equations assembled densely",
        "arXiv:2506.05233, eq. 4",
        _unrolled,
        where(full, lambda s: s.sums_writes),
        domain=Domain(long=70),
    ),
    Entry(
        "full-precision-solves-for-its-means",
        "mu_t = (1 - kappa_t e_t^T) F_t mu_{t-1} + kappa_t w_t^T,  F_t = a_t L'_t^-1 L_{t-1}",
        "a spec with full precision that predicts, and forgets by tempering",
        "one linear system for the means of all tokens, with dense precision matrices",
        "ours",
        _unrolled,
        where(full, tempers, without(lambda s: s.sums_writes)),
        domain=Domain(long=70),
    ),
    Entry(
        "growing-variance-is-a-gaussian-process",
        "P_t = Var(x_t | k_s^T x_s + noise of precision b_s, s <= t),  x_t = a_t x_{t-1} + noise",
        "a spec with full precision whose variance grows",
        "a joint Gaussian over all tokens, conditioned densely",
        "Kalman, 1960; ours",
        _unrolled,
        where(full, lambda s: s.forgetting == "diffuse"),
        domain=Domain(long=70),
    ),
    Entry(
        "natural-form-is-predict-correct",
        "h_t / I_t = mu' + (w_t k_t - b_t k_t^2 mu') / I_t,  mu' = (a I_{t-1} / I'_t) mu_{t-1}",
        "a metaplastic Hebbian spec, scalar or key-vector forgetting",
        "mean and importance stepped in predict/correct form",
        f"{_PALIMPSA}, eq. 25-26",
        _predict_correct,
        where(hebbian, tempered, plain),
    ),
    Entry(
        "one-hot-keys-are-exact-inference",
        "k_t in {+-e_j}, b = beta: y_t and uncertainty_t are those of the exact posterior",
        "a metaplastic spec, any correction and gain",
        "dense Gaussian regression that forgets toward the prior",
        "ours",
        _exact,
        where(tempered, observes),
        condition="keys are signed basis vectors, b = beta, one decay per head",
        domain=Domain(regimes=("one_hot",), start=False),
    ),
    Entry(
        "full-precision-is-exact-inference",
        "y_t = E[M]^T q_t under w_ts = beta_s prod_{r > s} a_r: exponentially weighted ridge",
        "a spec with full precision that forgets by tempering, b = beta",
        "dense Gaussian regression that forgets toward the prior",
        "arXiv:2506.05233, eq. 4-6",
        _exact,
        where(full, tempers, observes, without(relative)),
        condition="b = beta, or the precision whose rate it is",
        domain=Domain(start=False),
    ),
    Entry(
        "discount-forgets-the-prior",
        "k_t in {+-e_j}, b = beta: Lambda_t = (prod a) I_p + sum_s w_ts k_s k_s^T",
        "a metaplastic spec that discounts",
        "dense Gaussian regression whose prior is discounted as its observations are",
        "recursive least squares with a forgetting factor",
        _exact,
        where(bayesian, discounts, observes, without(rotated, isotropic)),
        condition="keys are signed basis vectors, b = beta, one decay per head",
        domain=Domain(regimes=("one_hot",), start=False),
    ),
    Entry(
        "full-precision-is-ridge-regression",
        "a = 1: y_T = q^T argmin_M sum_s beta_s |v_s - M^T k_s|^2 + |Lambda^1/2 M|^2",
        "a spec with full precision, g = 0, b = beta",
        "the pseudo-inverse of the augmented least squares problem",
        "arXiv:2506.05233, eq. 4",
        _least_squares,
        where(full, observes, without(relative)),
        condition="no forgetting, b = beta",
        domain=Domain(
            regimes=("normal", "zero_keys", "one_hot", "mixed"), tokens=(1, 9), start=False
        ),
    ),
    Entry(
        "exact-gain-is-a-one-step-posterior",
        "prior N(a mu, 1), noise precision beta: the implicit delta step is its posterior mean",
        "a frozen delta rule with the exact gain, token by token",
        "dense Gaussian regression on one token",
        "arXiv:2407.14207, eq. 8",
        _exact_step,
        where(_UNIT_STEP, corrected("exact")),
    ),
    Entry(
        "sigmoid-delta-is-a-one-step-posterior",
        "|k| = 1, beta = sigmoid(x): a delta step = the posterior mean at noise precision e^x",
        "a frozen delta rule with the first-order gain, token by token",
        "dense Gaussian regression on one token",
        "ours",
        _sigmoid_step,
        where(_UNIT_STEP, corrected("first_order")),
        condition="unit keys, beta in (0, 1)",
        domain=Domain(regimes=("normal", "no_decay", "strong_decay", "reset", "one_hot")),
    ),
    Entry(
        "longhorn-drops-off-diagonals",
        "mu_t = diag((1 + beta k k^T)^-1) mu + (1 + beta k k^T)^-1 beta k v^T",
        "a frozen spec with diagonal correction and the exact gain",
        "the implicit step's inverse without its off-diagonals",
        "arXiv:2407.14207, eq. 9",
        _dropped,
        where(frozen, corrected("exact", "diagonal"), plain),
    ),
    Entry(
        "delta-rule-is-a-gradient-step",
        "mu_t = mu' - beta grad_mu |v - mu^T k|^2 / 2 at the decayed mean mu' = a mu",
        "a frozen delta rule, token by token",
        "one gradient step by automatic differentiation",
        "arXiv:2412.06464, section 3",
        _gradient_step,
        where(_UNIT_STEP, corrected("first_order")),
    ),
    Entry(
        "full-step-recalls",
        "beta = 1, |k| = 1: the delta rule reads back v_t at k_t, whatever it held",
        "a frozen delta rule at beta = 1, or its metaplastic form with the exact gain",
        "the value just written",
        "arXiv:2406.06484, section 2",
        _recall,
        where(
            default_erase,
            has("beta"),
            lambda s: rate(s) or (frozen(s) and corrected("first_order")(s)),
        ),
        condition="unit keys, beta = 1",
        domain=Domain(regimes=("normal", "no_decay", "strong_decay", "reset", "one_hot")),
    ),
    Entry(
        "exact-gain-contracts",
        "|v - mu_t^T k| <= |v - mu'^T k|; frozen: = |v - mu'^T k| / (1 + beta |k|^2)",
        "a delta rule with the exact gain, its last write",
        "its error before the write",
        "ours",
        _contraction,
        where(corrected("exact"), lambda s: s.steps.count == 1),
        kind=Kind.INEQUALITY,
        domain=Domain(tokens=(1, 1)),
    ),
    Entry(
        "rate-beyond-one-keeps-its-factor",
        "beta |k|^2 >= 1: v - mu_t^T k = (1 - beta |k|^2) (v - mu'^T k), whatever the importance",
        "a metaplastic delta rule with the exact gain, its last write at 1 + beta",
        "its error before the write, times the source's factor",
        "ours",
        _beyond_one,
        where(rate, lambda s: s.steps.count == 1),
        domain=Domain(tokens=(1, 1)),
    ),
    Entry(
        "dropped-off-diagonals-never-overshoot",
        "0 <= 1 - k_j G_j <= 1: without values no synapse grows or changes sign",
        "diagonal correction with the exact gain, v = 0",
        "the state before",
        "ours; arXiv:2407.14207, section 3",
        _bounded_gain,
        corrected("exact", "diagonal"),
        kind=Kind.INEQUALITY,
        domain=Domain(start=True),
    ),
    Entry(
        "importance-returns-to-the-prior",
        "nothing written: I_T - I_p = (prod_t a_t) (I_0 - I_p)",
        "a spec with importance and its gate at zero",
        "the decayed start",
        f"{_PALIMPSA}, eq. 26",
        _returns_to_prior,
        where(tempers, lambda s: full(s) or has("b")(s), without(log_evidence)),
        domain=Domain(start=True),
    ),
    Entry(
        "variance-returns-to-the-prior",
        "nothing observed: 1 / I_T - 1 / I_p = (prod_t a_t^2) (1 / I_0 - 1 / I_p)",
        "a spec whose variance grows, and its importance gate at zero",
        "the decayed start; one number: by mean(a^2), other axes: by (R^T)^2 a^2",
        "ours",
        _variance_returns,
        where(lambda s: s.forgetting == "diffuse", without(noisy)),
        domain=Domain(start=True),
    ),
    Entry(
        "importance-has-a-window",
        "I_p <= I_t <= I_p + max(b k^2) / (1 - a)",
        "a spec with importance that forgets",
        "a geometric series",
        f"{_PALIMPSA}, section 3",
        _window,
        where(
            has("b"),
            lambda s: s.decay.shape != "none" or own_decay(s),
            without(full, rotated, noisy, discounts),
        ),
        condition="a <= max a < 1",
        kind=Kind.INEQUALITY,
        domain=Domain(regimes=("normal", "strong_decay", "zero_keys"), tokens=(1, 9), start=False),
    ),
    Entry(
        "uncertainty-never-grows-without-forgetting",
        "a = 1, q fixed: uncertainty_{t+1} <= uncertainty_t",
        "a spec with importance, g = 0",
        "its own uncertainty one token before",
        f"{_PALIMPSA}, section 2",
        _monotone,
        where(lambda s: s.importance is not None, without(preconditioned)),
        kind=Kind.INEQUALITY,
        domain=Domain(
            regimes=("normal", "zero_write", "zero_keys", "zero_gate", "one_hot"),
            tokens=(2, 9),
            start=True,
        ),
    ),
    Entry(
        "uncertainty-is-below-the-prior's",
        "0 <= uncertainty_t <= sum_j q_j^2 / I_p,j",
        "a spec with importance whose prior stays",
        "the variance before anything was observed",
        "ours",
        _below_prior,
        where(lambda s: bayesian(s) or full(s), without(noisy, discounts, relative)),
        kind=Kind.INEQUALITY,
        domain=Domain(start=False),
    ),
    Entry(
        "uncertainty-is-the-variance-of-the-read",
        "uncertainty_t = sum_j (scale q_t)_j^2 / (J_t + I_p)_j, full: (scale q)^T I^-1 (scale q)",
        "a metaplastic spec",
        "the dense sum of evidence",
        f"{_PALIMPSA}, section 2",
        _variance,
        lambda s: bayesian(s) or full(s),
    ),
    Entry(
        "diagonal-precision-underestimates-marginals",
        "1 / Lambda_jj <= (Lambda^-1)_jj: mean-field variance at q = e_j is at most the exact one",
        "palimpsa with b = beta",
        "mesanet",
        "mean-field variational inference; ours",
        _mean_field,
        named("palimpsa", "meta_mamba2"),
        kind=Kind.INEQUALITY,
        domain=Domain(start=False),
    ),
    Entry(
        "precision-has-units",
        "y(c r, c b, c I_p) = y(r, b, I_p), r = beta or that of the rate beta;  u(c ..) = u / c",
        "a spec with importance",
        "the same spec in other units of precision",
        "ours",
        _units,
        where(
            lambda s: bayesian(s) or full(s),
            has("beta"),
            lambda s: s.erase.strength == "write" and s.read.normalizer == "none",
            without(has("u"), relative),
        ),
        kind=Kind.INVARIANCE,
        domain=Domain(start=False),
    ),
    Entry(
        "posterior-is-exchangeable",
        "a = 1: the final state does not depend on the order of the tokens",
        "specs that sum their writes, or their variances, log evidence, g = 0",
        "the same tokens in another order",
        "ours",
        _exchangeable,
        where(_accumulates, lambda s: s.steps.source == "projected" and s.key == "operand"),
        condition="no forgetting",
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "delta-rule-is-not-exchangeable",
        "a = 1: the final memory of a delta rule depends on the order of the tokens",
        "specs that subtract a prediction and do not sum their writes, g = 0",
        "the same tokens in another order",
        "ours",
        _not_exchangeable,
        without(_accumulates),
        condition="no forgetting, keys in general position",
        kind=Kind.INEQUALITY,
        domain=_GENERIC,
    ),
    Entry(
        "slots-do-not-see-a-shift",
        "k -> k + c per slot: y unchanged, log I -> log I + c",
        "a spec with evidence e^k",
        "the same spec on shifted keys",
        "arXiv:2405.21022",
        _slot_shift,
        log_evidence,
        kind=Kind.INVARIANCE,
        domain=Domain(tokens=(1, 9), start=False),
    ),
)
