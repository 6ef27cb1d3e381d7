"""The model families that can be converted: one declared description each over shared mixers."""

from __future__ import annotations

from glazoo.converters.errors import ConversionError
from glazoo.converters.families.base import Block, Family, Sizes, TensorRule
from glazoo.converters.families.catalogue import FAMILIES, NOT_CONVERTIBLE

__all__ = ["FAMILIES", "NOT_CONVERTIBLE", "Block", "Family", "Sizes", "TensorRule", "find_family"]


def find_family(model_type: object) -> Family:
    """Gives the family of a `model_type`.

    Raises:
        ConversionError: it is unknown, known not to be convertible, or that of a converted model.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if any(model_type == f.converted_model_type for f in FAMILIES.values()):
        raise ConversionError(f"model_type {model_type!r}: this model is converted already")
    supported = f"supported are: {', '.join(sorted(FAMILIES))}"
    if isinstance(model_type, str) and model_type in NOT_CONVERTIBLE:
        reason = NOT_CONVERTIBLE[model_type]
        raise ConversionError(f"model_type {model_type!r} is not supported: {reason}; {supported}")
    raise ConversionError(f"model_type {model_type!r} is not supported; {supported}")
