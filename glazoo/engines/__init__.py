"""Engines that run a program: `reference`, `chunked`, `compiled`, `traceable`, `triton`, `fla`."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glazoo import program
from glazoo.engines import reference
from glazoo.engines.call import Call, Given, Result, TokenRun
from glazoo.kernels.register import plain, wants_derivative
from glazoo.program import OneToken
from glazoo.spec import Importance
from glazoo.state import State

__all__ = [
    "NAMES",
    "Engine",
    "automatic",
    "available",
    "importance_gate",
    "pick",
    "prepare",
]

Engine = Callable[[Call], Result]

_log = logging.getLogger("glazoo")


def _chunked(call: Call) -> Result:
    from glazoo.engines import chunked, lowered

    return lowered.run(call, chunked)


def _compiled(call: Call) -> Result:
    device = call.operands["q"].device.type
    if device != "cpu":
        raise ValueError(
            f"impl='compiled': the operands are on {device}; accepted are CPU tensors "
            "(impl='chunked' runs on any device)"
        )
    if not _HAS_NUMBA:
        raise ValueError(
            "impl='compiled': numba is not installed; pip install 'glazoo[cpu]', or "
            "impl='chunked', which needs nothing"
        )
    from glazoo.engines import compiled, lowered

    return lowered.run(call, compiled)


def _traceable(call: Call) -> Result:
    from glazoo.engines import lowered, traceable

    return lowered.run(call, traceable)


def _triton(call: Call) -> Result:
    from glazoo.engines import triton

    return triton.run(call)


def _fla(call: Call) -> Result:
    from glazoo.engines import fla

    return fla.run(call)


_ENGINES: dict[str, Engine] = {
    "reference": reference.run,
    "chunked": _chunked,
    "compiled": _compiled,
    "traceable": _traceable,
    "triton": _triton,
    "fla": _fla,
}

NAMES = tuple(_ENGINES)
"""What `impl` may be, besides "auto"."""


def _chunked_token(call: Call, given: Given, piece: OneToken) -> TokenRun | None:
    from glazoo.engines.chunked.token import token

    return token(call, given, piece)


def _compiled_token(call: Call, given: Given, piece: OneToken) -> TokenRun | None:
    from glazoo.engines.compiled.step import token

    return token(call, given, piece)


_TOKENS: dict[str, Callable[[Call, Given, OneToken], TokenRun | None]] = {
    "chunked": _chunked_token,
    "compiled": _compiled_token,
}


# Asked once: a compiler that captures a call cannot look for packages.
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def available() -> tuple[str, ...]:
    """Return the names of the engines that compute on a CPU here, in every precision.

    `triton` and `fla` need a GPU, or Triton's interpreter, and have no float64; `compiled` needs
    numba; `traceable` is for graphs that other programs run.
    """
    missing = {"traceable", "triton", "fla"} | (set() if _HAS_NUMBA else {"compiled"})
    return tuple(name for name in _ENGINES if name not in missing)


def automatic(device: str) -> str:
    """Return the name of the engine that `impl="auto"` is on a device."""
    return program.automatic(device, numba=_HAS_NUMBA)


@functools.cache
def _say(name: str, device: str) -> None:
    _log.info("impl='auto' runs the %s engine on %s", name, device)


def pick(impl: str, call: Call) -> Engine:
    """Return the engine that `impl` names; `auto` is the chunked engine, which serves every program
    and device, on a CPU with numba the compiled one, which is as general there.

    Raises:
        ValueError: there is no such engine.
    """
    if impl == "auto":
        device = call.operands["q"].device.type
        impl = automatic(device)
        if not torch.compiler.is_compiling():
            _say(impl, device)
    if impl not in _ENGINES:
        raise ValueError(f"impl: got {impl!r}, accepted are {', '.join(('auto', *_ENGINES))}")
    return _ENGINES[impl]


def prepare(impl: str, call: Call, given: Given) -> TokenRun | None:
    """Prepare a token of decoding where an engine has it in one piece.

    Args:
        impl: as for `pick`.
        call: a valid call.
        given: the operands that it was made of.

    Returns:
        What runs calls like it, and gives None where a derivative may be asked for, or something
        looks at the operations that run; None, if the engine has a token in many pieces.
    """
    q, piece = call.operands["q"], call.program.piece
    if piece is None or q.shape[1] != 1 or call.cu_seqlens is not None or q.device.type != "cpu":
        return None
    name = automatic("cpu") if impl == "auto" else impl
    make = None if name == "compiled" and not _HAS_NUMBA else _TOKENS.get(name)
    run = None if make is None else make(call, given, piece)
    if run is None:
        return None

    def undisturbed(given: Given, state: State | None) -> Result | None:
        tensors = (*given.values(), *(state or ()))
        return run(given, state) if plain(tensors) and not wants_derivative(*tensors) else None

    return undisturbed


def importance_gate(
    impl: str,
    spec: Importance,
    x: Tensor,
    write: Tensor | None,
    k: Tensor | None,
    parameters: Sequence[Tensor | None],
    most: float,
) -> Tensor | None:
    """Compute the importance gate of a token of decoding where an engine has it in one piece.

    Args:
        impl: as for `pick`.
        spec: the importance.
        x: [B, T, D], the layer's input.
        write: the write gate, [B, n T, HV] or [B, n T, HV, V], or None for one.
        k: keys, [B, n T, H, K].
        parameters: b_down, b_up, b_bias, b_scale of the gate.
        most: the largest precision that one token adds.

    Returns:
        b; None, if it is to be computed in PyTorch.
    """
    if not _HAS_NUMBA or impl not in ("auto", "compiled") or x.dim() != 3 or x.shape[1] != 1:
        return None
    given = (x, write, k, *parameters)
    if not plain(given) or wants_derivative(*given) or torch.is_autocast_enabled("cpu"):
        return None
    return _compiled_gate()(spec, x, write, k, parameters, most)


@functools.cache
def _compiled_gate() -> Callable[..., Tensor | None]:
    from glazoo.engines.compiled.gate import importance_gate

    return importance_gate
