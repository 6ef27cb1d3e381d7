"""Operands, calls and comparisons for the tests of the core operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses
from hypothesis import strategies as st
from torch import Tensor

from glazoo.engines import available, chunked

OPERATIONS = ("linear", "delta", "importance", "synapse", "synapse_delta", "solve", "riccati")
# Modules of core operations, and the operations that each has of its own.
CORES: list[tuple[ModuleType, str]] = [(chunked, name) for name in OPERATIONS]
if "compiled" in available():
    from glazoo.engines import compiled

    CORES += [(compiled, x) for x in ("importance", "riccati", "synapse", "synapse_delta")]
POSITIONAL = {
    "linear": ("q", "k", "w", "g"),
    "delta": ("q", "e", "k", "w", "g"),
    "importance": ("k", "b", "g"),
    "synapse": ("q", "k", "w", "b", "g"),
    "synapse_delta": ("q", "k", "v", "beta", "b", "g"),
    "solve": ("q", "k", "beta", "g"),
    "riccati": ("a", "c", "d", "u"),
}
KEYWORD = {
    "synapse": ("prior",),
    "synapse_delta": ("e", "prior"),
    "solve": ("prior",),
}
STATES = {
    "linear": ("s",),
    "delta": ("s",),
    "importance": ("s",),
    "synapse": ("h", "j"),
    "synapse_delta": ("h", "j"),
    "solve": ("m",),
    "riccati": ("s",),
}
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "linear": {"read": ("post", "pre")},
    "delta": {"base": ("decayed", "prev")},
    "importance": {},
    "synapse": {"read": ("post", "pre"), "uncertainty": (False, True)},
    "synapse_delta": {
        "rule": (
            ("first_order", "full"),
            ("exact", "full"),
            ("exact", "diagonal"),
            ("exact_rate", "full"),
        ),
        "base": ("decayed", "prev"),
        "uncertainty": (False, True),
    },
    "solve": {},
    "riccati": {},
}
# What stays in float32 when queries, keys and values are in a 16-bit dtype.
GATES = ("g", "b", "beta", "prior", "a", "c", "d", "u", "s", "h", "j", "m")


def each_core(*operations: str) -> pytest.MarkDecorator:
    """Run a test of `core` and `operation` for every engine that has an operation of its own."""
    pairs = [x for x in CORES if x[1] in (operations or OPERATIONS)]
    names = [f"{core.__name__.rpartition('.')[2]}-{name}" for core, name in pairs]
    return pytest.mark.parametrize(("core", "operation"), pairs, ids=names)


@dataclass
class Case:
    """One call of a core operation: float64 operands by name (None where absent) and options."""

    operation: str
    operands: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for name, x in self.operands.items() if x is not None]

    def cast(self, dtype: torch.dtype) -> Case:
        """The operands in dtype, gates and states in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        cast = {
            name: None if x is None else x.to(wide if name in GATES else dtype)
            for name, x in self.operands.items()
        }
        return replace(self, operands=cast)

    def double(self) -> Case:
        cast = {name: None if x is None else x.double() for name, x in self.operands.items()}
        return replace(self, operands=cast)


def call(module: ModuleType, case: Case, **extra: Any) -> dict[str, Tensor]:
    """Outputs by name: out, the final states, doubt."""
    x = case.operands
    name = case.operation
    options = dict(case.options)
    rule = options.pop("rule", None)
    if rule is not None:
        options["gain"], options["correction"] = rule
    keyword = {key: x.get(key) for key in KEYWORD.get(name, ())}
    states = [x.get(key) for key in STATES[name]]
    state: Any = None
    if states[0] is not None:
        state = states[0] if len(states) == 1 else tuple(states)
    found = getattr(module, name)(
        *(x.get(key) for key in POSITIONAL[name]),
        **keyword,
        **options,
        initial_state=state,
        **extra,
    )
    out, final, *doubt = found
    finals = (final,) if isinstance(final, Tensor) else final
    named = {"out": out}
    named.update({f"final {key}": y for key, y in zip(STATES[name], finals, strict=True)})
    if doubt and doubt[0] is not None:
        named["doubt"] = doubt[0]
    return named


def with_gradients(module: ModuleType, case: Case, **extra: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of all operands for fixed cotangents of all outputs."""
    leaves = {
        name: None if x is None else x.detach().requires_grad_()
        for name, x in case.operands.items()
    }
    found = call(module, replace(case, operands=leaves), **extra)
    given = [leaves[name] for name in case.names]
    results = [y for y in found.values() if y.requires_grad]
    # The same numbers in every dtype and run, representable in bfloat16.
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64)
        .bfloat16()
        .to(device=y.device, dtype=y.dtype)
        for y in found.values()
    ]
    pairs = [c for c, y in zip(cotangents, found.values(), strict=True) if y.requires_grad]
    gradients: Any = [None] * len(given)
    if results:
        gradients = torch.autograd.grad(results, given, pairs, allow_unused=True)
    named = dict(found)
    for name, x, gradient in zip(case.names, given, gradients, strict=True):
        assert x is not None
        named[f"d{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return {name: y.detach() for name, y in named.items()}


def delta_at_once(q, e, k, w, g=None, *, initial_state=None, base="decayed"):
    """The delta rule as one triangular system over all tokens, another way to round it."""
    batch, tokens, heads, size = w.shape
    q, e, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, e, k))
    keys = k.shape[3]
    state = w.new_zeros(batch, heads, keys, size) if initial_state is None else initial_state
    # between[t][:, :, j]: product of the decays of tokens j .. t, of j = 0 .. t + 1
    row = w.new_ones(batch, heads, 1, keys)
    between = [row]
    for t in range(tokens):
        decay = row.new_ones(())
        if g is not None:
            decay = g[:, t].exp().view(batch, heads, 1, -1)
        row = torch.cat((row * decay, w.new_ones(batch, heads, 1, keys)), dim=2)
        between.append(row)
    reads, system, start = [], [], []
    for t in range(tokens):
        key = k[:, : t + 1].transpose(1, 2)
        past = between[t + 1] if base == "decayed" else between[t]
        erase = (past[:, :, 1 : t + 1] * key[:, :, :t] * e[:, t].unsqueeze(2)).sum(-1)
        read = (between[t + 1][:, :, 1 : t + 2] * key * q[:, t].unsqueeze(2)).sum(-1)
        system.append(torch.nn.functional.pad(erase, (0, tokens - t)))
        reads.append(torch.nn.functional.pad(read, (0, tokens - t - 1)))
        start.append(past[:, :, 0] * e[:, t])
    if not tokens:
        return w, state
    right = w.transpose(1, 2) - torch.stack(start, 2) @ state
    matrix = torch.stack(system, 2)[..., :tokens] + torch.eye(tokens, dtype=w.dtype)
    errors = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
    first = torch.stack([between[t + 1][:, :, 0] * q[:, t] for t in range(tokens)], 2)
    out = torch.stack(reads, 2) @ errors + first @ state
    tail = between[tokens][:, :, 1:] * k.transpose(1, 2)
    final = between[tokens][:, :, 0].unsqueeze(-1) * state + tail.transpose(-1, -2) @ errors
    return out.transpose(1, 2), final


def compare(
    actual: dict[str, Tensor], loops: ModuleType, case: Case, dtype: torch.dtype, **extra: Any
) -> None:
    """Every output and gradient of `actual` is within its budget of the float64 loop."""
    exact = case.double()
    truth = with_gradients(loops, exact, **extra)

    def plain(module: Any) -> Callable[..., list[Tensor]]:
        def run(*operands: Tensor) -> list[Tensor]:
            made = dict(zip(exact.names, operands, strict=True))
            noisy = replace(exact, operands={**exact.operands, **made})
            return list(with_gradients(module, noisy, **extra).values())

        return run

    given = [exact.operands[name] for name in exact.names]
    runs = witnesses(plain(loops), given)
    if case.operation == "delta" and not extra:
        runs += witnesses(plain(SimpleNamespace(delta=delta_at_once)), given, runs=1)
    wide = torch.promote_types(dtype, torch.float32)
    assert list(actual) == list(truth)
    for i, (name, value) in enumerate(truth.items()):
        witness = [run[i] for run in runs]
        assert_within_budget(actual[name], value, wide, witness=witness, name=name)


def uniform(*shape: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def make(
    operation: str,
    *,
    batch: int = 1,
    tokens: int = 8,
    heads: int = 1,
    share: int = 1,
    wide: tuple[str, ...] = (),
    keys: int = 4,
    values: int = 3,
    gate: str | None = "head",
    strength: float = 1.0,
    states: int | None = None,
    prior: str = "key",
    write: str = "head",
    eraser: bool = False,
    noise: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A case with random operands of sensible size.

    Args:
        operation: name of the core operation.
        batch, tokens, heads, keys, values: B, T, H, K, V.
        share: value heads per key head.
        wide: operands among q, k, e that have a head per value head.
        gate: None, "head" or "key", the shape of the log decay.
        strength: largest decay rate -g.
        states: number of sequences of the initial states; None is no initial state.
        prior: "head" or "key"; write: "head" or "value", the shape of synapse_delta's beta.
        eraser: synapse_delta gets erase keys of its own.
        noise: riccati adds a noise of its own, not what keeps the prior.
        options: options of the operation.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def count(name: str) -> int:
        return heads * share if name in wide else heads

    full_heads = heads * share
    lead = (batch, tokens, full_heads)
    unit_keys = torch.nn.functional.normalize(
        normal(batch, tokens, full_heads, keys), dim=-1, eps=1e-6
    )
    x: dict[str, Tensor | None] = {
        "q": normal(batch, tokens, count("q"), keys),
        "k": unit_keys[:, :, : count("k")].clone(),
        "w": normal(*lead, values),
    }
    if gate is None:
        x["g"] = None
    else:
        shape = lead if gate == "head" else (*lead, keys)
        x["g"] = -strength * torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    rate = uniform(batch, tokens, 1, 1, generator=generator, low=0.1, high=1)
    if operation == "delta":
        x["e"] = rate * unit_keys[:, :, : count("e")] + 0.05 * normal(
            batch, tokens, count("e"), keys
        )
    if operation == "importance":
        x["b"] = uniform(*lead, generator=generator, low=0, high=1)
    if operation in ("synapse", "synapse_delta"):
        x["b"] = uniform(*lead, values, generator=generator, low=0, high=1)
    if operation in ("synapse", "synapse_delta", "solve"):
        size = (full_heads,) if prior == "head" and operation != "solve" else (full_heads, keys)
        x["prior"] = uniform(*size, generator=generator, low=0.5, high=2)
    if operation == "synapse_delta":
        x["v"] = x.pop("w")
        size = lead if write == "head" else (*lead, values)
        x["beta"] = uniform(*size, generator=generator, low=0.1, high=1)
        x["e"] = None
        if eraser:
            apart = 0.05 * normal(batch, tokens, count("e"), keys)
            x["e"] = unit_keys[:, :, : count("e")] + apart
    if operation == "solve":
        x["beta"] = uniform(*lead, generator=generator, low=0, high=1)
        del x["w"]
    if operation == "importance":
        del x["q"], x["w"]
    if operation == "riccati":
        one = torch.ones(*lead, 1, dtype=torch.float64)
        keep = one if x["g"] is None else x["g"].exp().view(*lead, 1 if gate == "head" else keys)
        added = uniform(*keep.shape, generator=generator, low=0.1, high=1)
        u = unit_keys.square() * uniform(*lead, 1, generator=generator, low=0, high=1)
        x = {"a": keep, "c": (1 - keep) * added, "d": one, "u": u}
        if noise:
            x = {"a": one, "c": added, "d": keep, "u": u}
    if states is not None:
        cell = (states, full_heads, keys)
        if operation in ("importance", "riccati"):
            x["s"] = uniform(*cell, generator=generator, low=0, high=1)
        elif operation == "solve":
            root = normal(*cell, keys)
            x["m"] = root @ root.transpose(-1, -2)
        else:
            first = normal(*cell, values)
            x[STATES[operation][0]] = first
            if operation in ("synapse", "synapse_delta"):
                x["j"] = uniform(*cell, values, generator=generator, low=0, high=1)
    return Case(operation, x, options)


@st.composite
def cases(draw: st.DrawFn, operation: str, longest: int = 140, packed: bool = False) -> Case:
    """Cases over shapes, gates and options; T around multiples of the chunk sizes included."""
    borders = [t for t in (0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 130) if t <= longest]
    tokens = draw(st.one_of(st.sampled_from(borders), st.integers(0, longest)))
    readers = {"importance": ("k",), "delta": ("q", "e", "k")}.get(operation, ("q", "k"))
    gates = (None, "head") if operation == "solve" else (None, "head", "key")
    batch = 1 if packed else draw(st.integers(1, 2))
    options = {name: draw(st.sampled_from(choices)) for name, choices in OPTIONS[operation].items()}
    return make(
        operation,
        batch=batch,
        tokens=tokens,
        heads=draw(st.integers(1, 2)),
        share=draw(st.integers(1, 3)),
        wide=tuple(name for name in readers if draw(st.booleans())),
        keys=draw(st.sampled_from((1, 3, 8))),
        values=draw(st.sampled_from((1, 2, 5))),
        gate=draw(st.sampled_from(gates)),
        strength=draw(st.sampled_from((0.01, 1.0, 20.0))),
        states=batch if not packed and draw(st.booleans()) else None,
        prior=draw(st.sampled_from(("head", "key"))),
        write=draw(st.sampled_from(("head", "value"))),
        eraser=draw(st.booleans()),
        noise=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
        **options,
    )
