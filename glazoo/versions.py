"""Which versions of other packages this one was tested with."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED", "installed", "numbers", "stated", "untested"]

TESTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.17", "5.24"),
    "pydantic": ("2.7", "2.14"),
}
"""The oldest and the newest version of each that the tests have run on; pyproject.toml demands the
oldest."""


def numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(x) for x in text.split("+")[0].split(".")[:2] if x.isdigit())


def installed(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each package, None where it is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def stated(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of glazoo and of packages, as results state them."""
    found = installed(("glazoo", *packages)).items()
    return {"python": platform.python_version()} | {p: v or "not installed" for p, v in found}


def untested(versions: Mapping[str, str | None]) -> dict[str, str]:
    """Say of each package that is newer than what the tests have run on, which version they have.

    Args:
        versions: installed versions by package name.
    """
    return {
        package: f"{package} {have} is newer than {newest}, the newest that was tested"
        for package, (_, newest) in TESTED.items()
        if (have := versions.get(package)) is not None and numbers(have) > numbers(newest)
    }
