"""Forms of importance on the kernels: what they compute and its gradients, beside the reference."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, witnesses

import glazoo
from glazoo.theory.instances import operands as draw

QUICK = (
    "metaplastic_gated_deltanet_full",
    "metaplastic_mamba2_isotropic",
    "metaplastic_kda_rotated",
)
SLOW = (
    "gka",
    "bayesian_layer",
    "kdn",
    "kdn_isotropic",
    "metaplastic_comba_full",
    "metaplastic_efla",
    "metaplastic_gated_deltanet_diffuse",
    "metaplastic_gated_deltanet_rotated",
    "metaplastic_gated_deltaproduct_full",
    "metaplastic_gla_diffuse",
    "metaplastic_kda_full",
    "metaplastic_mamba2_full",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)])
def test_values_and_gradients_agree_with_the_reference(name: str) -> None:
    spec = glazoo.load(name)
    given = draw(spec, torch.Generator().manual_seed(3), B=1, T=19, H=1, HV=2, K=8, V=8)
    names, tensors = list(given), list(given.values())

    def run(impl: str, *xs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        ops = {"k": None} | dict(zip(names, leaves, strict=True))
        out = glazoo.attention(spec, **ops, output_final_state=True, impl=impl)
        loss = (out.output * torch.arange(1.0, 9.0).to(out.output)).sum()
        grads = torch.autograd.grad(loss, leaves)
        return [x.detach() for x in (out.output, out.final_state.memory, *grads)]

    truth = run("reference", *tensors)
    seen = witnesses(lambda *xs: run("reference", *xs), tensors)
    found = run("triton", *(x.float().to(DEVICE) for x in tensors))
    for i, (part, x) in enumerate(zip(["output", "memory", *names], found, strict=True)):
        witness = [one[i] for one in seen]
        assert_within_budget(x.cpu(), truth[i], witness=witness, name=part)
