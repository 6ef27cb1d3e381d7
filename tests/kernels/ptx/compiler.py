"""Compiles launches to PTX in a process of its own.

Triton decides at its import whether it interprets or compiles, and the tests' process interprets.
So `Compiler` starts this file as a script, which answers requests by the installed Triton.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import pickle
import subprocess
import sys
import traceback
from typing import Any

import torch
from torch import Tensor

BENCHMARKS = pathlib.Path(__file__).parents[3] / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor as far as it decides the machine code."""

    dtype: torch.dtype
    misalignment: int


@dataclasses.dataclass(frozen=True)
class Request:
    """A launch as far as it decides the machine code."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    target: str = "sm_80"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """PTX, bytes of shared memory, and the arguments that become parameters, in order."""

    ptx: str
    shared: int
    parameters: tuple[str, ...]


def request(launch: Any, target: str) -> Request:
    """What to ask for a launch, a `glazoo.kernels.common.Launch`, on "sm_80" or "sm_90"."""
    arguments = tuple(
        (name, Operand(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x)
        for name, x in sorted(launch.arguments.items())
    )
    kernel = launch.kernel.fn
    tiles = launch.tiles
    warps, stages = tiles.num_warps, tiles.num_stages
    return Request(kernel.__module__, kernel.__name__, arguments, warps, stages, target)


class Compiler:
    """A process that compiles; every launch once.

    Args:
        cache: folder in which Triton keeps what it compiled, which may outlive the process.
    """

    def __init__(self, cache: pathlib.Path) -> None:
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.environment["TRITON_CACHE_DIR"] = str(cache)
        self.environment["PYTHONPATH"] = os.pathsep.join(x for x in sys.path if x)
        self.known: dict[Request, Compiled] = {}
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
        )

    def _ask(self, asked: Request) -> Compiled | Exception:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(asked, self.process.stdin)
        self.process.stdin.flush()
        answer: Compiled | Exception = pickle.load(self.process.stdout)
        return answer

    def compile(self, asked: Request) -> Compiled:
        """Compile a launch for its target.

        Raises:
            RuntimeError: it does not compile; the message is Triton's.
        """
        if asked not in self.known:
            try:
                answer = self._ask(asked)
            except (EOFError, BrokenPipeError):
                # Killed from outside, or by this very kernel: then it dies again.
                self.close()
                self._start()
                try:
                    answer = self._ask(asked)
                except (EOFError, BrokenPipeError):
                    answer = RuntimeError(f"{asked.kernel}: the process that compiles it dies")
            if isinstance(answer, Exception):
                raise answer
            self.known[asked] = answer
        return self.known[asked]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def _only_ptx(backend: Any = None, stages: Any = None, *rest: Any) -> Any:
    """Leaves the assembler out, which takes most of the time and whose output nobody reads."""
    if stages is None:
        # Part of the cache's key.
        return "ptx", "ptx"
    stages["cubin"] = lambda source, metadata: b""
    return None


def _answer(asked: Request) -> Compiled:
    import machine_code

    from glazoo.kernels.common import Launch, Tiles

    def tensor(x: Operand) -> Tensor:
        # Nothing is read of it but its type and its address.
        return torch.empty(16, dtype=x.dtype)[x.misalignment // x.dtype.itemsize :]

    kernel = getattr(importlib.import_module(asked.module), asked.kernel)
    arguments = {k: tensor(x) if isinstance(x, Operand) else x for k, x in asked.arguments}
    tiles = Tiles(0, 0, asked.num_warps, asked.num_stages)
    launch = Launch(kernel, (1,), arguments, tiles)
    compiled = machine_code.compile_launch(launch, asked.target)
    constants = compiled.src.constants
    runtime = tuple(x.name for i, x in enumerate(kernel.params) if (i,) not in constants)
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, runtime)


def _serve() -> None:
    import triton

    # What Triton prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.path.insert(0, str(BENCHMARKS))
    triton.knobs.runtime.add_stages_inspection_hook = _only_ptx
    while True:
        try:
            asked = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Compiled | Exception = _answer(asked)
        except Exception:
            answer = RuntimeError(f"{asked.kernel} does not compile:\n{traceback.format_exc()}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # Answers must have the classes that the other process has.
    from ptx import compiler

    compiler._serve()
