"""Imports go along the arrows of ARCHITECTURE.md, and every arrow there is used."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import glazoo

NAMES = set(glazoo.names())
ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) \|$", re.M)


def arrows() -> dict[str, set[str]]:
    """What each unit may import by the document, in its order."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return {unit: set(re.findall(r"`(\w+)`", names)) for unit, names in ROW.findall(text)}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in [*ROOT.glob("glazoo/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "glazoo" else ("glazoo", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def nodes(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    """Every node of a text; without `types`, but for what is there for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node, types)


def imported(module: str, path: Path, types: bool) -> Iterator[str]:
    """Names that a module imports anywhere in its text, and modules that it names as data."""
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    for node in nodes(ast.parse(path.read_text()), types):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, x.name]) for x in node.names)
        elif isinstance(node, ast.Constant) and node.value in MODULES - {"glazoo"}:
            yield node.value


MODULES = modules().keys()
# What only shows a spec, or is asked of a model of our own when there is one.
NAMED_BELOW = {("spec", "program"), ("families", "models")}


def unit(module: str) -> str:
    """The part of the package that a module belongs to: its folder, or itself."""
    return ([*module.split("."), "glazoo"])[1]


def module_arrows(*, types: bool) -> dict[str, set[str]]:
    """Modules of the package that each of them imports."""
    known = modules()
    found: dict[str, set[str]] = {module: set() for module in known}
    for module, path in known.items():
        for name in imported(module, path, types):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name not in ("", module):
                found[module].add(name)
    return found


def found_arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, names in module_arrows(types=True).items():
        arrows = {(unit(module), unit(name)) for name in names} - NAMED_BELOW
        found.setdefault(unit(module), set()).update(b for a, b in arrows if a != b)
    return found


def test_imports_are_the_arrows_of_the_document() -> None:
    assert found_arrows() == arrows()


def test_arrows_lead_upwards() -> None:
    above: set[str] = set()
    for name, targets in arrows().items():
        assert targets <= above, f"{name} imports {sorted(targets - above)}, which stand below it"
        above.add(name)


def test_no_modules_import_each_other() -> None:
    found = {
        a: {b for b in bs if (unit(a), unit(b)) not in NAMED_BELOW}
        for a, bs in module_arrows(types=False).items()
    }
    graphlib.TopologicalSorter(found).prepare()


def test_no_code_asks_for_the_name_of_a_variant() -> None:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                asked = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
                assert not asked & NAMES, f"{path}:{node.lineno}"
