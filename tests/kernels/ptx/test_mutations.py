"""Mistakes put into compiled kernels are found: the tests here can fail."""

import dataclasses
import re

import pytest
import torch
from kernel_cases import in_dtype
from kernel_classes import CLASSES, Place, gates

from ptx.compiler import request
from ptx.launches import Executor, executing, kernel_of
from ptx.memory import flat
from ptx.text import PtxError

pytestmark = pytest.mark.usefixtures("poison")
BARRIER = "\tbar.sync \t0;"
EVERY = [(name, gate) for name in CLASSES for gate in gates(name)]


def in_kernel(name, old, new):
    """Replaces the first match of a pattern in one kernel, which must have one."""

    def change(ptx):
        if f".entry {name}(" not in ptx:
            return ptx
        changed, count = re.subn(old, new, ptx, count=1)
        assert count, f"{old} is not in {name}"
        return changed

    return change


MISTAKES = [
    (in_kernel("linear_state_kernel", BARRIER, ""), "race"),
    (in_kernel("chunk_output_kernel", BARRIER, ""), "race"),
    # Waits for one copy less, and looks into its bytes.
    (
        in_kernel(
            "linear_state_kernel", r"(wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"
        ),
        "still copies",
    ),
    (in_kernel("chunk_output_kernel", r"@(%p\d+ ld\.global)", r"@!\1"), "out of bounds"),
    (in_kernel("chunk_output_kernel", r"@(%p\d+ st\.global)", r"@!\1"), "is not finite|bounds"),
    (in_kernel("chunk_gate_kernel", r"(shfl\.sync\.up.*), \d+, 0, -1", r"\1, 0, 0, -1"), "budget"),
    (in_kernel("chunk_output_kernel", r"ex2\.approx", "rsqrt.approx"), "unknown instruction"),
    (
        in_kernel(
            "chunk_dvalue_kernel",
            r"(mma[^{]*\{[^}]*\}, \{[^}]*\}, \{) (%r\d+), (%r\d+)",
            r"\1 \3, \2",
        ),
        "budget",
    ),
    (in_kernel("chunk_dkey_kernel", r"(fma\.rn\.f32.*), \S+;", r"\1, 0f3F000000;"), "budget"),
    (in_kernel("linear_dstate_kernel", r"(ldmatrix.*)\.trans", r"\1"), "budget"),
]


# On sm_90, where the first product of the kernel reads both operands from shared memory.
HOPPER = [
    (r"fence\.proxy\.async\.shared::cta;", "", "no fence.proxy.async"),
    (r"(fence\.proxy(?:.|\n)*?)\tbar\.sync \t0;", r"\1", "race"),
    (r"wgmma\.fence\.sync\.aligned;", "", "no wgmma.fence"),
    (r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1", "wgmma still"),
    (r"(wgmma\.mma.*), (\d), (\d);", r"\1, \3, \2;", "budget|nobody wrote|bounds"),
]


@pytest.mark.parametrize(
    ("change", "message", "target"),
    [(*x, "sm_80") for x in MISTAKES]
    + [(in_kernel("chunk_output_kernel", *x[:2]), x[2], "sm_90") for x in HOPPER],
    ids=range(len(MISTAKES + HOPPER)),
)
def test_a_mistake_fails_the_test_of_the_class(compiler, change, message, target):
    executor = Executor(compiler, change=change, target=target)
    size = (70, 32, 32) if target == "sm_80" else (20, 16, 64)
    place = Place("cpu", torch.bfloat16, *size)
    given = CLASSES["linear"]["operands"](place, "head")
    with executing(executor), pytest.raises((AssertionError, PtxError), match=message):
        CLASSES["linear"]["compare"](given, place, {}, {})


@dataclasses.dataclass(frozen=True)
class Kept:
    """A launch before it ran, its PTX, and what it left in memory."""

    launch: object
    ptx: str
    left: dict[str, torch.Tensor]


def copied(arguments):
    return {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}


class Keeping(Executor):
    """Runs every launch once and keeps one of each PTX."""

    def __init__(self, compiler):
        super().__init__(compiler)
        self.kept = {}

    def append(self, launch):
        before = dataclasses.replace(launch, arguments=copied(launch.arguments))
        super().append(launch)
        ptx = self.compiler.compile(request(launch, self.target)).ptx
        left = {k: x.clone() for k, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
        self.kept.setdefault(ptx, Kept(before, ptx, left))


def kernels(compiler, name, gate, T=150):
    """Every kernel of a class, forward and backward."""
    place = Place("cpu", torch.bfloat16, T, 32, 32)
    given = in_dtype(CLASSES[name]["operands"](place, gate, resets=gate != "none"), place.dtype)
    leaves = {
        k: None if x is None else (x.float() if k in ("h", "j", "prior") else x).requires_grad_()
        for k, x in given.items()
    }
    executor = Keeping(compiler)
    torch.manual_seed(1)
    with executing(executor):
        results = CLASSES[name]["call"](**leaves)
        sum((x.float() * torch.randn(x.shape)).sum() for x in results).backward()
    return list(executor.kept.values())


def found(compiler, kept, ptx):
    """Whether a kernel with a mistake is refused or leaves something else in memory."""
    launch = dataclasses.replace(kept.launch, arguments=copied(kept.launch.arguments))
    kernel_of.cache_clear()
    try:
        Executor(compiler, change=lambda _: ptx).append(launch)
    except PtxError:
        return True
    return any(
        not torch.equal(flat(x).view(torch.uint8), flat(launch.arguments[k]).view(torch.uint8))
        for k, x in kept.left.items()
    )


def without_one_barrier(ptx):
    """The PTX without each of its barriers in turn."""
    for barrier in re.finditer(BARRIER, ptx):
        yield ptx[: barrier.start()] + ptx[barrier.end() :]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gate"), EVERY)
def test_no_barrier_can_be_left_out(compiler, name, gate):
    total = missed = 0
    for kept in kernels(compiler, name, gate):
        for ptx in without_one_barrier(kept.ptx):
            total += 1
            missed += not found(compiler, kept, ptx)
    # Triton has a few barriers too many: between passes of a loop that touch different bytes.
    assert total >= 5
    assert missed <= total / 20
