import pytest

from glazoo.compare.timing import in_turns, seconds_of, spread


def test_measurements_take_turns_after_one_that_warms_up() -> None:
    seen: list[str] = []

    def measure(name: str) -> int:
        seen.append(name)
        return len(seen)

    a, b = in_turns([lambda: measure("a"), lambda: measure("b")], seconds=0, least=2)
    assert "".join(seen) == "ababab"
    assert (a, b) == ([3, 5], [4, 6])
    assert [len(x) for x in in_turns([int], seconds=60, most=7)] == [7]
    seen.clear()
    assert in_turns([lambda: measure("a")], seconds=0, least=2, warm=True) == [[1, 2]]


def test_spread_is_of_percentiles_and_of_one_value_that_value() -> None:
    assert spread(range(11)) == pytest.approx((2, 5, 8))
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert 0 <= seconds_of(int) < 60
