"""Sends the launches of the host code to the machine here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glazoo.kernels import common

from .compiler import Compiler, request
from .machine import Kernel
from .memory import Global, flat


@functools.lru_cache(maxsize=512)
def kernel_of(ptx: str) -> Kernel:
    """The kernel of a PTX source, decoded once."""
    return Kernel(ptx)


class Executor:
    """Runs launches on this machine, as the list that `record_launches` fills with them.

    With more than one schedule every launch runs once in each, from the same memory, and must leave
    the same bits, but for what is added up atomically.

    Args:
        compiler: where PTX comes from.
        schedules: of `machine.SCHEDULES`.
        change: PTX to PTX, to see whether a mistake in it is found.
        target: what is compiled for, "sm_80" or "sm_90".
    """

    def __init__(
        self,
        compiler: Compiler,
        schedules: Sequence[str] = ("lockstep",),
        change: Callable[[str], str] = lambda ptx: ptx,
        target: str = "sm_80",
    ) -> None:
        self.compiler = compiler
        self.schedules = schedules
        self.change = change
        self.target = target
        self.kernels: list[str] = []
        self.instructions = 0

    def append(self, launch: common.Launch) -> None:
        """Run a launch."""
        if 0 in launch.grid:
            return
        compiled = self.compiler.compile(request(launch, self.target))
        kernel = kernel_of(self.change(compiled.ptx))
        tensors = {k: x for k, x in launch.arguments.items() if isinstance(x, Tensor)}
        self.kernels.append(launch.kernel.__name__)
        before = [flat(x).clone() for x in tensors.values()] if self.schedules[1:] else []
        first: list[Tensor] = []
        for i, schedule in enumerate(self.schedules):
            for x, y in zip(tensors.values(), before, strict=bool(before)):
                flat(x).copy_(y)
            memory = Global(tensors)
            values = [
                memory.addresses[name] if name in tensors else launch.arguments[name]
                for name in compiled.parameters
            ]
            # Triton's own: no kernel here uses its scratch memory.
            values += [0] * (len(kernel.program.parameters) - len(values))
            self.instructions += kernel.run(launch.grid, values, memory, compiled.shared, schedule)
            if i == 0:
                first = [flat(x).clone() for x in tensors.values()] if before else []
                continue
            for (name, x), y in zip(tensors.items(), first, strict=True):
                if not memory.added_to(name):
                    same = torch.equal(flat(x).view(torch.uint8), y.view(torch.uint8))
                    assert same, f"{kernel.program.name}: {name} depends on the order of warps"


@contextlib.contextmanager
def executing(executor: Executor) -> Iterator[None]:
    """Inside, the host code of the kernels runs them compiled, on tensors on the CPU."""
    assert common._recording is None
    common._recording = common._Recording(executor.target, executor)  # type: ignore[arg-type]
    try:
        yield
    finally:
        common._recording = None
