"""Settings of the whole suite: one torch thread a process, reproducible hypothesis, no network."""

import gc
import importlib.util
import os

import pytest
import torch

# Tests build every model they use; a request to a hub would be a mistake, and fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Triton decides at its import whether kernels are interpreted, and other tests import it too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors here are tiny, and pytest-xdist already gives every core a process.
torch.set_num_threads(1)

# `make gpu` runs with whatever the machine has, which need not include hypothesis.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # The same examples on every run and machine: a red run can be repeated. No deadline, because
    # the first example of a test pays for imports and kernels' compilation.
    settings.register_profile(
        "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    # Fresh examples, many of them: HYPOTHESIS_PROFILE=explore .venv/bin/pytest tests/theory
    settings.register_profile(
        "explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave GPU tests out where there is no GPU, as deselected rather than as skipped tests."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
        config.stash[_GPU_TESTS_LEFT_OUT] = len(gpu)


def pytest_collection_finish() -> None:
    """Take what importing and collecting made, most of all objects, out of what every later garbage
    collection goes through; some code under test asks for one."""
    gc.collect()
    gc.freeze()


_GPU_TESTS_LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say that GPU tests exist and did not run."""
    if left_out := config.stash.get(_GPU_TESTS_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} GPU tests left out: no GPU here (`make gpu` on a machine with one)"
        )
