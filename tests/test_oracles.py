"""The oracles against formulas that contain no recurrence, and against each other.

The strongest checks unroll a variant completely: a Hebbian memory is a weighted sum over the past,
a delta memory solves one triangular system of equations over all tokens, the full posterior is a
least squares problem. The others are the known identities between variants.
"""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    FIRST_ORDER_ORACLES,
    METAPLASTIC_ORACLES,
    METAPLASTIC_SIGNATURES,
    ORACLES,
    REGIMES,
    SIGNATURES,
    Array,
    OracleResult,
    OracleState,
    make_operands,
    make_state,
    posterior_oracle,
    signature,
    unit,
)

GATES = ("head", "value")
OWN_GATE = [n for n, sig in SIGNATURES.items() if sig.importance == "metaplastic"]
METAPLASTIC = [(n, gate) for n in [*OWN_GATE, *METAPLASTIC_ORACLES] for gate in GATES]
CASES = [(n, None) for n in ORACLES if n not in OWN_GATE] + METAPLASTIC
DELTA = [
    *("deltanet", "gated_deltanet", "kda", "gdn2", "comba", "gated_deltaproduct", "rwkv7"),
    *("qdelta", "eda"),
    *("implicit_delta", "longhorn", "precond_gated_deltanet", "precond_kda"),
]
PRODUCTS = ("gated_deltaproduct", "eda")  # two writes a token
FILTERS = (
    "efla",
    "gka",
    "kdn",
    "kdn_isotropic",
    "bayesian_layer",
)  # written in more than one way above
HEBBIAN = [n for n in ORACLES if n not in (*DELTA, *FILTERS, "lightnet", "mesanet")]
B, T, H, HV, K, V = 2, 12, 2, 4, 5, 3  # what make_operands draws by default

Ops = dict[str, Any]


def case_ids(case: Any) -> str:
    return "-".join(str(x) for x in case if x) if isinstance(case, tuple) else str(case)


def seeded(*key: Any) -> np.random.Generator:
    return np.random.default_rng([ord(c) for c in repr(key)])


def run(name: str, ops: Ops, gate: str | None = None, **options: Any) -> OracleResult:
    zoo = METAPLASTIC_ORACLES if gate and name in METAPLASTIC_ORACLES else ORACLES
    return zoo[name](ops, **options)


def close(actual: Any, expected: Any) -> None:
    """Equal up to a few thousand roundings of the largest number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    budget = 2**12 * np.finfo(np.float64).eps * max(1.0, np.abs(expected).max(initial=0.0))
    assert np.abs(actual - expected).max(initial=0.0) <= budget


def same(actual: OracleResult, expected: OracleResult) -> None:
    close(actual.output, expected.output)
    close(actual.memory, expected.memory)


def far(actual: Array, expected: Array) -> None:
    """The counterpart of close: the two differ in the first digits."""
    assert np.abs(actual - expected).max() > 1e-3 * np.abs(expected).max()


# The dense form of one head. D[t, s] is the decay that a write of token s has seen after token t.


def decay_products(al: Array) -> Array:
    T = len(al)
    D = np.zeros((T, T, *al.shape[1:]))
    for t in range(T):
        for s in range(t + 1):
            D[t, s] = al[s + 1 : t + 1].prod(axis=0)
    return D


def head_of(name: str, gate: str | None, ops: Ops, i: int, j: int) -> Ops:
    """What value head j of sequence i reads: decay al [T, K], scaled query, beta and b [T, V]."""
    H, HV = ops["q"].shape[2], ops["v"].shape[2]
    T, K, V = ops["q"].shape[1], ops["q"].shape[3], ops["v"].shape[3]
    x: Ops = {n: ops[n][i, :, j // (HV // H)] for n in ("q", "k", "p") if ops.get(n) is not None}
    names = ("v", "g", "beta", "b", "erase", "removal", "trap", "g_importance")
    x |= {n: a[i, :, j] for n in names if (a := ops.get(n)) is not None and a.ndim > 1}
    x |= {n: ops[n][j] for n in ("u", "center", "prior") if n in ops}
    al = np.exp(x.get("g", np.zeros(T)))
    if name == "retnet":
        al = np.full(T, 1 - 2.0 ** -(5 + j))
    if name == "lightning":
        al = np.full(T, np.exp(-(256.0 ** (-(j + 1) / HV)) * (1 + 1e-5)))
    if name in ("retnet", "lightning") and "g" in ops:
        al = np.full(T, np.exp(ops["g"][j]))
    x["al"] = (al[:, None] if al.ndim == 1 else al) * np.ones(K)
    x["q"] = x["q"] * (K**-0.5 if signature(name, gate).scale is None else 1.0)
    if "b" in x:
        x["b"] = (x["b"][:, None] if x["b"].ndim == 1 else x["b"]) * np.ones(V)
    beta = x.get("beta", np.ones(len(x["v"])))
    x["beta"] = (beta[:, None] if beta.ndim == 1 else beta) * np.ones(V)
    return x


def shift(x: Array) -> Array:
    """The row of the next token, zeros after the last."""
    return np.concatenate([x[1:], np.zeros_like(x[:1])])


def dense_hebbian(name: str, gate: str | None, x: Ops) -> tuple[Array, Array, Array]:
    """Output, memory h and importance J of the last token, all as sums over the past."""
    al, v, q, V = x["al"], x["v"], x["q"], x["v"].shape[1]
    T = len(v)
    k = 1 - al if name == "hgrn2" else x["k"]
    b = x.get("b", np.zeros((T, V)))
    D = decay_products(al)
    weight, evidence = (np.broadcast_to(c, (T, T, V)) for c in (x["beta"], b))
    if name == "mamba3":  # one write per token; what the next token adds is not yet there at t = s
        lam, later, now = x["trap"][:, None], shift(1 - x["trap"])[:, None], np.eye(T)[:, :, None]
        weight = weight * lam + shift(x["beta"]) * later * (1 - now)
        evidence = evidence * lam + shift(b) * later * (1 - now)
    h = np.einsum("tsv,sv,tsk,sk->tvk", weight, v, D, k)
    J = np.einsum("tsv,tsk,sk->tvk", evidence, D, k**2)
    n = np.einsum("ts,tsk,sk->tk", weight[..., 0], D, k)
    I_t = J + x["prior"] if "prior" in x else np.ones_like(h)
    y = np.einsum("tvk,tk->tv", h / I_t, q)
    if name == "rwkv6":  # everything strictly before the token, and the token itself through u
        y = np.concatenate([np.zeros((1, V)), np.einsum("tvk,tk->tv", h[:-1] / I_t[:-1], q[1:])])
        y = y + np.einsum("k,tk,tk->t", x["u"], k, q)[:, None] * v
    if name == "mlstm":
        y = y / np.maximum(abs(np.einsum("tk,tk->t", n, q)), 1)[:, None]
    if name in ("based", "rebased"):
        y = y / (np.einsum("tk,tk->t", n, q) + 1e-6)[:, None]
    return y, h[-1], J[-1]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", [c for c in CASES if c[0] in HEBBIAN], ids=case_ids)
def test_hebbian_memory_is_a_weighted_sum_over_the_past(
    case: tuple[str, str | None], regime: str
) -> None:
    name, gate = case
    ops = make_operands(name, seeded(case, regime), gate=gate, regime=regime)
    result = run(name, ops, gate)
    for i in range(B):
        for j in range(HV):
            y, h, J = dense_hebbian(name, gate, head_of(name, gate, ops, i, j))
            close(result.output[i, :, j], y)
            close(result.memory[i, j], h.T)
            if gate:
                assert result.importance is not None
                close(result.importance[i, j], J[0] if gate == "head" else J.T)


def solve_row(
    al: Array, e: Array, key: Array, w: Array, q: Array, prev: bool = False
) -> tuple[Array, Array]:
    """One value row of any delta memory: reads at every token and the last state.

    Every token writes ``u_t key_t`` with ``u_t = w_t - X_t e_t``, and X_t is itself the decayed sum
    of the writes before t: a lower triangular system for all u at once.
    """
    T = len(al)
    D = decay_products(al)
    seen = D.copy()
    if prev:  # the prediction is made before the token's own decay
        seen[0], seen[1:] = 0.0, D[:-1]
    L = np.tril(np.einsum("tk,tsk,sk->ts", e, seen, key), -1)
    u = np.linalg.solve(np.eye(T) + L, w)
    return np.einsum("tk,tsk,sk,s->t", q, D, key, u), np.einsum("sk,sk,s->k", D[-1], key, u)


def substeps(first: Array, second: Array) -> Array:
    return np.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def dense_delta_row(name: str, x: Ops, row: int, first_order: bool = False) -> tuple[Array, Array]:
    al, q, v, beta, k = x["al"], x["q"], x["v"][:, row], x["beta"][:, row], x["k"]
    if name in PRODUCTS:
        al = substeps(al, np.ones_like(al))
    # Importance of every (sub)token, in closed form: before it, after its decay, after observing.
    before = decayed = after = np.ones_like(k)
    if "prior" in x:
        J = np.einsum("tsk,s,sk->tk", decay_products(al), x["b"][:, row], k**2)
        J_before = np.concatenate([np.zeros_like(J[:1]), J[:-1]])
        before, decayed, after = (imp + x["prior"] for imp in (J_before, al * J_before, J))
    al = al * before / decayed
    bk = beta[:, None] * k
    if name.startswith("precond"):
        own = decay_products(np.exp(x["g_importance"]))
        P = np.einsum("ts,s,sk->tk", own, x["b"][:, row], k**2)
        level = np.log(P + 1e-6) - x["center"]
        return solve_row(al, bk, k * 1.5 ** (-level / (1 + abs(level))), beta * v, q)
    if name == "gdn2":
        return solve_row(al, x["erase"] * k, k / after, beta * v, q)
    if name == "qdelta":
        return solve_row(al, beta[:, None] * x["p"], k / after, beta * v, q)
    if name == "comba":
        return solve_row(al, beta[:, None] * x["p"], k / after, beta * v, q, prev=True)
    if name in PRODUCTS:
        write = k / after, beta * v
        if name in FIRST_ORDER_ORACLES and "prior" in x and not first_order:
            total = 1 - beta * (k**2 * (1 - 1 / decayed)).sum(-1)
            write = k / decayed / total[:, None], beta * v
        y, S = solve_row(al, bk, *write, substeps(np.zeros_like(q), q))
        return y[1::2], S
    if name == "rwkv7":  # the erase and the write as two writes of one token
        zero, kk = np.zeros_like(k), x["p"]
        y, S = solve_row(
            substeps(al, np.ones_like(al)),
            substeps(kk, zero),
            substeps(kk * x["removal"] / after, k / after),
            substeps(np.zeros_like(v), v),
            substeps(zero, q),
            prev=True,
        )
        return y[1::2], S
    if name in FIRST_ORDER_ORACLES and "prior" in x and not first_order:
        total = 1 - beta * (k**2 * (1 - 1 / decayed)).sum(-1)
        return solve_row(al, k, bk / decayed / total[:, None], v, q)
    if name in ("implicit_delta", "longhorn"):
        gain = bk / decayed / (1 + beta * (k**2 / decayed).sum(-1))[:, None]
        if name == "implicit_delta":
            return solve_row(al, k, gain, v, q)
        return solve_row(al * (1 - k * gain), np.zeros_like(k), gain, v, q)
    return solve_row(al, bk, k / after, beta * v, q)


DELTA_CASES = [(c, False) for c in CASES if c[0] in DELTA]
DELTA_CASES += [((n, gate), True) for n in FIRST_ORDER_ORACLES for gate in GATES]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("case", "first_order"), DELTA_CASES, ids=case_ids)
def test_delta_memory_solves_one_triangular_system(
    case: tuple[str, str | None], first_order: bool, regime: str
) -> None:
    name, gate = case
    ops = make_operands(name, seeded(case, regime), gate=gate, regime=regime)
    result = FIRST_ORDER_ORACLES[name](ops) if first_order else run(name, ops, gate)
    for i in range(B):
        for j in range(HV):
            x = head_of(name, gate, ops, i, j)
            for row in range(V):
                y, S = dense_delta_row(name, x, row, first_order)
                close(result.output[i, :, j, row], y)
                close(result.memory[i, j, :, row], S)


# The posterior.


@pytest.mark.parametrize("regime", ["normal", "no_decay", "reset", "zero_write"])
def test_mesa_is_weighted_ridge_regression_over_the_whole_history(regime: str) -> None:
    ops: Ops = make_operands("mesanet", seeded("mesa", regime), regime=regime)
    result = run("mesanet", ops)
    assert result.uncertainty is not None
    for i in range(B):
        for j in range(HV):
            x = head_of("mesanet", None, ops, i, j)
            D = decay_products(x["al"][:, 0])
            for t in range(T):
                root = np.sqrt(D[t] * x["beta"][:, 0])[:, None]
                inputs = torch.from_numpy(
                    np.concatenate([root * x["k"], np.diag(x["prior"] ** 0.5)])
                )
                targets = np.concatenate([root * x["v"], np.zeros((K, V))])
                fit = torch.linalg.lstsq(inputs, torch.from_numpy(targets), driver="gelsd").solution
                close(result.output[i, t, j], x["q"][t] @ fit.numpy())
                spread = torch.linalg.pinv(inputs).T @ torch.from_numpy(x["q"][t])
                close(result.uncertainty[i, t, j], (spread @ spread).numpy())


def test_lightnet_is_a_softmax_weighted_mean_per_slot() -> None:
    ops: Ops = make_operands("lightnet", seeded("lightnet"))
    result = run("lightnet", ops)
    assert result.importance is not None
    k, v = (np.repeat(ops["k"], 2, axis=2), ops["v"])
    q = np.repeat(ops["q"], 2, axis=2) * K**-0.5
    for t in range(T):
        e = np.exp(k[:, : t + 1])
        mean = np.einsum("bshk,bshv->bhkv", e / e.sum(1, keepdims=True), v[:, : t + 1])
        close(result.output[:, t], np.einsum("bhk,bhkv->bhv", q[:, t], mean))
    close(result.memory, mean)
    close(result.importance, np.log(np.exp(k).sum(1)))
    assert result.uncertainty is not None
    close(result.uncertainty, (q**2 / np.exp(k).cumsum(1)).sum(-1))


@pytest.mark.parametrize("decay", ["head", "key"])
def test_natural_parameters_equal_predict_and_correct_with_prior_pull(decay: str) -> None:
    """Palimpsa as a mean: forget toward the prior, then add the write over the precision."""
    name, gate = ("palimpsa", None) if decay == "head" else ("rodimus", "value")
    ops: Ops = make_operands(name, seeded("mean form", decay), gate=gate)
    result = run(name, ops, gate)
    assert result.importance is not None
    assert result.uncertainty is not None
    for j in range(HV):
        x = head_of(name, gate, ops, 0, j)
        mu, imp = np.zeros((V, K)), np.ones((V, 1)) * x["prior"]
        for t in range(T):
            a, k = x["al"][t], x["k"][t]
            predicted = a * imp + (1 - a) * x["prior"]
            mu = a * imp / predicted * mu
            fit = x["b"][t][:, None] * k**2  # evidence, and the synapse's own share of the error
            imp = predicted + fit
            mu = mu + ((x["beta"][t] * x["v"][t])[:, None] * k - fit * mu) / imp
            close(result.output[0, t, j], mu @ x["q"][t])
            close(result.uncertainty[0, t, j], (x["q"][t] ** 2 / imp).sum(-1))
        close(result.importance[0, j], (imp - x["prior"]).T)


def test_diagonal_posteriors_are_exact_for_one_hot_keys() -> None:
    ops: Ops = make_operands("gated_deltanet", seeded("one hot"), gate="head")
    ops["k"] = np.eye(K)[seeded("which").integers(0, K, ops["k"].shape[:3])]
    ops["b"] = ops["beta"]
    posterior = {n: x for n, x in ops.items() if n != "b"}
    exact = run("mesanet", posterior)
    rate = {**ops, "beta": ops["beta"] / (1 + ops["beta"])}  # of these precisions
    for result in (
        run("palimpsa", ops, "head", scale=1.0),
        run("implicit_delta", ops, "head", scale=1.0),
        FIRST_ORDER_ORACLES["gated_deltanet"](ops, scale=1.0),
        run("gated_deltanet", rate, "head", scale=1.0),
    ):
        close(result.output, exact.output)
        close(result.uncertainty, exact.uncertainty)
    # Longhorn never forgets.
    exact = run("mesanet", {**posterior, "g": 0 * ops.pop("g")})
    ops["beta"] = ops["b"][..., None] * np.ones(V)
    close(run("longhorn", ops, "head").output, exact.output)


def test_the_exact_gain_is_the_posterior_of_a_first_observation() -> None:
    ops: Ops = make_operands("implicit_delta", seeded("one"), T=1, gate="head")
    posterior = {**{n: x for n, x in ops.items() if n != "b"}, "g": np.zeros((2, 1, 4))}
    exact = run("mesanet", posterior, scale=1.0).output
    close(run("implicit_delta", ops, "head", scale=1.0).output, exact)
    far(run("gated_deltanet", ops, "head", scale=1.0).output, exact)


def test_the_diagonal_posteriors_come_closer_to_the_exact_one_than_the_frozen() -> None:
    ops: Ops = make_operands("gated_deltanet", seeded("rank"), T=64, B=8, gate="head")
    ops["prior"], ops["b"], ops["k"] = np.ones((4, 5)), ops["beta"], unit(ops["k"])
    ops["g"] = 0.05 * ops["g"]
    source = {n: x for n, x in ops.items() if n not in ("b", "prior")}
    exact = run("mesanet", {**source, "prior": ops["prior"]}, scale=1.0).output

    def error(result: OracleResult) -> float:
        return float(np.linalg.norm(result.output - exact) / np.linalg.norm(exact))

    assert error(run("palimpsa", ops, "head", scale=1.0)) < error(run("mamba2", source, scale=1.0))
    for name in ("gated_deltanet", "implicit_delta"):
        assert error(run(name, ops, "head", scale=1.0)) < error(run(name, source, scale=1.0))


def test_mamba2_is_palimpsa_with_an_infinite_prior() -> None:
    ops: Ops = make_operands("meta_mamba2", seeded("limit"))
    limit = run("mamba2", {n: x for n, x in ops.items() if n not in ("b", "prior")}).output
    errors = []
    for prior in (1e2, 1e3, 1e4, 1e5):
        scaled = {**ops, "prior": np.full((4, 5), prior), "beta": ops["beta"] * prior}
        errors.append(np.abs(run("meta_mamba2", scaled).output - limit).max())
    rates = np.array(errors[:-1]) / np.array(errors[1:])
    assert np.all(rates > 9)  # the error falls as 1 / prior
    assert np.all(rates < 11)


@pytest.mark.parametrize("name", ["linear_attention", "palimpsa", "mesanet"])
def test_without_forgetting_the_order_of_the_tokens_does_not_matter(name: str) -> None:
    ops: Ops = make_operands(name, seeded("order", name), regime="no_decay")
    turned = {n: x[:, ::-1] if x.ndim > 2 else x for n, x in ops.items()}
    a, b = run(name, ops), run(name, turned)
    close(a.memory, b.memory)
    if a.importance is not None:
        close(a.importance, b.importance)


def test_the_delta_rule_depends_on_the_order_of_the_tokens() -> None:
    ops: Ops = make_operands("deltanet", seeded("order"))
    far(
        run("deltanet", ops).memory, run("deltanet", {n: x[:, ::-1] for n, x in ops.items()}).memory
    )


# What every oracle must satisfy.


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_a_run_resumed_from_its_state_equals_one_run(case: tuple[str, str | None]) -> None:
    name, gate = case
    rng = seeded("stream", case)
    ops, cut = make_operands(name, rng, gate=gate), 5
    state = make_state(name, rng, gate=gate)
    whole = run(name, ops, gate, initial_state=state)

    def part(tokens: slice) -> Ops:
        n = signature(name, gate).steps
        long = slice(n * (tokens.start or 0), None if tokens.stop is None else n * tokens.stop)
        per_step = ("k", "v", "beta", "b")
        return {
            m: x if x is None or x.ndim < 3 else x[:, long if m in per_step else tokens]
            for m, x in ops.items()
        }

    first = run(name, part(slice(0, cut)), gate, initial_state=state)
    second = run(name, part(slice(cut, None)), gate, initial_state=first.state)
    close(np.concatenate([first.output, second.output], 1), whole.output)
    for field in ("memory", "importance", "normalizer"):
        if (expected := getattr(whole, field)) is not None:
            close(getattr(second, field), expected)
    if whole.lag is not None:
        assert second.lag is not None
        close(second.lag[0], whole.lag[0])
        close(second.lag[1], whole.lag[1])
    far(whole.output, run(name, ops, gate).output)  # the state matters
    nothing = run(name, part(slice(0, 0)), gate, initial_state=state)
    assert nothing.output.shape == (2, 0, 4, 3)
    for kept, given in zip(nothing.state[:3], state[:3], strict=True):
        if kept is not None and given is not None:
            assert np.array_equal(kept, given)


@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_grouped_heads_equal_repeated_heads(case: tuple[str, str | None]) -> None:
    name, gate = case
    ops: Ops = make_operands(name, seeded("groups", case), gate=gate)
    full = {
        n: np.repeat(x, 2, axis=2) if n in ("q", "k", "p") and x is not None else x
        for n, x in ops.items()
    }
    same(run(name, ops, gate), run(name, full, gate))


@pytest.mark.parametrize("name", METAPLASTIC_ORACLES)
@pytest.mark.parametrize("gate", GATES)
def test_with_a_closed_gate_and_unit_prior_a_metaplastic_form_is_its_source(
    name: str, gate: str
) -> None:
    ops: Ops = make_operands(name, seeded("closed", name), gate=gate, regime="zero_gate")
    source = {n: x for n, x in ops.items() if n not in ("b", "prior")}
    state = make_state(name, seeded("state", name))
    meta = state._replace(importance=None)
    same(run(name, ops, gate, initial_state=meta), ORACLES[name](source, initial_state=state))
    ops["b"] = ops["b"] + 0.5
    far(run(name, ops, gate).output, ORACLES[name](source).output)


@pytest.mark.parametrize("name", METAPLASTIC_ORACLES)
def test_the_distance_to_the_source_is_linear_in_a_small_gate(name: str) -> None:
    ops: Ops = make_operands(name, seeded("linear", name), gate="value")
    ops["prior"] = np.ones((4, 5))
    source = ORACLES[name]({n: x for n, x in ops.items() if n not in ("b", "prior")}).output
    errors = [
        np.abs(run(name, {**ops, "b": kappa * ops["b"]}, "value").output - source).max()
        for kappa in (1e-3, 1e-4, 1e-5)
    ]
    assert 9 < errors[0] / errors[1] < 11
    assert 9 < errors[1] / errors[2] < 11


@pytest.mark.parametrize("name", [*OWN_GATE, *METAPLASTIC_ORACLES])
def test_a_head_gate_is_a_constant_value_gate(name: str) -> None:
    ops: Ops = make_operands(name, seeded("shapes", name), gate="head")
    shared = run(name, ops, "head")
    per_value = run(name, {**ops, "b": ops["b"][..., None] * np.ones(3)}, "value")
    same(shared, per_value)
    assert shared.importance is not None
    assert shared.uncertainty is not None
    close(shared.importance[..., None] * np.ones(3), per_value.importance)
    close(shared.uncertainty[..., None] * np.ones(3), per_value.uncertainty)


@pytest.mark.parametrize("case", METAPLASTIC, ids=case_ids)
def test_importance_and_uncertainty_follow_the_keys_alone(case: tuple[str, str]) -> None:
    """J and the spread of the read-out are sums over past evidence: values play no part."""
    name, gate = case
    ops: Ops = make_operands(name, seeded("evidence", case), gate=gate)
    result = run(name, ops, gate)
    assert result.importance is not None
    assert result.uncertainty is not None
    for i in range(2):
        for j in range(4):
            x = head_of(name, gate, ops, i, j)
            al = x["al"]
            if name in PRODUCTS:
                al = substeps(al, np.ones_like(al))
            k = 1 - al if name == "hgrn2" else x["k"]
            evidence = np.broadcast_to(x["b"], (len(al), *x["b"].shape))
            if name == "mamba3":
                lam, last = x["trap"][:, None], 1 - np.eye(len(al))[:, :, None]
                evidence = evidence * lam + shift(x["b"] * (1 - lam)) * last
            J = np.einsum("tsv,tsk,sk->tvk", evidence, decay_products(al), k**2)
            close(result.importance[i, j], J[-1, 0] if gate == "head" else J[-1].T)
            if name in PRODUCTS:
                J = J[1::2]
            if name == "rwkv6":
                J = np.concatenate([np.zeros_like(J[:1]), J[:-1]])
            spread = np.einsum("tvk,tk->tv", 1 / (J + x["prior"]), x["q"] ** 2)
            close(result.uncertainty[i, :, j], spread[:, 0] if gate == "head" else spread)


@pytest.mark.parametrize("case", CASES, ids=case_ids)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_gives_finite_results(case: tuple[str, str | None], regime: str) -> None:
    name, gate = case
    ops = make_operands(name, seeded(case, regime), gate=gate, regime=regime)
    assert set(ops) <= set(signature(name, gate).operands)
    result = run(name, ops, gate)
    assert result.output.shape == (2, 12, 4, 3)
    assert result.memory.shape == (2, 4, 5, 3)
    for field in ("output", "memory", "importance", "normalizer", "uncertainty"):
        value = getattr(result, field)
        assert value is None or np.isfinite(value).all()


@pytest.mark.parametrize("gain", ["rate", "first_order"])
@pytest.mark.parametrize("name", ["linear_attention", "mamba2", "deltanet", "gated_deltanet"])
def test_a_diagonal_of_the_general_posterior_is_the_form_with_importance_per_key(
    name: str, gain: str
) -> None:
    ops: Ops = make_operands(name, seeded("general", name), gate="head")
    zoo = FIRST_ORDER_ORACLES if gain == "first_order" else METAPLASTIC_ORACLES
    expected = zoo.get(name, METAPLASTIC_ORACLES[name])(ops)
    result = posterior_oracle(name, gain=gain)(ops)
    same(result, expected)
    close(result.importance, expected.importance)
    close(result.uncertainty, expected.uncertainty)


@pytest.mark.parametrize("gain", ["exact", "first_order"])
def test_the_general_posterior_at_full_precision_is_least_squares(gain: str) -> None:
    ops: Ops = make_operands("mesanet", seeded("general", gain))
    expected = run("mesanet", ops)
    general = posterior_oracle("gated_deltanet", precision="full", gain=gain)
    result = general({**ops, "b": ops["beta"]}, scale=1.0)
    same(result, expected)
    close(result.importance, expected.importance)


def test_with_a_closed_gate_and_unit_prior_every_posterior_is_its_source() -> None:
    for name in ("mamba2", "gated_deltanet", "kda"):
        ops: Ops = make_operands(name, seeded("closed", name), gate="head", regime="zero_gate")
        source = ORACLES[name]({n: x for n, x in ops.items() if n not in ("b", "prior")}).output
        ops["prior"] = np.ones(HV)
        for precision in ("isotropic", "diagonal", "full"):
            for forgetting in ("temper", "diffuse")[name == "kda" :]:
                form = posterior_oracle(name, precision=precision, forgetting=forgetting)
                close(form(ops).output, source)
                far(form({**ops, "b": ops["b"] + 0.5}).output, source)


def test_an_unknown_or_missing_operand_is_refused() -> None:
    ops = make_operands("deltanet", seeded("refuse"))
    with pytest.raises(ValueError, match="got also"):
        run("deltanet", {**ops, "g": np.zeros((2, 12, 4))})
    with pytest.raises(ValueError, match="missing"):
        run("gated_deltanet", ops)


def test_only_the_plain_variants_have_a_metaplastic_form() -> None:
    plain = {n for n, sig in SIGNATURES.items() if not sig.importance}
    assert set(METAPLASTIC_ORACLES) == set(METAPLASTIC_SIGNATURES) == plain


# Identities between variants.


def test_identities_of_the_hebbian_variants() -> None:
    rng = seeded("hebbian")
    ops: Ops = make_operands("gla", rng)
    q, k, v = ops["q"], ops["k"], ops["v"]
    qkv = {"q": q, "k": k, "v": v}
    ones = np.ones((2, 12, 4))

    same(run("gla", {**qkv, "g": 0 * ops["g"]}), run("linear_attention", qkv))
    scores = np.tril(np.einsum("bthk,bshk->bhts", q, k)) * 5**-0.5
    quadratic = np.einsum("bhts,bshv->bthv", np.repeat(scores, 2, axis=1), v)
    close(run("linear_attention", qkv).output, quadratic)

    schedule = np.log(1 - 2.0 ** (-5 - np.arange(4)))
    same(run("gla", {**qkv, "g": schedule[:, None] * np.ones((2, 12, 4, 5))}), run("retnet", qkv))
    same(run("retnet", qkv), run("retnet", {**qkv, "g": schedule}))
    slopes = -np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) * 1.00001
    same(run("simple_gla", {**qkv, "g": slopes * ones}, scale=1.0), run("lightning", qkv))

    ssd: Ops = make_operands("mamba2", rng)
    dt_v = {"q": ssd["q"], "k": ssd["k"], "v": ssd["v"] * ssd["beta"][..., None], "g": ssd["g"]}
    same(run("mamba2", ssd), run("simple_gla", dt_v, scale=1.0))
    same(run("mamba3", {**ssd, "trap": ones}), run("mamba2", ssd))

    tied: Ops = make_operands("hgrn2", rng, H=4)
    same(run("hgrn2", tied), run("gla", {**tied, "k": -np.expm1(tied["g"])}))
    gated: Ops = make_operands("rodimus", rng)
    free = {"q": gated["q"], "k": gated["k"], "v": gated["v"] * gated["beta"], "g": gated["g"]}
    same(run("rodimus", gated), run("gla", free))

    # Reading before the write is reading after the last one, with the next query.
    late = {**qkv, "q": np.concatenate([q[:, 1:], np.zeros_like(q[:, :1])], 1), "g": ops["g"]}
    early = run("rwkv6", {**qkv, "g": ops["g"], "u": np.zeros((4, 5))}).output
    close(early[:, 1:], run("gla", late, scale=1.0).output[:, :-1])
    u = rng.standard_normal((4, 5))
    bonus = np.einsum("hk,bthk,bthk->bth", u, np.repeat(k, 2, axis=2), np.repeat(q, 2, axis=2))
    close(run("rwkv6", {**qkv, "g": ops["g"], "u": u}).output, early + bonus[..., None] * v)


def test_a_normaliser_is_one_more_value_channel_of_ones() -> None:
    ops: Ops = make_operands("mlstm", seeded("ones"))
    ops["beta"] = ops["beta"] * 3
    wide = {**ops, "v": np.concatenate([ops["v"], np.ones((2, 12, 4, 1))], -1)}
    both = run("mamba2", wide, scale=5**-0.5)
    y, den = both.output[..., :-1], both.output[..., -1:]
    assert (abs(den) > 1).any()  # both branches of the maximum are taken
    assert (abs(den) < 1).any()
    close(run("mlstm", ops).output, y / np.maximum(abs(den), 1))
    close(run("mlstm", ops).normalizer, both.memory[..., -1])

    ops = make_operands("based", seeded("based"))
    wide = {**ops, "v": np.concatenate([ops["v"], np.ones((2, 12, 4, 1))], -1)}
    both = run("linear_attention", wide, scale=1.0)
    for name in ("based", "rebased"):
        close(run(name, ops).output, both.output[..., :-1] / (both.output[..., -1:] + 1e-6))


def test_two_taps_are_one_write_minus_a_term_of_the_same_token() -> None:
    ops: Ops = make_operands("mamba3", seeded("taps"))
    later = (1 - ops["trap"]) * ops["beta"]
    later = np.concatenate([later[:, 1:], np.zeros_like(later[:, :1])], 1)
    single = {n: x for n, x in ops.items() if n != "trap"}
    single["beta"] = ops["trap"] * ops["beta"] + later
    qk = np.repeat(np.einsum("bthk,bthk->bth", ops["q"], ops["k"]), 2, axis=2)
    same_token = (later * qk)[..., None] * ops["v"]
    close(run("mamba3", ops).output, run("mamba2", single).output - same_token)


def test_identities_of_the_delta_variants() -> None:
    rng = seeded("delta")
    # Erase keys that depend on the decay of a value head need one query/key head for each.
    ops: Ops = make_operands("gated_deltanet", rng, H=4)
    k, v, al, beta = ops["k"], ops["v"], np.exp(ops["g"]), ops["beta"]
    gdn = run("gated_deltanet", ops)
    wide = ops["g"][..., None] * np.ones(5)
    plain = {n: x for n, x in ops.items() if n != "g"}

    same(run("gated_deltanet", {**ops, "g": 0 * ops["g"]}), run("deltanet", plain))
    same(run("kda", {**ops, "g": wide}), gdn)
    far(gdn.output, run("deltanet", plain).output)

    # Predicting from the state before the decay: the same with the decay in the erase key.
    same(run("comba", {**ops, "p": al[..., None] * k}), gdn)
    far(run("comba", {**ops, "p": k}).output, gdn.output)

    kda: Ops = make_operands("kda", rng, H=4)
    a_k = np.exp(kda["g"]) * kda["k"]
    constant = {"erase": kda["beta"][..., None] * np.ones(5)}
    same(
        run("gdn2", {**kda, "beta": kda["beta"][..., None] * np.ones(3), **constant}),
        run("kda", kda),
    )
    # RWKV7 with removal key Diag(al) k, removed along beta k, and beta v written.
    general = {"q": kda["q"], "k": kda["k"], "v": kda["beta"][..., None] * kda["v"], "g": kda["g"]}
    general |= {"p": a_k, "removal": kda["beta"][..., None] * np.exp(-kda["g"])}
    same(run("rwkv7", general), run("kda", kda, scale=1.0))

    # Householder products: one step is the gated delta rule, a second one that writes nothing too.
    same(run("gated_deltaproduct", ops), gdn)
    double = {n: np.stack([ops[n], np.roll(ops[n], 1, 1)], 2) for n in ("k", "v", "beta")}
    double["beta"][:, :, 1] = 0
    double = {n: x.reshape(2, 24, *x.shape[3:]) for n, x in double.items()}
    same(run("gated_deltaproduct", {**ops, **double}), gdn)

    # A delta step of strength sigmoid(x) on a unit key is the exact step of precision exp(x).
    exact = {**ops, "beta": beta / (1 - beta)}
    same(run("implicit_delta", exact), gdn)
    free = {**ops, "k": rng.standard_normal(k.shape)}
    norm = (free["k"] ** 2).sum(-1)
    same(
        run("implicit_delta", free),
        run("gated_deltanet", {**free, "beta": beta / (1 + beta * norm)}),
    )

    # A preconditioner at its centre is one.
    neutral = {"b": 0 * beta, "g_importance": ops["g"], "center": np.full(4, np.log(1e-6))}
    same(run("precond_gated_deltanet", {**ops, **neutral}), gdn)
    same(run("precond_kda", {**ops, "g": wide, **neutral}), gdn)
    # Far from it, it is one of the ends of its range: x or 1 / x.
    low = {**neutral, "center": np.full(4, 1e15)}
    strong = {**ops, "k": k * 1.5**0.5, "v": v * 1.5**0.5, "q": ops["q"]}
    close(
        run("precond_gated_deltanet", {**ops, **low}).output, run("gated_deltanet", strong).output
    )


def test_longhorn_is_an_online_regression_of_every_entry() -> None:
    """S_t = sum_s eps_s v_s k_s prod_{r > s} (1 - eps_r k_r^2), entry by entry."""
    ops: Ops = make_operands("longhorn", seeded("longhorn"))
    result = run("longhorn", ops)
    k = np.repeat(ops["k"], 2, axis=2)
    eps = ops["beta"] / (1 + ops["beta"] * (k**2).sum(-1, keepdims=True))
    keep = 1 - np.einsum("bthv,bthk->bthkv", eps, k**2)
    memory = np.zeros((2, 4, 5, 3))
    for s in range(12):
        write = np.einsum("bhv,bhk->bhkv", eps[:, s] * ops["v"][:, s], k[:, s])
        memory += write * keep[:, s + 1 :].prod(1)
    close(result.memory, memory)


def test_with_a_head_gate_importance_moves_into_the_query_or_into_decay_and_keys() -> None:
    ops: Ops = make_operands("palimpsa", seeded("lowering"), H=4, gate="head")
    J = np.stack(
        [
            [
                np.einsum("ts,s,sk->tk", decay_products(x["al"][:, 0]), x["b"][:, 0], x["k"] ** 2)
                for x in (head_of("palimpsa", "head", ops, i, j) for j in range(4))
            ]
            for i in range(2)
        ]
    ).swapaxes(1, 2)
    importance = J + ops["prior"]
    source = {n: x for n, x in ops.items() if n not in ("b", "prior")}
    divided = run("mamba2", {**source, "q": ops["q"] / importance}, scale=5**-0.5)
    close(run("palimpsa", ops, "head").output, divided.output)

    before = np.concatenate([np.zeros_like(J[:, :1]), J[:, :-1]], 1)
    al = np.exp(ops["g"])[..., None]
    decay = al * (before + ops["prior"]) / (al * before + ops["prior"])
    # In the coordinates nu = mu I_t the write key is k again, and the erase key is k / I_t: a delta
    # rule with a decay per key and an erase gate, which GDN2 is.
    last = np.concatenate([np.ones_like(J[:, :1]), importance[:, :-1]], 1)
    general = {
        "q": ops["q"] / importance,
        "k": ops["k"],
        "v": ops["v"],
        "g": np.log(decay * importance / last),
        "beta": ops["beta"][..., None] * np.ones(3),
        "erase": ops["beta"][..., None] / importance,
    }
    close(FIRST_ORDER_ORACLES["gated_deltanet"](ops).output, run("gdn2", general).output)


def test_states_are_taken_by_field_name() -> None:
    state = make_state("gla", seeded("state"))
    ops = make_operands("gla", seeded("ops"))
    again = OracleState(memory=state.memory.copy())
    same(run("gla", ops, initial_state=state), run("gla", ops, initial_state=again))
