"""Keys over an importance and how a memory is forgotten, against float64 loops per token."""

import functools

import pytest
import torch
from budget import assert_within_budget
from kernel_classes import CLASSES, Place
from whiten_cases import compare, operands, whiten_loop, whitened_linear_operands

from glazoo.kernels import whiten, whitened_linear

pytestmark = pytest.mark.usefixtures("poison")
PACKED = torch.tensor([0, 0, 33, 33, 40, 40])


ATS = ("written", "found", "previous")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("at", ATS)
@pytest.mark.parametrize("gate", ["none", "head", "key"])
def test_keys_and_forgetting(at, gate, own):
    compare(operands(1, 10, 1, 2, 5, gate, own=own), at=at)


@pytest.mark.parametrize("at", ATS)
def test_across_chunks(at):
    """Strong decays, no states before, and two heads of queries for as many values."""
    compare(operands(1, 70, 2, 2, 3, "key", strong=True, state=False), at=at)


@pytest.mark.parametrize("gate", ["head", "key"])
@pytest.mark.parametrize("at", ATS)
def test_packed(at, gate):
    given = operands(1, 40, 1, 2, 5, gate, sequences=5)
    compare(given, at=at, cu_seqlens=PACKED)


@pytest.mark.parametrize("at", ATS)
def test_half_precision(at):
    compare(operands(1, 10, 1, 1, 16, "key"), torch.float16, at=at)


@pytest.mark.parametrize("T", [1, 4, 64, 65])
def test_lengths(T):
    compare(operands(2, T, 1, 1, 2, "head"), at="found")


def test_no_tokens():
    given = operands(2, 0, 1, 2, 4, "key")
    given = {name: x.float().requires_grad_() for name, x in given.items()}
    scaled, final, *others = whiten(**given, forgets=True, sums=True, keeps=True)
    assert scaled.shape == (2, 0, 2, 4)
    assert [x.shape[:2] for x in others] == [(2, 0)] * 4
    assert torch.equal(final, given["initial_state"])
    (gradient,) = torch.autograd.grad(2 * final.sum(), given["initial_state"])
    assert (gradient == 2).all()


def test_a_reset_forgets_all():
    given = operands(1, 40, 1, 1, 8, "head", resets=True)
    given = {name: x.float().requires_grad_() for name, x in given.items()}
    scaled, _, f, *_ = whiten(**given, at="found", forgets=True)
    reset = torch.isinf(given["g"])
    assert reset.any()
    assert (f[reset] == -torch.inf).all()
    # Nothing that the memory kept has a gradient.
    weight = torch.where(torch.isinf(f), 0.0, 1.0).detach()
    grads = torch.autograd.grad(
        [scaled, f], [given["g"], given["k"]], [torch.ones_like(scaled), weight]
    )
    assert all(torch.isfinite(x).all() for x in grads)
    assert (grads[0][reset] == 0).all()


@pytest.mark.parametrize("gate", ["none", "head"])
def test_importance_one_leaves_keys_as_they_are(gate):
    given = operands(1, 20, 1, 1, 16, gate, state=False, resets=False)
    given["b"], given["prior"] = torch.zeros_like(given["b"]), torch.ones_like(given["prior"])
    given = {name: x if x is None else x.float() for name, x in given.items()}
    for at in ATS:
        scaled, final, f, reached, square, _ = whiten(
            **given, at=at, forgets=gate != "none", sums=True
        )
        assert torch.equal(scaled, given["x"])
        assert torch.equal(reached, square)
        assert (final == 0).all()
        if f is not None:
            assert torch.equal(f, given["g"][..., None].expand(f.shape))


@pytest.mark.parametrize("heads", [(1, 1), (1, 2)])
@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize("options", [{"read": "post"}, {"read": "pre", "keeps": True}], ids=str)
def test_a_memory_that_a_query_over_the_importance_reads(options, gate, heads):
    of = CLASSES["whitened_linear"]
    at = Place("cpu", torch.float32, 20, 5, 8)
    given = whitened_linear_operands(1, at.T, *heads, at.K, at.V, gate=gate)
    of["compare"](given, at, options, options)


def test_a_memory_of_packed_sequences():
    at = Place("cpu", torch.float16, 40, 5, 8)
    given = whitened_linear_operands(1, 40, 1, 2, 5, 8, gate="key", sequences=5)
    options = {"cu_seqlens": PACKED}
    CLASSES["whitened_linear"]["compare"](given, at, options, options)


def test_shapes_of_a_memory_that_do_not_fit_are_named():
    given = whitened_linear_operands(1, 4, 1, 2, 8, 8, gate="head")
    given = {c: x.float() for c, x in given.items() if c not in "hj"}
    with pytest.raises(ValueError, match=r"b: got shape \(1, 4, 1\)"):
        whitened_linear(**given | {"b": given["b"][..., :1]})
    with pytest.raises(ValueError, match="read: got 'now'"):
        whitened_linear(**given, read="now")


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_forward_mode_and_derivatives_of_derivatives():
    given = operands(1, 4, 1, 1, 3, "head", resets=False)
    names = list(given)
    xs = tuple(x.float() for x in given.values())
    along = tuple(torch.randn_like(x) for x in xs)

    def loss(function, *values):
        options = {"at": "written", "forgets": True, "sums": True, "keeps": True}
        return sum(
            y.pow(2).sum() for y in function(**dict(zip(names, values, strict=True)), **options)
        )

    def tangent(function, values, tangents):
        gradient = torch.func.grad(functools.partial(loss, function), tuple(range(len(names))))
        return torch.func.jvp(gradient, values, tangents)[1]

    found = tangent(whiten, xs, along)
    exact = [tuple(x.double() for x in y) for y in (xs, along)]
    truth = tangent(whiten_loop, *exact)
    witness = tangent(whiten_loop, xs, along)
    for x, y, z, name in zip(found, truth, witness, names, strict=True):
        assert_within_budget(x, y, witness=[z], name=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": "lost"}, "at: got 'lost'"),
        ({"g": None, "forgets": True}, "forgets: got True without g"),
        ({"prior": torch.ones(3)}, r"prior: got shape \(3,\)"),
        ({"b": torch.ones(1, 4)}, r"b: got shape \(1, 4\)"),
        ({"x": torch.ones(1, 4, 1, 7)}, r"x: got shape \(1, 4, 1, 7\)"),
    ],
)
def test_misuse_is_named(changes, message):
    given = {name: x.float() for name, x in operands(1, 4, 1, 2, 8, "head").items()}
    with pytest.raises(ValueError, match=message):
        whiten(**(given | changes))
