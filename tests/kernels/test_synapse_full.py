"""The memory read through a full precision matrix, in the interpreter, against float64 loops."""

import functools
import sys

import pytest
import torch
from synapse_cases import (
    assert_matches,
    full_loop,
    full_operands,
    symmetric,
    values_and_gradients,
)

from glazoo.kernels.full import full

# The package's attribute of that name is the function.
module = sys.modules["glazoo.kernels.full"]

pytestmark = pytest.mark.usefixtures("poison")
PACKED = torch.tensor([0, 0, 17, 17, 18, 21])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "BORDER", 32)


def run(q, k, w, beta, prior, g=None, h=None, j=None, **options):
    state = None if h is None else (h, j)
    o, (h, j), u = full(q, k, w, beta, g, prior=prior, initial_state=state, **options)
    found = {"output": o, "final G": h, "final H": j}
    return found if u is None else found | {"uncertainty": u}


def check(given, dtype=torch.float32, **options):
    kernel, loop = (symmetric(functools.partial(x, **options)) for x in (run, full_loop))
    assert_matches(kernel, loop, given, dtype)


@pytest.mark.parametrize("gate", ["none", "head"])
def test_matches_the_loop(gate):
    check(full_operands(1, 35, 1, 2, 5, 3, gate=gate), uncertainty=True)


def test_resets_exactly():
    check(full_operands(1, 20, 1, 1, 4, 4, resets=True))


def test_packed():
    check(full_operands(1, 21, 1, 1, 4, 4, sequences=5), cu_seqlens=PACKED)


def test_half_precision():
    check(full_operands(1, 9, 1, 1, 8, 8), torch.float16)


@pytest.mark.parametrize(("T", "K", "V"), [(1, 4, 5), (3, 40, 20)])
def test_sizes(T, K, V):
    check(full_operands(2, T, 1, 1, K, V, state=False))


def test_compile_as_one_graph():
    function = functools.partial(run, uncertainty=True)
    compiled = torch.compile(
        lambda **x: function(**x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    given = {k: x.float() for k, x in full_operands(1, 3, 1, 2, 4, 3).items()}
    expected, weights = values_and_gradients(function, given)
    found, _ = values_and_gradients(compiled, given, weights)
    for name, x in expected.items():
        torch.testing.assert_close(x, found[name])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"beta": lambda x: x[..., None]}, {}, r"beta: got shape \(1, 5, 2, 1\)"),
        ({"g": lambda x: x[..., None].expand(1, 5, 2, 4)}, {}, "g: got shape"),
        ({"j": lambda x: x[..., :1]}, {}, "initial_state: got shape"),
        ({}, {"solver": "cholesky"}, "solver: got 'cholesky'"),
    ],
)
def test_misuse_is_named(changes, options, message):
    given = {k: x.float() for k, x in full_operands(1, 5, 1, 2, 4, 3).items()}
    given = {k: changes.get(k, lambda x: x)(x) for k, x in given.items()}
    with pytest.raises(ValueError, match=message):
        run(**given, **options)
