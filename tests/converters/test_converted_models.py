"""Registered configuration and model classes of converted checkpoints."""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from converters.converting import contents, edit_json, make_config, prompts
from converters.tiny import VOCABULARY, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    modeling_utils,
)

import glazoo
import glazoo.models
from glazoo import metaplasticize
from glazoo.converters import ConversionError, convert_checkpoint, verify_checkpoint
from glazoo.families import families, find_family
from glazoo.families.settings import Settings, default_rank

INDEX = "model.safetensors.index.json"


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    convert_checkpoint(source, tmp_path / "converted", link=False)
    return tmp_path / "converted"


def rewrite_added(folder: Path, change: Any) -> None:
    """Rewrites the added shard and the index after a change of the dictionary of its tensors."""
    listing = json.loads((folder / INDEX).read_text())
    last = listing["weight_map"]["backbone.layers.0.mixer.metaplastic.b_up"]
    data = load_file(folder / last)
    change(data)
    save_file(data, folder / last, metadata={"format": "pt"})
    kept = {k: v for k, v in listing["weight_map"].items() if v != last}
    listing["weight_map"] = kept | dict.fromkeys(data, last)
    (folder / INDEX).write_text(json.dumps(listing))


def test_classes_are_registered_once(converted: Path) -> None:
    config = AutoConfig.from_pretrained(converted)
    assert type(config) is glazoo.models.MetaplasticMamba2Config
    assert isinstance(config, Mamba2Config)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is glazoo.models.MetaplasticMamba2ForCausalLM
    assert isinstance(model, Mamba2ForCausalLM)
    glazoo.models.register()
    assert type(AutoModelForCausalLM.from_config(config)) is type(model)
    with pytest.raises(AttributeError, match="MetaplasticLlama"):
        _ = glazoo.models.MetaplasticLlama


def test_configurations_and_models_pickle(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert again.config.to_dict() == model.config.to_dict()


@torch.no_grad()
def test_a_model_built_from_its_configuration_starts_at_the_source(converted: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted))
    for name, p in model.named_parameters():
        if name.endswith(("b_up", "b_scale", "ip_log")):
            assert not p.any(), name
        assert torch.isfinite(p).all(), name
    assert torch.isfinite(model(prompts()[0]).logits).all()


def test_absent_tensors_are_an_error(converted: Path) -> None:
    rewrite_added(converted, lambda d: d.pop("backbone.layers.1.mixer.metaplastic.b_scale"))
    with pytest.raises(ConversionError, match=r"lacks tensors: .*layers.1.*b_scale"):
        AutoModelForCausalLM.from_pretrained(converted)


def test_unknown_added_tensors_are_an_error(converted: Path) -> None:
    key = "backbone.layers.1.mixer.metaplastic.b_more"
    rewrite_added(converted, lambda d: d.update({key: torch.zeros(2)}))
    with pytest.raises(ConversionError, match=r"has unknown tensors: .*metaplastic.b_more"):
        AutoModelForCausalLM.from_pretrained(converted)


def test_a_leftover_single_file_is_an_error(converted: Path, source: Path) -> None:
    # transformers prefers it to the index, and would load the source's weights without gates.
    state = {}
    for shard in source.glob("*.safetensors"):
        state |= load_file(shard)
    save_file(state, converted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks tensors: .*metaplastic"):
        AutoModelForCausalLM.from_pretrained(converted)


def test_damaged_blocks_are_an_error(converted: Path) -> None:
    block = json.loads((converted / "config.json").read_text())["metaplastic"]
    for change, message in (
        (None, "has no block 'metaplastic'"),
        ({**block, "format_version": 7}, "format_version is 7, this glazoo reads 1, 2, 3: install"),
        ({k: v for k, v in block.items() if k != "rank"}, "block 'metaplastic' is damaged"),
        ({**block, "layers": [0, 9]}, r"no convertible mixer in the layers \[9\]"),
    ):
        data = json.loads((converted / "config.json").read_text())
        data.pop("metaplastic", None)
        data |= {} if change is None else {"metaplastic": change}
        (converted / "config.json").write_text(json.dumps(data))
        with pytest.raises(ConversionError, match=message):
            AutoModelForCausalLM.from_pretrained(converted)
    edit_json(converted / "config.json", metaplastic=block)
    AutoModelForCausalLM.from_pretrained(converted)


@pytest.mark.slow
def test_a_fresh_process_loads_by_importing_the_models_only(converted: Path) -> None:
    code = """
    import sys
    import glazoo.models
    lazy = "transformers.models.mamba2.modeling_mamba2" not in sys.modules
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(type(model).__name__, lazy, any(m.split(".")[0] == "fla" for m in sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(converted)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ.copy(),
    )
    assert done.stdout.split() == ["MetaplasticMamba2ForCausalLM", "True", "False"]


@torch.no_grad()
def test_resaved_folder_stands_alone(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.save_pretrained(tmp_path / "again")
    ids, _ = prompts()
    expected = model(ids).logits
    shutil.rmtree(converted)
    assert contents(tmp_path / "again")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, expected
    )


@torch.no_grad()
def test_saving_over_linked_files_leaves_the_source_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(state: Any, path: Path, metadata: Any = None) -> None:
        # Older versions of the library open the file that is there, and write into it.
        with open(path, "wb") as f:
            f.write(safetensors.torch.save(dict(state), metadata))

    monkeypatch.setattr(modeling_utils, "safe_save_file", in_place)
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "linked")
    shards = [f.stored for f in report.files if f.how == "linked"]
    # A copy in memory: what is mapped from a file is lost when that file is cut.
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "linked"))
    for p in model.parameters():
        p.add_(1.0)
    # As many shards as the folder has: the same names, and files are written over.
    model.save_pretrained(tmp_path / "linked", max_shard_size="24KB")
    assert all((tmp_path / "linked" / name).exists() for name in shards)
    assert contents(source) == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "linked")
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


@torch.no_grad()
def test_models_without_a_head_convert_and_say_that_verify_needs_one(tmp_path: Path) -> None:
    source = Mamba2Model(make_config()).eval()
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    model = AutoModel.from_pretrained(tmp_path / "converted")
    ids, _ = prompts()
    expected, got = source(ids).last_hidden_state, model(ids).last_hidden_state
    tolerance = 64 * torch.finfo().eps * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= tolerance
    with pytest.raises(ConversionError, match="Mamba2Model generates no text, and verification"):
        verify_checkpoint(tmp_path / "source", tmp_path / "converted")
    assert type(metaplasticize(source)) is type(model)


@torch.no_grad()
def test_models_converted_in_place_record_what_their_source_records() -> None:
    source = tiny_model("bamba").eval().base_model
    converted = copy.deepcopy(source)
    metaplasticize(converted)
    options = {"input_ids": prompts()[0] % VOCABULARY, "output_hidden_states": True}
    ours, theirs = converted(**options).hidden_states, source(**options).hidden_states
    assert len(theirs) > 2
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_unknown_families_are_refused() -> None:
    for name in ("llama", None, 3):
        with pytest.raises(ConversionError, match=r"is not supported: .*; supported are: b"):
            find_family(name)


def test_absent_transformers_classes_are_named() -> None:
    with pytest.raises(ConversionError, match=r"has no Mamba9.*family 'mamba2' needs"):
        find_family("mamba2").source_model("Mamba9ForCausalLM")


def test_default_rank_is_a_sixteenth_between_one_and_128() -> None:
    assert [default_rank(d) for d in (8, 32, 768, 2560, 8192)] == [1, 2, 48, 128, 128]


def test_settings_survive_json() -> None:
    settings = Settings.make(
        base_model_type="mamba2",
        base_architectures=["Mamba2ForCausalLM"],
        spec="mamba2",
        hidden_size=make_config().hidden_size,
        convertible=[0, 1, 2],
        plasticity=1,
        gate="head",
        rank=None,
        layers=[2, 0, 2],
        seed=4,
    )
    assert settings.layers == (0, 2)
    assert Settings.from_block(json.loads(json.dumps(settings.to_block()))) == settings


def test_no_code_outside_the_families_asks_for_a_family() -> None:
    root = Path(glazoo.__file__).parent
    files = [*(root / "converters").glob("*.py"), *(root / "models").glob("*.py")]
    assert len(files) > 8
    for path in files:
        tree = ast.parse(path.read_text())
        prose = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in prose
            ):
                # The package's own family is called what the package is.
                names = set(families()) - {"glazoo"}
                assert not any(name in node.value.lower() for name in names), (path, node.lineno)
