"""Every kernel, compiled for sm_80 and run here, against float64 loops per token."""

import pytest
import torch
from kernel_classes import CLASSES, Place

from ptx.launches import Executor, executing
from ptx.machine import SCHEDULES

pytestmark = pytest.mark.usefixtures("poison")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def at(dtype, T, K, V):
    return Place("cpu", dtype, T, K, V)


def compare(compiler, name, gate, place, options=None, schedules=SCHEDULES[:1], **operands):
    """A class against its loop: results and the gradient of every operand."""
    options = options or {}
    executor = Executor(compiler, schedules)
    given = CLASSES[name]["operands"](place, gate, **operands)
    with executing(executor):
        CLASSES[name]["compare"](given, place, options, options)
    return executor


QUICK = [
    ("linear", "head", at(BF16, 70, 32, 32)),
    ("delta", "key", at(F32, 40, 16, 16)),
    ("importance", "key", at(F16, 70, 16, 16)),
    ("synapse", "key", at(BF16, 40, 16, 16)),
    ("synapse_delta", "head", at(F16, 20, 16, 16)),
    ("full", "head", at(BF16, 20, 16, 16)),
]


@pytest.mark.parametrize(("name", "gate", "place"), QUICK, ids=str)
def test_a_class(compiler, name, gate, place):
    compare(compiler, name, gate, place, resets=True)
