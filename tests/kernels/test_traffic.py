"""What the census of traffic counts, and that eager operations move no more than they did."""

import dataclasses
import pathlib

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    "pattern",
    ["linear/head|^delta/key|first order", pytest.param("", marks=pytest.mark.slow)],
)
def test_eager_operations_move_what_their_budgets_say(pattern):
    import census

    found = census.eager_bytes(pattern)
    assert found
    assert census.eager_violations(found) == []


def test_a_budget_that_does_not_fit_is_named(monkeypatch):
    import census

    found = {"linear/none": {"forward": 12.0, "backward": 8.0}}
    budgets = {"linear/none": {"forward": 12, "backward": 7}}
    monkeypatch.setattr(census, "read_budgets", lambda: {census.EAGER: budgets})
    assert census.eager_violations(found) == ["eager bytes of linear/none, backward: 8, budget 7"]


def test_an_operation_reads_and_writes_each_tensor_once():
    from traffic import Eager

    x = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    with Eager() as eager:
        y = x.t() * 2
        y.to(torch.float32).zero_()
        x.copy_(torch.empty_like(x))
        y[:1].expand(8, 4) + 1
    expected = [("mul", 96), ("_to_copy", 48 + 96), ("zero_", 96), ("copy_", 96), ("add", 8 + 64)]
    assert eager.operations == expected


def test_a_kernel_reads_again_what_several_of_its_programs_read():
    """Linear attention forward: keys and values once for each of two tiles of the other, states
    written and read once for 64 tokens, everything else once."""
    from traffic import KEYS, TOKENS, VALUES, of_case, touched_by

    few, many = (of_case("linear/none", tokens, "sm_90")["forward"].launches for tokens in TOKENS)
    found = sum(touched_by(x).bytes for x in many) - sum(touched_by(x).bytes for x in few)
    state = KEYS * VALUES / 64
    walked = 2 * (KEYS + VALUES) + state
    read = 2 * KEYS + 2 * VALUES + state
    assert found == (TOKENS[1] - TOKENS[0]) * 2 * (walked + read)


def test_what_is_given_by_two_names_is_read_once():
    """The keys that a delta rule reads and erases by, in a program for each tile of values."""
    from traffic import KEYS, VALUES, of_case, touched_by

    (launch,) = (
        x
        for x in of_case("delta/none", 64, "sm_90")["forward"].launches
        if x.kernel.__name__ == "delta_state_kernel"
    )
    other = launch.arguments | {"e": torch.empty_like(launch.arguments["e"])}
    apart = touched_by(dataclasses.replace(launch, arguments=other)).bytes
    programs = VALUES // launch.tiles.BV
    assert apart - touched_by(launch).bytes == programs * 64 * KEYS * 2
