import math

import pytest
import torch

from glazoo.stats import against_source, interval, paired


def test_an_interval_is_that_of_students_distribution() -> None:
    # Two values: the quantile of Cauchy's distribution; three: its closed form with two degrees.
    cauchy, two = math.tan(math.pi * 0.475), 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert interval([0.0, 2.0]).half == pytest.approx(cauchy)
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(two / math.sqrt(3))


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = torch.Generator().manual_seed(0)
    trials = 4000
    draws = torch.randn(trials, 4, generator=rng, dtype=torch.float64).tolist()
    covered = sum(i.low <= 0 <= i.high for i in map(interval, draws))
    assert abs(covered / trials - 0.95) < 5 * math.sqrt(0.95 * 0.05 / trials)


def test_better_is_only_said_where_the_difference_seed_by_seed_is() -> None:
    # What the seeds do to all of them is more than what tells the first two apart.
    values = {
        "gla": [0.6, 0.8, 0.4],
        "metaplastic_gla": [0.71, 0.9, 0.5],
        "metaplastic_gla (head)": [0.5, 0.9, 0.4],
        "metaplastic_gla (value)": [0.5, 0.69, 0.3],
    }
    assert against_source("metaplastic_gla", values) == "better"
    assert against_source("metaplastic_gla (head)", values) == "not separated"
    assert against_source("metaplastic_gla (value)", values) == "worse"
    assert against_source("gla", values) == ""
    assert against_source("metaplastic_gla", {"metaplastic_gla": [1.0, 2.0]}) == ""
    assert against_source("metaplastic_gla", {"gla": [1.0], "metaplastic_gla": [9.0]}) == (
        "not separated"
    )


def test_a_paired_difference_leaves_out_what_a_seed_does_to_both() -> None:
    a, b = {0: 0.9, 1: 0.5, 2: 0.71, 7: 0.1}, {2: 0.6, 0: 0.8, 1: 0.4, 9: 0.0}
    difference = paired(a, b)
    assert difference is not None
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(0.31 / 3)
    assert difference.half == pytest.approx(interval([0.1, 0.1, 0.11]).half)
    assert difference.low > 0
    assert paired(a, {9: 0.0}) is None
    assert difference.times(100).signed() == "+10.3 \u00b1 1.4"
    assert interval([-0.5]).signed(2) == "-0.50"


def test_an_interval_needs_a_value() -> None:
    with pytest.raises(ValueError, match="got none"):
        interval([])
