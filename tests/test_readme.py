"""What the README and the pages of docs/ show, runs: the Python of a page as one session, its
commands and files beside it."""

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


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text("utf-8"))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [page for page in PAGES if {"python", "console"} & {kind for kind, _ in blocks(page)}]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.relative_to(ROOT).as_posix(),
            # The README has an example of each use; pages have all of them.
            marks=[pytest.mark.slow] if page.parent != ROOT else [],
        )
        for page in RUN
    ],
)
def test_pages_run(page: Path, tmp_path: Path) -> None:
    """Python blocks share one namespace; console blocks run between them, where they stand."""
    script = []
    for kind, text in blocks(page):
        if kind == "toml":
            (tmp_path / "my_variant.toml").write_text(text)
        if kind == "python":
            script.append(text)
        if kind == "console":
            for line in text.splitlines():
                if line.startswith("$ glazoo ") and not line.startswith(
                    tuple(f"$ {x}" for x in LONG)
                ):
                    command = [sys.executable, "-P", "-m", "glazoo", *line.split()[2:]]
                    script.append(f"run({json.dumps(command)})")
    quiet = "subprocess.run(command, check=True, stdout=subprocess.DEVNULL)"
    head = f"import subprocess\n\ndef run(command):\n    {quiet}\n"
    path = tmp_path / "page.py"
    path.write_text(head + "\n".join(script))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(path)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert script


def test_pages_that_run_are_found() -> None:
    assert {page.stem for page in RUN} >= {"README", "index", "run", "convert", "train", "write"}


def test_the_recurrences_shown_are_those_printed() -> None:
    shown = 0
    for kind, text in (block for page in PAGES for block in blocks(page)):
        name = re.match(r"\$ glazoo show (\S+)\n", text)
        if kind == "console" and name is not None:
            lines = [x.removeprefix("│ ") for x in text.splitlines() if x.startswith("│ ")]
            if lines:
                shown += 1
                assert tuple(lines) == glazoo.lower(glazoo.load(name[1])).recurrence
    assert shown


TARGETS = "demo test test-all lint docs dist gpu bench"


@pytest.mark.parametrize("target", TARGETS.split())
def test_make_knows_every_target(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
