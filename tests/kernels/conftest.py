"""Settings of the kernel tests: poisoned buffers, and what needs the whole package."""

import pathlib
import sys

import pytest
import torch

import glazoo

# For `kernel_cases` and the others that these tests share.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from kernel_cases import fill_with_poison

# `make gpu` runs where only the kernels are: what goes through the whole package is not for there.
collect_ignore = (
    [] if hasattr(glazoo, "attention") else ["test_engine.py", "test_training.py", "ptx"]
)


def _poisoned(function):
    """The allocation, filled with POISON where glazoo.kernels asks for it."""

    def allocate(*args, **kwargs):
        x = function(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return fill_with_poison(x) if caller.startswith("glazoo.kernels") else x

    return allocate


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is not a number, so that it cannot pass for zero."""
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
