"""The heat maps of `glazoo inspect`, and the numbers beside them."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from converters.converting import open_gates
from converters.tiny import tiny_model
from typer.testing import CliRunner

from glazoo.compare.keys import recorded
from glazoo.converters import ConversionError, InspectReport, convert_checkpoint, inspect_model
from glazoo.converters.calibration import observed
from glazoo.converters.commands import inspect
from glazoo.converters.loading import load_converted
from glazoo.converters.picture import check_plot, draw, numbers, write_plot
from glazoo.converters.report import GateSummary, LayerUse
from glazoo.converters.texts import read_tokens
from glazoo.converters.tune import save_gates


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """A converted folder whose gates are away from their start."""
    tiny_model("mamba2", vocab_size=258).save_pretrained(tmp_path / "s", max_shard_size="40KB")
    convert_checkpoint(tmp_path / "s", tmp_path / "c")
    model = load_converted(tmp_path / "c")
    open_gates(model, kappa=0.8)
    save_gates(tmp_path / "c", tmp_path / "o", model)
    return tmp_path / "o"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 20)
    return path


def made(layers: int, heads: int, *, measured: bool = True) -> InspectReport:
    """A report with numbers of every size."""
    gates = tuple(
        GateSummary(k, tuple(h / heads for h in range(heads)), (1.0,) * heads, 0.5)
        for k in range(layers)
    )
    use = tuple(
        LayerUse(
            k,
            tuple(1.0 + 10.0 ** (h % 6) for h in range(heads)),
            (0.1,) * heads,
            tuple((h + k) % 5 / 4 for h in range(heads)),
            (1.5,) * heads,
        )
        for k in range(layers)
    )
    return InspectReport(
        "model", "mamba2", "mamba2", "value", "diagonal", gates, 99, use if measured else (), 0.1
    )


def size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG, after its chunks were checked."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        kind, data = picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]
        (found,) = struct.unpack(">I", picture[at + 8 + length : at + 12 + length])
        assert found == zlib.crc32(kind + data)
        kinds.append(kind)
        at += 12 + length
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


_QUICK = ((1, 1, False), (12, 16, True))


@pytest.mark.parametrize(
    ("layers", "heads", "measured"),
    [
        pytest.param(*size, measured, marks=[pytest.mark.slow] * ((*size, measured) not in _QUICK))
        for size in [(1, 1), (2, 4), (12, 16), (64, 80)]
        for measured in [True, False]
    ],
)
def test_models_of_every_size_are_drawn(layers: int, heads: int, measured: bool) -> None:
    report = made(layers, heads, measured=measured)
    picture = draw(report)
    width, height = size(picture)
    assert 800 < width < 4000
    assert 400 < height < 2000
    assert draw(report) == picture


def test_the_picture_shows_the_numbers(opened: Path, text: Path) -> None:
    """Moved numbers give another picture."""
    report = inspect_model(opened, [text], tokenizer="bytes", tokens=100)
    assert draw(report) != draw(inspect_model(opened, [text], tokenizer="bytes", tokens=20))
    bare = inspect_model(opened)
    assert draw(bare) != draw(inspect_model(opened.parent / "c"))


def test_numbers_lie_beside_the_picture(opened: Path, text: Path, tmp_path: Path) -> None:
    report = inspect_model(opened, [text], tokenizer="bytes", tokens=100)
    table = write_plot(report, tmp_path / "map.png")
    assert table == tmp_path / "map.csv"
    size((tmp_path / "map.png").read_bytes())
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(rows) == 2 * 4
    for row, (layer, head) in zip(rows, ((k, h) for k in (0, 1) for h in range(4)), strict=True):
        gate, use = report.gates[layer], report.use[layer]
        assert {key: float(value) for key, value in row.items()} == {
            "layer": layer,
            "head": head,
            "plasticity": gate.kappa[head],
            "prior": gate.prior[head],
            "window_tokens": use.window[head],
            "importance_gate": use.strength[head],
            "importance_over_prior": use.importance[head],
            "share_above_prior": use.consolidated[head],
        }
    bare = numbers(inspect_model(opened)).splitlines()
    assert bare[0] == "layer,head,plasticity,prior"
    assert len(bare) == 9


def test_command(opened: Path, text: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(inspect)
    arguments = [str(opened), str(text), "--tokenizer", "bytes", "--tokens", "64"]
    plot = ["--plot", str(tmp_path / "map.png")]
    result = CliRunner().invoke(app, [*arguments, *plot])
    assert result.exit_code == 0, result.output
    assert "map.png" in result.output
    assert "map.csv" in result.output
    # With --json, standard output stays JSON.
    result = CliRunner().invoke(app, [*arguments, *plot, "--json"])
    assert json.loads(result.stdout)["tokens"] == 64


def test_what_cannot_be_drawn_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer()
    app.command()(inspect)
    with pytest.raises(ConversionError, match=r"got 'map.pdf', expected .* \.png"):
        check_plot(tmp_path / "map.pdf")
    with pytest.raises(ConversionError, match="cannot write the plot"):
        write_plot(made(1, 1), tmp_path / "nowhere" / "map.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    # Before the model is looked for.
    result = CliRunner().invoke(app, [str(tmp_path / "gone"), "--plot", str(tmp_path / "x.png")])
    assert isinstance(result.exception, ImportError)
    assert str(result.exception) == "matplotlib is not installed: pip install 'glazoo[plots]'"


def test_keys_over_a_text_are_saved_for_capacity(opened: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys" / "keys.npz"
    file.parent.mkdir()
    inspect_model(opened, [text], tokenizer="bytes", tokens=100, keys=file)
    assert list(file.parent.iterdir()) == [file]
    ids = torch.from_numpy(read_tokens([text], "bytes", limit=100)[:100].astype("int64"))
    seen = {s.layer: s.keys[0] for s in observed(load_converted(opened), ids)}
    with np.load(file) as data:
        assert set(data.files) == {f"layer_{n}" for n in seen}
        for layer, keys in seen.items():
            assert torch.equal(torch.from_numpy(data[f"layer_{layer}"]), keys.half())
    heads = sum(k.shape[1] for k in seen.values())
    assert recorded(str(file)).keys.shape == (heads, 2, 50, seen[0].shape[-1])


def test_keys_without_a_text_or_a_place_are_refused(
    opened: Path, text: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for texts, file, message in (
        ([], here / "k.npz", "those of a text"),
        ([text], here / "k.pt", "ends in .npz"),
        ([text], here / "no" / "k.npz", "is no folder"),
    ):
        with pytest.raises(ConversionError, match=message):
            inspect_model(opened, texts, tokenizer="bytes", keys=file)
    assert not list(here.iterdir())
