"""Derivatives of every kind and order of the chunked operations, under every transform of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chunked_cases import OPERATIONS, Case, call, make
from torch import Tensor
from torch.autograd import forward_ad

from glazoo.engines import chunked
from glazoo.kernels import loops

# PyTorch's own forward mode compiles a few rules with torch.jit.script, which it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

# The options that read the most.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"read": "pre"},
    "delta": {"base": "prev"},
    "synapse": {"uncertainty": True},
    "synapse_delta": {"uncertainty": True, "eraser": True, "rule": ("exact_rate", "full")},
}


def case_of(operation: str, tokens: int = 3) -> Case:
    case = make(
        operation, tokens=tokens, keys=2, values=2, share=2, states=1, **OPTIONS.get(operation, {})
    )
    if operation == "solve":
        # The engine reads the state as the symmetric matrix that it is.
        case.operands.pop("m")
    return case


def function(module: Any, case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The operation as a function of its operands alone."""

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        made = dict(zip(case.names, operands, strict=True))
        found = call(module, replace(case, operands={**case.operands, **made}))
        return tuple(found.values())

    return run


def leaves(case: Case) -> list[Tensor]:
    return [case.operands[name].detach().clone().requires_grad_() for name in case.names]


def loss(module: Any, case: Case) -> Callable[..., Tensor]:
    """Not linear in the results, so that every second derivative is there."""
    run = function(module, case)
    return lambda *xs: sum(x.pow(3).sum() for x in run(*xs))


def pair(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Operands and a tangent of each."""
    generator = torch.Generator().manual_seed(2)
    xs = tuple(case.operands[name] for name in case.names)
    return xs, tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in xs)


def assert_same(found: Any, truth: Any) -> None:
    """Equal but for the order of float64 operations, and nothing of it zero for want of a rule."""
    flat = [torch.utils._pytree.tree_leaves(x) for x in (found, truth)]
    assert any(bool(x.any()) for x in flat[1])
    for x, y in zip(*flat, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12 * float(y.detach().abs().max() + 1))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_first_derivatives(operation: str) -> None:
    """In both modes, and batched, against finite differences."""
    case = case_of(operation)
    torch.autograd.gradcheck(
        function(chunked, case),
        leaves(case),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("noise", [None, "head", "key"])
@pytest.mark.parametrize("gate", [None, "head", "key"])
def test_gradients_of_a_covariance(gate: str | None, noise: str | None) -> None:
    """Of the loop that every engine has, with all that it takes."""
    shapes = {None: None, "head": (1, 4, 2), "key": (1, 4, 2, 3)}

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(0)
    root = positive(1, 2, 3, 3)
    operands = {
        "q": positive(1, 4, 2, 3),
        "k": positive(1, 4, 2, 3),
        "b": positive(1, 4, 2),
        "prior": 1 + positive(2, 3),
        "initial_state": 0.1 * root @ root.mT,
    }
    if gate is not None:
        operands["g"] = -positive(*shapes[gate])
    if noise is not None:
        operands["noise"] = positive(*shapes[noise])

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        return chunked.covariance(**dict(zip(operands, xs, strict=True)))

    torch.autograd.gradcheck(run, [x.requires_grad_() for x in operands.values()], fast_mode=True)


# What takes longest: other operations are derived the same way.
SOME = [
    pytest.param(x, marks=pytest.mark.slow if x in ("synapse", "synapse_delta") else ())
    for x in OPERATIONS
]


@pytest.mark.parametrize("operation", SOME)
def test_second_derivatives(operation: str) -> None:
    """Reverse over reverse and forward over reverse, against finite differences."""
    case = case_of(operation, tokens=2)
    torch.autograd.gradgradcheck(function(chunked, case), leaves(case), check_fwd_over_rev=True)


TRANSFORMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "grad": lambda f, xs, ts: torch.func.grad(f, tuple(range(len(xs))))(*xs),
    "jvp": lambda f, xs, ts: torch.func.jvp(f, xs, ts),
    "jvp of grad": lambda f, xs, ts: torch.func.jvp(torch.func.grad(f), xs, ts)[1],
    "grad of jvp": lambda f, xs, ts: torch.func.grad(lambda *x: torch.func.jvp(f, x, ts)[1])(*xs),
    "hessian": lambda f, xs, ts: torch.func.hessian(f)(*xs),
    "vmap of grad": lambda f, xs, ts: torch.func.vmap(torch.func.grad(f))(*stacked(xs)),
    "grad of vmap": lambda f, xs, ts: torch.func.grad(lambda *x: torch.func.vmap(f)(*x).sum())(
        *stacked(xs)
    ),
}


def stacked(xs: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.stack([x, 0.9 * x]) for x in xs]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_transforms(operation: str, name: str) -> None:
    """Every composition gives what it gives for the loop in plain operations."""
    case = case_of(operation)
    found, truth = (TRANSFORMS[name](loss(x, case), *pair(case)) for x in (chunked, loops))
    assert_same(found, truth)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_jacobians(operation: str) -> None:
    case = case_of(operation)
    xs, _ = pair(case)
    truth = torch.func.jacfwd(function(loops, case))(*xs)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_same(transform(function(chunked, case))(*xs), truth)


@pytest.mark.parametrize("operation", SOME)
def test_a_tangent_over_many_chunks(operation: str) -> None:
    """Forward mode without a transform, with a gradient wanted as well."""
    case = case_of(operation, tokens=70)
    xs, tangents = pair(case)
    found = []
    for module in (chunked, loops):
        inputs = [x.detach().clone().requires_grad_() for x in xs]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
            results = [forward_ad.unpack_dual(x) for x in function(module, case)(*duals)]
            of = [x.tangent.pow(2).sum() for x in results]
            found.append([*(x.tangent for x in results), *torch.autograd.grad(sum(of), inputs)])
    assert_same(*found)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_pack_has_tangents(operation: str) -> None:
    case = make(operation, tokens=7, keys=2, values=2, states=3)
    borders = torch.tensor([0, 4, 4, 7])
    xs, tangents = pair(case)
    found = []
    for module in (chunked, loops):

        def run(*operands: Tensor, module: Any = module) -> tuple[Tensor, ...]:
            made = dict(zip(case.names, operands, strict=True))
            options = replace(case, operands={**case.operands, **made})
            return tuple(call(module, options, cu_seqlens=borders).values())

        found.append(torch.func.jvp(run, xs, tangents))
    assert_same(*found)


@pytest.mark.parametrize(
    "operation",
    [pytest.param(x, marks=[pytest.mark.slow] * (x not in ("delta", "solve"))) for x in OPERATIONS],
)
def test_tangents_in_one_graph(operation: str) -> None:
    """torch.compile sees the tangents that it traces."""
    torch._dynamo.reset()
    case = case_of(operation)
    xs, tangents = pair(case)

    def run(*operands: Tensor) -> Any:
        return torch.func.jvp(function(chunked, case), operands, tangents)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*xs), run(*xs))


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_shapes_on_meta_tensors(operation: str, tokens: int) -> None:
    """Forward and backward on tensors without data give shapes and dtypes of those with data."""
    case = case_of(operation, tokens).cast(torch.bfloat16)
    shapes = []
    for device in ("cpu", "meta"):
        inputs = [x.to(device).requires_grad_() for x in pair(case)[0]]
        results = function(chunked, case)(*inputs)
        of = [x for x in results if x.requires_grad]
        grads = torch.autograd.grad(
            of, inputs, [torch.zeros_like(x) for x in of], materialize_grads=True
        )
        shapes.append([(x.shape, x.dtype) for x in (*results, *grads)])
    assert shapes[0] == shapes[1]
