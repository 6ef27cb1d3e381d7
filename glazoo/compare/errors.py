"""What the measurements refuse."""

__all__ = ["CompareError"]


class CompareError(ValueError):
    """A measurement that cannot be made as asked, or results that do not belong together."""
