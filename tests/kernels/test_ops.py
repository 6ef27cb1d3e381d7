"""Registrations with torch, and the errors of the public functions."""

import pytest
import torch
from kernel_cases import in_dtype, make_operands, riccati_operands
from whiten_cases import operands as whiten_operands
from whiten_cases import whitened_linear_operands

from glazoo.kernels import (
    delta,
    delta_step,
    importance,
    importance_step,
    linear,
    linear_step,
    riccati,
)

ONE = {"q": 1, "e": 1, "k": 1, "w": 2}
OPTION = {"linear": ["post", 0.5], "delta": ["decayed", 0.5], "importance": [], "riccati": []}
NAMES = [("linear", "qkw"), ("delta", "qekw"), ("importance", "kb")]


def operands(names, gate="head", T=5, dtype=torch.float32, **options):
    if names == "acdu":
        return in_dtype(riccati_operands(1, T, 1, 2, gate=gate, **options), dtype)
    K = 3 if "b" in names else 16
    return in_dtype(make_operands(names, 1, T, ONE, K, 16, gate=gate, **options), dtype)


@pytest.mark.parametrize(
    ("name", "names", "gate", "packed"),
    [
        pytest.param(
            *x,
            gate,
            packed,
            marks=[pytest.mark.slow] * (gate == "key" or (gate == "none" and x != NAMES[0])),
        )
        for x in NAMES
        for gate, packed in [("none", False), ("head", True), ("key", True)]
    ],
)
def test_opcheck(name, names, gate, packed):
    given = operands(names, gate, T=3, sequences=3 if packed else None)
    given = [None if x is None else x.requires_grad_() for x in given.values()]
    cu_seqlens = torch.tensor([0, 2, 2, 3]) if packed else None
    given += [cu_seqlens, *OPTION[name], False]
    torch.library.opcheck(getattr(torch.ops.glazoo, name).default, tuple(given))


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck_riccati(packed):
    test_opcheck("riccati", "acdu", "head", packed)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck_whiten(own, packed):
    given = in_dtype(
        whiten_operands(1, 3, 1, 2, 3, "key", sequences=3 if packed else None, own=own),
        torch.float32,
    )
    given = [None if x is None else x.requires_grad_() for x in given.values()]
    ends = torch.tensor([0, 2, 2, 3]) if packed else None
    given += [ends, "found", True, True, not own, False]
    torch.library.opcheck(torch.ops.glazoo.whiten.default, tuple(given))


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck_whitened_linear(packed):
    given = whitened_linear_operands(
        1, 3, 1, 2, 16, 16, gate="key", sequences=3 if packed else None
    )
    names = ("q", "k", "w", "b", "g", "beta", "prior", "h", "j")
    given = [given[x].float().requires_grad_() for x in names]
    ends = torch.tensor([0, 2, 2, 3]) if packed else None
    given += [ends, "post", 0.5, packed, False]
    torch.library.opcheck(torch.ops.glazoo.whitened_linear.default, tuple(given))


@pytest.mark.parametrize(("name", "names"), NAMES)
def test_opcheck_step(name, names):
    given = [*operands(names, T=1).values(), None, *OPTION[name]]
    # Steps update a state: they have no gradients to check.
    torch.library.opcheck(
        getattr(torch.ops.glazoo, f"{name}_step").default,
        tuple(given),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    ("function", "names"),
    [
        pytest.param(linear, "qkw", marks=pytest.mark.slow),
        (delta, "qekw"),
        pytest.param(importance, "kb", marks=pytest.mark.slow),
        (riccati, "acdu"),
    ],
)
def test_compile_as_one_graph(function, names):
    compiled = torch.compile(
        lambda **x: function(**x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for T in (5, 7):
        given = {k: x.requires_grad_() for k, x in operands(names, T=T).items()}
        results = []
        for run in (function, compiled):
            o, final = run(**given)
            results.append(
                [o, final, *torch.autograd.grad(o.sum() + final.sum(), [*given.values()])]
            )
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("function", "names"), [(linear_step, "qkw"), (delta_step, "qekw"), (importance_step, "kb")]
)
def test_compile_a_step_as_one_graph(function, names):
    given = operands(names, T=1)
    state = given.pop("initial_state")
    other = state.clone()
    compiled = torch.compile(lambda **x: function(**x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(function(**given, state=state), compiled(**given, state=other))
    assert torch.equal(state, other)


def bad(names="qkw", **changes):
    given = operands(names)
    return {name: changes[name](x) if name in changes else x for name, x in given.items()}


@pytest.mark.parametrize(
    ("function", "given", "options", "message"),
    [
        (linear, bad(q=lambda x: x[:, :3]), {}, r"q: got shape \(1, 3, 1, 16\)"),
        (linear, bad(k=lambda x: x.repeat(1, 1, 3, 1)), {}, "H a divisor of 2"),
        (linear, bad(w=lambda x: x[0]), {}, r"expected \[B, T, HV, V\]"),
        (linear, bad(g=lambda x: x[..., None]), {}, "g: got shape"),
        (linear, bad(initial_state=lambda x: x[0]), {}, "initial_state: got shape"),
        (linear, bad(beta=lambda x: x[..., None]), {}, r"beta: got shape \(1, 5, 2, 1\); expected"),
        (delta, bad("qekw", erase=lambda x: x[:, :3]), {}, r"erase: got shape \(1, 3, 2\)"),
        (linear, bad(), {"read": "late"}, "read: got 'late'"),
        (
            linear,
            bad(),
            {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
            "cu_seqlens: got torch.int32",
        ),
        (delta, bad("qekw"), {"base": "next"}, "base: got 'next'"),
        (delta, bad("qekw", e=lambda x: x[..., :8]), {}, "e: got shape"),
        (importance, bad("kb", b=lambda x: x[..., None]), {}, "b: got shape"),
        (
            riccati,
            bad("acdu", c=lambda x: x.new_ones(1, 5, 1, 3)),
            {},
            r"c: got shape \(1, 5, 1, 3\)",
        ),
    ],
)
def test_misuse_is_named(function, given, options, message):
    with pytest.raises(ValueError, match=message):
        function(**given, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_refused_dtypes(dtype):
    given = operands("qkw")
    given["w"] = given["w"].to(dtype)
    with pytest.raises(TypeError, match="accept float32, float16 and bfloat16"):
        linear(**given)
