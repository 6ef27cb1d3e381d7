"""Forward and every gradient of the kernels in the interpreter, against float64 loops per token."""

import functools

import pytest
import torch
from kernel_cases import (
    assert_matches_loop,
    delta_loop,
    importance_loop,
    linear_loop,
    make_operands,
    riccati_loop,
    riccati_operands,
)

from glazoo.kernels import delta, importance, linear, riccati
from glazoo.kernels.common import interpreting

pytestmark = pytest.mark.usefixtures("poison")
scaled = functools.partial(functools.partial, scale=0.3)
ONE = {"q": 1, "e": 1, "k": 1, "w": 1}
GATES = ("none", "head", "key")
DTYPES = (torch.float32, torch.float16)
# Every gate in float32, the one that has most to round in float16, too.
GATES_AND_DTYPES = [
    pytest.param(gate, dtype, marks=[pytest.mark.slow] * (narrow and gate != "key"))
    for gate in GATES
    for dtype, narrow in zip(DTYPES, (False, True), strict=True)
]
PACKED = torch.tensor([0, 0, 33, 33, 40, 40])


def test_these_tests_run_the_kernels():
    assert interpreting() or torch.cuda.is_available()


@pytest.mark.parametrize(("gate", "dtype"), GATES_AND_DTYPES, ids=str)
def test_linear(gate, dtype):
    operands = make_operands("qkw", 1, 70, ONE, 16, 16, gate=gate)
    assert_matches_loop(scaled(linear), scaled(linear_loop), operands, dtype)


def test_linear_with_a_write_gate_alone():
    operands = make_operands("qkw", 1, 40, {"q": 1, "k": 1, "w": 2}, 16, 16)
    operands["g"] = None
    assert_matches_loop(linear, linear_loop, operands, torch.float32)


@pytest.mark.parametrize("gate", ["head", "key"])
def test_linear_reads_before_the_write(gate):
    heads = {"q": 2, "k": 1, "w": 2}
    operands = make_operands("qkw", 2, 35, heads, 24, 20, gate=gate)
    read = functools.partial(linear, read="pre")
    assert_matches_loop(read, functools.partial(linear_loop, read="pre"), operands, torch.float32)


@pytest.mark.parametrize("read", ["post", "pre"])
@pytest.mark.parametrize("gate", ["head", "key"])
def test_linear_resets_exactly(gate, read):
    operands = make_operands("qkw", 1, 40, ONE, 16, 16, gate=gate, resets=True, strong=True)
    kernel = functools.partial(linear, read=read)
    loop = functools.partial(linear_loop, read=read)
    assert_matches_loop(kernel, loop, operands, torch.float32)


@pytest.mark.parametrize("gate", GATES)
def test_linear_packed(gate):
    operands = make_operands("qkw", 1, 40, {"q": 1, "k": 1, "w": 2}, 17, 16, gate=gate, sequences=5)
    kernel = functools.partial(linear, cu_seqlens=PACKED)
    assert_matches_loop(
        kernel, functools.partial(linear_loop, cu_seqlens=PACKED), operands, torch.float32
    )


@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (3, 5, 7), (33, 80, 72)])
def test_linear_sizes(T, K, V):
    operands = make_operands("qkw", 1, T, ONE, K, V, gate="key", state=False)
    assert_matches_loop(linear, linear_loop, operands, torch.float32)


@pytest.mark.parametrize(("gate", "dtype"), GATES_AND_DTYPES, ids=str)
def test_delta(gate, dtype):
    operands = make_operands("qekw", 1, 70, ONE, 16, 16, gate=gate)
    assert_matches_loop(scaled(delta), scaled(delta_loop), operands, dtype)


@pytest.mark.parametrize("gate", GATES)
def test_delta_whose_key_erases(gate):
    """Written and erased with gates of their own, of one of two heads, or without gates."""
    heads = {"q": 1, "e": 1, "k": 1, "w": 2}
    operands = make_operands("qekw", 1, 40, heads, 17, 16, gate=gate) | {"e": None}
    assert_matches_loop(delta, delta_loop, operands, torch.float32)


@pytest.mark.parametrize("alone", ["beta", "erase"])
def test_delta_with_one_gate_alone(alone):
    operands = make_operands("qekw", 1, 40, ONE, 16, 16)
    operands["beta" if alone == "erase" else "erase"] = operands["g"] = None
    assert_matches_loop(delta, delta_loop, operands, torch.float32)


@pytest.mark.parametrize("gate", ["head", "key"])
def test_delta_predicts_with_the_state_before_the_decay(gate):
    heads = {"q": 1, "e": 2, "k": 1, "w": 2}
    operands = make_operands("qekw", 1, 40, heads, 24, 20, gate=gate)
    kernel = functools.partial(delta, base="prev")
    assert_matches_loop(kernel, functools.partial(delta_loop, base="prev"), operands, torch.float32)


@pytest.mark.parametrize("base", ["decayed", "prev"])
@pytest.mark.parametrize("gate", ["head", "key"])
def test_delta_resets_exactly(gate, base):
    operands = make_operands("qekw", 1, 40, ONE, 16, 16, gate=gate, resets=True, strong=True)
    kernel = functools.partial(delta, base=base)
    loop = functools.partial(delta_loop, base=base)
    assert_matches_loop(kernel, loop, operands, torch.float32)


@pytest.mark.parametrize("gate", GATES)
def test_delta_packed(gate):
    heads = {"q": 2, "e": 1, "k": 1, "w": 2}
    operands = make_operands("qekw", 1, 40, heads, 17, 16, gate=gate, sequences=5)
    kernel = functools.partial(delta, cu_seqlens=PACKED)
    assert_matches_loop(
        kernel, functools.partial(delta_loop, cu_seqlens=PACKED), operands, torch.float32
    )


@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (3, 5, 7), (33, 80, 72)])
def test_delta_sizes(T, K, V):
    operands = make_operands("qekw", 1, T, ONE, K, V, gate="head", state=False)
    assert_matches_loop(delta, delta_loop, operands, torch.float32)


def test_delta_of_one_repeated_key():
    # Powers of the matrix that is inverted grow to 1e8 here; substitution does not see them.
    operands = make_operands("qekw", 1, 64, ONE, 16, 16, gate="none")
    operands["k"] = operands["k"][:, :1].expand(1, 64, 1, 16)
    operands["e"] = operands["k"]
    assert_matches_loop(delta, delta_loop, operands, torch.float32)


@pytest.mark.parametrize(("gate", "dtype"), GATES_AND_DTYPES, ids=str)
def test_importance(gate, dtype):
    operands = make_operands("kb", 1, 70, {"k": 1, "w": 2}, 3, 0, gate=gate, resets=gate != "none")
    assert_matches_loop(importance, importance_loop, operands, dtype)


@pytest.mark.parametrize("gate", GATES)
def test_importance_packed(gate):
    operands = make_operands("kb", 1, 40, {"k": 1, "w": 1}, 5, 0, gate=gate, sequences=5)
    kernel = functools.partial(importance, cu_seqlens=PACKED)
    loop = functools.partial(importance_loop, cu_seqlens=PACKED)
    assert_matches_loop(kernel, loop, operands, torch.float32)


def test_importance_of_more_keys_than_a_tile():
    operands = make_operands("kb", 1, 3, {"k": 1, "w": 1}, 33, 0, gate="key")
    assert_matches_loop(importance, importance_loop, operands, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["head", "key"])
def test_many_chunks_of_importance(gate):
    # More chunks than one tile of the pass between chunks, which carries over from tile to tile.
    operands = make_operands("kb", 1, 64 * 33 + 5, {"k": 1, "w": 1}, 3, 0, gate=gate)
    for name in ("k", "b", "g"):
        operands[name] = operands[name].detach()
    given = {name: x.float() for name, x in operands.items()}
    found = importance(**given)
    truth = importance_loop(**{name: x.double() for name, x in given.items()})
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("gate", GATES)
def test_riccati(gate):
    operands = riccati_operands(1, 70, 2, 2, gate=gate, resets=True, strong=True)
    operands["u"][:, 20:50] = 0
    assert_matches_loop(riccati, riccati_loop, operands, torch.float32)


def test_riccati_packed():
    operands = riccati_operands(1, 40, 1, 2, sequences=5)
    kernel = functools.partial(riccati, cu_seqlens=PACKED)
    loop = functools.partial(riccati_loop, cu_seqlens=PACKED)
    assert_matches_loop(kernel, loop, operands, torch.float32)


@pytest.mark.parametrize("K", [2, pytest.param(33, marks=pytest.mark.slow)])
def test_riccati_of_huge_evidence(K):
    """Also with more keys than a tile."""
    operands = riccati_operands(1, 66, 1, K, gate="head", strong=True)
    operands["u"] *= torch.where(operands["u"] < 0.5, 0, 1e4)
    operands["c"] *= 1e3
    assert_matches_loop(riccati, riccati_loop, operands, torch.float32)


def test_riccati_keeps_zero():
    operands = riccati_operands(1, 70, 1, 2, gate="key", state=False)
    operands["u"][:, :66] = 0
    z, _ = riccati(**{name: x if x is None else x.float() for name, x in operands.items()})
    assert (z[:, :66] == 0).all()
    assert (z[:, 66:] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "key"])
def test_many_chunks_of_riccati(gate):
    operands = riccati_operands(1, 64 * 33 + 5, 1, 3, gate=gate)
    given = {name: x.float() for name, x in operands.items()}
    truth = riccati_loop(**{name: x.double() for name, x in given.items()})
    for x, y in zip(riccati(**given), truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


def test_no_tokens():
    given = {
        linear: make_operands("qkw", 2, 0, ONE, 16, 16, gate="key"),
        delta: make_operands("qekw", 2, 0, ONE, 16, 16, gate="key"),
        importance: make_operands("kb", 2, 0, ONE, 16, 16, gate="key"),
        riccati: riccati_operands(2, 0, 1, 16),
    }
    for function, operands in given.items():
        operands = {name: x.float().requires_grad_() for name, x in operands.items()}
        o, final = function(**operands)
        assert o.shape[:2] == (2, 0)
        assert torch.equal(final, operands["initial_state"])
        (gradient,) = torch.autograd.grad(2 * final.sum(), operands["initial_state"])
        assert (gradient == 2).all()
