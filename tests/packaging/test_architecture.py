"""Imports go along the arrows of ARCHITECTURE.md, and every arrow there is used."""

from __future__ import annotations

import ast
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


def imported(module: str, path: Path) -> Iterator[str]:
    """Names that a module imports anywhere in its text, and modules that it names as data."""
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
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


def found_arrows() -> dict[str, set[str]]:
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = found.setdefault(unit(module), set())
        for name in imported(module, path):
            while name and name not in known:
                name = name.rpartition(".")[0]
            arrow = unit(module), unit(name or "glazoo")
            if name and arrow[0] != arrow[1] and arrow not in NAMED_BELOW:
                targets.add(arrow[1])
    return found


def test_imports_are_the_arrows_of_the_document() -> None:
    assert found_arrows() == arrows()


def test_arrows_lead_upwards() -> None:
    above: set[str] = set()
    for name, targets in arrows().items():
        assert targets <= above, f"{name} imports {sorted(targets - above)}, which stand below it"
        above.add(name)


def test_no_code_asks_for_the_name_of_a_variant() -> None:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                asked = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
                assert not asked & NAMES, f"{path}:{node.lineno}"
