"""Engines that run a program: `reference`, `chunked`, `triton`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from glazoo.engines import reference
from glazoo.engines.call import Call, Result

__all__ = ["ENGINES", "Engine", "available", "pick"]

Engine = Callable[[Call], Result]

_log = logging.getLogger("glazoo")


def _chunked(call: Call) -> Result:
    from glazoo.engines import chunked, lowered

    return lowered.run(call, chunked)


def _triton(call: Call) -> Result:
    from glazoo.engines import triton

    return triton.run(call)


_ENGINES: dict[str, Engine] = {
    "reference": reference.run,
    "chunked": _chunked,
    "triton": _triton,
}


ENGINES = tuple(_ENGINES)
"""All engines by name."""


def available() -> tuple[str, ...]:
    """Return the names of the engines that run everywhere and in every precision.

    `triton` needs a GPU, or its interpreter, and has no float64.
    """
    return tuple(name for name in _ENGINES if name != "triton")


@functools.cache
def _say(name: str, device: str) -> None:
    _log.info("impl='auto' runs the %s engine on %s", name, device)


def pick(impl: str, call: Call) -> Engine:
    """Return the engine that `impl` names; `auto` is the chunked engine, which serves every program
    and device.

    Raises:
        ValueError: there is no such engine.
    """
    if impl == "auto":
        impl = "chunked"
        if not torch.compiler.is_compiling():
            _say(impl, call.operands["q"].device.type)
    if impl not in _ENGINES:
        raise ValueError(f"impl: got {impl!r}, accepted are {', '.join(('auto', *_ENGINES))}")
    return _ENGINES[impl]
