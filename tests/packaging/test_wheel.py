"""The wheel holds the whole package, and works installed outside the source tree."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import torch
from smoke import CHECKS
from transformers import Mamba2Config, Mamba2ForCausalLM

import glazoo

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = [
    requirement
    for requirement in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    if not requirement.startswith("glazoo[")  # an extra that holds others
]
# Where the package's modules are in the repository, and where a wheel has them.
FOLDERS = {"glazoo": "glazoo", "kernels": "glazoo/kernels", "specs": "glazoo/specs"}


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command as a user of the wheel would: outside the sources, without our variables."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}: {result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources: setuptools leaves folders in the tree it builds,
    and a module deleted since an earlier build would still be found in them."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    # An sdist, and the wheel from that: what the sdist misses, the wheel misses too.
    run([sys.executable, "-m", "build", "--no-isolation", "-o", out, source], out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own and give that one's folder of programs.

    It sees the dependencies installed here through a path entry. The editable glazoo does not come
    along: a file in our site-packages folder starts its finder, and Python reads such files only
    in the folders of its own environment.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    programs = home / "bin"
    (site,) = home.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], home)
    ours = Path(pytest.__file__).parents[1]
    (site / "dependencies.pth").write_text(f"{ours}\n", "utf-8")
    return programs


def test_wheel_holds_every_module_and_spec(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".npz", ".html", ".css", ".js")
        or path.name == "py.typed"
    }
    assert "glazoo/py.typed" in expected
    missing, surplus = sorted(expected - packed), sorted(packed - expected)
    assert not missing, "not in the wheel (does their folder have an __init__.py?)"
    assert not surplus


def test_wheel_carries_readme_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        description = archive.read(metadata).decode()
        (license_text,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(license_text).decode() == (ROOT / "LICENSE").read_text("utf-8")
    assert (ROOT / "README.md").read_text("utf-8").strip() in description


def test_installed_wheel_finds_its_specs(installed: Path, tmp_path: Path) -> None:
    program = "import glazoo, json; print(json.dumps([glazoo.__file__, *glazoo.names()]))"
    file, *names = json.loads(run([installed / "python", "-c", program], tmp_path))
    assert Path(file).is_relative_to(installed.parent)
    assert tuple(names) == tuple(glazoo.names())


def test_installed_command_lists_every_variant(installed: Path, tmp_path: Path) -> None:
    listed = run([installed / "glazoo", "list", "--json"], tmp_path)
    assert json.loads(listed)
    for name in glazoo.names():
        assert f'"{name}"' in listed


COMPARE = """
import sys

import torch
from smoke import CHECKS
from transformers import AutoModelForCausalLM

import glazoo.models

source, converted = (AutoModelForCausalLM.from_pretrained(folder) for folder in sys.argv[1:])
assert type(converted) is not type(source)
tokens = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    torch.testing.assert_close(converted(tokens).logits, source(tokens).logits)
"""


@pytest.mark.slow
def test_installed_wheel_converts_a_checkpoint(installed: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=2,
        chunk_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Mamba2ForCausalLM(config).save_pretrained(tmp_path / "source")
    run([installed / "glazoo", "convert", "source", "converted", "--verify"], tmp_path)
    run([installed / "python", "-c", COMPARE, "source", "converted"], tmp_path)


def test_dist_tries_every_extra_of_users() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (tried,) = re.findall(r"^EXTRAS \?= (.+)$", makefile, re.MULTILINE)
    extras = PROJECT["optional-dependencies"].keys() - {"dev", "docs", "ecosystem", "release"}
    assert set(tried.split()) == CHECKS.keys() == extras | {"core"}


def test_version_is_stated_once_for_all() -> None:
    assert PROJECT["version"] == glazoo.__version__
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {glazoo.__version__}\n" in citation


def canonical(requirement: str) -> str:
    """The normalised name of the distribution that a requirement is about."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder: str) -> set[str]:
    """The top-level names of all imports in a folder, those inside functions included."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"glazoo"}


def test_imports_are_declared() -> None:
    declared = {canonical(requirement) for requirement in REQUIREMENTS}
    distributions = packages_distributions()
    for folder in FOLDERS:
        for name in imported(folder):
            provided_by = {canonical(d) for d in distributions.get(name, [name])}
            if name == "vllm":
                # The plugin is imported by vLLM, which is there then and pins a torch of its own.
                continue
            assert provided_by & declared, f"{folder} imports {name}, which pyproject.toml omits"


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {canonical(pin) for pin in pins}
    assert {canonical(requirement) for requirement in REQUIREMENTS} <= pinned
