"""The kernels on a GPU, in dtypes that the interpreter cannot run and at sizes users run."""

import functools

import pytest
import torch
from kernel_cases import (
    assert_matches_loop,
    delta_loop,
    importance_loop,
    in_dtype,
    linear_loop,
    make_operands,
)

from glazoo.kernels import delta, delta_step, importance, importance_step, linear, linear_step

pytestmark = pytest.mark.gpu
HEADS = {"q": 4, "e": 2, "k": 2, "w": 4}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((64, 64), (128, 128), (128, 256), (96, 192), (256, 40))
CLASSES = {
    "linear": (linear, linear_loop, "qkw"),
    "delta": (delta, delta_loop, "qekw"),
    "importance": (importance, importance_loop, "kb"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "V"), SHAPES)
@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize("name", CLASSES)
def test_on_gpu(name, gate, K, V, dtype):
    kernel, loop, letters = CLASSES[name]
    operands = make_operands(letters, 1, 150, HEADS, K, V, gate=gate, resets=gate != "none")
    assert_matches_loop(kernel, loop, operands, dtype, "cuda")


@pytest.mark.parametrize("gate", ["head", "key"])
@pytest.mark.parametrize("name", CLASSES)
def test_packed_on_gpu(name, gate):
    kernel, loop, letters = CLASSES[name]
    ends = torch.tensor([0, 0, 70, 71, 71, 200, 200])
    operands = make_operands(letters, 1, 200, HEADS, 64, 64, gate=gate, sequences=6)
    kernel = functools.partial(kernel, cu_seqlens=ends.cuda())
    loop = functools.partial(loop, cu_seqlens=ends)
    assert_matches_loop(kernel, loop, operands, torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("name", "option"), [("linear", {"read": "pre"}), ("delta", {"base": "prev"})]
)
@pytest.mark.parametrize("gate", ["head", "key"])
def test_other_reads_on_gpu(name, option, gate):
    kernel, loop, letters = CLASSES[name]
    operands = make_operands(letters, 2, 130, HEADS, 64, 64, gate=gate, resets=True, strong=True)
    kernel, loop = functools.partial(kernel, **option), functools.partial(loop, **option)
    assert_matches_loop(kernel, loop, operands, torch.bfloat16, "cuda")


@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize(
    ("name", "step"),
    [("linear", linear_step), ("delta", delta_step), ("importance", importance_step)],
)
def test_steps_continue_a_prefill_on_gpu(name, step, gate):
    kernel, _, letters = CLASSES[name]
    operands = in_dtype(make_operands(letters, 2, 70, HEADS, 64, 96, gate=gate), torch.float32)
    operands = {k: None if x is None else x.cuda() for k, x in operands.items()}
    state = operands.pop("initial_state")
    whole, final = kernel(**operands, initial_state=state)
    for t in range(70):
        token = {k: None if x is None else x[:, t : t + 1] for k, x in operands.items()}
        o = step(**token, state=state)
    # Two orders of 70 roundings each; a state holds sums of 70 terms of size one.
    room = 70 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(o[:, 0], whole[:, -1], rtol=room, atol=room * 8)
    torch.testing.assert_close(state, final, rtol=room, atol=room * 8)


@pytest.mark.parametrize("name", CLASSES)
def test_inductor_on_gpu(name):
    kernel, _, letters = CLASSES[name]
    compiled = torch.compile(lambda **x: kernel(**x), fullgraph=True, dynamic=True)
    for T in (65, 130):
        operands = in_dtype(make_operands(letters, 1, T, HEADS, 64, 64), torch.bfloat16)
        given = {k: x.cuda().requires_grad_() for k, x in operands.items()}
        results = []
        for run in (kernel, compiled):
            o, final = run(**given)
            loss = o.float().sum() + final.sum()
            results.append([o, final, *torch.autograd.grad(loss, [*given.values()])])
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)
