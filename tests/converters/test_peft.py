"""peft on converted models: what it chooses and refuses by `model_type` is what it does on the
source."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import open_gates
from converters.tiny import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM

from glazoo import metaplasticize
from glazoo.layers import gates

peft = pytest.importorskip("peft", reason="adapters need peft (pip install peft)")

# What peft asks transformers for, and says of convolutions and of experts.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


def adapted(model: Any, targets: Any) -> tuple[str, ...] | str:
    """Names of the modules and parameters that get an adapter, or the refusal."""
    try:
        found = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets))
    except ValueError as e:
        return str(e)
    return tuple(sorted(n for n, _ in found.named_parameters() if "lora_A" in n))


@pytest.mark.parametrize(
    "name",
    ["mamba2", "falcon_h1", "nemotron_h", "bamba", "qwen3_next", "qwen3_5_text", "kimi_linear"],
)
def test_targets_and_refusals_are_those_of_the_source(name: str) -> None:
    source = tiny_model(name)
    model = metaplasticize(copy.deepcopy(source))
    asked = (None, "all-linear", ["in_proj"], ["out_proj"], ["conv1d"], ["o_proj", "experts"])
    for targets in asked:
        assert adapted(model, targets) == adapted(source, targets), targets
    # The gates are none of peft's.
    assert not any("metaplastic" in n for n in adapted(model, "all-linear"))


def test_what_peft_knows_of_a_family_acts() -> None:
    hybrid = metaplasticize(tiny_model("nemotron_h"))
    assert all("self_attn" in n or "q_proj" in n or "mixer" in n for n in adapted(hybrid, None))
    assert any("q_proj" in n for n in adapted(hybrid, None))
    for name in ("mamba2", "falcon_h1", "nemotron_h"):
        refusal = adapted(metaplasticize(tiny_model(name)), ["out_proj"])
        assert isinstance(refusal, str)
        assert "is incompatible with Mamba-based models" in refusal


@torch.no_grad()
def test_adapters_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    model = metaplasticize(tiny_model("mamba2"))
    open_gates(model)
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(2 * 21).reshape(2, 21) % VOCABULARY
    lora = peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    found = peft.get_peft_model(model, lora).eval()
    expected = found(ids).logits
    found.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain = again(ids).logits
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, expected)
    merged: Any = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    final: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert next(gates(final), None) is not None
    difference = float((final(ids).logits - expected).abs().max())
    # Adding the product to the weights rounds them.
    assert difference < 1e-3 * float((expected - plain).abs().max())


def test_gates_train_and_are_saved_beside_adapters(tmp_path: Path) -> None:
    source = tiny_model("mamba2")
    ids = torch.arange(2 * 21).reshape(2, 21) % VOCABULARY
    lora = peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["metaplastic"])
    found = peft.get_peft_model(metaplasticize(copy.deepcopy(source)), lora)
    trained = [p for n, p in found.named_parameters() if p.requires_grad and "b_scale" in n]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    found(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(float(p.detach().abs().max()) > 0 for p in trained)
    found.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = found.eval()(ids).logits
        again = peft.PeftModel.from_pretrained(metaplasticize(source), tmp_path).eval()
        assert torch.equal(again(ids).logits, expected)
        merged: Any = again.merge_and_unload()
        assert len(list(gates(merged))) == 2
        torch.testing.assert_close(merged(ids).logits, expected)
