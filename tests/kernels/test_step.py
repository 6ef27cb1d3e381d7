"""Decode steps: one token, in place, equal to the recurrence."""

import pytest
import torch
from budget import assert_within_budget, witnesses
from kernel_cases import delta_loop, importance_loop, in_dtype, linear_loop, make_operands

from glazoo.kernels import delta, delta_step, importance, importance_step, linear, linear_step

pytestmark = pytest.mark.usefixtures("poison")
HEADS = {"q": 4, "e": 2, "k": 2, "w": 4}
CASES = [
    pytest.param(linear, linear_step, linear_loop, "qkw", {"read": "post"}, id="linear-post"),
    pytest.param(linear, linear_step, linear_loop, "qkw", {"read": "pre"}, id="linear-pre"),
    pytest.param(delta, delta_step, delta_loop, "qekw", {"base": "decayed"}, id="delta-decayed"),
    pytest.param(delta, delta_step, delta_loop, "qekw", {"base": "prev"}, id="delta-prev"),
    pytest.param(importance, importance_step, importance_loop, "kb", {}, id="importance"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize(("whole", "step", "loop", "names", "options"), CASES)
def test_step(whole, step, loop, names, options, gate, dtype):
    operands = in_dtype(make_operands(names, 2, 1, HEADS, 24, 40, gate=gate, resets=True), dtype)
    exact = [None if x is None else x.double() for x in operands.values()]
    truth = loop(*exact, **options)
    seen = witnesses(lambda *xs: loop(*xs, **options), exact)

    state = operands.pop("initial_state")
    before = state.clone()
    # A call without gradients is a step on a copy of the state.
    found = whole(**operands, initial_state=state, **options)
    assert torch.equal(state, before)
    o = step(**operands, state=state, **options)
    assert torch.equal(o, found[0])
    assert torch.equal(state, found[1])
    for i, x in enumerate((o, state)):
        assert_within_budget(x, truth[i], witness=[run[i] for run in seen], name=("o", "state")[i])


def test_a_step_with_gradients_is_differentiated():
    operands = in_dtype(make_operands("qkw", 1, 1, HEADS, 16, 16), torch.float32)
    operands["k"].requires_grad_()
    o, _ = linear(**operands)
    assert torch.autograd.grad(o.sum(), operands["k"])[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.double(), "state: got torch.float64"),
        (lambda s: s.mT.contiguous().mT, "contiguous False"),
        (lambda s: s[:, :1], r"updates contiguous float32 \(1, 4, 16, 20\)"),
    ],
)
def test_a_state_that_cannot_be_updated_is_refused(change, message):
    operands = in_dtype(make_operands("qkw", 1, 1, HEADS, 16, 20), torch.float32)
    state = change(operands.pop("initial_state"))
    with pytest.raises(ValueError, match=message):
        linear_step(**operands, state=state)
