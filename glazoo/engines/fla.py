"""The engine fla: whole recurrences on the kernels of flash-linear-attention, where it has them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glazoo.engines.call import Call, Result
from glazoo.engines.lowered import token_dtype
from glazoo.engines.triton import runnable
from glazoo.errors import extra
from glazoo.program import Kernel
from glazoo.spec import Erase
from glazoo.state import State

__all__ = ["run"]


class _Function(NamedTuple):
    """A function of fla.ops, which takes q, k, v and, by name, what a spec has."""

    module: str
    name: str
    shares_keys: bool
    """Whether fewer query and key heads than value heads are accepted."""


# By kernel class and shape of the decay.
_FUNCTIONS: dict[tuple[Kernel, str], _Function] = {
    (Kernel.LINEAR, "none"): _Function("simple_gla", "chunk_simple_gla", False),
    (Kernel.LINEAR, "head"): _Function("simple_gla", "chunk_simple_gla", False),
    (Kernel.LINEAR, "key"): _Function("gla", "chunk_gla", False),
    # chunk_delta_rule takes no float32.
    (Kernel.DELTA, "none"): _Function("gated_delta_rule", "chunk_gated_delta_rule", True),
    (Kernel.DELTA, "head"): _Function("gated_delta_rule", "chunk_gated_delta_rule", True),
    (Kernel.DELTA, "key"): _Function("kda", "chunk_kda", True),
}


def _found(call: Call) -> _Function:
    """Return the function that computes a program.

    Raises:
        ValueError: there is none.
    """
    spec, kernel = call.program.spec, call.program.kernel
    plain = (
        spec.posterior.precision == "frozen"
        and spec.posterior.gain == "first_order"
        and (spec.read.when, spec.read.normalizer, spec.steps.count) == ("post", "none", 1)
        and spec.key == "operand"
        and spec.erase == Erase()
        and (kernel is Kernel.LINEAR or spec.write.shape == "head")
    )
    found = _FUNCTIONS.get((kernel, spec.decay.shape)) if plain else None
    if found is None:
        raise ValueError(
            f"impl='fla': {spec.name!r} is no recurrence of flash-linear-attention's kernels; "
            "accepted are Hebbian memories and delta rules without importance, with one write a "
            "token, read after it, and a decay per head, per key or none (impl='chunked' runs all)"
        )
    return found


def run(call: Call) -> Result:
    """Runs a program on one function of fla.ops.

    Raises:
        ValueError: fla has no function for the program, or cannot run here; float64 operands; an
            uncertainty is asked for.
        ImportError: flash-linear-attention is not installed.
    """
    function, ops, spec = _found(call), call.operands, call.program.spec
    q, k, v, beta = ops["q"], ops["k"], ops["v"], ops.get("beta")
    if call.compute_dtype == torch.float64:
        raise ValueError("impl='fla': got float64 operands; accepted are float32 and narrower ones")
    if q.device.type == "cpu" and not runnable():
        raise ValueError(
            "impl='fla': the operands are on a CPU; accepted are GPU tensors, or, with "
            "TRITON_INTERPRET=1 set before Python starts, CPU tensors"
        )
    if call.uncertainty:
        raise ValueError("impl='fla': gives no uncertainty; impl='chunked' does")
    with extra("fla"):
        module = importlib.import_module(f"fla.ops.{function.module}")
    compute: Callable[..., tuple[Tensor, Tensor]] = getattr(module, function.name)
    dtype = token_dtype(call)
    given: dict[str, Any] = {}
    if beta is not None and spec.hebbian:
        v = beta.to(v.dtype) * v if beta.ndim == v.ndim else beta[..., None].to(v.dtype) * v
    elif beta is not None:
        given["beta"] = beta.to(dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if not function.shares_keys:
        q, k = (x.repeat_interleave(call.groups, 2) for x in (q, k))
    if "g" in ops:
        g = ops["g"].float()
        g = g.expand(*v.shape[:2], -1) if g.ndim == 1 else g
        given["g"] = g
    elif not spec.hebbian:
        given["g"] = v.new_zeros(v.shape[:3], dtype=torch.float32)
    start = None if call.initial_state is None else call.initial_state.memory
    if v.shape[1] == 0:
        sequences = v.shape[0] if call.cu_seqlens is None else len(call.cu_seqlens) - 1
        zeros = v.new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
        return Result(v.to(call.compute_dtype), State(zeros if start is None else start), None)
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.long()
    output, final = compute(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        **given,
        scale=call.scale,
        initial_state=start,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return Result(output, State(final), None)
