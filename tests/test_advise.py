"""What keys are like, what memories find of them, and the advice that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from glazoo import load, metaplasticize
from glazoo.advise import FORMS, Prediction, _advice, advise_checkpoint, key_use, predict
from glazoo.cli import app
from glazoo.errors import ConversionError
from glazoo.models import GlazooConfig, GlazooForCausalLM
from glazoo.stats import Interval

SIZE = 8


def one_hot(*channels: int, size: int = 4) -> torch.Tensor:
    """A context of keys of length one along channels, [1, T, 1, K]."""
    return torch.eye(size)[list(channels)][None, :, None]


def test_keys_along_two_channels_in_all_contexts() -> None:
    use = key_use(3, one_hot(0, 1, 0, 1).expand(4, -1, -1, -1), torch.full((4, 4, 1), 0.5).log())
    assert use.layer == 3
    assert use.directions == pytest.approx([2.0])
    assert use.changing == pytest.approx([0.0], abs=1e-12)
    assert use.neglected == pytest.approx([0.0], abs=1e-12)
    assert use.window == pytest.approx([2.0])
    assert use.writes == pytest.approx([1.0])


def test_contexts_that_share_no_direction() -> None:
    keys = torch.cat([one_hot(i, i, i, i) for i in range(4)])
    use = key_use(0, keys)
    assert use.directions == pytest.approx([4.0])
    # Each has one direction of its own beside three that none of its keys has.
    assert use.changing == pytest.approx([0.0], abs=1e-12)
    assert use.window == (4.0,)
    two = key_use(0, torch.cat([one_hot(0, 0, 0, 1), one_hot(0, 0, 0, 1), one_hot(2, 2, 2, 3)]))
    assert two.changing[0] > 0.3


def test_what_an_importance_per_key_neglects_and_axes_do_not() -> None:
    along = torch.tensor([1.0, 1.0, 0.0, 0.0]) / 2**0.5
    keys = along.expand(4, 6, 1, 4)
    use = key_use(0, keys)
    # k k^T has a half of its square off the diagonal.
    assert use.directions == pytest.approx([1.0])
    assert use.neglected == pytest.approx([0.5])
    assert use.neglected_rotated == pytest.approx([0.0], abs=1e-9)


def recordings(shared: float, file: Path) -> str:
    """Keys of which every context has a large part in common, another one in another context."""
    rng = np.random.default_rng(0)
    common = np.eye(SIZE)[rng.integers(0, SIZE, (16, 1, 2))] * shared
    keys = rng.standard_normal((16, 24, 2, SIZE)) / SIZE**0.5 + common
    np.savez(file, layer_0=keys)
    return str(file)


@pytest.mark.parametrize(("shared", "pays"), [(3.0, True), (0.0, False)])
def test_importance_is_predicted_to_pay_where_contexts_share(
    shared: float, pays: bool, tmp_path: Path
) -> None:
    source = load("mamba2")
    specs = {"source": source, "per key": metaplasticize(source)}
    file = recordings(shared, tmp_path / "keys.npz")
    pairs, found = predict(file, specs, values=16, pairs=(8,), seeds=6)
    assert pairs == (8,)
    gains = [a - b for a, b in zip(found["per key"], found["source"], strict=True)]
    assert (min(gains) > 0.05) is pays
    assert (sum(gains) / 6 < 0.05) is not pays


def prediction(form: str, gain: float, half: float, state: int) -> Prediction:
    return Prediction(
        form, Interval(0.5, 0.4, 0.6, 6), Interval(gain, gain - half, gain + half, 6), state, 1.0, 9
    )


@pytest.mark.parametrize(
    ("gains", "advice"),
    [
        ([], None),
        ([("per key", 0.04, 0.01, 2)], None),
        ([("per key", 0.30, 0.31, 2)], None),
        ([("per key", 0.30, 0.1, 2), ("full", 0.32, 0.1, 4)], "per key"),
        ([("per key", 0.20, 0.1, 2), ("full", 0.32, 0.1, 4)], "full"),
        ([("per key", 0.30, 0.1, 2), ("rotated", 0.31, 0.1, 2)], "rotated"),
    ],
)
def test_the_cheapest_of_those_that_are_nearly_best(
    gains: list[tuple[str, float, float, int]], advice: str | None
) -> None:
    source = prediction("source", 0.0, 0.0, 1)
    assert _advice([source, *(prediction(*g) for g in gains)]) == advice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("advise") / "model"
    config: dict[str, Any] = {
        "pattern": "gla",
        "vocab_size": 260,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_k_dim": 4,
        "head_v_dim": 4,
    }
    GlazooForCausalLM(GlazooConfig(**config)).save_pretrained(made)
    return made


def test_the_command(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(32 + (i * i + i // 7) % 60 for i in range(1600)))
    arguments = ["advise", str(folder), str(text), "--tokenizer", "bytes", "--seeds", "2"]
    written = tmp_path / "advice.md"
    result = CliRunner().invoke(app, [*arguments, "--report", str(written), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == 1536
    assert found["pairs"] == [2, 4, 8]
    assert [u["layer"] for u in found["use"]] == [0, 1]
    assert all(1 <= d <= 4 for u in found["use"] for d in u["directions"])
    forms = [p["form"] for p in found["predictions"]]
    assert forms[0] == "source"
    assert {*forms[1:], *found["impossible"]} == set(FORMS)
    state = {p["form"]: p["state_bytes"] for p in found["predictions"]}
    # Two layers of two heads: 4 x 4 numbers, 4 more per key, 1 more per head.
    assert (state["source"], state["per key"], state["isotropic"]) == (256, 320, 272)
    assert found["advice"] in {None, *forms[1:]}
    said = written.read_text()
    assert "None would help" in said if found["advice"] is None else found["advice"] in said


def test_texts_that_are_too_short_are_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(ConversionError, match="two contexts of 512"):
        advise_checkpoint(folder, [text], tokenizer="bytes")
