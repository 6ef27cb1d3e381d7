"""What each part of the package needs: specs, engines and layers the core requirements and no
extra; every other part says which extra it misses."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import glazoo

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))[
    "project"
]


def modules(requirements: list[str]) -> set[str]:
    """The modules of the required packages; other extras of glazoo are no package."""
    names = {re.split(r"[^\w.-]", r, maxsplit=1)[0].lower() for r in requirements} - {"glazoo"}
    return {name.replace("-", "_") for name in names}


CORE = modules(PROJECT["dependencies"])
EXTRAS = {name: modules(rs) for name, rs in PROJECT["optional-dependencies"].items()}
# What an extra brings by naming others.
for name, rs in PROJECT["optional-dependencies"].items():
    others = {o for r in rs for part in re.findall(r"glazoo\[(.*)\]", r) for o in part.split(",")}
    EXTRAS[name] = EXTRAS[name].union(*(EXTRAS[o] for o in others))
# triton exists for Linux only; the rest is what an installation without extras does not have.
ABSENT = tuple(sorted({"triton", "click", "huggingface_hub", *set().union(*EXTRAS.values())}))

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


# What takes long to import and a call of `attention` does not need.
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "scipy", "transformers", "triton", "datasets")
RUN = "from glazoo.cli import app; app({}, standalone_mode=False)"


@pytest.mark.parametrize(
    ("program", "slow"),
    [
        ("import glazoo; glazoo.attention", SLOW),
        ("import glazoo", ("torch", "numpy", "pydantic", "rich")),
        (RUN.format(["--version"]), ("torch", "numpy", "pydantic")),
        # Looking variants up needs what describes them alone.
        (RUN.format(["list"]), ("torch", "numpy", "jaxtyping")),
        (RUN.format(["show", "metaplastic_gla"]), ("torch", "numpy", "jaxtyping")),
        (RUN.format(["schema"]), ("torch", "numpy", "jaxtyping")),
        (RUN.format(["--help"]), ("torch", "numpy", "transformers", "glazoo.compare")),
        (RUN.format(["convert", "--help"]), ("transformers", "glazoo.compare")),
    ],
)
def test_what_imports_slowly_waits_until_it_is_needed(
    program: str, slow: tuple[str, ...], tmp_path: Path
) -> None:
    loaded = f"\nimport sys; print('loaded:', *set(sys.modules).intersection({slow!r}))"
    status, output = run_without((), program + loaded, tmp_path)
    assert status == 0, output
    assert output.splitlines()[-1] == "loaded:"


def test_every_public_name_is_imported_from_where_type_checkers_see_it() -> None:
    tree = ast.parse(Path(glazoo.__file__).read_text("utf-8"))
    typed = {
        alias.asname or alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == glazoo._HOMES
    assert sorted(typed) == sorted(glazoo.__all__)
    assert glazoo.layers.__name__ == "glazoo.layers"
    with pytest.raises(AttributeError, match="module 'glazoo' has no attribute 'attentoin'"):
        _ = glazoo.attentoin


def test_import_needs_no_optional_package(tmp_path: Path) -> None:
    status, output = run_without(ABSENT, IMPORT, tmp_path)
    assert status == 0, output


def test_every_variant_runs_without_optional_packages(tmp_path: Path) -> None:
    assert len(glazoo.names()) > 0
    status, output = run_without(ABSENT, IMPORT + CPU_RUNS, tmp_path)
    assert status == 0, output
    assert set(glazoo.names()) <= set(output.split())


LAYER = """
import sys
import torch
import glazoo.engines.triton
from glazoo.layers import GatedLinearAttention, set_plasticity

x = torch.randn(1, 3, 8)
layer = GatedLinearAttention("gla", 8, num_heads=2, head_k_dim=4, head_v_dim=4)
before = layer(x).output
glazoo.metaplasticize(layer)
torch.testing.assert_close(layer(x).output, before)
for name in glazoo.__all__:
    getattr(glazoo, name)
print("files:", *(m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "glazoo"))
print("loaded:", *{name.partition(".")[0] for name in sys.modules})
"""


def directly(file: str) -> set[str]:
    """The top-level names that a file imports when it is imported, other than our own."""
    found = set()
    for node in ast.parse(Path(file).read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"glazoo"}


def test_the_core_requirements_are_what_specs_engines_and_layers_import(tmp_path: Path) -> None:
    without = tuple(set(ABSENT) - {"triton"})
    status, output = run_without(without, IMPORT + LAYER + "import triton", tmp_path)
    assert status == 0, output
    files, loaded = (set(line.split()[1:]) for line in output.splitlines()[-2:])
    assert len(files) > 30
    imported = set().union(*map(directly, files))
    assert imported <= CORE
    # What is required without an import of ours: torch works with it and does not bring it.
    assert CORE - imported <= {"numpy", "triton"}
    assert CORE - loaded <= {"triton"}


CONVERT = "from glazoo.converters import {0}; {0}"
# What a measurement of capacity needs to be over soon: the quantiles come last.
SMALL = ["--state", "256", "--value-size", "4", "--pairs", "4", "--seeds", "2"]
CONFIG = """
[model]
pattern = ["gla"]
[data]
corpus = "pydoc"
[training]
output_dir = "out"
"""


def again(*case: Any) -> Any:
    """A further case of a package that is absent in another one, too: a process takes seconds."""
    return pytest.param(*case, marks=pytest.mark.slow)


COMMAND = "import sys; sys.argv = ['glazoo', *{!r}]; from glazoo.__main__ import main; main()"


@pytest.mark.parametrize(
    ("absent", "program", "extra"),
    [
        ("transformers", "import glazoo.models", "models"),
        again("transformers", "from glazoo.models import GlazooForCausalLM", "models"),
        again("transformers", CONVERT.format("convert_checkpoint"), "models"),
        again("transformers", CONVERT.format("verify_models"), "models"),
        again("transformers", CONVERT.format("import_original"), "models"),
        ("transformers", CONVERT.format("convert_checkpoint") + "('a', 'b')", "models"),
        again("transformers", "import glazoo.families; glazoo.families.families()", "models"),
        (
            "transformers",
            "import glazoo, torch; glazoo.metaplasticize(torch.nn.Linear(2, 2))",
            "models",
        ),
        again(
            "accelerate",
            CONVERT.format("tune_checkpoint") + "('a', 'b', ['c'])",
            "train",
        ),
        ("hypothesis", "from glazoo.theory import strategies; strategies.instances()", "verify"),
        ("rich", "from glazoo.theory import conformance", "verify"),
        ("scipy", "from glazoo.stats import interval; interval([1, 2])", "compare"),
        ("matplotlib", "from glazoo.plotting import require as r; r()", "plots"),
        ("typer", "import glazoo.terminal", "cli"),
        ("typer", "import glazoo.train", "cli"),
        ("datasets", "from glazoo.converters.texts import _splits as s; s('x')", "train"),
    ],
)
def test_what_misses_an_extra_says_so(
    absent: str, program: str, extra: str, tmp_path: Path
) -> None:
    status, output = run_without((absent,), program, tmp_path)
    assert status == 1
    last = output.strip().splitlines()[-1]
    said = f"ImportError: {absent} is not installed: pip install 'glazoo[{extra}]'"
    assert last.startswith(said), output
    assert absent in EXTRAS[extra]


@pytest.mark.parametrize(
    ("absent", "arguments", "extra"),
    [
        ("typer", ["list"], "cli"),
        ("rich", ["--version"], "cli"),
        ("transformers", ["convert", "a", "b"], "models"),
        again("transformers", ["inspect", "a"], "models"),
        again("transformers", ["tune", "a", "b", "c"], "train"),
        ("transformers", ["train", "c.toml"], "train"),
        # Of the same extra; imports transformers first.
        again("accelerate", ["train", "c.toml"], "train"),
        ("matplotlib", ["capacity", "gla"], "plots"),
        ("scipy", ["capacity", "gla", "--no-plots", *SMALL], "compare"),
        again("scipy", ["decay", "gla", "--no-plots"], "compare"),
        ("submitit", ["compare", "gla", "--no-plots", "--cluster", "slurm"], "cluster"),
    ],
)
def test_commands_without_their_extra_are_one_line(
    absent: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    status, output = run_without((absent,), COMMAND.format(arguments), tmp_path)
    assert status == 2
    (line,) = output.strip().splitlines()
    said = f"glazoo: {absent} is not installed: pip install 'glazoo[{extra}]'"
    assert line.startswith(said)
    # It is said before anything is measured or written.
    assert {p.name for p in tmp_path.iterdir()} == {"c.toml"}


def test_the_extras_hold_what_the_rest_imports() -> None:
    """`all` is every extra of a user but those that bring kernels to compile, and no package is in
    the core and in an extra."""
    (everything,) = PROJECT["optional-dependencies"]["all"]
    named = set(everything.removeprefix("glazoo[").removesuffix("]").split(","))
    apart = {"all", "cpu", "dev", "docs", "ecosystem", "export", "fla", "release"}
    assert named == EXTRAS.keys() - apart
    assert not CORE & set().union(*EXTRAS.values())
    assert {name.replace("_", "-") for name in CORE} <= {
        d.lower() for ds in packages_distributions().values() for d in ds
    }


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
