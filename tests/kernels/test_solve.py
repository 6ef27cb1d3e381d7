"""Vectors over a precision matrix, in the interpreter, against float64 loops."""

import functools
import sys

import pytest
import torch
from kernel_cases import (
    assert_matches_loop,
    solve_loop,
    solve_operands,
    symmetric,
    values_and_gradients,
)

from glazoo.kernels import solve

# The package's attribute of that name is the function.
module = sys.modules["glazoo.kernels.solve"]

pytestmark = pytest.mark.usefixtures("poison")
PACKED = torch.tensor([0, 0, 17, 17, 18, 21])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "BORDER", 32)


def check(given, dtype=torch.float32, **options):
    kernel, loop = (symmetric(functools.partial(x, **options)) for x in (solve, solve_loop))
    assert_matches_loop(kernel, loop, given, dtype)


@pytest.mark.parametrize("gate", ["none", "head"])
def test_matches_the_loop(gate):
    check(solve_operands(1, 35, 1, 2, 5, gate=gate))


def test_resets_exactly():
    check(solve_operands(1, 20, 1, 1, 4, resets=True))


def test_packed():
    check(solve_operands(1, 21, 1, 1, 4, sequences=5), cu_seqlens=PACKED)


def test_half_precision():
    check(solve_operands(1, 9, 1, 1, 8), torch.float16)


@pytest.mark.parametrize(("T", "K"), [(1, 4), (3, 40)])
def test_sizes(T, K):
    check(solve_operands(2, T, 1, 1, K, state=False))


def test_compile_as_one_graph():
    compiled = torch.compile(
        lambda **x: solve(**x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    given = {k: x.float() for k, x in solve_operands(1, 3, 1, 2, 4).items()}
    expected, weights = values_and_gradients(solve, given)
    found, _ = values_and_gradients(compiled, given, weights)
    for name, x in expected.items():
        torch.testing.assert_close(x, found[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": lambda x: x[..., None]}, r"beta: got shape \(1, 5, 2, 1\)"),
        ({"g": lambda x: x[..., None].expand(1, 5, 2, 4)}, "g: got shape"),
        ({"initial_state": lambda x: x[..., :1]}, "initial_state: got shape"),
    ],
)
def test_misuse_is_named(changes, message):
    given = {k: x.float() for k, x in solve_operands(1, 5, 1, 2, 4).items()}
    given = {k: changes.get(k, lambda x: x)(x) for k, x in given.items()}
    with pytest.raises(ValueError, match=message):
        solve(**given)
