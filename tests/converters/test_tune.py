"""Fine-tuning converted folders, and measuring where they stand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from converters.converting import contents, open_gates
from converters.tiny import tiny_model
from typer.testing import CliRunner

from glazoo import metaplasticize
from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    inspect_model,
    revert_checkpoint,
    tune_checkpoint,
    verify_checkpoint,
)
from glazoo.converters.commands import inspect, tune
from glazoo.converters.examine import gate_summaries, measure_use
from glazoo.converters.loading import load_converted
from glazoo.converters.recipes import RECIPES
from glazoo.layers import gates
from glazoo.models import GlazooConfig, GlazooForCausalLM
from glazoo.models.rates import RateTrainer
from glazoo.training import TrainConfig, run

SMALL: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "length": 16,
    "tokenizer": "bytes",
    "cpu": True,
    "quiet": True,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 80)
    return path


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    # Bytes, the end of text and padding.
    tiny_model("mamba2", vocab_size=258).save_pretrained(tmp_path / "s", max_shard_size="40KB")
    (tmp_path / "s" / "LICENSE").write_text("terms")
    convert_checkpoint(tmp_path / "s", tmp_path / "c")
    return tmp_path / "c"


def test_gates_are_trained_and_nothing_else(converted: Path, tmp_path: Path, text: Path) -> None:
    before = contents(converted)
    (tmp_path / ".t.partial-x").mkdir()
    report = tune_checkpoint(converted, tmp_path / "t", [text], **SMALL)
    (warning,) = report.warnings
    assert "a killed run has left" in warning
    assert warning in report.to_markdown()
    assert contents(converted) == before
    assert report.loss_after < report.loss_before
    assert report.trained == "gates"
    assert 0 < report.trained_parameters < 0.2 * report.parameters
    assert any(any(g.kappa) for g in report.gates)

    after = contents(tmp_path / "t")
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]}
    assert len(changed) == 1
    for name in after:
        linked = (converted / name).samefile(tmp_path / "t" / name)
        assert linked == (name.endswith(".safetensors") and name not in changed)
    model = load_converted(tmp_path / "t")
    assert gate_summaries(model) == report.gates
    # The source is still inside, and still agrees at the source's end of the continuum.
    verified = verify_checkpoint(tmp_path / "s", tmp_path / "t", tokens=9, new_tokens=2)
    assert verified.passed
    assert not verified.at_source
    revert_checkpoint(tmp_path / "t", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "s")


@pytest.mark.parametrize("rate", [0.0, 1.0, 20.0])
def test_the_plasticity_has_a_rate_of_its_own(
    converted: Path, tmp_path: Path, text: Path, rate: float
) -> None:
    """Adam's first step is the rate, whatever the gradient; at zero some heads have none."""
    one = {**SMALL, "steps": 1}
    tune_checkpoint(
        converted, tmp_path / "t", [text], learning_rate=1e-3, plasticity_rate=rate, **one
    )
    old, new = load_converted(converted), load_converted(tmp_path / "t")
    names = [n for n, _ in old.named_parameters() if n.endswith("metaplastic.b_scale")]
    moved = torch.cat([(new.get_parameter(n) - old.get_parameter(n)).abs() for n in names])
    torch.testing.assert_close(moved.max(), moved.new_tensor(1e-3 * rate))


def test_everything_is_trained_if_asked_for(converted: Path, tmp_path: Path, text: Path) -> None:
    report = tune_checkpoint(
        converted, tmp_path / "t", [text], everything=True, learning_rate=1e-3, **SMALL
    )
    assert report.loss_after < report.loss_before
    assert report.trained_parameters == report.parameters
    model = load_converted(tmp_path / "t")
    old = load_converted(converted)
    key = "backbone.layers.0.mixer.in_proj.weight"
    assert not torch.equal(model.get_parameter(key), old.get_parameter(key))
    assert (tmp_path / "t" / "LICENSE").read_text() == "terms"
    with pytest.raises(ConversionError, match="only folders that `glazoo convert` wrote"):
        revert_checkpoint(tmp_path / "t", tmp_path / "back")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_is_trained_and_how(
    recipe: str, converted: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(RateTrainer, "train", lambda self, **_: seen.append(self))
    options = SMALL | {"batch": 1, "steps": None, "learning_rate": 0.003, "recipe": recipe}
    report = tune_checkpoint(converted, tmp_path / "t", [text], **options)
    (trainer,), wanted = seen, RECIPES[recipe]
    assert trainer.args.lr_scheduler_type == wanted.schedule
    assert trainer.args.warmup_steps == wanted.warmup * wanted.steps
    assert trainer.args.max_steps == report.steps == wanted.steps
    assert trainer.args.learning_rate == report.learning_rate == 0.003
    assert trainer.plasticity_rate == report.plasticity_rate == wanted.plasticity_rate
    assert report.trained == ("all" if wanted.everything else "gates")
    assert f"| recipe | {recipe} |" in report.to_markdown()


def test_the_rate_of_a_whole_model_is_its_own(converted: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConversionError, match=r"peak rate of the source's own training.*--lr"):
        tune_checkpoint(converted, tmp_path / "t", [text], recipe="whole", **SMALL)
    assert not (tmp_path / "t").exists()


def test_folders_that_were_saved_again_are_tuned_too(
    converted: Path, tmp_path: Path, text: Path
) -> None:
    model = load_converted(converted)
    model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    report = tune_checkpoint(tmp_path / "again", tmp_path / "t", [text], **SMALL)
    assert report.trained == "gates"
    tuned = load_converted(tmp_path / "t")
    assert gate_summaries(tuned) == report.gates
    for key, p in model.named_parameters():
        assert (".metaplastic." in key) or torch.equal(p, tuned.get_parameter(key))


def test_an_adapter_beside_the_weights_is_not_all_that_is_saved(
    converted: Path, tmp_path: Path, text: Path
) -> None:
    peft = pytest.importorskip("peft", reason="adapters are applied where peft is installed only")
    model: Any = load_converted(converted)
    model.add_adapter(peft.LoraConfig(target_modules=["in_proj"]))
    model.save_pretrained(converted)
    with pytest.raises(ConversionError, match="holds an adapter beside its weights"):
        tune_checkpoint(converted, tmp_path / "t", [text], everything=True, **SMALL)
    assert not (tmp_path / "t").exists()


def test_an_interrupted_run_is_resumed(
    converted: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SMALL, "checkpoint_every": 2}
    whole = tune_checkpoint(converted, tmp_path / "whole", [text], **options)
    step = transformers.Trainer.training_step
    done = 0

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(converted, tmp_path / "t", [text], **options)
    monkeypatch.setattr(transformers.Trainer, "training_step", step)
    assert not (tmp_path / "t").exists()
    with pytest.raises(ConversionError, match="has checkpoints: --resume continues"):
        tune_checkpoint(converted, tmp_path / "t", [text], **options)
    for other, message in (
        ({"learning_rate": 0.1}, r"\(learning_rate was 0\.01, is 0\.1\): resume with those"),
        ({"recipe": "whole", "learning_rate": 0.01}, r"recipe was gates, is whole, everything was"),
        ({"validation": 0.3}, r"validation was 0\.\d+, is 0\.3"),
    ):
        changed = {**options, **other}
        with pytest.raises(ConversionError, match=message):
            tune_checkpoint(converted, tmp_path / "t", [text], resume=True, **changed)
    another = tmp_path / "another.txt"
    another.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(ConversionError, match=r"\(other texts\): resume with those"):
        tune_checkpoint(converted, tmp_path / "t", [another], resume=True, **options)
    report = tune_checkpoint(converted, tmp_path / "t", [text], resume=True, **options)
    assert report.gates == whole.gates
    assert (report.loss_before, report.loss_after) == (whole.loss_before, whole.loss_after)
    assert not (tmp_path / "t.checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "best"}, "recipe: got 'best', accepted are gates, whole"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"validation": 1.0}, r"validation: got 1.0, accepted are numbers in \(0, 1\)"),
        ({"length": 4000}, "training and evaluation need one each"),
        ({"tokenizer": "nowhere"}, "cannot load a tokenizer from nowhere"),
        ({"resume": True}, "has no checkpoint to resume from"),
        ({"seed": -1}, "seed: got -1, expected at least 0"),
        ({"seed": 2**32}, r"seed: got 4294967296, accepted are numbers below 2\^32"),
        ({"learning_rate": -1.0}, r"learning_rate: got -1.0, accepted are finite numbers above 0"),
        ({"learning_rate": math.nan}, r"learning_rate: got nan"),
        ({"learning_rate": 1e9, "steps": 2}, r"went from \d\.\d+ to (nan|inf): nothing is written"),
        (
            {"learning_rate": 1e9, "steps": 2, "checkpoint_every": 1},
            r"went from \d\.\d+ to (nan|inf): nothing is written",
        ),
        ({"plasticity_rate": -1.0}, r"plasticity_rate: got -1.0, accepted are numbers in \[0"),
        ({"dtype": "float16"}, "dtype: got 'float16'"),
    ],
)
def test_bad_arguments_are_refused(
    converted: Path, tmp_path: Path, text: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        tune_checkpoint(converted, tmp_path / "t", [text], **{**SMALL, **changes})
    # Checkpoints, too, of which none could be gone on from.
    assert {f.name for f in tmp_path.iterdir()} <= {"text.txt", "s", "c"}


def test_bad_folders_and_texts_are_refused(converted: Path, tmp_path: Path, text: Path) -> None:
    for src, dst, texts, message in (
        (tmp_path / "s", tmp_path / "t", [text], "has no block 'metaplastic'"),
        (tmp_path / "nowhere", tmp_path / "t", [text], "there is no such folder"),
        (converted, converted, [text], "is the source itself"),
        (converted, tmp_path / "s", [text], "exists already"),
        (converted, tmp_path / "t", [], "texts: got no file"),
        (converted, tmp_path / "t", [tmp_path / "x.txt"], "cannot read"),
    ):
        with pytest.raises(ConversionError, match=message):
            tune_checkpoint(src, dst, texts, **SMALL)
    tiny_model("mamba2").save_pretrained(tmp_path / "few")
    convert_checkpoint(tmp_path / "few", tmp_path / "few-c")
    with pytest.raises(ConversionError, match=r"it gives id \d+, the model has 61 tokens"):
        tune_checkpoint(tmp_path / "few-c", tmp_path / "t", [text], **SMALL)


def test_use_is_measured_on_tokens() -> None:
    for name in ("mamba2", "qwen3_next", "kimi_linear", "minimax"):
        for gate in ("head", "value"):
            model: Any = metaplasticize(tiny_model(name), gate=gate)
            ids = torch.arange(40)[None] % 61
            before = model(ids).logits
            use = measure_use(model, ids)
            heads = len(gate_summaries(model)[0].kappa)
            assert [u.layer for u in use] == [g.layer for g in gate_summaries(model)]
            for u in use:
                assert {len(x) for x in (u.window, u.strength, u.importance)} == {heads}
                # At the source importance is the prior.
                assert set(u.strength) == {0.0}
                assert set(u.consolidated) == {0.0}
                assert set(u.importance) == {1.0}
                assert all(w >= 1 and math.isfinite(w) for w in u.window)
            assert torch.equal(model(ids).logits, before)
            open_gates(model, kappa=4.0)
            used = measure_use(model, ids)
            for u in used:
                assert all(b > 0 for b in u.strength)
                assert all(i > 1 for i in u.importance)
                assert all(0 <= c <= 1 for c in u.consolidated)
            assert any(any(u.consolidated) for u in used)


def test_windows_are_those_of_the_decay() -> None:
    model: Any = metaplasticize(tiny_model("minimax"))
    for u in measure_use(model, torch.arange(10)[None]):
        slope = model.model.layers[u.layer].self_attn.slope_rate.double().flatten()
        expected = 1 / (1 - torch.exp(-slope))
        torch.testing.assert_close(torch.tensor(u.window, dtype=torch.float64), expected)


def test_inspection_of_a_folder(converted: Path, text: Path) -> None:
    report = inspect_model(converted)
    assert (report.family, report.spec, report.gate) == ("mamba2", "mamba2", "head")
    assert report.use == ()
    assert all(g.opening == 0 and not any(g.kappa) for g in report.gates)
    measured = inspect_model(converted, [text], tokenizer="bytes", tokens=50)
    assert measured.tokens == 50
    assert len(measured.use) == 2
    with pytest.raises(ConversionError, match="tokens: got 0"):
        inspect_model(converted, tokens=0)
    with pytest.raises(ConversionError, match="has no block 'metaplastic'"):
        inspect_model(converted.parent / "s")


@pytest.fixture
def trained(tmp_path: Path, text: Path) -> Path:
    """What `glazoo train` makes of a configuration that is metaplastic in two layers of three."""
    run(
        TrainConfig(
            model={
                "pattern": ["gla", "attention", "gated_deltanet"],
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_heads": 2,
                "head_k_dim": 4,
                "head_v_dim": 8,
            },
            data={"files": [text], "length": 16},  # type: ignore[arg-type]
            training={
                "output_dir": str(tmp_path / "trained"),
                "max_steps": 1,
                "save_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
            },
            metaplastic={"rank": 2},  # type: ignore[arg-type]
        )
    )
    return tmp_path / "trained"


def test_a_model_of_our_own_is_tuned_and_inspected(
    trained: Path, tmp_path: Path, text: Path
) -> None:
    before = contents(trained)
    options = {name: x for name, x in SMALL.items() if name != "tokenizer"}
    report = tune_checkpoint(trained, tmp_path / "t", [text], **options)
    assert contents(trained) == before
    assert report.trained == "gates"
    assert report.loss_after < report.loss_before
    # The checkpoint of the first run stays with it.
    assert (trained / "checkpoint-1").is_dir()
    assert not (tmp_path / "t" / "checkpoint-1").exists()
    old, new = load_converted(trained), load_converted(tmp_path / "t")
    assert type(new) is type(old) is GlazooForCausalLM
    moved = {n for n, p in old.named_parameters() if not torch.equal(p, new.get_parameter(n))}
    assert moved
    assert all(".metaplastic." in name for name in moved)

    found = inspect_model(tmp_path / "t", [text], tokens=50)
    assert (found.family, found.gate) == ("glazoo", "head")
    assert found.spec == "gla, gated_deltanet"
    assert found.gates == report.gates == gate_summaries(new)
    assert [u.layer for u in found.use] == [g.layer for g in found.gates] == [0, 2]
    assert any(any(g.kappa) for g in found.gates)
    for gate, use in zip(found.gates, found.use, strict=True):
        # Importance grows above the prior where a head is plastic, and there only.
        assert [x > 1 for x in use.importance] == [kappa > 0 for kappa in gate.kappa]
        assert all(w > 1 for w in use.window)
    # Converted or metaplastic by training, it is one form: it cannot be converted again.
    with pytest.raises(ConversionError, match="metaplastic already"):
        convert_checkpoint(tmp_path / "t", tmp_path / "c")


def test_a_model_of_our_own_has_one_metaplastic_form(tmp_path: Path) -> None:
    """By folder or in place, whatever its layers are: several writes per token, an exact gain,
    metaplastic already."""
    for pattern in (["gated_deltaproduct", "palimpsa"], ["implicit_delta", "attention"]):
        sizes = {"num_heads": 2, "head_k_dim": 4, "head_v_dim": 8, "num_attention_heads": 2}
        config = GlazooConfig(
            pattern=pattern, hidden_size=16, num_hidden_layers=2, vocab_size=61, **sizes
        )
        folder = tmp_path / pattern[0]
        GlazooForCausalLM(config).save_pretrained(folder / "s")
        convert_checkpoint(folder / "s", folder / "c", dtype="bfloat16")
        report = verify_checkpoint(folder / "s", folder / "c", tokens=9, new_tokens=2)
        assert report.passed, report.to_markdown()
        by_folder = load_converted(folder / "c", dtype=torch.bfloat16)
        in_place = metaplasticize(
            GlazooForCausalLM.from_pretrained(folder / "s", dtype=torch.bfloat16)
        )
        assert type(by_folder) is type(in_place)
        assert by_folder.config.specs == in_place.config.specs
        assert by_folder.config.layer_specs == in_place.config.layer_specs
        theirs = in_place.state_dict()
        assert theirs.keys() == by_folder.state_dict().keys()
        for name, x in by_folder.state_dict().items():
            assert x.dtype == theirs[name].dtype, name
            assert torch.equal(x, theirs[name]), name
        revert_checkpoint(folder / "c", folder / "back")
        assert (folder / "back" / "model.safetensors").is_file()


def test_a_model_of_our_own_without_gates_is_refused(trained: Path, tmp_path: Path) -> None:
    model = GlazooForCausalLM(load_converted(trained).config)  # type: ignore[arg-type]
    for pattern, message in (("gla", "has no importance gates"), ("mesanet", "nothing to inspect")):
        model.config.set_pattern(pattern)
        GlazooForCausalLM(model.config).save_pretrained(tmp_path / pattern)
        with pytest.raises(ConversionError, match=message):
            inspect_model(tmp_path / pattern)
    model.config.set_pattern(["gla", "retnet"])
    GlazooForCausalLM(model.config).save_pretrained(tmp_path / "two")
    with pytest.raises(ConversionError, match="from one spec, and this has gla, retnet: load the"):
        convert_checkpoint(tmp_path / "two", tmp_path / "c")


def test_commands(converted: Path, tmp_path: Path, text: Path) -> None:
    app = typer.Typer()
    app.command()(tune)
    app.command()(inspect)
    runner = CliRunner()
    options = ["--steps", "2", "--batch", "2", "--length", "16", "--tokenizer", "bytes", "--cpu"]
    where = [str(converted), str(tmp_path / "t"), str(text)]
    result = runner.invoke(
        app, ["tune", *where, *options, "--json", "--report", str(tmp_path / "r.md")]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    assert "evaluation loss" in (tmp_path / "r.md").read_text()
    result = runner.invoke(
        app, ["inspect", str(tmp_path / "t"), str(text), "--tokenizer", "bytes", "--tokens", "64"]
    )
    assert result.exit_code == 0, result.output
    assert "plasticity kappa: layers down, heads across" in result.output
    assert "synapses above the prior" in result.output
    result = runner.invoke(app, ["inspect", str(converted), "--json"])
    assert len(json.loads(result.stdout)["gates"]) == 2


def test_open_gates_of_a_tuned_model_are_in_the_shard(converted: Path, tmp_path: Path) -> None:
    from glazoo.converters.tune import save_gates

    model = load_converted(converted)
    open_gates(model)
    save_gates(converted, tmp_path / "t", model)
    again = load_converted(tmp_path / "t")
    for (_, a), (_, b) in zip(gates(model), gates(again), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
