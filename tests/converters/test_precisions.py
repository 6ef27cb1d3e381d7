"""Folders in every form of importance: convert, verify, calibrate, inspect, revert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import contents, open_gates
from tiny import tiny_model

from glazoo import metaplasticize
from glazoo.converters import convert_checkpoint, revert_checkpoint, verify_checkpoint
from glazoo.converters.calibration import calibrate, key_moments
from glazoo.converters.examine import measure_use
from glazoo.errors import ConversionError
from glazoo.layers import gates
from glazoo.models import GlazooConfig, GlazooForCausalLM

FORMS: list[dict[str, Any]] = [
    {"precision": "full"},
    {"precision": "isotropic"},
    {"basis": "rotated"},
    {"forgetting": "diffuse"},
]


@pytest.mark.parametrize(
    "form",
    [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])],
    ids=lambda form: next(iter(form.values())),
)
def test_a_folder_in_every_form(form: dict[str, Any], tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    tiny_model("mamba2").save_pretrained(source)
    report = convert_checkpoint(source, converted, **form)
    heads, keys, values = (report.mixers[0].heads, report.mixers[0].key, report.mixers[0].value)
    added = {"full": keys * keys, "isotropic": 1}.get(report.precision, keys)
    assert report.state_bytes_source == 4 * 2 * heads * keys * values
    assert report.state_bytes_converted - report.state_bytes_source == 4 * 2 * heads * added
    block = json.loads((converted / "config.json").read_text())["metaplastic"]
    assert {name: block[name] for name in form} == form
    assert verify_checkpoint(source, converted, batch=2, tokens=21, new_tokens=5).passed
    revert_checkpoint(converted, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def text(path: Path) -> Path:
    """Bytes that repeat and vary."""
    path.write_bytes(bytes(32 + (i * i + i // 7) % 60 for i in range(4000)))
    return path


def test_axes_come_from_a_text_and_change_nothing(tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    tiny_model("qwen3_next", vocab_size=260).save_pretrained(source)
    given = text(tmp_path / "text.txt")
    report = convert_checkpoint(source, converted, calibrate=[given], tokenizer="bytes")
    assert report.basis == "rotated"
    assert [x.layer for x in report.axes] == list(report.layers)
    for x in report.axes:
        assert x.after < x.before
        assert 1 <= x.directions <= x.keys
    assert verify_checkpoint(source, converted, batch=2, tokens=21, new_tokens=5).passed
    revert_checkpoint(converted, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    with pytest.raises(ConversionError, match="calibrate: gives the axes of basis = 'rotated'"):
        convert_checkpoint(source, tmp_path / "no", calibrate=[given], basis="own")


@pytest.mark.parametrize("name", ["mamba2", "efla"])
def test_axes_of_a_model_made_of_specs(name: str, tmp_path: Path) -> None:
    # It had ended in an assertion: its mixers are turned into others in their own way. The second
    # has a gain of its own, and was refused.
    config = GlazooConfig(
        pattern=name, vocab_size=260, hidden_size=16, num_hidden_layers=1, num_heads=2
    )
    GlazooForCausalLM(config).save_pretrained(tmp_path / "source")
    given = text(tmp_path / "text.txt")
    report = convert_checkpoint(
        tmp_path / "source", tmp_path / "converted", calibrate=[given], tokenizer="bytes"
    )
    assert [(x.layer, x.keys) for x in report.axes] == [(0, report.mixers[0].key)]
    assert verify_checkpoint(
        tmp_path / "source", tmp_path / "converted", batch=2, tokens=21, new_tokens=5
    ).passed


def test_calibrated_axes_are_the_eigenvectors_of_the_keys() -> None:
    model = metaplasticize(tiny_model("mamba2"), basis="rotated")
    ids = torch.arange(900) ** 2 % 53
    before = key_moments(model, ids[:450])
    calibrate(model, ids)
    for _, gate in gates(model):
        assert gate.axes is not None
        axes = gate.axes.double()
        one = torch.eye(axes.shape[-1], dtype=torch.float64)
        assert float((axes.mT @ axes - one).abs().max()) < 1e-6
        turned = axes.mT @ before[gate.layer] @ axes
        off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
        assert float(off.abs().max()) < 1e-5 * float(turned.abs().max())
    with pytest.raises(ConversionError, match="no layer has axes of importance"):
        calibrate(metaplasticize(tiny_model("mamba2")), ids)


def test_axes_that_train_stay_orthogonal() -> None:
    model = metaplasticize(tiny_model("mamba2"), basis="rotated", plasticity=0.5)
    ids = torch.arange(40)[None] % 53
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for _, gate in gates(model):
        assert gate.turn is not None
        assert gate.axes is not None
        assert float(gate.turn.detach().abs().max()) > 0
        assert torch.equal(gate.axes, torch.eye(gate.axes.shape[-1]).expand_as(gate.axes))
        with torch.no_grad():
            basis = gate.basis()
            assert basis is gate.basis()
            one = torch.eye(basis.shape[-1])
            assert float((basis.mT @ basis - one).abs().max()) < 1e-5
            gate.turn.add_(0.1)
            assert not torch.equal(basis, gate.basis())
            # As what averages weights does, which no version of the parameter counts.
            gate.turn.data.sub_(0.1)
            torch.testing.assert_close(gate.basis(), basis)
            gate.axes.data.neg_()
            torch.testing.assert_close(gate.basis(), -basis)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form.values())))
def test_what_importance_does_is_measured_in_every_form(form: dict[str, Any]) -> None:
    model = metaplasticize(tiny_model("mamba2"), **form)
    ids = torch.arange(30)[None] % 53
    assert all(set(use.importance) == {1.0} for use in measure_use(model, ids))
    open_gates(model)
    for use in measure_use(model, ids):
        assert len(use.importance) == len(use.strength) == len(use.consolidated)
        assert all(x > 1 for x in use.importance)
