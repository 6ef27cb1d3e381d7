"""What the importance gate multiplies, and how far it may start open."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses
from layer_cases import inputs, layer
from torch.autograd import forward_ad

import glazoo
from glazoo import metaplasticize
from glazoo.engines import available
from glazoo.layers import ImportanceGate, set_plasticity
from glazoo.layers.plasticity import (
    EARLIER_NAMES,
    MAX_PRECISION,
    observed_precision,
    refused_plasticity,
)
from glazoo.spec import Gate
from glazoo.theory.catalogue.axes import changed

RATE = glazoo.metaplasticize(glazoo.load("gated_deltanet"))
GATE = RATE.importance.gate  # type: ignore[union-attr]


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def test_unit_keys_observe_with_the_odds_of_the_write_gate() -> None:
    z = torch.linspace(-6, 6, 2 * 7 * 4, dtype=torch.float64).view(2, 7, 4)
    found = observed_precision(GATE, z.sigmoid(), unit(2, 7, 2, 16, dtype=torch.float64))
    torch.testing.assert_close(found, z.exp(), rtol=1e-12, atol=0)


def test_keys_of_another_length() -> None:
    beta, k = torch.full((1, 3, 2), 0.5), unit(1, 3, 1, 8)
    k = k * torch.tensor([0.0, 1.2, 2.0])[None, :, None, None]
    found = observed_precision(GATE, beta, k)
    expected = torch.tensor([0.5, 0.5 / (1 - 0.5 * 1.44), MAX_PRECISION])
    torch.testing.assert_close(found, expected[None, :, None].expand(1, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_write_gate_gives_more_than_the_largest_precision(dtype: torch.dtype) -> None:
    z = torch.tensor([-200.0, 0.0, 7.9, 8.1, 15.0, 200.0]).view(1, 6, 1).requires_grad_()
    beta = z.sigmoid()
    found = observed_precision(GATE, beta, unit(1, 6, 1, 64, dtype=dtype))
    assert found.dtype == torch.float32
    assert float(found.detach().min()) >= 0
    assert float(found.detach().max()) <= torch.tensor(MAX_PRECISION).item()
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert bool(grad.isfinite().all())
    assert float(grad[0, 1]) > 0
    if dtype == torch.float32:
        # Keys of length one to more than two digits: bound there, and nothing pulls any more.
        assert found[0, 4:, 0].tolist() == [torch.tensor(MAX_PRECISION).item()] * 2
        assert grad[0, 4:, 0].tolist() == [0.0, 0.0]


def test_a_write_gate_per_value_channel() -> None:
    spec = changed(RATE, write=Gate(shape="value", parameterization="sigmoid"))
    beta, k = torch.rand(1, 4, 2, 3), unit(1, 4, 1, 8)
    assert spec.importance is not None
    found = observed_precision(spec.importance.gate, beta, k)
    torch.testing.assert_close(found, beta / (1 - beta))


@pytest.mark.parametrize("name", ["mamba2", "gated_deltaproduct", "implicit_delta", "palimpsa"])
def test_what_is_no_rate_stays_as_it_is(name: str) -> None:
    spec = glazoo.load(name)
    spec = spec if spec.metaplastic else glazoo.metaplasticize(spec)
    beta = torch.rand(1, 4, 2)
    assert spec.importance is not None
    assert observed_precision(spec.importance.gate, beta, unit(1, 4, 1, 8)) is beta


@pytest.mark.parametrize("gate", ["head", "value"])
@pytest.mark.parametrize("gain", ["first_order", "exact"])
def test_a_layer_counts_evidence_in_units_of_its_gain(
    gate: Any, gain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = metaplasticize(layer("kda"), gate=gate, gain=gain, plasticity=0.25)
    seen: dict[str, torch.Tensor] = {}
    module = __import__("glazoo.layers.attention", fromlist=["attention"])
    attention = module.attention

    def watched(spec: Any, q: Any, k: Any, v: Any, **operands: Any) -> Any:
        seen.update(operands | {"k": k})
        return attention(spec, q, k, v, **operands)

    monkeypatch.setattr(module, "attention", watched)
    made(inputs(2, 8))
    beta = seen["beta"]
    square = seen["k"].square().sum(-1).repeat_interleave(beta.shape[2] // seen["k"].shape[2], 2)
    # The projection starts at zero: the sigmoid's factor 2 makes it one.
    expected = 0.25 * (beta / (1 - beta * square) if gain == "exact" else beta)
    b = seen["b"] if gate == "head" else seen["b"][..., 0]
    torch.testing.assert_close(b, expected)


@pytest.mark.parametrize(
    ("name", "plasticity", "accepted"),
    [
        ("gated_deltanet", 1.0, True),
        ("gated_deltanet", 1.5, False),
        ("gated_deltaproduct", 1.5, False),
        ("longhorn", 1.5, False),
        ("mamba2", 1.5, True),
        ("mamba2", 40, True),
        ("mamba2", -1e-9, False),
        ("mamba2", math.inf, False),
        ("mamba2", math.nan, False),
        ("mamba2", "1", False),
    ],
)
def test_where_a_plasticity_may_start(name: str, plasticity: Any, accepted: bool) -> None:
    source = glazoo.load(name)
    for spec in (source, glazoo.metaplasticize(source)):
        reason = refused_plasticity(spec, plasticity)
        assert (reason is None) == accepted
        assert accepted or f"plasticity: got {plasticity!r}, accepted are numbers" in str(reason)


@pytest.mark.parametrize("name", ["metaplastic_gla", "palimpsa", "mesanet", "precond_kda"])
def test_state_dicts_of_before_load(name: str) -> None:
    made, other = layer(name), layer(name, seed=1)
    state = made.state_dict()
    before = dict(state)
    for old, new in EARLIER_NAMES.items():
        for key in [k for k in state if k.startswith(new)]:
            before[old + key.removeprefix(new)] = before.pop(key)
    assert any(key.startswith("importance.") for key in before)
    assert not any(key.startswith("metaplastic.") for key in before)
    # As a part of a module, too.
    torch.nn.ModuleDict({"x": other}).load_state_dict({f"x.{k}": p for k, p in before.items()})
    assert all(torch.equal(p, state[key]) for key, p in other.state_dict().items())


def test_a_hebbian_layer_may_be_more_plastic_than_one() -> None:
    made = metaplasticize(layer("gla"), plasticity=3.0)
    assert made.metaplastic is not None
    assert set(made.metaplastic.b_scale.tolist()) == {3.0}
    set_plasticity(made, 5.0)
    assert set(made.metaplastic.b_scale.tolist()) == {5.0}
    with pytest.raises(ValueError, match=r"got 1\.5, accepted are numbers in \[0, 1\] for"):
        set_plasticity(metaplasticize(layer("kda")), 1.5)


def opened(name: str, **form: Any) -> tuple[ImportanceGate, list[torch.Tensor]]:
    """Gives a gate of numbers that say something, in float64, and what it takes."""
    gate = metaplasticize(layer(name), plasticity=0.5, **form).metaplastic
    assert gate is not None
    generator = torch.Generator().manual_seed(1)
    for parameter in gate.parameters(recurse=False):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    write = torch.rand(3, 1, gate.heads, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 1, 16, generator=generator, dtype=torch.float64)
    return gate, [x, write, unit(3, 1, gate.heads // 2, 4, dtype=torch.float64)]


NUMBA = pytest.mark.skipif("compiled" not in available(), reason="needs numba")


@NUMBA
@pytest.mark.parametrize("form", [{}, {"gate": "value"}, {"gain": "first_order"}], ids=str)
@pytest.mark.parametrize("name", ["kda", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_piece_computes_the_gate(
    name: str, form: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, given = opened(name, **form)
    names = [n for n, _ in gate.named_parameters(recurse=False)]
    operands = [*given, *(gate.get_parameter(n).detach() for n in names)]

    def of(x: Any, write: Any, k: Any, *values: Any, impl: str = "chunked") -> list[torch.Tensor]:
        parameters = dict(zip(names, values, strict=True))
        call = torch.func.functional_call(gate, parameters, (x, write, k), {"impl": impl})
        return [call["b"]]

    with torch.no_grad():
        (truth,) = of(*operands)
        witness = [w[0] for w in witnesses(of, operands)]
        monkeypatch.setattr(gate, "_projected", None)  # what computes it in PyTorch
        (found,) = of(*(x.to(dtype) for x in operands), impl="auto")
    assert found.dtype == dtype
    assert_within_budget(found, truth, witness=witness)


@NUMBA
def test_keys_of_any_length_in_one_piece() -> None:
    gate, (x, write, k) = opened("kda")
    for length in (0.0, 1.2, 100.0):
        with torch.no_grad():
            found = gate(x, write, k * length)["b"]
            torch.testing.assert_close(found, gate(x, write, k * length, impl="chunked")["b"])


@NUMBA
@pytest.mark.parametrize(
    ("x", "write", "k"),
    [
        ((3, 1, 8), (3, 1, 4), (3, 1, 2, 4)),
        ((3, 1, 16), (3, 1, 5), (3, 1, 2, 4)),
        ((3, 1, 16), (3, 1, 4), (3, 1, 3, 4)),
        ((3, 1, 16), (3, 1, 4), (0, 1, 2, 4)),
    ],
)
def test_nothing_beside_the_operands_is_read(x: Any, write: Any, k: Any) -> None:
    gate, _ = opened("kda")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes|size of tensor"):
        gate(*(torch.ones(shape, dtype=torch.float64) for shape in (x, write, k)))


@NUMBA
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_where_the_gate_stays_in_pytorch() -> None:
    gate, (x, write, k) = opened("kda")
    gradient = gate(x, write, k)["b"]
    assert gradient.requires_grad
    with torch.no_grad():
        assert gate(*(y.expand(-1, 2, *y.shape[2:]) for y in (x, write, k)))["b"].shape[1] == 2
        with forward_ad.dual_level():
            dual = gate(x, forward_ad.make_dual(write, write), k)["b"]
            assert forward_ad.unpack_dual(dual).tangent is not None
        seen = torch.func.vmap(lambda y: gate(y, write, k)["b"])(torch.stack([x, x]))
        torch.testing.assert_close(seen[0], gradient.detach())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = gate(x.float(), write.float(), k.float())["b"]
        assert 1e-4 < float((narrow - gradient).abs().max()) < 0.1
