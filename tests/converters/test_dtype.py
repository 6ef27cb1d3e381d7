"""Conversions that write the source's weights in another dtype."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from converters.conftest import MakeSource
from converters.converting import contents, edit_json
from converters.tiny import TINY, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from glazoo.converters import casting as cast_module
from glazoo.converters.casting import with_dtype
from glazoo.converters.commands import convert
from glazoo.converters.tensors import read_shard
from glazoo.families import find_family

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("old", DTYPES)
@pytest.mark.parametrize("new", DTYPES)
def test_every_weight_is_cast_once(
    make_source: MakeSource, tmp_path: Path, old: str, new: str, sharded: bool
) -> None:
    source = make_source(dtype=DTYPES[old], sharded=sharded)
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "c", dtype=new)  # type: ignore[arg-type]
    assert contents(source) == before
    was, now = tensors(source), tensors(tmp_path / "c")
    assert all(same(now[key], t.to(DTYPES[new])) for key, t in was.items())
    added = set(now) - set(was)
    assert {now[key].dtype for key in added} == {torch.float32}
    assert report.dtype == (None if old == new else new)
    assert report.kept_wide == ()
    change = max(float((now[k].double() - t.double()).abs().max()) for k, t in was.items())
    assert report.largest_change == change
    # Eight bits do fit into eleven, as long as the exponent does.
    assert (change > 0) == (
        old != new and new != "float32" and (old, new) != ("bfloat16", "float16")
    )
    hows = {f.how for f in report.files if f.path.endswith(".safetensors")}
    assert hows == {"linked" if old == new else "cast"}

    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["dtype"] == new
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in now.values())
    assert report.base_bytes == sum(now[key].nbytes for key in was)
    for f in report.files:
        assert (tmp_path / "c" / f.stored).stat().st_size == f.bytes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c").dtype == DTYPES[new]

    reverted = revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert reverted.dtype == report.dtype
    if old == new:
        assert contents(tmp_path / "back") == before
        return
    assert "not byte for byte" in reverted.to_markdown()
    back = contents(tmp_path / "back")
    assert set(back) == set(before)
    changed = {name for name in back if back[name] != before[name]}
    sizes = {DTYPES[d].itemsize for d in (old, new)}
    index_name = "model.safetensors.index.json"
    assert changed - {index_name} == {
        n for n in back if n.endswith(".safetensors") or n == "config.json"
    }
    assert (index_name in changed) == (sharded and len(sizes) == 2)
    given = tensors(tmp_path / "back")
    assert all(same(given[key], now[key]) for key in was)
    assert set(given) == set(was)
    assert json.loads(back["config.json"]) == {**json.loads(before["config.json"]), "dtype": new}
    if sharded:
        listing = json.loads(back[index_name])
        assert listing["metadata"]["total_size"] == sum(t.nbytes for t in given.values())
    # It is a source like any other.
    assert convert_checkpoint(tmp_path / "back", tmp_path / "again").layers == report.layers


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32"]
)
def test_verification_compares_after_the_cast(
    make_source: MakeSource, tmp_path: Path, dtype: Any
) -> None:
    old = torch.bfloat16 if dtype == "float32" else None
    source = make_source(dtype=old)
    convert_checkpoint(source, tmp_path / "c", dtype=dtype)
    report = verify_checkpoint(source, tmp_path / "c", tokens=17, new_tokens=3, float64=True)
    assert report.passed
    assert report.at_source
    assert report.dtype == dtype
    # As tight as without a cast: the cast has a check of its own.
    assert all(c.budget < 1e-2 for c in report.checks if c.budget is not None)
    assert report.checks[0].name == "cast"
    assert report.cast_shift is not None
    assert (report.cast_shift > 1e-4) == (dtype != "float32")
    assert f"cast the weights to {dtype}" in report.to_markdown()

    # One bit of one weight is found.
    path = next(
        p
        for p in (tmp_path / "c").glob("*.safetensors")
        if "backbone.norm_f.weight" in load_file(p)
    )
    data = bytearray(path.read_bytes())
    start = len(data) - read_shard(path).data_bytes
    for key, info in read_shard(path).tensors.items():
        if key == "backbone.norm_f.weight":
            break
        start += info.nbytes
    data[start] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))
    report = verify_checkpoint(source, tmp_path / "c", tokens=9, new_tokens=2)
    assert [c.name for c in report.checks if not c.passed] == ["cast"]
    assert "backbone.norm_f.weight is not" in report.checks[0].detail


def test_what_is_wide_on_purpose_stays(make_source: MakeSource, tmp_path: Path) -> None:
    """A_log and D in float32 beside bfloat16 weights: somebody had a reason."""
    source = make_source(dtype=torch.bfloat16)
    wide = []
    for path in source.glob("*.safetensors"):
        data = load_file(path)
        for key in data:
            if key.endswith((".A_log", ".D")):
                data[key] = data[key].float()
                wide.append(key)
        save_file(data, path, metadata={"format": "pt"})
    assert len(wide) == 4
    was = tensors(source)
    for dtype in ("float16", "bfloat16"):
        report = convert_checkpoint(source, tmp_path / dtype, dtype=dtype)  # type: ignore[arg-type]
        now = tensors(tmp_path / dtype)
        assert sorted(report.kept_wide) == sorted(wide)
        for key, t in was.items():
            assert same(now[key], t if key in wide else t.to(DTYPES[dtype]))
        assert verify_checkpoint(source, tmp_path / dtype, tokens=9, new_tokens=2).passed
    assert convert_checkpoint(source, tmp_path / "w", dtype="float32").kept_wide == ()


@pytest.mark.parametrize(
    "name", [n for n in ("nemotron_h", "kimi_linear", "glm5_next", "qwen3_next") if n in TINY]
)
def test_what_the_family_keeps_in_float32_stays(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "s", max_shard_size="50KB")
    report = convert_checkpoint(tmp_path / "s", tmp_path / "c", dtype="bfloat16")
    family = find_family(TINY[name][0])
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    source = family.source_model(family.architectures[0])
    expected: Any = source.from_pretrained(tmp_path / "s", dtype=torch.bfloat16)
    # The converted model is what transformers makes of the source in that dtype.
    state = dict(loaded.named_parameters())
    for key, p in expected.named_parameters():
        assert same(state[key], p), key
    strict = expected._keep_in_fp32_modules_strict
    assert bool(report.kept_wide) == bool(strict)
    wide = {key for key, t in tensors(tmp_path / "c").items() if t.dtype == torch.float32}
    assert {key for key in wide if ".metaplastic." not in key} == set(report.kept_wide)


def test_numbers_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    path = next(p for p in source.glob("*.safetensors") if "backbone.norm_f.weight" in load_file(p))
    data = load_file(path)
    data["backbone.norm_f.weight"][3] = 1e5
    save_file(data, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"norm_f.weight holds 1e\+05, which float16 cannot"):
        convert_checkpoint(source, tmp_path / "c", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    convert_checkpoint(source, tmp_path / "c", dtype="bfloat16")
    # What is not finite already is no number that has to fit.
    data["backbone.norm_f.weight"][3] = float("inf")
    data["backbone.norm_f.weight"][4] = float("nan")
    save_file(data, path, metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "d", dtype="float16")
    kept = tensors(tmp_path / "d")["backbone.norm_f.weight"]
    assert kept[3] == float("inf")
    assert kept[4].isnan()


def test_tensors_longer_than_a_block(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert_checkpoint(source, tmp_path / "c", dtype="bfloat16")
    monkeypatch.setattr(cast_module, "_BLOCK", 64)
    assert convert_checkpoint(source, tmp_path / "d", dtype="bfloat16").files == whole.files
    assert contents(tmp_path / "d") == contents(tmp_path / "c")
    assert verify_checkpoint(source, tmp_path / "d", tokens=9, new_tokens=2).passed


def test_dry_runs_know_the_sizes(source: Path, tmp_path: Path) -> None:
    planned = convert_checkpoint(source, tmp_path / "c", dtype="float16", dry_run=True)
    assert not (tmp_path / "c").exists()
    done = convert_checkpoint(source, tmp_path / "c", dtype="float16")
    assert [(f.path, f.bytes) for f in planned.files] == [(f.path, f.bytes) for f in done.files]
    assert planned.largest_change is None
    assert "Casting to float16 rounds" in done.to_markdown()
    assert "Casting to float16 rounds where it has to" in planned.to_markdown()
    assert done.largest_change is not None
    assert f"by up to {done.largest_change:.3g}" in done.to_markdown()
    assert "Casting" not in convert_checkpoint(source, tmp_path / "d").to_markdown()


def test_the_card_promises_what_revert_keeps(source: Path, tmp_path: Path) -> None:
    for name, dtype in (("plain", None), ("same", "float32"), ("cast", "bfloat16")):
        convert_checkpoint(source, tmp_path / name, dtype=dtype)  # type: ignore[arg-type]
        card = (tmp_path / name / "README.md").read_text()
        assert ("byte for byte" in card) == (name != "cast")
        assert ("with the weights in bfloat16" in card) == (name == "cast")


def test_configurations_name_the_dtype_in_their_parts() -> None:
    old = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "layers": [1]},
        "vision_config": {"depth": 1},
        "quantization": {"dtype": "int8"},
    }
    assert with_dtype(old, "bfloat16") == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "layers": [1]},
        "vision_config": {"depth": 1},
        "quantization": {"dtype": "int8"},
    }
    assert with_dtype({"model_type": "x"}, "float16") == {"model_type": "x", "dtype": "float16"}


def test_command(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", dtype="float32")
    app = typer.Typer()
    app.command()(convert)
    runner = CliRunner()
    arguments = [str(source), str(tmp_path / "c"), "--dtype", "bfloat16"]
    result = runner.invoke(app, [*arguments, "--verify", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["dtype"], data["verify"]["dtype"]) == ("bfloat16", "bfloat16")
    assert data["verify"]["passed"]
    result = runner.invoke(app, [*arguments, "--revert"])
    assert isinstance(result.exception, ConversionError)
    result = runner.invoke(app, [str(source), str(tmp_path / "d"), "--dtype", "int8"])
    assert result.exit_code == 2
    with pytest.raises(ConversionError, match="dtype: got 'int8', accepted are 'float32'"):
        convert_checkpoint(source, tmp_path / "d", dtype="int8")  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    code = """
    import json, resource, struct, sys
    from pathlib import Path
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM
    from glazoo.converters import convert_checkpoint

    for vocabulary in (30_000, 600_000):
        folder = Path(sys.argv[1]) / str(vocabulary)
        config = Mamba2Config(
            hidden_size=64, num_heads=4, head_dim=32, state_size=8, n_groups=1,
            num_hidden_layers=1, vocab_size=vocabulary, architectures=["Mamba2ForCausalLM"],
        )
        config.save_pretrained(folder)
        with torch.device("meta"):
            state = Mamba2ForCausalLM(config).state_dict()
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for key, t in state.items():
            offsets = [end, end + 4 * t.numel()]
            header[key] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": offsets}
            end = offsets[1]
        raw = json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            f.truncate(8 + len(raw) + end)
        convert_checkpoint(folder, str(folder) + "-converted", dtype="bfloat16")
        print(end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert large - small > 250_000_000
    # A few blocks in several precisions, and the allocator's moods; half the larger table is far
    # more.
    assert after - before < (large - small) / 5
