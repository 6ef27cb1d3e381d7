"""The chunked core operations against per-token loops in float64: values and gradients."""

from types import ModuleType, SimpleNamespace

import chunked_cases
import pytest
import torch
from chunked_cases import (
    OPTIONS,
    Case,
    call,
    cases,
    compare,
    delta_at_once,
    each_core,
    make,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from glazoo.engines import chunked
from glazoo.kernels import loops

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@each_core()
@given(data=st.data())
@settings(max_examples=16)
def test_matches_the_loop(core: ModuleType, operation: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    case = data.draw(cases(operation)).cast(dtype)
    compare(with_gradients(core, case), loops, case, dtype)


@each_core()
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_lengths(core: ModuleType, operation: str, tokens: int) -> None:
    case = make(operation, batch=2, tokens=tokens, share=2, gate="head", states=2)
    compare(with_gradients(core, case), loops, case, torch.float64)


@each_core()
def test_many_rows_are_split_into_tiles(core: ModuleType, operation: str) -> None:
    """More rows than one tile holds, over batch and over heads."""
    for batch, heads, share in ((40, 1, 1), (2, 3, 16)):
        case = make(operation, batch=batch, heads=heads, share=share, tokens=9, states=batch)
        compare(with_gradients(core, case), loops, case, torch.float64)


@each_core()
@pytest.mark.parametrize("heads", [1, 3])
def test_many_values_are_split_into_blocks(core: ModuleType, operation: str, heads: int) -> None:
    """More values than one block holds: blocks of one head have gradients of keys of their own,
    those of many heads add them up."""
    case = make(operation, heads=heads, tokens=5, keys=3, values=130, states=1, gate="head")
    compare(with_gradients(core, case), loops, case, torch.float64)


@each_core()
@pytest.mark.parametrize("gate", ["head", "key"])
def test_gradcheck(core: ModuleType, operation: str, gate: str) -> None:
    if operation == "solve":
        gate = "head"
    case = make(operation, tokens=5, keys=2, values=2, share=2, gate=gate, states=1, eraser=True)
    names = case.names

    def function(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = dict(zip(names, operands, strict=True))
        if "m" in made:  # a precision matrix is symmetric
            made["m"] = (made["m"] + made["m"].mT) / 2
        return tuple(call(core, Case(operation, made, case.options)).values())

    given_operands = [case.operands[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, given_operands)


@pytest.mark.parametrize("length", [0.7, 1.4])
@pytest.mark.parametrize("rule", OPTIONS["synapse_delta"]["rule"])
def test_gradcheck_of_every_rule(rule: tuple[str, str], length: float) -> None:
    """Also where a rate exceeds one, from which on its gain is another function of it."""
    case = make(
        "synapse_delta", tokens=4, keys=3, values=2, share=2, states=1, write="value", rule=rule,
        uncertainty=True,
    )  # fmt: skip
    case.operands["k"] = length * case.operands["k"]
    case.operands["beta"] = 0.6 + 0.3 * case.operands["beta"]
    names = case.names

    def function(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = dict(zip(names, operands, strict=True))
        return tuple(call(chunked, Case("synapse_delta", made, case.options)).values())

    assert torch.autograd.gradcheck(function, [case.operands[n].requires_grad_() for n in names])


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_importance_a_rate_is_the_delta_rule_bit_for_bit(
    dtype: torch.dtype, tokens: int
) -> None:
    case = make(
        "synapse_delta", tokens=tokens, keys=24, share=2, states=1, rule=("exact_rate", "full")
    ).cast(dtype)
    x = case.operands
    x["k"] = 1.4 * x["k"]
    x["b"], x["j"] = torch.zeros_like(x["b"]), torch.zeros_like(x["j"])
    x["prior"] = torch.ones_like(x["prior"])
    found = call(chunked, case)
    source = call(chunked, Case("synapse_delta", x, {"rule": ("first_order", "full")}))
    for name, value in source.items():
        assert torch.equal(value, found[name]), name


@each_core()
def test_layout_of_operands_does_not_matter(core: ModuleType, operation: str) -> None:
    """Head-first and interleaved memory gives the same bits as contiguous operands."""
    case = make(operation, batch=2, tokens=70, heads=2, share=2, states=2).cast(torch.float32)
    contiguous = with_gradients(core, case)

    def scatter(x: torch.Tensor) -> torch.Tensor:
        wide = torch.empty(*x.shape, 2, dtype=x.dtype)
        wide[..., 0] = x
        return wide[..., 0].transpose(0, -1).contiguous().transpose(0, -1)

    moved = {name: None if x is None else scatter(x) for name, x in case.operands.items()}
    strided = with_gradients(core, Case(operation, moved, case.options))
    for name, value in contiguous.items():
        assert torch.equal(value, strided[name]), name


@each_core()
def test_dtypes_of_results(core: ModuleType, operation: str) -> None:
    """Outputs have the dtype of the values, states float32 at least, gradients the operands'."""
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        for tokens in (1, 3):
            case = make(operation, tokens=tokens, states=1, share=2).cast(dtype)
            found = with_gradients(core, case)
            for name, value in found.items():
                state = operation in ("importance", "riccati", "solve") and name == "out"
                if name.startswith("final") or state:
                    assert value.dtype == wide, name
                elif name in ("out", "doubt"):
                    assert value.dtype == dtype, name
                else:
                    assert value.dtype == case.operands[name[1:]].dtype, name


@each_core()
def test_autocast_does_not_lower_precision(core: ModuleType, operation: str) -> None:
    for tokens in (1, 70):
        case = make(operation, tokens=tokens, states=1, share=2).cast(torch.float32)
        plain = call(core, case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = call(core, case)
        for name, value in plain.items():
            assert torch.equal(value, cast[name]), name


@each_core()
def test_inference_gives_the_bits_of_training(core: ModuleType, operation: str) -> None:
    case = make(operation, tokens=70, states=1, share=2).cast(torch.float32)
    trained = with_gradients(core, case)
    with torch.no_grad():
        for name, value in call(core, case).items():
            assert torch.equal(value, trained[name]), name


def test_solved_queries_read_the_ridge_regression() -> None:
    """What `linear` reads with the solution is least squares of the past, decayed, and a prior."""
    case = make("solve", tokens=70, keys=5, share=2)
    q, k, beta, g, prior = (case.operands[name] for name in ("q", "k", "beta", "g", "prior"))
    v = torch.randn(1, 70, 2, 3, dtype=torch.float64)
    x, _ = chunked.solve(q, k, beta, g, prior=prior)
    found, _ = chunked.linear(x, k, beta[..., None] * v, g)
    k, q = (y.repeat_interleave(2, 2) for y in (k, q))
    for t, h in ((0, 0), (40, 1), (69, 0)):
        weight = (
            beta[0, : t + 1, h]
            * (g[0, : t + 1, h].flip(0).cumsum(0).flip(0) - g[0, : t + 1, h]).exp()
        ).sqrt()
        rows = torch.cat([weight[:, None] * k[0, : t + 1, h], prior[h].sqrt().diag()])
        values = torch.cat([weight[:, None] * v[0, : t + 1, h], v.new_zeros(5, 3)])
        mean = torch.linalg.lstsq(rows, values).solution
        torch.testing.assert_close(found[0, t, h], q[0, t, h] @ mean)


def test_frozen_importance_is_the_plain_delta_rule() -> None:
    case = make("synapse_delta", tokens=40, states=1, prior="head", share=2)
    case.operands["b"], case.operands["j"] = None, torch.zeros_like(case.operands["j"])
    compare(with_gradients(chunked, case), loops, case, torch.float64)


@each_core()
def test_wrong_shapes_are_named(core: ModuleType, operation: str) -> None:
    for name in chunked_cases.POSITIONAL[operation]:
        case = make(operation, tokens=3, heads=2, keys=4, values=3, share=2)
        x = case.operands[name]
        case.operands[name] = torch.cat((x, x), dim=2)[:, :, :3]
        with pytest.raises(ValueError, match=rf"{name}|heads"):
            call(core, case)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(core, make(operation, batch=2), cu_seqlens=torch.tensor([0, 8]))


def test_unknown_options_are_named() -> None:
    for operation, option in (
        ("linear", {"read": "after"}),
        ("delta", {"base": "old"}),
        ("synapse", {"read": "after"}),
        ("synapse_delta", {"gain": "none"}),
        ("synapse_delta", {"gain": "first_order", "correction": "diagonal"}),
        ("synapse_delta", {"gain": "exact_rate", "correction": "diagonal"}),
    ):
        with pytest.raises(ValueError, match="accepted"):
            call(chunked, make(operation), **option)


@pytest.mark.parametrize("base", ["decayed", "prev"])
@pytest.mark.parametrize("gate", [None, "head", "key"])
def test_the_two_oracles_of_the_delta_rule_agree(gate: str | None, base: str) -> None:
    case = make("delta", tokens=20, share=2, gate=gate, states=1, base=base)
    found = with_gradients(SimpleNamespace(delta=delta_at_once), case)
    compare(found, loops, case, torch.float64)
