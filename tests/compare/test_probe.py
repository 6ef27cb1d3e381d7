import math
from pathlib import Path

import pytest
import torch

import glazoo
from glazoo.compare.capacity import CapacityPlan, capacity, curve, default_pairs
from glazoo.compare.errors import CompareError
from glazoo.compare.forgetting import ForgettingPlan, forgetting
from glazoo.compare.keys import KEY_KINDS, draw_keys
from glazoo.compare.probe import (
    Gates,
    crossing,
    gate_grid,
    key_size_for,
    mapped_size,
    read,
    retrieval_error,
    write,
)
from glazoo.stats import interval
from glazoo.zoo import load

ALL = [*glazoo.names(), *(f"metaplastic_{n}" for n in glazoo.names() if not load(n).metaplastic)]


@pytest.mark.parametrize("name", ALL)
def test_every_spec_stores_a_few_pairs_and_reading_changes_nothing(name: str) -> None:
    program = glazoo.lower(load(name))
    size = key_size_for(program, 256, 8)
    rng = torch.Generator().manual_seed(0)
    keys = draw_keys("random", 4, 3, size, rng)
    values = torch.randn(4, 3, 8, generator=rng)
    grid = gate_grid(program, 3)
    state = write(program, keys, values, grid, impl="reference")
    once = read(program, state, keys, 8, grid, impl="reference")
    twice = read(program, state, torch.cat([keys, keys], 1), 8, grid, impl="reference")
    assert torch.isfinite(once).all()
    assert torch.equal(twice[:, :3], once)
    assert torch.equal(twice[:, 3:], once)
    best = float(retrieval_error(once, values).mean(0).min())
    # An empty memory has error one, and shuffled answers are worse than the stored ones.
    shuffled = float(retrieval_error(once, values.roll(1, 1)).mean(0).min())
    assert best < min(1.0, shuffled)


@pytest.mark.parametrize("name", ["gla", "palimpsa", "mesanet", "based", "rebased", "longhorn"])
@pytest.mark.parametrize("floats", [64, 256, 1000])
def test_the_key_size_is_the_largest_that_the_budget_holds(name: str, floats: int) -> None:
    program = glazoo.lower(load(name))
    size = key_size_for(program, floats, 4)
    assert program.state_floats(mapped_size(program, size), 4) <= floats
    assert program.state_floats(mapped_size(program, size + 1), 4) > floats


def test_a_budget_below_the_smallest_state_is_refused_with_its_size() -> None:
    with pytest.raises(CompareError, match=r"64 bytes a head are too few for 'palimpsa'.*128 byt"):
        key_size_for(glazoo.lower(load("palimpsa")), 16, 16)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "mesanet", "gla"])
def test_orthogonal_keys_are_recalled_without_error(name: str) -> None:
    program = glazoo.lower(load(name))
    values = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1))
    keys = torch.eye(8).expand(2, -1, -1)
    grid = [Gates()]
    y = read(program, write(program, keys, values, grid), keys, 5, grid)
    # Rounding of float32 in sums of at most 8 terms, squared by the error's definition.
    assert float(retrieval_error(y, values).max()) < (8 * torch.finfo(torch.float32).eps) ** 1


def test_a_hebbian_memory_has_the_error_that_theory_gives() -> None:
    size, pairs, seeds = 32, 16, 24
    spec = load("linear_attention")
    plan = CapacityPlan(spec, "x", "random", 4 * size * 8, 8, (pairs,), seeds, 0, 0.25, "reference")
    measured = interval(curve(plan).errors[0], 0.9999)
    expected = (pairs - 1) / (pairs - 1 + size)
    # The ratio of sums that a seed gives is biased by the order of 1 / (pairs x values).
    slack = 1 / (pairs * 8)
    assert measured.low - slack < expected < measured.high + slack


def test_the_error_does_not_depend_on_the_output_scale_and_bounds_hold() -> None:
    v = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    y = v[:, :, None] + 0.5 * torch.randn(2, 5, 1, 3, generator=torch.Generator().manual_seed(3))
    one, other = retrieval_error(y, v), retrieval_error(1e-3 * y, v)
    assert torch.allclose(one, other, rtol=1e-6, atol=0)
    best = min(
        float((v[0] - c / 1000 * y[0, :, 0]).square().sum() / v[0].square().sum())
        for c in range(2000)
    )
    assert float(one[0, 0]) == pytest.approx(best, abs=1e-5)
    assert float(retrieval_error(torch.full_like(y, torch.nan), v).min()) == 1.0
    assert float(retrieval_error(-v[:, :, None], v).min()) == 1.0


def test_a_share_of_the_matrix_is_what_the_spec_says() -> None:
    grid = gate_grid(glazoo.lower(load("gka")), 8)
    assert {g.prior for g in grid} == {0.02}
    assert {g.write for g in grid} == {1.0}
    assert {g.prior for g in gate_grid(glazoo.lower(load("mesanet")), 8)} == {1.0}


def test_the_crossing_is_interpolated_in_the_logarithm() -> None:
    assert crossing([4, 16], [0.0, 0.5], 0.25) == pytest.approx(8.0)
    assert crossing([4, 16], [0.5, 0.9], 0.25) == pytest.approx(2.0)
    assert crossing([4, 16], [0.0, 0.1], 0.25) == 16.0


def test_keys_are_unit_and_of_the_kind_that_is_asked_for() -> None:
    for kind in KEY_KINDS:
        keys = draw_keys(kind, 2, 400, 32, torch.Generator().manual_seed(0))
        assert torch.allclose(keys.norm(dim=-1), torch.ones(2, 400), atol=1e-5)
    rng = torch.Generator().manual_seed(0)
    channel = draw_keys("anisotropic", 4, 2000, 32, rng).square().mean((0, 1))
    assert bool((channel[:8].diff() < 0).all())
    cosines = draw_keys("clustered", 1, 400, 256, rng)[0]
    similarity = (cosines @ cosines.mT).flatten()
    # Two groups of pairs: strangers near 0, neighbours near 1 / 2.
    assert float(((similarity - 0.25).abs() > 0.1).double().mean()) > 0.9


def test_the_exact_posterior_stores_more_than_a_sum_at_equal_bytes() -> None:
    plans = [
        CapacityPlan(load(n), n, "random", 2048, 8, default_pairs(2048, 8), 4, 0, 0.25, "auto")
        for n in ("gla", "mesanet")
    ]
    gla, mesa = capacity(plans)
    assert gla.capacity_per_kilobyte.high < mesa.capacity_per_kilobyte.low
    assert gla.bounded
    assert mesa.state_bytes <= 2048


def test_a_spec_file_is_measured_by_its_values_and_not_by_its_name(tmp_path: Path) -> None:
    source = load("gated_deltanet")
    renamed = source.model_copy(update={"name": "unheard_of"})
    curves = [
        curve(CapacityPlan(s, "x", "random", 1024, 8, (4, 8), 3, 0, 0.25, "reference"))
        for s in (source, renamed)
    ]
    assert curves[0].errors == curves[1].errors


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("linear_attention", lambda lag, a: 1.0),
        ("mamba2", lambda lag, a: a**lag),
        ("deltanet", lambda lag, a: (1 - 0.5 / 32) ** lag),
        ("gated_deltanet", lambda lag, a: (a * (1 - 0.5 / 32)) ** lag),
        ("rwkv6", lambda lag, a: a**lag),
    ],
)
def test_signals_fade_as_the_expectation_says(name: str, signal: object) -> None:
    plan = ForgettingPlan(
        load(name),
        name,
        Gates(decay=-1 / 64, write=0.5, erase=0.5),
        key_size=32,
        value_size=16,
        before=8,
        after=48,
        sequences=48,
        seeds=5,
        impl="reference",
    )
    found = forgetting(plan)
    assert found.theory is not None
    for lag, at in zip(found.lags, found.signal, strict=True):
        expected = signal(lag, math.exp(-1 / 64))  # type: ignore[operator]
        assert found.theory.signal[lag] == pytest.approx(expected, rel=1e-9)
        # A 99.99 % interval: some 16 lags in 5 cases, and rounding where there is no spread.
        wide = at.half * 3.6 + 1e-6
        assert abs(at.mean - expected) <= wide


@pytest.mark.parametrize(
    "name",
    [
        "mesanet",
        "palimpsa",
        "metaplastic_gated_deltanet",
        "metaplastic_gated_deltanet_isotropic",
        "metaplastic_mamba2_isotropic",
        "longhorn",
        "metaplastic_implicit_delta",
    ],
)
def test_theory_predicts_the_error_better_than_a_constant_does(name: str) -> None:
    plan = ForgettingPlan(
        load(name), name, Gates(decay=-1 / 64), key_size=48, before=32, after=96, seeds=4,
        sequences=24,
    )  # fmt: skip
    found = forgetting(plan)
    assert found.theory is not None
    measured = [e.mean for e in found.error]
    mean = sum(measured) / len(measured)
    left = sum((m - found.theory.error[n]) ** 2 for n, m in zip(found.lags, measured, strict=True))
    spread = sum((m - mean) ** 2 for m in measured)
    # A mean-field theory: it leaves a tenth of the variation at most.
    assert left < 0.1 * spread


@pytest.mark.parametrize(
    "name",
    [
        "lightnet",  # keys are logarithms
        "efla",
        "gka",
        "kdn",
        "metaplastic_gated_deltanet_full",
        "metaplastic_mamba2_diffuse",
    ],
)
def test_there_is_no_theory_where_none_is_right(name: str) -> None:
    plan = ForgettingPlan(load(name), "x", Gates(), key_size=8, before=4, after=8, seeds=2)
    assert forgetting(plan).theory is None
