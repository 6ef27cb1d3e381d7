"""A conversion is tried on one mixer of each kind before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from converters.tiny import TINY, tiny_model

from glazoo.converters import ConversionError, convert_checkpoint
from glazoo.families import find_family, interception
from glazoo.families.calls import Recurrence


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_was_found_is_said(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "converted", dry_run=True)
    family = find_family(TINY[name][0])
    assert report.mixers == tuple(family.examine(tiny_model(name)).values())
    text = report.to_markdown()
    for mixer in report.mixers:
        assert mixer.mixer in text
        assert all(call in text for call in mixer.calls)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # As if a new release called the same function for something slightly else.
        ("mamba2", {"scale": 1.01}),
        ("qwen3_next", {"scale": 1.01}),
        ("kimi_linear", {"scale": 1.01}),
    ],
)
def test_a_mixer_that_means_something_else_is_refused(
    name: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(name).save_pretrained(tmp_path / "source")

    def misread(call: Any, args: Any, kwargs: Any) -> Recurrence:
        return call.read(
            call, {**dict(zip(call.parameters, args, strict=False)), **kwargs}
        )._replace(**change)

    monkeypatch.setattr(interception.Call, "bind", misread)
    with pytest.raises(ConversionError, match=r"does with .* what glazoo does not know.* off by"):
        convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
