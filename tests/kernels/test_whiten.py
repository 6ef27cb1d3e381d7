"""Keys over an importance and how a memory is forgotten, against float64 loops per token."""

import functools

import pytest
import torch
from budget import assert_within_budget
from whiten_cases import compare, operands, whiten_loop

from glazoo.kernels import whiten

pytestmark = pytest.mark.usefixtures("poison")
PACKED = torch.tensor([0, 0, 33, 33, 40, 40])


@pytest.mark.parametrize("at", ["written", "found"])
@pytest.mark.parametrize("gate", ["head", "key"])
def test_keys_and_forgetting(at, gate):
    given = operands(1, 40, 1, 2, 19, gate, resets=False)
    compare(given, at=at, forgets=True, sums=at == "found")


@pytest.mark.parametrize(("at", "gate"), [("written", "none"), ("found", "none"), ("found", "key")])
def test_keys_alone(at, gate):
    given = operands(2, 35, 2, 2, 8, gate, state=False, resets=False)
    compare(given, at=at, forgets=False, sums=True)


@pytest.mark.parametrize("gate", ["head", "key"])
def test_packed(gate):
    given = operands(1, 40, 1, 2, 5, gate, sequences=5, resets=False)
    compare(given, at="found", forgets=True, sums=True, cu_seqlens=PACKED)
    compare(given, at="written", forgets=True, sums=False, cu_seqlens=PACKED)


@pytest.mark.parametrize("at", ["written", pytest.param("found", marks=pytest.mark.slow)])
def test_half_precision(at):
    compare(operands(1, 40, 1, 1, 16, "key", resets=False), torch.float16, at=at, forgets=True,
            sums=True)  # fmt: skip


def test_a_reset_forgets_all():
    given = operands(1, 40, 1, 1, 8, "head", resets=True)
    given = {name: x.float().requires_grad_() for name, x in given.items()}
    scaled, f, *_ = whiten(**given, at="found", forgets=True)
    reset = torch.isinf(given["g"])
    assert reset.any()
    assert (f[reset] == -torch.inf).all()
    # Nothing that the memory kept has a gradient.
    weight = torch.where(torch.isinf(f), 0.0, 1.0).detach()
    grads = torch.autograd.grad(
        [scaled, f], [given["g"], given["j"]], [torch.ones_like(scaled), weight]
    )
    assert all(torch.isfinite(x).all() for x in grads)
    assert (grads[0][reset] == 0).all()


def test_importance_one_leaves_keys_as_they_are():
    given = operands(1, 20, 1, 1, 16, "head", state=False, resets=False)
    given["j"], given["prior"] = torch.zeros_like(given["j"]), torch.ones_like(given["prior"])
    given = {name: x if x is None else x.float() for name, x in given.items()}
    scaled, f, reached, square = whiten(**given, at="found", forgets=True, sums=True)
    assert torch.equal(scaled, given["x"])
    assert torch.equal(f, given["g"][..., None].expand(f.shape))
    assert torch.equal(reached, square)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_forward_mode_and_derivatives_of_derivatives():
    given = operands(1, 4, 1, 1, 3, "head", resets=False)
    names = list(given)
    xs = tuple(x.float() for x in given.values())
    along = tuple(torch.randn_like(x) for x in xs)

    def loss(function, *values):
        options = {"at": "written", "forgets": True, "sums": True}
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
        ({"j": torch.ones(1, 4, 2)}, r"j: got shape \(1, 4, 2\)"),
    ],
)
def test_misuse_is_named(changes, message):
    given = {name: x.float() for name, x in operands(1, 4, 1, 2, 8, "head").items()}
    with pytest.raises(ValueError, match=message):
        whiten(**(given | changes))
