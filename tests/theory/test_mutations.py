"""The catalogue catches wrong recurrences: every mutant by the statements listed with it."""

import functools
from collections import Counter

import pytest
from theory.mutants import ANOTHER_ORDER, MUTANTS, Mutant

import glazoo
from glazoo.theory import ENTRIES, verify
from glazoo.theory.catalogue import entry
from glazoo.theory.entry import Kind, Trial
from glazoo.theory.results import passed

# What compares an implementation with the reference would catch anything; the theory has to do it
# by itself.
THEORY = tuple(e.id for e in ENTRIES if not e.engine)


def caught(mutant: Mutant, statements: tuple[str, ...]) -> list[str]:
    results = verify.run([*statements, *mutant.specs], op=mutant.op(), shrink=False)
    return list(dict.fromkeys(r.id for r in results if r.verdict == "failed"))


def test_there_are_enough_mutants() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 15
    assert all(m.caught_by for m in MUTANTS)
    assert {id_ for m in MUTANTS for id_ in m.caught_by} <= set(THEORY)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_mutant_is_caught_by_what_is_listed(mutant: Mutant) -> None:
    assert caught(mutant, mutant.caught_by) == [i for i in THEORY if i in mutant.caught_by]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_everything_that_catches_a_mutant(mutant: Mutant, record_property) -> None:
    found = caught(mutant, THEORY)
    record_property("caught_by", ", ".join(found))
    print(f"{mutant.name}: {', '.join(found)}")
    assert set(mutant.caught_by) <= set(found)


# The whole catalogue, of every spec, is in `test-all`; here what most mutants are made of.
SPECS = Counter(m.specs for m in MUTANTS)


@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(x, id="-".join(x), marks=[pytest.mark.slow] * (SPECS[x] == 1))
        for x in sorted(SPECS)
    ],
)
def test_the_statements_that_catch_mutants_hold_for_the_reference(specs: tuple[str, ...]) -> None:
    statements = {i for m in MUTANTS if m.specs == specs for i in m.caught_by}
    op = functools.partial(glazoo.api.attention, impl="reference")
    assert passed(verify.run([*sorted(statements), *specs], op=op))


@pytest.mark.parametrize("gate", ["head", "value"])
def test_another_order_of_a_sum_costs_the_bits_of_the_source(gate: str) -> None:
    (name,), (statement,) = ANOTHER_ORDER.specs, ANOTHER_ORDER.caught_by
    spec = glazoo.metaplasticize(glazoo.load(name), gate=gate)
    bits = entry(statement)
    instance = bits.domain.sample_long(0)
    found = bits.judge(Trial(ANOTHER_ORDER.op(), spec, instance))
    assert (found.passed, found.what) == (False, "bits of the output")
    truth = functools.partial(glazoo.api.attention, impl="reference")
    assert bits.judge(Trial(truth, spec, instance)).passed


def test_a_mutant_that_no_longer_fits_the_reference_is_an_error() -> None:
    gone = Mutant("gone", (("no such line", ""),), ("gla",), ())
    with pytest.raises(AssertionError, match="has no 'no such line' any more"):
        gone.op()


def test_mutants_reach_every_kind_of_statement() -> None:
    kinds = {entry(i).kind for m in MUTANTS for i in m.caught_by}
    assert kinds == set(Kind)
