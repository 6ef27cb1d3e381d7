"""torch.compile traces the core operations without graph breaks, forward and backward."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from chunked_cases import Case, call, each_core, make, with_gradients
from torch import Tensor

from glazoo.engines import chunked


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 5])
@each_core()
def test_full_graph(core: ModuleType, operation: str, tokens: int) -> None:
    """Compiled values and gradients are those of eager mode; a graph break would raise."""
    torch._dynamo.reset()
    case = make(operation, tokens=tokens, states=1, share=2, keys=2, values=2)
    names = case.names

    def function(*operands: Tensor) -> tuple[Tensor, ...]:
        made = dict(zip(names, operands, strict=True))
        return tuple(call(core, replace(case, operands=made)).values())

    # The graph that dynamo and the autograd tracer make is what is tested, not a code generator.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        leaves = [case.operands[name].detach().clone().requires_grad_() for name in names]
        found = run(*leaves)
        total = sum((x.square().sum() for x in found if x.requires_grad), torch.zeros(()))
        total.backward()
        results.append([*(x.detach() for x in found), *(x.grad for x in leaves)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", ["linear", "delta"])
def test_full_graph_of_a_pack(operation: str) -> None:
    torch._dynamo.reset()
    case = make(operation, tokens=9, states=3, gate="key")
    borders = torch.tensor([0, 4, 4, 9])

    def function(q: Tensor, cu_seqlens: Tensor) -> Tensor:
        made = replace(case, operands={**case.operands, "q": q})
        return call(chunked, made, cu_seqlens=cu_seqlens)["out"]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q = case.operands["q"]
    for part in (borders, torch.tensor([0, 1, 2, 9])):
        assert torch.equal(compiled(q, part), function(q, part))


@each_core()
def test_registration(core: ModuleType, operation: str) -> None:
    """Schemas, fake implementations and autograd formulas are consistent with the real ones."""
    seen: list[tuple[str, tuple[object, ...]]] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "glazoo":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    case = make(operation, tokens=3, states=1, gate="head")
    with Spy():
        with_gradients(core, case)
    names = {str(func) for func, _ in seen}
    assert any("backward" in name for name in names)
    assert any("backward" not in name for name in names)
    for func, args in seen:
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(func, args, test_utils=tests)


def test_no_option_is_baked_into_a_graph_that_is_reused() -> None:
    """Another length and another option give another result, not a stale graph."""
    torch._dynamo.reset()

    def function(case: Case, read: str) -> Tensor:
        return call(chunked, replace(case, options={"read": read}))["out"]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (3, 70, 5):
        case = make("linear", tokens=tokens)
        for read in ("post", "pre"):
            assert torch.equal(compiled(case, read), function(case, read))
