"""Reading headers and writing tensors one at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glazoo.converters import ConversionError
from glazoo.converters.tensors import NewTensor, TensorInfo, read_shard, write_shard


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_written_tensors_are_read_by_the_library(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 2), "empty": torch.zeros(0, 4), "b": torch.randn(5)}
    made: list[str] = []

    def maker(name: str) -> Any:
        return lambda: made.append(name) or values[name]

    path = tmp_path / "x.safetensors"
    with path.open("wb") as f:
        write_shard(f, [NewTensor(k, tuple(v.shape), maker(k)) for k, v in values.items()])
    assert made == list(values)
    found = load_file(path)
    assert set(found) == set(values)
    assert all(torch.equal(found[k], v) for k, v in values.items())
    shard = read_shard(path)
    assert shard.metadata == {"format": "pt"}
    assert shard.tensors["a"] == TensorInfo("F32", (3, 2), 24)
    assert shard.data_bytes == 44


def test_headers_of_the_library_are_read(tmp_path: Path) -> None:
    values = {
        "a": torch.zeros(3, dtype=torch.bfloat16),
        "b": torch.tensor(2, dtype=torch.int64),
        "c": torch.zeros(2, 0),
        "d": torch.ones(2, dtype=torch.bool),
    }
    save_file(values, tmp_path / "x.safetensors")
    shard = read_shard(tmp_path / "x.safetensors")
    assert {k: t.shape for k, t in shard.tensors.items()} == {
        k: tuple(v.shape) for k, v in values.items()
    }
    assert shard.size == (tmp_path / "x.safetensors").stat().st_size


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "the header is damaged"),
        (b"[1]", b"", "the header is damaged"),
        ({"a": 3}, b"", "the header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "the header is damaged"),
        ({"a": entry(shape=("x",))}, b"1234", "the header is damaged"),
        ({"a": entry(offsets=(0, 4, 8))}, b"1234", "the header is damaged"),
        ({"a": entry(shape=(2,))}, b"1234", "the header is damaged at tensor a"),
        ({"a": entry(offsets=(4, 8))}, b"12345678", "the header is damaged at tensor a"),
        ({"a": entry(), "b": entry()}, b"1234", "the header is damaged at tensor b"),
        ({"a": entry(offsets=(0, -4), shape=(-1,))}, b"", "the header is damaged"),
        ({"a": entry()}, b"123", "the shard is truncated, .* of the .* that its header promises"),
        ({"a": entry()}, b"12345", "1 bytes follow the last tensor"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read_shard(raw(tmp_path / "x.safetensors", header, data))


def test_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"x.safetensors: the shard is missing"):
        read_shard(tmp_path / "x.safetensors")
