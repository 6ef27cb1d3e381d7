"""`impl="triton"` computes what the reference computes, for every spec whose class has kernels."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from budget import assert_within_budget, witnesses
from oracles import make_operands, make_state

import glazoo
from glazoo import kernels

FORMS = [(n, None) for n in glazoo.names()] + [
    (n, gate)
    for n in glazoo.names()
    if not glazoo.load(n).metaplastic
    for gate in ("head", "value")
]
FORMS = [
    (n, gate)
    for n, gate in FORMS
    if hasattr(
        kernels,
        glazoo.lower(
            glazoo.load(n) if gate is None else glazoo.metaplasticize(glazoo.load(n), gate=gate)
        ).kernel,
    )
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize(("name", "gate"), FORMS)
def test_agrees_with_the_reference(name, gate, tokens) -> None:
    spec = glazoo.load(name)
    spec = spec if gate is None else glazoo.metaplasticize(spec, gate=gate)
    rng = np.random.default_rng(zlib.crc32(f"{name} {gate} {tokens}".encode()))
    sizes = {"H": 1, "HV": 2, "K": 16, "V": 16}
    operands = make_operands(name, rng, 1, tokens, **sizes, gate=gate)
    start = make_state(name, rng, 1, **sizes, gate=gate)
    names = [k for k, x in operands.items() if x is not None]
    parts = [*start[:3], *(start.lag or (None, None))]
    kept = [i for i, x in enumerate(parts) if x is not None]
    tensors = [torch.from_numpy(np.array(operands[k])) for k in names]
    tensors += [torch.from_numpy(np.array(parts[i])) for i in kept]

    def run(impl, xs):
        ops = {"k": None} | dict(zip(names, xs, strict=False))
        state = [None] * len(parts)
        for i, x in zip(kept, xs[len(names) :], strict=True):
            state[i] = x
        result = glazoo.attention(
            spec,
            ops.pop("q"),
            ops.pop("k"),
            ops.pop("v"),
            **ops,
            initial_state=glazoo.State(*state),
            output_final_state=True,
            impl=impl,
        )
        return [result.output, *(x for x in result.final_state if x is not None)]

    truth = run("reference", tensors)
    noisy = witnesses(lambda *xs: run("reference", list(xs)), tensors)
    actual = run("triton", [x.float().to(DEVICE) for x in tensors])
    for i, (x, y) in enumerate(zip(actual, truth, strict=True)):
        assert_within_budget(x.cpu(), y, witness=[w[i] for w in noisy], name=f"{name} {i}")


def test_float64_is_refused() -> None:
    x = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton': got float64 operands"):
        glazoo.attention("linear_attention", x, x, x, impl="triton")
