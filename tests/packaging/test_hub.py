"""`make hub`: kernels/ as a repository of the kernels hub, beside the package's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LOADED = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
import glazoo.kernels as ours
ours.linear
hub = get_local_kernel(Path(sys.argv[1]))
assert hub.linear is not ours.linear
q, k, v = torch.randn(3, 1, 5, 2, 4).unbind()
for a, b in zip(hub.linear(q, k, v), ours.linear(q, k, v)):
    assert torch.equal(a, b)
assert hub.__name__ in dir(torch.ops) or hasattr(getattr(torch.ops, hub.__name__), "linear")
print("both")
"""


@pytest.fixture(scope="module")
def hub() -> Path:
    subprocess.run(["make", "-s", "hub"], cwd=ROOT, check=True)
    return ROOT / "build" / "hub"


def test_the_repository_holds_the_kernels_and_no_import_of_the_package(hub: Path) -> None:
    made = hub / "build" / "torch-universal"
    names = {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert {p.name for p in made.iterdir()} == names | {"LICENSE", "metadata.json"}
    assert not [n for n in names if "import glazoo" in (made / n).read_text()]


@pytest.mark.slow
def test_the_hubs_own_loader_takes_it_beside_ours(hub: Path) -> None:
    pytest.importorskip("kernels", reason="the kernels hub's loader: pip install kernels")
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-P", "-c", LOADED, str(hub)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.endswith("both\n"), found.stderr
