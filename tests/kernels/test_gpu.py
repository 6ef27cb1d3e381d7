"""The kernels on a GPU, in dtypes that the interpreter cannot run and at sizes users run.

Every test also has a tiny case for the interpreter, so that what runs here first on a GPU is the
kernels and not this file.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from kernel_cases import FACTORS
from kernel_classes import CLASSES, OPTIONS, STATES, Place, assert_decodes, gates
from synapse_cases import WIDE


def gpu(dtype: torch.dtype, T: int, K: int, V: int) -> Place:
    return Place("cuda", dtype, T, K, V)


TINY = Place("cpu", torch.float32, 5, 4, 8)
HALF = Place("cpu", torch.float16, 3, 4, 8)


def parameters(*columns: Any) -> list[Any]:
    """Parameters of a test, the place last; those of a GPU are marked."""
    return [
        pytest.param(*x, marks=pytest.mark.gpu if x[-1].device == "cuda" else ()) for x in columns
    ]


def sizes(name: str, gate: str) -> list[Place]:
    """Where the whole of a class is compared; two kinds of borders lie within 300 tokens."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found = [gpu(bf16, 300, 64, 64)]
    if gate != "none":
        found += [gpu(bf16, 150, 128, 128), gpu(f16, 150, 64, 64), gpu(f32, 150, 64, 64)]
    if gate == "head":
        found += [gpu(bf16, 150, K, V) for K, V in ((128, 256), (96, 192), (256, 40))]
        found += [gpu(f32, 150, 128, 128), TINY]
    if gate == gates(name)[-1] and name in ("linear", "synapse"):
        found += [HALF]
    return found


@pytest.mark.parametrize(
    ("name", "gate", "at"),
    parameters(*((n, g, at) for n in CLASSES for g in gates(n) for at in sizes(n, g))),
    ids=str,
)
def test_matches_the_loop(name, gate, at):
    operands = CLASSES[name]["operands"](at, gate, resets=gate != "none")
    CLASSES[name]["compare"](operands, at, {}, {})


@pytest.mark.parametrize(
    ("name", "gate", "at"),
    parameters(
        *((n, g, gpu(torch.bfloat16, 200, 64, 64)) for n in CLASSES for g in gates(n)[1:]),
        *((n, "head", TINY) for n in ("linear", "synapse")),
    ),
    ids=str,
)
def test_packed(name, gate, at):
    ends = torch.tensor([0, 0, at.T // 3, at.T // 3 + 1, at.T // 3 + 1, at.T, at.T])
    operands = CLASSES[name]["operands"](at, gate, sequences=6)
    CLASSES[name]["compare"](operands, at, {"cu_seqlens": ends.to(at.device)}, {"cu_seqlens": ends})


@pytest.mark.parametrize(
    ("name", "options", "gate", "at"),
    parameters(
        *((n, x, g, gpu(torch.bfloat16, 130, 64, 64)) for n, x in OPTIONS for g in gates(n)[1:]),
        *((n, x, "head", TINY) for n, x in OPTIONS if "read" in x or "uncertainty" in x),
    ),
    ids=str,
)
def test_options(name, options, gate, at):
    operands = CLASSES[name]["operands"](at, gate, resets=True)
    CLASSES[name]["compare"](operands, at, options, options)


@pytest.mark.parametrize(
    ("name", "gate", "at"),
    parameters(
        *(
            (n, g, gpu(dtype, 40, 64, 96))
            for n in CLASSES
            for g in gates(n)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ),
        *((n, "head", HALF) for n in CLASSES),
    ),
    ids=str,
)
def test_decoding(name, gate, at):
    assert_decodes(name, gate, at)


@pytest.mark.parametrize(
    ("name", "at"),
    parameters(
        *((n, gpu(torch.bfloat16, 0, 64, 64)) for n in CLASSES),
        *((n, dataclasses.replace(TINY, T=0)) for n in ("linear", "solve")),
    ),
    ids=str,
)
def test_compiled_as_one_graph(name, at):
    torch.compiler.reset()
    of, on_gpu = CLASSES[name], at.device == "cuda"
    backend = "inductor" if on_gpu else "aot_eager"
    compiled = torch.compile(
        lambda **x: of["call"](**x), fullgraph=True, dynamic=True, backend=backend
    )
    for T in (65, 130) if on_gpu else (2,):
        operands = of["operands"](dataclasses.replace(at, T=T), "head")
        given = {
            c: x.to(at.device, torch.float32 if c in (*WIDE, *FACTORS, *STATES, "b") else at.dtype)
            for c, x in operands.items()
            if x is not None
        }
        found = []
        for run in (of["call"], compiled):
            leaves = {c: x.clone().requires_grad_() for c, x in given.items()}
            results = run(**leaves)
            loss = sum(x.float().sum() for x in results)
            found.append([*results, *torch.autograd.grad(loss, [*leaves.values()])])
        for x, y in itertools.zip_longest(*found):
            # The compiler may round what lies between kernels once more or less.
            assert x.dtype == y.dtype
            assert (x - y).norm() <= 4 * torch.finfo(at.dtype).eps * x.norm()
