"""The exact posterior against sequential Bayes, and the dense forms against the engines."""

import numpy as np
import pytest
import torch
from hypothesis import given
from oracles import (
    FIRST_ORDER_ORACLES,
    KIN,
    METAPLASTIC_ORACLES,
    ORACLES,
    make_operands,
    posterior_oracle,
)

import glazoo
from glazoo.theory import strategies
from glazoo.theory.exact import posterior
from glazoo.theory.forms import forms
from glazoo.theory.unrolled import unrolled

EPS = torch.finfo(torch.float64).eps


def sequential(k, v, beta, g, prior):
    """One matrix inversion per token: predict (temper toward the prior), then observe."""
    size, values = k.shape[-1], v.shape[-1]
    prior = np.diag(prior)
    precision = np.stack([prior] * values)
    mean = np.zeros((values, size))
    for t in range(len(k)):
        a = np.exp(g[t])
        for i in range(values):
            tempered = a * precision[i] + (1 - a) * prior
            natural = a * precision[i] @ mean[i]
            precision[i] = tempered + beta[t, i] * np.outer(k[t], k[t])
            mean[i] = np.linalg.solve(precision[i], natural + beta[t, i] * v[t, i] * k[t])
    return mean.T, precision


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_posterior_is_sequential_bayes(decay: float, reset: bool) -> None:
    rng = np.random.default_rng(1)
    T, K, V = 9, 4, 3
    k, v = rng.standard_normal((T, K)), rng.standard_normal((T, V))
    beta, g = rng.uniform(0, 2, (T, V)), -decay * rng.uniform(0, 1, T)
    if reset:
        g[4] = -np.inf
    prior = rng.uniform(0.5, 2, K)
    tensors = [torch.from_numpy(x) for x in (k, v, beta)]
    result = posterior(*tensors, g=torch.from_numpy(g), prior=torch.from_numpy(prior))
    mean, precision = sequential(k, v, beta, g, prior)
    condition = np.linalg.cond(precision).max()
    atol = 16 * T * K * condition * EPS
    np.testing.assert_allclose(result.mean[-1].numpy(), mean, rtol=0, atol=atol)
    np.testing.assert_allclose(result.precision[-1].numpy(), precision, rtol=0, atol=atol)
    q = rng.standard_normal(K)
    expected = [q @ np.linalg.inv(p) @ q for p in precision]
    variance = result.variance(torch.from_numpy(q).expand(T, K))[-1]
    np.testing.assert_allclose(variance.numpy(), expected, rtol=0, atol=atol)


def test_posterior_samples_have_its_moments() -> None:
    """The posterior is what conditioning a joint Gaussian of memory and values gives."""
    rng = np.random.default_rng(2)
    T, K = 5, 3
    k, v, beta = rng.standard_normal((T, K)), rng.standard_normal((T, 1)), rng.uniform(0.5, 2, T)
    prior = rng.uniform(0.5, 2, K)
    covariance = np.diag(1 / prior)
    joint = k @ covariance @ k.T + np.diag(1 / beta)
    gain = covariance @ k.T @ np.linalg.inv(joint)
    result = posterior(*(torch.from_numpy(x) for x in (k, v, beta)), prior=torch.from_numpy(prior))
    atol = 16 * T * K * np.linalg.cond(joint) * EPS
    np.testing.assert_allclose(result.mean[-1].numpy(), gain @ v, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(4, 2)}, r"v: got \[4, 2\], accepted is \[..., T, V\]"),
        ({"beta": torch.zeros(3)}, r"beta: got \[3\], accepted is"),
    ],
)
def test_posterior_refuses_wrong_shapes(change, message) -> None:
    given_ = {"k": torch.zeros(5, 3), "v": torch.zeros(5, 2), "beta": torch.zeros(5)} | change
    with pytest.raises(ValueError, match=message):
        posterior(given_["k"], given_["v"], given_["beta"])


def truth(spec, rng):
    """Operands of a spec and what its oracle makes of them."""
    name, imp, sizes = spec.counterpart or spec.name, spec.importance, (2, 9, 2, 4, 5, 3)
    name = KIN.get(name, name)
    if spec.counterpart is None:
        operands = make_operands(name, rng, *sizes)
        return operands, ORACLES[name](operands)
    operands = make_operands(name, rng, *sizes, gate=imp.gate.shape)
    first = spec.posterior.gain == "first_order"
    if (spec.posterior.precision, imp.forgetting, imp.basis) == ("diagonal", "temper", "own"):
        # Where the default gain is exact, the other one has an oracle of its own.
        oracle = METAPLASTIC_ORACLES[name]
        return operands, (FIRST_ORDER_ORACLES.get(name, oracle) if first else oracle)(operands)
    B, T, H, HV, K, _ = sizes
    if imp.basis == "rotated":
        operands["basis"] = np.linalg.qr(rng.standard_normal((H, K, K)))[0]
    if imp.noise.shape != "none":
        shape = (B, T, HV) if imp.noise.shape == "head" else (B, T, HV, K)
        operands["noise"] = rng.uniform(0.02, 1.0, shape)
    if spec.posterior.precision == "isotropic":
        operands["prior"] = operands["prior"][:, 0]
    oracle = posterior_oracle(
        name,
        precision=spec.posterior.precision,
        forgetting=imp.forgetting,
        gain="rate" if spec.posterior.beta == "rate" else spec.posterior.gain,
        extra=tuple(n for n in ("noise", "basis") if n in operands),
    )
    return operands, oracle(operands)


@pytest.mark.parametrize("form", forms(), ids=lambda f: f.label)
def test_dense_form_agrees_with_the_oracle(form) -> None:
    """The dense forms judge engines; here somebody else judges them."""
    operands, expected = truth(form.spec, np.random.default_rng(4))
    tensors = {n: torch.from_numpy(x) for n, x in operands.items() if x is not None}
    result = unrolled(glazoo.lower(form.spec), tensors)
    pairs = [(result.output, expected.output), (result.memory, expected.memory)]
    if result.importance is not None:
        last = result.importance[:, -1]
        last = last if form.spec.posterior.precision == "full" else last.mT
        pairs.append((last.reshape(expected.importance.shape), expected.importance))
    for actual, wanted in pairs:
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=0, atol=64 * 9 * 5 * EPS * scale)


@given(strategies.specs().flatmap(lambda f: strategies.inputs(f.spec, packed=False)))
def test_dense_form_agrees_with_the_reference(x) -> None:
    result = x.run(glazoo.api.attention, impl="reference")
    dense = unrolled(glazoo.lower(x.spec), x.operands, x.initial_state)
    i = x.instance
    for a, b in (
        (dense.output, result.output),
        (dense.memory, result.final_state.memory),
    ):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        difference = (a - b).abs().max().item() if b.numel() else 0.0
        assert difference <= 64 * max(i.T, 1) * max(i.K, 4) * EPS * scale
