"""Folders that earlier versions converted load, and compute what they did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import contents, edit_json, open_gates
from converters.tiny import VOCABULARY, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glazoo
import glazoo.models
from glazoo.converters import convert_checkpoint, inspect_model, revert_checkpoint
from glazoo.families import mixer
from glazoo.families.settings import Settings

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


GOLDEN = Path(__file__).parents[1] / "golden"
FORMS: dict[str, Any] = json.loads((GOLDEN / "own_forms.json").read_text())
"""What 0.1 saved of models of our own, metaplastic by their specs or by conversion: settings, names
and shapes of tensors, and the logits of `TOKENS` in float64."""

TOKENS = torch.arange(14).view(2, 7) * 5 % 23


def numbers(name: str, shape: list[int]) -> torch.Tensor:
    """The same numbers for the same name, wherever they are made."""
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.4 * torch.cos(1.7 * t + sum(name.encode()) % 97)).view(shape).float()


def write_form(name: str, folder: Path) -> list[list[float]]:
    """Writes a folder as 0.1 did; gives the logits that it computed."""
    form = FORMS[name]
    config = dict(form["config"])
    made = config.pop("metaplasticized", {})
    specs = {
        n: glazoo.metaplasticize(glazoo.load(n.removeprefix("metaplastic_")), **made[n])
        if n in made
        else glazoo.load(n)
        for n in config["layer_specs"]
        if n != "attention"
    }
    config["specs"] = {n: spec.model_dump(mode="json") for n, spec in specs.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {n: numbers(n, shape) for n, shape in form["tensors"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    logits: list[list[float]] = form["logits"]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_models_of_our_own(name: str, tmp_path: Path) -> None:
    expected = torch.tensor(write_form(name, tmp_path / "old"), dtype=torch.float64)
    # In float64 any other function is far away, and rounding is not.
    budget = torch.finfo(torch.float32).eps * float(expected.abs().max())
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "old", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "new")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float64)
    for loaded in (model, again):
        assert float((loaded.eval()(TOKENS).logits[:, -1] - expected).abs().max()) <= budget
    # Whichever form it was, its gates have one name now, and one place.
    names = (key.split(".") for key in load_file(tmp_path / "new" / "model.safetensors"))
    plastic = {int(part[2]) for part in names if part[-2:] == ["metaplastic", "b_scale"]}
    assert plastic == {gate.layer for gate in inspect_model(tmp_path / "old").gates}
    kept = again.state_dict()
    assert all(torch.equal(x, kept[key]) for key, x in model.state_dict().items())


CONVERTED: dict[str, Any] = json.loads((GOLDEN / "converted_forms.json").read_text())
"""What 0.1 wrote where it converted models of transformers: configurations, names and shapes of
tensors, and the first logits of the last of `TOKENS`, in float64 where the source's classes are."""


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERTED)
def test_folders_that_0_1_converted(name: str, tmp_path: Path) -> None:
    form, folder = CONVERTED[name], tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(form["config"]))
    weights = {n: numbers(n, shape) for n, shape in form["tensors"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options: Any = {"dtype": torch.float64, "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "new")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "new", **options)
    expected = torch.tensor(form["logits"], dtype=torch.float64)
    for loaded in (model, again):
        logits = loaded.eval()(TOKENS).logits[:, -1, : expected.shape[1]]
        # The source's own layers compute some of it in float32.
        budget = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        assert float((logits - expected).abs().max()) <= budget


def kept(saved: Any, now: Any) -> bool:
    """Whether every value that was saved is there, beside fields that are new."""
    if isinstance(saved, dict):
        return isinstance(now, dict) and all(k in now and kept(x, now[k]) for k, x in saved.items())
    return bool(saved == now)


@pytest.mark.parametrize(
    ("name", "data"), json.loads((GOLDEN / "earlier_specs.json").read_text()).items()
)
def test_specs_as_0_1_saved_them(name: str, data: dict[str, Any]) -> None:
    """Configurations hold whole specs, with the fields and values of then."""
    spec = glazoo.Spec.model_validate(data)
    assert spec.name == name
    assert kept(data, spec.model_dump(mode="json"))
    assert glazoo.lower(spec).recurrence
