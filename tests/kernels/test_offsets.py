"""Addresses beyond 2^31 elements, in memory that is reserved but hardly touched."""

import mmap
import sys

import pytest
import torch
from kernel_cases import in_dtype, make_operands, riccati_operands

from glazoo.kernels import common, delta, importance, linear, riccati

# 2^27 rows of 16 numbers: what follows lies beyond 2^31, where an int32 offset is negative.
FAR = 1 << 27
TOKENS = 40


def sparse(x: torch.Tensor) -> torch.Tensor:
    """A tensor [1, FAR + T, ..] that ends in x; pages that nobody writes take no memory."""
    size = (FAR + x.shape[1]) * x[0, 0].numel()
    memory = mmap.mmap(-1, size * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(memory, dtype=x.dtype).view(1, -1, *x.shape[2:])
    far[:, FAR:] = x
    return far


@pytest.mark.parametrize(
    ("function", "letters"),
    [
        (linear, "qkw"),
        (delta, "qekw"),
        (importance, "kb"),
        pytest.param(riccati, "acdu", marks=pytest.mark.slow),
    ],
)
def test_far_tokens(function, letters, monkeypatch):
    """A packed sequence that starts at row 2^27 gives the bits that it gives at row 0."""
    heads = {"q": 1, "e": 1, "k": 1, "w": 1}
    operands = (
        riccati_operands(1, TOKENS, 1, 16)
        if function is riccati
        else make_operands(letters, 1, TOKENS, heads, 16, 16, gate="head")
    )
    # Its gradient is a pass over all rows, here 2^27.
    operands.pop("beta", None)
    near = in_dtype(operands, torch.float16)
    far = {k: x.detach() if k == "initial_state" else sparse(x) for k, x in near.items()}

    size = next(operands[name].shape for name in "wku" if name in operands)
    weight = torch.randn(size).to(torch.float16 if "w" in letters else torch.float32)

    def only_these(batch, tokens, cu_seqlens, size):
        count = -(-TOKENS // size)
        zero = torch.zeros(count + 1, dtype=torch.int32)
        return common.Chunks(size, count, 1, cu_seqlens, zero[:count], zero)

    def run(given, start):
        leaves = {k: x.requires_grad_() for k, x in given.items()}
        ends = torch.tensor([start, start + TOKENS])
        o, final = function(**leaves, cu_seqlens=ends)
        weights = (weight if start == 0 else sparse(weight), torch.ones_like(final))
        grads = torch.autograd.grad((o, final), [*leaves.values()], weights)
        return [
            x if x.shape == final.shape else x[:, start:]
            for x in (o.detach(), final.detach(), *grads)
        ]

    for module in ("linear", "delta", "importance", "riccati"):
        # By sys.modules: as attributes of the package these names are the functions.
        monkeypatch.setattr(sys.modules[f"glazoo.kernels.{module}"], "make_chunks", only_these)
    for x, y in zip(run(near, 0), run(far, FAR), strict=True):
        assert torch.equal(x, y)
