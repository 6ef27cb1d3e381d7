"""JSON that every parser reads, with numbers that JSON lacks.

An infinity or something that is not a number is written as `{"__float__": "Infinity"}`,
`"-Infinity"` or `"NaN"`, as transformers writes them in configurations.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["dumps", "loads", "plain"]

_TAG = "__float__"
_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def dumps(data: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return plain data as JSON text."""
    return json.dumps(
        plain(data), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False
    )


def loads(text: str | bytes) -> Any:
    """Return the data of a JSON text, of `dumps` or of others.

    Raises:
        ValueError: it is no JSON text.
    """
    return json.loads(text, object_hook=_untagged)


def plain(value: Any) -> Any:
    """Return plain data as every JSON writer takes it: lists for tuples, and no number that JSON
    lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {_TAG: name}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _untagged(found: dict[str, Any]) -> Any:
    if list(found) == [_TAG] and isinstance(found[_TAG], str):
        return _NUMBERS.get(found[_TAG], found)
    return found
