"""What the README shows, runs: its Python as one session, its commands and files beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glazoo

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that train for minutes; they have tests of their own.
LONG = ("glazoo compare", "glazoo train", "glazoo tune", "glazoo demo")


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text("utf-8"))


def test_the_readme_runs(tmp_path: Path) -> None:
    """Python blocks share one namespace; console blocks run between them, where they stand."""
    toml = next(text for kind, text in blocks() if kind == "toml")
    (tmp_path / "my_variant.toml").write_text(toml)
    script, ran = [], 0
    for kind, text in blocks():
        if kind == "python":
            script.append(text)
        if kind == "console":
            for line in text.splitlines():
                if line.startswith("$ glazoo ") and not line.startswith(
                    tuple(f"$ {x}" for x in LONG)
                ):
                    ran += 1
                    command = [sys.executable, "-P", "-m", "glazoo", *line.split()[2:]]
                    script.append(f"run({json.dumps(command)})")
    quiet = "subprocess.run(command, check=True, stdout=subprocess.DEVNULL)"
    head = f"import subprocess\n\ndef run(command):\n    {quiet}\n"
    path = tmp_path / "readme.py"
    path.write_text(head + "\n".join(script))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(path)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert ran >= 5


def test_the_recurrences_shown_are_those_printed() -> None:
    shown = 0
    for kind, text in blocks():
        name = re.match(r"\$ glazoo show (\S+)\n", text)
        if kind == "console" and name is not None:
            lines = [x.removeprefix("│ ") for x in text.splitlines() if x.startswith("│ ")]
            if lines:
                shown += 1
                assert tuple(lines) == glazoo.lower(glazoo.load(name[1])).recurrence
    assert shown


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "gpu", "bench"])
def test_make_knows_every_target(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
