"""Numbers that JSON lacks, in JSON."""

from __future__ import annotations

import json
import math

import pytest
from transformers import PreTrainedConfig

from glazoo.strictjson import dumps, loads, plain

DATA = {
    "finite": [0.1, -0.0, 1e300, 5e-324, 3, True, None, "NaN", "Infinity"],
    "others": (math.inf, [-math.inf], {"x": math.inf}),
    "text": "\u00e9\u4eca",
}


def strict(text: str | bytes) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_number_comes_back_from_text_that_every_parser_reads() -> None:
    text = dumps(DATA, indent=1)
    strict(text)
    assert loads(text) == {**DATA, "others": [math.inf, [-math.inf], {"x": math.inf}]}
    assert math.copysign(1, loads(dumps(-0.0))) == -1
    assert math.isnan(loads(dumps([math.nan]))[0])
    assert strict(json.dumps(plain(DATA), allow_nan=False)) == strict(text)


def test_the_form_is_the_one_of_transformers() -> None:
    config = PreTrainedConfig(limits=[0.0, math.inf], lowest=-math.inf)
    assert loads(config.to_json_string())["limits"] == [0.0, math.inf]
    written = strict(dumps({"limits": [0.0, math.inf], "lowest": -math.inf}))
    assert written == {k: strict(config.to_json_string())[k] for k in ("limits", "lowest")}  # type: ignore[index]


def test_what_only_looks_like_such_a_number_stays() -> None:
    for data in ({"__float__": "much"}, {"__float__": 1}, {"__float__": "NaN", "x": 1}):
        assert loads(json.dumps(data)) == data
    with pytest.raises(ValueError, match="Expecting value"):
        loads("nonsense")
    # What other writers leave bare is read as well.
    assert loads('{"limit": Infinity}') == {"limit": math.inf}
