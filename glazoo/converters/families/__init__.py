"""The model families that can be converted: one declared description each over shared mixers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from glazoo.converters.errors import ConversionError
from glazoo.converters.families.base import Block, Family, Sizes, TensorRule
from glazoo.converters.families.mamba2 import MAMBA2

__all__ = ["FAMILIES", "Block", "Family", "Sizes", "TensorRule", "find_family"]

FAMILIES: Mapping[str, Family] = MappingProxyType({f.model_type: f for f in (MAMBA2,)})
"""Every supported family by its `model_type`."""


def find_family(model_type: object) -> Family:
    """Gives the family of a `model_type`.

    Raises:
        ConversionError: it is unknown, or that of a converted model.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if any(model_type == f.converted_model_type for f in FAMILIES.values()):
        raise ConversionError(f"model_type {model_type!r}: this model is converted already")
    raise ConversionError(
        f"model_type {model_type!r} is not supported; supported are: {', '.join(sorted(FAMILIES))}"
    )
