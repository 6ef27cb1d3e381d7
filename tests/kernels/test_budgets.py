"""Every kernel compiles for every target inside its budget, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

CENSUS = pathlib.Path(__file__).parents[2] / "benchmarks" / "census.py"


def census(*options: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(CENSUS), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_kernels_stay_inside_their_budgets():
    census("--check", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_and_shape_stays_inside_its_budget(target):
    census("--check", "--target", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_sums_over_passes_reach_their_goals(target):
    census("--sum", "--target", target)
