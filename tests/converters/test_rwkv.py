"""RWKV: files in every layout against the published arithmetic, and the published checkpoints."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from converters import rwkv
from converters.rwkv import as_fla, forward, make, write_bin
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from glazoo.converters import ConversionError, import_original
from glazoo.converters.commands import convert, tune
from glazoo.models import GlazooConfig, GlazooForCausalLM
from glazoo.models.cache import CACHE

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "published"
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def published(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"the published checkpoints are not beside the repository: {name}")
    return DATA / name


def logits(folder: Path, ids: list[int] = IDS) -> Tensor:
    """Whole model in float64, at once; one token at a time and padded give the same."""
    model = GlazooForCausalLM.from_pretrained(folder, dtype=torch.float64).double().eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        out: Tensor = model(tokens).logits[0]
        steps, cache = [], None
        for i in range(len(ids)):
            step = model(tokens[:, i : i + 1], **{CACHE: cache}, use_cache=True)
            cache = step[CACHE]
            steps.append(step.logits[0, 0])
        mask = torch.tensor([[0, 1, 1, 0, *[1] * (len(ids) - 2)]])
        padded = torch.zeros_like(mask)
        padded[mask.bool()] = tokens[0]
        apart = model(padded, attention_mask=mask).logits[0][mask[0].bool()]
        packed = model(
            torch.cat([tokens, tokens], 1), cu_seq_lens_q=torch.tensor([0, len(ids), 2 * len(ids)])
        ).logits[0, len(ids) :]
    for other in (torch.stack(steps), apart, packed):
        assert (other - out).abs().max() < 1e-11
    return out


def near(ours: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding in float64, which sums of a few hundred terms enlarge."""
    return bool((ours - expected).abs().max() < 1e-11 * (1 + expected.abs().max()))


@pytest.mark.parametrize(("version", "biased"), [(5, False), (6, False), (7, False), (7, True)])
def test_pth_files_compute_what_is_published(version: int, biased: bool, tmp_path: Path) -> None:
    w = make(version, biased=biased)
    torch.save(w, tmp_path / "m.pth")
    import_original(tmp_path / "m.pth", tmp_path / "i")
    assert near(logits(tmp_path / "i"), forward(version, w, IDS))


@pytest.mark.parametrize("version", [6, 7])
def test_fla_folders_compute_what_is_published(version: int, tmp_path: Path) -> None:
    w = make(version)
    c, theirs = as_fla(version, w)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.json").write_text(json.dumps(c))
    save_file(theirs, tmp_path / "s" / "model.safetensors", metadata={"format": "pt"})
    import_original(tmp_path / "s", tmp_path / "i")
    # RWKV-6: the epsilon of all norms; RWKV-7: times the size of a head.
    eps = 1e-5 if version == 6 else 1e-5 * rwkv.HIDDEN / rwkv.HEADS
    assert near(logits(tmp_path / "i"), forward(version, w, IDS, eps))


@pytest.mark.parametrize(
    ("version", "form"),
    [
        pytest.param(v, f, marks=[pytest.mark.slow] * (v < 7 and f != "float32"))
        for v in (5, 6, 7)
        for f in rwkv.FORMS
    ],
)
def test_bin_files_compute_what_is_published(version: int, form: str, tmp_path: Path) -> None:
    w = {k: x.float().double() for k, x in make(version).items()}
    stands = write_bin(tmp_path / "m.bin", version, w, form)
    import_original(tmp_path / "m.bin", tmp_path / "i")
    expected = forward(version, stands, IDS, 1e-5 if version == 5 else 64e-5)
    ours = logits(tmp_path / "i")
    if version == 5:
        # The decay of the file is rounded to float32.
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    else:
        assert near(ours, expected)


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ConversionError, match=message):
        import_original(path, path.parent / "i", **options)
    assert not (path.parent / "i").exists()
    assert not list(path.parent.glob(".i*"))


def test_a_cache_goes_back_over_channel_mixing(tmp_path: Path) -> None:
    torch.save(make(6), tmp_path / "m.pth")
    import_original(tmp_path / "m.pth", tmp_path / "i")
    model = GlazooForCausalLM.from_pretrained(tmp_path / "i", dtype=torch.float64).double().eval()
    ids = torch.tensor([IDS])
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True)[CACHE]
        cache.activate_past_recording()
        model(torch.cat([ids[:, 3:6], ids[:, :3]], 1), **{CACHE: cache})
        cache.crop(-3)
        again = model(ids[:, 6:], **{CACHE: cache}).logits
        assert (again - model(ids).logits[:, 6:]).abs().max() < 1e-11


def test_fresh_models_of_these_parts_start_finite_and_refuse_what_they_have_not() -> None:
    given: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 7, "num_heads": 2, "head_k_dim": 8,
        "head_v_dim": 8,
    }  # fmt: skip
    parts: dict[str, Any] = {
        "norm": "layer", "feed_forward": "gated_channel_mix", "embedding_norm": True,
        "head_bias": True,
    }  # fmt: skip
    for pattern in ("rwkv5", "rwkv6", "rwkv7"):
        model = GlazooForCausalLM(GlazooConfig(pattern=pattern, **given, **parts))
        loss = model(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="norm: got 'batch', accepted are rms, layer"):
        GlazooConfig(pattern="rwkv7", norm="batch", **given)
    with pytest.raises(
        ValueError, match="feed_forward: got 'channel_mix', accepted beside softmax"
    ):
        GlazooConfig(pattern=["rwkv7", "attention"], feed_forward="channel_mix", **given)


def test_files_that_are_cut_off_are_refused_by_name(tmp_path: Path) -> None:
    w = make(7)
    torch.save(w, tmp_path / "m.pth")
    write_bin(tmp_path / "m.bin", 7, {k: x.float() for k, x in w.items()})
    for name in ("m.pth", "m.bin"):
        data = (tmp_path / name).read_bytes()
        for count in (10, len(data) // 3, len(data) - 1):
            (tmp_path / name).write_bytes(data[:count])
            refused(tmp_path / name, rf"{name}.* cut off")
    (tmp_path / "m.bin").write_bytes(data[:24] + b"\xff" * 100)
    refused(tmp_path / "m.bin", r"m.bin is damaged: .*fetch it again")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_files_of_others_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pth"
    path.write_text("weights")
    refused(path, r"m.pth is neither a PyTorch checkpoint nor a file of rwkv.cpp: it begins")
    for thing, name in ((Harmful(), ""), ({"model": nn.Linear(2, 2)}, "Linear")):
        torch.save(thing, path)
        refused(path, rf"m.pth.* other objects than tensors.*{name}.*may run code.*state_dict")
    assert not (tmp_path / "harm").exists()
    torch.save([torch.zeros(1)], path)
    refused(path, "m.pth holds list, expected a state dict")
    torch.save({"step": 3}, path)
    refused(path, "m.pth: step holds int, expected a tensor")
    torch.save({"a.weight": torch.zeros(1)}, path)
    refused(path, r"m.pth: it holds a.weight ..., which is no RWKV.* rwkv7 \(r_k\)")
    w = make(7)
    torch.save(w | {"blocks.1.att.s_emb": torch.zeros(2)}, path)
    refused(path, r"m.pth: pth.rwkv7: no place for blocks.1.att.s_emb")
    torch.save(w | {"blocks.1.ffn.s_emb": torch.zeros(2)}, path)
    refused(path, r"m.pth: blocks.1.ffn.s_emb has no place in the model$")
    torch.save(w | {"blocks.1.att.w2": torch.zeros(3, 3)}, path)
    refused(path, r"blocks.1.att.w2 has shape \[3, 3\], expected \[5, 32\]")
    torch.save({k: x for k, x in w.items() if k != "blocks.2.att.k_a"}, path)
    refused(path, r"blocks.2.att.k_a is missing")
    torch.save(w, path)
    refused(path, "characters: got 3 characters, of which 2 differ", characters="aab")
    data = write_bin(tmp_path / "m.bin", 7, {k: x.float() for k, x in w.items()})
    assert data
    content = bytearray((tmp_path / "m.bin").read_bytes())
    content[24 + 8] = 3
    (tmp_path / "m.bin").write_bytes(bytes(content))
    refused(tmp_path / "m.bin", "is stored in rwkv.cpp's form 3, accepted are float32, float16, Q5")


@pytest.mark.parametrize(
    ("name", "version", "budget"),
    [("tiny-rwkv-7v0-834K-FP32", "7v0-834K", 5e-6), ("tiny-rwkv-5v2-730K-FP32", "5v2-730K", 1e-5)],
)
def test_published_logits(name: str, version: str, budget: float, tmp_path: Path) -> None:
    expected = np.fromfile(published(f"expected-logits-{version}.bin"), dtype="<f4")
    import_original(published(f"{name}.bin"), tmp_path / "i")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "i")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "i").eval()
    ids = tokenizer('"in', return_tensors="pt").input_ids
    assert ids.tolist() == [list(b'"in')]
    assert tokenizer.decode(tokenizer("naïve\n \x00").input_ids) == "naïve\n \x00"
    with torch.no_grad():
        ours = model(ids).logits[0, -1]
    assert (ours - torch.from_numpy(expected)).abs().max() < budget


def reversals(lengths: range, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    numbers = ["".join(draw.choices("0123456789", k=n)) for n in lengths]
    return [(n, n[::-1]) for n in numbers]


def test_published_model_from_file_to_tuned_folder(tmp_path: Path) -> None:
    source = published("rwkv7-reverse-2x32.pth")
    app = typer.Typer()
    app.command("convert")(convert)
    app.command("tune")(tune)

    def run(*words: object) -> None:
        result = CliRunner().invoke(app, [str(x) for x in words])
        assert result.exit_code == 0, result.output

    original, metaplastic = tmp_path / "original", tmp_path / "metaplastic"
    run("convert", "--import", source, original, "--characters", "0123456789,#")
    rows = [*reversals(range(1, 61)), *reversals(range(1, 61), 1)]
    tokenizer = AutoTokenizer.from_pretrained(original)
    tokenizer.pad_token = "#"
    made = tokenizer([f"{a},{b}#" for a, b in rows], padding=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        best = model(**made).logits.argmax(-1)
    wrong = 0
    for row, ids, mask, (_, digits) in zip(
        best, made.input_ids, made.attention_mask, rows, strict=True
    ):
        written = ids[mask.bool()][-1 - len(digits) :]
        # The last token writes nothing more.
        wrong += int((row[mask.bool()][-2 - len(digits) : -1] != written).sum())
    assert wrong == 0
    run("convert", original, metaplastic, "--verify")
    text = tmp_path / "text"
    text.write_text("".join(f"{a},{b}#" for a, b in reversals(range(1, 61)) * 3))
    run("tune", metaplastic, tmp_path / "tuned", text, "--steps", 2, "--length", 128)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config.specs
    run("convert", "--revert", metaplastic, tmp_path / "back")
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (original / weights).read_bytes()
