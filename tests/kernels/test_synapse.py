"""The kernels with an importance per synapse, in the interpreter, against float64 loops per
token."""

import functools
import sys

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import make_gate
from synapse_cases import assert_matches, synapse_loop, synapse_operands, values_and_gradients

from glazoo.kernels import synapse_kernels
from glazoo.kernels.synapse import synapse, synapse_step

# The package's attribute of that name is the function.
module = sys.modules["glazoo.kernels.synapse"]

pytestmark = pytest.mark.usefixtures("poison")
GATES = ("none", "head", "key")
DTYPES = (torch.float32, torch.float16)
PACKED = torch.tensor([0, 0, 17, 17, 18, 37, 37])


@pytest.fixture
def short_chunks(monkeypatch):
    """Many chunks and segments of few tokens, so that short sequences have borders of every
    kind."""
    monkeypatch.setattr(module, "BORDER", 32)
    monkeypatch.setattr(module, "BACKWARD_BORDER", 32)
    monkeypatch.setattr(module, "STATE_ROWS", 32)
    monkeypatch.setattr(module, "SCRATCH_FLOOR", 1)


def run(q, k, w, b, prior, g=None, h=None, j=None, **options):
    state = None if h is None else (h, j)
    o, (h, j), u = synapse(q, k, w, b, g, prior=prior, initial_state=state, **options)
    found = {"output": o, "final h": h, "final J": j}
    assert (u is None) is not options.get("uncertainty", False)
    return found if u is None else found | {"uncertainty": u}


def check(operands, dtype=torch.float32, **options):
    kernel, loop = functools.partial(run, **options), functools.partial(synapse_loop, **options)
    assert_matches(kernel, loop, operands, dtype)


@pytest.mark.parametrize("gate", GATES)
def test_matches_the_loop(gate):
    check(synapse_operands(1, 20, 1, 1, 16, 16, gate=gate))


def test_half_precision():
    check(synapse_operands(1, 37, 1, 1, 16, 16, gate="head"), torch.float16)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("read", ["post", "pre"])
@pytest.mark.parametrize("gate", ["head", "key"])
def test_resets_exactly(gate, read):
    check(synapse_operands(1, 49, 1, 1, 5, 7, gate=gate, resets=True), read=read)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("gate", "read"), [("none", "pre"), ("head", "post"), ("key", "pre")])
def test_packed_grouped_with_uncertainty(gate, read):
    operands = synapse_operands(1, 37, 1, 2, 3, 5, gate=gate, sequences=6)
    check(operands, read=read, uncertainty=True, cu_seqlens=PACKED)


@pytest.mark.usefixtures("short_chunks")
def test_batch_of_several_chunks():
    check(synapse_operands(2, 34, 1, 1, 18, 3, gate="key", state=False))


@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (3, 5, 40)])
def test_sizes(T, K, V):
    check(synapse_operands(1, T, 1, 1, K, V, gate="head"))


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", ["post", "pre"])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_every_combination(gate, uncertainty, read, dtype):
    operands = synapse_operands(2, 43, 1, 2, 20, 35, gate=gate, resets=gate != "none")
    check(operands, dtype, read=read, uncertainty=uncertainty)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "V"), [(128, 128), (96, 192), (256, 64)])
def test_large_heads(K, V):
    check(synapse_operands(1, 20, 1, 1, K, V, gate="key"))


def test_no_token():
    given = {k: x.float() for k, x in synapse_operands(2, 0, 1, 1, 4, 3).items()}
    found = run(**given, uncertainty=True)
    assert found["output"].shape == found["uncertainty"].shape == (2, 0, 1, 3)
    assert torch.equal(found["final h"], given["h"])
    assert torch.equal(found["final J"], given["j"])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_importance_of_any_size(scale):
    # The prior and what is added to it shrink and grow together.
    check(synapse_operands(1, 20, 1, 1, 8, 8, gate="head", scale=scale))


@triton.jit
def approximate_reciprocal(x, RECIP: tl.constexpr):
    """1 / x, one unit in the last place too large or too small, as bits of x have it."""
    bits = x.to(tl.int32, bitcast=True)
    wrong = (((bits >> 2) & 1) * 2 - 1).to(tl.float32)
    return (1.0 / x) * (1.0 + wrong * 1.1920928955078125e-07)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_approximate_reciprocal_stays_in_the_budget(scale, monkeypatch):
    """GPUs divide with an error of one unit in the last place; here every division has that
    error."""
    operands = synapse_operands(1, 37, 1, 1, 4, 8, gate="head", scale=scale)
    exact = run(**{k: x.float() for k, x in operands.items()})["output"]
    monkeypatch.setattr(synapse_kernels, "reciprocal", approximate_reciprocal)
    changed = run(**{k: x.float() for k, x in operands.items()})["output"]
    assert not torch.equal(exact, changed)
    check(operands, uncertainty=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("read", ["post", "pre"])
def test_step(gate, read):
    operands = synapse_operands(2, 1, 1, 2, 17, 9, gate=gate)
    given = {k: None if x is None else x.float() for k, x in operands.items()}
    exact = {k: None if x is None else x.double() for k, x in given.items()}
    truth = synapse_loop(**exact, read=read, uncertainty=True)
    with torch.no_grad():
        found = run(**given, read=read, uncertainty=True)
    assert found["final h"].data_ptr() != given["h"].data_ptr()
    h, j = given.pop("h"), given.pop("j")
    o, u = synapse_step(**given, state=(h, j), read=read, uncertainty=True)
    for name, x in {"output": o, "final h": h, "final J": j, "uncertainty": u}.items():
        assert torch.equal(x, found[name])
        scale = float(truth[name].abs().max())
        assert (x - truth[name]).abs().max() <= 17 * torch.finfo(torch.float32).eps * scale


def test_decoding_continues_a_prefix():
    operands = synapse_operands(1, 6, 1, 1, 8, 8, gate="head")
    given = {k: x.float() for k, x in operands.items()}
    with torch.no_grad():
        whole = run(**given)
        cut = {k: x if k in ("prior", "h", "j") else x[:, :5] for k, x in given.items()}
        first = run(**cut)
        last = {k: x if k == "prior" else x[:, 5:] for k, x in given.items() if k not in "hj"}
        then = run(**last, h=first["final h"], j=first["final J"])
    torch.testing.assert_close(then["output"], whole["output"][:, 5:])
    torch.testing.assert_close(then["final J"], whole["final J"])


def test_prior_of_a_head():
    operands = synapse_operands(1, 9, 1, 2, 4, 4)
    operands["prior"] = operands["prior"][:, 0]
    check(operands)


def arguments(**options):
    given = {k: x.float() for k, x in synapse_operands(1, 5, 1, 2, 4, 3, **options).items()}
    return given


def positional(given, cu_seqlens=None):
    order = ("q", "k", "w", "b", "g", "prior", "h", "j")
    return *(given[k] for k in order), cu_seqlens


@pytest.mark.parametrize("uncertainty", [pytest.param(False, marks=pytest.mark.slow), True])
def test_opcheck(uncertainty):
    given = {k: x.requires_grad_() for k, x in arguments(gate="key").items()}
    operator = torch.ops.glazoo.synapse.default
    torch.library.opcheck(operator, (*positional(given), "post", uncertainty, False, False))


def test_opcheck_step():
    operands = synapse_operands(1, 1, 1, 2, 4, 3)
    given = positional({k: x.float() for k, x in operands.items()})
    torch.library.opcheck(
        torch.ops.glazoo.synapse_step.default,
        (*given, "post", True, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compile_as_one_graph():
    function = functools.partial(run, uncertainty=True)
    compiled = torch.compile(
        lambda **x: function(**x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    given = arguments()
    expected, weights = values_and_gradients(function, given)
    found, _ = values_and_gradients(compiled, given, weights)
    for name, x in expected.items():
        assert torch.equal(x, found[name]), name


def test_neighbours_of_the_truth_are_refused():
    """The budget is tight enough to see a gate that is read one token late."""
    operands = synapse_operands(1, 20, 1, 1, 4, 4)

    def late(g, **x):
        return run(g=torch.roll(g, 1, 1), **x)

    with pytest.raises(AssertionError, match="times its budget"):
        assert_matches(late, synapse_loop, operands, torch.float32)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"b": lambda x: x[..., :1]}, {}, r"b: got shape \(1, 5, 2, 1\)"),
        ({"prior": lambda x: x[:1]}, {}, r"prior: got shape \(1, 4\)"),
        ({"j": lambda x: x[..., :1]}, {}, "initial_state: got shape"),
        ({"g": lambda x: x[..., None]}, {}, "g: got shape"),
        ({}, {"read": "late"}, "read: got 'late'"),
        ({}, {"reciprocal": "fast"}, "reciprocal: got 'fast'"),
    ],
)
def test_misuse_is_named(changes, options, message):
    given = {k: changes.get(k, lambda x: x)(x) for k, x in arguments().items()}
    with pytest.raises(ValueError, match=message):
        run(**given, **options)


def test_gates_below_the_smallest_number():
    """Two gates that each leave a little, and together nothing, differ from a reset by nothing."""
    operands = synapse_operands(1, 20, 1, 1, 4, 4)
    operands["g"] = make_gate("head", (1, 20, 1), False, False)
    operands["g"][:, 6:9] = -70.0
    check(operands)
