"""Gates and scales that a core multiplies by itself are those multiplied beforehand."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from glazoo.engines import available

CORES = ["chunked", "traceable", *(["compiled"] if "compiled" in available() else [])]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("name", CORES)
def test_write_gates_erase_gates_and_scales(name: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    core: Any = importlib.import_module(f"glazoo.engines.{name}")
    q, k = random(2, 2, tokens, 2, 4) / 2
    w = random(2, tokens, 4, 3)
    g, beta, erase = -0.1 * random(3, 2, tokens, 4).abs()
    beta, erase = beta.exp(), erase.exp()
    state = {"initial_state": random(2, 4, 4, 3)}
    value = beta[..., None] * w
    key = k.repeat_interleave(2, 2)
    found = core.linear(q, k, w, g, beta=beta, scale=0.5, **state)
    wanted = core.linear(0.5 * q, k, value, g, **state)
    torch.testing.assert_close(found, wanted)
    for own in (None, random(2, tokens, 2, 4) / 2):
        e = key if own is None else own.repeat_interleave(2, 2)
        found = core.delta(q, own, k, w, g, beta=beta, erase=erase, scale=0.5, **state)
        wanted = core.delta(0.5 * q, erase[..., None] * e, k, value, g, **state)
        torch.testing.assert_close(found, wanted)
