"""What stands around the code: workflows and templates name what is there, and agree with it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(
    set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"}
)
OTHERS = [ROOT / ".pre-commit-config.yaml", ROOT / "mkdocs.yml", *GITHUB.rglob("*.yml")]
RELEASES = r"v\d+|release/v\d+"
"""Actions follow a major version."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a workflow, with those of the repository's own actions that it uses."""
    for job in read(path)["jobs"].values():
        for step in job["steps"]:
            yield step
            if step.get("uses", "").startswith("./"):
                yield from read(ROOT / step["uses"] / "action.yml")["runs"]["steps"]


def commands(path: Path) -> list[str]:
    """What a workflow runs, one command a line."""
    return [x for s in steps(path) for x in re.split(r"\n|&&|;|\|", s.get("run", "")) if x.strip()]


def test_workflows_are_found() -> None:
    assert {w.stem for w in WORKFLOWS} == {"ci", "docs", "newest", "release"}
    assert {f.stem for f in FORMS} == {"bug", "question", "variant"}


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.name)
def test_yaml_is_yaml(path: Path) -> None:
    assert isinstance(read(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_what_a_workflow_runs_is_there(path: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    for command in commands(path):
        program, *arguments = command.split()
        if program == "make":
            targets = [a for a in arguments if "=" not in a]
            assert targets, command
            assert set(targets) <= known, command
            for name in (a.partition("=")[0] for a in arguments if "=" in a):
                assert re.search(rf"^{name} \?=", MAKEFILE, re.M), command
        for word in command.split():
            if word.startswith((".github/", ".ci/", "./", "tests/", "docs/")):
                assert (ROOT / word).exists(), command
    for name in read(path).get("env", {}):
        assert re.search(rf"^{name} \?=", MAKEFILE, re.M), name


def test_every_check_of_a_contributor_is_one_of_a_workflow() -> None:
    run = {" ".join(c.split()[:2]) for path in WORKFLOWS for c in commands(path)}
    assert run >= {f"make {x}" for x in ("lint", "test", "test-newest", "docs", "dist")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_may_and_take_no_more_than_they_need(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        if "write" in job.get("permissions", {}).values():
            # Never for what comes from a fork.
            assert "github.re" in job.get("if", "") or "needs" in job, name
    for step in steps(path):
        if "uses" in step and not step["uses"].startswith("./"):
            assert re.fullmatch(rf"[\w-]+/[\w-]+@({RELEASES})", step["uses"]), step["uses"]


def test_workflows_test_the_versions_of_the_classifiers() -> None:
    prefix = "Programming Language :: Python :: 3."
    declared = ["3." + c.removeprefix(prefix) for c in PROJECT["classifiers"] if prefix in c]
    assert declared
    assert PROJECT["requires-python"] == f">={declared[0]}"
    tested = {
        (path.stem, name): job["strategy"]["matrix"]["python-version"]
        for path in WORKFLOWS
        for name, job in read(path)["jobs"].items()
        if "strategy" in job
    }
    assert tested.keys() == {("ci", "test"), ("newest", "test-newest")}
    assert all(versions == declared for versions in tested.values())
    setup = read(GITHUB / "actions" / "setup" / "action.yml")
    assert setup["inputs"]["python-version"]["default"] == declared[0]


def test_forms_ask_for_what_is_needed() -> None:
    for path in FORMS:
        form = read(path)
        assert form["name"]
        assert form["description"]
        fields = [x for x in form["body"] if x["type"] != "markdown"]
        assert len({x["id"] for x in fields}) == len(fields)
        assert any(x.get("validations", {}).get("required") for x in fields), path
    (doctor,) = (x for x in read(GITHUB / "ISSUE_TEMPLATE/bug.yml")["body"] if x["id"] == "doctor")
    assert "glazoo doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


def test_the_hook_is_make_lint() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    (hook,) = repository["hooks"]
    assert (hook["entry"], hook["pass_filenames"]) == ("make lint", False)
    recipe = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    for tool in ("ruff check .", "ruff format --check .", "mypy"):
        assert tool in recipe


@pytest.mark.parametrize("name", ["pull_request_template.md", "../SECURITY.md"])
def test_links_of_the_other_pages_lead_somewhere(name: str) -> None:
    path = GITHUB / name
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8")):
        assert link.startswith("https:") or (path.parent / link).exists(), link


def notes(tag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GITHUB / "notes", tag], capture_output=True, text=True)


def test_a_release_takes_its_notes_from_the_changelog() -> None:
    version = PROJECT["version"]
    found = notes(f"v{version}")
    assert found.returncode == 0, found.stderr
    assert "### Added" in found.stdout
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert found.stdout.strip() in changelog
    heads = re.findall(r"^## \[(.+?)\](.*)$", changelog, re.M)
    # What is not released yet has one place, above; everything else has a version and a date.
    released = [head for head in heads if head[0] != "Unreleased"]
    assert heads[: -len(released)] in ([], [("Unreleased", "")])
    assert released[0][0] == version
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in released)
    wrong = notes("v99.0.0")
    assert wrong.returncode == 1
    assert f"of version {version} it is v{version}" in wrong.stderr
