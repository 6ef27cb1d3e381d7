"""Tuning and measuring on the folder of a Hugging Face data set."""

from __future__ import annotations

import builtins
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import typer
from converters.tiny import tiny_model
from typer.testing import CliRunner

import glazoo.training
from glazoo.converters import ConversionError, convert_checkpoint, inspect_model, tune_checkpoint
from glazoo.converters.commands import inspect, tune
from glazoo.converters.examine import gate_summaries
from glazoo.converters.loading import load_converted
from glazoo.converters.texts import read_splits, read_tokens

SMALL: dict[str, Any] = {
    "steps": 4,
    "batch": 2,
    "length": 16,
    "tokenizer": "bytes",
    "cpu": True,
    "quiet": True,
}
TEXTS = [f"row {i}: the cat sat on mat {i * i}." for i in range(60)]
OTHER = [f"held out {i}: a dog lay on rug {i}." for i in range(20)]


def ids(texts: list[str]) -> list[int]:
    """What the byte tokenizer gives, written down anew."""
    return [i for text in texts for i in [*text.encode(), 256]]


def parquet(folder: Path, name: str, texts: list[str], column: str) -> None:
    table = {"id": list(range(len(texts))), column: texts}
    datasets.Dataset.from_dict(table).to_parquet(folder / f"{name}-00000-of-00001.parquet")


def jsonl(folder: Path, name: str, texts: list[str], column: str) -> None:
    rows = [json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)]
    (folder / f"{name}.jsonl").write_text("".join(rows))


def plain_json(folder: Path, name: str, texts: list[str], column: str) -> None:
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    (folder / f"{name}.json").write_text(json.dumps(rows))


def table(folder: Path, name: str, texts: list[str], column: str) -> None:
    with (folder / f"{name}.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("id", column), *enumerate(texts)])


Writer = Callable[[Path, str, list[str], str], None]
WRITERS: list[Writer] = [parquet, jsonl, plain_json, table]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("column", ["text", "content"])
def test_files_as_on_the_hub(folder: Path, write: Writer, column: str) -> None:
    write(folder, "train", TEXTS, column)
    write(folder, "validation", OTHER, column)
    train, held = read_splits([folder], "bytes", column=column)
    assert train.tolist() == ids(TEXTS)
    assert held is not None
    assert held.tolist() == ids(OTHER)
    assert read_tokens([folder], "bytes", column=column).tolist() == ids(TEXTS)
    got = read_tokens([folder], "bytes", column=column, split="validation")
    assert got.tolist() == ids(OTHER)


def test_text_files_count_whole(folder: Path, tmp_path: Path) -> None:
    whole = ["first line\nsecond line\n", "another\n\nfile\n"]
    for i, text in enumerate(whole):
        (folder / f"{i}.txt").write_text(text)
    got, held = read_splits([folder], "bytes")
    named, _ = read_splits(sorted(folder.iterdir()), "bytes")
    assert got.tolist() == named.tolist() == ids(whole)
    assert held is None


@pytest.mark.parametrize("several", [False, True])
def test_saved_data_sets(folder: Path, several: bool) -> None:
    one = datasets.Dataset.from_dict({"text": TEXTS})
    if several:
        held_out = datasets.Dataset.from_dict({"text": OTHER})
        datasets.DatasetDict({"train": one, "validation": held_out}).save_to_disk(folder)
    else:
        one.save_to_disk(folder)
    train, held = read_splits([folder], "bytes")
    assert train.tolist() == ids(TEXTS)
    assert (held.tolist() if held is not None else None) == (ids(OTHER) if several else None)


def test_splits_are_chosen(folder: Path) -> None:
    splits = {"first": TEXTS, "second": OTHER}
    made = {name: datasets.Dataset.from_dict({"text": t}) for name, t in splits.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    train, held = read_splits([folder], "bytes", split="second", validation_split="first")
    assert train.tolist() == ids(OTHER)
    assert held is not None
    assert held.tolist() == ids(TEXTS)
    train, held = read_splits([folder], "bytes", split="first")
    assert train.tolist() == ids(TEXTS)
    assert held is None
    for options, message in (
        ({}, "several splits and none named 'train'; it has 'first', 'second'"),
        ({"split": "third"}, "no split 'third'; it has 'first', 'second'"),
        ({"split": "first", "validation_split": "x"}, "no split 'x'"),
        ({"split": "first", "validation_split": "first"}, "is what is trained on"),
    ):
        with pytest.raises(ConversionError, match=message):
            read_splits([folder], "bytes", **options)


def test_no_more_is_read_than_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(folder, "train", ["x" * 9] * 1000, "text")
    real, rows = builtins.isinstance, 0

    from glazoo.converters import texts

    def count(value: object, kind: Any) -> bool:
        nonlocal rows
        rows += value == "x" * 9
        return real(value, kind)

    monkeypatch.setattr(texts, "isinstance", count, raising=False)
    assert read_tokens([folder], "bytes", limit=95).tolist() == ids(["x" * 9] * 10)[:95]
    assert rows <= 64
    train, held = read_splits([folder], "bytes", limit=20, validation_limit=10)
    assert len(train) == 20
    assert held is None


def test_absent_texts_are_passed_over(folder: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_tokens([folder], "bytes").tolist() == ids(["one", "two"])


def test_bad_data_sets_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="cannot read the data set") as caught:
        read_tokens([folder], "bytes")
    assert "\n" not in str(caught.value)
    jsonl(folder, "train", TEXTS, "content")
    with pytest.raises(ConversionError, match=r"has no 'text'; it has 'id', 'content'"):
        read_tokens([folder], "bytes")
    with pytest.raises(ConversionError, match=r"'id' of .* holds int, expected texts"):
        read_tokens([folder], "bytes", column="id")
    with pytest.raises(ConversionError, match="data set's folder, which stands alone"):
        read_tokens([folder, folder / "train.jsonl"], "bytes")
    with pytest.raises(ConversionError, match="split: text files have none, got 'train'"):
        read_tokens([folder / "train.jsonl"], "bytes", split="train")
    (folder / "train.jsonl").write_text("{")
    with pytest.raises(ConversionError, match="cannot read the data set") as caught:
        read_tokens([folder], "bytes")
    assert "\n" not in str(caught.value)


def test_without_the_package_a_message_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(folder, "train", TEXTS, "text")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"datasets is not installed: .*glazoo\[train\].*text files"
    ):
        read_tokens([folder], "bytes")
    path = folder / "train.jsonl"
    assert len(read_tokens([path], "bytes")) == path.stat().st_size + 1


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    tiny_model("mamba2", vocab_size=258).save_pretrained(tmp_path / "s", max_shard_size="40KB")
    convert_checkpoint(tmp_path / "s", tmp_path / "c")
    return tmp_path / "c"


def test_gates_are_tuned_on_a_data_set(converted: Path, folder: Path, tmp_path: Path) -> None:
    parquet(folder, "train", TEXTS, "content")
    parquet(folder, "validation", OTHER, "content")
    report = tune_checkpoint(converted, tmp_path / "t", [folder], column="content", **SMALL)
    assert report.gates != gate_summaries(load_converted(converted))
    # At most the share 0.05 of the 4 x 2 examples that the steps use, but one at least.
    assert report.evaluation_tokens == 16
    model = load_converted(tmp_path / "t")
    assert gate_summaries(model) == report.gates

    # What is held out is of the split for it: the loss before is the model's on those rows.
    first = torch.tensor(ids(OTHER)[:16])[None]
    source: Any = load_converted(converted)
    with torch.no_grad():
        loss = float(source(first, labels=first).loss)
    assert report.loss_before == pytest.approx(loss, rel=1e-5)

    more = tune_checkpoint(
        converted, tmp_path / "u", [folder], column="content", validation=0.5, **SMALL
    )
    assert more.evaluation_tokens > 16
    with pytest.raises(ConversionError, match="both need at least 4000"):
        tune_checkpoint(
            converted, tmp_path / "v", [folder], column="content", **{**SMALL, "length": 4000}
        )


def test_the_end_is_held_out_where_there_is_no_split(
    converted: Path, folder: Path, tmp_path: Path
) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    report = tune_checkpoint(converted, tmp_path / "t", [folder], **SMALL)
    assert report.evaluation_tokens == 16
    # Nine examples are what eight trained ones need with a share of 0.05 held out, and one spare.
    first = torch.tensor(ids(TEXTS)[9 * 16 : 10 * 16])[None]
    source: Any = load_converted(converted)
    with torch.no_grad():
        loss = float(source(first, labels=first).loss)
    assert report.loss_before == pytest.approx(loss, rel=1e-5)


def test_commands(converted: Path, folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(tune)
    app.command()(inspect)
    runner = CliRunner()
    jsonl(folder, "train", TEXTS, "content")
    jsonl(folder, "test", OTHER, "content")
    where = [str(converted), str(tmp_path / "t"), str(folder)]
    data = ["--column", "content", "--tokenizer", "bytes"]
    small = ["--steps", "2", "--batch", "2", "--length", "16", "--cpu", "--json"]
    result = runner.invoke(app, ["tune", *where, *data, "--validation-split", "test", *small])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    result = runner.invoke(
        app,
        ["inspect", *where[::2], *data, "--split", "test", "--tokens", "40", "--json"],
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 40
    assert inspect_model(converted, [folder], tokenizer="bytes", column="content").tokens > 40


@pytest.mark.parametrize(
    ("vocabulary", "ids"),
    [(256, [0x61, 0xC3, 0xA9, 0x62, 0x61]), (257, [0x61, 0xC3, 0xA9, 256, 0x62, 0x61, 256])],
)
def test_bytes_of_a_model_without_an_end_of_text(
    tmp_path: Path, vocabulary: int, ids: list[int]
) -> None:
    for name, text in (("a", "a\u00e9"), ("b", "ba")):
        (tmp_path / name).write_text(text, "utf-8")
    files = [tmp_path / "a", tmp_path / "b"]
    assert read_tokens(files, "bytes", vocabulary=vocabulary).tolist() == ids
    with pytest.raises(ConversionError, match="it gives id 195, the model has 128 tokens"):
        read_tokens(files, "bytes", vocabulary=128)


@pytest.mark.parametrize("limit", [0, 1, 100, 1_000, 30_000])
def test_of_a_long_text_no_more_is_read_than_is_asked_for(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(f"{i} \u00e9" for i in range(2500)), "utf-8")
    files = [tmp_path / "a", tmp_path / "b"]
    whole = read_tokens(files, "bytes")
    read = []
    made = glazoo.training.byte_tokenizer()

    def counted(text: str, **options: Any) -> Any:
        read.append(len(text))
        return made(text, **options)

    counted.eos_token_id = made.eos_token_id  # type: ignore[attr-defined]
    monkeypatch.setattr(glazoo.training, "byte_tokenizer", lambda: counted)
    found = read_tokens(files, "bytes", limit=limit)
    assert found.tolist() == whole[:limit].tolist()
    assert sum(read) <= 8 * (limit + 64)
