"""Gradients through several layers that solve a linear system at every token.

Where conjugate gradients are stopped early and differentiated as they ran, errors were reported to
grow from layer to layer. Here a solution is found to the rounding of its dtype, and its gradient is
a solution of its own.
"""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, witnesses
from layer_cases import HIDDEN, inputs, sizes
from torch import Tensor
from torch.func import functional_call

import glazoo
from glazoo.layers import GatedLinearAttention

LAYERS, TOKENS = 5, 24


@pytest.mark.parametrize(
    "name",
    ["gka", pytest.param("metaplastic_gated_deltanet_full", marks=pytest.mark.slow)],
)
def test_gradients_through_five_solves(name: str) -> None:
    spec = glazoo.load(name)
    torch.manual_seed(0)
    made = {
        impl: [
            GatedLinearAttention(
                spec, HIDDEN, layer_idx=i, num_layers=LAYERS, impl=impl, **sizes(spec)
            )
            for i in range(LAYERS)
        ]
        for impl in ("reference", "chunked")
    }
    for gate in (layer.metaplastic for layer in made["reference"]):
        if gate is not None and gate.b_scale is not None:
            torch.nn.init.constant_(gate.b_scale, 0.5)
            assert gate.b_up is not None
            torch.nn.init.normal_(gate.b_up)
    names = [[n for n, _ in layer.named_parameters()] for layer in made["reference"]]
    weights = [p.detach().double() for layer in made["reference"] for p in layer.parameters()]

    def gradients(impl: str, dtype: torch.dtype, *given: Tensor) -> list[Tensor]:
        x, *rest = (y.to(dtype).requires_grad_() for y in given)
        y, at = x, 0
        for layer, own in zip(made[impl], names, strict=True):
            state = dict(zip(own, rest[at : at + len(own)], strict=True))
            y = y + functional_call(layer.to(dtype), state, (y,)).output
            at += len(own)
        first = [rest[names[0].index(f"{s}_proj.weight")] for s in "qkv"]
        return list(torch.autograd.grad(y.square().mean(), [x, *first]))

    given = [inputs(2, TOKENS), *weights]
    truth = gradients("reference", torch.float64, *given)
    near = witnesses(lambda *x: gradients("reference", torch.float32, *x), given)
    found = gradients("chunked", torch.float32, *given)
    for i, (actual, exact) in enumerate(zip(found, truth, strict=True)):
        assert_within_budget(actual, exact, witness=[run[i] for run in near], name=f"gradient {i}")
