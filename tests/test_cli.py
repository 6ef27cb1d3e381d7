"""The command line, run as users run it."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import glazoo
from glazoo import cli
from glazoo.__main__ import main
from glazoo.doctor import judge
from glazoo.program import lowering


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "glazoo", *args],
        capture_output=True,
        text=True,
        timeout=120,
    )


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, for what would import for seconds in one of its own."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["glazoo", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(args, int(ended.value.code or 0), said.out, said.err)

    return run


def test_list_shows_every_variant() -> None:
    table, data = run("list"), run("list", "--json")
    assert table.returncode == data.returncode == 0
    rows = json.loads(data.stdout)
    assert [r["name"] for r in rows] == list(glazoo.names())
    for row in rows:
        assert f" {row['name']} " in table.stdout
    by_name = {r["name"]: r for r in rows}
    assert by_name["mamba2"]["state_floats"] == 64 * 64
    assert by_name["palimpsa"]["state_floats"] == 2 * 64 * 64
    assert by_name["palimpsa"]["metaplastic"]
    assert not by_name["mamba2"]["metaplastic"]


def test_show() -> None:
    text, data = run("show", "gated_deltanet"), run("show", "metaplastic_gated_deltanet", "--json")
    assert text.returncode == data.returncode == 0
    for line in glazoo.lower(glazoo.load("gated_deltanet")).recurrence:
        assert line in text.stdout
    shown = json.loads(data.stdout)
    assert glazoo.Spec.model_validate(shown["spec"]) == glazoo.load("metaplastic_gated_deltanet")
    assert shown["program"]["kernel"] == "delta"
    steps = [step["step"] for step in shown["program"]["steps"]]
    assert steps[0] == "Importance"
    assert steps[-1] == "Delta"
    for row in glazoo.lower(glazoo.load("gated_deltanet")).rows:
        assert type(row.step).__name__ in text.stdout


@pytest.mark.parametrize("name", ["gated_deltanet", "metaplastic_rwkv7", "mesanet"])
def test_notebooks_show_what_the_command_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = glazoo.load(name)
    program = glazoo.lower(spec)
    shown = spec._repr_html_()
    assert shown == program._repr_html_()
    assert shown.startswith("<pre")
    text = html.unescape(re.sub(r"<[^>]+>", "", shown))
    drawn = re.compile(r"[\s\u2500-\u257f]+")  # frames are as wide as what they are drawn on
    assert drawn.sub(" ", text) == drawn.sub(" ", run("show", name).stdout)
    # Without rich a notebook shows the text form.
    monkeypatch.setattr(lowering, "find_spec", lambda name: None)
    assert spec._repr_html_() is program._repr_html_() is None


def test_a_refusal_is_one_line_and_exit_code_two() -> None:
    result = run("show", "mamba22")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "did you mean 'mamba2'" in result.stderr


def test_schema_is_json_schema() -> None:
    result = run("schema")
    assert result.returncode == 0
    assert json.loads(result.stdout) == glazoo.schema()


def test_doctor_reports_this_installation() -> None:
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["versions"]["glazoo"] == glazoo.__version__
    assert report["engines"][0] == "reference"
    assert result.returncode == (0 if report["healthy"] else 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "{}/none.toml"),
        ("train", "{}"),
        ("show", "{}/none.toml"),
        ("convert", "{}/no", "x"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_what_is_wanted(
    arguments: tuple[str, ...], tmp_path: Path, here: Run
) -> None:
    result = here(*(a.format(tmp_path) for a in arguments))
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert str(tmp_path) in line
    assert "Errno" not in line


def test_errors_of_the_operating_system_are_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        Path("/nowhere/at/all").read_text()

    monkeypatch.setattr(cli, "app", absent)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "glazoo: /nowhere/at/all: No such file or directory\n"


def test_doctor_finds_what_killed_runs_have_left_and_removes_it(tmp_path: Path, here: Run) -> None:
    for name in (".model.partial-abc", ".old.replaced-def", ".kept.replaced-ghi", ".x.partial"):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / ".model.partial-abc" / "shard").write_bytes(bytes(3000))
    # This one has been replaced; what stood at `kept` is nowhere else.
    (tmp_path / "old").mkdir()
    report = json.loads(here("doctor", str(tmp_path), "--json").stdout)
    found = {f["what"]: f["do"] for f in report["findings"] if "a killed run" in f["what"]}
    assert len(found) == 3
    (partial,) = (w for w in found if "partial-abc" in w)
    assert "(2.9 KiB)" in partial
    assert found[partial] == f"glazoo doctor {tmp_path} --remove-leftovers"
    (only,) = (w for w in found if "kept" in w)
    assert f"holds what stood at {tmp_path / 'kept'}: move it back" in only
    assert len(list(tmp_path.iterdir())) == 5

    report = json.loads(here("doctor", str(tmp_path), "--remove-leftovers", "--json").stdout)
    gone = [f for f in report["findings"] if f["do"] == "removed"]
    assert len(gone) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".kept.replaced-ghi", ".x.partial", "old"]
    report = json.loads(here("doctor", str(tmp_path / "nowhere"), "--json").stdout)
    assert any("cannot look for leftovers" in f["what"] for f in report["findings"])


def test_help_lists_every_command() -> None:
    text = run("--help").stdout
    names = "list show schema doctor convert tune inspect train verify posterior compare capacity"
    for name in [*names.split(), "decay", "bench"]:
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE), name
    assert "Usage: python -m glazoo bench" in run("bench", "--help").stdout
    assert run("benhc").returncode == 2


def test_summaries_are_whole_sentences_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run("--help").stdout.partition("\nCommands:\n")[2]
    group: Any = typer.main.get_command(cli.app)
    top = typer.Context(group, info_name="glazoo")
    for name, line in zip(group.list_commands(top), text.splitlines(), strict=True):
        _, command, _ = group.resolve_command(top, [name])
        summary = line.split(maxsplit=1)[1]
        assert summary == command.help.partition("\n")[0]
        assert summary.endswith(".")
        assert not summary.endswith("..")


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [
        ("bash", "glazoo train --re", {"--resume"}),
        ("zsh", "glazoo show metaplastic_rwkv7", {"metaplastic_rwkv7"}),
        ("fish", "glazoo co", {"convert", "compare"}),
    ],
)
def test_shells_complete_commands_options_and_variants(
    shell: str, line: str, expected: set[str]
) -> None:
    program = Path(sysconfig.get_path("scripts")) / "glazoo"

    def ask(instruction: str) -> str:
        environment = os.environ | {
            "_GLAZOO_COMPLETE": f"{instruction}_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        done = subprocess.run(
            [program], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stderr == ""
        return done.stdout

    assert f"_GLAZOO_COMPLETE=complete_{shell}" in ask("source")
    found = ask("complete")
    assert expected <= set(re.findall(r"[\w-]+", found))
    assert "bench" not in found


def test_version() -> None:
    assert run("--version").stdout.strip() == glazoo.__version__


HEALTHY = {
    "python": "3.12.0",
    "torch": "2.13.0+cpu",
    "triton": "3.9.0",
    "transformers": "5.24.0",
    "numba": "0.68.1",
}


@pytest.mark.parametrize(
    ("change", "options", "level", "words"),
    [
        ({"torch": "2.9.1"}, {}, "error", "torch 2.9.1 is older than 2.11"),
        ({"numba": None}, {}, "warning", "numba is not installed: on CPUs, impl='auto'"),
        (
            {"transformers": "5.31.0"},
            {},
            "warning",
            "transformers 5.31.0 is newer than 5.24, the newest that was tested",
        ),
        ({"torch": "2.9.1", "transformers": "5.31.0"}, {}, "error", "torch 2.9.1 is older"),
        ({"triton": None}, {}, "warning", "triton is not installed"),
        ({"triton": None}, {"gpu": True}, "error", "triton is not installed"),
        ({"transformers": None}, {}, "warning", "transformers is not installed"),
        ({"flash-linear-attention": "0.6.0"}, {}, "error", "without a GPU"),
        ({"flash-linear-attention": "0.6.0"}, {"gpu": True}, "warning", "registers `mamba2`"),
        ({}, {"interpreting": True}, "warning", "TRITON_INTERPRET is set"),
        (
            {"triton": "3.6.0", "numpy": "2.4.6"},
            {"interpreting": True},
            "error",
            "cannot interpret loops",
        ),
    ],
)
def test_known_bad_combinations(change, options, level, words) -> None:
    assert judge(HEALTHY, gpu=False, interpreting=False) == []
    found = judge(HEALTHY | change, **({"gpu": False, "interpreting": False} | options))
    assert any(f.level == level and words in f.what for f in found)
