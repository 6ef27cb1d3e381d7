"""Delta rules with an importance per synapse, in the interpreter, against float64 loops per
token."""

import functools
import sys

import pytest
import torch
from synapse_cases import (
    assert_matches,
    synapse_delta_loop,
    synapse_delta_operands,
    values_and_gradients,
)

from glazoo.kernels.synapse_delta import synapse_delta, synapse_delta_step

# The package's attribute of that name is the function.
module = sys.modules["glazoo.kernels.synapse_delta"]

pytestmark = pytest.mark.usefixtures("poison")
RULES = (
    ("first_order", "full"),
    ("exact", "full"),
    ("exact", "diagonal"),
    ("exact_rate", "full"),
)
PACKED = torch.tensor([0, 0, 7, 7, 8, 13, 13])


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Several pieces in short sequences."""
    monkeypatch.setattr(module, "PIECE", 4)


def run(
    q, k, v, prior, beta=None, b=None, g=None, e=None, evidence=None, h=None, j=None, **options
):
    state = None if h is None else (h, j)
    o, (h, j), u = synapse_delta(
        q, k, v, beta, b, g, e=e, evidence=evidence, prior=prior, initial_state=state, **options
    )
    found = {"output": o, "final mu": h, "final J": j}
    return found if u is None else found | {"uncertainty": u}


def check(operands, dtype=torch.float32, **options):
    kernel, loop = (functools.partial(x, **options) for x in (run, synapse_delta_loop))
    assert_matches(kernel, loop, operands, dtype)


@pytest.mark.parametrize(
    ("gain", "correction", "frozen"),
    [
        # Frozen is one path for every rule; `test_every_combination` has them all.
        pytest.param(*rule, frozen, marks=[pytest.mark.slow] * (frozen and rule != RULES[0]))
        for rule in RULES
        for frozen in (False, True)
    ],
)
def test_matches_the_loop(gain, correction, frozen):
    operands = synapse_delta_operands(2, 10, 1, 2, 5, 3, gate="key", resets=True, frozen=frozen)
    if frozen:
        operands["j"] = operands["h"] = None
    check(operands, gain=gain, correction=correction)


@pytest.mark.parametrize("base", ["decayed", "prev"])
@pytest.mark.parametrize("gain", ["first_order", "exact", "exact_rate"])
def test_keys_of_its_own(gain, base):
    operands = synapse_delta_operands(1, 9, 1, 1, 5, 4, gate="head", own_keys=True)
    check(operands, gain=gain, base=base, uncertainty=True)


@pytest.mark.parametrize(("gain", "correction"), RULES)
def test_packed(gain, correction):
    operands = synapse_delta_operands(1, 13, 1, 2, 3, 4, gate="none", sequences=6)
    check(operands, gain=gain, correction=correction, cu_seqlens=PACKED)


@pytest.mark.parametrize("length", [0.5, 1.8])
def test_a_rate_below_and_beyond_one(length):
    """The gain is another function of the write gate on either side of beta |k|^2 = 1."""
    operands = synapse_delta_operands(1, 9, 1, 2, 5, 3, gate="head")
    operands["k"] = torch.nn.functional.normalize(operands["k"], dim=-1) * length
    operands["beta"] = 0.4 + 0.1 * operands["beta"]
    assert bool((operands["beta"] * length**2 > 1).all()) == (length > 1)
    check(operands, gain="exact_rate", uncertainty=True)


def test_without_importance_a_rate_is_the_delta_rule_bit_for_bit():
    operands = synapse_delta_operands(1, 9, 1, 2, 5, 3, gate="key", state=False)
    given = {k: None if x is None else x.float() for k, x in operands.items()}
    given["k"] = 1.5 * given["k"]
    given["prior"] = torch.ones_like(given["prior"])
    given["b"] = torch.zeros_like(given["b"])
    found = run(**given, gain="exact_rate")
    source = run(**given | {"b": None}, gain="first_order")
    for name in ("output", "final mu"):
        assert torch.equal(found[name], source[name]), name


def test_half_precision():
    check(synapse_delta_operands(1, 10, 1, 1, 8, 8), torch.float16)


@pytest.mark.parametrize(("K", "V"), [(33, 40), (7, 65)])
def test_sizes(K, V):
    check(synapse_delta_operands(1, 3, 1, 1, K, V, state=False))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["metaplastic", "frozen"])
@pytest.mark.parametrize("base", ["decayed", "prev"])
@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize(("gain", "correction"), RULES)
def test_every_combination(gain, correction, gate, base, frozen):
    operands = synapse_delta_operands(
        2, 14, 1, 2, 20, 35, gate=gate, frozen=frozen, own_keys=True, resets=gate != "none"
    )
    check(operands, gain=gain, correction=correction, base=base, uncertainty=True)


@pytest.mark.parametrize("beta", ["none", "head", "value"])
def test_shapes_of_the_write_gate(beta):
    operands = synapse_delta_operands(1, 5, 1, 2, 4, 3)
    whole = operands["beta"][..., :1].expand(-1, -1, -1, 3)
    given = {k: None if x is None else x.float() for k, x in operands.items()}
    expected = whole.float()
    given["b"] = given["b"][..., :1]
    if beta == "none":
        expected, given["beta"] = torch.ones_like(expected), None
    elif beta == "head":
        given["beta"] = expected[..., 0]
    else:
        given["beta"] = expected
    found = run(**given)
    wide = given | {"beta": expected, "b": given["b"].expand(1, 5, 2, 3)}
    for name, x in run(**wide).items():
        assert torch.equal(x, found[name]), name


@pytest.mark.parametrize("frozen", [False, True], ids=["metaplastic", "frozen"])
@pytest.mark.parametrize(("gain", "correction"), RULES)
def test_step(gain, correction, frozen):
    operands = synapse_delta_operands(2, 1, 1, 2, 17, 9, gate="key", frozen=frozen, own_keys=True)
    given = {k: None if x is None else x.float() for k, x in operands.items()}
    options = {"gain": gain, "correction": correction, "uncertainty": True}
    exact = {k: None if x is None else x.double() for k, x in given.items()}
    truth = synapse_delta_loop(**exact, **options)
    with torch.no_grad():
        found = run(**given, **options)
    h, j = given.pop("h"), given.pop("j")
    o, u = synapse_delta_step(**given, state=(h, j), **options)
    for name, x in {"output": o, "final mu": h, "final J": j, "uncertainty": u}.items():
        assert torch.equal(x, found[name]), name
        scale = float(truth[name].abs().max())
        assert (x - truth[name]).abs().max() <= 64 * torch.finfo(torch.float32).eps * scale


def test_no_token():
    operands = synapse_delta_operands(2, 0, 1, 1, 4, 3)
    given = {k: None if x is None else x.float() for k, x in operands.items()}
    found = run(**given)
    assert found["output"].shape == (2, 0, 1, 3)
    assert torch.equal(found["final mu"], given["h"])
    assert torch.equal(found["final J"], given["j"])


@pytest.mark.parametrize("frozen", [False, True], ids=["metaplastic", "frozen"])
def test_opcheck(frozen):
    operands = synapse_delta_operands(1, 2, 1, 2, 4, 3, own_keys=True, frozen=frozen)
    order = ("q", "k", "v", "beta", "b", "g", "e", "evidence", "prior", "h", "j")
    given = [None if operands[k] is None else operands[k].float() for k in order]
    given = [x if x is None else x.requires_grad_() for x in given]
    options = (None, "exact", "full", "decayed", True, False, False)
    torch.library.opcheck(torch.ops.glazoo.synapse_delta.default, (*given, *options))


def test_compile_as_one_graph():
    function = functools.partial(run, uncertainty=True)
    compiled = torch.compile(
        lambda **x: function(**x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    operands = synapse_delta_operands(1, 3, 1, 2, 4, 3, own_keys=True)
    given = {k: x.float() for k, x in operands.items()}
    expected, weights = values_and_gradients(function, given)
    found, _ = values_and_gradients(compiled, given, weights)
    for name, x in expected.items():
        torch.testing.assert_close(x, found[name])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"b": lambda x: x[..., :2]}, {}, r"b: got shape \(1, 5, 2, 2\)"),
        ({"beta": lambda x: x[:, :1]}, {}, r"beta: got shape \(1, 1, 2, 3\)"),
        ({"prior": lambda x: x[:1]}, {}, r"prior: got shape \(1, 4\)"),
        ({}, {"gain": "second_order"}, "gain: got 'second_order'"),
        ({}, {"base": "next"}, "base: got 'next'"),
        ({}, {"correction": "none"}, "correction: got 'none'"),
        ({}, {"correction": "diagonal"}, "with gain 'first_order'"),
        ({}, {"correction": "diagonal", "gain": "exact_rate"}, "with gain 'exact_rate'"),
    ],
)
def test_misuse_is_named(changes, options, message):
    operands = synapse_delta_operands(1, 5, 1, 2, 4, 3)
    given = {k: None if x is None else x.float() for k, x in operands.items()}
    given = {k: changes.get(k, lambda x: x)(x) for k, x in given.items()}
    with pytest.raises(ValueError, match=message):
        run(**given, **options)
