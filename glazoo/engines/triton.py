"""The Triton engine: the core operations of `glazoo.kernels`."""

from __future__ import annotations

import os
import sys

import torch

from glazoo.engines import lowered
from glazoo.engines.call import Call, Result

__all__ = ["interpret", "run", "runnable"]


def runnable() -> bool:
    """Return whether kernels can run here: on a GPU, or on a CPU in Triton's interpreter."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def interpret() -> None:
    """Runs the kernels of this process in Triton's interpreter where there is no GPU.

    Raises:
        ValueError: Triton was imported before, as its compiler.
    """
    if runnable():
        return
    if "triton" in sys.modules:
        raise ValueError(
            "impl='triton': there is no GPU, and Triton was imported as a compiler already; set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def run(call: Call) -> Result:
    """Runs a program on the GPU kernels.

    Raises:
        ValueError: float64 operands, operands on a CPU without the interpreter, or no Triton.
    """
    if call.compute_dtype == torch.float64:
        raise ValueError(
            "impl='triton': got float64 operands; accepted are float32, float16 and bfloat16 "
            "(impl='chunked' runs float64)"
        )
    device = call.operands["q"].device.type
    if device == "cpu" and not runnable():
        raise ValueError(
            "impl='triton': the operands are on a CPU; accepted are GPU tensors, or, with "
            "TRITON_INTERPRET=1 set before Python starts, CPU tensors"
        )
    try:
        import triton  # noqa: F401
    except ImportError as e:
        raise ValueError("impl='triton': Triton is not installed; pip install triton") from e
    from glazoo import kernels

    return lowered.run(call, kernels, _tokens(call))


def _tokens(call: Call) -> torch.dtype:
    """Return the dtype in which kernels take the tokens: that in which they came, if it can be.

    Kernels accumulate in float32 and keep float32 states whatever the tokens' dtype.
    """
    dtype = lowered.token_dtype(call)
    interpreted = call.operands["q"].device.type == "cpu"
    if dtype == torch.bfloat16 and interpreted:
        # Triton's interpreter computes bfloat16 wrongly, and silently so.
        return torch.float32
    if dtype == torch.float16 and call.program.spec.read.normalizer != "none":
        # Numerator and normaliser grow with the tokens beyond float16, and only their quotient is
        # bounded.
        return torch.float32
    return dtype
