"""What lies beside the weights of a source, and what a converted folder is left with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import contents, edit_json, make_model, prompts
from converters.tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from glazoo import metaplasticize
from glazoo.converters import convert_checkpoint, revert_checkpoint, verify_checkpoint
from glazoo.models import GlazooConfig, GlazooForCausalLM

INDEX = "model.safetensors.index.json"

# peft asks for it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def strict(text: str | bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_an_infinity_in_the_source_s_configuration_is_json_in_ours(
    source: Path, tmp_path: Path
) -> None:
    # As transformers wrote it before version 5, and others still do.
    data = json.loads((source / "config.json").read_text())
    data["time_step_limit"] = [0.5, math.inf]
    (source / "config.json").write_text(json.dumps(data))
    assert "Infinity]" in (source / "config.json").read_text()
    before = contents(source)
    converted = tmp_path / "converted"
    convert_checkpoint(source, converted, dtype="bfloat16").write(tmp_path / "report.json")
    files = [*converted.rglob("*.json"), tmp_path / "report.json"]
    own = [p for p in files if p.parent.name != "source"]
    assert len(own) > 4
    for path in own:
        strict(path.read_bytes())
    config = AutoConfig.from_pretrained(converted)
    assert tuple(config.time_step_limit) == (0.5, math.inf)
    config.save_pretrained(tmp_path / "again")
    strict((tmp_path / "again" / "config.json").read_bytes())
    assert tuple(AutoConfig.from_pretrained(tmp_path / "again").time_step_limit) == (0.5, math.inf)
    revert_checkpoint(converted, tmp_path / "back")
    strict((tmp_path / "back" / "config.json").read_bytes())
    convert_checkpoint(source, tmp_path / "plain")
    revert_checkpoint(tmp_path / "plain", tmp_path / "same")
    assert contents(tmp_path / "same") == before


BESIDE = {
    # Read together, and not the converted model's: kept aside together.
    "pytorch_model.bin": True,
    "pytorch_model.bin.index.json": True,
    "model.safetensors.index.fp16.json": True,
    "model.fp16-00001-of-00001.safetensors": True,
    "model.onnx": True,
    "model.onnx_data": True,
    "openvino_model.bin": True,
    "openvino_model.xml": True,
    "consolidated.00.pth": True,
    "params.json": True,
    "optimizer.pt": True,
    "scheduler.pt": True,
    "trainer_state.json": True,
    "training_args.bin": True,
    "onnx/decoder_model.onnx": True,
    "onnx/config.json": True,
    "original/deep/weights.pth": True,
    "original/tokens.txt": True,
    # Apply to the converted model as they do to the source.
    "modules.json": False,
    "1_Pooling/config.json": False,
    "2_Dense/config.json": False,
    "2_Dense/model.safetensors": False,
    "adapter_config.json": False,
    "adapter_model.safetensors": False,
    "adapters/french/adapter_config.json": False,
    "adapters/french/adapter_model.bin": False,
    # Read by nobody together with weights.
    "notes/plan.md": False,
    "chat_template.jinja": False,
    "latest.md": False,
}


def test_files_that_belong_together_stay_together(source: Path, tmp_path: Path) -> None:
    for name in BESIDE:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    steps = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (source / "modules.json").write_text(json.dumps(steps))
    before = contents(source)
    converted = tmp_path / "converted"
    report = convert_checkpoint(source, converted)
    stored = {f.path: f.stored for f in report.files}
    for name, aside in BESIDE.items():
        assert stored[name] == (f"glazoo/source/{name}" if aside else name)
    (moved,) = (w for w in report.warnings if "other weight files are kept" in w)
    assert "onnx/decoder_model.onnx" in moved
    assert "adapter" not in moved
    assert "Dense" not in moved
    (applied,) = (w for w in report.warnings if "an adapter lies beside the weights" in w)
    assert "adapter_model.safetensors" in applied
    revert_checkpoint(converted, tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_what_needs_none_of_its_weights_stays_where_it_is(source: Path, tmp_path: Path) -> None:
    for name in ("params.json", "trainer_state.json", "openvino_model.xml"):
        (source / name).write_text(name)
    report = convert_checkpoint(source, tmp_path / "converted")
    stored = {f.path: f.stored for f in report.files}
    assert all(
        stored[name] == name for name in ("params.json", "trainer_state.json", "openvino_model.xml")
    )


@torch.no_grad()
def test_an_adapter_beside_the_weights_applies_to_both(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters are applied where peft is installed only")
    source, converted = tmp_path / "source", tmp_path / "converted"
    model = make_model()
    model.save_pretrained(source)
    ids, _ = prompts()
    plain = model(ids).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    )
    expected = adapted(ids).logits
    adapted.save_pretrained(source)
    convert_checkpoint(source, converted)
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    moved = float((expected - plain).abs().max())
    assert float((loaded(ids).logits - expected).abs().max()) < 1e-3 * moved
    assert verify_checkpoint(source, converted, batch=2, tokens=9, new_tokens=2).passed


def test_code_beside_a_model_that_transformers_has_is_left_out(tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    tiny_model("kimi_linear").save_pretrained(source)
    named = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.L"}
    other = {"AutoProcessor": "processing.P"}
    edit_json(source / "config.json", auto_map={**named, **other})
    (source / "code.py").write_text("raise RuntimeError\n")
    (source / "processing.py").write_text("raise RuntimeError\n")
    before = contents(source)
    report = convert_checkpoint(source, converted)
    (warning,) = report.warnings
    assert "brings code of its own (auto_map) for kimi_linear" in warning
    found = json.loads((converted / "config.json").read_text())["auto_map"]
    assert found.pop("AutoProcessor") == "processing.P"
    assert {name.partition(".")[0] for name in found.values()} == {"modeling_glazoo"}
    assert set(named) <= set(found)
    assert verify_checkpoint(source, converted, batch=2, tokens=9, new_tokens=2).passed
    revert_checkpoint(converted, tmp_path / "back")
    assert contents(tmp_path / "back") == before
    convert_checkpoint(source, tmp_path / "bare", remote_code=False)
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["auto_map"] == other


def test_a_model_converted_in_memory_names_no_code_that_is_not_saved_with_it(
    tmp_path: Path,
) -> None:
    model = tiny_model("nemotron_h")
    named = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.S"}
    model.config.auto_map = {**named, "AutoTokenizer": ["tokens.T", None]}
    metaplasticize(model).save_pretrained(tmp_path)  # type: ignore[operator]
    found = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert found.pop("AutoTokenizer") == ["tokens.T", None]
    assert {name.partition(".")[0] for name in found.values()} == {"modeling_glazoo"}


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


@pytest.mark.parametrize("kind", ["converted", "glazoo"])
def test_saving_over_a_folder_leaves_one_checkpoint(
    kind: str, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    ids, _ = prompts()
    if kind == "converted":
        convert_checkpoint(source, folder, link=False)
        loader: Any = AutoModelForCausalLM
    else:
        loader = GlazooForCausalLM
        GlazooForCausalLM(
            GlazooConfig(
                pattern="gla",
                vocab_size=61,
                hidden_size=32,
                num_hidden_layers=2,
                num_heads=2,
                head_k_dim=8,
                head_v_dim=8,
            )
        ).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).exists()
    for size, single in (("1GB", True), ("20KB", False), ("1GB", True)):
        model = loader.from_pretrained(folder)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        expected = logits_of(model, ids)
        # In memory of its own: what is mapped from a file changes with it.
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors").exists() == single
        assert (folder / INDEX).exists() == (not single)
        assert torch.equal(logits_of(loader.from_pretrained(folder), ids), expected)


def test_saving_an_adapter_leaves_the_weights_alone(source: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    folder = tmp_path / "folder"
    convert_checkpoint(source, folder)
    before = contents(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["in_proj"]))
    model.save_pretrained(folder)
    after = contents(folder)
    assert set(after) - set(before) == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))
