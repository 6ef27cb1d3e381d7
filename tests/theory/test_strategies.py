"""Shipped instances and strategies: valid, reproducible, and complete at the edges."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glazoo
from glazoo.theory import Instance, operands, run, state, strategies
from glazoo.theory.forms import forms
from glazoo.theory.instances import REGIMES

FORMS = forms()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
def test_operands_and_states_are_accepted_in_every_regime(form) -> None:
    program = glazoo.lower(form.spec)
    for regime in REGIMES:
        i = Instance(2, 5, 2, 2, 4, 3, regime, True, seed=1)
        ops = i.operands(form.spec)
        required = {o.name for o in program.operands if o.required}
        assert required <= set(ops)
        result = run(glazoo.api.attention, form.spec, ops, initial_state=i.state(form.spec))
        assert result.output.isfinite().all()


def test_regimes_are_what_they_say() -> None:
    gdn = glazoo.metaplasticize(glazoo.load("gated_deltanet"))

    def draw(regime):
        return operands(gdn, torch.Generator().manual_seed(0), 2, 40, 2, 4, 4, 3, regime=regime)

    assert (draw("no_decay")["g"] == 0).all()
    assert (draw("strong_decay")["g"] <= -5).all()
    assert draw("reset")["g"].isinf().any()
    assert (draw("zero_write")["beta"] == 0).all()
    assert (draw("zero_gate")["b"] == 0).all()
    assert (draw("zero_gate")["prior"] == 1).all()
    assert (draw("large_prior")["prior"] == 1e4).all()
    zeros = (draw("zero_keys")["k"] == 0).all(-1)
    assert zeros.any()
    assert not zeros.all()
    assert (draw("one_hot")["k"].abs().sum(-1) == 1).all()
    mixed = draw("mixed")
    assert (mixed["g"] == 0).any()
    assert mixed["g"].isinf().any()
    for name in ("beta", "b"):
        assert (mixed[name] == 0).any()
        assert (mixed[name] > 0).any()
    norms = draw("normal")["k"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_generator_decides_and_dtypes_see_the_same_values() -> None:
    spec = glazoo.load("palimpsa")

    def draw(seed, dtype=torch.float64):
        return operands(spec, torch.Generator().manual_seed(seed), dtype=dtype)

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    low = draw(1, torch.bfloat16)
    assert all(torch.equal(first[n].bfloat16(), low[n]) for n in first)


def test_wrong_requests_are_refused() -> None:
    spec, generator = glazoo.load("gla"), torch.Generator()
    with pytest.raises(ValueError, match="HV: got 3, accepted is a multiple of H = 2"):
        operands(spec, generator, H=2, HV=3)
    with pytest.raises(ValueError, match="regime: got 'odd', accepted are normal, "):
        operands(spec, generator, regime="odd")  # type: ignore[arg-type]


def test_state_of_full_precision_is_positive_definite() -> None:
    drawn = state(glazoo.load("mesanet"), torch.Generator().manual_seed(0), 3)
    importance = drawn.importance
    assert importance is not None
    assert (torch.linalg.eigvalsh(importance) > 0).all()


@given(strategies.specs().flatmap(lambda f: strategies.inputs(f.spec)))
def test_inputs_run(x) -> None:
    result = x.run(glazoo.api.attention, impl="reference")
    i = x.instance
    assert result.output.shape == (i.B, i.T, i.HV, i.V)
    count = i.B if x.cu_seqlens is None else len(x.cu_seqlens) - 1
    assert result.final_state.memory.shape == (count, i.HV, i.K, i.V)
    assert result.output.isfinite().all()


def test_inputs_reach_the_edges() -> None:
    edges = {
        "no token": lambda x: x.instance.T == 0,
        "one token": lambda x: x.instance.T == 1,
        "packed": lambda x: x.cu_seqlens is not None and len(x.cu_seqlens) > 2,
        "empty sequence between others": lambda x: (
            x.cu_seqlens is not None and bool((x.cu_seqlens.diff()[1:-1] == 0).any())
        ),
        "grouped": lambda x: x.instance.G > 1 and x.instance.H > 1,
        "state": lambda x: x.initial_state is not None,
        "reset": lambda x: bool(x.operands["g"].isinf().any()),
        "no decay": lambda x: bool((x.operands["g"] == 0).any()),
        "zero gate": lambda x: bool((x.operands["beta"] == 0).any()),
    }
    reached = set()

    @settings(max_examples=300)
    @given(strategies.inputs(glazoo.load("gated_deltanet")))
    def collect(x) -> None:
        reached.update(name for name, edge in edges.items() if edge(x))

    collect()
    assert reached == set(edges)


@given(st.data())
def test_operands_and_states_of_a_spec(data) -> None:
    spec = glazoo.load("mamba3")
    ops = data.draw(strategies.operands(spec, dtype=torch.float32))
    assert set(ops) == {"q", "k", "v", "g", "beta", "trap"}
    assert {x.dtype for x in ops.values()} == {torch.float32}
    drawn = data.draw(strategies.states(spec))
    assert drawn.lag_key is not None
    assert drawn.importance is None


def test_the_absence_of_hypothesis_is_explained(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(
        ImportError, match=r"hypothesis is not installed: pip install 'glazoo\[verify\]'"
    ):
        strategies.instances()
