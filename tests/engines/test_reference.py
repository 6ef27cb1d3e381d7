"""The reference engine against an independently written loop per variant, in float64."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    FIRST_ORDER_ORACLES,
    KIN,
    METAPLASTIC_ORACLES,
    ORACLES,
    OracleResult,
    OracleState,
    gate_shapes,
    make_operands,
    make_state,
)

import glazoo

REGIMES = ("normal", "no_decay", "strong_decay", "reset", "zero_write", "zero_keys", "large_prior")
FORMS = [(n, None) for n in ORACLES] + [
    (n, gate) for n in METAPLASTIC_ORACLES for gate in gate_shapes(n)
]


def spec_of(name: str, gate: str | None) -> glazoo.Spec:
    spec = glazoo.load(name)
    return spec if gate is None else glazoo.metaplasticize(spec, gate=gate)


def oracle_of(name: str, gate: str | None):
    return ORACLES[name] if gate is None else METAPLASTIC_ORACLES[name]


def tensors(operands):
    return {
        k: None if x is None else torch.from_numpy(np.ascontiguousarray(x))
        for k, x in operands.items()
    }


def state_of(state: OracleState) -> glazoo.State:
    parts = [*state[:3], *(state.lag or (None, None))]
    return glazoo.State(
        *(None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in parts)
    )


def call(spec, operands, **options):
    ops = dict(tensors(operands))
    return glazoo.attention(
        spec, ops.pop("q"), ops.pop("k"), ops.pop("v"), impl="reference", **ops, **options
    )


def assert_same(actual: torch.Tensor, truth: np.ndarray, sums: int) -> None:
    """Two evaluations of one recurrence differ by one rounding per operation of the chain."""
    assert tuple(actual.shape) == truth.shape
    assert actual.dtype == torch.float64
    scale = max(1.0, float(np.abs(truth).max(initial=0.0)))
    np.testing.assert_allclose(
        actual.numpy(), truth, rtol=0, atol=64 * sums * np.finfo(np.float64).eps * scale
    )


def assert_matches(result, truth: OracleResult, sums: int) -> None:
    assert_same(result.output, truth.output, sums)
    state = result.final_state
    for actual, expected in zip(
        state, [*truth.state[:3], *(truth.lag or (None, None))], strict=True
    ):
        assert (actual is None) == (expected is None)
        if actual is not None:
            finite = np.isfinite(expected)
            assert (np.isfinite(actual.numpy()) == finite).all()
            assert_same(
                torch.where(torch.from_numpy(finite), actual, 0),
                np.where(finite, expected, 0),
                sums,
            )


def test_every_variant_has_an_oracle() -> None:
    assert set(glazoo.names()) == set(ORACLES) | set(KIN)
    plain = {n for n in ORACLES if not glazoo.load(n).metaplastic}
    assert plain == set(METAPLASTIC_ORACLES)
    for name, kin in KIN.items():
        program, other = glazoo.lower(glazoo.load(name)), glazoo.lower(glazoo.load(kin))
        assert (program.steps, program.operands) == (other.steps, other.operands)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_agrees_with_the_oracle(name: str, gate: str | None, regime: str) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{name} {regime}".encode()))
    B, T, H, HV, K, V = 2, 9, 2, 4, 5, 3
    operands = make_operands(name, rng, B, T, H, HV, K, V, gate, regime)
    start = make_state(name, rng, B, H, HV, K, V, gate) if regime == "normal" else None
    truth = oracle_of(name, gate)(operands, initial_state=start)
    state = None if start is None else state_of(start)
    result = call(spec_of(name, gate), operands, initial_state=state, output_final_state=True)
    assert_matches(result, truth, T * K)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gate", ["head", "value"])
@pytest.mark.parametrize("name", FIRST_ORDER_ORACLES)
def test_the_first_order_gain_agrees_with_the_oracle(name: str, gate: Any, regime: str) -> None:
    rng = np.random.default_rng(17)
    operands = make_operands(name, rng, 2, 9, 2, 4, 5, 3, gate, regime)
    start = make_state(name, rng, 2, 2, 4, 5, 3, gate)
    spec = glazoo.metaplasticize(glazoo.load(name), gate=gate, gain="first_order")
    result = call(spec, operands, initial_state=state_of(start), output_final_state=True)
    assert_matches(result, FIRST_ORDER_ORACLES[name](operands, initial_state=start), 9 * 5)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_short_sequences(name: str, gate: str | None, tokens: int) -> None:
    rng = np.random.default_rng(3)
    operands = make_operands(name, rng, 1, tokens, 1, 2, 4, 3, gate)
    result = call(spec_of(name, gate), operands, output_final_state=True)
    assert result.output.shape == (1, tokens, 2, 3)
    if tokens:
        assert_matches(result, oracle_of(name, gate)(operands), 8)
    else:
        again = call(
            spec_of(name, gate), operands, initial_state=result.final_state, output_final_state=True
        )
        for x, y in zip(result.final_state, again.final_state, strict=True):
            assert x is None or torch.equal(x, y)


@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_uncertainty(name: str, gate: str | None) -> None:
    operands = make_operands(name, np.random.default_rng(5), 1, 6, 1, 2, 4, 3, gate)
    spec = spec_of(name, gate)
    truth = oracle_of(name, gate)(operands).uncertainty
    if not spec.has_variance:
        with pytest.raises(ValueError, match="defines no posterior variance"):
            call(spec, operands, output_uncertainty=True)
        return
    result = call(spec, operands, output_uncertainty=True)
    if truth is not None:
        assert_same(result.uncertainty, truth, 32)
    assert (result.uncertainty >= 0).all()


@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_metaplastic_form_at_zero_importance_is_the_source(name: str, gate: str | None) -> None:
    if gate is None:
        assert name in ORACLES
        return
    rng = np.random.default_rng(11)
    operands = make_operands(name, rng, 2, 7, 2, 4, 5, 3, gate, "zero_gate")
    source = {k: x for k, x in operands.items() if k not in ("b", "prior")}
    metaplastic = call(spec_of(name, gate), operands, output_final_state=True)
    frozen = call(glazoo.load(name), source, output_final_state=True)
    assert torch.equal(metaplastic.output, frozen.output)
    assert torch.equal(metaplastic.final_state.memory, frozen.final_state.memory)
    assert (metaplastic.final_state.importance == 0).all()


@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_packed_equals_separate(name: str, gate: str | None) -> None:
    rng = np.random.default_rng(7)
    lengths = [3, 0, 4, 1]
    n = glazoo.load(name).substeps
    operands = tensors(make_operands(name, rng, 1, sum(lengths), 1, 2, 4, 3, gate))
    start = state_of(make_state(name, rng, len(lengths), 1, 2, 4, 3, gate))
    spec = spec_of(name, gate)
    per_token = {
        o.name: n if "nT" in o.shapes[0] else 1 for o in glazoo.lower(spec).operands if o.per_token
    }
    cu = torch.tensor([0, *np.cumsum(lengths)])
    packed = call_tensors(spec, operands, start, cu)
    for i, length in enumerate(lengths):
        s = int(cu[i])
        part = {
            k: x[:, s * per_token[k] : (s + length) * per_token[k]]
            if k in per_token and x is not None
            else x
            for k, x in operands.items()
        }
        own = glazoo.State(*(None if x is None else x[i : i + 1] for x in start))
        alone = call_tensors(spec, part, own, None)
        assert torch.equal(packed.output[:, s : s + length], alone.output)
        for x, y in zip(packed.final_state, alone.final_state, strict=True):
            assert x is None or torch.equal(x[i : i + 1], y)


def call_tensors(spec, operands, state, cu):
    ops = dict(operands)
    return glazoo.attention(
        spec,
        ops.pop("q"),
        ops.pop("k"),
        ops.pop("v"),
        **ops,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu,
        impl="reference",
    )


@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_gradients(name: str, gate: str | None) -> None:
    rng = np.random.default_rng(13)
    operands = tensors(make_operands(name, rng, 1, 3, 1, 2, 3, 2, gate))
    state = state_of(make_state(name, rng, 1, 1, 2, 3, 2, gate))
    names = [k for k, x in operands.items() if x is not None]
    parts = [i for i, x in enumerate(state) if x is not None]
    spec = spec_of(name, gate)

    def f(*xs):
        ops = dict(operands) | dict(zip(names, xs, strict=False))
        full = list(state)
        for i, x in zip(parts, xs[len(names) :], strict=True):
            # The state of full precision is symmetric; the check moves one entry at a time.
            full[i] = (x + x.mT) / 2 if spec.posterior.precision == "full" and i == 1 else x
        out = call_tensors(spec, ops, glazoo.State(*full), None)
        return (out.output, *(x for x in out.final_state if x is not None))

    xs = [operands[k] for k in names] + [state[i] for i in parts]
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in xs], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_inputs_use_float32_arithmetic_and_state(dtype: torch.dtype) -> None:
    operands = tensors(make_operands("palimpsa", np.random.default_rng(0), 1, 5, 1, 2, 4, 3))
    low = {k: x.to(dtype) for k, x in operands.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call_tensors(glazoo.load("palimpsa"), low, None, None)
    again = call_tensors(
        glazoo.load("palimpsa"), {k: x.float() for k, x in low.items()}, None, None
    )
    assert result.output.dtype == dtype
    assert result.final_state.memory.dtype == result.final_state.importance.dtype == torch.float32
    assert torch.equal(result.output, again.output.to(dtype))
