"""The kernels on a GPU, in dtypes that the interpreter cannot run and at sizes users run.

Every test also has a tiny case for the interpreter, so that what runs here first on a GPU is the
kernels and not this file.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses
from kernel_cases import (
    assert_matches_loop,
    delta_loop,
    importance_loop,
    linear_loop,
    make_operands,
)
from synapse_cases import (
    WIDE,
    assert_matches,
    full_loop,
    full_operands,
    symmetric,
    synapse_delta_loop,
    synapse_delta_operands,
    synapse_loop,
    synapse_operands,
)

from glazoo.kernels import delta, full, importance, linear, synapse, synapse_delta

HEADS = {"q": 2, "e": 1, "k": 1, "w": 2}
RESULTS = ("output", "final state", "final importance", "uncertainty")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a test runs, and at which size."""

    device: str
    dtype: torch.dtype
    T: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"{self.device}-{str(self.dtype)[6:]}-{self.T}-{self.K}-{self.V}"


def gpu(dtype: torch.dtype, T: int, K: int, V: int) -> Place:
    return Place("cuda", dtype, T, K, V)


TINY = Place("cpu", torch.float32, 5, 4, 8)
HALF = Place("cpu", torch.float16, 3, 4, 8)


def single(kernel: Callable[..., Any], letters: str) -> dict[str, Any]:
    """How to test a class of one state."""
    loop = {linear: linear_loop, delta: delta_loop, importance: importance_loop}[kernel]

    def operands(at: Place, gate: str, B: int = 1, **options: Any) -> dict[str, Any]:
        return make_operands(letters, B, at.T, HEADS, at.K, at.V, gate=gate, **options)

    def compare(
        operands: dict[str, Any], at: Place, kernel_options: Any, loop_options: Any
    ) -> None:
        run = functools.partial(kernel, **kernel_options)
        truth = functools.partial(loop, **loop_options)
        assert_matches_loop(run, truth, operands, at.dtype, at.device)

    def call(**x: Any) -> list[Any]:
        return list(kernel(**x))

    def truth(**x: Any) -> list[Any]:
        return list(loop(**x))

    return {"operands": operands, "compare": compare, "call": call, "truth": truth}


def double(
    kernel: Callable[..., Any], loop: Callable[..., Any], make: Callable[..., Any], **fixed: Any
) -> dict[str, Any]:
    """How to test a class of two states; h and j name the initial ones."""
    of = symmetric if kernel is full else lambda function: function

    def operands(at: Place, gate: str, B: int = 1, **options: Any) -> dict[str, Any]:
        return make(B, at.T, 1, 2, at.K, at.V, gate=gate, **options)

    def run(h: Any = None, j: Any = None, **x: Any) -> dict[str, Any]:
        o, states, u = kernel(**x, **fixed, initial_state=None if h is None else (h, j))
        return dict(zip(RESULTS, [o, *states] if u is None else [o, *states, u], strict=False))

    def walked(**x: Any) -> dict[str, Any]:
        return dict(zip(RESULTS, loop(**x, **fixed).values(), strict=False))

    def compare(
        operands: dict[str, Any], at: Place, kernel_options: Any, loop_options: Any
    ) -> None:
        pair = functools.partial(run, **kernel_options), functools.partial(walked, **loop_options)
        assert_matches(of(pair[0]), of(pair[1]), operands, at.dtype, at.device)

    return {
        "operands": operands,
        "compare": compare,
        "call": lambda **x: list(run(**x).values()),
        "truth": lambda **x: list(walked(**x).values()),
    }


CLASSES = {
    "linear": single(linear, "qkw"),
    "delta": single(delta, "qekw"),
    "importance": single(importance, "kb"),
    "synapse": double(synapse, synapse_loop, synapse_operands),
    "synapse_delta": double(synapse_delta, synapse_delta_loop, synapse_delta_operands),
    "full": double(full, full_loop, full_operands),
}
STATES = ("initial_state", "h", "j")


def gates(name: str) -> tuple[str, ...]:
    return ("none", "head") if name == "full" else ("none", "head", "key")


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


OPTIONS = [
    ("linear", {"read": "pre"}),
    ("delta", {"base": "prev"}),
    ("synapse", {"read": "pre"}),
    ("synapse", {"uncertainty": True}),
    ("synapse_delta", {"base": "prev"}),
    ("synapse_delta", {"gain": "exact"}),
    ("synapse_delta", {"gain": "exact", "correction": "diagonal"}),
    ("synapse_delta", {"uncertainty": True}),
    ("full", {"uncertainty": True}),
]


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
    """Token after token from a state, every output and the last states against the loop."""
    of = CLASSES[name]
    operands = of["operands"](at, gate, B=2)
    given = {
        c: None
        if x is None
        else x.to(at.device, torch.float32 if c in (*WIDE, *STATES) else at.dtype)
        for c, x in operands.items()
    }
    exact = {c: None if x is None else x.double() for c, x in given.items()}
    truth = of["truth"](**exact)
    names = [c for c, x in exact.items() if x is not None]

    def plain(*xs: Any) -> list[Any]:
        low = dict(zip(names, (x.to(at.device) for x in xs), strict=True))
        return of["truth"](**(dict.fromkeys(exact) | low))

    seen = witnesses(plain, [exact[c].cpu() for c in names])
    kept = [c for c in STATES if given.get(c) is not None]
    fixed = {c: given.pop(c) for c in (*kept, "prior") if c in given}
    outputs = []
    for t in range(at.T):
        token = {c: None if x is None else x[:, t : t + 1] for c, x in given.items()}
        with torch.no_grad():
            o, *states = of["call"](**token, **fixed)
        fixed |= dict(zip(kept, states, strict=True))
        outputs.append(o)
    for i, x in enumerate([torch.cat(outputs, 1), *states]):
        witness = [run[i] for run in seen]
        # Decoding multiplies in float32 whatever the dtype, except the queries of `full`.
        dtype = at.dtype if name == "full" else torch.float32
        assert_within_budget(x, truth[i], dtype, witness=witness, name=RESULTS[i])


@pytest.mark.parametrize(
    ("name", "at"),
    parameters(
        *((n, gpu(torch.bfloat16, 0, 64, 64)) for n in CLASSES),
        *((n, dataclasses.replace(TINY, T=0)) for n in ("linear", "full")),
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
            c: x.to(at.device, torch.float32 if c in (*WIDE, *STATES, "b") else at.dtype)
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
