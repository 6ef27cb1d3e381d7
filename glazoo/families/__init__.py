"""The model families that can be converted: those whose mixers call a known scan function."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from glazoo.errors import ConversionError, extra
from glazoo.families.base import CACHES, Family, Found, LiveFamily
from glazoo.families.calls import CALLS, known_calls
from glazoo.families.catalogue import NOT_CONVERTIBLE, OVERRIDES, QUIRKS
from glazoo.families.own import OWN

__all__ = [
    "CACHES",
    "CALLS",
    "NOT_CONVERTIBLE",
    "Family",
    "Found",
    "LiveFamily",
    "families",
    "find_family",
    "known_calls",
]


@functools.cache
def families() -> dict[str, Family]:
    """Return every family of the installed transformers whose code calls a known scan function, and
    that of `glazoo.models`, by `model_type`."""
    with extra("models"):
        import transformers
        from transformers.models.auto import configuration_auto as auto

    folder = Path(transformers.__file__).parent / "models"
    words = "|".join((*CALLS, *OVERRIDES)).encode()
    mark = re.compile(rb"\b(?:" + words + rb")\b")
    calling: dict[str, bool] = {}
    found: dict[str, Family] = {}
    for model_type in auto.CONFIG_MAPPING_NAMES:  # type: ignore[attr-defined]
        name = auto.model_type_to_module_name(model_type)
        if name not in calling:
            path = folder / name / f"modeling_{name}.py"
            calling[name] = path.is_file() and mark.search(path.read_bytes()) is not None
        if calling[name] and model_type not in NOT_CONVERTIBLE:
            family = Family(model_type, quirks=QUIRKS.get(model_type), overrides=OVERRIDES)
            if family.generative:
                found[model_type] = family
    return {**found, OWN.model_type: OWN}


def find_family(model_type: object) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ConversionError: it is unknown, known not to be convertible, or that of a converted model.
    """
    known = families()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    if model_type in {f"metaplastic_{name}" for name in known}:
        raise ConversionError(f"model_type {model_type!r}: this model is converted already")
    from transformers.models.auto import configuration_auto as auto

    supported = f"supported are: {', '.join(sorted(known))}"
    if isinstance(model_type, str) and model_type in NOT_CONVERTIBLE:
        reason = NOT_CONVERTIBLE[model_type]
    elif model_type in auto.CONFIG_MAPPING_NAMES:  # type: ignore[attr-defined]
        reason = f"its layers call no scan function that is known; known are: {known_calls()}"
    else:
        reason = "the installed transformers does not know it"
    raise ConversionError(f"model_type {model_type!r} is not supported: {reason}; {supported}")
