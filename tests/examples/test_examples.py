"""Every notebook runs as it is, in an empty folder, and is committed as it ran."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import notebooks
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
FAST = ["compare", "convert", "variant"]
SLOW = {"evaluate": "lm_eval", "finetune": "trl"}
PATH = re.compile(r"(?<![\w.:/<])(?:/[\w.-]+){2}|\b[A-Z]:\\|~/")


def shown(notebook: Any) -> list[list[str]]:
    """What each cell shows; the digits of numbers depend on the machine, and pictures do."""
    found: list[list[str]] = []
    for cell in notebook.cells:
        texts = [x.get("text", x.get("data", {}).get("text/plain")) for x in outputs(cell)]
        found.append([re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?", "#", text) for text in texts])
    return found


def outputs(cell: Any) -> list[Any]:
    return cell.outputs if cell.cell_type == "code" else []


def complaints(notebook: Any) -> list[str]:
    """What a notebook that ran from its first cell to its last, with success, does not have."""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"cells ran in the order {counts}")
    for n, cell in enumerate(cells, 1):
        kinds = {x.get("name", x.output_type) for x in cell.outputs}
        if kinds & {"error", "stderr"}:
            found.append(f"cell {n} has the outputs {sorted(kinds)}")
        prints = {
            node.func.id
            for statement in ast.parse(cell.source).body
            if not isinstance(statement, ast.FunctionDef)
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if "print" in prints and "stdout" not in kinds:
            found.append(f"cell {n} prints, and nothing is there")
        for output in cell.outputs:
            for kind, text in {"text": output.get("text", ""), **output.get("data", {})}.items():
                if not kind.startswith("image/") and (path := PATH.search(str(text))):
                    found.append(f"cell {n} shows the path {path[0]}")
    return found


@pytest.mark.parametrize("name", FAST)
def test_notebook_runs(name: str, tmp_path: Path) -> None:
    path = notebooks.EXAMPLES / f"{name}.ipynb"
    ran = notebooks.run(path, tmp_path)
    said = [x.text for cell in ran.cells for x in outputs(cell) if x.get("name") == "stderr"]
    assert not re.findall(r"^.*Warning: .*$", "".join(said), re.M)
    assert shown(notebooks.published(ran)) == shown(notebooks.read(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_notebook_with_other_packages_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip(SLOW[name], reason=f"the notebook {name} needs {SLOW[name]}")
    path = notebooks.EXAMPLES / f"{name}.ipynb"
    ran = notebooks.run(path, tmp_path)
    assert shown(notebooks.published(ran)) == shown(notebooks.read(path))


def test_a_cell_that_fails_is_shown_with_its_traceback(tmp_path: Path) -> None:
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("here = {}\nhere['it']")])
    nbformat.write(failing, tmp_path / "failing.ipynb")
    with pytest.raises(CellExecutionError, match=r"(?s)here\['it'\].*KeyError.*: 'it'"):
        notebooks.run(tmp_path / "failing.ipynb", tmp_path)


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_notebook_is_committed_as_it_ran(name: str) -> None:
    notebook = notebooks.read(notebooks.EXAMPLES / f"{name}.ipynb")
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert not complaints(notebook)


@pytest.mark.parametrize(
    ("source", "count", "outputs", "complaint"),
    [
        ("x = 1", 1, [], ""),
        ("print(1)", 1, [("stdout", "1")], ""),
        ("print(1)", None, [("stdout", "1")], "order"),
        ("print(1)", 2, [("stdout", "1")], "order"),
        ("print(1)", 1, [], "prints"),
        ("for x in (1,):\n    print(x)", 1, [], "prints"),
        ("x", 1, [("stderr", "Loading: 100%")], "stderr"),
        ("print(x)", 1, [("stdout", "in /home/somebody/x.py")], "path /home/somebody"),
        ("print(x)", 1, [("stdout", r"in C:\Users")], "path C:"),
        ("print(x)", 1, [("stdout", "https://a.org/b/c, 1/2/3 and <b>a</b>")], ""),
    ],
)
def test_a_notebook_that_ran_in_part_is_seen(
    source: str, count: int | None, outputs: list[tuple[str, str]], complaint: str
) -> None:
    cell = nbformat.v4.new_code_cell(source, execution_count=count)
    cell.outputs = [nbformat.v4.new_output("stream", name=n, text=t) for n, t in outputs]
    found = complaints(nbformat.v4.new_notebook(cells=[cell]))
    assert len(found) == bool(complaint)
    assert complaint in "".join(found)


def test_every_example_is_listed_and_tested_and_says_what_it_needs() -> None:
    row = re.compile(r"^\| \[`(\w+)\.(py|ipynb)`\]\(\1\.\2\) \|.*\| (.+) \|$", re.M)
    readme = (notebooks.EXAMPLES / "README.md").read_text("utf-8")
    listed = {name: set(re.findall(r"`(\w+)`", needs)) for name, _, needs in row.findall(readme)}
    there = [path.stem for path in notebooks.EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert sorted(listed) == sorted(there)
    assert sorted([*FAST, *SLOW, "demo"]) == sorted(listed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name in [*FAST, *SLOW]:
        first, second, *_ = notebooks.read(notebooks.EXAMPLES / f"{name}.ipynb").cells
        assert first.source.startswith("# ")
        (extras,) = re.findall(r"^pip install '?glazoo(?:\[([\w,]+)\]')?$", second.source, re.M)
        assert set(filter(None, extras.split(","))) == listed[name]
        assert listed[name] <= set(project["optional-dependencies"])
