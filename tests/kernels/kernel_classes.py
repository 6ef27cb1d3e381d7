"""The kernel classes, each with the operands, the loop and the comparisons that its tests need."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from budget import assert_within_budget, witnesses
from kernel_cases import (
    FACTORS,
    assert_matches_loop,
    delta_loop,
    importance_loop,
    linear_loop,
    make_operands,
    riccati_loop,
    riccati_operands,
    solve_loop,
    solve_operands,
    symmetric,
)
from synapse_cases import (
    WIDE,
    assert_matches,
    synapse_delta_loop,
    synapse_delta_operands,
    synapse_loop,
    synapse_operands,
)
from whiten_cases import (
    chosen,
    paired,
    whiten_loop,
    whitened_linear_loop,
    whitened_linear_operands,
)
from whiten_cases import operands as whiten_operands

from glazoo.kernels import (
    delta,
    importance,
    linear,
    riccati,
    solve,
    synapse,
    synapse_delta,
    whiten,
    whitened_linear,
)

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


def lettered(letters: str) -> Callable[..., Any]:
    """What makes operands of these names."""
    return lambda B, at, **x: make_operands(letters, B, at.T, HEADS, at.K, at.V, **x)


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """With queries that are multiplied."""
    return functools.partial(function, scale=0.3)


def single(
    kernel: Callable[..., Any],
    loop: Callable[..., Any],
    make: Callable[..., Any],
    of: Callable[..., Any] = lambda function: function,
) -> dict[str, Any]:
    """How to test a class of one state; of: what its gradients are of."""

    def operands(at: Place, gate: str, B: int = 1, **options: Any) -> dict[str, Any]:
        return make(B, at, gate=gate, **options)

    def compare(
        operands: dict[str, Any], at: Place, kernel_options: Any, loop_options: Any
    ) -> None:
        run = functools.partial(kernel, **kernel_options)
        truth = functools.partial(loop, **loop_options)
        assert_matches_loop(of(run), of(truth), operands, at.dtype, at.device)

    def call(**x: Any) -> list[Any]:
        return list(kernel(**x))

    def truth(**x: Any) -> list[Any]:
        return list(loop(**x))

    return {"operands": operands, "compare": compare, "call": call, "truth": truth}


def double(
    kernel: Callable[..., Any], loop: Callable[..., Any], make: Callable[..., Any], **fixed: Any
) -> dict[str, Any]:
    """How to test a class of two states; h and j name the initial ones."""

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
        assert_matches(*pair, operands, at.dtype, at.device)

    return {
        "operands": operands,
        "compare": compare,
        "call": lambda **x: list(run(**x).values()),
        "truth": lambda **x: list(walked(**x).values()),
    }


CLASSES = {
    "linear": single(scaled(linear), scaled(linear_loop), lettered("qkw")),
    "delta": single(scaled(delta), scaled(delta_loop), lettered("qekw")),
    "importance": single(importance, importance_loop, lettered("kb")),
    "riccati": single(
        riccati, riccati_loop, lambda B, at, **x: riccati_operands(B, at.T, 2, at.K, **x)
    ),
    "whiten": single(
        paired(whiten),
        paired(whiten_loop),
        lambda B, at, **x: whiten_operands(B, at.T, 1, 2, at.K, **x),
    )
    | {
        "call": lambda **x: list(chosen(whiten)(**x)[:2]),
        "truth": lambda **x: list(chosen(whiten_loop)(**x)[:2]),
    },
    "solve": single(
        solve, solve_loop, lambda B, at, **x: solve_operands(B, at.T, 1, 2, at.K, **x), symmetric
    ),
    "whitened_linear": double(
        whitened_linear, whitened_linear_loop, whitened_linear_operands, scale=0.3
    ),
    "synapse": double(synapse, synapse_loop, synapse_operands),
    "synapse_delta": double(synapse_delta, synapse_delta_loop, synapse_delta_operands),
}
STATES = ("initial_state", "h", "j")


def gates(name: str) -> tuple[str, ...]:
    return ("none", "head") if name == "solve" else ("none", "head", "key")


# Options of the classes beyond the default.
OPTIONS = [
    ("linear", {"read": "pre"}),
    ("delta", {"base": "prev"}),
    ("whiten", {"at": "written"}),
    ("whiten", {"at": "previous"}),
    ("whitened_linear", {"read": "pre"}),
    ("whitened_linear", {"keeps": True}),
    ("synapse", {"read": "pre"}),
    ("synapse", {"uncertainty": True}),
    ("synapse_delta", {"base": "prev"}),
    ("synapse_delta", {"gain": "exact"}),
    ("synapse_delta", {"gain": "exact", "correction": "diagonal"}),
    ("synapse_delta", {"uncertainty": True}),
]


def assert_decodes(name: str, gate: str, at: Place) -> None:
    """Token after token from a state, every output and the last states against the loop."""
    of = CLASSES[name]
    operands = of["operands"](at, gate, B=2)
    given = {
        c: None
        if x is None
        else x.to(at.device, torch.float32 if c in (*WIDE, *FACTORS, *STATES) else at.dtype)
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
        # Decoding multiplies in float32 whatever the dtype, except the products of `solve` and
        # queries that another pass divides.
        dtype = at.dtype if name in ("solve", "whitened_linear") else torch.float32
        assert_within_budget(x, truth[i], dtype, witness=witness, name=RESULTS[i])
