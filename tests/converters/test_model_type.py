"""What upstream packages look up by `model_type` is for a converted model what it is for its
source; files of a converted model are never taken for the source's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from converters.converting import contents, edit_json
from converters.tiny import TINY, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import glazoo.models
from glazoo import metaplasticize
from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from glazoo.converters.tokenizers import TEXTS
from glazoo.families import find_family

# One tiny model of every family.
FAMILY_NAMES = sorted({family: name for name, (family, _) in reversed(TINY.items())}.values())


def write_tokenizer(folder: Path, tokenizer_class: str | None) -> None:
    """A byte-level tokenizer that splits digits, which the classes that transformers might choose
    for it do not all do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("2", "0"), ("2", "3"), ("20", "23"), ("e", "a"), ("\u0120", "y"), ("ea", "r")]
    vocabulary = {c: i for i, c in enumerate([*alphabet, *map("".join, merges), "<|endoftext|>"])}
    found = Tokenizer(models.BPE(vocabulary, merges))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    found.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": "<|endoftext|>", "model_max_length": 64}
    if tokenizer_class is not None:
        config["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def fresh(code: str, home: Path, *arguments: Any) -> str:
    """What a program prints that has no terminal; `home` is where it keeps folders' code."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IDS = """
import json, sys
if sys.argv[1] == "with":
    import glazoo.models
from transformers import AutoTokenizer
texts = json.loads(sys.argv[2])
found = {}
for folder in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[folder] = [tokenizer(text)["input_ids"] for text in texts]
assert ("glazoo" in sys.modules) == (sys.argv[1] == "with")
print("\\n" + json.dumps(found))
"""


@pytest.mark.slow
def test_token_ids_are_those_of_the_source_in_every_process(tmp_path: Path) -> None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    looked_up = [n for n in FAMILY_NAMES if TOKENIZER_MAPPING_NAMES.get(TINY[n][0]) is not None]
    assert len(looked_up) > 5
    pairs: dict[str, Path] = {}
    moved = 0
    for name in [*looked_up, "bamba"]:
        source = tmp_path / f"{name}-source"
        tiny_model(name).save_pretrained(source)
        for kind in (None, "GPT2Tokenizer", "Qwen2Tokenizer"):
            write_tokenizer(source, kind)
            before = contents(source)
            folder = tmp_path / f"{name}-{kind}"
            report = convert_checkpoint(source, folder)
            assert not report.warnings
            copy = tmp_path / f"{name}-{kind}-source"
            revert_checkpoint(folder, copy)
            assert contents(copy) == before
            pairs[str(folder)] = copy
            moved += (folder / "glazoo/source/tokenizer_config.json").exists()
    # Files that say enough are left as they are.
    assert 0 < moved < len(pairs)
    texts = json.dumps(TEXTS)
    # transformers asks for leave to run the folder's code first, of which no tokenizer is part.
    everything = [*pairs, *pairs.values()]
    plain = json.loads(fresh(IDS, tmp_path, "without", texts, *everything).splitlines()[-1])
    aware = json.loads(fresh(IDS, tmp_path, "with", texts, *everything).splitlines()[-1])
    expected = {folder: plain[str(source)] for folder, source in pairs.items()}
    # The same files give different ids by family: this is what has to be carried over.
    assert len({json.dumps(ids) for ids in expected.values()}) > 1
    for folder, ids in expected.items():
        assert plain[folder] == ids, folder
        assert aware[folder] == ids, folder
        assert aware[str(pairs[folder])] == ids, folder


def test_a_repaired_tokenizer_stays_repaired(tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    tiny_model("granitemoehybrid").save_pretrained(source)
    write_tokenizer(source, "GPT2Tokenizer")
    expected = AutoTokenizer.from_pretrained(source)("year 2023")["input_ids"]
    # Every digit on its own: y, ear, a space, 2, 0, 2, 3.
    assert len(expected) == 7
    convert_checkpoint(source, converted)
    assert AutoTokenizer.from_pretrained(converted)("year 2023")["input_ids"] == expected

    verified = verify_checkpoint(source, converted, batch=2, tokens=9, new_tokens=2)
    assert verified.checks[0].name == "tokens"
    assert verified.passed
    # As conversions wrote it before.
    (converted / "tokenizer_config.json").write_bytes(
        (source / "tokenizer_config.json").read_bytes()
    )
    failed = verify_checkpoint(source, converted, batch=2, tokens=9, new_tokens=2).checks[0]
    assert not failed.passed
    assert failed.detail.startswith("without glazoo, 'year 2023' has the ids [")
    # With glazoo, folders from before are read right too.
    assert AutoTokenizer.from_pretrained(converted)("year 2023")["input_ids"] == expected
    (converted / "tokenizer.json").write_text("{}")
    failed = verify_checkpoint(source, converted, batch=2, tokens=9, new_tokens=2).checks[0]
    assert "the tokenizer does not load" in failed.detail


def test_a_tokenizer_that_does_not_load_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("mamba2").save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    report = convert_checkpoint(source, tmp_path / "converted")
    assert len(report.warnings) == 1
    assert "the source's tokenizer does not load here" in report.warnings[0]
    verified = verify_checkpoint(source, tmp_path / "converted", batch=2, tokens=9, new_tokens=2)
    assert "tokens" not in [c.name for c in verified.checks]


def test_the_processor_is_named_where_it_was_looked_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen3_5").save_pretrained(source)
    write_tokenizer(source, "Qwen2Tokenizer")
    (source / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Qwen2VLImageProcessor"}'
    )
    convert_checkpoint(source, tmp_path / "one")
    found = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert found["processor_class"] == "Qwen3VLProcessor"
    edit_json(source / "preprocessor_config.json", processor_class="Qwen3VLProcessor")
    convert_checkpoint(source, tmp_path / "two")
    found = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    assert "processor_class" not in found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A converted folder of every family."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for name in FAMILY_NAMES:
        tiny_model(name).save_pretrained(root / f"{name}-source")
        convert_checkpoint(root / f"{name}-source", root / name)
        made[name] = root / name
    return made


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_memory_has_the_source_s_type_and_files_their_own(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = find_family(TINY[name][0])
    own, base = family.converted_model_type, family.source_config()
    raw = json.loads((folders[name] / "config.json").read_text())
    assert raw["model_type"] == own
    # Models of our own are metaplastic by their specs.
    assert (own == family.model_type) == ("metaplastic" not in raw) == family.native
    config = AutoConfig.from_pretrained(folders[name])
    assert isinstance(config, base)
    again = type(config).from_pretrained(folders[name])
    for found in (config, again, type(config).from_dict(config.to_dict())):
        assert found.model_type == found.to_dict()["model_type"] == family.model_type
        assert getattr(found, "metaplastic", None) == raw.get("metaplastic")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == own
    saved = AutoConfig.from_pretrained(tmp_path)
    saved.name_or_path = config.name_or_path
    assert saved.to_dict() == config.to_dict()
    # Everything that is chosen by the configuration's class.
    auto = transformers.models.auto
    for mapping in (
        auto.tokenization_auto.TOKENIZER_MAPPING,
        auto.processing_auto.PROCESSOR_MAPPING,
        auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        auto.feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
        auto.video_processing_auto.VIDEO_PROCESSOR_MAPPING,
    ):
        assert mapping.get(type(config), None) == mapping.get(base, None)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_auto_class_that_loads_the_source_loads_the_converted_model(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = find_family(TINY[name][0])
    folder = folders[name]
    for auto, base in family.auto_models().items():
        loader = getattr(transformers, auto)
        if base.base_model_prefix == "transformer":
            # transformers starts every tensor of the source's anew here, with a warning.
            with pytest.raises(ConversionError, match="lacks tensors: transformer"):
                loader.from_pretrained(folder)
            continue
        model = loader.from_pretrained(folder)
        assert type(model) is glazoo.models.metaplastic.model_class(base, family)
        assert isinstance(model, base)
        gates = [n for n, _ in model.named_parameters() if n.endswith(".metaplastic.b_scale")]
        manifest = json.loads((folder / "glazoo" / "manifest.json").read_text())
        assert len(gates) == len(manifest["settings"]["layers"])


LOAD = """
import sys
if sys.argv[1] == "absent":
    sys.modules["glazoo"] = None
import torch
import transformers
for folder in sys.argv[2:]:
    for trust in (None, True):
        for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
            try:
                found = getattr(transformers, auto).from_pretrained(
                    folder, trust_remote_code=trust
                )
            except (ValueError, ImportError) as e:
                print("\\nrefused", folder, auto, trust, " ".join(str(e).split()))
            else:
                print("\\nloaded", folder, auto, trust, type(found).__name__)
"""


def loads_of(which: str, *folders: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """What a process that has glazoo installed or not says of every folder: by its name, the Auto
    class and the leave to run its code, whether it was loaded, and the class or the reason."""
    found = {}
    for line in fresh(LOAD, folders[0].parent, which, *folders).splitlines():
        if line.startswith(("refused", "loaded")):
            outcome, folder, auto, trust, rest = line.split(maxsplit=4)
            found[Path(folder).name, auto, trust] = (outcome, rest)
    assert len(found) == 6 * len(folders)
    return found


def test_no_program_without_glazoo_takes_the_files_for_the_source_s(tmp_path: Path) -> None:
    tiny_model("mamba2").save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    convert_checkpoint(tmp_path / "source", tmp_path / "bare", remote_code=False)
    metaplasticize(tiny_model("mamba2")).save_pretrained(tmp_path / "live")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    model.save_pretrained(tmp_path / "again")
    with_code = [tmp_path / name for name in ("converted", "live", "again")]
    for (folder, _, trust), (outcome, rest) in loads_of(
        "absent", tmp_path / "bare", *with_code
    ).items():
        assert outcome == "refused"
        assert "glazoo" in rest or "mamba2" in rest or "trust_remote_code=True" in rest
        if trust == "True" and folder != "bare":
            assert "glazoo" in rest
    # Installed, but imported by nobody: the folder's own code does it.
    found = loads_of("present", *with_code)
    for folder in ("converted", "live", "again"):
        for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
            kind = {"AutoModel": "Model", "AutoConfig": "Config"}.get(auto, "ForCausalLM")
            assert found[folder, auto, "True"] == ("loaded", f"MetaplasticMamba2{kind}")
            outcome, rest = found["converted", auto, "None"]
            assert outcome == "refused"
            assert "trust_remote_code=True" in rest


@pytest.mark.slow
def test_saving_a_model_that_the_folder_s_code_loaded_keeps_that_code(tmp_path: Path) -> None:
    tiny_model("mamba2").save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    code = """
    import sys
    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    model.save_pretrained(sys.argv[2])
    AutoConfig.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
    """
    fresh(code, tmp_path, tmp_path / "converted", tmp_path / "again", tmp_path / "config")
    before = json.loads((tmp_path / "converted" / "config.json").read_text())["auto_map"]
    for name in ("again", "config"):
        after = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert after == before
        assert sorted(p.name for p in (tmp_path / name).glob("*.py")) == ["modeling_glazoo.py"]
    found = loads_of("present", tmp_path / "again")["again", "AutoModelForCausalLM", "True"]
    assert found == ("loaded", "MetaplasticMamba2ForCausalLM")
    # Without the option, nothing is written that nobody asked for.
    convert_checkpoint(tmp_path / "source", tmp_path / "bare", remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "bare-again")
    for name in ("bare", "bare-again"):
        assert not list((tmp_path / name).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_heads_start_anew_and_what_is_below_them_does_not(tmp_path: Path) -> None:
    tiny_model("minimax").save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    expected = dict(whole.model.named_parameters())
    loader = transformers.AutoModelForSequenceClassification
    model = loader.from_pretrained(tmp_path / "converted", num_labels=3)
    assert model.score.weight.shape[0] == 3
    for name, p in model.model.named_parameters():
        assert p.equal(expected[name]), name
    # Saved with its head, it has to have it.
    model.save_pretrained(tmp_path / "classifier")
    assert loader.from_pretrained(tmp_path / "classifier").score.weight.equal(model.score.weight)
    body = transformers.AutoModel.from_pretrained(tmp_path / "converted")
    for name, p in body.named_parameters():
        assert p.equal(expected[name]), name


def test_a_type_that_memory_does_not_know_is_no_converted_configuration(tmp_path: Path) -> None:
    """A source's configuration read as a converted one stays what transformers warns about."""
    tiny_model("mamba2").config.save_pretrained(tmp_path)
    config = glazoo.models.MetaplasticMamba2Config.from_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="has no block 'metaplastic'"):
        AutoModelForCausalLM.from_config(config)
    assert not isinstance(PreTrainedConfig.from_pretrained(tmp_path), type(config))


@pytest.mark.parametrize("name", ["mamba2", "minimax", "qwen3_next"])
def test_assisted_generation_is_refused_at_once(name: str) -> None:
    model = metaplasticize(tiny_model(name))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(  # type: ignore[operator]
            torch.arange(12)[None] % 6, prompt_lookup_num_tokens=3, max_new_tokens=4
        )
