"""The one exception of the converters."""

from __future__ import annotations

__all__ = ["ConversionError"]


class ConversionError(ValueError):
    """Something that cannot be converted, reverted or verified; its message is one line."""
