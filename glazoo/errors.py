"""Errors for people: the one exception of conversions, and an operating system's in one line."""

from __future__ import annotations

__all__ = ["ConversionError", "one_line"]


class ConversionError(ValueError):
    """Something that cannot be converted, reverted or verified; its message is one line."""


def one_line(error: OSError) -> str:
    """Return an operating system's refusal in one line."""
    reason = error.strerror or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason
