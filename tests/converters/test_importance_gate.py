"""The importance gate that `metaplasticize` adds, on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import glazoo
from glazoo.families.settings import GateShape
from glazoo.layers import ImportanceGate
from glazoo.layers.clamp import live_clamp

SIZES = {"in_features": 12, "heads": 3, "keys": 5, "values": 4}


def make(gate: GateShape = "value", **changes: Any) -> ImportanceGate:
    spec = glazoo.metaplasticize(glazoo.load("mamba2"), gate=gate, rank=2).importance
    assert spec is not None
    return ImportanceGate(spec, **SIZES, **changes)


def operands(
    module: ImportanceGate, hidden: torch.Tensor, write: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and the prior, which are all that it gives."""
    found = module(hidden, write)
    assert set(found) == {"b", "prior"}
    return found["b"], found["prior"]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, SIZES["in_features"], generator=generator).to(dtype)
    write = torch.rand(2, 5, SIZES["heads"], generator=generator)
    return hidden, write


@pytest.mark.parametrize("x", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("grad", [-1.0, 1.0])
def test_clamp_gradient_passes_upward_only(x: float, grad: float) -> None:
    p = torch.tensor([x], requires_grad=True)
    y = live_clamp(p)
    assert y.item() == max(x, 0.0)
    y.backward(torch.tensor([grad]))
    # Descent moves against the gradient: a negative one raises the parameter.
    assert p.grad is not None
    assert p.grad.item() == (grad if x > 0 or grad < 0 else 0.0)


@pytest.mark.parametrize(("slope", "expected"), [(-1.0, 0.1), (1.0, 0.0)])
def test_descent_leaves_zero_upward_and_never_downward(slope: float, expected: float) -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    (slope * live_clamp(p)).sum().backward()
    optimizer.step()
    assert p.item() == pytest.approx(expected)


def test_clamp_recovers_from_an_overshoot_below_zero() -> None:
    p = nn.Parameter(torch.tensor([-0.05]))
    optimizer = torch.optim.SGD([p], lr=0.1)
    (-live_clamp(p)).sum().backward()
    optimizer.step()
    assert live_clamp(p).item() == pytest.approx(0.05)


def test_clamp_gradcheck_away_from_zero() -> None:
    x = torch.tensor([0.3, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(live_clamp, (x,))


@pytest.mark.parametrize("gate", ["head", "value"])
@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
def test_start_is_exactly_kappa_times_the_write_gate(gate: GateShape, kappa: float) -> None:
    module = make(gate, plasticity=kappa)
    hidden, write = inputs()
    b, prior = operands(module, hidden, write)
    expected = kappa * write
    if gate == "value":
        expected = expected[..., None].expand(*write.shape, SIZES["values"])
    assert torch.equal(b, expected)
    assert torch.equal(prior, torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
def test_formula(gate: GateShape) -> None:
    module = make(gate).double()
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    hidden, write = (t.double() for t in inputs())
    b, prior = operands(module, hidden, write)
    assert torch.equal(prior, module.ip_log.exp())
    width = SIZES["values"] if gate == "value" else 1
    for t in range(5):
        for head in range(3):
            for v in range(width):
                row = module.b_up[head * width + v]
                z = row @ (module.b_down @ hidden[1, t])
                kappa = max(float(module.b_scale[head]), 0.0)
                want = kappa * float(write[1, t, head]) * 2 / (1 + float(torch.exp(-z)))
                got = b[1, t, head, v] if gate == "value" else b[1, t, head]
                assert float(got) == pytest.approx(want, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("gate", ["head", "value"])
def test_zero_plasticity_has_a_live_gradient(gate: GateShape) -> None:
    module = make(gate)
    (-module(*inputs())["b"]).sum().backward()
    assert module.b_scale.grad is not None
    assert bool((module.b_scale.grad < 0).all())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_casts_do_not_narrow_the_parameters(cast: str) -> None:
    module = make(plasticity=0.3)
    before = {name: p.clone() for name, p in module.named_parameters()}
    parent = nn.ModuleList([nn.Linear(2, 2), module])
    parent.to(torch.bfloat16) if cast == "to" else getattr(parent, cast)()
    assert parent[0].weight.dtype != torch.float32
    for name, p in module.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])
    assert module.double().b_scale.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_give_wide_gates(dtype: torch.dtype) -> None:
    module = make(plasticity=0.5)
    hidden, write = inputs(dtype)
    assert all(t.dtype == torch.float32 for t in operands(module, hidden, write))


def test_shapes_and_names() -> None:
    for gate, width in (("head", 3), ("value", 12)):
        module = make(gate)  # type: ignore[arg-type]
        # In this order, in which conversions write them.
        assert [(name, tuple(p.shape)) for name, p in module.named_parameters()] == [
            ("b_down", (2, 12)),
            ("b_up", (width, 2)),
            ("b_scale", (3,)),
            ("ip_log", (3,)),
        ]
    assert not any(isinstance(m, nn.Linear) for m in make().modules())


def test_start_depends_on_seed_and_layer_only() -> None:
    torch.manual_seed(11)
    a = make(seed=4, layer=1)
    torch.manual_seed(12)
    torch.set_default_dtype(torch.float64)
    try:
        b = make(seed=4, layer=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(a.start("b_down"), b.start("b_down"))
    assert torch.equal(a.b_down.double(), b.b_down)
    assert not torch.equal(a.b_down, make(seed=4, layer=2).b_down)
    assert not torch.equal(a.b_down, make(seed=5, layer=1).b_down)


def test_reset_keeps_what_a_checkpoint_filled() -> None:
    module = make(plasticity=0.5)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(9.0)
    module.b_scale._is_hf_initialized = True  # type: ignore[attr-defined]
    module.reset_parameters()
    assert torch.equal(module.b_scale, torch.full((3,), 9.0))
    assert torch.equal(module.ip_log, torch.zeros(3))


def test_is_built_without_data_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in make().parameters())
