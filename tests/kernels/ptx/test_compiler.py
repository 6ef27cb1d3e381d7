"""The process that compiles."""

import pytest
import torch

from ptx.compiler import Compiler, Operand, Request


def asked(**changes):
    x = Operand(torch.float32, 0)
    arguments = {"q": x, "k": x, "w": x, "g": None, "beta": None, "state": x, "o": x}
    arguments |= {
        "SCALE": 1.0,
        "KEYED": False,
        "PRE": False,
        "HQ": 1,
        "HK": 1,
        "HV": 1,
        "K": 16,
        "V": 16,
        "BK": 16,
        "BV": 16,
    }
    return Request(
        "glazoo.kernels.step", "linear_step_kernel", tuple((arguments | changes).items()), 1, 1
    )


@pytest.mark.slow
def test_alignment_decides_the_width_of_accesses(compiler):
    found = compiler.compile(asked())
    assert "ld.global.v4.b32" in found.ptx
    assert found.parameters == ("q", "k", "w", "state", "o")
    anywhere = Operand(torch.float32, 4)
    found = compiler.compile(asked(q=anywhere, k=anywhere, w=anywhere, state=anywhere, o=anywhere))
    assert "ld.global.v4.b32" not in found.ptx


def test_what_does_not_compile_is_named_and_the_next_does(compiler):
    with pytest.raises(RuntimeError, match=r"linear_step_kernel does not compile(.|\n)*arange"):
        compiler.compile(asked(BK=17))
    assert compiler.compile(asked()).shared >= 0


@pytest.mark.slow
def test_a_process_that_died_is_started_again(cache):
    found = Compiler(cache)
    found.process.kill()
    assert "linear_step_kernel" in found.compile(asked()).ptx
    found.close()
