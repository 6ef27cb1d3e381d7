"""Every kernel, compiled for sm_80 or sm_90 and run here, against float64 loops per token.

Value heads share queries and keys two by two throughout, and lengths are no multiple of a chunk.
"""

import functools
import itertools

import pytest
import torch
import whiten_cases
from kernel_classes import CLASSES, OPTIONS, Place, assert_decodes, gates

from ptx.launches import Executor, executing
from ptx.machine import SCHEDULES

pytestmark = pytest.mark.usefixtures("poison")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (16, 64, 96, 128)
EVERY = [(name, gate) for name in CLASSES for gate in gates(name)]
GATED = [(name, gate) for name, gate in EVERY if gate != "none"]
WIDE = ("linear", "delta", "whitened_linear")
# Those that take the logarithm of a decay.
DECAYING = [(name, gate) for name, gate in GATED if name != "riccati"]


def at(dtype, T, K, V=None):
    return Place("cpu", dtype, T, K, K if V is None else V)


def choices(quick, slow):
    """Parameters of a test, those of `slow` marked so, each once."""
    found = [pytest.param(*x) for x in quick]
    return found + [pytest.param(*x, marks=pytest.mark.slow) for x in slow if x not in quick]


def compare(executor, name, gate, place, options=None, change=lambda x: x, loop=None, **operands):
    """A class against its loop: results and the gradient of every operand."""
    options = options or {}
    given = change(CLASSES[name]["operands"](place, gate, **operands))
    with executing(executor):
        CLASSES[name]["compare"](given, place, options, options if loop is None else loop)
    assert executor.kernels


@pytest.mark.parametrize(
    ("name", "gate", "place"),
    choices(
        [
            ("linear", "head", at(BF16, 70, 16)),
            ("delta", "key", at(F32, 40, 16)),
            ("importance", "key", at(F16, 70, 16)),
            ("whiten", "key", at(BF16, 70, 19)),
            ("riccati", "head", at(F32, 66, 4)),
            ("synapse", "key", at(BF16, 20, 16)),
            ("synapse_delta", "head", at(F16, 20, 16)),
            ("solve", "head", at(BF16, 20, 16)),
        ],
        [
            *((*x, at(BF16, 70, size)) for x in EVERY for size in SIZES),
            *((*x, at(dtype, 70, size)) for x in GATED for dtype in (F16, F32) for size in SIZES),
            *(
                (name, gates(name)[-1], at(BF16, 70, *size))
                for name in CLASSES
                for size in itertools.permutations(SIZES, 2)
                if sum(size) in (144, 160)
            ),
            # More keys than a program of the pass that writes sums of gates for all of them.
            ("synapse", "head", at(BF16, 3, 65, 16)),
            # Beyond every border between what kernels keep.
            *((*x, at(BF16, 300, 64)) for x in EVERY),
        ],
    ),
    ids=str,
)
def test_a_class(executor, name, gate, place):
    compare(executor, name, gate, place, resets=gate != "none")


@pytest.mark.parametrize("at_token", ["written", pytest.param("found", marks=pytest.mark.slow)])
def test_a_key_over_its_importance(executor, at_token):
    given = whiten_cases.operands(1, 20, 1, 2, 19, "key", own=True)
    with executing(executor):
        whiten_cases.compare(given, BF16, at=at_token)
    assert executor.kernels


@pytest.mark.parametrize("gate", ["none", pytest.param("key", marks=pytest.mark.slow)])
def test_a_key_that_erases(executor, gate):
    given = CLASSES["delta"]["operands"](at(BF16, 70, 16), gate) | {"e": None}
    with executing(executor):
        CLASSES["delta"]["compare"](given, at(BF16, 70, 16), {}, {})


@pytest.mark.parametrize(
    ("name", "gate", "place"),
    choices(
        # Two tiles of values: a loop that copies the second while the first is multiplied.
        [("linear", "head", at(BF16, 20, 16, 64))],
        [
            *((*x, at(BF16, 70, 64)) for x in EVERY),
            *((name, "head", at(dtype, 70, 64)) for name in CLASSES for dtype in (F16, F32)),
            # Tiles that narrower values do not have.
            *((name, gate, at(BF16, 70, 128)) for name, gate in EVERY if name in WIDE),
            ("delta", "head", at(BF16, 150, 256, 40)),
        ],
    ),
    ids=str,
)
def test_a_class_on_hopper(hopper, name, gate, place):
    """Products of warp groups, which read shared memory by themselves while threads go on."""
    compare(hopper, name, gate, place, resets=gate != "none")


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 64, 65])
@pytest.mark.parametrize(("name", "gate"), EVERY)
def test_lengths(executor, name, gate, T):
    if (name, T) == ("riccati", 1):
        pytest.skip("one token of it launches no kernel")
    compare(executor, name, gate, at(BF16, T, 16), B=2)


@pytest.mark.parametrize(
    ("name", "gate", "place"),
    choices([], [(*x, at(dtype, 150, 64)) for x in EVERY for dtype in (BF16, F32)]),
    ids=str,
)
def test_packed(executor, name, gate, place):
    ends = torch.tensor([0, 0, 50, 51, 51, 150, 150])
    options = {"cu_seqlens": ends}
    compare(executor, name, gate, place, options, sequences=6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("name", "gate"), DECAYING)
def test_strong_decay(executor, name, gate, dtype):
    """Sixty nats a token at most, and one in six forgets all."""

    def stronger(operands):
        return operands | {"g": operands["g"] * 120}

    compare(executor, name, gate, at(dtype, 70, 64), change=stronger, resets=True)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, -torch.inf])
@pytest.mark.parametrize(("name", "gate"), DECAYING)
def test_a_decay_that_keeps_all_or_nothing(executor, name, gate, value):
    def constant(operands):
        return operands | {"g": torch.full_like(operands["g"], value)}

    compare(executor, name, gate, at(BF16, 70, 16), change=constant)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(
    ("name", "options", "gate"), [(n, x, g) for n, x in OPTIONS for g in gates(n)[1:]], ids=str
)
def test_options(executor, name, options, gate, dtype):
    compare(executor, name, gate, at(dtype, 70, 64), options, resets=True)


@pytest.mark.parametrize(
    ("name", "gate", "place"),
    choices(
        [("delta", "key", at(BF16, 3, 16)), ("synapse_delta", "head", at(F16, 3, 16))],
        [(*x, at(dtype, 6, 64, 96)) for x in EVERY for dtype in (BF16, F16, F32)],
    ),
    ids=str,
)
def test_decoding(executor, name, gate, place):
    with executing(executor):
        assert_decodes(name, gate, place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gate", "place"),
    choices(
        [("delta", "head", at(BF16, 40, 16))],
        [(*x, at(dtype, 70, 64)) for x in GATED for dtype in (BF16, F32)],
    ),
    ids=str,
)
def test_no_order_of_warps_matters(compiler, name, gate, place):
    """Between barriers warps may run one after the other, forward or backward: the same bits."""
    compare(Executor(compiler, SCHEDULES), name, gate, place, resets=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gate"), EVERY)
def test_operands_that_begin_anywhere(executor, name, gate):
    """Memory that begins at no multiple of 16 bytes, as a slice of a projection does."""

    def shifted(operands):
        return {
            k: x if x is None else torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
            for k, x in operands.items()
        }

    of = CLASSES[name]
    given = of["operands"](at(BF16, 70, 16), gate, B=1)
    whole = functools.partial(of["call"])
    low = {k: None if x is None else x.to(BF16 if x.ndim == 4 else F32) for k, x in given.items()}
    with executing(executor), torch.no_grad():
        expected, found = whole(**low), whole(**shifted(low))
    for x, y in zip(expected, found, strict=True):
        assert torch.equal(x, y)
