"""Checkpoints that are quantised outside the mixers keep every byte; quantised mixers are
refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import contents, edit_json
from converters.tiny import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from glazoo.converters.tensors import read_shard

BLOCK = 16

Tensors = dict[str, torch.Tensor]


def fp8(key: str, weight: torch.Tensor) -> Tensors:
    """As fine-grained FP8 checkpoints are: a scale for every block."""
    blocks = [-(-n // BLOCK) for n in weight.shape]
    scale = torch.rand(blocks) + 0.5
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    narrow = (weight.float() / wide[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
    return {key: narrow, f"{key}_scale_inv": scale}


def int8(key: str, weight: torch.Tensor) -> Tensors:
    """As compressed-tensors writes whole numbers: a scale for every row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {key: (weight.float() / scale).round().to(torch.int8), f"{key}_scale": scale}


def packed(key: str, weight: torch.Tensor) -> Tensors:
    """As AWQ and GPTQ pack four bits: under other names and with other shapes."""
    module = key.removesuffix(".weight")
    rows, columns = weight.shape
    return {
        f"{module}.qweight": torch.randint(-9, 9, (columns, rows // 8), dtype=torch.int32),
        f"{module}.qzeros": torch.randint(0, 9, (1, rows // 8), dtype=torch.int32),
        f"{module}.scales": torch.rand(1, rows, dtype=torch.float16),
    }


def four_bits(key: str, weight: torch.Tensor) -> Tensors:
    """As bitsandbytes does: a column of bytes under the old name, and its state beside it."""
    return {
        key: torch.randint(0, 255, (weight.numel() // 2, 1), dtype=torch.uint8),
        f"{key}.absmax": torch.randint(0, 255, (weight.numel() // 64,), dtype=torch.uint8),
        f"{key}.quant_map": torch.rand(16),
    }


Quantiser = Callable[[str, torch.Tensor], Tensors]
FORMS: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "fp8": (
        fp8,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", ".*linear_attn.*"],
        },
    ),
    "compressed-tensors": (int8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "awq": (packed, {"quant_method": "awq", "bits": 4}),
    "bitsandbytes": (four_bits, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def quantise(folder: Path, form: str, *where: str) -> None:
    """Quantises the matrices of a folder whose names hold one of some words."""
    quantiser, block = FORMS[form]
    torch.manual_seed(0)
    data = load_file(folder / "model.safetensors")
    for key in sorted(data):
        if data[key].dim() == 2 and any(word in key for word in where):
            data |= quantiser(key, data.pop(key))
    save_file(data, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config=block)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("qwen3_5_text").to(torch.bfloat16).save_pretrained(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("form", FORMS)
def test_quantised_tensors_outside_the_mixers_keep_every_byte(
    source: Path, tmp_path: Path, form: str
) -> None:
    quantise(source, form, ".mlp.", ".self_attn.")
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "c")
    count = sum(t.dtype[0] in "UI" or t.dtype.startswith("F8") for t in infos(source).values())
    assert count >= 9 + 4
    method = FORMS[form][1]["quant_method"]
    assert report.warnings == (
        f"the checkpoint is quantised ({method}): its {count} quantised tensors stay as they are",
    )
    # The source's file as a whole, under another name.
    assert (tmp_path / "c" / "model-00001-of-00002.safetensors").read_bytes() == before[
        "model.safetensors"
    ]
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["quantization_config"] == FORMS[form][1]
    revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    with pytest.raises(ConversionError, match="its scales belong to its weights"):
        convert_checkpoint(source, tmp_path / "d", dtype="float16")


def infos(folder: Path) -> Any:
    return read_shard(folder / "model.safetensors").tensors


@torch.no_grad()
def test_a_quantised_checkpoint_loads_and_computes_what_its_source_does(
    source: Path, tmp_path: Path
) -> None:
    """Where there is no GPU, transformers unpacks FP8 as it loads."""
    plain: Any = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(20)[None]
    unquantised = plain(ids).logits
    quantise(source, "fp8", ".mlp.", ".self_attn.")
    convert_checkpoint(source, tmp_path / "c")
    assert verify_checkpoint(source, tmp_path / "c", tokens=17, new_tokens=4).passed
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert {p.dtype for n, p in model.named_parameters() if ".metaplastic." in n} == {torch.float32}
    # It is the quantised model, and not far from the other.
    moved = float((model(ids).logits - unquantised).abs().max())
    assert 0 < moved < float(unquantised.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_quantised_mixers_are_refused_by_name(source: Path, tmp_path: Path, form: str) -> None:
    quantise(source, form, ".mlp.", "layers.2.linear_attn.out_proj")
    names = "qweight" if form == "awq" else "weight"
    message = (
        rf"layers\.2\.linear_attn\.out_proj\.{names}\S* is stored as \w+: a mixer that is "
        r"quantised .* not quantised, or .* \(--layers\)"
    )
    for options in ({}, {"dry_run": True}, {"layers": [2]}):
        with pytest.raises(ConversionError, match=message) as caught:
            convert_checkpoint(source, tmp_path / "c", **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    # The other layers can be converted all the same.
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "c", layers=[0])
    assert report.layers == (0,)
    assert set(report.skipped_layers) == {1, 2}
    revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_damage_beside_quantised_tensors_is_found(source: Path, tmp_path: Path) -> None:
    quantise(source, "awq", ".mlp.")
    assert inspect_checkpoint(source).quantised == {}
    data = load_file(source / "model.safetensors")
    norm = data.pop("model.norm.weight")
    save_file(data, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight is missing"):
        convert_checkpoint(source, tmp_path / "c")
    data["model.norm.weight"] = norm[:-1].clone()
    save_file(data, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight has shape \[31\]"):
        convert_checkpoint(source, tmp_path / "c")
