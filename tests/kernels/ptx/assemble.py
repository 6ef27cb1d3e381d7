"""Small kernels in PTX, for tests of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .machine import Kernel
from .memory import Global

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tested(
{parameters}
)
.reqntid {threads}
{{
\t.reg .pred \t%p<99>;
\t.reg .b16 \t%rs<99>;
\t.reg .b32 \t%r<99>;
\t.reg .b64 \t%rd<99>;
{body}
}}
"""


def assemble(body: str, tensors: int, threads: int) -> Kernel:
    """A kernel of a body. %rd0, %rd1, .. hold the tensors' addresses and %r0 the thread."""
    names = [f"tested_param_{i}" for i in range(tensors)]
    lines = [f"ld.param.b64 %rd{i}, [{x}];" for i, x in enumerate(names)]
    lines += ["mov.u32 %r0, %tid.x;", body]
    if not re.search(r"\bret;\s*$", body):
        lines.append("ret;")
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {x}" for x in names)
    return Kernel(HEAD.format(parameters=parameters, threads=threads, body="\n".join(lines)))


def run(
    body: str,
    tensors: Mapping[str, Tensor],
    *,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    schedule: str = "lockstep",
) -> int:
    """Run a body on tensors, which it reads and writes in place; how many instructions it took."""
    memory = Global(tensors)
    arguments = [memory.addresses[x] for x in tensors]
    kernel = assemble(body, len(tensors), threads)
    return kernel.run((blocks,), arguments, memory, shared, schedule)


def column(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of one entry a thread."""
    return torch.tensor(values, dtype=dtype)
