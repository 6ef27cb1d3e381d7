"""How operands and states of one spec map to those of another: the maps that equivalences name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glazoo.api import schedule
from glazoo.program import Program
from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.instances import Operands, dims

__all__ = [
    "expand_value_heads",
    "explicit",
    "in_basis",
    "take",
    "take_state",
    "tokens",
    "values_as_heads",
    "values_as_heads_state",
    "with_importance_gate",
]


def take(program: Program, operands: Operands, dim: str, index: Tensor) -> Operands:
    """Selects entries of one axis ("B", "T", "HV", "K" or "V") of every operand that has it.

    "T" moves a token's sub-steps with it; a fixed decay moves with its head.
    """
    out = dict(operands)
    n = program.spec.substeps
    for operand in program.operands:
        if operand.name not in out:
            continue
        x = out[operand.name]
        for axis, name in enumerate(dims(operand, x)):
            if name == dim:
                x = x.index_select(axis, index)
            elif dim == "T" and name == "nT":
                steps = (index[:, None] * n + torch.arange(n)).flatten()
                x = x.index_select(axis, steps)
        out[operand.name] = x
    return out


def take_state(program: Program, state: State, dim: str, index: Tensor) -> State:
    """Selects entries of one axis ("N", "HV", "K" or "V") of every part of a state."""
    parts = state._asdict()
    for part in program.state:
        x = parts[part.name]
        for axis, name in enumerate(part.shape):
            if name == dim and x is not None:
                x = x.index_select(axis, index)
        parts[part.name] = x
    return State(**parts)


def tokens(program: Program, operands: Operands, start: int, end: int) -> Operands:
    """Return the operands of the tokens from `start` to `end` - 1."""
    return take(program, operands, "T", torch.arange(start, end))


def explicit(program: Program, operands: Operands) -> Operands:
    """Fills in the decay of a fixed schedule, so that it can be mapped like other operands."""
    if program.role("decay") is None or "g" in operands:
        return operands
    v = operands["v"]
    return operands | {"g": schedule(program.spec.decay, v.shape[2]).to(v.dtype)}


def expand_value_heads(program: Program, operands: Operands) -> Operands:
    """Repeats query/key heads, so that every value head has its own: head j reads j // (HV / H)."""
    out = dict(operands)
    heads, value_heads = operands["q"].shape[2], operands["v"].shape[2]
    index = torch.arange(value_heads) // (value_heads // heads)
    return take(program, out, "H", index)


def in_basis(spec: Spec, operands: Operands, state: State, *, back: bool = False) -> State:
    """Return a state whose memory is over keys with it over the axes where a spec keeps it, or
    back."""
    if not spec.turned:
        return state
    basis, heads = operands["basis"].to(state.memory.dtype), state.memory.shape[1]
    basis = basis.repeat_interleave(heads // basis.shape[0], 0)
    return state._replace(memory=(basis if back else basis.mT) @ state.memory)


def values_as_heads(program: Program, operands: Operands) -> Operands:
    """Makes every value channel a head of value size one: HV heads become HV V heads."""
    out = explicit(program, expand_value_heads(program, operands))
    size = out["v"].shape[3]
    for operand in program.operands:
        if operand.name not in out:
            continue
        x = out[operand.name]
        names = dims(operand, x)
        if "V" in names:
            x = x.flatten(-2)[..., None]
        elif "HV" in names or "H" in names:
            axis = names.index("HV") if "HV" in names else names.index("H")
            x = x.repeat_interleave(size, axis)
        out[operand.name] = x
    return out


def values_as_heads_state(program: Program, state: State) -> State:
    """Maps a state as `values_as_heads` maps operands."""
    parts = state._asdict()
    value_heads, size = state.memory.shape[1], state.memory.shape[3]
    for part in program.state:
        x = parts[part.name]
        if x is None:
            continue
        if "H" in part.shape:
            x = x.repeat_interleave(value_heads // x.shape[1], 1)
        if part.name == "lag_value":
            x = x.flatten(1)[..., None]
        elif "V" in part.shape:
            x = x.transpose(2, 3).flatten(1, 2)[..., None]
        else:
            x = x.repeat_interleave(size, 1)
        parts[part.name] = x
    return State(**parts)


def with_importance_gate(spec: Spec, shape: Literal["head", "value"]) -> Spec:
    """Return the same spec with an importance gate of another shape."""
    imp = spec.importance
    if imp is None:
        raise ValueError(f"spec: {spec.name!r} has no importance gate")
    gate = imp.gate.model_copy(update={"shape": shape})
    changed = spec.model_copy(update={"importance": imp.model_copy(update={"gate": gate})})
    return Spec.model_validate(changed.model_dump())
