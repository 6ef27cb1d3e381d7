"""Derivatives that the kernels have no pass for: in forward mode, and of derivatives."""

import pytest
import torch
from budget import assert_within_budget, witnesses
from kernel_cases import symmetric
from kernel_classes import CLASSES, Place

from glazoo.kernels import (
    delta_step,
    importance_step,
    linear_step,
    posterior_step,
    synapse_delta_step,
    synapse_step,
)

# PyTorch's own forward mode compiles a few rules with torch.jit.script, which it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def tangents(function, names, operands):
    """Of every result along one direction of the operands."""
    generator = torch.Generator().manual_seed(1)
    along = tuple(torch.randn(x.shape, generator=generator).to(x.dtype) for x in operands)

    def of(*xs):
        return tuple(function(**dict(zip(names, xs, strict=True))))

    return list(torch.func.jvp(of, tuple(operands), along)[1])


def gradient(function):
    """The function's gradient, in reverse mode, of a loss that is not linear in its results."""

    def of(**operands):
        def loss(x):
            return sum(y.pow(3).sum() for y in function(**x))

        return [*torch.func.grad(loss)(operands).values()]

    return of


@pytest.mark.parametrize(
    ("name", "derive", "tokens"),
    [
        *((name, lambda f: f, tokens) for name in CLASSES for tokens in (1, 3)),
        ("delta", gradient, 3),
        *(pytest.param(x, gradient, 3, marks=pytest.mark.slow) for x in CLASSES if x != "delta"),
    ],
)
def test_in_forward_mode(name, derive, tokens):
    of = CLASSES[name]
    at = Place("cpu", torch.float32, tokens, 3, 2)
    operands = {c: x for c, x in of["operands"](at, "head").items() if x is not None}
    exact = [x.float().double() for x in operands.values()]

    def run(function, xs):
        # Only as a symmetric function of the matrix does its gradient mean one thing.
        derived = derive(symmetric(function) if name == "solve" else function)
        return tangents(derived, list(operands), list(xs))

    truth = run(of["truth"], exact)
    found = run(of["call"], [x.float() for x in exact])
    seen = witnesses(lambda *xs: run(of["truth"], xs), exact)
    assert any(bool(x.any()) for x in truth)
    for i, x in enumerate(found):
        assert_within_budget(x, truth[i], witness=[y[i] for y in seen], name=f"tangent {i}")


@pytest.mark.parametrize(
    ("step", "names", "states"),
    [
        (linear_step, "qkw", 1),
        (delta_step, "qekw", 1),
        (importance_step, "kb", 1),
        (synapse_step, "qkwb", 2),
        (synapse_delta_step, ["q", "k", "v", "beta", "b"], 2),
        (posterior_step, ["q", "k", "v", "beta", "b"], 0),
    ],
)
def test_a_step_refuses_tangents(step, names, states):
    gates = ("beta", "b") if step is not synapse_step else ()
    given = {x: torch.rand(1, 1, 2, *([] if x in gates else [4])) for x in names}
    state = torch.zeros(1, 2, 4, *([] if step is importance_step else [4]))
    if states:
        given["state"] = state if states == 1 else (state, state.clone())
    if step in (synapse_step, synapse_delta_step, posterior_step):
        given["prior"] = torch.ones(2, 4)
    k = given.pop("k")
    with pytest.raises(NotImplementedError, match="an operand carries a tangent"):
        torch.func.jvp(lambda k: step(**given, k=k), (k,), (k,))
    assert not state.any()
