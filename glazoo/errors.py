"""Errors for people: of conversions, missing packages and the operating system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ConversionError", "extra", "one_line"]


class ConversionError(ValueError):
    """Something that cannot be converted, reverted or verified; its message is one line."""


def one_line(error: OSError) -> str:
    """Return an operating system's refusal in one line."""
    reason = error.strerror or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


@contextmanager
def extra(name: str, *, instead: str = "") -> Iterator[None]:
    """Say which extra of glazoo brings what the imports inside a `with` block miss.

    Args:
        name: the extra, as pyproject.toml calls it.
        instead: what else helps.

    Raises:
        ImportError: a package is not installed; the message has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package in ("", "glazoo"):
            raise
        also = f", or {instead}" if instead else ""
        message = f"{package} is not installed: pip install 'glazoo[{name}]'{also}"
        raise ImportError(message, name=package) from e
