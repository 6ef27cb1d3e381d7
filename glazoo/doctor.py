"""What this installation consists of, and which of its combinations are known to fail."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from glazoo.converters.files import leftovers, remove_leftovers
from glazoo.errors import one_line
from glazoo.versions import TESTED, installed, numbers, untested

__all__ = ["Finding", "Report", "examine"]

_PACKAGES = (
    "glazoo",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "pydantic",
    "einops",
    "jaxtyping",
    "numpy",
    "numba",
    "scipy",
    "rich",
    "typer",
    "hypothesis",
    "accelerate",
    "datasets",
    "lm-eval",
    "matplotlib",
    "flash-linear-attention",
    "mamba-ssm",
    "causal-conv1d",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing about this installation."""

    level: Literal["error", "warning"]
    what: str
    """What is wrong."""
    do: str
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Report:
    """Versions, devices and findings."""

    versions: dict[str, str | None]
    devices: list[dict[str, str]]
    engines: list[str]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether there is no error among the findings."""
        return all(f.level != "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"healthy": self.healthy}


def examine(folders: Iterable[Path] = (), *, clean: bool = False) -> Report:
    """Looks at versions and devices, at combinations that are known to fail, and at what killed
    runs have left in folders.

    Args:
        folders: where to look.
        clean: remove what they have left.

    Returns:
        The report; nothing is fetched, and nothing is changed but for `clean`.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= installed(_PACKAGES)
    devices = _devices()
    findings = judge(versions, gpu=len(devices) > 1, interpreting=_interpreting())
    for folder in folders:
        findings += _left(folder, clean=clean)
    from glazoo.engines import available

    return Report(versions, devices, list(available()), findings)


def _left(folder: Path, *, clean: bool) -> list[Finding]:
    try:
        gone = remove_leftovers(folder) if clean else []
        left = leftovers(folder)
    except OSError as e:
        return [Finding("warning", f"cannot look for leftovers: {one_line(e)}", "name a folder")]
    removal = f"glazoo doctor {folder} --remove-leftovers"
    return [
        *(Finding("warning", f"a killed run had left {x}", "removed") for x in gone),
        *(
            Finding("warning", f"a killed run has left {x}", "" if x.only_copy else removal)
            for x in left
        ),
    ]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _devices() -> list[dict[str, str]]:
    import torch

    from glazoo.engines import automatic

    cpu, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    name = f"{cpu}, {threads} threads, impl='auto' is {automatic('cpu')}"
    devices = [{"device": "cpu", "name": name}]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        name = f"{p.name}, {p.total_memory >> 20} MiB, impl='auto' is {automatic('cuda')}"
        devices.append({"device": f"cuda:{i}", "name": name})
    return devices


def judge(versions: dict[str, str | None], *, gpu: bool, interpreting: bool) -> list[Finding]:
    """Return the findings for a set of versions: a pure function, so that it can be tested.

    Args:
        versions: installed versions by package name, None where absent.
        gpu: whether there is a GPU.
        interpreting: whether Triton's interpreter is switched on.

    Returns:
        The findings, errors first.
    """
    out: list[Finding] = []
    for package, (wanted, _) in TESTED.items():
        have = versions.get(package)
        if have is not None and numbers(have) < numbers(wanted):
            out.append(
                Finding(
                    "error",
                    f"{package} {have} is older than {wanted}",
                    f"pip install '{package}>={wanted}'",
                )
            )
    for package, what in untested(versions).items():
        newest = TESTED[package][1]
        do = f"if something fails that should not: pip install '{package}=={newest}.*'"
        out.append(Finding("warning", what, do))
    if versions.get("triton") is None:
        level: Literal["error", "warning"] = "error" if gpu else "warning"
        out.append(
            Finding(
                level, "triton is not installed: the GPU kernels cannot run", "pip install triton"
            )
        )
    if versions.get("numba") is None:
        out.append(
            Finding(
                "warning",
                "numba is not installed: on CPUs, impl='auto' is 'chunked', which takes several "
                "times as long with one importance per synapse",
                "pip install 'glazoo[cpu]'",
            )
        )
    if versions.get("transformers") is None:
        out.append(
            Finding(
                "warning",
                "transformers is not installed: models and checkpoint conversion cannot run",
                "pip install 'glazoo[models]'",
            )
        )
    if versions.get("flash-linear-attention") is not None:
        out.append(
            Finding(
                "warning",
                "flash-linear-attention registers `mamba2` and `mamba` for itself when imported, "
                "so that "
                "AutoModelForCausalLM may give its classes instead of transformers'",
                "load sources by their class (transformers.Mamba2ForCausalLM), as the converter "
                "does",
            )
        )
        if not gpu:
            out.append(
                Finding(
                    "error",
                    "flash-linear-attention without a GPU: transformers binds its Triton functions "
                    "at import, and "
                    "Gated DeltaNet and KDA models then fail with '0 active drivers'",
                    "pip uninstall flash-linear-attention fla-core on machines without a GPU",
                )
            )
    if interpreting:
        out.append(
            Finding(
                "warning",
                "TRITON_INTERPRET is set: kernels run in Python, slowly, and wrong in bfloat16",
                "unset TRITON_INTERPRET unless you test kernels",
            )
        )
        triton, numpy = versions.get("triton"), versions.get("numpy")
        if triton and numpy and numbers(triton) == (3, 6) and numbers(numpy) >= (2, 4):
            out.append(
                Finding(
                    "error",
                    f"Triton {triton} cannot interpret loops with loaded bounds under NumPy "
                    f"{numpy}",
                    "pip install 'numpy<2.4', or a newer Triton",
                )
            )
    return sorted(out, key=lambda f: f.level)
