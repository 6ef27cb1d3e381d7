"""`import glazoo` and both engines of a CPU need neither triton nor transformers nor any extra."""

import subprocess
import sys
from pathlib import Path

import pytest

import glazoo

# triton exists for Linux only; transformers is a dependency of models and converters alone; the
# rest are the extras' packages, which an installation without extras does not have.
ABSENT = (
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "lm_eval",
    "hypothesis",
    "matplotlib",
    "pytest",
)

# Filters every finder, so that an absent package looks absent to `import` and to `find_spec` alike:
# a finder that raised from `find_spec` would also break code which only asks what is installed.
HIDE = """
import sys

class Without:
    def __init__(self, finder, absent):
        self.finder, self.absent = finder, absent

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

absent = frozenset({absent!r})
sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
"""

IMPORT = "import glazoo\n"

# Numbers in (0, 1), negated for logarithms of decays, are in the domain of every operand.
CPU_RUNS = """
import torch

sizes = {"B": 1, "T": 3, "H": 1, "HV": 2, "K": 4, "V": 5}
torch.manual_seed(0)

def run(spec):
    operands = {"k": None}
    for operand in glazoo.lower(spec).operands:
        if operand.required:
            shape = [spec.substeps * 3 if d == "nT" else sizes[d] for d in operand.shapes[0]]
            value = torch.rand(shape, dtype=torch.float64)
            operands[operand.name] = -value if operand.high == 0 else value
    for impl in ("reference", "chunked"):
        output = glazoo.attention(spec, **operands, impl=impl).output
        assert output.shape == (1, 3, 2, 5), spec.name
        assert output.isfinite().all(), spec.name
    print(spec.name)

for name in glazoo.names():
    spec = glazoo.load(name)
    run(spec)
    if not spec.metaplastic:
        run(glazoo.metaplasticize(spec))
"""


def run_without(absent: tuple[str, ...], program: str, folder: Path) -> tuple[int, str]:
    """Run `program` in a new process, outside the source tree, that lacks the packages `absent`."""
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::ImportWarning",
            "-c",
            HIDE.format(absent=absent) + program,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return result.returncode, result.stdout + result.stderr


# What takes long to import and no command that only looks things up needs.
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "scipy", "transformers", "triton", "datasets")


@pytest.mark.parametrize(
    "program",
    [
        "import glazoo",
        "from glazoo.cli import app; app(['--version'], standalone_mode=False)",
        "from glazoo.cli import app; app(['list'], standalone_mode=False)",
    ],
)
def test_what_imports_slowly_waits_until_it_is_needed(program: str, tmp_path: Path) -> None:
    loaded = f"\nimport sys; print('loaded:', *set(sys.modules).intersection({SLOW!r}))"
    status, output = run_without((), program + loaded, tmp_path)
    assert status == 0, output
    assert output.splitlines()[-1] == "loaded:"


def test_import_needs_no_optional_package(tmp_path: Path) -> None:
    status, output = run_without(ABSENT, IMPORT, tmp_path)
    assert status == 0, output


def test_every_variant_runs_without_optional_packages(tmp_path: Path) -> None:
    assert len(glazoo.names()) > 0
    status, output = run_without(ABSENT, IMPORT + CPU_RUNS, tmp_path)
    assert status == 0, output
    assert set(glazoo.names()) <= set(output.split())


@pytest.mark.parametrize("package", ["triton", "transformers"])
def test_hiding_a_package_makes_its_import_fail(package: str, tmp_path: Path) -> None:
    """The test above can fail: what it hides is there, and is not there once hidden."""
    status, output = run_without((), f"import {package}", tmp_path)
    assert status == 0, output
    status, output = run_without((package,), f"import {package}", tmp_path)
    assert status == 1
    assert f"ModuleNotFoundError: No module named '{package}'" in output
    question = f"import importlib.util; assert importlib.util.find_spec('{package}') is None"
    status, output = run_without((package,), question, tmp_path)
    assert status == 0, output
