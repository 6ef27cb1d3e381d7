"""Importing checkpoints of the original state-spaces/mamba code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from converters.converting import contents, make_model, prompts
from transformers import Mamba2ForCausalLM
from typer.testing import CliRunner

from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    import_original,
    inspect_checkpoint,
    verify_checkpoint,
)
from glazoo.converters.commands import convert


def write_original(folder: Path, model: Any, **changes: Any) -> Path:
    """Writes a model as the original code does."""
    folder.mkdir()
    c = model.config
    config = {
        "d_model": c.hidden_size,
        "d_intermediate": 0,
        "n_layer": c.num_hidden_layers,
        "vocab_size": 61,
        "ssm_cfg": {
            "layer": "Mamba2",
            "headdim": c.head_dim,
            "d_state": c.state_size,
            "ngroups": c.n_groups,
            "chunk_size": c.chunk_size,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    state = {
        k.replace("backbone.embeddings.", "backbone.embedding."): v
        for k, v in model.state_dict().items()
    }
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def model() -> Any:
    return make_model(tie_word_embeddings=True, vocab_size=64)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_import_computes_the_same_and_is_convertible(
    model: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    model.to(dtype)
    src = write_original(tmp_path / "o", model)
    before = contents(src)
    import_original(src, tmp_path / "s")
    assert contents(src) == before
    loaded, info = Mamba2ForCausalLM.from_pretrained(
        tmp_path / "s", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == dtype
    ids, mask = prompts()
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)
    convert_checkpoint(tmp_path / "s", tmp_path / "c")
    assert verify_checkpoint(tmp_path / "s", tmp_path / "c", tokens=9, new_tokens=2).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {}}, "ssm_cfg.layer is 'Mamba1', accepted is 'Mamba2'"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\], accepted is \[\]"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"model_type": "mamba2"}, "is not of the original state-spaces/mamba code.*flash-linear"),
        (
            {"ssm_cfg": {"layer": "Mamba2", "headdim": 48}},
            "multiples of ssm_cfg.headdim = 48",
        ),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16}}, "has shape"),
        ({"vocab_size": 99}, "has shape"),
        ({"tie_embeddings": False, "n_layer": 3}, "is missing from the checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    src = write_original(tmp_path / "o", model, **changes)
    with pytest.raises(ConversionError, match=message):
        import_original(src, tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_pickles_run_no_code(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_original(tmp_path / "o", model)
    (src / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ConversionError, match=r"cannot read pytorch_model.bin"):
        import_original(src, tmp_path / "s")
    assert "must not run" not in capsys.readouterr().out


def test_weights_that_contradict_the_configuration_are_refused(model: Any, tmp_path: Path) -> None:
    src = write_original(tmp_path / "o", model)
    state = torch.load(src / "pytorch_model.bin")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, src / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"lm_head.weight and .* differ"):
        import_original(src, tmp_path / "s")
    (src / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match=r"has neither pytorch_model.bin nor"):
        import_original(src, tmp_path / "s")


def test_command(model: Any, tmp_path: Path) -> None:
    src = write_original(tmp_path / "o", model)
    with pytest.raises(ConversionError, match="import it first"):
        inspect_checkpoint(src)
    app = typer.Typer()
    app.command()(convert)
    result = CliRunner().invoke(app, [str(src), str(tmp_path / "s"), "--import"])
    assert result.exit_code == 0, result.output
    assert inspect_checkpoint(tmp_path / "s").layers == (0, 1)
