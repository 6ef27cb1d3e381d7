"""Every example runs as it is, in an empty folder."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FAST = ["compare", "convert", "variant"]
SLOW = {"evaluate": "lm_eval", "finetune": "trl"}


@pytest.mark.parametrize("name", FAST)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_example_with_other_packages_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip(SLOW[name], reason=f"the example {name} needs {SLOW[name]}")
    command = [sys.executable, "-P", str(EXAMPLES / f"{name}.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_example_is_listed_and_tested() -> None:
    listed = re.findall(
        r"^\| \[`(\w+)\.py`\]\(\1\.py\)", (EXAMPLES / "README.md").read_text(), re.M
    )
    assert sorted(listed) == sorted(p.stem for p in EXAMPLES.glob("*.py"))
    assert sorted([*FAST, *SLOW, "demo"]) == sorted(listed)
