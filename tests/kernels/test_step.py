"""Decode steps: one token, equal to the recurrence."""

import pytest
import torch
from budget import assert_within_budget, witnesses
from kernel_cases import (
    decay,
    delta_loop,
    importance_loop,
    in_dtype,
    linear_loop,
    make_gate,
    make_operands,
    per_head,
)

from glazoo.kernels import (
    delta,
    delta_step,
    importance,
    importance_step,
    linear,
    linear_step,
    posterior_step,
)

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


RULES = [
    pytest.param({"correction": "none"}, id="none"),
    pytest.param({"correction": "none", "read": "pre"}, id="none-pre"),
    pytest.param({"correction": "full"}, id="full"),
    pytest.param({"correction": "full", "base": "prev"}, id="full-prev"),
    pytest.param({"correction": "full", "own": True}, id="full-own"),
    pytest.param({"correction": "full", "gain": "exact"}, id="full-exact"),
    pytest.param({"correction": "full", "gain": "exact_rate"}, id="full-exact-rate"),
    pytest.param({"correction": "diagonal", "gain": "exact"}, id="diagonal-exact"),
]


def posterior_loop(
    q, k, v, beta, b, g, e, prior, memory, importance, *, correction, gain="first_order",
    read="post", base="decayed", own=False
):  # fmt: skip
    """Predict, observe, correct and read of one token: output, memory, J, uncertainty."""
    HV = v.shape[2]
    q, k = per_head(q, HV), per_head(k, HV)
    e = k if e is None else per_head(e, HV)
    results = []
    for i in range(v.shape[0]):
        query, key, erase = (x[i, 0][..., None] for x in (q, k, e))
        value, rate = v[i, 0][:, None], v.new_ones(HV, 1, 1)
        if beta is not None:
            rate = beta[i, 0].reshape(HV, 1, -1)
        floor = prior.reshape(HV, -1, 1)
        mean, old = (
            (v.new_zeros(HV, k.shape[3], v.shape[3]), v.new_zeros(HV, k.shape[3], 1))
            if memory is None
            else (memory[i], importance[i][..., None])
        )
        a = decay(g, i, 0, mean)
        new = a * old + b[i, 0][:, None, None] * key**2
        seen = old if read == "pre" else new
        unsure = (query**2 / (seen + floor)).sum((1, 2))
        if correction == "none":
            after = a * mean + key * rate * value
            y = ((mean if read == "pre" else after) / (seen + floor) * query).sum(1)
        else:
            decayed = a * (old + floor) / (a * old + floor) * mean
            x = mean if base == "prev" else decayed
            exact = rate * key / (a * old + floor)
            found = (exact * key).sum(1, keepdim=True)
            if gain == "exact_rate":
                known = rate * key.square().sum(1, keepdim=True)
                exact = exact / torch.where(known < 1, 1 - known + found, found / known)
            else:
                exact = exact / (1 + found)
            if correction == "diagonal":
                after = decayed * (1 - key * exact) + exact * value
            elif gain != "first_order":
                after = decayed + exact * (value - (decayed * key).sum(1, keepdim=True))
            else:
                removed = (x * erase).sum(1, keepdim=True) * (1 if own else rate)
                after = decayed + key / (new + floor) * (rate * value - removed)
            y = (after * query).sum(1)
        results.append((y[None], after, new[..., 0], unsure[None]))
    return [torch.stack(x) for x in zip(*results, strict=True)]


def posterior_operands(gate, rule, K, V, shape="head", state=True, seed=0):
    """Operands of posterior_step in float64, in the order of its loop; about one b in four is 0."""
    torch.manual_seed(seed)
    B, H, HV = 2, 2, 4

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64)

    def positive(*size):
        return torch.rand(*size, dtype=torch.float64)

    b = positive(B, 1, HV)
    return {
        "q": normal(B, 1, H, K),
        "k": normal(B, 1, H, K) * K**-0.5,
        "v": normal(B, 1, HV, V),
        "beta": {"none": None, "head": positive(B, 1, HV), "value": positive(B, 1, HV, V)}[shape],
        "b": b.masked_fill(positive(B, 1, HV) < 0.25, 0),
        "g": make_gate(gate, (B, 1, HV, K), True, False),
        "e": normal(B, 1, HV, K) * K**-0.5 if rule.get("own") else None,
        "prior": 0.1 + positive(HV, *(() if gate == "head" else (K,))),
        "memory": normal(B, HV, K, V) if state else None,
        "importance": positive(B, HV, K) if state else None,
    }


def run_posterior_step(operands, **options):
    rest = dict(operands)
    state = rest.pop("memory"), rest.pop("importance")
    start = None if state[0] is None else state
    o, new, u = posterior_step(**rest, initial_state=start, uncertainty=True, **options)
    return [o, *new, u]


def assert_posterior_step(operands, dtype, rule):
    wide = ("beta", "b", "g", "prior", "memory", "importance")
    given = {
        name: None if x is None else x.to(torch.float32 if name in wide else dtype)
        for name, x in operands.items()
    }
    exact = [None if x is None else x.double() for x in given.values()]
    truth = posterior_loop(*exact, **rule)
    seen = witnesses(lambda *xs: posterior_loop(*xs, **rule), exact)
    before = {name: None if x is None else x.clone() for name, x in given.items()}
    found = run_posterior_step(given, **rule)
    for name, x in before.items():
        assert x is None or torch.equal(x, given[name]), name
    assert [x.dtype for x in found] == [dtype, *[torch.float32] * 3]
    for i, name in enumerate(("output", "memory", "importance", "uncertainty")):
        # Whatever the tokens' dtype, arithmetic and states are float32.
        assert_within_budget(
            found[i], truth[i], torch.float32, witness=[run[i] for run in seen], name=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize("rule", RULES)
def test_posterior_step(rule, gate, dtype):
    # 130 values of 30 keys are more than one program's.
    assert_posterior_step(posterior_operands(gate, rule, 30, 130), dtype, rule)


@pytest.mark.parametrize("shape", ["none", "value"])
@pytest.mark.parametrize("rule", [{"correction": "none"}, {"correction": "full", "own": True}])
def test_posterior_step_without_a_state(rule, shape):
    operands = posterior_operands("head", rule, 1, 5, shape, state=False)
    assert_posterior_step(operands, torch.float32, rule)


@pytest.mark.parametrize("g", [0.0, -torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_posterior_step_keeps_all_or_nothing(rule, g):
    """A decay of one without evidence leaves the importance as it is, a decay of zero resets it."""
    operands = posterior_operands("head", rule, 7, 9)
    operands["g"] = torch.full_like(operands["g"], g)
    operands["b"] = torch.zeros_like(operands["b"])
    assert_posterior_step(operands, torch.float32, rule)
    given = {name: None if x is None else x.float() for name, x in operands.items()}
    _, memory, importance, _ = run_posterior_step(given, **rule)
    assert torch.equal(importance, given["importance"] * (g == 0))
    given["v"], given["k"] = torch.zeros_like(given["v"]), torch.zeros_like(given["k"])
    _, memory, _, _ = run_posterior_step(given, **rule)
    if rule["correction"] != "none" and g == 0:
        assert_within_budget(memory, operands["memory"], witness=[])
    else:
        assert torch.equal(memory, given["memory"] * (g == 0))


@pytest.mark.parametrize("uncertainty", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_opcheck_posterior_step(state, uncertainty):
    given = posterior_operands("key", {"own": True}, 5, 6, state=state)
    tensors = {name: None if x is None else x.float() for name, x in given.items()}
    names = ("q", "k", "e", "v", "beta", "b", "g", "prior", "memory", "importance")
    flags = ("full", "first_order", "post", "decayed", True, uncertainty)
    torch.library.opcheck(
        torch.ops.glazoo.posterior_step.default,
        (*(tensors[name] for name in names), *flags),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compile_a_posterior_step_as_one_graph():
    given = posterior_operands("head", {}, 5, 6)
    given = {name: None if x is None else x.float() for name, x in given.items()}

    def step(**operands):
        return run_posterior_step(operands, correction="full")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for x, y in zip(step(**given), compiled(**given), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"correction": "half"}, {}, "correction: got 'half'"),
        ({"correction": "none", "gain": "exact"}, {}, "gain: got 'exact' with correction 'none'"),
        ({"correction": "diagonal"}, {}, "accepted with it is 'exact'"),
        ({"correction": "full", "read": "pre"}, {}, "read: got 'pre' with correction 'full'"),
        ({}, {"b": lambda x: x[..., None]}, r"b: got shape \(2, 1, 4, 1\)"),
        ({}, {"b": lambda x: x[:, :, :2]}, r"b: got shape \(2, 1, 2\)"),
        ({}, {"prior": lambda x: x[:2]}, r"prior: got shape \(2,\)"),
        ({}, {"v": lambda x: x.expand(2, 2, 4, 6)}, "a step takes one token"),
        ({"gain": "exact", "correction": "full"},
         {"beta": lambda x: x[..., None].expand(2, 1, 4, 6)}, "beta: got shape"),
        ({}, {"importance": lambda x: x[:, :1]}, "initial_state: got shape"),
    ],
)  # fmt: skip
def test_misuse_of_a_posterior_step_is_named(options, change, message):
    given = posterior_operands("head", {}, 5, 6)
    given = {
        name: None if x is None else change.get(name, lambda x: x)(x.float())
        for name, x in given.items()
    }
    with pytest.raises(ValueError, match=message):
        run_posterior_step(given, **options)
