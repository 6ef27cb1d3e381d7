import math
import statistics

import pytest
import torch

from glazoo.compare.stats import Interval, compare, interval, student_quantile
from glazoo.compare.tables import against_source


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.9995])
def test_quantiles_with_one_and_two_degrees_of_freedom_are_the_closed_forms(p: float) -> None:
    cauchy = math.tan(math.pi * (p - 0.5))
    two = (2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2))
    # The sum loses what atan2 and the bisection round: a few units in the last place of 1.
    assert student_quantile(p, 1) == pytest.approx(cauchy, rel=1e-9)
    assert student_quantile(p, 2) == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("degrees", [3, 4, 7, 10])
def test_quantiles_match_draws(degrees: int) -> None:
    rng = torch.Generator().manual_seed(degrees)
    n = 400_000
    normal = torch.randn(n, generator=rng, dtype=torch.float64)
    chi = torch.randn(n, degrees, generator=rng, dtype=torch.float64).square().sum(1)
    t = normal / (chi / degrees).sqrt()
    share = float((t <= student_quantile(0.975, degrees)).double().mean())
    # Five standard deviations of the share of n draws.
    assert abs(share - 0.975) < 5 * math.sqrt(0.975 * 0.025 / n)


def test_quantiles_approach_the_normal_from_above() -> None:
    normal = statistics.NormalDist().inv_cdf(0.975)
    ts = [student_quantile(0.975, n) for n in (1, 2, 3, 10, 100, 1000)]
    assert ts == sorted(ts, reverse=True)
    assert ts[-1] > normal
    # The first term of the expansion in 1 / degrees.
    assert ts[-1] - normal == pytest.approx((normal**3 + normal) / 4000, rel=0.01)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = torch.Generator().manual_seed(0)
    trials = 4000
    draws = torch.randn(trials, 4, generator=rng, dtype=torch.float64).tolist()
    covered = sum(i.low <= 0 <= i.high for i in map(interval, draws))
    assert abs(covered / trials - 0.95) < 5 * math.sqrt(0.95 * 0.05 / trials)


def test_better_is_only_said_where_intervals_separate() -> None:
    low, high = Interval(1.0, 0.8, 1.2, 3), Interval(2.0, 1.3, 2.7, 3)
    touching, single = Interval(1.5, 1.1, 1.9, 3), Interval(9.0, 9.0, 9.0, 1)
    assert compare(high, low) == "higher"
    assert compare(low, high) == "lower"
    assert compare(touching, low) == "not separated"
    assert compare(single, low) == "not separated"
    values = {"gla": low, "metaplastic_gla": high, "metaplastic_gla (head)": touching}
    assert against_source("metaplastic_gla", values) == "better"
    assert against_source("metaplastic_gla", values, good="lower") == "worse"
    assert against_source("metaplastic_gla (head)", values) == "not separated"
    assert against_source("gla", values) == ""


def test_an_interval_needs_a_value_and_a_domain() -> None:
    with pytest.raises(ValueError, match="got none"):
        interval([])
    with pytest.raises(ValueError, match="degrees = 0"):
        student_quantile(0.9, 0)
