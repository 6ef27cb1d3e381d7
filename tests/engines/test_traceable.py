"""The traceable engine computes what the loops compute, and its graphs hold for any length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chunked_cases import OPERATIONS, call, cases, compare, make, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import glazoo
from glazoo.engines import chunked, traceable
from glazoo.kernels import loops

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data())
@settings(max_examples=6)
def test_matches_the_loop(operation: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    case = data.draw(cases(operation, longest=17)).cast(dtype)
    compare(with_gradients(traceable, case), loops, case, dtype)


@pytest.mark.parametrize("states", [None, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_packed_sequences_are_sequences_alone(operation: str, states: int | None) -> None:
    case = make(operation, tokens=9, share=2, states=states)
    borders = torch.tensor([0, 3, 3, 9, 9])
    found = with_gradients(traceable, case, cu_seqlens=borders)
    compare(found, loops, case, torch.float64, cu_seqlens=borders)


def filter_operands(tokens: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k = torch.randn(2, batch, tokens, 2, 3, generator=generator, dtype=torch.float64)
    b, g = torch.rand(2, batch, tokens, 2, generator=generator, dtype=torch.float64)
    return {"q": q, "k": k, "b": b, "g": -g, "prior": torch.ones(2, dtype=torch.float64)}


def test_covariance_is_that_of_the_loop() -> None:
    for tokens in (0, 1, 7):
        x = filter_operands(tokens)
        for found, wanted in zip(traceable.covariance(**x), loops.covariance(**x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(name, marks=[] if name == "importance" else pytest.mark.slow)
        for name in OPERATIONS
    ],
)
def test_a_graph_holds_for_any_batch_and_length(operation: str) -> None:
    """One scan, no operator of ours, and no length that was built in."""
    case = make(operation, batch=2, tokens=5, share=2, keys=2, values=2)
    names = case.names

    class Operation(torch.nn.Module):
        def forward(self, *operands: Tensor) -> dict[str, Tensor]:
            return call(traceable, replace(case, operands=dict(zip(names, operands, strict=True))))

    def operands(batch: int, tokens: int) -> tuple[Tensor, ...]:
        made = make(operation, batch=batch, tokens=tokens, share=2, keys=2, values=2, seed=tokens)
        return tuple(made.operands[name] for name in names)

    dynamic = tuple({} if name == "prior" else {0: DYNAMIC, 1: DYNAMIC} for name in names)
    exported = torch.export.export(
        Operation(), operands(2, 5), dynamic_shapes=(dynamic,), strict=False
    )
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count("scan") == 1
    assert not any("glazoo" in name for name in called)
    graph = exported.module()
    for batch, tokens in ((2, 5), (3, 2), (1, 1), (1, 40)):
        x = operands(batch, tokens)
        wanted = call(loops, replace(case, operands=dict(zip(names, x, strict=True))))
        for name, found in graph(*x).items():
            torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_an_exported_chunked_covariance_holds_for_any_length() -> None:
    """It is a loop over tokens, which export would unroll to one length."""

    class Operation(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, b: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
            return chunked.covariance(q, k, b, prior=prior)

    def operands(tokens: int) -> tuple[Tensor, ...]:
        return tuple(x for name, x in filter_operands(tokens).items() if name != "g")

    dynamic = ({1: DYNAMIC}, {1: DYNAMIC}, {1: DYNAMIC}, {})
    graph = torch.export.export(Operation(), operands(3), dynamic_shapes=dynamic).module()
    for tokens in (3, 2, 9):
        x = operands(tokens)
        for found, wanted in zip(graph(*x), Operation()(*x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_it_is_an_engine_that_nobody_picks_unasked() -> None:
    from glazoo import engines

    assert "traceable" not in engines.available()
    q, k, v = torch.randn(3, 1, 4, 1, 3)
    beta = torch.rand(1, 4, 1)
    found, wanted = (
        glazoo.attention("deltanet", q, k, v, beta=beta, impl=impl).output
        for impl in ("traceable", "reference")
    )
    torch.testing.assert_close(found, wanted)
