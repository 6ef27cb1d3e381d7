"""A token of decoding, which an engine prepares once for all calls like it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses

import glazoo
from glazoo.engines import available
from glazoo.theory.instances import Instance

SPECS = {
    "linear": glazoo.load("mamba2"),
    "linear, read before, fixed decay": glazoo.load("retnet"),
    "linear, tied key": glazoo.load("hgrn2"),
    "delta, decay per key": glazoo.load("kda"),
    "delta, own erase gate": glazoo.load("gdn2"),
    "delta, exact gain": glazoo.load("implicit_delta"),
    "gain per synapse": glazoo.load("longhorn"),
    "importance over keys": glazoo.load("metaplastic_gated_deltanet"),
    "importance over keys, linear": glazoo.load("metaplastic_mamba2"),
    "synapse": glazoo.load("palimpsa"),
    "synapse_delta": glazoo.metaplasticize(glazoo.load("gated_deltanet"), gate="value"),
}
ENGINES = [name for name in available() if name != "reference"]


def run(spec: glazoo.Spec, operands: Any, impl: str, **options: Any) -> Any:
    given = {"k": None, **operands}
    return glazoo.attention(spec, **given, output_final_state=True, impl=impl, **options)


def parts(result: Any) -> list[torch.Tensor]:
    found = [result.output, *result.final_state, getattr(result, "uncertainty", None)]
    return [x for x in found if x is not None]


def assert_agrees(found: list[torch.Tensor], function: Any, operands: Any) -> None:
    """Whether these are what a function makes of operands, as exactly as it can be known."""
    names = list(operands)

    def of(*given: torch.Tensor | None) -> list[torch.Tensor]:
        return function(dict(zip(names, given, strict=True)))

    tensors = list(operands.values())
    seen = witnesses(of, tensors)
    for i, (x, truth) in enumerate(zip(found, of(*tensors), strict=True)):
        assert_within_budget(x, truth, torch.float64, witness=[run[i] for run in seen])


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("label", SPECS)
def test_agrees_with_the_reference(label: str, impl: str) -> None:
    spec = SPECS[label]
    assert glazoo.lower(spec).piece is not None
    # Two key heads for four value heads; more values than a block of the loops has.
    one = Instance(B=2, T=1, H=2, G=2, K=5, V=70, start=True)
    operands, state = one.operands(spec), one.state(spec)
    for start in (state, None):
        for asked in {False, spec.has_variance}:
            options = {"initial_state": start, "output_uncertainty": asked}

            def truth(given: Any, options: Any = options) -> list[torch.Tensor]:
                return parts(run(spec, given, "reference", **options))

            # In an order in which nothing lies flat.
            strided = {n: x.mT.contiguous().mT if x.dim() > 2 else x for n, x in operands.items()}
            for given in (operands, strided):
                found = parts(run(spec, given, impl, **options))
                assert_agrees(found, truth, operands)


@pytest.mark.parametrize("impl", ENGINES)
def test_prepares_what_does_not_depend_on_numbers(impl: str) -> None:
    spec = SPECS["importance over keys"]
    one = Instance(B=2, T=1, H=2, K=4, V=3, start=True)
    state = one.state(spec)

    def truth(given: Any) -> list[torch.Tensor]:
        return parts(run(spec, given, "reference", initial_state=state))

    for seed in range(3):
        x = dataclasses.replace(one, seed=seed).operands(spec)
        assert_agrees(parts(run(spec, x, impl, initial_state=state)), truth, x)
    for prior in (2.0, torch.tensor(2.0).double(), torch.full((2,), 2.0).double()):
        given = x | {"prior": prior}
        wide = given | {"prior": torch.as_tensor(prior, dtype=torch.float64)}
        assert_agrees(parts(run(spec, given, impl, initial_state=state)), truth, wide)
    narrow = {n: y.float() for n, y in x.items()}
    assert run(spec, narrow, impl).output.dtype == torch.float32
    assert run(spec, narrow, impl, initial_state=state).final_state.memory.dtype == torch.float64
    negated = x | {"v": torch._neg_view(x["v"])}
    plain = run(spec, x | {"v": -x["v"]}, impl, initial_state=state)
    assert torch.equal(run(spec, negated, impl, initial_state=state).output, plain.output)


@pytest.mark.parametrize("impl", ENGINES)
def test_what_was_valid_is_refused_where_it_is_not(impl: str) -> None:
    spec = SPECS["delta, decay per key"]
    one = Instance(B=1, T=1, H=2, K=4, V=3, start=True)
    x, state = one.operands(spec), one.state(spec)
    for _ in range(2):
        run(spec, x, impl, initial_state=state)
    with pytest.raises(ValueError, match=r"g: got values from .* accepted are <= 0"):
        run(spec, x | {"g": -x["g"] + 1}, impl, initial_state=state)
    with pytest.raises(ValueError, match=r"beta: got values from .* accepted are >= 0"):
        run(spec, x | {"beta": -x["beta"] - 1}, impl, initial_state=state)
    with pytest.raises(ValueError, match=r"k: got shape \[1, 1, 2, 3\]"):
        run(spec, x | {"k": x["k"][..., :3]}, impl, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state.memory: got shape"):
        run(spec, x, impl, initial_state=state.map(lambda y: y[:, :1]))
    with pytest.raises(ValueError, match="is on meta"):
        run(spec, x | {"k": x["k"].to("meta")}, impl, initial_state=state)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("label", ["linear", "synapse_delta"])
def test_what_looks_at_operations_finds_them(label: str, impl: str) -> None:
    spec = SPECS[label]
    one = Instance(B=1, T=1, H=2, K=4, V=3, start=True)
    x, state = one.operands(spec), one.state(spec)

    def of(v: torch.Tensor, impl: str = impl) -> torch.Tensor:
        return run(spec, x | {"v": v}, impl, initial_state=state).output

    plain = of(x["v"])

    def gradient(given: Any, impl: str = "reference") -> list[torch.Tensor]:
        leaf = given["v"].detach().clone().requires_grad_()
        return [torch.autograd.grad(of(leaf, impl).sum(), leaf)[0]]

    v = {"v": x["v"]}
    assert_agrees(gradient(v, impl), gradient, v)
    both = torch.func.vmap(of)(torch.stack([x["v"], x["v"]]))
    assert_agrees([both[1]], lambda given: [of(given["v"], "reference")], v)
    meta = {n: y.to("meta") for n, y in x.items()}
    if impl == "chunked":
        start = state.map(lambda y: y.to("meta"))
        assert run(spec, meta, impl, initial_state=start).output.shape == plain.shape


@pytest.mark.skipif("compiled" not in available(), reason="needs numba")
@pytest.mark.parametrize("label", ["linear", "delta, own erase gate", "synapse", "synapse_delta"])
@pytest.mark.parametrize("values", [3, 130])
def test_a_few_tokens_are_a_loop(label: str, values: int) -> None:
    spec = SPECS[label]
    one = Instance(B=2, T=5, H=2, K=4, V=values, start=True)
    x, state = one.operands(spec), one.state(spec)
    found = parts(run(spec, x, "compiled", initial_state=state))
    assert_agrees(found, lambda y: parts(run(spec, y, "reference", initial_state=state)), x)
