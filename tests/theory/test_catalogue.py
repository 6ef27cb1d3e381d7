"""The catalogue itself: complete, declarative, and true."""

import json
import math
from collections import Counter

import pytest
import torch

import glazoo
from glazoo.theory import ENTRIES, Instance, entry, verify
from glazoo.theory.entry import (
    Bound,
    Curve,
    Domain,
    Kind,
    Pair,
    Trial,
    excess,
    fitted_rate,
    relative,
)
from glazoo.theory.forms import forms
from glazoo.theory.results import failures, passed

FORMS = forms()


def test_there_are_at_least_thirty_statements_of_every_kind() -> None:
    assert len(ENTRIES) >= 30
    assert len({e.id for e in ENTRIES}) == len(ENTRIES)
    assert set(Counter(e.kind for e in ENTRIES)) == set(Kind)


@pytest.mark.parametrize("e", ENTRIES, ids=lambda e: e.id)
def test_entry_is_complete(e) -> None:
    assert all((e.statement, e.left, e.right, e.condition, e.source))
    assert (e.rate is not None) == (e.kind is Kind.LIMIT)
    assert any(e.applies(f.spec) for f in FORMS)
    assert json.loads(json.dumps(e.describe()))["kind"] == e.kind
    assert entry(e.id) is e


def test_unknown_statement_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'packed-is-separate'"):
        entry("packed-is-seperate")


def test_every_spec_has_a_dense_form_and_all_executions() -> None:
    """Adding a spec file covers it at once."""
    dense = {
        "hebbian-is-a-weighted-sum",
        "delta-rule-solves-a-triangular-system",
        "log-evidence-is-a-softmax-over-time",
        "full-precision-is-a-normal-equation",
        "full-precision-solves-for-its-means",
        "growing-variance-is-a-gaussian-process",
    }
    execution = {
        "causal",
        "segmented-is-whole",
        "packed-is-separate",
        "decoding-is-prefill",
        "linear-in-values",
        "value-channels-are-heads",
        "engine-is-reference",
        "engine-gradients-are-reference",
    }
    for form in FORMS:
        mine = {e.id for e in ENTRIES if e.applies(form.spec)}
        assert len(mine & dense) == 1
        assert execution <= mine


@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("e", ENTRIES, ids=lambda e: e.id)
def test_statement_holds_on_the_reference(e, n) -> None:
    """One form per set of posterior axes; `test_verify` has the rest."""
    chosen = {}
    for f in FORMS:
        if e.applies(f.spec):
            imp = f.spec.importance
            kind = None if imp is None else (imp.forgetting, imp.basis, imp.noise.shape)
            chosen.setdefault((f.spec.posterior, kind, f.spec.decay.shape, f.spec.steps), f)
    results = [e.judge(Trial(reference, f.spec, e.domain.sample(n, 17))) for f in chosen.values()]
    assert results
    assert all(r.passed for r in results), next(r for r in results if not r.passed)


def reference(*args, **kwargs):
    return glazoo.api.attention(*args, impl="reference", **kwargs)


def test_tolerance_of_exact_statements_is_below_1e_minus_10() -> None:
    for e in ENTRIES:
        d = e.domain
        largest = Instance(T=max(d.tokens[1], d.long), K=d.keys[1])
        for f in FORMS:
            assert Trial(reference, f.spec, largest).tolerance < 1e-10


def test_residuals_see_what_is_wrong() -> None:
    one, nan = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    low = torch.tensor([1.0, -math.inf, 1.0])
    assert relative(one, one) == 0
    assert relative(low, low) == 0
    assert relative(one, 2 * one) == pytest.approx(0.5)
    assert relative(one, one[:2]) == math.inf
    assert relative(nan, one) == math.inf
    assert relative(one, low) == math.inf
    assert excess(one, one) == 0
    assert excess(2 * one, one) == pytest.approx(1)
    assert excess(nan, one) == math.inf


def test_rate_is_fitted_above_the_rounding() -> None:
    small = (1e-1, 1e-2, 1e-3, 1e-4)
    square = Curve("-", small, tuple(3 * x**2 for x in small))
    assert fitted_rate(square, 1e-16) == pytest.approx(2)
    flat = Curve("-", small, (1e-17,) * 4)
    assert math.isnan(fitted_rate(flat, 1e-16))


def check_of(*comparisons):
    base = entry("causal")
    fields = {f: getattr(base, f) for f in base.__dataclass_fields__}
    return type(base)(**fields | {"check": lambda t: comparisons})


def test_the_worst_comparison_decides() -> None:
    trial = Trial(reference, glazoo.load("gla"), Instance(T=2))
    one = torch.ones(1)
    good, bad = Pair("good", one, one), Pair("bad", one, 2 * one)
    over = Bound("over", 3 * one, one)
    assert check_of(good).judge(trial).passed
    assert check_of(good, bad).judge(trial).what == "bad"
    assert check_of(bad, good, over).judge(trial).what == "over"
    assert not check_of(good, over).judge(trial).passed


def test_an_exception_fails_and_not_implemented_is_unsupported() -> None:
    trial = Trial(reference, glazoo.load("gla"), Instance(T=2))

    def fails(kind):
        def check(t):
            raise kind("because")
            yield

        base = entry("causal")
        fields = {f: getattr(base, f) for f in base.__dataclass_fields__}
        return type(base)(**fields | {"check": check}).judge(trial)

    assert fails(RuntimeError).what == "raised RuntimeError: because"
    assert not fails(RuntimeError).passed
    assert fails(NotImplementedError).unsupported


def test_instances_are_reproducible_and_within_their_domain() -> None:
    d = Domain(tokens=(1, 4), heads=(2, 3), start=False)
    drawn = [d.sample(n, 5) for n in range(50)]
    assert drawn == [d.sample(n, 5) for n in range(50)]
    assert drawn != [d.sample(n, 6) for n in range(50)]
    assert {i.T for i in drawn} == {1, 2, 3, 4}
    assert {i.H for i in drawn} == {2, 3}
    assert {i.start for i in drawn} == {False}
    assert {i.regime for i in drawn} == set(d.regimes)


@pytest.mark.slow
def test_whole_catalogue_on_every_engine() -> None:
    results = verify.run()
    assert passed(results), "\n".join(failures(results))
