"""Folders that earlier versions converted load, and compute what they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import contents, edit_json, open_gates
from converters.tiny import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM

import glazoo
import glazoo.models
from glazoo.converters import convert_checkpoint, revert_checkpoint
from glazoo.converters.families import mixer
from glazoo.converters.settings import Settings

VERSION_1 = (
    "base_model_type", "base_architectures", "spec", "gate", "rank", "plasticity", "layers", "seed",
    "gain",
)  # fmt: skip


def as_version_1(folder: Path) -> None:
    """Rewrites a new conversion's settings as version 1 wrote them."""
    block = json.loads((folder / "config.json").read_text())["metaplastic"]
    kept = {k: x for k, x in block.items() if k in VERSION_1} | {"format_version": 1}
    edit_json(folder / "config.json", metaplastic=kept)
    edit_json(folder / "glazoo" / "manifest.json", format_version=1)


def converted(name: str, folder: Path, **options: Any) -> Any:
    tiny_model(name).save_pretrained(folder / "source")
    convert_checkpoint(folder / "source", folder / "v1", **options)
    as_version_1(folder / "v1")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "v1").eval()
    open_gates(model)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
@pytest.mark.parametrize("gain", ["first_order", "exact"])
def test_a_delta_rule(
    gate: str, gain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted("qwen3_next", tmp_path, gate=gate, gain=gain)
    for part in model.modules():
        if hasattr(part, "metaplastic"):
            part.metaplastic.b_up.zero_()
            part.metaplastic.b_scale.fill_(0.5)
    result = model(ids()).logits

    def earlier(spec: glazoo.Spec, q: Any, k: Any, v: Any, **operands: Any) -> Any:
        """Version 1: the mixer turned its write gate into the precision of the exact gain, and
        importance grew by the gate itself."""
        beta, b = operands["beta"], operands["b"]
        assert torch.equal(b, 0.5 * (beta if gate == "head" else beta[..., None].expand(b.shape)))
        data = spec.model_dump()
        assert data["posterior"]["gain"] == gain
        data["posterior"]["beta"] = "precision"
        if gain == "exact":
            square = k.square().sum(-1).repeat_interleave(beta.shape[2] // k.shape[2], 2)
            operands["beta"] = beta / (1 - beta * square).clamp(min=torch.finfo(beta.dtype).eps)
        return glazoo.attention(glazoo.Spec.model_validate(data), q, k, v, **operands)

    monkeypatch.setattr(mixer, "attention", earlier)
    truth = model(ids()).logits
    rounding = torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert float((result - truth).abs().max()) <= 64 * rounding
    revert_checkpoint(tmp_path / "v1", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


@torch.no_grad()
def test_an_importance_per_synapse(tmp_path: Path) -> None:
    model = converted("mamba2", tmp_path, gate="value")
    specs = {m.metaplastic_spec for m in model.modules() if hasattr(m, "metaplastic_spec")}
    assert specs == {glazoo.metaplasticize(glazoo.load("mamba2"), gate="value", rank=2)}
    assert torch.isfinite(model(ids()).logits).all()
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_the_exact_gain_of_a_model_of_our_own() -> None:
    """It took the write gate for the precision, and is not the source at b = 0: kept as it was."""
    block = {
        "base_model_type": "glazoo", "base_architectures": ["GlazooForCausalLM"], "spec": "kda",
        "gate": "head", "rank": 2, "plasticity": 0.0, "layers": [0], "seed": 0, "gain": "exact",
        "format_version": 1,
    }  # fmt: skip
    source = glazoo.load("kda")
    for model_type, beta in (("glazoo", "precision"), ("kimi_linear", "rate")):
        settings = Settings.from_block({**block, "base_model_type": model_type})
        spec = settings.metaplastic_spec(source)
        assert (spec.posterior.gain, spec.posterior.beta) == ("exact", beta)
        assert spec.importance is not None
        assert spec.importance.gate.tie == "write"
    now = Settings.make(
        base_model_type="glazoo", base_architectures=("GlazooForCausalLM",), spec=source,
        hidden_size=32, convertible=(0,), plasticity=0.0, gate=None, rank=2, layers=None, seed=0,
    )  # fmt: skip
    assert now.metaplastic_spec(source) == glazoo.metaplasticize(source, rank=2)
    assert Settings.from_block(now.to_block()) == now
