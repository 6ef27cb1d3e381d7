"""Special cases: which variant is which other one, under which operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glazoo.program import lower
from glazoo.spec import Posterior, Spec, SpecError, Steps, freeze, metaplasticize
from glazoo.theory.catalogue.axes import (
    bayesian,
    changed,
    corrected,
    data_decay,
    default_erase,
    every,
    expanded,
    freezable,
    frozen,
    full,
    has,
    heads_of,
    hebbian,
    identical,
    keeps_source,
    log_evidence,
    named,
    plain,
    preconditioned,
    prior_of,
    rate,
    rotated,
    same,
    tempered,
    tempers,
    token_decay,
    where,
    with_gain,
    without,
    without_importance,
    write_gate,
)
from glazoo.theory.entry import Comparison, Domain, Entry, Kind, Pair, Trial
from glazoo.theory.instances import Operands, Regime
from glazoo.theory.maps import (
    expand_value_heads,
    in_basis,
    take,
    tokens,
    with_importance_gate,
)
from glazoo.theory.unrolled import importance, with_prior
from glazoo.zoo import load

__all__ = ["ENTRIES"]

Found = Iterator[Comparison]

NO_START = Domain(start=False)
FINITE: tuple[Regime, ...] = (
    "normal",
    "no_decay",
    "zero_write",
    "zero_keys",
    "large_prior",
    "one_hot",
)


def _only(operands: Operands, *names: str) -> Operands:
    return {name: x for name, x in operands.items() if name in names}


def _linear_is_retnet(t: Trial) -> Found:
    ops = t.operands()
    g = t.uniform(t.instance.HV) * 0
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("retnet"), ops | {"g": g}, initial_state=t.state()),
    )


def _fixed_is_data(t: Trial) -> Found:
    ops = t.operands()
    g = ops["g"].expand(t.instance.B, t.instance.T, -1)
    right = data_decay(t.spec, "head")
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(right, ops | {"g": g}, initial_state=t.state()),
    )


def _retnet_is_simple_gla(t: Trial) -> Found:
    ops = t.operands()
    g = ops["g"].expand(t.instance.B, t.instance.T, -1)
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("simple_gla"), ops | {"g": g}, initial_state=t.state(), scale=t.scale),
    )


def _simple_gla_is_gla(t: Trial) -> Found:
    ops = t.operands()
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("gla"), ops | {"g": expanded(ops["g"], t.instance.K)}, initial_state=t.state()),
    )


def _mamba2_is_simple_gla(t: Trial) -> Found:
    ops = t.operands()
    # Discretisation: g = -dt A. The step dt enters the decay here, and the value on the right.
    rate = 0.1 + t.uniform(t.instance.HV)
    ops |= {"g": -ops["beta"] * rate}
    right = _only(ops, "q", "k") | {
        "g": -(ops["beta"] * rate),
        "v": ops["beta"][..., None] * ops["v"],
    }
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("simple_gla"), right, initial_state=t.state(), scale=1.0),
    )


def _rodimus_is_gla(t: Trial) -> Found:
    ops = t.operands()
    right = _only(ops, "q", "k", "g") | {"v": ops["beta"] * ops["v"]}
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("gla"), right, initial_state=t.state()),
    )


def _hgrn2_is_gla(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    right = ops | {"k": -torch.expm1(ops["g"])}
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("gla"), right, initial_state=t.state()),
    )


def _deltanet_is_gdn(t: Trial) -> Found:
    ops = t.operands()
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(
            load("gated_deltanet"),
            ops | {"g": torch.zeros_like(ops["beta"])},
            initial_state=t.state(),
        ),
    )


def _gdn_is_kda(t: Trial) -> Found:
    ops = t.operands()
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("kda"), ops | {"g": expanded(ops["g"], t.instance.K)}, initial_state=t.state()),
    )


def _kda_is_generalised(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    decay, k, beta = ops["g"].exp(), ops["k"], ops["beta"][..., None]
    right = _only(ops, "q", "k", "g") | {"v": beta * ops["v"], "p": decay * k}
    right["removal"] = beta / decay
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(load("rwkv7"), right, initial_state=t.state(), scale=t.scale),
    )


def _gdn2_is_kda(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    beta = t.uniform(i.B, i.T, i.HV)
    left = ops | {"beta": expanded(beta, i.V), "erase": expanded(beta, i.K)}
    right = _only(ops, "q", "k", "v", "g") | {"beta": beta}
    yield from same(
        t.run(t.spec, left, initial_state=t.state()),
        t.run(load("kda"), right, initial_state=t.state()),
    )


def _comba_is_gdn(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    left = ops | {"p": ops["g"].exp()[..., None] * ops["k"]}
    right = _only(ops, "q", "k", "v", "g", "beta")
    yield from same(
        t.run(t.spec, left, initial_state=t.state()),
        t.run(load("gated_deltanet"), right, initial_state=t.state()),
    )


def _product_is_gdn(t: Trial) -> Found:
    ops = t.operands()
    n = t.spec.steps.count
    first = torch.arange(ops["beta"].shape[1]) % n == 0
    left = ops | {"beta": ops["beta"] * first[:, None].to(t.dtype)}
    right = _only(ops, "q", "g") | {name: ops[name][:, ::n] for name in ("k", "v", "beta")}
    yield from same(
        t.run(t.spec, left, initial_state=t.state()),
        t.run(load("gated_deltanet"), right, initial_state=t.state()),
    )


def _steps_are_tokens(t: Trial) -> Found:
    ops, n = t.operands(), t.spec.steps.count
    single = changed(t.spec, steps=Steps())
    right = {}
    for operand in t.program.operands:
        if operand.name not in ops:
            continue
        x = ops[operand.name]
        if operand.per_token and "T" in operand.shapes[0]:
            # Only the last sub-step of a token is read, only the first one forgets.
            x = x.repeat_interleave(n, 1)
            if operand.role in ("decay", "noise"):
                x = x * (torch.arange(x.shape[1]) % n == 0).view(1, -1, *[1] * (x.ndim - 2))
                x = x.nan_to_num(nan=0.0, neginf=-torch.inf)
        right[operand.name] = x
    a = t.run(t.spec, ops, initial_state=t.state())
    b = t.run(single, right, initial_state=t.state())
    yield Pair("output", a.output, b.output[:, n - 1 :: n])
    yield Pair("final memory", a.final_state.memory, b.final_state.memory)
    if a.final_state.importance is not None:
        yield Pair("final importance", a.final_state.importance, b.final_state.importance)


def _implicit_is_gdn(t: Trial) -> Found:
    ops = t.operands()
    # Keys of any length: the exact gain normalises by them.
    k = ops["k"] * (0.5 + t.uniform(*ops["k"].shape[:-1], 1))
    left = ops | {"k": k}
    squared = heads_of(left, "k", t.instance.HV).square().sum(-1)
    right = left | {"beta": ops["beta"] / (1 + ops["beta"] * squared)}
    yield from same(
        t.run(t.spec, left, initial_state=t.state()),
        t.run(load("gated_deltanet"), right, initial_state=t.state()),
    )


def _lagged_is_plain(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    single = changed(t.spec, steps=Steps())
    left = ops | {"trap": torch.ones_like(ops["trap"])}
    right = {name: x for name, x in ops.items() if name != "trap"}
    state = t.state()
    plain_state = None if state is None else state._replace(lag_key=None, lag_value=None)
    a = t.run(t.spec, left, initial_state=state)
    b = t.run(single, right, initial_state=plain_state)
    yield from same(a, b, parts=("memory", "importance"))
    if i.T and a.final_state.lag_key is not None:
        yield Pair("final lag key", a.final_state.lag_key, ops["k"][:, -1])
        yield Pair("final lag value", a.final_state.lag_value, ops["v"][:, -1])


def _trapezoid_is_one_write(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    single = changed(t.spec, steps=Steps())
    trap, beta = ops["trap"], ops["beta"]
    later = torch.cat([(beta * (1 - trap))[:, 1:], torch.zeros_like(beta[:, :1])], 1)[:, : i.T]
    right = {name: x for name, x in ops.items() if name != "trap"}
    right |= {"beta": beta * trap + later}
    a = t.run(t.spec, ops).output
    b = t.run(single, right).output
    similarity = (heads_of(ops, "q", i.HV) * heads_of(ops, "k", i.HV)).sum(-1) * t.scale
    yield Pair("output", a, b - (later * similarity)[..., None] * ops["v"])


def _pre_is_post(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    post = changed(t.spec, read=t.spec.read.model_copy(update={"when": "post", "bonus": False}))
    q, k = heads_of(ops, "q", i.HV), heads_of(ops, "k", i.HV)
    undecayed = q * (-ops["g"]).exp()
    right = expand_value_heads(t.program, ops) | {"q": undecayed}
    right = {name: x for name, x in right.items() if name != "u"}
    y = t.run(post, right, initial_state=t.state()).output
    own = (undecayed * k).sum(-1, keepdim=True)
    bonus = (ops["u"] * k * q).sum(-1, keepdim=True) if "u" in ops else 0.0
    y = y + t.scale * (bonus - own) * ops["v"]
    yield Pair("output", t.run(t.spec, ops, initial_state=t.state()).output, y)


def _normalizer_is_ones(t: Trial) -> Found:
    ops = t.operands()
    numerator = changed(t.spec, read=t.spec.read.model_copy(update={"normalizer": "none"}))
    right = ops | {"v": torch.cat([ops["v"], torch.ones_like(ops["v"][..., :1])], -1)}
    y = t.run(numerator, right).output
    y, mass = y[..., :-1], y[..., -1:]
    if t.spec.read.normalizer == "sum":
        expected = y / (mass + t.spec.read.eps)
    else:
        expected = y / mass.abs().clamp(min=1)
    yield Pair("output", t.run(t.spec, ops).output, expected)


def _no_decay_is_zero(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    right = ops | {"g": torch.zeros(i.B, i.T, i.HV, dtype=t.dtype)}
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(data_decay(t.spec, "head"), right, initial_state=t.state()),
        parts=("memory", "importance"),
    )


def _head_decay_is_key_decay(t: Trial) -> Found:
    ops = t.operands()
    right = ops | {"g": expanded(ops["g"], t.instance.K)}
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(data_decay(t.spec, "key"), right, initial_state=t.state()),
        parts=("memory", "importance"),
    )


def _write_gate_is_value(t: Trial) -> Found:
    ops = t.operands()
    beta = ops["beta"] if ops["beta"].ndim == 4 else ops["beta"][..., None]
    right = {name: x for name, x in ops.items() if name != "beta"} | {"v": beta * ops["v"]}
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(write_gate(t.spec, "none"), right, initial_state=t.state()),
        parts=("memory", "importance"),
    )


def _palimpsa_is_metaplastic(t: Trial) -> Found:
    ops = t.operands()
    right = {name: x for name, x in ops.items() if name != "beta"}
    right |= {"v": ops["beta"][..., None] * ops["v"]}
    yield from same(
        t.run(t.spec, ops, initial_state=t.state()),
        t.run(
            metaplasticize(load("simple_gla"), gate="value"),
            right,
            initial_state=t.state(),
            scale=t.scale,
        ),
        parts=("memory", "importance"),
    )


def _closed(t: Trial, ops: Operands, source: Spec, right: Operands) -> tuple[Any, Any]:
    """Runs a metaplastic spec at b = 0, I_p = 1, and its source."""
    left = ops | {"b": torch.zeros_like(ops["b"]), "prior": torch.ones_like(ops["prior"])}
    state = t.state()
    without_importance = None if state is None else state._replace(importance=None)
    if state is not None:
        assert state.importance is not None
        state = state._replace(importance=torch.zeros_like(state.importance))
        state = in_basis(t.spec, ops, state)
    a = t.run(t.spec, left, initial_state=state)
    final = in_basis(t.spec, ops, a.final_state, back=True)
    return a._replace(final_state=final), t.run(source, right, initial_state=without_importance)


def _at_zero(t: Trial) -> Found:
    ops = t.operands()
    a, b = _closed(t, ops, freeze(t.spec), without_importance(ops))
    yield from same(a, b)
    yield Pair(
        "final importance", a.final_state.importance, torch.zeros_like(a.final_state.importance)
    )


def _bits_at_zero(t: Trial) -> Found:
    ops, i, source = t.operands(), t.instance, freeze(t.spec)
    # Keys of any length, but none that the source diverges on.
    length = 0.3 + 1.1 * t.uniform(*ops["k"].shape[:3], 1)
    ops["k"] = length * ops["k"]
    right = without_importance(ops)
    if "g" in ops and tempers(t.spec):
        source = data_decay(source, "key")
        right["g"] = ops["g"] if ops["g"].ndim == 4 else expanded(ops["g"], i.K)
    a, b = _closed(t, ops, source, right)
    # Two implementations round in two ways.
    yield from identical(a, b) if t.others is None else same(a, b)


def _rate_is_precision(t: Trial) -> Found:
    ops = t.operands()
    beta, k = 0.9 * ops["beta"], heads_of(ops, "k", t.instance.HV)
    square = k.square().sum(-1)
    precision = beta / (1 - beta * (square if beta.ndim == 3 else square[..., None]))
    left = t.run(t.spec, ops | {"beta": beta}, initial_state=t.state())
    right = t.run(with_gain(t.spec, "exact"), ops | {"beta": precision}, initial_state=t.state())
    yield from same(left, right, parts=("memory", "importance"))


def _over(ops: Operands, q: Tensor, importance: Tensor) -> Tensor:
    """Return queries per value head [B, T, HV, K] over an importance along its own axes."""
    if "basis" not in ops:
        return q / importance
    basis = ops["basis"].to(q.dtype)
    along = torch.einsum("bthk,hkj->bthj", q, basis) / importance
    return torch.einsum("bthj,hkj->bthk", along, basis)


def _zero_gate_any_prior(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    left = ops | {"b": torch.zeros_like(ops["b"])}
    right = without_importance(ops) | {"q": _over(ops, ops["q"], prior_of(ops))}
    a, b = t.run(t.spec, left), t.run(freeze(t.spec), right)
    a = a._replace(final_state=in_basis(t.spec, ops, a.final_state, back=True))
    yield from same(a, b, parts=() if t.spec.memory_is_mean else ("memory",))


def _head_gate_is_query(t: Trial) -> Found:
    ops, state = t.operands(), t.state()
    J = importance(t.program, ops, state)
    right = expand_value_heads(t.program, ops)
    if full(t.spec):
        total = with_prior(t.spec, ops, J)
        q = torch.linalg.solve(total, right["q"].double()[..., None])[..., 0]
    else:
        q = _over(right, right["q"].double(), J[..., 0, :] + prior_of(ops).double())
    right = without_importance(right) | {"q": q.to(t.dtype)}
    source_state = None
    if state is not None:
        source_state = in_basis(t.spec, ops, state, back=True)._replace(importance=None)
        if state.lag_key is not None:
            lag = state.lag_key.repeat_interleave(t.instance.G, 1)
            source_state = source_state._replace(lag_key=lag)
    a = t.run(t.spec, ops, initial_state=state)
    yield from same(
        a._replace(final_state=in_basis(t.spec, ops, a.final_state, back=True)),
        t.run(freeze(t.spec), right, initial_state=source_state),
    )


def _head_gate_is_generalised_delta(t: Trial) -> Found:
    ops, i, state = expand_value_heads(t.program, t.operands()), t.instance, t.state()
    J = importance(t.program, ops, state)[..., 0, :]
    first = torch.zeros_like(J[:, :1])
    if state is not None:
        assert state.importance is not None
        first = state.importance.double()[:, None]
    before = torch.cat([first, J[:, :-1]], 1)[:, : i.T]
    g = ops.get("g")
    decay = torch.ones_like(J)
    if g is not None:
        decay = (g if g.ndim == 4 else g[..., None]).double().exp() * decay
    I_p = ops["prior"].double()
    retained = decay * (before + I_p) / (decay * before + I_p)
    written = ops["k"].double() / (J + I_p)
    beta = ops["beta"].double()[..., None]
    right = _only(ops, "q") | {
        "k": written,
        "v": beta * ops["v"].double(),
        "g": retained.log().clamp(max=0),
        "p": retained * ops["k"].double(),
        "removal": beta / (J + I_p) / retained,
    }
    right = {name: x.to(t.dtype) for name, x in right.items()}
    source_state = None if state is None else state._replace(importance=None)
    yield from same(
        t.run(t.spec, ops, initial_state=state),
        t.run(load("rwkv7"), right, initial_state=source_state, scale=t.scale),
    )


def _constant_value_gate(t: Trial) -> Found:
    ops, i, state = t.operands(), t.instance, t.state()
    b = ops["b"][..., 0]
    right_state = state
    if state is not None:
        assert state.importance is not None
        shared = state.importance[..., 0]
        right_state = state._replace(importance=shared)
        state = state._replace(importance=expanded(shared, i.V))
    a = t.run(t.spec, ops | {"b": expanded(b, i.V)}, initial_state=state, output_uncertainty=True)
    c = t.run(
        with_importance_gate(t.spec, "head"),
        ops | {"b": b},
        initial_state=right_state,
        output_uncertainty=True,
    )
    yield from same(a, c)
    yield Pair(
        "final importance", a.final_state.importance, expanded(c.final_state.importance, i.V)
    )
    yield Pair("uncertainty", a.uncertainty, expanded(c.uncertainty, i.V))


def _base_one(t: Trial) -> Found:
    ops = t.operands()
    imp = t.spec.importance
    assert imp is not None
    assert imp.preconditioner is not None
    flat = imp.preconditioner.model_copy(update={"base": 1.0})
    left = changed(t.spec, importance=imp.model_copy(update={"preconditioner": flat}))
    right = changed(
        t.spec, importance=None, posterior=Posterior(precision="frozen", correction="full")
    )
    ignored = ("b", "g_importance", "center")
    state = t.state()
    yield from same(
        t.run(left, ops, initial_state=state),
        t.run(
            right,
            {name: x for name, x in ops.items() if name not in ignored},
            initial_state=None if state is None else state._replace(importance=None),
        ),
    )


def _gauge(t: Trial) -> Found:
    ops = expand_value_heads(t.program, t.operands())
    g = ops["g"] if ops["g"].ndim == 4 else ops["g"][..., None]
    total = g.cumsum(1)
    right = {name: x for name, x in ops.items() if name != "g"}
    right |= {"q": ops["q"] * total.exp(), "k": ops["k"] * (-total).exp()}
    left_side = t.run(t.spec, ops)
    right_side = t.run(data_decay(t.spec, "head"), right | {"g": torch.zeros_like(g[..., 0])})
    yield Pair("output", left_side.output, right_side.output)


def _freeze_inverts(t: Trial) -> Found:
    options: list[dict[str, Any]] = [{"gate": "head"}, {"gate": "value"}]
    options += [
        {"precision": precision, "forgetting": forgetting}
        for precision in ("diagonal", "isotropic", "full")
        for forgetting in ("temper", "diffuse")
    ]
    for given in (*options, {"basis": "rotated"}):
        try:
            back = freeze(metaplasticize(t.spec, **given))
        except SpecError:
            continue
        equal = torch.tensor([float(back == t.spec)])
        yield Pair(f"freeze(metaplasticize(s, {given})) == s", equal, torch.ones(1))


def _identity_prefix(t: Trial) -> Found:
    """The output of the first tokens is that of the first tokens alone."""
    ops, i = t.operands(), t.instance
    cut = t.integer(0, i.T)
    whole = t.run(t.spec, ops, initial_state=t.state()).output
    prefix = t.run(t.spec, tokens(t.program, ops, 0, cut), initial_state=t.state()).output
    yield Pair("output", whole[:, :cut], prefix)


def _one_sequence(t: Trial) -> Found:
    """Batch elements do not see each other."""
    ops, i = t.operands(), t.instance
    whole = t.run(t.spec, ops).output
    for n in range(i.B):
        alone = t.run(t.spec, take(t.program, ops, "B", torch.tensor([n]))).output
        yield Pair(f"output of sequence {n}", whole[n : n + 1], alone)


_GLA = "arXiv:2312.06635, section 4"
_PALIMPSA = "arXiv:2602.09075"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "linear-attention-is-retnet",
        "LinearAttention(q, k, v) = RetNet(q, k, v; g = 0)",
        "linear_attention",
        "retnet with g = 0",
        "arXiv:2307.08621, eq. 5",
        _linear_is_retnet,
        named("linear_attention"),
    ),
    Entry(
        "retnet-is-simple-gla",
        "RetNet(q, k, v; g_h) = SimpleGLA(q, k, v; g_th = g_h)",
        "retnet, lightning",
        "simple_gla with g repeated over tokens",
        _GLA,
        _retnet_is_simple_gla,
        named("retnet", "lightning"),
    ),
    Entry(
        "simple-gla-is-gla",
        "SimpleGLA(q, k, v; g_t) = GLA(q, k, v; g_t 1_K)",
        "simple_gla",
        "gla with g repeated over keys",
        _GLA,
        _simple_gla_is_gla,
        named("simple_gla"),
    ),
    Entry(
        "mamba2-is-simple-gla",
        "Mamba2(C, B, x; dt, A) = SimpleGLA(C, B, dt x; g = -dt A, scale = 1)",
        "mamba2 with g = -dt A, beta = dt",
        "simple_gla with v = dt x",
        "arXiv:2405.21060, section 7",
        _mamba2_is_simple_gla,
        named("mamba2"),
    ),
    Entry(
        "rodimus-is-gla",
        "Rodimus(q, k, v; g, beta) = GLA(q, k, beta (.) v; g)",
        "rodimus",
        "gla with v = beta (.) v",
        "arXiv:2410.06577, eq. 12",
        _rodimus_is_gla,
        named("rodimus"),
    ),
    Entry(
        "hgrn2-is-tied-gla",
        "HGRN2(q, v; f) = GLA(q, k = 1 - f, v; g = log f)",
        "hgrn2",
        "gla with k = 1 - exp(g)",
        "arXiv:2404.07904, eq. 7",
        _hgrn2_is_gla,
        named("hgrn2"),
    ),
    Entry(
        "deltanet-is-gated-deltanet",
        "DeltaNet(q, k, v; beta) = GatedDeltaNet(q, k, v; beta, g = 0)",
        "deltanet",
        "gated_deltanet with g = 0",
        "arXiv:2412.06464, eq. 10",
        _deltanet_is_gdn,
        named("deltanet"),
    ),
    Entry(
        "gated-deltanet-is-kda",
        "GatedDeltaNet(q, k, v; beta, g_t) = KDA(q, k, v; beta, g_t 1_K)",
        "gated_deltanet",
        "kda with g repeated over keys",
        "arXiv:2510.26692, section 3",
        _gdn_is_kda,
        named("gated_deltanet"),
    ),
    Entry(
        "kda-is-generalised-delta",
        "S Diag(a) (I - beta k k^T) = S (Diag(a) - p (r p)^T): p = a k, r = beta / a",
        "kda",
        "rwkv7 with p = a k, removal = beta / a, v = beta v",
        "arXiv:2503.14456, eq. 2",
        _kda_is_generalised,
        named("kda"),
        condition="a > 0",
        domain=Domain(regimes=FINITE),
    ),
    Entry(
        "gdn2-is-kda",
        "GDN2(q, k, v; g, erase = beta 1_K, write = beta 1_V) = KDA(q, k, v; g, beta)",
        "gdn2 with equal erase and write gates",
        "kda",
        "ours",
        _gdn2_is_kda,
        named("gdn2"),
    ),
    Entry(
        "comba-at-decayed-key-is-gated-deltanet",
        "Comba(q, k, v; g, beta, p = a k) = GatedDeltaNet(q, k, v; g, beta)",
        "comba with p = exp(g) k",
        "gated_deltanet",
        "ours; arXiv:2506.02475, eq. 9",
        _comba_is_gdn,
        named("comba"),
    ),
    Entry(
        "deltaproduct-with-one-step-is-gated-deltanet",
        "DeltaProduct(q, k, v; g, beta = (beta_1, 0, ..)) = GatedDeltaNet(q, k_1, v_1; g, beta_1)",
        "gated_deltaproduct with beta = 0 after the first step",
        "gated_deltanet on the first steps",
        "arXiv:2502.10297, eq. 2",
        _product_is_gdn,
        named("gated_deltaproduct"),
    ),
    Entry(
        "steps-are-tokens",
        "n writes per token = n tokens with one write: decay on the first, read after the last",
        "a spec with n projected steps",
        "the same spec with one step, g interleaved with zeros",
        "arXiv:2502.10297, eq. 3",
        _steps_are_tokens,
        where(
            lambda s: s.steps.count > 1 and s.steps.source == "projected",
            without(preconditioned),
        ),
    ),
    Entry(
        "implicit-delta-is-normalised-delta",
        "ImplicitDelta(beta) = GatedDeltaNet(beta / (1 + beta |k|^2))",
        "implicit_delta, keys of any length",
        "gated_deltanet",
        "Nagumo and Noda, 1967; arXiv:2407.14207, eq. 8",
        _implicit_is_gdn,
        named("implicit_delta"),
    ),
    Entry(
        "lagged-steps-at-one-are-plain",
        "two taps with weights (0, 1) = one write",
        "a spec with a lagged tap and trap = 1",
        "the same spec with one step",
        "Mamba-3, exponential-trapezoidal update",
        _lagged_is_plain,
        lambda s: s.steps.source == "lagged",
    ),
    Entry(
        "trapezoid-is-one-write",
        "two taps = one write of weight l_t beta_t + (1 - l_{t+1}) beta_{t+1}, less its own read",
        "a frozen spec with a lagged tap",
        "the same spec with one step: y_t - (1 - l_{t+1}) beta_{t+1} (k_t . q_t) v_t",
        "ours",
        _trapezoid_is_one_write,
        where(frozen, has("beta"), lambda s: s.steps.source == "lagged"),
        domain=NO_START,
    ),
    Entry(
        "pre-read-is-post-read",
        "S_{t-1}^T q = S_t^T (q / a) - (k . q / a) v",
        "a frozen spec that reads before it writes",
        "the same spec reading after, q = q / a, less its own write, plus the bonus",
        "ours",
        _pre_is_post,
        where(frozen, token_decay, without(has("beta")), lambda s: s.read.when == "pre"),
        condition="a > 0",
        domain=Domain(regimes=("normal", "no_decay", "zero_keys", "one_hot")),
    ),
    Entry(
        "normaliser-is-a-column-of-ones",
        "n_t . q = the output for the constant value 1",
        "a frozen spec that normalises its read",
        "the same spec without normaliser and v = [v, 1], divided afterwards",
        "arXiv:2006.16236, eq. 9",
        _normalizer_is_ones,
        where(frozen, lambda s: s.read.normalizer != "none", lambda s: s.write.shape != "value"),
        domain=NO_START,
    ),
    Entry(
        "no-decay-is-zero-decay",
        "a spec without decay = the same spec at g = 0",
        "a spec without decay",
        "the same spec with a decay per head, g = 0",
        "ours",
        _no_decay_is_zero,
        where(lambda s: s.decay.shape == "none", without(log_evidence)),
    ),
    Entry(
        "fixed-decay-is-data-decay",
        "a spec with g_h = the same spec with g_th = g_h",
        "a spec with a fixed decay",
        "the same spec with a decay per token",
        "ours",
        _fixed_is_data,
        lambda s: s.decay.source == "fixed",
    ),
    Entry(
        "head-decay-is-key-decay",
        "a spec with g_t = the same spec with g_t 1_K",
        "a spec with one decay per head",
        "the same spec with one decay per key channel",
        "ours",
        _head_decay_is_key_decay,
        where(
            token_decay,
            lambda s: s.decay.shape == "head",
            # Tempering along one set of axes and storing along another do not go together.
            lambda s: s.forgetting == "diffuse" or frozen(s) or tempered(s) or preconditioned(s),
        ),
    ),
    Entry(
        "hebbian-write-gate-is-a-value",
        "Hebbian(v; beta) = Hebbian(beta (.) v; 1)",
        "a Hebbian spec with a write gate",
        "the same spec without one, v = beta (.) v",
        "ours",
        _write_gate_is_value,
        where(
            hebbian,
            has("beta"),
            lambda s: s.read.normalizer == "none" and s.steps.source == "projected",
        ),
    ),
    Entry(
        "palimpsa-is-metaplastic-simple-gla",
        "Palimpsa(q, k, v; g, beta, b) = metaplastic SimpleGLA(q, k, beta v; g, b)",
        "palimpsa, meta_mamba2",
        "metaplastic simple_gla",
        f"ours; {_PALIMPSA}, section 3",
        _palimpsa_is_metaplastic,
        named("palimpsa", "meta_mamba2"),
    ),
    Entry(
        "metaplastic-at-zero-is-its-source",
        "metaplastic X(b = 0, I_p = 1) = X",
        "a metaplastic spec at b = 0, I_p = 1",
        "its source",
        f"ours; {_PALIMPSA}, section 3",
        _at_zero,
        keeps_source,
    ),
    Entry(
        "rate-at-zero-is-its-source-bit-for-bit",
        "exact gain of a rate, X(b = 0, I_p = 1) = X to the last bit, whatever |k|",
        "a metaplastic delta rule with the exact gain at b = 0, I_p = 1",
        "its source, with one decay per key channel where it decays, on the same kernel class",
        "ours",
        _bits_at_zero,
        where(
            rate,
            keeps_source,
            without(rotated),
            lambda s: s.decay.shape == "none" or token_decay(s),
            lambda s: lower(s).kernel == lower(freeze(s)).kernel,
        ),
        condition="|k| between 0.3 and 1.4 times that of the instance",
        domain=Domain(long=137),
    ),
    Entry(
        "rate-gain-is-the-posterior's",
        "the gain of beta as a rate = the gain of beta / (1 - beta |k|^2) as a precision",
        "a metaplastic delta rule with the exact gain",
        "the same with the precision",
        "ours",
        _rate_is_precision,
        rate,
        condition="beta |k|^2 < 0.9",
    ),
    Entry(
        "zero-gate-divides-the-query",
        "metaplastic X(q; b = 0, I_p) = X(q / I_p)",
        "a Hebbian metaplastic spec at b = 0",
        "its source with the query divided by the prior",
        "ours",
        _zero_gate_any_prior,
        where(
            keeps_source,
            hebbian,
            # Other axes do not change places with a decay per key.
            lambda s: s.decay.shape != "key" or not rotated(s),
            without(has("u")),
            lambda s: s.read.normalizer == "none",
        ),
        domain=NO_START,
    ),
    Entry(
        "head-gate-is-a-query-gate",
        "metaplastic X(q; b per head) = X(q_t / I_t), full: X(I_t^-1 q_t)",
        "a Hebbian metaplastic spec with one importance over keys that sums its writes",
        "its source with the query divided by importance",
        "ours",
        _head_gate_is_query,
        where(
            freezable,
            hebbian,
            lambda s: s.sums_writes,
            lambda s: s.read.when == "post" and s.read.normalizer == "none",
            lambda s: s.importance is not None and s.importance.gate.shape == "head",
        ),
    ),
    Entry(
        "metaplastic-delta-is-generalised-delta",
        "metaplastic delta(a, k, beta, b) = delta(decay a I_{t-1} / I'_t, write beta k / I_t)",
        "a metaplastic delta rule with one importance vector over keys",
        "rwkv7 with that decay, erase key and write key",
        "ours",
        _head_gate_is_generalised_delta,
        where(
            freezable,
            tempered,
            corrected("first_order"),
            default_erase,
            plain,
            lambda s: s.importance is not None and s.importance.gate.shape == "head",
            lambda s: s.write.shape == "head",
        ),
        condition="a > 0",
        domain=Domain(regimes=FINITE),
    ),
    Entry(
        "constant-value-gate-is-a-head-gate",
        "b_tv = b_t for all v: one importance vector over keys serves all value channels",
        "a metaplastic spec with b per value channel, constant over channels",
        "the same spec with b per head",
        f"ours; {_PALIMPSA}, eq. 26",
        _constant_value_gate,
        where(bayesian, lambda s: s.importance is not None and s.importance.gate.shape == "value"),
    ),
    Entry(
        "preconditioner-at-base-one-is-none",
        "x^(-softsign(.)) = 1 at x = 1",
        "a preconditioned spec with base 1",
        "the delta rule without importance",
        "ours",
        _base_one,
        preconditioned,
    ),
    Entry(
        "decay-is-a-gauge",
        "GLA(q, k, v; g) = GLA(q e^G, k e^-G, v; 0), G_t = sum_{s <= t} g_s",
        "a frozen Hebbian spec",
        "the same spec without decay on rescaled queries and keys",
        "arXiv:2312.06635, eq. 4",
        _gauge,
        where(
            frozen,
            hebbian,
            plain,
            token_decay,
            lambda s: s.key == "operand",
        ),
        condition="a > 0",
        domain=Domain(regimes=("normal", "no_decay", "zero_keys", "one_hot"), start=False),
    ),
    Entry(
        "freeze-inverts-metaplasticize",
        "freeze(metaplasticize(s)) = s",
        "a frozen spec",
        "itself",
        "ours",
        _freeze_inverts,
        frozen,
        domain=Domain(tokens=(1, 1)),
    ),
    Entry(
        "prefix-of-outputs",
        "y_1..t of a sequence = y_1..t of its first t tokens",
        "any spec",
        "the same spec on a prefix",
        "ours",
        _identity_prefix,
        every,
        kind=Kind.INVARIANCE,
    ),
    Entry(
        "sequences-are-independent",
        "y(batch)_n = y(sequence n)",
        "any spec",
        "the same spec on one sequence",
        "ours",
        _one_sequence,
        every,
        kind=Kind.INVARIANCE,
        domain=Domain(batch=(2, 3)),
    ),
)
