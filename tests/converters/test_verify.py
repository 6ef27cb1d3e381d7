"""Measuring a converted model against its source."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.conftest import MakeSource
from converters.converting import edit_json, make_model, open_gates
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo import metaplasticize
from glazoo.converters import ConversionError, convert_checkpoint, verify_checkpoint, verify_models

NAMES = ["prompt", "padded", "decoded", "continued", "greedy", "beams"]


@pytest.mark.parametrize("gate", ["head", pytest.param("value", marks=pytest.mark.slow)])
def test_a_conversion_passes(source: Path, tmp_path: Path, gate: str) -> None:
    convert_checkpoint(source, tmp_path / "c", gate=gate)
    lines: list[str] = []
    report = verify_checkpoint(source, tmp_path / "c", float64=True, progress=lines.append)
    assert [c.name for c in report.checks] == NAMES + [f"{n} (float64)" for n in NAMES]
    assert report.passed
    assert report.at_source
    assert report.shift is None
    for check in report.checks:
        if check.max_difference is not None:
            assert check.budget is not None
            assert check.max_difference <= check.budget
            assert check.budget < (1e-10 if "float64" in check.name else 1e-2)
    assert len(lines) == 3


def test_reports(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    report = verify_checkpoint(source, tmp_path / "c", batch=1, tokens=9, new_tokens=2)
    data = json.loads(json.dumps(report.to_json()))
    assert data["passed"] is True
    assert [c["name"] for c in data["checks"]] == NAMES
    report.write(tmp_path / "v.json")
    report.write(tmp_path / "v.md")
    assert json.loads((tmp_path / "v.json").read_text()) == data
    with pytest.raises(ConversionError, match=r"cannot write the report .*: No such file"):
        report.write(tmp_path / "nowhere" / "v.json")
    text = (tmp_path / "v.md").read_text()
    assert "agrees with its source" in text
    assert "FAILED" not in text
    assert all(f"| {name} | ok |" in text for name in NAMES)


def test_open_gates_are_measured_apart(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c", plasticity=0.5)
    report = verify_checkpoint(source, tmp_path / "c")
    assert report.passed
    assert not report.at_source
    assert report.plasticity == (0.5, 0.5)
    assert report.shift is not None
    assert report.shift > 1e-3
    assert "kappa from 0.5 to 0.5" in report.to_markdown()


def test_trained_gates_are_measured_apart_and_stay(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    open_gates(model)
    before = copy.deepcopy(model.state_dict())
    report = verify_models(Mamba2ForCausalLM.from_pretrained(source), model.train())
    assert report.passed
    assert not report.at_source
    assert model.training
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def damage_weight(model: Any) -> None:
    # One weight of one projection, by a percent of its matrix's size.
    weight = model.backbone.layers[1].mixer.in_proj.weight
    weight[3, 4] += 0.01 * weight.abs().max()


def damage_skip(model: Any) -> None:
    model.backbone.layers[0].mixer.D[1] += 1e-3


def damage_decoding(model: Any) -> None:
    cls = type(model.backbone.layers[0].mixer)

    class Wrong(cls):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            cached = any(kwargs.get(name) is not None for name in ("cache", "cache_params"))
            scale = 1.001 if cached and hidden_states.shape[1] == 1 else 1.0
            return super().forward(scale * hidden_states, **kwargs)

    model.backbone.layers[0].mixer.__class__ = Wrong


def damage_padding(model: Any) -> None:
    cls = type(model.backbone.layers[0].mixer)

    class Wrong(cls):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs)

    model.backbone.layers[0].mixer.__class__ = Wrong


def damage_nan(model: Any) -> None:
    model.backbone.norm_f.weight[0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        (damage_weight, {"prompt", "padded", "decoded", "continued"}),
        (damage_skip, {"prompt", "padded", "decoded", "continued"}),
        (damage_decoding, {"decoded"}),
        (damage_padding, {"padded"}),
        (damage_nan, {"prompt", "padded", "decoded", "continued"}),
    ],
)
@torch.no_grad()
def test_small_faults_are_found(damage: Callable[[Any], None], failing: set[str]) -> None:
    source = make_model()
    model = metaplasticize(copy.deepcopy(source))
    damage(model)
    report = verify_models(source, model)
    failed = {c.name for c in report.checks if not c.passed}
    assert not report.passed
    assert failed - {"greedy", "beams"} == failing
    assert "DIFFERS FROM" in report.to_markdown()
    json.dumps(report.to_json(), allow_nan=False)


def test_bfloat16_and_plain_float64_models(source: Path) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        old = Mamba2ForCausalLM.from_pretrained(source, dtype=dtype)
        new = metaplasticize(copy.deepcopy(old))
        logits = [c for c in verify_models(old, new).checks if c.max_difference is not None]
        assert all(c.passed for c in logits), dtype


def test_what_cannot_be_compared_is_refused(
    make_source: MakeSource, source: Path, tmp_path: Path
) -> None:
    convert_checkpoint(source, tmp_path / "c")
    model = make_model()
    with pytest.raises(ConversionError, match="has no importance gates"):
        verify_models(model, model)
    converted = metaplasticize(copy.deepcopy(model))
    with pytest.raises(ConversionError, match="this model is converted itself"):
        verify_models(converted, converted)
    with pytest.raises(ConversionError, match="tokens: got 1, expected at least 2"):
        verify_models(model, converted, tokens=1)
    with pytest.raises(ConversionError, match="there is no such folder"):
        verify_checkpoint(source, tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="has no block 'metaplastic'"):
        verify_checkpoint(source, source)
    with pytest.raises(ConversionError, match="converted already"):
        verify_checkpoint(tmp_path / "c", tmp_path / "c")
    other = make_source("other", seed=5)
    assert not verify_checkpoint(other, tmp_path / "c", tokens=9, new_tokens=2).passed


def test_folders_that_do_not_load_are_refused(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    index = tmp_path / "c" / "model.safetensors.index.json"
    last = json.loads(index.read_text())["weight_map"]["backbone.layers.1.mixer.metaplastic.b_up"]
    (tmp_path / "c" / last).unlink()
    with pytest.raises(ConversionError, match="cannot load") as caught:
        verify_checkpoint(source, tmp_path / "c")
    assert "\n" not in str(caught.value)
    edit_json(tmp_path / "c" / "config.json", metaplastic={"format_version": 99})
    with pytest.raises(ConversionError, match="is 99, this glazoo reads 1, 2, 3: install"):
        verify_checkpoint(source, tmp_path / "c")
