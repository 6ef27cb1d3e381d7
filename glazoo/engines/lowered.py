"""Runs the steps of a program on the core operations of an engine.

`chunked` and `triton` share this module; they differ in the core operations that they hand to
`run`, and in the dtype in which these take their tokens (q, k, v and what follows from them).
"""

from __future__ import annotations

import functools

import torch

from glazoo.engines.call import Call, Result
from glazoo.kernels.loops import without_autocast
from glazoo.program import Core
from glazoo.program.env import Env, Values
from glazoo.state import State

__all__ = ["run", "token_dtype"]


def token_dtype(call: Call) -> torch.dtype:
    """Return the narrowest dtype that holds the tokens of a call as they came."""
    tokens = [call.operands[o.name].dtype for o in call.program.operands if not o.wide]
    return functools.reduce(torch.promote_types, tokens)


def run(call: Call, core: Core, dtype: torch.dtype | None = None) -> Result:
    """Run a program on the given core operations.

    Args:
        call: the validated call.
        core: the engine's core operations.
        dtype: dtype in which these take their tokens; the compute dtype if None.

    Returns:
        Output [B, T, HV, V], state, and uncertainty if asked for.
    """
    wide = call.compute_dtype
    narrow = wide if dtype is None else dtype
    x = {}
    for operand in call.program.operands:
        given, dtype = call.operands[operand.name], wide if operand.wide else narrow
        # What a token of decoding costs is its calls.
        x[operand.name] = given if given.dtype == dtype else given.to(dtype)
    with without_autocast(x["q"]):
        if "g" in x and x["g"].ndim == 1:
            x["g"] = x["g"].expand(*x["q"].shape[:2], -1)
        if call.initial_state is not None:
            parts = call.initial_state._asdict()
            x |= {name: part for name, part in parts.items() if part is not None}
        values = Values(x)
        if call.scale != 1:
            values.postpone("q", x["q"], scale=call.scale)
        env = Env(values, core, narrow, wide, call.cu_seqlens, call.uncertainty)
        if call.spread is not None:
            env = call.spread(env)
        for step in call.program.steps:
            step.run(env)
    state = State(values["memory"], *(values.get(name) for name in State._fields[1:]))
    uncertainty = values.get("uncertainty")
    return Result(values["y"], state, None if uncertainty is None else uncertainty.to(wide))
