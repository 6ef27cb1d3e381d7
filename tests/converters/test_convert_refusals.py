"""Bad input to the checkpoint converter: one line with the reason, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.conftest import MakeSource
from converters.converting import contents, edit_json
from safetensors.torch import load_file, save_file

from glazoo.converters import ConversionError, convert_checkpoint, inspect_checkpoint
from glazoo.converters import files as conversion_files

INDEX = "model.safetensors.index.json"


@contextmanager
def refused(parent: Path, message: str) -> Iterator[None]:
    """Expects a refusal in one line that changes nothing below a folder."""
    before = contents(parent)
    folders = sorted(p for p in parent.rglob("*") if p.is_dir())
    with pytest.raises(ConversionError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert contents(parent) == before
    assert sorted(p for p in parent.rglob("*") if p.is_dir()) == folders


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def truncate_data(folder: Path) -> None:
    path = first_shard(folder)
    os.truncate(path, path.stat().st_size - 1)


def truncate_header(folder: Path) -> None:
    os.truncate(first_shard(folder), 40)


def empty_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def append(folder: Path) -> None:
    with first_shard(folder).open("ab") as f:
        f.write(b"more")


def no_safetensors(folder: Path) -> None:
    first_shard(folder).write_bytes(b"PK\x03\x04" + b"\xff" * 64)


def damaged_header(folder: Path) -> None:
    path = first_shard(folder)
    data = bytearray(path.read_bytes())
    data[8] = ord("?")
    path.write_bytes(data)


def overlapping_tensors(folder: Path) -> None:
    path = first_shard(folder)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = next(k for k in header if k != "__metadata__")
    header[key]["shape"][0] += 1
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def absent_tensor(folder: Path) -> None:
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"]["backbone.layers.7.mixer.D"] = first_shard(folder).name
    (folder / INDEX).write_text(json.dumps(data))


def unlisted_tensor(folder: Path) -> None:
    data = json.loads((folder / INDEX).read_text())
    del data["weight_map"]["backbone.layers.1.mixer.D"]
    (folder / INDEX).write_text(json.dumps(data))


def doubled_tensor(folder: Path) -> None:
    key = "backbone.layers.1.mixer.D"
    other = next(p for p in sorted(folder.glob("*.safetensors")) if p != shard_of(folder, key))
    data = load_file(other)
    data[key] = torch.zeros(4)
    save_file(data, other, metadata={"format": "pt"})


def outside(folder: Path) -> None:
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"]["backbone.layers.1.mixer.D"] = "../other/model.safetensors"
    (folder / INDEX).write_text(json.dumps(data))


def rewrite(
    key: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = shard_of(folder, key)
        data = load_file(path)
        new = change(data.pop(key))
        listing = json.loads((folder / INDEX).read_text())
        if new is None:
            del listing["weight_map"][key]
        else:
            data[key] = new
        save_file(data, path, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps(listing))

    return edit


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = shard_of(folder, old)
        data = load_file(path)
        data[new] = data.pop(old)
        save_file(data, path, metadata={"format": "pt"})
        listing = json.loads((folder / INDEX).read_text())
        listing["weight_map"][new] = listing["weight_map"].pop(old)
        (folder / INDEX).write_text(json.dumps(listing))

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def pickles_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def dangling(folder: Path) -> None:
    (folder / "merges.txt").symlink_to(folder / "gone")


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (write("config.json", "{"), "config.json is not valid JSON"),
    "config is a list": (write("config.json", "[]"), "holds list, expected a JSON object"),
    "no model_type": (
        config(model_type=None),
        "has no model_type; supported are: b",
    ),
    "unsupported family": (
        config(model_type="llama"),
        "model_type 'llama' is not supported: its layers call no scan function",
    ),
    "converted model_type": (config(model_type="metaplastic_mamba2"), "is converted already"),
    "unsupported architecture": (
        config(architectures=["Mamba2Mixer"]),
        r"architectures \['Mamba2Mixer'\] is not supported .* one: Mamba2ForCausalLM",
    ),
    "quantised in words only": (
        config(quantization_config={"quant_method": "awq"}),
        r"says that it is quantised \(awq\), but no tensor is",
    ),
    "contradicting sizes": (config(num_heads=5), "config.json is not a valid mamba2 configuration"),
    "wrong type": (config(num_heads="four"), "config.json is not a valid mamba2 configuration"),
    "another size": (
        config(state_size=16),
        r"layers.0.mixer.conv1d.weight has shape \[96, 1, 4\], config.json says \[128, 1, 4\]",
    ),
    "another vocabulary": (
        config(vocab_size=62),
        r"has shape \[61, 32\], config.json says \[62, 32\]",
    ),
    "more layers": (config(num_hidden_layers=3), "layers.2.mixer.dt_bias is missing"),
    "fewer layers": (config(num_hidden_layers=1), "has a mixer in layer 1, config.json has not"),
    "missing shard": (lambda f: first_shard(f).unlink(), "the shard is missing"),
    "truncated shard": (truncate_data, "the shard is truncated, .* bytes of the"),
    "truncated header": (truncate_header, "the shard is truncated inside its header"),
    "empty shard": (empty_shard, "the shard is truncated inside its header"),
    "trailing bytes": (append, "4 bytes follow the last tensor"),
    "no safetensors": (no_safetensors, "not a safetensors file"),
    "damaged header": (damaged_header, "the header is damaged"),
    "overlapping tensors": (overlapping_tensors, "the header is damaged at tensor"),
    "index is no JSON": (write(INDEX, '{"weight_map"'), "index.json is not valid JSON"),
    "index without map": (write(INDEX, "{}"), "has no weight_map"),
    "absent tensor": (absent_tensor, "names tensor backbone.layers.7.mixer.D in .* does not hold"),
    "unlisted tensor": (
        unlisted_tensor,
        "holds tensor backbone.layers.1.mixer.D, which .* not name",
    ),
    "doubled tensor": (doubled_tensor, "tensor backbone.layers.1.mixer.D is in both"),
    "index reaches outside": (outside, "names a file outside the folder"),
    "leftover single file": (write("model.safetensors", "x"), "holds both model.safetensors and"),
    "wrong shape": (
        rewrite("backbone.layers.1.mixer.A_log", lambda t: t[:3].clone()),
        r"layers.1.mixer.A_log has shape \[3\], config.json says \[4\]",
    ),
    "missing mixer tensor": (
        rewrite("backbone.layers.1.mixer.dt_bias", lambda _: None),
        "layers.1.mixer.dt_bias is missing",
    ),
    "missing other tensor": (
        rewrite("backbone.norm_f.weight", lambda _: None),
        "backbone.norm_f.weight is missing",
    ),
    "integer weights": (
        rewrite("backbone.layers.0.mixer.out_proj.weight", lambda t: t.to(torch.int8)),
        "is stored as I8",
    ),
    "unknown mixer tensor": (
        rename("backbone.layers.0.mixer.norm.weight", "backbone.layers.0.mixer.norm.scale"),
        "layers.0.mixer.norm.weight is missing",
    ),
    "embedding by another name": (
        rename("backbone.embeddings.weight", "backbone.embedding.weight"),
        "backbone.embeddings.weight is missing",
    ),
    "pickles only": (pickles_only, "holds pickled weights only"),
    "no weights": (no_weights, "has neither model.safetensors nor"),
    "dangling link": (dangling, "merges.txt is a broken link"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sources(source: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(source)
    with refused(tmp_path, message):
        convert_checkpoint(source, tmp_path / "c")
    with refused(tmp_path, message):
        convert_checkpoint(source, tmp_path / "c", dry_run=True)


def test_no_such_source(tmp_path: Path) -> None:
    with refused(tmp_path, "there is no such folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "c")


def test_converted_already(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    with refused(tmp_path, "is converted already"):
        convert_checkpoint(tmp_path / "c", tmp_path / "d")
    # Without the block and our folder, its tensors still tell.
    config(metaplastic=None, model_type="mamba2", architectures=["Mamba2ForCausalLM"])(
        tmp_path / "c"
    )
    (tmp_path / "c" / "glazoo" / "manifest.json").unlink()
    with refused(tmp_path, "is converted already: it holds .*metaplastic"):
        convert_checkpoint(tmp_path / "c", tmp_path / "d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plasticity": -2.0}, "plasticity: got -2.0"),
        ({"gate": "both"}, "gate: got 'both'"),
        ({"rank": 100}, "rank: got 100"),
        ({"layers": [9]}, r"layers: \[9\] hold no convertible mixer; convertible are \[0, 1\]"),
    ],
)
def test_bad_options(
    source: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with refused(tmp_path, message):
        convert_checkpoint(source, tmp_path / "c", **options)  # type: ignore[arg-type]


def test_destinations_that_touch_the_source(source: Path, tmp_path: Path) -> None:
    with refused(tmp_path, "is the source itself"):
        convert_checkpoint(source, source, force=True)
    with refused(tmp_path, "is the source itself"):
        convert_checkpoint(source, tmp_path / "x" / ".." / "source", force=True)
    with refused(tmp_path, "lies inside the source"):
        convert_checkpoint(source, source / "converted")
    with refused(tmp_path, "contains the source"):
        convert_checkpoint(source, tmp_path, force=True)
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(ConversionError, match="is the source itself"):
        convert_checkpoint(source, tmp_path / "alias", force=True)


def test_destinations_that_must_not_be_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with refused(tmp_path, "exists and is not a folder"):
        convert_checkpoint(source, tmp_path / "file", force=True)
    with refused(tmp_path, "has no config.json: it is not a model's folder"):
        convert_checkpoint(source, tmp_path / "home", force=True)
    with refused(tmp_path, "exists already; --force replaces it"):
        convert_checkpoint(source, tmp_path / "empty")
    with refused(tmp_path, "is a symbolic link"):
        convert_checkpoint(source, tmp_path / "link", force=True)
    with refused(tmp_path, "its parent folder .* does not exist"):
        convert_checkpoint(source, tmp_path / "a" / "b")
    convert_checkpoint(source, tmp_path / "empty", force=True)
    assert (tmp_path / "empty" / "config.json").exists()


def test_unwritable_destination(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    # Tests may run as root, whom no mode bits stop.
    with monkeypatch.context() as m:
        m.setattr(tempfile, "mkdtemp", deny)
        with refused(tmp_path, "cannot write .*: Permission denied"):
            convert_checkpoint(source, tmp_path / "c")
    with monkeypatch.context() as m:
        m.setattr(os, "access", lambda *_: False)
        with refused(tmp_path, "is not writable"):
            convert_checkpoint(source, tmp_path / "c")


@pytest.mark.parametrize("after", [0, 2, 7])
def test_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls = 0
    real = os.fsync

    def fill(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fill)
    with refused(tmp_path, "cannot write .*: No space left on device"):
        convert_checkpoint(source, tmp_path / "c", link=False)


def test_full_disk_is_foreseen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)

    def small(_: object) -> os.statvfs_result:
        values = list(real)
        values[4] = 1
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", small)
    with refused(tmp_path, r"bytes are needed and [\d,]+ are free"):
        convert_checkpoint(source, tmp_path / "c", link=False)


def test_a_limit_on_file_sizes(source: Path, tmp_path: Path) -> None:
    # The operating system itself refuses to write on, in the middle of a file.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with refused(tmp_path, "cannot write .*: File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            convert_checkpoint(source, tmp_path / "c", link=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", INDEX, "first", "last"])
def test_a_source_that_changes_meanwhile(
    source: Path, tmp_path: Path, name: str, dtype: Any
) -> None:
    shards = sorted(source.glob("*.safetensors"))
    path = {"first": shards[0], "last": shards[-1]}.get(name, source / name)
    touched = False

    def touch(*_: object) -> None:
        nonlocal touched
        if not touched:
            touched = True
            # Of the same length: another number in the file, as a program that trains on writes it.
            data = bytearray(path.read_bytes())
            data[-2] ^= 1
            path.write_bytes(data)

    with pytest.raises(ConversionError, match="changed while it was being converted"):
        convert_checkpoint(source, tmp_path / "c", dtype=dtype, progress=touch)
    assert touched
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_errors_of_the_disk_are_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(self: object, *args: object, **kwargs: object) -> object:
        raise OSError(errno.EIO, "Input/output error", "shard")

    monkeypatch.setattr(conversion_files.Staging, "take", swap)
    with refused(tmp_path, "shard: Input/output error"):
        convert_checkpoint(source, tmp_path / "c")


def test_unused_tensors_are_reported(make_source: MakeSource) -> None:
    folder = make_source()
    path = first_shard(folder)
    data = load_file(path)
    save_file({**data, "mtp.weight": torch.zeros(2)}, path)
    listing = json.loads((folder / INDEX).read_text())
    listing["weight_map"]["mtp.weight"] = path.name
    (folder / INDEX).write_text(json.dumps(listing))
    warnings = inspect_checkpoint(folder).warnings
    assert any("1 tensors belong to no module, mtp.weight" in w for w in warnings)
    assert any("lack the metadata format = pt" in w for w in warnings)
